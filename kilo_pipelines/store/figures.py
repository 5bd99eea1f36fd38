"""Figures of the whole platform for its operator: what waits and runs now, and what ended since the last look.

Other processes' figures come from here, because the database is the one place that all of them write to. Over all owners and never by
owner (docs/decisions/0034). Does not belong here: how figures are named and exposed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import wraps
from typing import Any, TypeVar, cast
from uuid import UUID

from sqlalchemy.exc import SQLAlchemyError

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.store import system_statements as system
from kilo_pipelines.store.database import Database, changed, one, rows
from kilo_pipelines.store.rows import Claimed, Refused
from kilo_pipelines.telemetry import traces

log = logging.getLogger(__name__)

# Rows carry the moment at which their transaction began: those that commit later than this after it are not counted.
COMMIT_LAG = timedelta(seconds=30)
# A first look, or one after a long silence, reads no more than this back; its cost is that of an hour's work.
LONGEST_LOOK_BACK = timedelta(hours=1)
# A bucket that nobody used for this long has filled up, whatever it says.
BUDGET_IN_USE = timedelta(minutes=5)
# A scrape never stands in the way of the work; each of its statements takes milliseconds.
STATEMENT_MS = 3_000
# Upper bounds in seconds: a quick effect takes 0.2 s, a session may take half an hour (KILO_SESSION_CAP_SECONDS).
BOUNDS = (0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1_800.0, 3_600.0)
CLAIM = "claim:"

F = TypeVar("F", bound=Callable[..., Claimed | Refused])


def told_of_claims(claim: F) -> F:
    """Around `Queue.claim`: its span, the span of the wait that it ended, and its outcome counted after it is committed."""

    @wraps(claim)
    def told(self: Any, item_id: UUID, service: str, **more: Any) -> Claimed | Refused:
        with traces.span("claim", item=item_id, service=service) as span:
            found = claim(self, item_id, service, **more)
            outcome = "claimed" if isinstance(found, Claimed) else found.outcome
            span.set(outcome=outcome)
            if isinstance(found, Claimed):
                span.set(owner=found.owner_id, attempt=found.attempt, fence=found.fence, repository=found.repository_id)
        if isinstance(found, Claimed) and found.since is not None:
            traces.past("wait", found.since, self._clock.now(), parent=found.trace, item=item_id, service=service)
        count(self._database, f"{CLAIM}{service}:{outcome}")
        return found

    return cast("F", told)


def count(database: Database, name: str) -> None:
    """Counts one of something by itself, so that nobody waits for the row; a count that can't be written is said and no more."""
    try:
        with database.system_statement() as connection:
            changed(connection, system.COUNT.sql, name=name)
    except SQLAlchemyError as failure:
        log.warning("%s was not counted: %s", name, type(failure).__name__)


@dataclass(frozen=True)
class Now:
    """The present; each list holds rows of the statement of its name (`system_statements.FIGURES`), ages in seconds."""

    waiting: list[dict[str, Any]]
    deliveries: list[dict[str, Any]]
    slots: list[dict[str, Any]]
    places: list[dict[str, Any]]
    effects: list[dict[str, Any]]
    budgets: list[dict[str, Any]]
    switches: list[dict[str, Any]]
    persons: list[dict[str, Any]]
    heartbeats: list[dict[str, Any]]
    schema: list[dict[str, Any]]
    claims: list[dict[str, Any]]


@dataclass(frozen=True)
class Ended:
    """What ended after one moment and until another, grouped; `bucket` is the place in `BOUNDS` (the last one: beyond)."""

    until: datetime
    sessions: list[dict[str, Any]] = field(default_factory=list)
    launches: list[dict[str, Any]] = field(default_factory=list)
    items: list[dict[str, Any]] = field(default_factory=list)
    settles: list[dict[str, Any]] = field(default_factory=list)
    effects: list[dict[str, Any]] = field(default_factory=list)


class Figures:
    """Reads over all owners; notes that something runs."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def beat(self, name: str) -> None:
        """Whatever `name` says runs is alive now."""
        with self._database.system() as connection:
            changed(connection, system.BEAT.sql, name=name, now=self._clock.now())

    def now(self) -> Now:
        """What there is at present."""
        at = self._clock.now()
        with self._database.system() as connection:
            one(connection, system.FIGURES_LIMIT.sql, limit=str(STATEMENT_MS))
            found = {
                name: [
                    dict(row) for row in rows(connection, statement.sql, **_only(statement.sql, now=at, used=at - BUDGET_IN_USE))
                ]
                for name, statement in system.FIGURES.items()
            }
        return Now(**found)

    def ended(self, after: datetime | None) -> Ended:
        """What ended after this moment, which is the `until` of the last look; None: a first one, which only says where to begin."""
        until = self._clock.now() - COMMIT_LAG
        if after is None or after >= until:
            return Ended(after or until)
        begin = max(after, until - LONGEST_LOOK_BACK)
        with self._database.system() as connection:
            one(connection, system.FIGURES_LIMIT.sql, limit=str(STATEMENT_MS))
            found = {
                name: [
                    dict(row)
                    for row in rows(
                        connection, statement.sql, **_only(statement.sql, after=begin, until=until, bounds=list(BOUNDS))
                    )
                ]
                for name, statement in system.ENDED.items()
            }
        return Ended(until, **found)


def _only(sql: str, **values: Any) -> dict[str, Any]:
    """Those of the values that the statement asks for."""
    return {name: value for name, value in values.items() if f":{name}" in sql}
