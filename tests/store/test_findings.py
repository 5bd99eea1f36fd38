"""Findings in the database: pages, checkpoints, dispositions, deadlines."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.ops.findings import policy_for
from kilo_pipelines.ops.security_sync import SOURCE, AlertTaker, supersede
from kilo_pipelines.services.security.config import SERVICE, SecurityConfig
from kilo_pipelines.store import PageCount
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
