"""The tables of the Security Agent's assets, against what the rules say of each finding alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from kilo_pipelines.assets.security import chunks, compliance_table, recompute
from kilo_pipelines.ops.findings import policy_for
from kilo_pipelines.services.security import sla
from kilo_pipelines.services.security.config import SecurityConfig
from tests.conftest import Database
from tests.store.test_findings import Synced
from tests.support.alerts import alert

FIXED = {"state": "fixed", "fixed_at": "2026-02-01T00:00:00Z", "updated_at": "2026-02-01T00:00:00Z"}
DISMISSED = {"state": "dismissed", "dismissed_at": "2026-01-20T00:00:00Z", "updated_at": "2026-01-20T00:00:00Z"}
RAISED = {"security_advisory.severity": "critical", "updated_at": "2026-01-15T00:00:00Z"}


@pytest.fixture
def mixed(database: Database) -> Synced:
    """Two hundred findings: open, fixed, dismissed, raised, fixed and back."""
    synced = Synced(database)
    synced.take(*(alert(number) for number in range(1, 201)), first=True)
    synced.take(*(alert(number, **FIXED) for number in range(1, 61)))
    synced.take(*(alert(number, **DISMISSED) for number in range(61, 101)))
    synced.take(*(alert(number, **RAISED) for number in range(101, 121)))
    synced.take(*(alert(number, updated_at="2026-03-01T00:00:00Z") for number in range(1, 11)))
    return synced


def _expected(synced: Synced, policy: sla.SlaPolicy, now: datetime) -> dict[str, sla.SlaState]:
    found = synced.store.findings.history(synced.owner, [one["id"] for one in synced.all()])
    return {str(key): sla.evaluate(sla.steps_of(steps), policy, synced.repository, now) for key, steps in found.items()}


def _stored(synced: Synced) -> dict[str, tuple[datetime | None, datetime | None, int]]:
    with synced.store.database.owner(synced.owner) as connection:
        rows = connection.execute(text("select finding_id, due_at, closed_at, budget_days from finding_sla")).all()
    return {str(row[0]): (row[1], row[2], row[3]) for row in rows}


def test_what_a_sync_wrote_needs_no_recomputing(mixed: Synced) -> None:
    assert recompute(mixed.store, mixed.owner, mixed.policy, datetime.now(UTC)) == (200, 0)


@pytest.mark.parametrize(
    "settings",
    [{"sla_preset": "strict"}, {"sla_business_days": True}, {"sla_pause_while_ignored": False}, {"sla_preset": "federal"}],
)
def test_a_changed_policy_moves_every_deadline_as_the_rules_say(mixed: Synced, settings: dict[str, object]) -> None:
    policy = policy_for(mixed.store, mixed.owner, SecurityConfig.model_validate(settings), actor="test")
    now = datetime.now(UTC)
    assert recompute(mixed.store, mixed.owner, policy, now) == (200, 200)
    expected = {key: (one.due_at, one.closed_at, one.budget_days) for key, one in _expected(mixed, policy, now).items()}
    assert _stored(mixed) == expected
    assert recompute(mixed.store, mixed.owner, policy, now) == (200, 0), "and once is enough"


def test_a_repository_s_own_days_count(mixed: Synced) -> None:
    days = {"critical": 1, "high": 2, "medium": 3, "low": 4}
    config = SecurityConfig.model_validate({"sla_repository_overrides": {str(mixed.repository): days}})
    policy = policy_for(mixed.store, mixed.owner, config, actor="test")
    recompute(mixed.store, mixed.owner, policy, datetime.now(UTC))
    expected = {
        key: (one.due_at, one.closed_at, one.budget_days) for key, one in _expected(mixed, policy, datetime.now(UTC)).items()
    }
    assert _stored(mixed) == expected


def test_a_deadline_that_somebody_typed_in_is_put_right(mixed: Synced) -> None:
    with mixed.store.database.owner(mixed.owner) as connection:
        connection.execute(
            text(
                "update finding_sla set due_at = due_at + interval '1 year' where finding_id in (select id from findings order by id limit 7)"
            )
        )
    _, written = recompute(mixed.store, mixed.owner, mixed.policy, datetime.now(UTC))
    assert 0 < written <= 7


@pytest.mark.parametrize("days", [10, 40, 100])
def test_the_compliance_table_counts_what_the_rules_count(mixed: Synced, days: int) -> None:
    now = datetime(2026, 1, 5, tzinfo=UTC) + timedelta(days=days)
    # The table tells of the present state: what it is compared with is computed from the whole history.
    states = _expected(mixed, mixed.policy, datetime.now(UTC)).values()
    table = compliance_table(mixed.store, mixed.owner, now).sum()
    due = [one for one in states if one.due_at is not None]
    lately = [one for one in due if now - sla.PERIOD < one.due_at <= now]  # type: ignore[operator]
    assert table["open"] == sum(one.closed_at is None for one in due)
    assert table["overdue"] == sum(one.closed_at is None and one.due_at <= now for one in due)  # type: ignore[operator]
    assert table["met"] == sum(one.closed_at is not None and one.closed_at <= one.due_at for one in lately)  # type: ignore[operator]
    assert table["met"] + table["missed"] == len(lately)


def test_an_owner_without_findings_has_an_empty_table(database: Database) -> None:
    synced = Synced(database)
    assert list(chunks(synced.store, synced.owner)) == []
    assert int(compliance_table(synced.store, synced.owner, datetime.now(UTC)).sum().sum()) == 0
