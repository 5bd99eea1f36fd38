"""Rate budgets of integrations: one bucket a kind of request, spent by every process (design, N7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection

from kilo_pipelines.core.rates import Bucket, Rate, full, take
from kilo_pipelines.store.database import Database, changed, one


@dataclass(frozen=True)
class Cost:
    """What a piece of work takes from the bucket `kind` (`read` or `write`) that refills at `rate`, and what it leaves to others."""

    kind: str
    requests: float
    rate: Rate
    leave: float = 0.0


def take_budget(
    connection: Connection, owner_id: UUID, integration_id: UUID, costs: Sequence[Cost], now: datetime
) -> datetime | None:
    """Takes all costs or none within the caller's transaction; None when they were there, else when the last will be."""
    savepoint = connection.begin_nested()
    waits = [_take(connection, owner_id, integration_id, cost, now) for cost in sorted(costs, key=lambda one: one.kind)]
    until = max((wait for wait in waits if wait is not None), default=None)
    if until is None:
        savepoint.commit()
    else:
        savepoint.rollback()
    return until


def _take(connection: Connection, owner_id: UUID, integration_id: UUID, cost: Cost, now: datetime) -> datetime | None:
    place = {"owner": owner_id, "integration": integration_id, "kind": cost.kind}
    fresh = full(cost.rate, now)
    changed(
        connection,
        "insert into rate_budgets (owner_id, integration_id, kind, tokens, refilled_at) values (:owner, :integration, :kind, :tokens, :refilled)"
        " on conflict do nothing",
        **place,
        tokens=fresh.tokens,
        refilled=fresh.refilled_at,
    )
    row = one(
        connection,
        "select tokens, refilled_at, blocked_until from rate_budgets where owner_id = :owner and integration_id = :integration and kind = :kind"
        " for update",
        **place,
    )
    assert row is not None  # noqa: S101  # it was just made, and budgets are never deleted
    taken = take(Bucket(**row), cost.rate, cost.requests, now, cost.leave)
    changed(
        connection,
        "update rate_budgets set tokens = :tokens, refilled_at = :refilled where owner_id = :owner and integration_id = :integration and kind = :kind",
        **place,
        tokens=taken.bucket.tokens,
        refilled=taken.bucket.refilled_at,
    )
    return taken.wait_until


# A bucket that nobody has used yet is full; how much that is, its first use says (`core.rates.take` cuts it to the burst).
WHATEVER_THE_BURST = 1e9


class Budgets:
    """What providers said of their limits, and what is left within them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def take(self, owner_id: UUID, integration_id: UUID, costs: Sequence[Cost], now: datetime) -> datetime | None:
        """`take_budget` for what is no work item."""
        with self._database.owner(owner_id) as connection:
            return take_budget(connection, owner_id, integration_id, costs, now)

    def block(self, owner_id: UUID, integration_id: UUID, until: datetime) -> None:
        """The provider asked to wait (Retry-After, secondary limit): nobody asks it for this integration before `until`."""
        with self._database.owner(owner_id) as connection:
            changed(
                connection,
                "insert into rate_budgets (owner_id, integration_id, kind, tokens, refilled_at, blocked_until)"
                " select :owner, :integration, kind, :full, cast(:until as timestamptz), :until from unnest(array['read', 'write']) kind"
                " on conflict (owner_id, integration_id, kind) do update set blocked_until = greatest(rate_budgets.blocked_until, :until)",
                owner=owner_id,
                integration=integration_id,
                until=until,
                full=WHATEVER_THE_BURST,
            )
