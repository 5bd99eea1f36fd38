"""Syncing an owner's alerts from the running twin: every answer of the provider, and the world that changes behind our back."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
from sqlalchemy import text

from kilo_pipelines.assets.security import compliance_table
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.services.security.config import SERVICE
from tests.conftest import Database
from tests.support.security import Owner, syncing
from tests.support.twin import Twin


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twin]:
    with syncing(tmp_path_factory.mktemp("sync")) as running:
        yield running


def test_a_first_sync_brings_every_alert_of_every_page(database: Database, twin: Twin) -> None:
    owner = Owner(database, twin, 2, 260)
    done = owner.sync()
    assert (done.outcome, done.complete, done.inserted, done.quarantined) == ("synced", True, 260, 0)
    assert set(owner.fresh().values()) == {True} and sum(owner.by_status().values()) == 260
    assert min(owner.by_status().values()) > 0, "the seeded world has all of them"


def test_an_unchanged_world_is_asked_once_and_writes_nothing(database: Database, twin: Twin) -> None:
    owner = Owner(database, twin, 1, 150)
    owner.sync()
    done = owner.sync()
    assert (done.repositories[owner.names[0]], done.rows_written, done.complete) == ("unchanged", 0, True)


def test_what_changed_behind_our_back_is_taken(database: Database, twin: Twin) -> None:
    owner = Owner(database, twin, 1, 120)
    owner.sync()
    changes = twin.control("change-alerts", repository=owner.names[0], count=30)["changes"]
    done = owner.sync()
    assert done.inserted + done.changed > 0 and done.unchanged > 0 and len(changes) == 30
    assert owner.sync().rows_written == 0


@pytest.mark.parametrize("how", ["a day later", "whole"])
def test_a_severity_that_was_raised_quietly_is_seen_within_a_day_or_when_asked_for(
    database: Database, twin: Twin, how: str
) -> None:
    owner = Owner(database, twin, 1, 260)
    owner.sync()
    # On the last page, which a conditional request never asks for.
    last = sorted(owner.findings(), key=lambda one: one.source_updated_at)[:50]
    one = next(one for one in last if one.status == "open" and one.severity != "critical")
    twin.control("move-alert", repository=owner.names[0], number=int(one.source_id), action="severity_raised")
    owner.sync()
    seen_before = owner.findings(id=one.id)[0].severity != one.severity
    if how == "a day later":
        with owner.store.database.owner(owner.id) as connection:
            connection.execute(text("update repository_syncs set read_at = read_at - interval '25 hours'"))
    assert owner.sync(whole=how == "whole").complete
    assert not seen_before and owner.findings(id=one.id)[0].severity != one.severity


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (401, Reason.PROVIDER_AUTH),
        (404, Reason.PROVIDER_NOT_FOUND),
        (500, Reason.PROVIDER_UNAVAILABLE),
        (502, Reason.PROVIDER_UNAVAILABLE),
    ],
)
def test_a_refused_repository_is_not_fresh_and_says_why(database: Database, twin: Twin, status: int, reason: Reason) -> None:
    owner = Owner(database, twin, 1, 5)
    owner.fault(owner.names[0], status=status)
    done = owner.sync()
    assert (done.complete, done.repositories[owner.names[0]]) == (False, str(reason))
    assert owner.fresh() == {owner.names[0]: False}


def test_a_refused_token_asks_no_other_repository_and_waits_an_hour(database: Database, twin: Twin) -> None:
    owner = Owner(database, twin, 2, 10)
    for name in owner.names:
        owner.fault(name, status=401)
    done = owner.sync()
    assert set(done.repositories.values()) == {str(Reason.PROVIDER_AUTH)}
    with owner.store.database.owner(owner.id) as connection:
        asked = connection.execute(text("select count(*) from repository_syncs where attempted_at is not null")).scalar_one()
    assert asked == 1 and owner.sync().inserted == 0


def test_disabled_alerts_stop_no_other_repository(database: Database, twin: Twin) -> None:
    owner = Owner(database, twin, 2, 20)
    twin.control("set-repository", repository=owner.names[0], alerts_enabled=False)
    done = owner.sync()
    assert done.complete and done.repositories == {owner.names[0]: str(Reason.ALERTS_DISABLED), owner.names[1]: "synced"}
    assert owner.fresh()[owner.names[0]] is False


def test_a_limit_is_waited_for_as_long_as_it_says(database: Database, twin: Twin) -> None:
    owner = Owner(database, twin, 1, 5)
    owner.fault(owner.names[0], status=429, headers={"retry-after": "120"})
    assert owner.sync().repositories[owner.names[0]] == Reason.PROVIDER_RATE_LIMITED
    assert owner.sync().repositories[owner.names[0]] == Reason.PROVIDER_RATE_LIMITED, "nothing is asked meanwhile"
    with owner.store.database.owner(owner.id) as connection:
        connection.execute(text("update repository_syncs set not_before = not_before - interval '121 seconds'"))
    assert owner.sync().complete


def test_a_sync_that_was_cut_goes_on_where_it_was(database: Database, twin: Twin) -> None:
    owner = Owner(database, twin, 1, 250)
    owner.fault(owner.names[0], "headers", headers={})  # the first page as it is
    owner.fault(owner.names[0], kind="cut")
    broken = owner.sync()
    assert (broken.complete, broken.inserted) == (False, 100)
    resumed = owner.sync()
    assert (resumed.complete, resumed.inserted, resumed.unchanged) == (True, 150, 0), "the first page is not asked for again"


@pytest.mark.parametrize("kind", ["wrong_types", "unknown_severity", "unknown_state", "advisory_missing"])
def test_a_malformed_alert_is_set_aside_and_the_others_are_taken(database: Database, twin: Twin, kind: str) -> None:
    owner = Owner(database, twin, 1, 12)
    twin.control("spoil-alert", repository=owner.names[0], number=5, kind=kind)
    done = owner.sync()
    assert (done.complete, done.inserted, done.quarantined) == (True, 11, 1)
    (kept,) = owner.store.findings.quarantined(owner.id)
    assert (kept["source_id"], kept["reason"]) == ("5", Reason.ALERT_MALFORMED)
    twin.control("spoil-alert", repository=owner.names[0], number=5, kind=None)
    with owner.store.database.owner(owner.id) as connection:
        connection.execute(text("update repository_syncs set etag = null"))
    assert owner.sync().inserted == 1 and owner.store.findings.quarantined(owner.id) == []


def test_a_whole_reading_clears_what_is_gone_from_quarantine(database: Database, twin: Twin) -> None:
    owner = Owner(database, twin, 1, 12)
    twin.control("spoil-alert", repository=owner.names[0], number=5, kind="unknown_state")
    owner.sync()
    gone = [("?0123", str(Reason.ALERT_MALFORMED), "number")]
    owner.store.findings.quarantine(owner.id, owner.repositories[0]["repository_id"], gone)
    database.clock.advance(timedelta(hours=1))
    assert owner.sync().complete and len(owner.store.findings.quarantined(owner.id)) == 2, "nothing was read"
    assert owner.sync(whole=True).complete
    assert [one["source_id"] for one in owner.store.findings.quarantined(owner.id)] == ["5"]


def test_only_selected_repositories_are_read_but_one_may_be_asked_for(database: Database, twin: Twin) -> None:
    owner = Owner(database, twin, 2, 20, repository_selection_mode="selected", selected_repository_ids=[])
    assert owner.sync().outcome == Reason.NO_REPOSITORIES
    done = owner.sync(only=owner.repositories[1]["repository_id"])
    assert list(done.repositories) == [owner.names[1]] and done.complete


def test_a_disabled_agent_asks_nothing(database: Database, twin: Twin) -> None:
    owner = Owner(database, twin, 1, 3)
    owner.store.owners.enable_service(owner.id, SERVICE, False, actor="test")
    assert owner.sync().outcome == Reason.SECURITY_DISABLED and owner.by_status() == {"open": 0, "fixed": 0, "ignored": 0}


def test_two_owners_of_one_repository_sync_apart(database: Database, twin: Twin) -> None:
    first = Owner(database, twin, 1, 8)
    second = Owner(database, twin, 1, 8)
    second.connect(first.repositories[0]["repository_id"], first.names[0])
    first.sync()
    second.sync()
    assert sum(first.by_status().values()) == 8 and sum(second.by_status().values()) == 16


def test_a_repository_that_fails_takes_nobodys_turn(database: Database, twin: Twin) -> None:
    owner = Owner(database, twin, 3, 9)
    for _ in range(3):
        first = owner.store.owners.sync_targets(owner.id)[0].full_name
        owner.fault(first, status=500)
        database.clock.advance(timedelta(seconds=1))
        owner.sync(only=owner.store.owners.sync_targets(owner.id)[0].repository_id)
        assert owner.store.owners.sync_targets(owner.id)[-1].full_name == first


def test_findings_of_a_repository_that_is_left_out_count_against_no_deadline(database: Database, twin: Twin) -> None:
    owner = Owner(database, twin, 2, 80)
    owner.sync()
    before = owner.store.findings.numbers(owner.id)
    kept, left = owner.repositories
    owner.configure(repository_selection_mode="selected", selected_repository_ids=[kept["repository_id"]])
    after = owner.store.findings.numbers(owner.id)
    assert 0 < after["overdue"] < before["overdue"] and after["missed"] < before["missed"]
    assert after["findings"] == before["findings"], "they are kept"
    overdue = owner.store.findings.listed(owner.id, status="open", overdue=True, limit=500)
    assert {one["repository"] for one in overdue} == {kept["repository"]} and len(overdue) == after["overdue"]
    table = compliance_table(owner.store, owner.id, database.clock.now())
    assert int(table["overdue"].sum()) == after["overdue"]
    assert {one["repository"] for one in owner.store.findings.offenders("overdue", limit=5_000)} & {left["repository"]} == set()
    owner.configure(selected_repository_ids=[])
    assert owner.store.findings.numbers(owner.id)["overdue"] == 0
