"""The outbox: effects in the order of their subject, leased while they are applied, read back after a lost answer."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.effects import EffectIntent, EffectReceipt
from kilo_pipelines.store.database import Database, changed, count_late_write, one, rows
from kilo_pipelines.store.queue import owner_of_item
from kilo_pipelines.store.rows import ClaimedEffect

# One write to a provider with its read-back takes seconds; a process that died is overtaken after this.
LEASE_SECONDS = 60
# With the caller's doubling waits eight tries span about twenty minutes; after that a person looks.
MAX_TRIES = 8


class Outbox:
    """Effects of all owners; every call names the item, hence the owner."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def claim_next(self, item_id: UUID) -> ClaimedEffect | None:
        """The next due effect on the item's subjects, leased; None when nothing is due or an earlier one is in the way.

        Order is per subject over all items: an older item's effect goes first even when it is called for a newer one. An effect
        whose lease is over stays in the way until recovery has counted the try and made it pending again.
        """
        owner_id = owner_of_item(self._database, item_id)
        if owner_id is None:
            return None
        now = self._clock.now()
        with self._database.owner(owner_id) as connection:
            row = one(
                connection,
                """
with heads as (
    select distinct on (e.subject_key) e.id, e.state, e.not_before from effects e
    where e.owner_id = :owner and e.state in ('pending', 'applying')
      and e.subject_key in (select subject_key from effects where owner_id = :owner and item_id = :item)
    order by e.subject_key, e.seq
), due as (
    select e.id from effects e join heads h on h.id = e.id
    where h.state = 'pending' and h.not_before <= :now and e.state = 'pending'
    order by e.seq limit 1 for update of e skip locked
)
update effects e set state = 'applying', lease_no = e.lease_no + 1, lease_until = :until, offer_until = null
from due where e.owner_id = :owner and e.id = due.id and e.state = 'pending'
returning e.id, e.item_id, e.kind, e.intent_key, e.subject_key, e.payload, e.tries, e.lease_no
""",
                owner=owner_id,
                item=item_id,
                now=now,
                until=now + timedelta(seconds=LEASE_SECONDS),
            )
            if row is None:
                return None
            place = one(
                connection,
                "select i.installation_id, w.repository_id from work_items w"
                " join repositories r on r.owner_id = w.owner_id and r.external_id = w.repository_id"
                " join integrations i on i.owner_id = r.owner_id and i.id = r.integration_id where w.owner_id = :owner and w.id = :item",
                owner=owner_id,
                item=row["item_id"],
            )
            assert place is not None  # noqa: S101  # the foreign keys say so
        return ClaimedEffect(
            owner_id=owner_id,
            id=row["id"],
            lease_no=row["lease_no"],
            tries=row["tries"],
            installation_id=place["installation_id"],
            repository_id=place["repository_id"],
            intent=EffectIntent(
                kind=row["kind"], intent_key=row["intent_key"], subject_key=row["subject_key"], payload=row["payload"]
            ),
        )

    def _end(self, effect: ClaimedEffect, sql: str, **values: Any) -> bool:
        with self._database.owner(effect.owner_id) as connection:
            done = changed(
                connection,
                f"update effects set {sql} where owner_id = :owner and id = :id and state = 'applying' and lease_no = :lease",
                owner=effect.owner_id,
                id=effect.id,
                lease=effect.lease_no,
                **values,
            )
            if not done:
                count_late_write(connection, "effect")
            return bool(done)

    def applied(self, effect: ClaimedEffect, receipt: EffectReceipt) -> bool:
        """The provider holds it. False for a late writer."""
        return self._end(
            effect,
            "state = 'applied', reason = null, lease_until = null, external_id = :external, url = :url, ended_at = :now",
            external=receipt.external_id,
            url=receipt.url,
            now=self._clock.now(),
        )

    def retry(self, effect: ClaimedEffect, wait: timedelta, reason: str, *, final: bool) -> str:
        """pending again after `wait`, or `dead` when no further try can help or the tries are used up; the new state (`late`: not ours any more)."""
        now = self._clock.now()
        dead = final or effect.tries + 1 >= MAX_TRIES
        done = self._end(
            effect,
            "state = :state, tries = tries + 1, reason = :reason, lease_until = null, not_before = :after, ended_at = :ended",
            state="dead" if dead else "pending",
            reason=reason,
            after=now + wait,
            ended=now if dead else None,
        )
        if not done:
            return "late"
        return "dead" if dead else "pending"

    def drop(self, effect: ClaimedEffect, reason: str) -> bool:
        """Not wanted any more."""
        return self._end(
            effect,
            "state = 'dropped', reason = :reason, lease_until = null, ended_at = :now",
            reason=reason,
            now=self._clock.now(),
        )

    def of_item(self, item_id: UUID) -> list[dict[str, Any]]:
        """Effects of an item in their order."""
        owner_id = owner_of_item(self._database, item_id)
        if owner_id is None:
            return []
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                "select kind, intent_key, state, reason, tries, external_id, url from effects where owner_id = :owner and item_id = :item order by seq",
                owner=owner_id,
                item=item_id,
            )
        return [dict(row) for row in found]
