"""Analyses end to end: the platform's own runs, the twin's model behind the model proxy, a real sandbox on a real checkout."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from dagster import DagsterInstance
from sqlalchemy import text

from kilo_pipelines.acts.analysis import analyse, queue_analyses
from kilo_pipelines.acts.dismissal import dismiss
from kilo_pipelines.core.owners import analysis_pools, dismissal_pools
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.retry import BLOCK, BLOCKS_UNTIL_A_PERSON_ACTS
from kilo_pipelines.services.security import triage
from kilo_pipelines.services.security.analysis import snapshot_of
from kilo_pipelines.services.security.config import SERVICE, SecurityConfig
from kilo_pipelines.store import AnalysisRow, Claimed, FindingRow, Refused
from kilo_pipelines.store.analyses import MAX_PASSED
from kilo_pipelines.store.queue import PERSON_WAIT
from tests.conftest import Database
from tests.support.security import LOG, Dispatcher, Owner, Storefront, syncing, with_model
from tests.support.twin import Twin


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twin]:
    # Sockets have short names: the home of pytest's own making would be too long for them.
    with syncing(tmp_path_factory.mktemp("a")) as running, with_model(running):
        yield running


@pytest.fixture(scope="module")
def instance() -> Iterator[DagsterInstance]:
    with DagsterInstance.ephemeral() as found:
        yield found


@pytest.fixture
def desk(database: Database, instance: DagsterInstance) -> Dispatcher:
    return Dispatcher(database, instance)


def _only(owner: Owner, finding: FindingRow) -> AnalysisRow:
    (found,) = owner.store.analyses.of_finding(owner.id, finding.id)
    return found


def _storefront(database: Database, twin: Twin) -> tuple[Storefront, FindingRow, FindingRow]:
    """A synced shop, its finding that requests reach, and the one of a package that nobody imports."""
    shop = Storefront(database, twin)
    shop.sync()
    reached, unused = sorted(shop.findings(), key=lambda one: one.severity)
    return shop, reached, unused


def _asked(owner: Owner, finding: FindingRow, **more: bool) -> UUID:
    item = analyse(owner.store, finding, role="owner", actor="test", **more)
    assert isinstance(item, UUID), item
    return item


def test_reading_the_repository_tells_a_package_that_is_reached_from_one_that_nobody_imports(
    database: Database, twin: Twin, desk: Dispatcher
) -> None:
    shop, reached, unused = _storefront(database, twin)
    for one in (reached, unused):
        _asked(shop, one)
    desk.work(shop.id)
    found = _only(shop, reached)
    assert (found.state, found.reason) == ("completed", Reason.ANALYSED), found
    assert found.deep and found.deep["exploitable"] is True and found.deep["action"] == "open_pr"
    assert [one["path"] for one in found.deep["locations"]] == ["src/search.js"]
    other = _only(shop, unused)
    assert other.deep and other.deep["exploitable"] is False and other.deep["action"] == "dismiss"
    assert found.commit_sha and found.commit_sha == other.commit_sha
    assert {"security_analysis", "agent_session", "settle_security_analysis"} <= set(desk.runs)
    assert sorted(one["exploitable"] for one in shop.audited("security.finding.analysis_completed")) == [False, True]


def test_what_a_session_says_that_saw_nothing_is_not_believed(
    database: Database, twin: Twin, desk: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its search found nothing, and the platform's finds the use: nobody has judged it."""
    monkeypatch.setenv("KILO_SCRIPTED_BEHAVIOUR", "blind")
    shop, reached, unused = _storefront(database, twin)
    for one in (reached, unused):
        _asked(shop, one, deep=True)
    desk.work(shop.id)
    found = _only(shop, reached)
    assert (found.state, found.reason) == ("completed", Reason.ANALYSIS_CONTRADICTED)
    assert found.deep and (found.deep["exploitable"], found.deep["action"]) == ("unknown", "manual_review")
    other = _only(shop, unused)
    assert (other.reason, other.deep and other.deep["exploitable"]) == (Reason.ANALYSED, False)


def test_a_hosted_agent_reads_no_repository_and_nothing_is_paid_to_learn_that(
    database: Database, twin: Twin, desk: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILO_AGENT", "hosted")
    shop, reached, unused = _storefront(database, twin)
    _asked(shop, reached, deep=True)
    _asked(shop, unused)
    desk.work(shop.id)
    asked, judged = _only(shop, reached), _only(shop, unused)
    assert (asked.state, asked.reason, asked.triage) == ("failed", Reason.HOSTED_WORK_REFUSED, None)
    assert (judged.state, judged.reason, judged.deep) == ("failed", Reason.HOSTED_WORK_REFUSED, None)
    assert judged.triage and judged.triage["needs_deep"], "whether it has to be read is asked first"
    assert sorted(one["reason"] for one in shop.audited("security.finding.analysis_failed")) == ["hosted_work_refused"] * 2
    assert shop.store.spend.of_item(shop.id, asked.item_id) == [] and "agent_session" not in desk.runs


def test_an_alert_that_its_metadata_settle_takes_no_session(database: Database, twin: Twin, desk: Dispatcher) -> None:
    owner = Owner(database, twin, 1, 120)
    owner.sync()
    tool = next(one for one in owner.findings(status="open", dependency_scope="development") if one.severity in ("medium", "low"))
    _asked(owner, tool)
    desk.work(owner.id)
    found = _only(owner, tool)
    assert (found.state, found.deep) == ("completed", None)
    assert found.triage and (found.triage["action"], found.triage["confidence"]) == ("dismiss", "high")
    assert "agent_session" not in desk.runs
    assert owner.store.analyses.latest(owner.id, [tool.id])[tool.id].item_id == found.item_id


def test_automatic_analysis_takes_what_came_after_it_was_switched_on_worst_first_and_two_at_once(
    database: Database, twin: Twin, desk: Dispatcher
) -> None:
    owner = Owner(database, twin, 1, 60, analysis_mode="shallow")
    owner.sync()
    database.clock.advance(timedelta(seconds=5))
    owner.configure(auto_analysis_enabled=True, auto_analysis_min_severity="high")
    assert owner.sync().analyses == 0, "what was there before is left alone"
    owner.configure(auto_analysis_include_existing=True)
    opened = owner.sync().analyses
    due = [one for one in owner.findings(status="open") if one.severity in ("critical", "high")]
    assert opened == len(due) > 3
    assert owner.sync().analyses == 0, "a second sweep opens nothing twice"
    offers = [one for one in owner.store.queue.offers(50) if one.owner_id == owner.id and one.kind == "start"]
    first = owner.store.queue.get(offers[0].ids[0])
    assert first is not None and owner.findings(id=UUID(first.details["finding_id"]))[0].severity == due_worst(due)
    for _ in due:  # who found both slots taken is offered again after half a minute
        database.clock.advance(timedelta(seconds=31))
        desk.work(owner.id)
    assert {one.state for one in owner.items("security_analysis")} == {"completed"}


def due_worst(due: list[FindingRow]) -> str:
    return "critical" if any(one.severity == "critical" for one in due) else "high"


def test_what_is_fixed_while_it_waits_is_not_analysed(database: Database, twin: Twin, desk: Dispatcher) -> None:
    owner = Owner(database, twin, 1, 40, auto_analysis_include_existing=True)
    owner.configure(auto_analysis_enabled=True, auto_analysis_min_severity="all")
    owner.sync()
    one = owner.findings(status="open")[0]
    twin.control("move-alert", repository=owner.names[0], number=int(one.source_id), action="fixed")
    owner.sync()
    assert (_only(owner, one).state, _only(owner, one).reason) == ("cancelled", Reason.FINDING_NOT_OPEN)


def test_a_finding_that_keeps_coming_back_is_analysed_again_twice_and_no_more(
    database: Database, twin: Twin, desk: Dispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    owner = Owner(database, twin, 1, 30, auto_analysis_include_existing=True, analysis_mode="shallow")
    owner.configure(auto_analysis_enabled=True, auto_analysis_min_severity="all")
    owner.sync()
    due = owner.findings(status="open")
    for _ in due:  # who found both slots taken is offered again after half a minute
        desk.work(owner.id)
        database.clock.advance(timedelta(seconds=31))
    # One that no other alert speaks for or is spoken for by it.
    problems = Counter((row.ghsa_id, row.package_name, row.manifest_path) for row in owner.findings())
    one = next(row for row in due if problems[row.ghsa_id, row.package_name, row.manifest_path] == 1)
    for _ in range(3):
        for action in ("fixed", "reintroduced"):
            twin.control("move-alert", repository=owner.names[0], number=int(one.source_id), action=action)
            owner.sync()
            # The twin tells whole seconds, and two changes within one are one.
            time.sleep(1.05)
            database.clock.advance(timedelta(seconds=5))
        desk.work(owner.id)
    assert owner.sync().analyses == 0
    found = [(row.origin, row.reason) for row in reversed(owner.store.analyses.of_finding(owner.id, one.id))]
    assert found == [
        ("automatic", Reason.ANALYSED),
        ("reopened", Reason.ANALYSED),
        ("reopened", Reason.ANALYSED),
        ("reopened", Reason.ANALYSIS_LOOP),
    ], "that it isn't analysed is on record, once for each time that it came back"
    assert any(f"finding {one.id}: {Reason.ANALYSIS_LOOP}" in line for line in caplog.messages)


def test_what_was_due_and_isnt_analysed_for_a_day_is_shown(database: Database, twin: Twin, desk: Dispatcher) -> None:
    owner = Owner(database, twin, 1, 30, auto_analysis_include_existing=True, analysis_mode="shallow")
    owner.configure(auto_analysis_enabled=True, auto_analysis_min_severity="all")
    owner.sync()

    def shown() -> int:
        return sum(one["owner"] == owner.names[0] for one in owner.store.findings.offenders("unanalysed", limit=1_000))

    assert shown() == 0
    database.clock.advance(timedelta(hours=25))
    assert shown() == len(owner.findings(status="open")) > 0
    for _ in owner.findings(status="open"):
        desk.work(owner.id)
        database.clock.advance(timedelta(seconds=31))
    assert shown() == 0
    item = _asked(owner, owner.findings(status="open")[0])
    claimed = owner.store.queue.claim(item, "security_analysis", run_id="r", pools=lambda _kind, _plan: {"x": 1}, lease_s=60)
    assert isinstance(claimed, Claimed)
    database.clock.advance(timedelta(hours=3))
    stale = owner.store.findings.offenders("stale_running")
    assert [one["item"] for one in stale if one["owner"] == owner.names[0]] == [item]
    owner.store.queue.cancel(item, reason=Reason.USER_CANCELLED, actor="test")


def test_a_person_goes_before_what_nobody_asked_for_and_only_once(database: Database, twin: Twin) -> None:
    owner = Owner(database, twin, 1, 30, auto_analysis_include_existing=True)
    owner.configure(auto_analysis_enabled=True, auto_analysis_min_severity="all")
    owner.sync()
    last = owner.findings(status="open", severity="low")[0]
    item = _asked(owner, last)
    assert analyse(owner.store, last, role="member", actor="test") is Reason.ANALYSIS_ACTIVE
    assert analyse(owner.store, last, role="viewer", actor="test") is Reason.ROLE_NOT_ALLOWED
    waiting = [one for one in owner.store.analyses.of_finding(owner.id, last.id) if one.ended_at is None]
    assert [one.item_id for one in waiting] == [item]
    first = next(one for one in owner.store.queue.offers(50) if one.owner_id == owner.id and one.kind == "start")
    assert item in first.ids


@pytest.mark.parametrize(("status", "reason"), [(402, Reason.INSUFFICIENT_CREDITS), (503, Reason.MODEL_UNREACHABLE)])
def test_a_model_that_doesnt_answer_lets_the_item_wait_without_a_slot(
    database: Database, twin: Twin, desk: Dispatcher, status: int, reason: Reason
) -> None:
    owner = Owner(database, twin, 1, 40, analysis_mode="shallow")
    owner.sync()
    one, other = owner.findings(status="open")[:2]
    twin.fault("POST", "/chat/completions", status=status)
    item = _asked(owner, one)
    desk.once(owner.id)
    found = owner.store.queue.get(item)
    assert found is not None and (found.state, found.reason) == ("waiting", reason)
    with owner.store.database.owner(owner.id) as connection:
        held = connection.execute(text("select count(*) from owner_slots where item_id is not null")).scalar()
    assert held == 0
    _asked(owner, other)
    desk.work(owner.id)
    blocked = _only(owner, other).state == "waiting"
    assert blocked == (status == 402), "without credit the whole service waits"
    database.clock.advance(timedelta(minutes=31))
    desk.work(owner.id)
    assert {row.state for row in (_only(owner, one), _only(owner, other))} == {"completed"}


def test_an_answer_that_is_none_by_the_schema_is_said_to_be_a_fallback(database: Database, twin: Twin, desk: Dispatcher) -> None:
    owner = Owner(database, twin, 1, 30, analysis_mode="shallow")
    owner.sync()
    one = owner.findings(status="open")[0]
    twin.fault("POST", "/chat/completions", "no_tool")
    _asked(owner, one)
    desk.work(owner.id)
    found = _only(owner, one)
    assert found.state == "completed" and found.triage == triage.fallback().model_dump(mode="json")


def test_two_owners_of_one_repository_have_analyses_of_their_own(database: Database, twin: Twin, desk: Dispatcher) -> None:
    mine, theirs = Owner(database, twin, 1, 30, analysis_mode="shallow"), Owner(database, twin, 1, 1)
    mine.sync()
    theirs.connect(int(mine.repositories[0]["repository_id"]), mine.names[0])
    theirs.sync()
    one = mine.findings(status="open")[0]
    _asked(mine, one)
    desk.work(mine.id)
    assert _only(mine, one).state == "completed"
    assert theirs.items("security_analysis") == []
    assert theirs.store.analyses.of_finding(theirs.id, one.id) == []


def _claim(owner: Owner, item: UUID, *, automatic: bool) -> Claimed | Refused:
    pools = analysis_pools(automatic=automatic)
    return owner.store.queue.claim(item, "security_analysis", run_id="r", pools=lambda _kind, _plan: pools, lease_s=60)


def _due(database: Database, twin: Twin, **config: Any) -> tuple[Owner, list[FindingRow]]:
    """An owner whose open findings all wait for automatic analysis."""
    owner = Owner(database, twin, 1, 30, auto_analysis_include_existing=True, analysis_mode="shallow", **config)
    owner.configure(auto_analysis_enabled=True, auto_analysis_min_severity="all")
    assert owner.sync().analyses > 4
    return owner, owner.findings(status="open")


def _sweep(owner: Owner) -> int:
    setting = owner.store.owners.config(owner.id, SERVICE)
    assert setting is not None
    return queue_analyses(owner.store, owner.id, SecurityConfig.model_validate(setting.config), LOG)


def test_two_automatic_analyses_at_once_and_three_in_all(database: Database, twin: Twin) -> None:
    owner, due = _due(database, twin)
    waiting = [_only(owner, one).item_id for one in due]
    taken = [_claim(owner, one, automatic=True) for one in waiting[:3]]
    assert [one.outcome if isinstance(one, Refused) else None for one in taken] == [None, None, Reason.NO_SLOT]
    asked = [_claim(owner, one, automatic=False) for one in waiting[3:5]]
    assert [one.outcome if isinstance(one, Refused) else None for one in asked] == [None, Reason.NO_SLOT]
    assert isinstance(taken[0], Claimed) and owner.store.queue.conclude(taken[0], "cancelled", Reason.USER_CANCELLED)
    assert isinstance(_claim(owner, waiting[4], automatic=False), Claimed), "a free slot is anybody's"
    database.clock.advance(timedelta(seconds=31))
    assert isinstance(_claim(owner, waiting[2], automatic=True), Refused), "three are under way"


def test_an_end_that_says_nothing_of_the_finding_is_tried_again_with_waits_and_an_end(database: Database, twin: Twin) -> None:
    owner, (one, other, *_) = _due(database, twin)
    owner.configure(auto_analysis_enabled=False)
    assert _sweep(owner) == 0 and _only(owner, other).reason == Reason.ANALYSIS_NOT_WANTED
    owner.configure(auto_analysis_enabled=True)
    assert _sweep(owner) > 1, "switched on again, what was waiting before waits again"
    tries = 0
    while live := next((row for row in owner.store.analyses.of_finding(owner.id, one.id) if row.ended_at is None), None):
        claim = _claim(owner, live.item_id, automatic=True)
        assert isinstance(claim, Claimed) and owner.store.queue.conclude(claim, "failed", Reason.MODEL_UNREACHABLE)
        assert _sweep(owner) == 0, "not at once"
        tries += 1
        database.clock.advance(timedelta(minutes=15) * 2 ** (tries - 1))
        _sweep(owner)
    assert tries == MAX_PASSED
    database.clock.advance(timedelta(days=30))
    assert _sweep(owner) == 0
    assert isinstance(_asked(owner, one), UUID), "a person may always"


def test_what_a_result_or_a_person_ended_is_not_tried_again_by_itself(database: Database, twin: Twin) -> None:
    owner, (one, other, *_) = _due(database, twin)
    claim = _claim(owner, _only(owner, one).item_id, automatic=True)
    assert isinstance(claim, Claimed) and owner.store.queue.conclude(claim, "failed", Reason.RESULT_INVALID)
    owner.store.queue.cancel(_only(owner, other).item_id, reason=Reason.USER_CANCELLED, actor="test")
    database.clock.advance(timedelta(days=1))
    assert _sweep(owner) == 0


def test_other_facts_are_analysed_anew_within_the_limit_and_a_mere_touch_is_not(database: Database, twin: Twin) -> None:
    owner, (one, *_) = _due(database, twin)

    def done() -> None:
        row = owner.store.findings.get(owner.id, one.id)
        assert row is not None
        claim = _claim(owner, owner.store.analyses.of_finding(owner.id, one.id)[0].item_id, automatic=True)
        assert isinstance(claim, Claimed)
        details = {"snapshot": snapshot_of(row), "triage": _told(), "completed_at": owner.clock.now().isoformat()}
        assert owner.store.queue.complete(claim, Reason.ANALYSED, details=details, effects=[])

    def changed(**columns: Any) -> None:
        database.clock.advance(timedelta(minutes=1))
        sets = ", ".join(f"{name} = :{name}" for name in columns)
        with owner.store.database.owner(owner.id) as connection:
            values = {**columns, "id": one.id, "now": owner.clock.now()}
            connection.execute(text(f"update findings set {sets}, changed_at = :now where id = :id"), values)

    done()
    changed(html_url="https://github.com/other")
    assert _sweep(owner) == 0
    for number in range(3):
        changed(vulnerable_version_range=f"< {number}")
        assert _sweep(owner) == (1 if number < 2 else 0), "as often as one that comes back"
        if number < 2:
            done()
    assert owner.store.analyses.of_finding(owner.id, one.id)[0].reason == Reason.ANALYSIS_LOOP
    assert _sweep(owner) == 0 and len(owner.store.analyses.of_finding(owner.id, one.id)) == 4


def _told() -> dict[str, Any]:
    return {"needs_deep": False, "reasoning": "r", "action": "manual_review", "confidence": "high", "fallback": False}


def test_without_credit_only_what_needs_the_model_waits_and_only_what_was_refused_is_forgiven(
    database: Database, twin: Twin
) -> None:
    owner, (one, other, *_) = _due(database, twin)
    queue, credit = owner.store.queue, Reason.INSUFFICIENT_CREDITS
    item = _only(owner, one).item_id
    for times in range(BLOCKS_UNTIL_A_PERSON_ACTS):
        until = queue.block_service(owner.id, "security_analysis", "session", credit, item)
        assert until is not None, times
        refused = _claim(owner, item, automatic=True)
        assert isinstance(refused, Refused) and (refused.outcome, refused.state) == (credit, "waiting")
        queue.unblock_service(owner.id, "security_analysis", "question")  # another model, another bill
        database.clock.advance(until - database.clock.now())
    assert queue.block_service(owner.id, "security_analysis", "session", credit, item) is None
    refused = _claim(owner, item, automatic=True)
    assert isinstance(refused, Refused) and (refused.outcome, refused.state) == (Reason.ACTION_REQUIRED, "waiting")

    setting = owner.store.owners.config(owner.id, SERVICE)
    assert setting is not None and setting.action_required is None
    assert owner.sync().outcome == "synced" and owner.id in owner.store.findings.owners(), "syncs go on, by the clock, too"
    assert _sweep(owner) == 0, "nothing is opened that couldn't start"
    owner.configure(notice_recipients=[{"kind": "email", "address": "ada@acme.test"}])
    assert owner.id in owner.store.notices.owners()
    dismissal = dismiss(owner.store, other, role="owner", actor="test", reason="not_used", comment="")
    assert isinstance(dismissal, UUID)
    assert isinstance(queue.claim(dismissal, "dismissal", run_id="r", pools=dismissal_pools, lease_s=60), Claimed)

    (service,) = owner.store.owners.services(owner.id)
    assert (service["action_required"]["reason"], service["action_required"]["service"]) == (credit, "security_analysis")
    owner.store.owners.enable_service(owner.id, SERVICE, True, actor="test")
    (service,) = owner.store.owners.services(owner.id)
    assert service["action_required"] is None
    database.clock.advance(PERSON_WAIT)
    assert _sweep(owner) == 0 and isinstance(_claim(owner, item, automatic=True), Claimed), "what waited for it starts"
    assert queue.block_service(owner.id, "security_analysis", "session", credit, item) == database.clock.now() + BLOCK


@pytest.mark.agent_cli
def test_the_kilo_cli_reads_the_repository_in_the_sandbox(
    database: Database, twin: Twin, desk: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILO_AGENT", "kilo")
    shop = Storefront(database, twin)
    shop.sync()
    reached = min(shop.findings(), key=lambda one: one.severity)
    _asked(shop, reached, deep=True)
    desk.work(shop.id)
    found = _only(shop, reached)
    assert (found.state, found.reason) == ("completed", Reason.ANALYSED), found
    assert found.deep and (found.deep["exploitable"], found.deep["action"]) == (True, "open_pr"), found.deep
    assert [one["path"] for one in found.deep["locations"]] == ["src/search.js"]
