"""What must always hold, as queries that list the offenders: the asset checks of the platform (design, section 5).

Each looks at states that no process may leave behind for longer than its lease; `grace` (now minus the longest lease and a
round of recovery) keeps work that is under way out of the lists.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.store import system_statements as system
from kilo_pipelines.store.database import Database, rows

# Leases last 15 s, recovery looks every 5 s, offers stand 20 s: what stands longer than this was left behind.
GRACE = timedelta(minutes=2)
# Shown of each list: enough to find the cause.
SHOWN = 20


class Invariants:
    """Looks over all owners."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def offenders(self, name: str) -> list[dict[str, Any]]:
        """The first `SHOWN` rows that break this invariant; [] when it holds."""
        now = self._clock.now()
        with self._database.system() as connection:
            found = rows(connection, system.INVARIANTS[name].sql, now=now, grace=now - GRACE, limit=SHOWN)
        return [dict(row) for row in found]
