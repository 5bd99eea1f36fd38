"""Notices: which findings somebody has to be told of, and whether that still holds right before it is sent."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.effects import EffectIntent
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store import system_statements as system
from kilo_pipelines.store.database import Database, changed, one, rows

# A message that may be sent although there was one of its key: nobody has taken that one, and no person decided about it. What a
# receiver refused, or a person dropped, is a person's to send again (docs/decisions/0023).
_UNTAKEN = (
    f"((e.state = 'dropped' and e.reason is distinct from '{Reason.USER_CANCELLED}')"
    f" or (e.state = 'dead' and e.reason = '{Reason.CHANNEL_UNAVAILABLE}'))"
)
_FACTS = (
    "select f.id, f.repository_id, r.full_name as repository, finding_status(f.upstream_state, f.disposition) as status,"
    f" {system.WATCHED} as watched, f.severity, s.due_at, coalesce(s.paused, false) as paused, f.first_seen_at from findings f"
    f" join repositories r on r.owner_id = f.owner_id and r.external_id = f.repository_id {system.WATCHED_BY}"
    " left join finding_sla s on s.owner_id = f.owner_id and s.finding_id = f.id where f.owner_id = :owner"
)


class Notices:
    """Notices of all owners, each in its owner's scope."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def owners(self) -> list[UUID]:
        """Owners whose Security Agent is on and who named somebody to tell, in the order of their ids."""
        with self._database.system() as connection:
            return [row["owner_id"] for row in rows(connection, system.NOTIFIED_OWNERS.sql)]

    def untold(
        self,
        owner_id: UUID,
        kind: str,
        severities: Sequence[str],
        messages: Sequence[str],
        *,
        seen_since: datetime | None = None,
        due_within: tuple[timedelta | None, timedelta] | None = None,
        limit: int,
    ) -> list[dict[str, Any]]:
        """Open, watched findings of which somebody has to be told this kind and no notice is under way, the soonest due first.

        `messages` are the keys of their messages, with `*` for the finding. First seen since a moment, or due more than the first
        (None: any time ago) and at most the second of two times from now.
        """
        now = self._clock.now()
        after, until = due_within or (None, None)
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                f"select * from ({_FACTS}) x where (x.status = 'open') and x.watched and (x.severity = any(:severities))"
                " and (cast(:since as timestamptz) is null or x.first_seen_at >= :since)"
                " and (cast(:after as timestamptz) is null or x.due_at > :after)"
                " and (cast(:until as timestamptz) is null or (x.due_at <= :until and not x.paused))"
                " and not exists (select 1 from notices n join work_items w on w.owner_id = n.owner_id and w.id = n.item_id"
                "  where n.owner_id = :owner and n.finding_id = x.id and n.kind = :kind and w.ended_at is null)"
                " and exists (select 1 from unnest(cast(:messages as text[])) m where not exists (select 1 from effects e"
                f"  where e.owner_id = :owner and e.intent_key = replace(m, '*', x.id::text) and not {_UNTAKEN}))"
                " order by x.due_at nulls last, x.id limit :limit",
                owner=owner_id,
                kind=kind,
                severities=list(severities),
                since=seen_since,
                messages=list(messages),
                after=now + after if after is not None else None,
                until=now + until if until is not None else None,
                limit=limit,
            )
        return [dict(row) for row in found]

    def facts(self, owner_id: UUID, finding_id: UUID) -> dict[str, Any] | None:
        """What decides about a notice of a finding, now."""
        with self._database.owner(owner_id) as connection:
            row = one(connection, f"{_FACTS} and f.id = :finding", owner=owner_id, finding=finding_id)
        return dict(row) if row else None

    def tell_again(self, owner_id: UUID, item_id: UUID, messages: list[EffectIntent]) -> Callable[[Connection], None]:
        """Of these messages, those that were there and that nobody has taken wait again, as they are now and for this item."""

        def write(connection: Connection) -> None:
            for message in messages:
                changed(
                    connection,
                    "update effects e set state = 'pending', item_id = :item, payload = cast(:payload as jsonb), tries = 0, reason = null,"
                    " not_before = :now, offer_until = null, ended_at = null"
                    f" where e.owner_id = :owner and e.intent_key = :key and e.state in ('dropped', 'dead') and {_UNTAKEN}",
                    owner=owner_id,
                    item=item_id,
                    key=message.intent_key,
                    payload=json.dumps(message.payload),
                    now=self._clock.now(),
                )

        return write

    def listed(self, owner_id: UUID, limit: int) -> list[dict[str, Any]]:
        """Notices of an owner with what became of each message, the newest first."""
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                "select n.finding_id, n.kind, w.state, w.reason, w.created_at, coalesce((select jsonb_agg(jsonb_build_object("
                " 'channel', e.kind, 'state', e.state, 'reason', e.reason) order by e.seq) from effects e"
                " where (e.owner_id = n.owner_id) and (e.item_id = n.item_id)), '[]') as messages"
                " from notices n join work_items w on w.owner_id = n.owner_id and w.id = n.item_id"
                " where (n.owner_id = :owner) order by w.created_at desc, w.id limit :limit",
                owner=owner_id,
                limit=limit,
            )
        return [dict(row) for row in found]
