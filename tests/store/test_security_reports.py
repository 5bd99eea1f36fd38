"""What documents are made of, read out of the database: whole, bounded, in one snapshot, and of one owner."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from kilo_pipelines.acts import security as acts
from kilo_pipelines.assets.security import recompute
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.refusal import Refusal
from kilo_pipelines.ops.security_sync import supersede
from kilo_pipelines.services.security import report
from kilo_pipelines.services.security.config import SERVICE, SecurityConfig
from kilo_pipelines.store import Limits, NewItem, PeriodRead, PresentRead
from tests.conftest import Database
from tests.store.test_findings import Synced
from tests.support.alerts import alert
from tests.support.two import connect

# In the shapes of credentials: a report's allow-list names the field in which one of them is put, too.
SECRETS = ("ghp_" + "c" * 36, "sk-" + "c" * 30, "kilo_" + "c" * 43, "xoxb-" + "c" * 20, "AKIA" + "C" * 16)
LIMITS = Limits(rows=10_000, bytes=8 * 2**20)
ACTIONS = list(report.EVIDENCE)


@pytest.fixture(scope="module")
def admin(database: Database, postgres_admin: str) -> Iterator[psycopg.Connection[Any]]:
    with connect(database, postgres_admin) as connection:
        yield connection


@pytest.fixture
def synced(database: Database) -> Synced:
    return Synced(database)


def read(synced: Synced, start: datetime, end: datetime, repository: int | None = None, limits: Limits = LIMITS) -> Any:
    return synced.store.reports.period(synced.owner, start, end, end, ACTIONS, repository, limits)


def note(admin: psycopg.Connection[Any], owner: UUID, subject: object, at: datetime, action: str, **data: Any) -> None:
    admin.execute(
        "insert into audit_events (owner_id, at, actor, action, subject, data) values (%s, %s, 'platform', %s, %s, %s)",
        (owner, at, action, str(subject), json.dumps(data)),
    )


def make(synced: Synced, form: acts.Form = "json", **more: Any) -> Any:
    asked = {"role": "viewer", "actor": "test", "now": synced.world.clock.now()} | more
    wish = asked.pop("wish", acts.Wish(form))
    return acts.make_document(synced.store, synced.owner, wish, **asked)


def test_a_period_holds_its_first_moment_and_not_the_one_after_it(synced: Synced, admin: psycopg.Connection[Any]) -> None:
    synced.take(alert(1))
    finding, day = synced.one(1).id, datetime(2025, 5, 5, tzinfo=UTC)
    for at in (day - timedelta(microseconds=1), day, day + timedelta(hours=24, microseconds=-1), day + timedelta(days=1)):
        note(admin, synced.owner, finding, at, "security.finding.status_change", before="open", after="fixed")
    found = read(synced, day, day + timedelta(days=1))
    assert [one.at for one in found.events] == [day, day + timedelta(hours=24, microseconds=-1)]
    assert set(found.findings) == {finding} and [one.kind for one in found.history[finding]] == ["opened"]


def test_every_page_is_read_once_and_in_order(synced: Synced, admin: psycopg.Connection[Any]) -> None:
    """2,500 events of three moments: pages end between events of one moment."""
    synced.take(alert(1), alert(2))
    ids, day = [synced.one(1).id, synced.one(2).id], datetime(2025, 6, 1, tzinfo=UTC)
    with admin.cursor() as cursor:
        cursor.executemany(
            "insert into audit_events (owner_id, at, actor, action, subject, data) values (%s, %s, 'x', 'security.finding.created', %s, %s)",
            [(synced.owner, day + timedelta(seconds=n % 3), str(ids[n % 2]), json.dumps({"n": n})) for n in range(2_500)],
        )
    found = read(synced, day, day + timedelta(days=1))
    assert sorted(one.data["n"] for one in found.events) == list(range(2_500))
    assert [(one.at, one.id) for one in found.events] == sorted((one.at, one.id) for one in found.events)


def test_a_report_is_of_one_owner_whatever_names_its_events_bear(database: Database, admin: psycopg.Connection[Any]) -> None:
    one, two = Synced(database, 870_001), Synced(database, 870_001)
    one.take(alert(1))
    two.take(alert(1), alert(2))
    now = database.clock.now()
    # An event of one owner that names another's finding is about nothing that its owner has.
    note(admin, one.owner, two.one(2).id, now, "security.finding.created", severity="low")
    found = read(one, now - timedelta(days=1), now + timedelta(days=1))
    assert {event.finding_id for event in found.events} == {one.one(1).id} == set(found.findings)
    told = make(one).decode()
    assert str(two.owner) not in told and str(two.one(2).id) not in told


def test_work_is_told_with_each_of_its_findings_and_by_repository(synced: Synced, admin: psycopg.Connection[Any]) -> None:
    synced.take(alert(1), alert(2))
    first, second = synced.one(1).id, synced.one(2).id
    queue, now = synced.store.queue, synced.world.clock.now()
    common = {"finding_id": str(first), "origin": "manual", "requested_by": "x"}
    analysis = queue.open(
        synced.owner,
        NewItem("security_analysis", f"finding:{first}", synced.repository, 0, {**common, "mode": "auto"}),
        actor="x",
    )
    more = {"analysis_id": str(analysis), "fingerprint": "f", "findings": [str(first), str(second)]}
    item = queue.open(synced.owner, NewItem("remediation", "r", synced.repository, 0, {**common, **more}), actor="x")
    note(admin, synced.owner, item, now, "security.remediation.pr_opened", pull_number=7)
    for repository, told in ((None, 2), (synced.repository, 2), (1, 0)):
        found = read(synced, now - timedelta(days=1), now + timedelta(days=1), repository)
        assert len([one for one in found.events if one.action == "security.remediation.pr_opened"]) == told
        assert set(found.findings) == ({first, second} if told else set())


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(rows=2, bytes=2**20), Reason.REPORT_TOO_LARGE),
        (Limits(rows=100, bytes=100), Reason.REPORT_TOO_LARGE),
        (Limits(rows=100, bytes=2**20, seconds=0), Reason.REPORT_OUT_OF_TIME),
    ],
)
def test_too_much_is_a_reason_and_no_report(synced: Synced, limits: Limits, reason: Reason) -> None:
    synced.take(*(alert(number) for number in range(1, 4)))
    now = synced.world.clock.now()
    assert read(synced, now - timedelta(days=1), now + timedelta(days=1), limits=limits) == reason
    if limits.bytes > 100:  # of findings as they stand it is the document that is measured
        assert synced.store.reports.present(synced.owner, None, limits) == reason
    for form in ("csv", "json", "vex"):
        made = make(synced, form, limits=limits)
        assert isinstance(made, Refusal) and made.reason == reason
    assert "security.audit_report.generated" not in synced.audit()


def test_a_statement_that_takes_too_long_is_a_reason(synced: Synced, admin: psycopg.Connection[Any]) -> None:
    """Somebody holds a table: the wait ends with the statement's time."""
    synced.take(alert(1))
    now = synced.world.clock.now()
    limits = Limits(rows=100, bytes=2**20, statement_seconds=0.2)
    with admin.transaction():
        admin.execute("lock table findings in access exclusive mode")
        assert read(synced, now - timedelta(days=1), now + timedelta(days=1), limits=limits) == Reason.REPORT_OUT_OF_TIME
        assert synced.store.reports.present(synced.owner, None, limits) == Reason.REPORT_OUT_OF_TIME
    assert isinstance(read(synced, now - timedelta(days=1), now + timedelta(days=1)), PeriodRead)


def test_a_snapshot_stands_still_and_takes_no_writes(synced: Synced) -> None:
    synced.take(alert(1))
    look = text("select count(*) from findings")
    with synced.store.database.snapshot(synced.owner, 5) as connection:
        before = connection.execute(look).scalar_one()
        synced.take(alert(2))
        assert connection.execute(look).scalar_one() == before == 1
        assert connection.execute(text("show transaction_isolation")).scalar_one() == "repeatable read"
    with pytest.raises(DBAPIError), synced.store.database.snapshot(synced.owner, 5) as connection:
        connection.execute(text("update findings set title = 'x'"))
    # The pool's next user has its own scope and rights again.
    with synced.store.database.owner(synced.owner) as connection:
        assert connection.execute(look).scalar_one() == 2
        assert connection.execute(text("show statement_timeout")).scalar_one() == "0"
        assert connection.execute(text("show transaction_read_only")).scalar_one() == "off"


def test_making_a_report_is_an_audit_event_and_a_refused_one_is_none(synced: Synced) -> None:
    synced.take(alert(1))
    for form in ("csv", "json", "vex"):
        assert isinstance(make(synced, form), bytes)
    events = [one for one in synced.store.audit.listed(owner_id=synced.owner, limit=50) if "audit_report" in one["action"]]
    assert {one["data"]["format"] for one in events} == {"csv", "json", "vex"} and {one["actor"] for one in events} == {"test"}
    assert make(synced, role="nobody").reason == Reason.ROLE_NOT_ALLOWED
    assert make(synced, wish=acts.Wish("vex", first=synced.world.clock.now().date())).reason == Reason.REPORT_PERIOD_INVALID
    assert synced.audit().count("security.audit_report.generated") == 3


def test_two_reports_of_a_past_period_are_the_same_bytes(synced: Synced, admin: psycopg.Connection[Any]) -> None:
    synced.take(alert(1), alert(2))
    day = datetime(2026, 3, 3, 12, tzinfo=UTC)
    note(admin, synced.owner, synced.one(1).id, day, "security.finding.status_change", before="open", after="fixed")
    wish = acts.Wish("json", day.date(), day.date())
    first = make(synced, wish=wish)
    synced.take(alert(3))
    assert make(synced, wish=wish) == first and len(json.loads(first)["findings"]) == 1
    assert make(synced, "vex") == make(synced, "vex")


def test_no_secret_and_no_person_is_in_any_form(synced: Synced, admin: psycopg.Connection[Any]) -> None:
    """Canaries in what a source, a person or a later room might put into an event."""
    synced.take(
        alert(
            1,
            state="dismissed",
            dismissed_at="2026-02-01T00:00:00Z",
            dismissed_by={"login": "canary-login"},
            dismissed_reason="not_used",
            dismissed_comment="canary-comment",
            **{"security_advisory.description": "canary-description", "security_advisory.summary": "=cmd() of grace@example.org"},
        )
    )
    finding, now = synced.one(1).id, synced.world.clock.now()
    secrets = {f"field_{n}": value for n, value in enumerate(SECRETS)}
    for action in ACTIONS:
        note(admin, synced.owner, finding, now, action, reason="; ".join(SECRETS), actor="canary-actor", **secrets)
    for form in ("csv", "json", "vex"):
        told = make(synced, form).decode()
        assert "canary" not in told and "grace@" not in told, form
        assert [one for one in SECRETS if one in told] == [], form
    cells = [cell for row in csv.reader(io.StringIO(make(synced, "csv").decode(), newline="")) for cell in row]
    assert "'=cmd() of [redacted-email]" in cells and not [cell for cell in cells if cell.startswith("=")]


def test_the_present_is_every_finding_page_by_page(synced: Synced) -> None:
    same = {"security_advisory.ghsa_id": "GHSA-same", "dependency.package.name": "left"}
    synced.take(*(alert(number, **(same if number < 3 else {})) for number in range(1, 1_502)))
    supersede(synced.store, synced.owner, synced.repository, synced.policy)
    found = synced.store.reports.present(synced.owner, None, LIMITS)
    assert isinstance(found, PresentRead) and len({one.id for one in found.findings}) == len(found.findings) == 1_501
    assert len(json.loads(make(synced, "vex"))["vulnerabilities"]) == 1_500
    assert synced.store.reports.present(synced.owner, 1, LIMITS).findings == []  # type: ignore[union-attr]


def test_descriptions_are_no_part_of_what_a_vex_document_is_made_of(synced: Synced, admin: psycopg.Connection[Any]) -> None:
    """5,000 findings with 2 KB each: more than a document may have, and none of it in this one."""
    synced.take(alert(1))
    columns = [
        row[0]
        for row in admin.execute(
            "select column_name from information_schema.columns where table_name = 'findings' and is_generated = 'NEVER'"
            " and column_name not in ('id', 'source_id', 'description')"
        )
    ]
    kept = ", ".join(columns)
    admin.execute(
        f"insert into findings ({kept}, id, source_id, description) select {kept}, gen_random_uuid(), 'n' || n, repeat('canary-', 300)"  # type: ignore[arg-type]
        " from findings, generate_series(1, 5000) n where owner_id = %s and source_id = '1'",
        (synced.owner,),
    )
    told = make(synced, "vex")
    assert isinstance(told, bytes), told
    found = synced.store.reports.present(synced.owner, None, LIMITS)
    assert isinstance(found, PresentRead) and len(found.findings) == 5_001 and b"canary" not in told
    assert {one.description for one in found.findings} == {""}


# -- settings --------------------------------------------------------------------------------------------------------------


def save(synced: Synced, revision: int, role: str = "owner", **changes: Any) -> Any:
    return acts.save_settings(
        synced.store,
        synced.owner,
        changes,
        expected_revision=revision,
        role=role,
        actor="test",
        now=synced.world.clock.now(),
        recompute=acts.recompute_deadlines,
    )


def test_saving_changes_deadlines_at_once_as_the_table_would(synced: Synced) -> None:
    """Contract 17.19: nothing is left for the recomputation that runs over tables."""
    synced.take(*(alert(number) for number in range(1, 51)))
    synced.take(
        alert(1, state="fixed", fixed_at="2026-01-10T00:00:00Z"), alert(2, state="dismissed", dismissed_at="2026-01-09T00:00:00Z")
    )
    done = save(synced, 1, sla_preset="strict", sla_business_days=True)
    assert (done.revision, done.enabled, done.looked, done.changed) == (2, True, 50, 50)
    version, policy = synced.store.findings.policy(synced.owner) or (0, {})
    assert (version, policy["business_days"]) == (2, True)
    kept = acts.policy_at(synced.store, synced.owner, synced.world.clock.now())
    assert recompute(synced.store, synced.owner, kept, synced.world.clock.now()) == (50, 0)
    again = save(synced, 2, sla_preset="strict")
    assert (again.looked, again.changed) == (0, 0), "the same policy moves nothing"


def test_an_older_policy_moves_no_deadline_back(synced: Synced) -> None:
    """A sync that began before the settings were saved."""
    synced.take(*(alert(number) for number in range(1, 9)))
    save(synced, 1, sla_preset="strict")
    assert acts.recompute_deadlines(synced.store, synced.owner, synced.policy, synced.world.clock.now()) == (0, 0)
    assert {one["budget_days"] for one in synced.all(severity="critical")} == {7}


def test_saving_enables_nothing_and_keeps_what_is_not_named(synced: Synced) -> None:
    """Contract 17.1 and 17.2."""
    synced.store.owners.enable_service(synced.owner, SERVICE, False, actor="test")
    done = save(synced, 2, triage_model="m", auto_analysis_enabled=True)
    assert not done.enabled and done.config.auto_analysis_enabled_at is not None
    later = save(synced, 3, auto_dismiss_enabled=True)
    assert (later.config.triage_model, later.config.auto_analysis_enabled_at) == ("m", done.config.auto_analysis_enabled_at)
    stored = synced.store.owners.config(synced.owner, SERVICE)
    assert stored is not None and not stored.enabled and SecurityConfig.model_validate(stored.config) == later.config


@pytest.mark.parametrize(
    ("revision", "role", "changes", "reason"),
    [
        (0, "owner", {}, Reason.SETTINGS_STALE),
        (2, "owner", {}, Reason.SETTINGS_STALE),
        (1, "member", {}, Reason.ROLE_NOT_ALLOWED),
        (1, "viewer", {}, Reason.ROLE_NOT_ALLOWED),
        (1, "owner", {"sla_preset": "absurd"}, Reason.SETTINGS_INVALID),
        (1, "owner", {"sla_preset": "custom", "sla_days": {"critical": 0, "high": 1, "medium": 1, "low": 1}}, Reason.SETTINGS_INVALID),
        (1, "owner", {"unheard_of": 1}, Reason.SETTINGS_INVALID),
        (1, "owner", {"triage_model": "a\x00b"}, Reason.SETTINGS_INVALID),
        (1, "owner", {"remediation_registries": ["\x00"]}, Reason.SETTINGS_INVALID),
    ],
)  # fmt: skip
def test_settings_that_are_refused_change_nothing(
    synced: Synced, revision: int, role: str, changes: dict[str, Any], reason: Reason
) -> None:
    before = synced.store.owners.config(synced.owner, SERVICE), synced.audit()
    refused = save(synced, revision, role, **changes)
    assert isinstance(refused, Refusal) and refused.reason == reason and refused.detail
    assert (synced.store.owners.config(synced.owner, SERVICE), synced.audit()) == before


def test_the_moment_of_switching_on_is_the_platforms_to_say(synced: Synced) -> None:
    done = save(synced, 1, auto_analysis_enabled=True, auto_analysis_enabled_at="2001-01-01T00:00:00Z")
    assert done.config.auto_analysis_enabled_at == synced.world.clock.now()
