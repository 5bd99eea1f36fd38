"""Settling: verdict, effects and the freed slot in one transaction (design, claim protocol)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.effects import EffectIntent, EffectKind
from kilo_pipelines.store.database import Database, changed, count_late_write, notify, one, rows
from kilo_pipelines.store.queue import audit, end_item, free_slots, intend, owner_of_item, read_item, require_action, set_details
from kilo_pipelines.store.rows import ItemRow, SessionRow
from kilo_pipelines.store.sessions import session_row


class Settlements:
    """Opens items for settling."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    @contextmanager
    def open(self, item_id: UUID) -> Iterator[SettleTx | None]:
        """The locked item, or None when it is unknown. Commits when the block ends without an exception."""
        owner_id = owner_of_item(self._database, item_id)
        if owner_id is None:
            yield None
            return
        with self._database.owner(owner_id) as connection:
            item = read_item(connection, owner_id, item_id, lock=True)
            yield SettleTx(connection, item, self._clock.now()) if item else None


class SettleTx:
    """One locked item and what belongs to it."""

    def __init__(self, connection: Connection, item: ItemRow, now: datetime) -> None:
        self._connection = connection
        self._now = now
        self.item = item

    def session(self) -> SessionRow | None:
        """The item's present session."""
        if self.item.session_id is None:
            return None
        row = one(
            self._connection,
            "select * from sessions where owner_id = :owner and id = :id",
            owner=self.item.owner_id,
            id=self.item.session_id,
        )
        return session_row(row) if row else None

    def failures(self) -> int:
        """How many attempts of this item failed so far; re-reading the pull request opens attempts that didn't."""
        row = one(
            self._connection,
            "select count(*) as n from attempts where owner_id = :owner and item_id = :item and state = 'failed'",
            owner=self.item.owner_id,
            item=self.item.id,
        )
        return int(row["n"]) if row else 0

    def siblings(self) -> list[dict[str, Any]]:
        """Newest review of each *other* pull request with the same repository and head: state, reason and verdict."""
        found = rows(
            self._connection,
            "select distinct on (r.pull_number) r.pull_number, w.state, w.reason, r.verdict from reviews r"
            " join work_items w on w.owner_id = r.owner_id and w.id = r.item_id where r.owner_id = :owner and r.repository_id = :repository"
            " and r.head_sha = :head and r.pull_number <> :pull order by r.pull_number, w.created_at desc",
            owner=self.item.owner_id,
            repository=self.item.repository_id,
            head=self.item.details["head_sha"],
            pull=self.item.details["pull_number"],
        )
        return [dict(row) for row in found]

    def replaced(self) -> bool:
        """Whether another item of the same pull request spoke of this head's check after this one: then the last word is that one's."""
        found = one(
            self._connection,
            "select 1 from work_items w join effects e on e.owner_id = w.owner_id and e.item_id = w.id where w.owner_id = :owner"
            " and w.service = :service and w.subject_key = :subject and w.id <> :id and e.kind = :kind and e.payload ->> 'head_sha' = :head"
            " and e.seq > (select coalesce(max(m.seq), 0) from effects m where m.owner_id = :owner and m.item_id = :id and m.kind = :kind"
            "   and m.payload ->> 'head_sha' = :head) limit 1",
            owner=self.item.owner_id,
            service=self.item.service,
            subject=self.item.subject_key,
            id=self.item.id,
            kind=EffectKind.GITHUB_CHECK_RUN,
            head=self.item.details["head_sha"],
        )
        return found is not None

    def conclude(
        self,
        *,
        state: str,
        reason: str,
        verdict: dict[str, Any],
        evidence: dict[str, Any] | None,
        effects: list[EffectIntent],
        details: Mapping[str, Any] | None = None,
        also: Callable[[Connection], None] | None = None,
    ) -> bool:
        """Ends a running item with its verdict and effects; guarded by state and session. False: it moved on meanwhile.

        `details` are more columns of the service's own row, `also` writes what belongs to it in the same transaction.
        """
        ended = end_item(
            self._connection,
            owner_id=self.item.owner_id,
            item_id=self.item.id,
            state=state,
            reason=reason,
            now=self._now,
            announced=True,
            guard="and state = 'running' and session_id = :session",
            session=self.item.session_id,
        )
        if ended:
            self._keep(verdict, evidence, details)
            intend(self._connection, self.item.owner_id, self.item.id, effects, self._now)
            if also is not None:
                also(self._connection)
        return ended

    def retry(self, reason: str, wait: timedelta) -> bool:
        """The attempt failed in a way that the retry policy tries again: waiting, next attempt, slot free. False: it moved on meanwhile."""
        owner, item = self.item.owner_id, self.item.id
        done = changed(
            self._connection,
            "update work_items set state = 'waiting', reason = :reason, attempt = attempt + 1, session_id = null, run_id = null, tries = 0,"
            " deadline = null, offer_until = null, not_before = :after, updated_at = :now"
            " where owner_id = :owner and id = :id and state = 'running' and session_id = :session",
            owner=owner,
            id=item,
            session=self.item.session_id,
            reason=reason,
            after=self._now + wait,
            now=self._now,
        )
        if not done:
            count_late_write(self._connection, "retry")
            return False
        changed(
            self._connection,
            "update attempts set state = 'failed', reason = :reason, ended_at = :now where owner_id = :owner and item_id = :id and state = 'open'",
            owner=owner,
            id=item,
            reason=reason,
            now=self._now,
        )
        free_slots(self._connection, owner, item)
        audit(
            self._connection,
            owner,
            "platform",
            "item.retry",
            str(item),
            {"reason": reason, "attempt": self.item.attempt},
            self._now,
        )
        notify(self._connection, f"item:{item}")
        return True

    def disable_service(self, reason: str) -> None:
        """Switches the owner's service off until a person acts."""
        require_action(self._connection, self.item.owner_id, self.item.service, reason, self.item.id, self._now)

    def announce(
        self,
        verdict: dict[str, Any],
        evidence: dict[str, Any] | None,
        effects: list[EffectIntent],
        *,
        also: Callable[[Connection], None] | None = None,
    ) -> bool:
        """Intends the effects of an item that ended without them (superseded, cancelled, reaped). False: announced or live again.

        `also` writes what belongs to it in the same transaction.
        """
        done = changed(
            self._connection,
            "update work_items set announced = true, offer_until = null, updated_at = :now where owner_id = :owner and id = :id"
            " and ended_at is not null and not announced",
            owner=self.item.owner_id,
            id=self.item.id,
            now=self._now,
        )
        if not done:
            count_late_write(self._connection, "announce")
            return False
        self._keep(verdict, evidence)
        intend(self._connection, self.item.owner_id, self.item.id, effects, self._now)
        if also is not None:
            also(self._connection)
        return True

    def _keep(self, verdict: dict[str, Any], evidence: dict[str, Any] | None, details: Mapping[str, Any] | None = None) -> None:
        set_details(
            self._connection,
            self.item.owner_id,
            self.item.id,
            self.item.service,
            {**(details or {}), "verdict": verdict, "evidence": evidence},
        )
