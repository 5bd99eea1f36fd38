"""Findings in the database: pages, checkpoints, dispositions, deadlines."""

from __future__ import annotations

import random
import string
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.ops.findings import deadline, policy_for
from kilo_pipelines.ops.security_sync import SOURCE, AlertTaker, supersede
from kilo_pipelines.services.security.alerts import NAME_BYTES, PATH_BYTES
from kilo_pipelines.services.security.config import SERVICE, SecurityConfig
from kilo_pipelines.services.security.sla import SlaPolicy
from kilo_pipelines.store import Change, PageCount, Repository, SlaRow
from tests.conftest import Database
from tests.support.alerts import alert
from tests.support.store import World


class Synced:
    """An owner with the Security Agent on, and the short way to give it alerts."""

    def __init__(self, database: Database, repository: int | None = None) -> None:
        self.world = World(database.store, database.clock, repository=repository)
        self.store, self.owner, self.repository = database.store, self.world.owner.id, self.world.repository
        self.store.owners.put_config(self.owner, SERVICE, {}, enabled=True, expected_revision=0, actor="test")
        self.policy = policy_for(self.store, self.owner, SecurityConfig(), actor="test")

    def take(self, *raw: dict[str, Any], cursor: str | None = None, first: bool = False) -> PageCount:
        taker = AlertTaker(self.owner, self.repository, self.policy, first_sync=first)
        good, bad = taker.sort(list(raw))
        self.store.findings.begin_sync(self.owner, self.repository)
        self.store.findings.quarantine(self.owner, self.repository, bad)
        return self.store.findings.apply_page(self.owner, self.repository, SOURCE, good, taker.decide, cursor=cursor)

    def all(self, **more: Any) -> list[dict[str, Any]]:
        return self.store.findings.listed(self.owner, limit=1000, **more)

    def one(self, number: int) -> Any:
        (found,) = [one for one in self.all() if one["source_id"] == str(number)]
        return self.store.findings.get(self.owner, found["id"])

    def audit(self) -> list[str]:
        return [str(row["action"]) for row in self.store.audit.listed(owner_id=self.owner, limit=500)]


@pytest.fixture
def synced(database: Database) -> Synced:
    return Synced(database)


def test_a_page_writes_findings_history_deadlines_and_audit_together(synced: Synced) -> None:
    count = synced.take(*(alert(number) for number in range(1, 101)))
    assert (count.inserted, count.changed, count.unchanged, count.rows_written) == (100, 0, 0, 100)
    found = synced.all()
    assert len(found) == 100 and all(one["due_at"] for one in found)
    assert synced.audit().count("security.finding.created") == 100
    finding = synced.one(7)
    (step,) = synced.store.findings.history(synced.owner, [finding.id])[finding.id]
    assert (step.kind, step.severity, step.at) == ("opened", "low", finding.detected_at)


def test_unchanged_alerts_write_no_row(synced: Synced) -> None:
    page = [alert(number) for number in range(1, 101)]
    synced.take(*page)
    before = synced.audit()
    count = synced.take(*page)
    assert (count.unchanged, count.rows_written) == (100, 0)
    with synced.store.database.owner(synced.owner) as connection:
        written = connection.execute(text("select count(distinct xmin::text) from findings")).scalar_one()
    assert written == 1 and synced.audit() == before


def test_a_change_moves_state_history_and_deadline(synced: Synced) -> None:
    synced.take(alert(1), alert(2))
    synced.take(alert(1, state="fixed", fixed_at="2026-01-10T00:00:00Z"), alert(2, **{"security_advisory.severity": "critical"}))
    assert synced.one(1).status == "fixed" and synced.one(2).severity == "critical"
    shown = {one["source_id"]: one for one in synced.all()}
    assert shown["1"]["closed_at"].isoformat() == "2026-01-10T00:00:00+00:00" and shown["2"]["budget_days"] == 15
    assert {"security.finding.status_change", "security.finding.severity_changed"} <= set(synced.audit())


def test_a_bad_alert_is_set_aside_alone_and_forgotten_when_it_is_good(synced: Synced) -> None:
    synced.take(alert(1), alert(2, **{"security_advisory.severity": "moderate"}), alert(3))
    assert {one["source_id"] for one in synced.all()} == {"1", "3"}
    (kept,) = synced.store.findings.quarantined(synced.owner)
    assert (kept["source_id"], kept["reason"]) == ("2", Reason.ALERT_MALFORMED) and "severity" in kept["detail"]
    synced.take(alert(2))
    assert synced.store.findings.quarantined(synced.owner) == [] and len(synced.all()) == 3


def test_a_known_alert_that_was_malformed_once_leaves_quarantine_unchanged(synced: Synced) -> None:
    synced.take(alert(1))
    synced.take(alert(1, state="snoozed"))
    assert [one["source_id"] for one in synced.store.findings.quarantined(synced.owner)] == ["1"]
    assert synced.take(alert(1)).unchanged == 1
    assert synced.store.findings.quarantined(synced.owner) == []


def test_alerts_without_a_number_are_set_aside_apart_until_a_whole_reading_has_none(synced: Synced, database: Database) -> None:
    nameless = [alert(0, **{"dependency.package.name": name}) for name in ("left", "right")]
    for _ in range(2):
        synced.take(*nameless)
    assert len(synced.store.findings.quarantined(synced.owner)) == 2

    def ended(*raw: dict[str, Any]) -> int:
        database.clock.advance(timedelta(hours=1))
        since = synced.store.findings.begin_sync(synced.owner, synced.repository).attempted_at
        synced.take(*raw)
        synced.store.findings.end_sync(synced.owner, synced.repository, outcome="synced", complete=True, whole_since=since)
        return len(synced.store.findings.quarantined(synced.owner))

    assert [ended(*nameless), ended(nameless[0]), ended()] == [2, 1, 0]


def _text(chance: random.Random, size: int) -> str:
    """So many bytes that no index compresses."""
    return "".join(chance.choice(string.ascii_letters + string.digits) for _ in range(size))


def test_the_longest_names_that_are_taken_fit_the_database(synced: Synced) -> None:
    chance = random.Random(5)
    names = {
        "dependency.package.ecosystem": _text(chance, NAME_BYTES),
        "dependency.package.name": _text(chance, NAME_BYTES),
        "dependency.manifest_path": _text(chance, PATH_BYTES),
    }
    count = synced.take(alert(1, **names))
    assert (count.inserted, count.quarantined) == (1, 0)


def test_an_alert_that_the_database_refuses_is_set_aside_alone(synced: Synced) -> None:
    taker = AlertTaker(synced.owner, synced.repository, synced.policy, first_sync=False)
    good, _ = taker.sort([alert(1), alert(2), alert(3)])
    wide = type(good[1])(replace(good[1].found, manifest_path=_text(random.Random(6), 9_000)))
    synced.store.findings.begin_sync(synced.owner, synced.repository)

    def page(*alerts: Any) -> PageCount:
        return synced.store.findings.apply_page(synced.owner, synced.repository, SOURCE, alerts, taker.decide, cursor="next")

    count = page(good[0], wide, good[2])
    assert (count.inserted, count.rows_written, count.quarantined) == (2, 2, 1)
    (kept,) = synced.store.findings.quarantined(synced.owner)
    assert (kept["source_id"], kept["reason"], kept["detail"]) == ("2", Reason.ALERT_REFUSED, "ProgramLimitExceeded")
    assert synced.audit().count("security.finding.created") == 2
    assert synced.store.findings.begin_sync(synced.owner, synced.repository).cursor == "next", "the sync goes on"
    assert page(good[0], wide).quarantined == 1 and page(*good).inserted == 1
    assert synced.store.findings.quarantined(synced.owner) == []


def test_an_older_page_takes_nothing_back(synced: Synced) -> None:
    synced.take(alert(1), alert(2))
    dismissal = {"disposition": "dismissed", "reason": "not_used", "by": "manual"}
    synced.store.findings.dispose(synced.owner, synced.one(1).id, dismissal, lambda *_: Change([], None), actor="test")
    later = {"updated_at": "2026-03-01T00:00:00Z"}
    synced.take(alert(1, state="dismissed", dismissed_at=later["updated_at"], **later), alert(2, **later))
    count = synced.take(alert(1), alert(2, **{"security_advisory.severity": "critical"}))
    assert (count.outdated, count.rows_written) == (2, 0)
    assert (synced.one(1).disposition, synced.one(1).upstream_state) == ("dismissed", "dismissed")
    assert synced.take(alert(2, **later, **{"security_advisory.severity": "critical"})).changed == 1, "equally old is news"


def test_a_quietly_raised_severity_has_its_days_from_now_on(synced: Synced) -> None:
    began = datetime.now(UTC)
    dates = dict.fromkeys(("created_at", "updated_at"), (began - timedelta(days=20)).isoformat())

    def severity(name: str) -> None:
        synced.take(alert(1, **dates, **{"security_advisory.severity": name}))

    severity("medium")
    severity("critical")
    (shown,) = synced.all()
    assert began + timedelta(days=15) <= shown["due_at"] < began + timedelta(days=16) and not shown["overdue"]
    for name in ("high", "critical", "high", "low"):
        severity(name)
    (shown,) = synced.all()
    (steps,) = synced.store.findings.history(synced.owner, [shown["id"]]).values()
    assert [one.severity for one in steps] == ["medium", "critical", "high", "critical", "high", "low"]
    assert synced.audit().count("security.finding.severity_changed") == 5 and shown["budget_days"] == 90


def test_a_second_fix_between_two_syncs_is_a_period_of_its_own(synced: Synced) -> None:
    synced.take(alert(1, state="fixed", fixed_at="2026-01-10T00:00:00Z"))
    synced.take(alert(1, state="fixed", fixed_at="2026-02-20T00:00:00Z", updated_at="2026-02-20T00:00:00Z"))
    with synced.store.database.owner(synced.owner) as connection:
        row = connection.execute(text("select period, closed_at, cardinality(met_due) from finding_sla")).one()
    assert (row[0], row[1].isoformat(), row[2]) == (2, "2026-02-20T00:00:00+00:00", 1)


def test_a_deadline_of_a_shorter_history_or_an_older_policy_overwrites_nothing(synced: Synced) -> None:
    synced.take(alert(1), alert(2))
    ids = [synced.one(number).id for number in (1, 2)]
    now = datetime.now(UTC)

    def computed(policy: SlaPolicy) -> list[tuple[UUID, SlaRow]]:
        history = synced.store.findings.history(synced.owner, ids)
        return [(one, deadline(history[one], [], policy, synced.repository, now)) for one in ids]

    def stored() -> list[tuple[Any, ...]]:
        with synced.store.database.owner(synced.owner) as connection:
            found = connection.execute(
                text(
                    "select s.closed_at is null, s.policy_version, s.budget_days from finding_sla s join findings f on f.id = s.finding_id order by f.source_id"
                )
            ).all()
        return [tuple(one) for one in found]

    before = computed(synced.policy)
    synced.take(alert(1, state="fixed", fixed_at="2026-01-10T00:00:00Z"))
    strict = policy_for(synced.store, synced.owner, SecurityConfig(sla_preset="strict"), actor="test")
    assert synced.store.findings.write_sla(synced.owner, before) == 1, "the fixed one has more history by now"
    assert synced.store.findings.write_sla(synced.owner, computed(strict)) == 2
    assert synced.store.findings.write_sla(synced.owner, computed(synced.policy)) == 0
    assert stored() == [(False, 2, 30), (True, 2, 90)]


def test_a_page_is_measured_by_the_policy_that_was_saved_meanwhile(synced: Synced) -> None:
    synced.take(alert(4))
    policy_for(synced.store, synced.owner, SecurityConfig(sla_preset="strict"), actor="test")
    synced.take(alert(4, updated_at="2026-01-06T00:00:00Z"), alert(8))  # its taker began with the older one
    assert [one["budget_days"] for one in synced.all()] == [7, 7]
    assert list(synced.store.findings.behind_policy(synced.owner, 2)) == []


def test_a_policy_that_is_saved_during_a_page_waits_for_it_and_finds_its_deadlines(synced: Synced) -> None:
    strict = SecurityConfig(sla_preset="strict")
    saving = threading.Thread(target=policy_for, args=(synced.store, synced.owner, strict), kwargs={"actor": "test"})
    taker = AlertTaker(synced.owner, synced.repository, synced.policy, first_sync=False)

    def decide(*facts: Any) -> Change:
        saving.start()
        saving.join(0.3)
        assert saving.is_alive()
        return taker.decide(*facts)

    good, _ = taker.sort([alert(4)])
    synced.store.findings.apply_page(synced.owner, synced.repository, SOURCE, good, decide, cursor=None)
    saving.join()
    assert [len(block) for block in synced.store.findings.behind_policy(synced.owner, 2)] == [1]


def test_the_posture_names_every_owner_and_tells_what_was_never_read(database: Database) -> None:
    def posture(one: Synced) -> dict[str, Any]:
        (mine,) = [row for row in one.store.findings.posture() if row["owner_id"] == one.owner]
        return mine

    synced = Synced(database)
    assert (posture(synced)["findings"], posture(synced)["synced_since"]) == (0, None), "its agent is on"
    synced.take(*(alert(number) for number in range(1, 9)), alert(9, state="snoozed"))
    assert posture(synced)["synced_since"] is None
    synced.store.findings.end_sync(synced.owner, synced.repository, outcome="synced", complete=True)
    found = posture(synced)
    assert found["synced_since"] == database.clock.now() and found["quarantined"] == 1
    assert sum(found[name] for name in ("critical", "high", "medium", "low")) == found["open"] == 8
    assert synced.store.findings.numbers(synced.owner)["quarantined"] == 1
    another = [Repository(synced.repository + 500_000, "octo/another", "main", False)]
    more = {"provider": "github", "installation_id": synced.world.installation, "account": "octo", "actor": "test"}
    synced.store.owners.connect(synced.owner, repositories=another, **more)
    assert posture(synced)["synced_since"] is None, "one of two was never read"
    with synced.store.database.owner(synced.owner) as connection:
        connection.execute(text("update repositories set removed_at = now() where full_name = 'octo/another'"))
    assert posture(synced)["synced_since"] == database.clock.now()


def test_an_interrupted_sync_goes_on_at_its_checkpoint(synced: Synced) -> None:
    synced.take(alert(1), cursor="page-2")
    state = synced.store.findings.begin_sync(synced.owner, synced.repository)
    assert (state.cursor, state.succeeded_at) == ("page-2", None)
    synced.take(alert(2))
    synced.store.findings.end_sync(synced.owner, synced.repository, outcome="synced", complete=True, etag="e", alerts=2)
    state = synced.store.findings.begin_sync(synced.owner, synced.repository)
    assert state.cursor is None and state.succeeded_at is not None and (state.etag, state.syncs) == ("e", 1)


def test_only_a_complete_sync_makes_a_repository_fresh(synced: Synced) -> None:
    synced.store.findings.begin_sync(synced.owner, synced.repository)
    synced.store.findings.end_sync(synced.owner, synced.repository, outcome="provider_unavailable", complete=False)
    (row,) = synced.store.findings.syncs(synced.owner)
    assert (row["outcome"], row["succeeded_at"]) == ("provider_unavailable", None)


def test_two_owners_hold_the_same_alert_of_the_same_repository_apart(database: Database) -> None:
    one, two = Synced(database, 880_001), Synced(database, 880_001)
    one.take(alert(1))
    two.take(alert(1, state="fixed", fixed_at="2026-01-10T00:00:00Z"))
    assert (one.one(1).status, two.one(1).status) == ("open", "fixed")
    assert one.store.findings.get(two.owner, one.one(1).id) is None


def test_duplicates_are_superseded_and_come_back(synced: Synced) -> None:
    same = {"security_advisory.ghsa_id": "GHSA-same", "dependency.package.name": "left"}
    synced.take(alert(1, **same), alert(2, **same))
    assert supersede(synced.store, synced.owner, synced.repository, synced.policy) == 1
    assert (synced.one(1).status, synced.one(1).canonical_id) == ("ignored", synced.one(2).id)
    assert supersede(synced.store, synced.owner, synced.repository, synced.policy) == 0, "nothing moves twice"
    synced.take(alert(2, **same, state="fixed", fixed_at="2026-01-10T00:00:00Z"))
    assert supersede(synced.store, synced.owner, synced.repository, synced.policy) == 1
    assert (synced.one(1).status, synced.one(1).disposition) == ("open", None)
    kinds = [one.kind for one in synced.store.findings.history(synced.owner, [synced.one(1).id])[synced.one(1).id]]
    assert kinds == ["opened", "ignored", "reopened"]


def test_a_sync_keeps_what_was_decided_here(synced: Synced) -> None:
    same = {"security_advisory.ghsa_id": "GHSA-same", "dependency.package.name": "left"}
    synced.take(alert(1, **same), alert(2, **same))
    supersede(synced.store, synced.owner, synced.repository, synced.policy)
    synced.take(alert(1, **same, **{"security_advisory.summary": "Other words"}))
    assert (synced.one(1).title, synced.one(1).disposition, synced.one(1).status) == ("Other words", "superseded", "ignored")


def test_a_policy_that_says_the_same_keeps_its_version(synced: Synced) -> None:
    again = policy_for(synced.store, synced.owner, SecurityConfig(), actor="test")
    strict = policy_for(synced.store, synced.owner, SecurityConfig(sla_preset="strict"), actor="test")
    assert (synced.policy.version, again.version, strict.version) == (1, 1, 2)
    kept = synced.store.findings.policy(synced.owner)
    assert kept is not None and kept[0] == 2 and kept[1] == strict.stored()


def test_the_policy_of_a_past_moment_is_the_one_of_that_time(synced: Synced, database: Database) -> None:
    before = database.clock.now()
    database.clock.advance(timedelta(days=10))
    policy_for(synced.store, synced.owner, SecurityConfig(sla_preset="strict"), actor="test")
    found = synced.store.findings.policy(synced.owner, before + timedelta(days=5))
    assert found is not None and found[0] == 1
    first = synced.store.findings.policy(synced.owner, before - timedelta(days=500))
    assert first is not None and first[0] == 1, "before the first policy the first one counts"
    newest = synced.store.findings.policy(synced.owner, database.clock.now())
    assert newest is not None and newest[0] == 2


def test_the_source_s_history_is_marked_as_reconstructed_at_the_first_sync_only(synced: Synced) -> None:
    synced.take(alert(1), first=True)
    synced.take(alert(2))
    of: dict[str, UUID] = {number: synced.one(int(number)).id for number in ("1", "2")}
    history = synced.store.findings.history(synced.owner, list(of.values()))
    assert [history[of[number]][0].reconstructed for number in ("1", "2")] == [True, False]


def test_whose_finding_it_is_and_numbers(synced: Synced) -> None:
    synced.take(*(alert(number) for number in range(1, 9)))
    assert synced.store.findings.owner_of(synced.one(1).id) == synced.owner
    numbers = synced.store.findings.numbers(synced.owner)
    assert (numbers["findings"], numbers["open"], numbers["open_critical"]) == (8, 8, 2)
    assert numbers["overdue"] + numbers["within_due"] == 8
    (mine,) = [row for row in synced.store.findings.posture() if row["owner_id"] == synced.owner]
    assert mine["open"] == 8 and synced.owner in synced.store.findings.owners()
