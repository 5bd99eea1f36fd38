"""Dismissals end to end: here and at the twin, bound to the twin's git, by people and by rules."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from dagster import DagsterInstance
from sqlalchemy import text

from kilo_pipelines.acts.analysis import analyse
from kilo_pipelines.acts.dismissal import after_analysis, dismiss, dismiss_many
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.ops import security_dismissal
from kilo_pipelines.ops.findings import policy_for
from kilo_pipelines.ops.security_sync import SOURCE, AlertTaker
from kilo_pipelines.resources.github import GitHubResource
from kilo_pipelines.services.security.config import SERVICE, SecurityConfig
from kilo_pipelines.services.security.dismissal import units
from kilo_pipelines.store import FindingRow, NewItem
from tests.conftest import Database
from tests.support.git import git
from tests.support.remediation import Shop, analysed
from tests.support.security import LOG, Dispatcher, Owner, Storefront, seeded, syncing, with_model
from tests.support.twin import Twin


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twin]:
    home = tmp_path_factory.mktemp("d")
    catalogue = home / "known.json"
    catalogue.write_text(json.dumps({"vulnerabilities": [{"cveID": "CVE-2026-1234567"}]}))
    with syncing(home) as running, with_model(running), pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILO_KNOWN_EXPLOITED_FILE", str(catalogue))
        yield running


@pytest.fixture
def desk(database: Database) -> Iterator[Dispatcher]:
    with DagsterInstance.ephemeral() as instance:
        yield Dispatcher(database, instance)


@pytest.fixture(autouse=True)
def alone(database: Database) -> None:
    """The twin has one installation, and nothing is written through one that two owners hold."""
    for one in database.store.owners.all():
        with database.store.database.owner(one.id) as connection:
            connection.execute(text("update integrations set disconnected_at = now() where disconnected_at is null"))


class Orders(Owner):
    """The twin's repository with history, and alerts."""

    def __init__(self, database: Database, twin: Twin, **config: Any) -> None:
        self.twin, self.store, self.clock = twin, database.store, database.clock
        self.repositories = seeded(twin, 60, ["orders"])[:1]
        self.names = [str(one["repository"]) for one in self.repositories]
        self.id = self.store.owners.create("organization", "orders").id
        self.connect(int(self.repositories[0]["repository_id"]), self.names[0])
        self.store.owners.put_config(self.id, SERVICE, config, enabled=True, expected_revision=0, actor="test")


def upstream(owner: Owner, finding: FindingRow) -> dict[str, Any]:
    """The alert as the twin has it."""
    page = owner.twin.app().installation(
        owner.twin.credentials["installation_id"], [finding.repository_id], {"metadata": "read", "vulnerability_alerts": "read"}
    )
    from kilo_pipelines.providers.github_alerts import get_alert

    return get_alert(page, owner.names[0], int(finding.source_id))


def again(owner: Owner, finding: FindingRow) -> FindingRow:
    row = owner.store.findings.get(owner.id, finding.id)
    assert row is not None
    return row


def asked(owner: Owner, finding: FindingRow, comment: str = "") -> UUID:
    item = dismiss(owner.store, finding, role="owner", actor="test", reason="tolerable_risk", comment=comment)
    assert isinstance(item, UUID), item
    return item


def push(twin: Twin, full_name: str, path: str, content: str) -> None:
    """A commit on the default branch, behind everybody's back."""
    bare = twin.home / "git" / f"{full_name}.git"
    work = twin.home / f"work-{bare.stem}"
    if not work.exists():
        git(twin.home, "clone", "-q", str(bare), str(work))
    git(work, "pull", "-q")
    (work / path).parent.mkdir(parents=True, exist_ok=True)
    (work / path).write_text(content)
    git(work, "add", "-A")
    git(work, "-c", "user.name=t", "-c", "user.email=t@t.test", "commit", "-q", "-m", "Change")
    git(work, "push", "-q", "origin", "HEAD:main")


def test_a_persons_dismissal_stands_here_and_at_the_source_with_a_comment_that_fits(
    database: Database, twin: Twin, desk: Dispatcher
) -> None:
    owner = Owner(database, twin, 1, 30)
    owner.sync()
    finding = owner.findings(status="open", severity="critical", disposition=None)[:1] or owner.findings(status="open")[:1]
    (one,) = finding
    asked(owner, one, "Because. " * 60 + "\U0001f600" * 40)
    desk.work(owner.id)
    row, there = again(owner, one), upstream(owner, one)
    assert (row.status, row.disposition_by, row.disposition_actor, row.disposition_reason) == (
        "ignored",
        "manual",
        "test",
        "tolerable_risk",
    )
    assert (there["state"], there["dismissed_reason"]) == ("dismissed", "tolerable_risk")
    assert units(there["dismissed_comment"]) <= 280 and there["dismissed_comment"].startswith("[kilo-pipelines] Because.")
    assert len([one for one in owner.audited("security.finding.dismissed") if "item" in one]) == 1
    owner.sync()
    after = again(owner, one)
    assert (after.status, after.disposition_by, after.disposition_actor) == ("ignored", "manual", "test"), (
        "a sync changes nothing of ours"
    )


def test_the_source_being_away_changes_nothing_here_and_is_asked_again(database: Database, twin: Twin, desk: Dispatcher) -> None:
    owner = Owner(database, twin, 1, 30)
    owner.sync()
    one = owner.findings(status="open")[0]
    twin.fault("PATCH", "/dependabot/alerts/", status=503)
    item = asked(owner, one)
    desk.once(owner.id)
    assert again(owner, one).status == "ignored" and upstream(owner, one)["state"] == "open"
    assert [one["state"] for one in owner.store.outbox.of_item(item)] == ["pending"]
    for _ in range(3):
        database.clock.advance(timedelta(minutes=2))
        desk.work(owner.id)
    assert upstream(owner, one)["state"] == "dismissed"


def test_whoever_opens_it_again_at_the_source_has_the_last_word(database: Database, twin: Twin, desk: Dispatcher) -> None:
    owner = Owner(database, twin, 1, 30)
    owner.sync()
    one = owner.findings(status="open")[0]
    asked(owner, one)
    desk.work(owner.id)
    owner.sync()
    twin.control("move-alert", repository=owner.names[0], number=int(one.source_id), action="reopened")
    owner.sync()
    row = again(owner, one)
    assert (row.status, row.disposition) == ("open", None)


def test_roles_and_states_are_refused_with_their_reasons(database: Database, twin: Twin) -> None:
    owner = Owner(database, twin, 1, 30)
    owner.sync()
    one, fixed = owner.findings(status="open")[0], owner.findings(status="fixed")[0]

    def refusal(finding: FindingRow, role: str) -> object:
        return dismiss(owner.store, finding, role=role, actor="test", reason="not_used", comment="")

    assert refusal(one, "member") is Reason.ROLE_NOT_ALLOWED and refusal(one, "viewer") is Reason.ROLE_NOT_ALLOWED
    assert refusal(fixed, "owner") is Reason.FINDING_NOT_OPEN
    asked(owner, one)
    assert refusal(one, "owner") is Reason.DISMISSAL_ACTIVE


def test_what_nobody_imports_is_dismissed_by_the_rules_and_comes_back_when_somebody_does(
    database: Database, twin: Twin, desk: Dispatcher
) -> None:
    shop = Storefront(database, twin, auto_dismiss_enabled=True)
    shop.sync()
    unused = next(one for one in shop.findings() if one.package_name == "twin-tables")
    reached = next(one for one in shop.findings() if one.package_name == "twin-unpack")
    for one in (unused, reached):
        assert isinstance(analyse(shop.store, one, role="owner", actor="test"), UUID)
    desk.work(shop.id)
    row = again(shop, unused)
    assert (row.status, row.disposition_by) == ("ignored", "auto-sandbox") and again(shop, reached).status == "open"
    assert upstream(shop, unused)["state"] == "dismissed"
    bound = (row.disposition_evidence or {})["binding"]
    assert set(bound["files"]) == {"package.json", "package-lock.json"} and bound["hits"] == 0
    shop.sync()
    assert again(shop, unused).status == "ignored"
    push(twin, shop.names[0], "docs/notes.md", "Nothing of interest.\n")
    shop.sync()
    kept = again(shop, unused)
    assert kept.status == "ignored" and (kept.disposition_evidence or {})["binding"]["commit"] != bound["commit"]
    push(twin, shop.names[0], "src/report.js", "const { table } = require('twin-tables');\n")
    shop.sync()
    database.clock.advance(timedelta(seconds=20))  # what no run of its own applies is offered soon after
    desk.work(shop.id)
    assert upstream(shop, unused)["state"] == "open"
    shop.sync()
    assert (again(shop, unused).status, again(shop, unused).disposition) == ("open", None)
    assert [one["reason"] for one in shop.audited("security.finding.reopened")] == [str(Reason.GROUND_CHANGED)]


def test_bulk_counts_first_and_dismisses_only_what_the_metadata_let_go(database: Database, twin: Twin, desk: Dispatcher) -> None:
    owner = Orders(database, twin, analysis_mode="shallow")
    owner.sync()
    owner.configure(auto_analysis_enabled=True, auto_analysis_include_existing=True, auto_analysis_min_severity="all")
    owner.sync()
    for _ in range(40):
        desk.work(owner.id)
        database.clock.advance(timedelta(seconds=31))
    tools = [one for one in owner.findings(status="open", dependency_scope="development") if one.severity in ("medium", "low")]
    assert tools and dismiss_many(owner.store, owner.id, role="member", actor="test", apply=True) is Reason.ROLE_NOT_ALLOWED
    counted = dismiss_many(owner.store, owner.id, role="owner", actor="test", apply=False)
    assert not isinstance(counted, Reason) and counted["confidence high"] == len(tools)
    assert owner.items("dismissal") == []
    dismiss_many(owner.store, owner.id, role="owner", actor="test", apply=True)
    desk.work(owner.id)
    for _ in range(len(tools)):
        database.clock.advance(timedelta(seconds=31))
        desk.work(owner.id)
    ours = owner.findings(disposition="dismissed")
    assert {one.id for one in ours} == {one.id for one in tools}
    assert {one.disposition_by for one in ours} == {"auto-triage-bulk"}


def test_another_owner_of_the_repository_decides_for_itself(database: Database, twin: Twin, desk: Dispatcher) -> None:
    theirs = Owner(database, twin, 1, 20)
    theirs.sync()
    with theirs.store.database.owner(theirs.id) as connection:
        connection.execute(text("update integrations set disconnected_at = now()"))
    mine = Owner(database, twin, 1, 1)
    mine.repositories, mine.names = theirs.repositories, theirs.names
    mine.connect(int(mine.repositories[0]["repository_id"]), mine.names[0])
    mine.sync()
    one = mine.findings(status="open")[0]
    asked(mine, one)
    desk.work(mine.id)
    other = [
        row
        for row in theirs.store.findings.of_repository(theirs.id, one.repository_id, open_or_superseded=False)
        if row.source_id == one.source_id
    ]
    assert [(row.disposition, row.status) for row in other] == [(None, "open")]


NOT_USED = {"exploitable": False, "action": "dismiss", "search": ["require('twin-tables')"], "summary": "Nobody imports it."}
LETS_GO = {"needs_deep": False, "reasoning": "Only a tool.", "action": "dismiss", "confidence": "high", "fallback": False}


def head(twin: Twin, shop: Shop) -> str:
    return git(twin.home / "git" / f"{shop.full_name}.git", "rev-parse", "refs/heads/main").strip()


def told_anew(shop: Shop, finding: FindingRow, **more: Any) -> FindingRow:
    """The source says other facts of an alert, as a page of a sync or an event brings them."""
    raw = upstream(shop, finding)
    for path, value in more.items():
        where, _, name = path.rpartition("__")
        (raw[where] if where else raw)[name] = value
    policy = policy_for(shop.store, shop.id, SecurityConfig(), actor="test")
    taker = AlertTaker(shop.id, shop.repository_id, policy, first_sync=False)
    good, bad = taker.sort([raw])
    assert not bad
    shop.store.findings.apply_page(shop.id, shop.repository_id, SOURCE, good, taker.decide, cursor=None)
    return again(shop, finding)


def let_go(database: Database, twin: Twin, desk: Dispatcher, home: Path) -> tuple[Shop, FindingRow]:
    """A shop of which one finding was dismissed by the rules, here and at the source."""
    shop = Shop(database, twin, home, auto_dismiss_enabled=True)
    one = shop.finding("twin-tables")
    analysed(shop, one, commit=head(twin, shop), **NOT_USED)
    after_analysis(shop.store, shop.id, one.id, LOG)
    desk.work(shop.id)
    assert (again(shop, one).status, upstream(shop, one)["state"]) == ("ignored", "dismissed")
    shop.sync()
    return shop, again(shop, one)


@pytest.mark.parametrize(
    ("change", "catalogued", "reason"),
    [
        ({"security_advisory__severity": "critical"}, False, Reason.NEVER_DISMISSED),
        ({}, True, Reason.NEVER_DISMISSED),
        ({"security_vulnerability__vulnerable_version_range": "< 99"}, False, Reason.STALE_ANALYSIS),
    ],
)
def test_what_the_rules_let_go_comes_back_when_it_is_another_thing_though_no_commit_came(
    database: Database, twin: Twin, desk: Dispatcher, tmp_path: Path, change: Any, catalogued: bool, reason: Reason
) -> None:
    shop, one = let_go(database, twin, desk, tmp_path)
    shop.sync()
    assert again(shop, one).status == "ignored"
    known = Path(os.environ["KILO_KNOWN_EXPLOITED_FILE"])
    before = known.read_text()
    told_anew(shop, one, **change)
    if catalogued:
        assert one.cve_id is not None
        known.write_text(json.dumps({"vulnerabilities": [{"cveID": one.cve_id}]}))
    try:
        shop.sync()
    finally:
        known.write_text(before)
    assert again(shop, one).disposition is None
    assert [one["reason"] for one in shop.audited("security.finding.reopened")] == [str(reason)]
    database.clock.advance(timedelta(seconds=20))
    desk.work(shop.id)
    assert (again(shop, one).status, upstream(shop, one)["state"]) == ("open", "open")


def test_what_becomes_critical_while_the_repository_is_read_is_not_dismissed(
    database: Database, twin: Twin, desk: Dispatcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = Shop(database, twin, tmp_path, auto_dismiss_enabled=True)
    one = shop.finding("twin-tables")
    analysed(shop, one, commit=head(twin, shop), **NOT_USED)
    after_analysis(shop.store, shop.id, one.id, LOG)
    read = security_dismissal.read_branch

    def slowly(*wanted: Any) -> Any:
        found = read(*wanted)
        told_anew(shop, one, security_advisory__severity="critical")
        return found

    monkeypatch.setattr(security_dismissal, "read_branch", slowly)
    desk.work(shop.id)
    (item,) = shop.items("dismissal")
    assert (item.state, item.reason) == ("cancelled", Reason.NEVER_DISMISSED)
    assert (again(shop, one).status, upstream(shop, one)["state"]) == ("open", "open")


def test_critical_and_known_exploited_ones_stay_open_whoever_but_a_person_asks(
    database: Database, twin: Twin, desk: Dispatcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = Shop(database, twin, tmp_path, auto_dismiss_enabled=True)
    critical = told_anew(shop, shop.finding("twin-tables"), security_advisory__severity="critical")
    exploited = shop.finding("twin-unpack")
    known = tmp_path / "known.json"
    known.write_text(json.dumps({"vulnerabilities": [{"cveID": str(exploited.cve_id).lower()}]}))
    monkeypatch.setenv("KILO_KNOWN_EXPLOITED_FILE", str(known))
    for one in (critical, exploited):
        analysis = analysed(shop, one, commit=head(twin, shop), **NOT_USED)
        after_analysis(shop.store, shop.id, one.id, LOG)
        assert shop.items("dismissal") == [], "nothing is asked for"
        details = {"finding_id": str(one.id), "requested_by": "platform", "reason": "not_used", "analysis_id": str(analysis)}
        for origin in ("automatic", "bulk"):  # as it would have been before it was one of these
            new = NewItem("dismissal", f"finding:{one.id}", one.repository_id, 0, {**details, "origin": origin})
            assert shop.store.queue.open(shop.id, new, actor="test") is not None
            desk.work(shop.id)
            item = shop.items("dismissal")[0]
            assert (item.state, item.reason) == ("cancelled", Reason.NEVER_DISMISSED)
        with shop.store.database.owner(shop.id) as connection:
            connection.execute(text("update work_items set service = 'done' where service = 'dismissal'"))
        assert (again(shop, one).status, upstream(shop, one)["state"]) == ("open", "open")


def test_a_ground_that_moved_since_the_analysis_is_no_ground_but_for_a_person(
    database: Database, twin: Twin, desk: Dispatcher, tmp_path: Path
) -> None:
    shop = Shop(database, twin, tmp_path, auto_dismiss_enabled=True)
    one, analysed_at = shop.finding("twin-tables"), head(twin, shop)
    analysed(shop, one, commit=analysed_at, **NOT_USED)
    push(twin, shop.full_name, "src/report.js", "const { table } = require('twin-tables');\n")
    after_analysis(shop.store, shop.id, one.id, LOG)
    desk.work(shop.id)
    (item,) = shop.items("dismissal")
    assert (item.state, item.reason) == ("cancelled", Reason.STALE_ANALYSIS)
    assert (again(shop, one).status, upstream(shop, one)["state"]) == ("open", "open")
    asked(shop, one)
    desk.work(shop.id)
    bound = (again(shop, one).disposition_evidence or {})["binding"]
    assert (bound["commit"], bound["hits"]) == (head(twin, shop), 1)


def test_a_commit_that_is_gone_shows_nothing_to_be_the_same(
    database: Database, twin: Twin, desk: Dispatcher, tmp_path: Path
) -> None:
    shop = Shop(database, twin, tmp_path, auto_dismiss_enabled=True)
    one = shop.finding("twin-tables")
    analysed(shop, one, commit="f" * 40, **NOT_USED)
    after_analysis(shop.store, shop.id, one.id, LOG)
    desk.work(shop.id)
    assert [one.reason for one in shop.items("dismissal")] == [Reason.STALE_ANALYSIS]


def test_each_dismissal_is_judged_by_itself_and_a_use_too_wide_to_look_at_is_a_change(
    database: Database, twin: Twin, desk: Dispatcher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shop, kept = let_go(database, twin, desk, tmp_path)
    wide = shop.finding("twin-unpack")
    analysed(shop, wide, commit=head(twin, shop), **NOT_USED | {"search": ["everywhere()"]})
    asked(shop, wide)
    desk.work(shop.id)
    push(twin, shop.full_name, "src/bundle.js", "everywhere();" + "0" * 2**20 + "\n")
    policy = policy_for(shop.store, shop.id, SecurityConfig(), actor="test")
    (target,) = shop.store.owners.sync_targets(shop.id)
    assert security_dismissal.reexamine(shop.store, GitHubResource(), shop.id, target, policy, LOG, time.monotonic()) == 0
    assert {again(shop, one).status for one in (kept, wide)} == {"ignored"}, "no time, no answer"
    assert "can't be looked at" in caplog.text
    shop.sync()
    assert (again(shop, kept).status, again(shop, wide).disposition) == ("ignored", None)
    assert (again(shop, kept).disposition_evidence or {})["binding"]["commit"] == head(twin, shop)
    # And it is bound to nothing that way again: a person's dismissal stands for itself, the rules make none.
    asked(shop, told_anew(shop, wide, state="open"))
    desk.work(shop.id)
    row = again(shop, wide)
    assert row.status == "ignored" and "binding" not in (row.disposition_evidence or {})


def test_whoever_opens_it_again_before_a_sync_saw_it_dismissed_has_the_last_word_too(
    database: Database, twin: Twin, desk: Dispatcher, tmp_path: Path
) -> None:
    shop = Shop(database, twin, tmp_path)
    one = shop.finding("twin-tables")
    # The twin tells whole seconds: within the one in which another test moved the alert it would look untouched.
    time.sleep(1.05)
    asked(shop, one)
    desk.work(shop.id)
    assert upstream(shop, one)["state"] == "dismissed" and again(shop, one).upstream_state == "dismissed"
    twin.control("move-alert", repository=shop.full_name, number=int(one.source_id), action="reopened")
    shop.sync()
    row = again(shop, one)
    assert (row.status, row.disposition) == ("open", None)


def test_what_reading_the_repository_told_is_not_overruled_by_its_metadata(
    database: Database, twin: Twin, desk: Dispatcher, tmp_path: Path
) -> None:
    shop = Shop(database, twin, tmp_path, auto_dismiss_enabled=True)
    one = shop.finding("twin-tables")
    read = analysed(shop, one, commit=head(twin, shop))
    database.clock.advance(timedelta(minutes=1))
    analysed(shop, one, triage=LETS_GO)
    assert shop.store.analyses.latest(shop.id, [one.id])[one.id].item_id == read

    def outcome() -> str:
        return next(str(row["outcome"]) for row in shop.store.findings.listed(shop.id) if row["id"] == one.id)

    assert outcome() == "exploitable", "lists tell what counts"
    after_analysis(shop.store, shop.id, one.id, LOG)
    counted = dismiss_many(shop.store, shop.id, role="owner", actor="test", apply=True)
    assert not isinstance(counted, Reason) and counted[str(Reason.ANALYSIS_SPEAKS_AGAINST)] == 1
    assert shop.items("dismissal") == []
    changed = told_anew(shop, one, security_vulnerability__vulnerable_version_range="< 99")
    database.clock.advance(timedelta(minutes=1))
    shallow = analysed(shop, changed, triage=LETS_GO)
    assert shop.store.analyses.latest(shop.id, [one.id])[one.id].item_id == shallow, "of other facts the deep one says nothing"
    assert outcome() == "safe_to_dismiss"
