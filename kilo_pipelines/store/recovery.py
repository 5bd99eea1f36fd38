"""Recovery: a named reconciler for each non-final state (invariant 4). What a dead process held goes back to waiting."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from uuid import UUID

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.effects import DELIVERY, Delivery
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store import system_statements as system
from kilo_pipelines.store.database import Database, changed, notify, rows
from kilo_pipelines.store.outbox import MAX_TRIES
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
    "hosted_sessions.new": "hosted.offers",
    "hosted_sessions.prepared": "hosted.offers",
    "hosted_sessions.initiated": "hosted.offers",
    "attempts.open": "running_deadline",
    "effects.pending": "queue.offers",
    "effects.held": "effect_held",
    "effects.applying": "effect_lease",
    "delivery_gaps.missing": "gap_deadline",
    "delivery_gaps.asked": "gap_deadline",
}


class Recovery:
    """Reaps what is over. What is over is looked up over all owners; each row is then moved under its own owner's scope, guarded."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def reap(self) -> dict[str, int]:
        """Runs every reconciler once; how many rows each one moved."""
        reconcilers: dict[str, Callable[[UUID, UUID, datetime], bool]] = {
            "starting_lease": self._starting_lease,
            "session_lease": self._session_lease,
            "session_deadline": self._session_deadline,
            "running_deadline": self._running_deadline,
            "effect_held": self._effect_held,
            "effect_lease": self._effect_lease,
            "gap_deadline": self._gap_deadline,
        }
        counts = {}
        for name, reconcile in reconcilers.items():
            now = self._clock.now()
            with self._database.system() as connection:
                found = rows(connection, system.REAP[name].sql, now=now, limit=BATCH)
            counts[name] = sum(reconcile(row["owner_id"], row["id"], now) for row in found)
        return counts

    def _starting_lease(self, owner_id: UUID, item_id: UUID, now: datetime) -> bool:
        """A claim whose run died before a session stood: waiting again, slot free; given up after MAX_STARTS."""
        with self._database.owner(owner_id) as connection:
            waiting = changed(
                connection,
                "update work_items set state = 'waiting', reason = null, lease_until = null, offer_until = null, not_before = :now, tries = tries + 1,"
                " updated_at = :now where owner_id = :owner and id = :id and state = 'starting' and lease_until <= :now and tries < :most",
                owner=owner_id,
                id=item_id,
                now=now,
                most=MAX_STARTS,
            )
            if waiting:
                free_slots(connection, owner_id, item_id)
                notify(connection, f"item:{item_id}")
                return True
            return end_item(
                connection,
                owner_id=owner_id,
                item_id=item_id,
                state="failed",
                reason=Reason.RETRIES_EXHAUSTED,
                now=now,
                announced=False,
                guard="and state = 'starting' and lease_until <= :now",
            )

    def _session_lease(self, owner_id: UUID, session_id: UUID, now: datetime) -> bool:
        """A session whose worker died: queued again, at most MAX_LAUNCHES times; interrupted ones end."""
        with self._database.system() as connection:
            taken = changed(
                connection,
                system.TAKE_BACK_SESSION.sql,
                owner=owner_id,
                id=session_id,
                now=now,
                most=MAX_LAUNCHES,
                lost=Reason.SESSION_LOST,
                reason=Reason.WORKER_LOST,
            )
            if taken:
                changed(connection, system.FREE_CAPACITY_OF.sql, session=session_id)
                notify(connection, f"session:{session_id}")
        return bool(taken)

    def _session_deadline(self, owner_id: UUID, session_id: UUID, now: datetime) -> bool:
        """A session that no host took in time."""
        with self._database.owner(owner_id) as connection:
            ended = changed(
                connection,
                "update sessions set state = 'failed', reason = :reason, ended_at = :now where owner_id = :owner and id = :id"
                " and state = 'queued' and deadline <= :now",
                owner=owner_id,
                id=session_id,
                reason=Reason.NO_CAPACITY,
                now=now,
            )
            notify(connection, f"session:{session_id}")
        return bool(ended)

    def _running_deadline(self, owner_id: UUID, item_id: UUID, now: datetime) -> bool:
        """An item past its deadline, whatever became of its session."""
        with self._database.owner(owner_id) as connection:
            return end_item(
                connection,
                owner_id=owner_id,
                item_id=item_id,
                state="failed",
                reason=Reason.DEADLINE_PASSED,
                now=now,
                announced=False,
                guard="and state = 'running' and deadline <= :now",
            )

    def _effect_held(self, owner_id: UUID, effect_id: UUID, now: datetime) -> bool:
        """A suggestion that nobody took up in time."""
        with self._database.owner(owner_id) as connection:
            return bool(
                changed(
                    connection,
                    "update effects set state = 'dropped', reason = :reason, held_until = null, ended_at = :now"
                    " where owner_id = :owner and id = :id and state = 'held' and held_until <= :now",
                    owner=owner_id,
                    id=effect_id,
                    reason=Reason.SUGGESTION_EXPIRED,
                    now=now,
                )
            )

    def _effect_lease(self, owner_id: UUID, effect_id: UUID, now: datetime) -> bool:
        """An effect whose worker died: pending again, dead when its tries are used up, unknown when it may be sent once only."""
        with self._database.owner(owner_id) as connection:
            moved = changed(
                connection,
                "update effects set state = case when kind = any(:once) then 'unknown' when tries + 1 >= :most then 'dead' else 'pending' end,"
                " tries = tries + 1, reason = case when tries + 1 >= :most then :exhausted else :lost end, lease_until = null, not_before = :now,"
                " ended_at = case when kind = any(:once) or tries + 1 >= :most then cast(:now as timestamptz) end"
                " where owner_id = :owner and id = :id and state = 'applying' and lease_until <= :now",
                owner=owner_id,
                id=effect_id,
                most=MAX_TRIES,
                once=[str(kind) for kind, delivery in DELIVERY.items() if delivery is Delivery.AT_MOST_ONCE],
                exhausted=Reason.RETRIES_EXHAUSTED,
                lost=Reason.WORKER_LOST,
                now=now,
            )
            notify(connection, f"effect:{effect_id}")
        return bool(moved)

    def _gap_deadline(self, owner_id: UUID, gap_id: UUID, now: datetime) -> bool:
        """A missed delivery that the provider has forgotten by now."""
        with self._database.owner(owner_id) as connection:
            ended = changed(
                connection,
                "update delivery_gaps set state = 'gave_up', reason = :reason, ended_at = :now where owner_id = :owner and id = :id"
                " and ended_at is null and deadline <= :now",
                owner=owner_id,
                id=gap_id,
                reason=Reason.DELIVERY_EXPIRED,
                now=now,
            )
        return bool(ended)
