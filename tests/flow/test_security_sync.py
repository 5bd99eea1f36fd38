"""Syncing an owner's alerts from the running twin: every answer of the provider, and the world that changes behind our back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from click.testing import Result
from sqlalchemy import create_engine, text

from kilo_pipelines import jobs, schedules, tags
from kilo_pipelines.acts.security import check_readable, enable, request_sync
from kilo_pipelines.assets.security import compliance_table
from kilo_pipelines.cli.work import _unreadable
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.refusal import Refusal
from kilo_pipelines.ops import security_sync
from kilo_pipelines.ops.security_sync import SEVERITIES, Trigger
from kilo_pipelines.resources.github import GitHubResource
from kilo_pipelines.services.security.config import SERVICE
from kilo_pipelines.settings import Settings, write_secret
from kilo_pipelines.store import Cipher, Integration
from tests.conftest import Database
from tests.support.keys import api_key
from tests.support.security import Owner, seeded, syncing
from tests.support.served import invoked, served
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


def test_a_refused_token_pauses_the_installation_over_runs(database: Database, twin: Twin) -> None:
    """The repository that wasn't asked is the first one of the next sync, and would be asked then."""
    owner = Owner(database, twin, 2, 10)
    owner.fault(owner.names[0], status=401)
    owner.sync()
    assert set(owner.sync().repositories.values()) == {str(Reason.PROVIDER_AUTH)} and not any(owner.fresh().values())
    with owner.store.database.owner(owner.id) as connection:
        connection.execute(text("update repository_syncs set not_before = not_before - interval '61 minutes'"))
    assert owner.sync().complete


def test_a_limit_holds_for_the_whole_installation_as_long_as_it_says(database: Database, twin: Twin) -> None:
    owner = Owner(database, twin, 3, 15)
    owner.fault(owner.names[0], status=429, headers={"retry-after": "120"})
    for number in range(2):  # in the run that met it and in the next one
        assert set(owner.sync().repositories.values()) == {str(Reason.PROVIDER_RATE_LIMITED)}
        assert not any(owner.fresh().values()), "nothing is asked meanwhile"
        if number == 0:
            assert sum(one["attempted_at"] is not None for one in owner.store.findings.syncs(owner.id)) == 1
    with owner.store.database.owner(owner.id) as connection:
        connection.execute(text("update repository_syncs set not_before = not_before - interval '121 seconds'"))
        connection.execute(text("update rate_budgets set blocked_until = blocked_until - interval '121 seconds'"))
    assert owner.sync().complete


def test_a_sync_leaves_to_reviews_what_is_left_of_the_budget(database: Database, twin: Twin) -> None:
    owner = Owner(database, twin, 2, 10)
    target = owner.store.owners.sync_targets(owner.id)[0]
    (cost,) = GitHubResource().page_costs()
    most = replace(cost, requests=cost.rate.burst - cost.leave / 2, leave=0)
    assert owner.store.budgets.take(owner.id, target.integration_id, [most], datetime.now(UTC)) is None
    assert set(owner.sync().repositories.values()) == {str(Reason.PROVIDER_RATE_LIMITED)} and not any(owner.fresh().values())
    launch = GitHubResource().launch_costs()
    assert owner.store.budgets.take(owner.id, target.integration_id, launch, datetime.now(UTC)) is None, "what was left is theirs"


def test_a_sync_that_was_cut_goes_on_where_it_was_and_sees_what_changed_since(database: Database, twin: Twin) -> None:
    owner = Owner(database, twin, 1, 250)
    owner.fault(owner.names[0], "headers", headers={})  # the first page as it is
    owner.fault(owner.names[0], kind="cut")
    broken = owner.sync()
    assert (broken.complete, broken.inserted) == (False, 100)
    moved = next(one for one in owner.findings() if one.status == "open")  # behind the checkpoint
    twin.control("move-alert", repository=owner.names[0], number=int(moved.source_id), action="fixed")
    resumed = owner.sync()
    assert (resumed.complete, resumed.inserted) == (True, 150)
    assert owner.findings(id=moved.id)[0].status == "fixed"
    # Two pages at two times are no whole reading: the next sync makes one, and says how many there are.
    assert (row_of(owner)["alerts"], row_of(owner)["read_at"]) == (None, None)
    assert owner.sync().unchanged == 250 and row_of(owner)["alerts"] == 250


def row_of(owner: Owner) -> dict[str, Any]:
    """What the last sync of an owner's only repository left."""
    with owner.store.database.owner(owner.id) as connection:
        return dict(connection.execute(text("select * from repository_syncs")).mappings().one())


def test_a_whole_reading_begins_at_the_first_page(database: Database, twin: Twin) -> None:
    owner = Owner(database, twin, 1, 250)
    owner.fault(owner.names[0], "headers", headers={})
    owner.fault(owner.names[0], kind="cut")
    owner.sync()
    done = owner.sync(whole=True)
    assert (done.complete, done.unchanged, done.inserted, row_of(owner)["alerts"]) == (True, 100, 150, 250)


def test_every_fourth_sync_reads_everything_though_it_begins_a_little_early(database: Database, twin: Twin) -> None:
    owner = Owner(database, twin, 1, 20)
    owner.sync()
    for hours, outcome in ((18, "unchanged"), (23, "synced")):
        with owner.store.database.owner(owner.id) as connection:
            connection.execute(text(f"update repository_syncs set read_at = attempted_at - interval '{hours} hours'"))
        assert owner.sync().repositories == {owner.names[0]: outcome}
    assert row_of(owner)["read_at"] == row_of(owner)["attempted_at"], "it counts from its beginning"


def test_the_owners_share_ends_at_a_page(database: Database, twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner(database, twin, 1, 250)
    with monkeypatch.context() as short:
        short.setattr(security_sync, "OWNER_SECONDS", 0.0)
        for _ in range(2):
            done = owner.sync()
            assert (done.inserted, done.repositories[owner.names[0]]) == (100, Reason.SYNC_OUT_OF_TIME)
    assert owner.sync().complete and sum(owner.by_status().values()) == 250


def test_a_repository_whose_page_fails_in_the_database_stops_no_other(
    database: Database, twin: Twin, caplog: pytest.LogCaptureFixture
) -> None:
    owner = Owner(database, twin, 2, 20)
    broken, sound = owner.names
    admin = create_engine(database.logins["migrator"])
    number = owner.repositories[0]["repository_id"]
    # Not what a single alert can be blamed for: that one would go into quarantine.
    spoil = (
        f"begin if new.repository_id = {number} then raise unique_violation using message = new.ghsa_id; end if; return new; end"
    )
    with admin.begin() as connection:
        connection.execute(text(f"create function spoiled() returns trigger language plpgsql as $$ {spoil} $$"))
        connection.execute(text("create trigger spoiled before insert on findings for each row execute function spoiled()"))
    done = owner.sync()
    with admin.begin() as connection:
        connection.execute(text("drop trigger spoiled on findings"))
        connection.execute(text("drop function spoiled()"))
    admin.dispose()
    assert done.repositories == {broken: str(Reason.SYNC_FAILED), sound: "synced"} and not done.complete
    assert f"{broken}: IntegrityError" in caplog.text and "apply_page" in caplog.text
    assert "Failing row" not in caplog.text and "GHSA" not in caplog.text, "rows are somebody's data"
    assert (row_of_name(owner, broken)["outcome"], row_of_name(owner, broken)["detail"]) == ("sync_failed", "IntegrityError")
    assert owner.sync().complete


def row_of_name(owner: Owner, name: str) -> dict[str, Any]:
    return next(one for one in owner.store.findings.syncs(owner.id) if one["full_name"] == name)


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


def test_a_renamed_repository_is_synced_on_under_its_new_name(database: Database, twin: Twin) -> None:
    owner = Owner(database, twin, 1, 30)
    owner.sync()
    before = {one.id for one in owner.findings()}
    name = f"{owner.names[0]}-new"
    twin.control("rename", repository=owner.names[0], to=name.partition("/")[2])
    one = next(one for one in owner.findings() if one.status == "open")
    twin.control("move-alert", repository=name, number=int(one.source_id), action="fixed")
    assert owner.sync().repositories == {name: "synced"}
    assert owner.findings(id=one.id)[0].status == "fixed" and {one.id for one in owner.findings()} == before
    assert [one.full_name for one in owner.store.owners.sync_targets(owner.id)] == [name]
    assert owner.sync().repositories == {name: "unchanged"}


def test_a_repository_is_known_by_its_id_when_another_one_takes_its_name(database: Database, twin: Twin) -> None:
    owner = Owner(database, twin, 1, 5)
    name = f"{owner.names[0]}-new"
    twin.control("rename", repository=owner.names[0], to=name.partition("/")[2])
    seeded(twin, 40, [owner.names[0].partition("/")[2]])
    assert owner.sync().repositories == {name: "synced"} and len(owner.findings()) == 5


@pytest.mark.parametrize("call", ["transfer", "remove"])
def test_a_repository_that_left_keeps_its_findings_and_owes_no_deadline(database: Database, twin: Twin, call: str) -> None:
    """No event of it came."""
    owner = Owner(database, twin, 2, 120)
    owner.sync()
    left, kept = owner.names
    before = owner.store.findings.numbers(owner.id)
    twin.control(call, repository=left, **({"to": "elsewhere"} if call == "transfer" else {}))
    assert owner.sync().repositories == {left: str(Reason.OWNER_CHANGED), kept: "unchanged"}
    after = owner.store.findings.numbers(owner.id)
    assert after["findings"] == before["findings"] and after["open"] == before["open"]
    assert after["overdue"] < before["overdue"]
    assert left in {one["repository"] for one in owner.store.findings.offenders("orphaned", limit=500)}
    assert left not in {one["repository"] for one in owner.store.findings.offenders("overdue", limit=5_000)}


@pytest.mark.parametrize("how", ["uninstalled", "suspended"])
def test_findings_of_an_installation_that_does_not_work_owe_no_deadline_until_it_does(
    database: Database, twin: Twin, how: str
) -> None:
    owner = Owner(database, twin, 1, 80)
    owner.sync()
    owners = owner.store.owners
    integration = Integration(
        owner.id,
        owners.sync_targets(owner.id)[0].integration_id,
        "github",
        twin.credentials["installation_id"],
        "acme",
        False,
        owner.clock.now(),
    )
    before = owner.store.findings.numbers(owner.id)["overdue"]
    soon = (None, timedelta(0))
    untold = partial(owner.store.notices.untold, owner.id, "sla_breach", SEVERITIES, ["*"], due_within=soon, limit=500)
    assert before > 0 and len(untold()) == before
    if how == "uninstalled":
        owners.disconnect(integration.owner_id, integration.id)
    else:
        owners.set_suspended(integration, True)
    assert owner.store.findings.numbers(owner.id)["overdue"] == 0 and untold() == []
    assert owner.store.findings.listed(owner.id, overdue=True, limit=500) == []
    assert owner.names[0] in {one["repository"] for one in owner.store.findings.offenders("orphaned", limit=500)}
    assert owner.id not in {one for one, _ in owner.store.findings.changed_owners(500)}
    assert owner.sync().outcome == Reason.NO_REPOSITORIES
    if how == "uninstalled":
        owner.connect(owner.repositories[0]["repository_id"], owner.names[0])
    else:
        owners.set_suspended(integration, False)
    assert owner.store.findings.numbers(owner.id)["overdue"] == before


def test_owners_go_in_the_order_of_their_last_success(database: Database, twin: Twin) -> None:
    first, second, failing, never = (Owner(database, twin, 1, 2) for _ in range(4))
    second.sync()
    database.clock.advance(timedelta(minutes=1))
    first.sync()
    failing.fault(failing.names[0], status=500)
    failing.sync()
    order = [one for one in database.store.findings.owners() if one in (first.id, second.id, failing.id, never.id)]
    assert set(order[:2]) == {failing.id, never.id} and order[2:] == [second.id, first.id]


def test_a_sync_may_last_until_the_next_one_is_due() -> None:
    assert int(jobs.security_sync.tags[tags.MAX_RUNTIME]) == 6 * 3_600 and schedules.SYNC_CRON == "0 */6 * * *"


def test_owners_that_cannot_be_synced_keep_no_place_of_those_that_can(database: Database, twin: Twin) -> None:
    empty = Owner(database, twin, 1, 1, repository_selection_mode="selected", selected_repository_ids=[])
    waiting = Owner(database, twin, 1, 1)
    found = {owner for owner, _ in database.store.findings.changed_owners(500)}
    assert waiting.id in found and empty.id not in found
    waiting.sync()
    assert waiting.id not in {owner for owner, _ in database.store.findings.changed_owners(500)}


def test_a_sync_is_audited_with_who_asked_and_what_came_of_it(database: Database, twin: Twin) -> None:
    owner = Owner(database, twin, 2, 12)
    owner.sync()
    owner.sync(only=owner.repositories[0]["repository_id"], trigger=Trigger("command", "operator"))
    assert request_sync(owner.store, owner.id, None, role="member", actor="owner:x") is not None
    first, second = owner.audited("security.sync.completed")
    assert (first["source"], first["trigger"], first["inserted"], first["repositories"]) == (
        "system",
        "schedule",
        12,
        {"synced": 2},
    )
    assert (second["source"], second["repository_id"]) == ("user", owner.repositories[0]["repository_id"])
    with owner.store.database.owner(owner.id) as connection:
        asked = connection.execute(text("select actor from audit_events where action = 'security.sync.triggered' order by id"))
        assert [row[0] for row in asked] == ["operator", "owner:x"]


def test_the_agent_is_switched_on_only_where_it_can_work(database: Database, twin: Twin) -> None:
    owner = Owner(database, twin, 1, 2)
    owner.store.owners.enable_service(owner.id, SERVICE, False, actor="test")

    def enabled(role: str = "owner") -> bool | Refusal:
        refused = check_readable(owner.store, owner.id, _unreadable) if role == "owner" else None
        return refused or enable(owner.store, owner.id, role=role, actor="test")

    assert enabled("member") == Refusal(Reason.ROLE_NOT_ALLOWED, "member")
    twin.control("withhold", permissions=["vulnerability_alerts"])
    refused = enabled()
    twin.control("withhold", permissions=[])
    assert isinstance(refused, Refusal) and refused.reason == Reason.PERMISSION_MISSING
    owner.select([])
    refused = enabled()
    assert isinstance(refused, Refusal) and refused.reason == Reason.NO_REPOSITORIES
    assert owner.sync().outcome == Reason.SECURITY_DISABLED, "no refusal switches it on"
    owner.select([owner.repositories[0]["repository_id"]])
    assert enabled() is True and owner.sync().complete


def test_the_command_says_why_the_agent_stays_off(database: Database, twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner(database, twin, 1, 2)
    owner.store.owners.enable_service(owner.id, SERVICE, False, actor="test")
    monkeypatch.setenv("KILO_DATABASE_URL", "postgresql://given/elsewhere")
    secrets = Settings().home / "secrets"
    write_secret(secrets / "database.json", json.dumps(database.logins))
    write_secret(secrets / "encryption.key", Cipher.new_key_file())
    write_secret(secrets / "operator-api-key", api_key(database.store, "operator"))

    def switched() -> Result:
        return invoked("services", "enable", SERVICE, "--owner", str(owner.id))

    with served(database) as address:
        monkeypatch.setenv("KILO_ADMIN_PORT", address.rsplit(":", 1)[1])
        twin.control("withhold", permissions=["vulnerability_alerts"])
        refused = switched()
        twin.control("withhold", permissions=[])
        assert refused.exit_code == 1 and "(permission_missing)" in refused.stderr, "GitHub is asked before"
        owner.select([])
        assert switched().exit_code == 1 and "(no_repositories)" in switched().stderr
        owner.select([owner.repositories[0]["repository_id"]])
        assert switched().stdout == "on\n" and owner.sync().complete
