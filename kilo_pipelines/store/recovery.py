"""Recovery: a named reconciler for each non-final state (invariant 4). What a dead process held goes back to waiting."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from sqlalchemy import Connection

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store import system_statements as system
from kilo_pipelines.store.database import Database, changed, notify, rows
from kilo_pipelines.store.queue import end_item, free_slots

BATCH = 100
# Launches of one session: a host that kills it three times will kill it a fourth time.
MAX_LAUNCHES = 3
# Runs that died between claim and launch, of one attempt.
MAX_STARTS = 5

# Which reconciler looks after which non-final state; a test holds this against the tables' check constraints.
RECONCILERS: dict[str, str] = {
    "deliveries.received": "inbox.admit_next",
    "work_items.waiting": "queue.offers",
    "work_items.starting": "starting_lease",
    "work_items.running": "running_deadline",
    "sessions.queued": "session_deadline",
    "sessions.running": "session_lease",
    "attempts.open": "running_deadline",
    "effects.pending": "queue.offers",
    "effects.applying": "queue.offers",
}


class Recovery:
    """Reaps what is over."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def reap(self) -> dict[str, int]:
        """Runs every reconciler once; how many rows each one moved."""
        reconcilers: dict[str, Callable[[Connection, datetime], int]] = {
            "starting_lease": self._starting_lease,
            "session_lease": self._session_lease,
            "session_deadline": self._session_deadline,
            "running_deadline": self._running_deadline,
        }
        counts = {}
        for name, reconcile in reconcilers.items():
            with self._database.system() as connection:
                counts[name] = reconcile(connection, self._clock.now())
        return counts

    @staticmethod
    def _starting_lease(connection: Connection, now: datetime) -> int:
        """A claim whose run died before a session stood: waiting again, slot free; given up after MAX_STARTS."""
        found = rows(connection, system.REAP["starting_lease"].sql, now=now, limit=BATCH)
        for row in found:
            owner, item = row["owner_id"], row["id"]
            changed(
                connection,
                "update work_items set state = 'waiting', reason = null, lease_until = null, offer_until = null, not_before = :now, tries = tries + 1,"
                " updated_at = :now where owner_id = :owner and id = :id and state = 'starting' and tries < :most",
                owner=owner,
                id=item,
                now=now,
                most=MAX_STARTS,
            ) or end_item(
                connection,
                owner_id=owner,
                item_id=item,
                state="failed",
                reason=Reason.RETRIES_EXHAUSTED,
                now=now,
                announced=False,
            )
            free_slots(connection, owner, item, now)
            notify(connection, f"item:{item}")
        return len(found)

    @staticmethod
    def _session_lease(connection: Connection, now: datetime) -> int:
        """A session whose worker died: queued again, at most MAX_LAUNCHES times; interrupted ones end."""
        found = rows(connection, system.REAP["session_lease"].sql, now=now, limit=BATCH)
        for row in found:
            if row["interrupt_requested"]:
                state, reason = "interrupted", row["interrupt_requested"]
            elif row["launches"] >= MAX_LAUNCHES:
                state, reason = "failed", Reason.SESSION_LOST
            else:
                state, reason = "queued", Reason.WORKER_LOST
            changed(
                connection,
                "update sessions set state = :state, reason = :reason, lease_until = null, offer_until = null, fence = fence + 1, ended_at = :ended"
                " where owner_id = :owner and id = :id and state = 'running'",
                owner=row["owner_id"],
                id=row["id"],
                state=state,
                reason=reason,
                ended=None if state == "queued" else now,
            )
            changed(connection, system.FREE_CAPACITY_OF.sql, session=row["id"])
            notify(connection, f"session:{row['id']}")
        return len(found)

    @staticmethod
    def _session_deadline(connection: Connection, now: datetime) -> int:
        """A session that no host took in time."""
        found = rows(connection, system.REAP["session_deadline"].sql, now=now, limit=BATCH)
        for row in found:
            changed(
                connection,
                "update sessions set state = 'failed', reason = :reason, ended_at = :now where owner_id = :owner and id = :id and state = 'queued'",
                owner=row["owner_id"],
                id=row["id"],
                reason=Reason.NO_CAPACITY,
                now=now,
            )
            notify(connection, f"session:{row['id']}")
        return len(found)

    @staticmethod
    def _running_deadline(connection: Connection, now: datetime) -> int:
        """An item past its deadline, whatever became of its session."""
        found = rows(connection, system.REAP["running_deadline"].sql, now=now, limit=BATCH)
        for row in found:
            end_item(
                connection,
                owner_id=row["owner_id"],
                item_id=row["id"],
                state="failed",
                reason=Reason.DEADLINE_PASSED,
                now=now,
                announced=False,
            )
        return len(found)
