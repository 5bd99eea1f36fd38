"""Gaps: deliveries that the provider sent and we don't have; and how far its log was compared (rules: core/delivery_gaps)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.delivery_gaps import RETENTION, Attempt, Gap, GapState
from kilo_pipelines.store import system_statements as system
from kilo_pipelines.store.database import Database, changed, one, rows
from kilo_pipelines.store.rows import Integration

# Shown of gaps that were given up: enough to find the cause.
SHOWN = 20
# For so long what was given up is told: whoever comes back on Monday, or from a week away, sees it.
TOLD = timedelta(days=7)
# Six runs (schedules.REPAIR_CRON) that compared nothing: no hiccup any more, and two days before the log forgets anything.
STALE = timedelta(hours=1)


@dataclass(frozen=True)
class Position:
    """How far an App's log was compared: everything until `compared_until` (the provider's clock) was judged.

    With `cursor` a comparison stopped there, which began at `reading_until`. `revision`: for compare-and-set.
    """

    revision: int = 0
    compared_until: datetime | None = None
    reading_until: datetime | None = None
    cursor: str | None = None


@dataclass(frozen=True)
class DueGap:
    """An open gap with what its next step depends on."""

    owner_id: UUID
    id: UUID
    integration_id: UUID
    installation_id: int
    guid: str
    attempt_id: int
    gap: Gap


class DeliveryGaps:
    """Gaps of all owners. Each write asks for the state that it leaves (invariant 3)."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def position(self, app_id: int) -> Position:
        """How far this App's log was compared."""
        with self._database.system() as connection:
            row = one(connection, system.DELIVERY_LOG_POSITION.sql, app=app_id)
        return Position(**row) if row else Position()

    def keep_position(self, app_id: int, position: Position, *, complete: bool) -> bool:
        """Keeps it unless somebody else did since it was read, whose comparison then counts; `complete`: the log was read to its end."""
        with self._database.system() as connection:
            return bool(
                changed(
                    connection,
                    system.KEEP_DELIVERY_LOG_POSITION.sql,
                    app=app_id,
                    compared_at=self._clock.now() if complete else None,
                    **vars(position),
                )
            )

    def stored(self, wanted: Sequence[tuple[Integration, str]]) -> set[tuple[UUID, str]]:
        """Which of these guids are in the inbox of their integration: (integration, guid)."""
        with self._database.system() as connection:
            found = rows(
                connection,
                system.STORED_DELIVERIES.sql,
                owner_ids=[integration.owner_id for integration, _ in wanted],
                integration_ids=[integration.id for integration, _ in wanted],
                provider_ids=[guid for _, guid in wanted],
            )
        return {(row["integration_id"], row["provider_delivery_id"]) for row in found}

    def record(self, integration: Integration, missing: Sequence[Sequence[Attempt]]) -> int:
        """Notes guids, each by its attempts, as missing; how many are new.

        A newer attempt of an open gap is the one that is asked for and pulled from now on; when it failed, nobody waits for it.
        """
        now, new = self._clock.now(), 0
        with self._database.owner(integration.owner_id) as connection:
            for attempts in missing:
                newest = attempts[-1]
                row = one(
                    connection,
                    "insert into delivery_gaps (owner_id, id, integration_id, guid, event, action, repository_id, attempt_id, attempted_at,"
                    " answered, sent_at, missing_since, not_before, deadline) values (:owner, :id, :integration, :guid, :event, :action,"
                    " :repository, :attempt, :attempted, :answered, :sent, :now, :now, :deadline)"
                    " on conflict (owner_id, integration_id, guid) do update set attempt_id = excluded.attempt_id,"
                    " attempted_at = excluded.attempted_at, answered = excluded.answered, deadline = excluded.deadline,"
                    " not_before = least(delivery_gaps.not_before, excluded.not_before)"
                    " where delivery_gaps.ended_at is null and (excluded.attempted_at, excluded.attempt_id)"
                    " > (delivery_gaps.attempted_at, delivery_gaps.attempt_id) returning (xmax = 0) as new",
                    owner=integration.owner_id,
                    id=uuid4(),
                    integration=integration.id,
                    guid=newest.guid,
                    event=newest.event,
                    action=newest.action,
                    repository=newest.repository_id,
                    attempt=newest.id,
                    attempted=newest.delivered_at,
                    answered=newest.answered,
                    sent=attempts[0].delivered_at,
                    now=now,
                    deadline=newest.delivered_at + RETENTION,
                )
                new += bool(row and row["new"])
        return new

    def due(self, limit: int) -> list[DueGap]:
        """Open gaps whose next step is due, the oldest first; those of an installation that several owners hold wait (invariant 9)."""
        with self._database.system() as connection:
            found = rows(connection, system.DUE_DELIVERY_GAPS.sql, now=self._clock.now(), limit=limit)
        names = ("owner_id", "id", "integration_id", "installation_id", "guid", "attempt_id")
        facts = (
            "event",
            "answered",
            "asks",
            "pulls",
            "not_before",
            "deadline",
            "connected",
            "suspended",
            "stored_by_pull",
        )
        return [
            DueGap(
                **{name: row[name] for name in names},
                gap=Gap(state=GapState(row["state"]), **{name: row[name] for name in facts}),
            )
            for row in found
        ]

    def asking(self, due: DueGap, wait: timedelta) -> bool:
        """Notes that a redelivery is asked for, *before* it is: a kill between costs a wait and no second redelivery.

        False: somebody else was there.
        """
        return self._move(
            due,
            "state = 'asked', asks = asks + 1, asked_at = :now, not_before = :until",
            "and state = 'missing' and asks = :asks and not_before <= :now",
            until=self._clock.now() + wait,
            asks=due.gap.asks,
        )

    def pulling(self, due: DueGap, wait: timedelta) -> bool:
        """Notes that a pull begins, and when the next one may, should it fail. False: somebody else was there."""
        return self._move(
            due,
            "pulls = pulls + 1, not_before = :until",
            "and pulls = :pulls",
            until=self._clock.now() + wait,
            pulls=due.gap.pulls,
        )

    def postpone(self, due: DueGap, until: datetime) -> bool:
        """Nothing is done before `until`."""
        return self._move(due, "not_before = :until", "", until=until)

    def end(self, due: DueGap, state: GapState, reason: str) -> bool:
        """The gap is over."""
        return self._move(due, "state = :state, reason = :reason, ended_at = :now", "", state=str(state), reason=reason)

    def _move(self, due: DueGap, changes: str, guard: str, **values: Any) -> bool:
        with self._database.owner(due.owner_id) as connection:
            return bool(
                changed(
                    connection,
                    f"update delivery_gaps set {changes} where owner_id = :owner and id = :id and ended_at is null {guard}",
                    owner=due.owner_id,
                    id=due.id,
                    **({"now": self._clock.now()} if ":now" in changes + guard else {}),
                    **values,
                )
            )

    def by_owner(self) -> list[dict[str, Any]]:
        """Gaps of every owner that has any: open ones, ends of the last week, when the oldest open one was sent."""
        now = self._clock.now()
        with self._database.system() as connection:
            return [dict(row) for row in rows(connection, system.DELIVERY_GAPS_BY_OWNER.sql, since=now - TOLD)]

    def given_up(self) -> list[dict[str, Any]]:
        """What was given up in the last week, newest first."""
        with self._database.system() as connection:
            found = rows(connection, system.GIVEN_UP_DELIVERIES.sql, since=self._clock.now() - TOLD, limit=SHOWN)
        return [dict(row) for row in found]

    def compared_at(self, app_id: int) -> datetime | None:
        """When this App's log was last read to its end, by our clock; before that, since when there is something to compare.

        None: no installation was ever connected.
        """
        with self._database.system() as connection:
            row = one(connection, system.DELIVERIES_COMPARED_AT.sql, app=app_id)
        found: datetime | None = row["compared_at"] if row else None
        return found

    def listed(self, owner_id: UUID, limit: int) -> list[dict[str, Any]]:
        """An owner's gaps, newest first."""
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                "select g.guid, g.event, g.action, coalesce(r.full_name, g.repository_id::text) as repository, g.state, g.reason, g.asks, g.pulls,"
                " g.sent_at, g.missing_since, g.asked_at, g.not_before, g.deadline, g.ended_at from delivery_gaps g"
                " left join repositories r on r.owner_id = g.owner_id and r.external_id = g.repository_id"
                " where g.owner_id = :owner order by g.sent_at desc, g.id limit :limit",
                owner=owner_id,
                limit=limit,
            )
        return [dict(row) for row in found]

    def received(self, owner_id: UUID, limit: int) -> list[dict[str, Any]]:
        """An owner's newest deliveries, and which of them were pulled."""
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                "select provider_delivery_id as guid, event, action, state, reason, received_at, (headers -> 'pulled') is not null as pulled"
                " from deliveries where owner_id = :owner order by received_at desc, id limit :limit",
                owner=owner_id,
                limit=limit,
            )
        return [dict(row) for row in found]
