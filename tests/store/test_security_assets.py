"""The tables of the Security Agent's assets, against what the rules say of each finding alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from alembic import command
from sqlalchemy import create_engine, text

from kilo_pipelines.acts.security import recompute_deadlines
from kilo_pipelines.assets.security import chunks, compliance_table, recompute
from kilo_pipelines.ops.findings import policy_for
from kilo_pipelines.services.security import report, sla
from kilo_pipelines.services.security.config import SecurityConfig
from kilo_pipelines.store.migrate import _config as migrations
from tests.conftest import Database
from tests.store.test_findings import Synced
from tests.support.alerts import SEVERITIES, START, alert

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


def _random_history(synced: Synced, chance: random.Random, number: int) -> Iterator[dict[str, Any]]:
    """What an alert says in one sync after another: fixed, dismissed, back, fixed anew unseen, another severity, fixed without a date."""
    at = START + timedelta(days=chance.randrange(200))
    more: dict[str, Any] = {"created_at": at.isoformat()}
    for _ in range(5):
        moment = at.isoformat()
        more["updated_at"] = moment
        yield alert(number, **more)
        at += timedelta(days=chance.choice([0, 1, 10, 40, 100]), seconds=1)
        moment = at.isoformat()
        state = chance.choice(["open", "fixed", "fixed", "dismissed"])
        dates = {
            "open": {},
            "fixed": {"fixed_at": chance.choice([moment, moment, None])},
            "dismissed": {"dismissed_at": moment, "dismissed_reason": "not_used"},
        }
        kept = {name: more[name] for name in ("created_at", "security_advisory.severity") if name in more}
        more = {**kept, "state": state, **dates[state]}
        if chance.random() < 0.3:
            more["security_advisory.severity"] = chance.choice(SEVERITIES)


@pytest.mark.parametrize(
    "settings", [{}, {"sla_pause_while_ignored": False}, {"sla_business_days": True, "sla_preset": "strict"}]
)
@pytest.mark.parametrize("seed", [1, 2])
def test_three_ways_to_the_figures_agree_on_any_history(database: Database, seed: int, settings: dict[str, object]) -> None:
    synced, chance = Synced(database), random.Random(seed)
    alerts = [_random_history(synced, chance, number) for number in range(1, 61)]
    for page in zip(*alerts, strict=True):
        synced.take(*page, first=synced.all() == [])
    # After every step of them.
    now = max(datetime.now(UTC), START + timedelta(days=800))
    assert recompute(synced.store, synced.owner, synced.policy, now) == (60, 0), "syncs and asset say the same"
    policy = policy_for(synced.store, synced.owner, SecurityConfig.model_validate(settings), actor="test")
    recompute(synced.store, synced.owner, policy, now)
    states = _expected(synced, policy, now)
    history = synced.store.findings.history(synced.owner, [UUID(one) for one in states])
    told = {key: report.verdict(sla.steps_of(history[UUID(key)]), policy, synced.repository, now) for key in states}
    for at in (START + timedelta(days=days) for days in (30, 90, 200, 400)):
        pure = sla.compliance(states.values(), at)
        table = compliance_table(synced.store, synced.owner, at).sum()
        database.clock.advance(at - database.clock.now())
        numbers = synced.store.findings.numbers(synced.owner)
        assert {name: int(table[name]) for name in ("met", "missed")} == {name: pure[name] for name in ("met", "missed")}
        assert {name: int(numbers[name]) for name in ("met", "missed")} == {name: pure[name] for name in ("met", "missed")}
        assert (table["within due"], table["overdue"]) == (numbers["within_due"], numbers["overdue"])
    for key, state in states.items():
        assert state.due_at is None or (told[key] in ("terminal_missed", "open_past_deadline")) == (
            state.due_at <= now and sla.compliance([replace(state, met_due=(), missed_due=())], state.due_at)["missed"] == 1
        ), "the report and the figure call the same findings late"
    database.clock.advance(now - database.clock.now())
    pure, numbers = sla.compliance(states.values(), now), synced.store.findings.numbers(synced.owner)
    assert (pure["open_within"], pure["open_overdue"]) == (numbers["within_due"], numbers["overdue"])


def test_an_owner_without_findings_has_an_empty_table(database: Database) -> None:
    synced = Synced(database)
    assert list(chunks(synced.store, synced.owner)) == []
    assert int(compliance_table(synced.store, synced.owner, datetime.now(UTC)).sum().sum()) == 0


def test_deadlines_of_an_older_schema_are_computed_anew(mixed: Synced, database: Database) -> None:
    expected = _stored(mixed)
    engine = create_engine(database.logins["migrator"])
    with engine.begin() as connection:
        command.downgrade(migrations(connection), "0006")
    with engine.begin() as connection:
        command.upgrade(migrations(connection), "head")
    engine.dispose()
    with mixed.store.database.owner(mixed.owner) as connection:
        connection.execute(text("update finding_sla set due_at = null, closed_at = null"))
    assert recompute_deadlines(mixed.store, mixed.owner, mixed.policy, datetime.now(UTC)) == (200, 200)
    assert _stored(mixed) == expected
    assert recompute(mixed.store, mixed.owner, mixed.policy, datetime.now(UTC)) == (200, 0)
