"""Remediations end to end: the platform's own runs, the twin's model and registry, a real sandbox, a pull request on the twin."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from dagster import DagsterInstance
from sqlalchemy import text

from kilo_pipelines.acts.remediation import PAGE, Bulk, admit, after_analysis, cancel, remediate_all
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.retry import CLASS_OF
from kilo_pipelines.ops.security_remediation import follow_up
from kilo_pipelines.providers.github import GitHubInstallation
from kilo_pipelines.resources.github import GitHubResource
from kilo_pipelines.services.security.remediation import CONFIRMING_SYNCS, REOPENED_WITHIN
from tests.conftest import Database
from tests.support.git import git
from tests.support.keys import api_key
from tests.support.remediation import Shop, analysed, leave
from tests.support.security import LOG, Dispatcher, Owner, syncing, with_model
from tests.support.served import alone, invoked, served
from tests.support.twin import Twin


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twin]:
    # Sockets have short names: the home of pytest's own making would be too long for them.
    with syncing(tmp_path_factory.mktemp("r")) as running, with_model(running):
        yield running


@pytest.fixture(scope="module")
def instance() -> Iterator[DagsterInstance]:
    with DagsterInstance.ephemeral() as found:
        yield found


@pytest.fixture
def desk(database: Database, instance: DagsterInstance) -> Dispatcher:
    return Dispatcher(database, instance)


@pytest.fixture
def shop(database: Database, twin: Twin, tmp_path: Path) -> Shop:
    """With an analysis of the package that its code reaches."""
    made = Shop(database, twin, tmp_path)
    analysed(made, made.finding("twin-unpack"))
    return made


@pytest.fixture(autouse=True)
def _alone(database: Database) -> Iterator[None]:
    """All owners here have the twin's one installation, and nothing is written for two."""
    yield
    for one in database.store.owners.all():
        leave(database, one.id)


def _git(shop: Shop, *args: str) -> str:
    return git(shop.twin.home / "git" / f"{shop.full_name}.git", *args)


def _slots(shop: Owner) -> int:
    with shop.store.database.owner(shop.id) as connection:
        return int(connection.execute(text("select count(*) from owner_slots where item_id is not null")).scalar() or 0)


def _remediated(shop: Shop, desk: Dispatcher, package: str = "twin-unpack") -> UUID:
    item = shop.asked(shop.finding(package))
    desk.work(shop.id)
    assert shop.row(item).reason == Reason.REMEDIATED, shop.row(item)
    return item


def test_a_remediation_ends_as_one_open_pull_request_with_the_patched_version(shop: Shop, desk: Dispatcher) -> None:
    item = _remediated(shop, desk)
    row = shop.row(item)
    (pull,) = shop.pulls()
    assert (row.pull_number, row.pull_url, row.effect_state) == (pull["number"], pull["html_url"], "applied")
    assert (pull["state"], pull["draft"], pull["base"]["ref"]) == ("open", False, "main")
    assert (pull["head"]["ref"], pull["head"]["sha"]) == (row.branch, row.commit_sha)
    assert (
        pull["title"] == "Update twin-unpack to 1.4.3" and "`GHSA-22f3-c4g5-h6j7`" in pull["body"] and str(item) in pull["body"]
    )
    assert _git(shop, "diff", "--name-only", "main", str(row.commit_sha)).split() == ["package-lock.json", "package.json"]
    lock = json.loads(_git(shop, "show", f"{row.commit_sha}:package-lock.json"))
    package = json.loads(_git(shop, "show", f"{row.commit_sha}:package.json"))
    assert lock["packages"]["node_modules/twin-unpack"]["version"] == "1.4.3"
    assert package["dependencies"] == {"twin-tables": "^0.9.0", "twin-unpack": "^1.4.3"}
    assert _git(shop, "log", "-1", "--format=%P", str(row.commit_sha)) == _git(shop, "rev-parse", "main")
    assert desk.runs == ["remediation", "agent_session", "settle_remediation"]
    assert _slots(shop) == 0
    assert [len(shop.audited(f"security.remediation.{one}")) for one in ("queued", "pushed", "failed")] == [1, 1, 0]
    again = admit(shop.store, shop.id, shop.finding("twin-unpack").id, origin="manual", actor="test", role="owner")
    assert again is Reason.PR_ALREADY_OPENED


@pytest.mark.parametrize("kind", ["lost", "late"])
def test_a_lost_answer_of_its_opening_leads_to_one_pull_request(shop: Shop, desk: Dispatcher, kind: str) -> None:
    more = {"seconds": 0.5} if kind == "late" else {}
    shop.twin.fault("POST", f"{shop.full_name}/pulls", kind, **more)
    item = shop.asked(shop.finding("twin-unpack"))
    desk.work(shop.id)
    assert shop.row(item).effect_state == "pending"
    shop.clock.advance(timedelta(minutes=5))
    desk.work(shop.id)
    row, (pull,) = shop.row(item), shop.pulls()
    assert (row.effect_state, row.pull_number) == ("applied", pull["number"])


def test_a_hosted_agent_changes_nothing(shop: Shop, desk: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    item = shop.asked(shop.finding("twin-unpack"))
    monkeypatch.setenv("KILO_AGENT", "hosted")
    desk.work(shop.id)
    row = shop.row(item)
    assert (row.state, row.reason) == ("failed", Reason.HOSTED_WORK_REFUSED)
    assert [one["reason"] for one in shop.audited("security.remediation.failed")] == ["hosted_work_refused"]
    assert "agent_session" not in desk.runs and shop.pulls() == [] and _slots(shop) == 0


def test_a_late_opening_that_lands_between_the_look_and_the_next_one_is_ours(
    shop: Shop, desk: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GitHub's list doesn't show it yet, and it takes no second one from the branch."""
    shop.twin.fault("POST", f"{shop.full_name}/pulls", "lost")
    item = shop.asked(shop.finding("twin-unpack"))
    desk.work(shop.id)
    find, looks = GitHubInstallation.find_pull, iter([False])
    monkeypatch.setattr(GitHubInstallation, "find_pull", lambda *args: find(*args) if next(looks, True) else None)
    shop.clock.advance(timedelta(minutes=5))
    desk.work(shop.id)
    row, (pull,) = shop.row(item), shop.pulls()
    assert (row.effect_state, row.pull_number) == ("applied", pull["number"])
    assert next(looks, None) is None


def test_a_pull_request_that_was_closed_before_its_answer_came_is_not_opened_again(shop: Shop, desk: Dispatcher) -> None:
    shop.twin.fault("POST", f"{shop.full_name}/pulls", "lost")
    item = shop.asked(shop.finding("twin-unpack"))
    desk.work(shop.id)
    (pull,) = shop.pulls()
    shop.twin.control("merge", repository=shop.full_name, number=pull["number"])
    shop.clock.advance(timedelta(minutes=5))
    desk.work(shop.id)
    assert shop.row(item).pull_number == pull["number"] and len(shop.pulls()) == 1


def test_no_pull_request_is_opened_for_a_branch_that_somebody_moved(shop: Shop, desk: Dispatcher) -> None:
    shop.twin.fault("POST", f"{shop.full_name}/pulls", status=502)
    item = shop.asked(shop.finding("twin-unpack"))
    desk.work(shop.id)
    _git(shop, "update-ref", f"refs/heads/{shop.row(item).branch}", "refs/heads/proposed")
    shop.clock.advance(timedelta(minutes=5))
    desk.work(shop.id)
    assert (shop.row(item).effect_state, shop.pulls()) == ("dead", [])
    (effect,) = shop.store.outbox.of_item(item)
    assert effect["reason"] == Reason.HEAD_MOVED
    retried = admit(shop.store, shop.id, shop.finding("twin-unpack").id, origin="manual", actor="t", role="member", retry=True)
    assert isinstance(retried, UUID), "one that could not be opened can be tried again"
    shop.store.queue.cancel(retried, reason=Reason.USER_CANCELLED, actor="test")


def test_two_findings_of_one_package_end_in_one_pull_request(shop: Shop, desk: Dispatcher) -> None:
    first, other = shop.finding("twin-unpack"), shop.another("twin-unpack")
    analysed(shop, other)
    item = shop.asked(first)
    assert admit(shop.store, shop.id, other.id, origin="manual", actor="test", role="owner") is Reason.REMEDIATION_ACTIVE
    desk.work(shop.id)
    row, (pull,) = shop.row(item), shop.pulls()
    assert row.findings == [first.id, other.id]
    assert first.ghsa_id and other.ghsa_id and first.ghsa_id in pull["body"] and other.ghsa_id in pull["body"]
    assert admit(shop.store, shop.id, other.id, origin="manual", actor="test", role="owner") is Reason.PR_ALREADY_OPENED
    assert len(shop.audited("security.remediation.queued")) == 2


def test_another_finding_of_a_package_waits_for_the_open_pull_request(shop: Shop, desk: Dispatcher) -> None:
    _remediated(shop, desk)
    late = shop.another("twin-unpack", 902)
    analysed(shop, late)
    item = shop.asked(late)
    desk.work(shop.id)
    row = shop.row(item)
    assert (row.state, row.reason, len(shop.pulls())) == ("cancelled", Reason.COVERED_BY_OPEN_PULL, 1)
    assert len(shop.audited("security.remediation.cancelled")) == len(row.findings) == 2
    (pull,) = shop.pulls()
    shop.twin.control("merge", repository=shop.full_name, number=pull["number"])
    again = shop.asked(late, retry=True)
    assert shop.row(again).state == "waiting", "no sync has seen the merge; GitHub is asked at the launch"
    desk.once(shop.id)
    assert shop.row(again).state == "running"
    assert cancel(shop.store, shop.id, again, actor="test", role="owner") is None
    desk.work(shop.id)


def test_an_owner_has_one_remediation_at_a_time_and_stands_in_nobody_elses_way(
    database: Database, twin: Twin, desk: Dispatcher, shop: Shop
) -> None:
    analysed(shop, shop.finding("twin-tables"))
    theirs = Owner(database, twin, 1, 1)
    theirs.connect(shop.repository_id, shop.full_name)
    theirs.sync()
    first, second = shop.asked(shop.finding("twin-unpack")), shop.asked(shop.finding("twin-tables"))
    desk.run("remediation", "launch_remediations", [first])
    desk.run("remediation", "launch_remediations", [second])
    assert (shop.row(first).state, shop.row(second).state, shop.row(second).reason) == ("running", "waiting", Reason.NO_SLOT)
    theirs.repositories = [{"repository_id": shop.repository_id}]
    their_finding = next(one for one in theirs.findings() if one.package_name == "twin-unpack")
    analysed(theirs, their_finding)
    own = admit(theirs.store, theirs.id, their_finding.id, origin="manual", actor="test", role="owner")
    assert isinstance(own, UUID)
    desk.run("remediation", "launch_remediations", [own])
    item = theirs.store.queue.get(own)
    assert item is not None and item.state == "running", "another owner's lock on the same repository is not theirs"
    assert cancel(theirs.store, theirs.id, first, actor="test", role="owner") is Reason.MOVED_ON
    assert admit(theirs.store, theirs.id, shop.finding("twin-tables").id, origin="manual", actor="t", role="owner") is (
        Reason.FINDING_NOT_FOUND
    )
    assert cancel(theirs.store, theirs.id, own, actor="test", role="owner") is None
    desk.work(theirs.id)
    leave(database, theirs.id)
    desk.work(shop.id)
    shop.clock.advance(timedelta(seconds=31))
    desk.work(shop.id)
    assert [shop.row(one).reason for one in (first, second)] == [Reason.REMEDIATED] * 2
    assert len(shop.pulls()) == 2 and theirs.store.remediations.of_owner(theirs.id)[0].reason == Reason.USER_CANCELLED


def test_a_merge_that_ends_the_alert_is_confirmed(shop: Shop, desk: Dispatcher) -> None:
    item = _remediated(shop, desk)
    shop.sync()
    assert (shop.row(item).pull_state, len(shop.audited("security.remediation.pr_opened"))) == ("open", 1)
    shop.twin.control("merge", repository=shop.full_name, number=shop.row(item).pull_number)
    shop.twin.control("scan", repository=shop.full_name)
    shop.sync()
    row = shop.row(item)
    assert (row.pull_state, row.syncs_since_merge, row.flagged_at) == ("merged", 0, None)
    assert row.confirmed_at is not None and shop.finding("twin-unpack").status == "fixed"
    shop.sync()
    assert [
        len(shop.audited(f"security.remediation.{one}")) for one in ("pr_opened", "pr_merged", "confirmed", "unconfirmed")
    ] == [1, 1, 1, 0]


def test_a_merge_after_which_the_alert_stays_is_flagged_and_confirmed_when_it_ends_after_all(
    shop: Shop, desk: Dispatcher
) -> None:
    item = _remediated(shop, desk)
    shop.twin.control("merge", repository=shop.full_name, number=shop.row(item).pull_number)

    def flagged() -> list[object]:
        return [
            one["item"] for one in shop.store.findings.offenders("remediation_unconfirmed", limit=1_000) if one["item"] == item
        ]

    shop.sync()
    for _ in range(CONFIRMING_SYNCS):
        assert flagged() == [] and shop.row(item).merged_at is not None
        shop.sync()
    assert flagged() == [] and shop.row(item).syncs_since_merge == CONFIRMING_SYNCS, (
        "syncs that somebody asked for within minutes"
    )
    with shop.store.database.owner(shop.id) as connection:
        connection.execute(text("update remediations set merged_at = now() - interval '18 hours'"))
    shop.sync()
    assert flagged() == [item]
    shop.sync()
    assert len(shop.audited("security.remediation.unconfirmed")) == 1
    shop.twin.control("scan", repository=shop.full_name)
    shop.sync()
    assert flagged() == [] and shop.row(item).confirmed_at is not None


def test_a_merge_whose_finding_is_dismissed_is_set_aside_and_not_confirmed(shop: Shop, desk: Dispatcher) -> None:
    item = _remediated(shop, desk)
    shop.twin.control("merge", repository=shop.full_name, number=shop.row(item).pull_number)
    number = int(shop.finding("twin-unpack").source_id)
    more = {"by": "grace", "reason": "not_used", "comment": "c"}
    shop.twin.control("move-alert", repository=shop.full_name, number=number, action="dismissed", **more)
    shop.sync()
    row = shop.row(item)
    assert shop.finding("twin-unpack").status == "ignored" and (row.confirmed_at, row.flagged_at) == (None, None)
    assert row.set_aside_at is not None
    shop.sync()
    assert [len(shop.audited(f"security.remediation.{one}")) for one in ("pr_merged", "set_aside", "confirmed")] == [1, 1, 0]


def test_a_merge_is_judged_by_the_finding_that_speaks_for_its_own(shop: Shop, desk: Dispatcher) -> None:
    item = _remediated(shop, desk)
    finding, other = shop.finding("twin-unpack"), shop.finding("twin-tables")
    with shop.store.database.owner(shop.id) as connection:
        connection.execute(
            text(
                "update findings set disposition = 'superseded', disposition_at = now(), canonical_id = :canonical where id = :id"
            ),
            {"id": finding.id, "canonical": other.id},
        )
    shop.twin.control("merge", repository=shop.full_name, number=shop.row(item).pull_number)
    follow_up(shop.store, GitHubResource(), shop.id, shop.repository_id, LOG)
    row = shop.row(item)
    assert (row.pull_state, row.confirmed_at, row.set_aside_at) == ("merged", None, None), "the other one is open"


def test_a_pull_request_that_is_opened_again_is_followed_again(shop: Shop, desk: Dispatcher) -> None:
    item = _remediated(shop, desk)
    number = shop.row(item).pull_number

    def sync_after(action: str) -> str | None:
        shop.twin.control("act", full_name=shop.full_name, number=number, action=action)
        shop.sync()
        return shop.row(item).pull_state

    assert [sync_after(action) for action in ("close", "reopen", "close", "reopen")] == ["closed", "open"] * 2
    assert admit(shop.store, shop.id, shop.finding("twin-unpack").id, origin="manual", actor="test", role="owner") is (
        Reason.PR_ALREADY_OPENED
    )
    seen = [len(shop.audited(f"security.remediation.{one}")) for one in ("pr_opened", "pr_closed", "pr_reopened")]
    assert seen == [0, 2, 2] or seen == [1, 2, 2]
    assert sync_after("close") == "closed"
    shop.clock.advance(REOPENED_WITHIN)
    assert sync_after("reopen") == "closed", "a month is long enough"
    shop.clock.advance(-REOPENED_WITHIN)


def test_a_sync_that_github_does_not_answer_counts_nothing(shop: Shop, desk: Dispatcher) -> None:
    item = _remediated(shop, desk)
    shop.twin.fault("GET", f"{shop.full_name}/pulls/", status=503, times=9)
    shop.sync()
    assert shop.row(item).pull_state is None
    shop.twin.fault("GET", f"{shop.full_name}/dependabot", status=503, times=9)
    shop.sync()
    assert shop.row(item).pull_state is None


def test_what_is_fixed_or_analysed_anew_while_it_waits_is_looked_at_again(shop: Shop, desk: Dispatcher) -> None:
    finding = shop.finding("twin-unpack")
    item = shop.asked(finding)
    shop.twin.control("move-alert", repository=shop.full_name, number=int(finding.source_id), action="fixed")
    shop.sync()
    desk.work(shop.id)
    assert (shop.row(item).state, shop.row(item).reason) == ("cancelled", Reason.FINDING_NOT_OPEN)
    other = shop.finding("twin-tables")
    analysed(shop, other)
    stale = shop.asked(other)
    shop.clock.advance(timedelta(seconds=1))
    newest = analysed(shop, other, summary="Looked at again.")
    desk.once(shop.id)
    row = shop.row(stale)
    assert (row.state, row.analysis_id) == ("running", newest)
    assert cancel(shop.store, shop.id, stale, actor="test", role="viewer") is Reason.ROLE_NOT_ALLOWED
    assert cancel(shop.store, shop.id, stale, actor="test", role="member") is None
    desk.work(shop.id)
    assert (shop.row(stale).state, shop.pulls(), _slots(shop)) == ("cancelled", [], 0)
    assert cancel(shop.store, shop.id, stale, actor="test", role="member") is Reason.MOVED_ON


def test_without_a_registry_nothing_is_pushed_and_the_summary_says_why(
    database: Database, twin: Twin, desk: Dispatcher, tmp_path: Path
) -> None:
    shop = Shop(database, twin, tmp_path, remediation_registries=[])
    analysed(shop, shop.finding("twin-unpack"))
    item = shop.asked(shop.finding("twin-unpack"))
    desk.work(shop.id)
    row = shop.row(item)
    assert (row.state, row.reason, shop.pulls()) == ("completed", Reason.REMEDIATION_BLOCKED, [])
    assert row.summary and _git(shop, "for-each-ref", "refs/heads/security-remediation") == ""
    assert isinstance(shop.asked(shop.finding("twin-unpack"), retry=True), UUID)


def test_a_failed_session_is_tried_as_often_as_the_policy_says(
    shop: Shop, desk: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILO_REGISTRIES", "{}")
    item = shop.asked(shop.finding("twin-unpack"))
    desk.work(shop.id)
    row = shop.row(item)
    assert (row.state, row.reason, row.attempt) == ("failed", Reason.REGISTRY_UNKNOWN, 1) and Reason.REGISTRY_UNKNOWN in CLASS_OF
    assert len(shop.audited("security.remediation.failed")) == 1 and _slots(shop) == 0


def test_an_analysis_starts_a_remediation_only_where_its_owner_wants_that(database: Database, twin: Twin, tmp_path: Path) -> None:
    shop = Shop(database, twin, tmp_path)
    finding = shop.finding("twin-unpack")
    shop.configure(auto_remediation_enabled=True)
    analysed(shop, finding)
    after_analysis(shop.store, shop.id, finding.id, LOG)
    assert shop.store.remediations.of_owner(shop.id) == [], "a person starts each one"
    shop.configure(auto_remediation_require_approval=False)
    after_analysis(shop.store, shop.id, finding.id, LOG)
    (row,) = shop.store.remediations.of_owner(shop.id)
    assert (row.origin, row.requested_by, row.findings) == ("automatic", "platform", [finding.id])
    shop.store.queue.cancel(row.item_id, reason=Reason.USER_CANCELLED, actor="test")


AUTOMATIC = {"auto_remediation_enabled": True, "auto_remediation_require_approval": False}


@pytest.mark.parametrize("end", ["cancelled", "failed", "dead"])
def test_no_sweep_starts_again_what_was_started_once_and_a_person_can(
    database: Database, twin: Twin, desk: Dispatcher, tmp_path: Path, end: str
) -> None:
    shop = Shop(database, twin, tmp_path)
    first, other = shop.finding("twin-unpack"), shop.another("twin-unpack")
    shop.configure(**AUTOMATIC)
    assert shop.id in shop.store.analyses.owners(), "an owner who wants remediations only is swept, too"
    for one in (first, other):
        analysed(shop, one)

    def sweep() -> int:
        desk.run("security_sweep", "sweep_analyses", [shop.id])
        return len(shop.store.remediations.of_owner(shop.id))

    assert sweep() == 1
    item = shop.store.remediations.of_owner(shop.id)[0].item_id
    if end == "cancelled":
        assert cancel(shop.store, shop.id, item, actor="test", role="member") is None
    elif end == "failed":
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KILO_REGISTRIES", "{}")
            desk.work(shop.id)
    else:
        twin.fault("POST", f"{shop.full_name}/pulls", status=422)
        desk.work(shop.id)
    row = shop.row(item)
    assert end in (row.state, row.effect_state)
    assert [sweep() for _ in range(2)] == [1, 1]
    again = shop.asked(first, retry=True)
    assert shop.row(again).state == "waiting"
    shop.store.queue.cancel(again, reason=Reason.USER_CANCELLED, actor="test")
    assert sweep() == 2
    shop.clock.advance(timedelta(seconds=1))
    analysed(shop, first, summary="Looked at again.")
    assert sweep() == 3, "a new analysis is a new reason"
    shop.store.queue.cancel(shop.store.remediations.of_owner(shop.id)[0].item_id, reason=Reason.USER_CANCELLED, actor="test")


def test_one_command_reaches_every_open_finding_whatever_their_number(database: Database, twin: Twin) -> None:
    owner = Owner(database, twin, 1, 700)
    owner.sync()
    findings = owner.findings(status="open")
    wanted = [findings[0], findings[-1]]
    for one in wanted:
        analysed(owner, one, suggested_fix="Leave the call out.")
    owner.configure(
        auto_remediation_enabled=True,
        auto_remediation_require_approval=False,
        auto_remediation_include_existing=True,
        auto_remediation_min_severity="all",
    )
    assert remediate_all(owner.store, owner.id, actor="test", role="viewer") is Reason.ROLE_NOT_ALLOWED
    done = remediate_all(owner.store, owner.id, actor="test", role="owner")
    assert isinstance(done, Bulk) and done.scanned == len(findings) > PAGE
    assert len(done.admitted) == 2 and done.skipped == {Reason.ANALYSIS_REQUIRED: len(findings) - 2}
    again = remediate_all(owner.store, owner.id, actor="test", role="owner")
    assert isinstance(again, Bulk) and again.admitted == [] and again.skipped[Reason.REMEDIATION_ACTIVE] == 2
    for item in done.admitted:
        owner.store.queue.cancel(item, reason=Reason.USER_CANCELLED, actor="test")


def test_the_commands_start_list_and_refuse(
    database: Database, shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(database) as address:
        alone(monkeypatch, tmp_path, api_url=address, api_key=api_key(database.store, "operator"))

        def run(*arguments: str) -> tuple[int, Any]:
            done = invoked("security", *arguments, "--json")
            return done.exit_code, json.loads(done.stdout)

        finding = str(shop.finding("twin-unpack").id)
        code, answer = run("remediate", finding)
        assert code == 0
        code, refused = run("remediate", finding)
        assert code == 1 and Reason.REMEDIATION_ACTIVE in refused["error"]
        code, refused = run("remediate", str(shop.finding("twin-tables").id))
        assert code == 1 and Reason.ANALYSIS_REQUIRED in refused["error"]
        code, listed = run("remediations", "--owner", str(shop.id))
        assert [(one["item_id"], one["state"], one["pull_url"]) for one in listed] == [(answer["item"], "waiting", None)]
        code, bulk = run("remediate", "--bulk", "--owner", str(shop.id))
        assert (code, bulk["scanned"], bulk["admitted"]) == (0, 2, [])
        assert bulk["skipped"] == {Reason.REMEDIATION_ACTIVE: 1, Reason.ANALYSIS_REQUIRED: 1}
        for wrong in ([], [finding, "--bulk"], ["--bulk", "--retry"], [finding, "--owner", str(shop.id)]):
            assert run("remediate", *wrong)[0] == 2
        shop.store.queue.cancel(UUID(answer["item"]), reason=Reason.USER_CANCELLED, actor="test")


@pytest.mark.agent_cli
def test_the_kilo_cli_remediates_in_the_sandbox(shop: Shop, desk: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILO_AGENT", "kilo")
    item = _remediated(shop, desk)
    (pull,) = shop.pulls()
    assert pull["number"] == shop.row(item).pull_number
    lock = json.loads(_git(shop, "show", f"{shop.row(item).commit_sha}:package-lock.json"))
    assert lock["packages"]["node_modules/twin-unpack"]["version"] == "1.4.3"
    assert _git(shop, "diff", "--name-only", "main", str(shop.row(item).commit_sha)).split() == [
        "package-lock.json",
        "package.json",
    ]
