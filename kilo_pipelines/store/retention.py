"""What is kept for how long: old bodies, events of sessions and callbacks go, decisions and their evidence stay (docs/retention.md)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.store import system_statements as system
from kilo_pipelines.store.database import Database, changed

# Rows of one transaction: short locks, and a run that dies has done what it did.
BATCH = 1_000
# Transactions of one run and table: a year's backlog is worked off over some days, beside the work.
MOST_BATCHES = 200


@dataclass(frozen=True)
class Ages:
    """Days, by table; see the settings `KILO_KEEP_*`."""

    delivery_bodies: float
    session_events: float
    callbacks: float


class Retention:
    """Removes over all owners; nothing that is live is ever old."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def sweep(self, ages: Ages) -> dict[str, int]:
        """Removes what is older; how many rows of which table."""
        now = self._clock.now()
        return {
            name: self._drain(system.SWEEP[name].sql, now - timedelta(days=days))
            for name, days in (
                ("delivery_bodies", ages.delivery_bodies),
                ("session_events", ages.session_events),
                ("callbacks", ages.callbacks),
                # a gap says of a delivery what its body can't say any more
                ("delivery_gaps", ages.delivery_bodies),
                # a full one says nothing
                ("author_buckets", 0.0),
            )
        }

    def _drain(self, sql: str, before: object) -> int:
        total = 0
        for _ in range(MOST_BATCHES):
            with self._database.system() as connection:
                done = changed(connection, sql, before=before, limit=BATCH)
            total += done
            if done < BATCH:
                break
        return total
