"""The outbox: effects in the order of their subject, leased while they are applied, read back after a lost answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.effects import ALERT_EFFECTS, NOTICES, EffectIntent, EffectReceipt, content_hash
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store import system_statements as system
from kilo_pipelines.store.budget import Cost, take_budget
from kilo_pipelines.store.database import Database, changed, count_late_write, notify, one, rows
from kilo_pipelines.store.queue import audit, owner_of_item
from kilo_pipelines.store.rows import ClaimedEffect

# Renewed right before the write, whose own time-out (10 s, providers/github.py) ends well within it: nobody takes an effect over
# while its write may still be on the way. A process that died is overtaken after this.
LEASE_SECONDS = 20
# With the caller's doubling waits eight tries span about twenty minutes; after that a person looks.
MAX_TRIES = 8
# An installation that two owners hold is an operator's slip: mended within the tries, its effects are not lost.
AMBIGUOUS_WAIT = timedelta(minutes=5)


class Outbox:
    """Effects of all owners; every call names the item, hence the owner."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def claim_next(self, item_id: UUID, costs: Sequence[Cost] = ()) -> ClaimedEffect | None:
        """The next due effect on the item's subjects, leased; None when nothing is due or an earlier one is in the way.

        `costs` are taken from the integration's budget; without them the effect waits until they are there.

        Order is per subject over all items: an older item's effect goes first even when it is called for a newer one. An effect
        whose lease is over stays in the way until recovery has counted the try and made it pending again. What left the owner
        since it was intended (repository removed, integration gone, installation somebody else's) is dropped here (threats,
        rule 16); that the repository is in the installation's list is then asked of the provider itself.
        """
        owner_id = owner_of_item(self._database, item_id)
        if owner_id is None:
            return None
        while (found := self._lease_next(owner_id, item_id, costs)) is not None:
            effect, problem = found
            if problem is None:
                return effect
            if problem is Reason.OWNER_CHANGED:
                self.drop(effect, problem)
            else:
                self.retry(effect, AMBIGUOUS_WAIT, problem, final=False)
        return None

    def _lease_next(self, owner_id: UUID, item_id: UUID, costs: Sequence[Cost]) -> tuple[ClaimedEffect, Reason | None] | None:
        """The effect and why it must not be applied."""
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
returning e.id, e.item_id, e.kind, e.intent_key, e.subject_key, e.payload, e.tries, e.lease_no, e.trace
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
                "select i.provider, i.installation_id, i.id as integration_id, w.repository_id,"
                " (r.removed_at is not null or i.disconnected_at is not null) as gone from work_items w"
                " join repositories r on r.owner_id = w.owner_id and r.external_id = w.repository_id"
                " join integrations i on i.owner_id = r.owner_id and i.id = r.integration_id where w.owner_id = :owner and w.id = :item",
                owner=owner_id,
                item=row["item_id"],
            )
            assert place is not None  # noqa: S101  # the foreign keys say so
            # What is gone is dropped without asking the provider.
            asked = () if place["gone"] or row["kind"] in NOTICES else costs
            wait_until = take_budget(connection, owner_id, place["integration_id"], asked, now)
            if wait_until is not None:
                changed(
                    connection,
                    "update effects set state = 'pending', lease_until = null, not_before = :after, reason = :reason"
                    " where owner_id = :owner and id = :id and state = 'applying' and lease_no = :lease",
                    owner=owner_id,
                    id=row["id"],
                    lease=row["lease_no"],
                    after=wait_until,
                    reason=Reason.PROVIDER_RATE_LIMITED,
                )
                return None
        effect = ClaimedEffect(
            owner_id=owner_id,
            id=row["id"],
            lease_no=row["lease_no"],
            tries=row["tries"],
            installation_id=place["installation_id"],
            integration_id=place["integration_id"],
            repository_id=place["repository_id"],
            trace=row["trace"],
            intent=EffectIntent(
                kind=row["kind"], intent_key=row["intent_key"], subject_key=row["subject_key"], payload=row["payload"]
            ),
        )
        with self._database.system() as connection:
            holders = rows(
                connection,
                system.INTEGRATION_BY_INSTALLATION.sql,
                provider=place["provider"],
                installation=place["installation_id"],
            )
        others = any(holder["owner_id"] != owner_id for holder in holders)
        return effect, Reason.OWNER_CHANGED if place["gone"] else Reason.INTEGRATION_AMBIGUOUS if others else None

    def renew(self, effect: ClaimedEffect) -> bool:
        """Right before the write: whether the effect is still ours, with its lease made whole again."""
        return self._end(effect, "lease_until = :until", until=self._clock.now() + timedelta(seconds=LEASE_SECONDS))

    def _end(self, effect: ClaimedEffect, sql: str, *, also: Callable[[Connection], None] | None = None, **values: Any) -> bool:
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
            elif also is not None:
                also(connection)
            return bool(done)

    def applied(self, effect: ClaimedEffect, receipt: EffectReceipt) -> bool:
        """The provider holds it. False for a late writer.

        An alert that we dismissed or opened is known to be so from now on: a person who turns that round before the next sync has the
        last word, too.
        """

        def note(connection: Connection) -> None:
            changed(
                connection,
                "update findings f set upstream_state = :state from dismissals d join effects e on e.owner_id = d.owner_id and e.item_id = d.item_id"
                " where d.owner_id = :owner and e.id = :id and f.owner_id = d.owner_id and f.id = d.finding_id"
                " and f.upstream_state <> :state and f.upstream_state in ('open', 'dismissed')",
                owner=effect.owner_id,
                id=effect.id,
                state=receipt.state,
            )

        return self._end(
            effect,
            "state = 'applied', reason = null, lease_until = null, external_id = :external, url = :url, ended_at = :now",
            also=note if effect.intent.kind in ALERT_EFFECTS and receipt.state in ("open", "dismissed") else None,
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

    def unknown(self, effect: ClaimedEffect, reason: str) -> bool:
        """The answer to an `at_most_once` write was lost: never resent by itself, a person looks."""
        return self._end(
            effect,
            "state = 'unknown', tries = tries + 1, reason = :reason, lease_until = null, ended_at = :now",
            reason=reason,
            now=self._clock.now(),
        )

    def drop(self, effect: ClaimedEffect, reason: str) -> bool:
        """Not wanted any more."""
        return self._end(
            effect,
            "state = 'dropped', reason = :reason, lease_until = null, ended_at = :now",
            reason=reason,
            now=self._clock.now(),
        )

    def listed(
        self, *, owner_id: UUID | None = None, state: str | None = None, item_id: UUID | None = None, limit: int = 50
    ) -> list[dict[str, Any]]:
        """Effects, newest first: of one owner in its scope, or of all for the operator."""
        with self._database.scope(owner_id) as connection:
            found = rows(connection, system.EFFECTS_OF_PEOPLE.sql, owner=owner_id, state=state, item=item_id, limit=limit)
        return [dict(row) for row in found]

    def owner_of(self, effect_id: UUID) -> UUID | None:
        """Whose an effect is."""
        with self._database.system() as connection:
            row = one(connection, system.EFFECT_OWNER.sql, id=effect_id)
        return row["owner_id"] if row else None

    def revive(self, effect_id: UUID, *, actor: str) -> str | None:
        """A person tries a dead or unknown effect again: its new state, None when it is in neither.

        When the same kind was applied to the same subject since, or its opposite was wanted since, the old write would undo the newer
        one: it is dropped instead.
        """
        return self._by_person(
            effect_id,
            actor,
            "effect.retry",
            "update effects e set state = case when newer then 'dropped' else 'pending' end, tries = 0, not_before = :now, offer_until = null,"
            " reason = case when newer then :superseded end, ended_at = case when newer then cast(:now as timestamptz) end"
            " from (select o.id, exists (select 1 from effects n where n.owner_id = o.owner_id and n.subject_key = o.subject_key and n.seq > o.seq"
            "  and (n.kind = o.kind and n.state = 'applied' or n.kind <> o.kind and n.kind = any(:alerts) and o.kind = any(:alerts) and n.state <> 'dropped'))"
            " as newer from effects o where o.owner_id = :owner and o.id = :id) seen"
            " where e.owner_id = :owner and e.id = seen.id and e.state in ('dead', 'unknown') returning e.state",
            superseded=Reason.SUPERSEDED,
            alerts=sorted(ALERT_EFFECTS),
        )

    def release(self, effect_id: UUID, sha256: str, *, actor: str) -> str | None:
        """A person lets a held effect go, exactly as it was shown (`core.effects.content_hash`): its new state; None when nothing like it is held.

        What is newer of its kind and subject stands already, or waits to be written: then the held one is dropped instead.
        """
        with self._database.system() as connection:
            owner = one(connection, system.EFFECT_OWNER.sql, id=effect_id)
        if owner is None:
            return None
        now = self._clock.now()
        with self._database.owner(owner["owner_id"]) as connection:
            held = one(
                connection,
                "select kind, subject_key, payload from effects where owner_id = :owner and id = :id and state = 'held' for update",
                owner=owner["owner_id"],
                id=effect_id,
            )
            if held is None or content_hash(held["kind"], held["subject_key"], held["payload"]) != sha256:
                return None
            row = one(
                connection,
                "update effects e set state = case when newer then 'dropped' else 'pending' end, held_until = null, not_before = :now,"
                " reason = case when newer then :superseded end, ended_at = case when newer then cast(:now as timestamptz) end"
                " from (select exists (select 1 from effects n join effects o on o.owner_id = n.owner_id and o.id = :id"
                "   where n.owner_id = :owner and n.subject_key = o.subject_key and n.kind = o.kind and n.seq > o.seq"
                "   and n.state in ('pending', 'applying', 'applied')) as newer) seen"
                " where e.owner_id = :owner and e.id = :id and e.state = 'held' returning e.state",
                owner=owner["owner_id"],
                id=effect_id,
                now=now,
                superseded=Reason.SUPERSEDED,
            )
            assert row is not None  # noqa: S101  # it is locked
            audit(
                connection,
                owner["owner_id"],
                actor,
                "effect.approve",
                str(effect_id),
                {"state": row["state"], "sha256": sha256},
                now,
            )
            notify(connection, f"effect:{effect_id}")
        return str(row["state"])

    def get(self, effect_id: UUID) -> dict[str, Any] | None:
        """One effect with what it would write and the hash that an approval names; None for an unknown one."""
        owner_id = self.owner_of(effect_id)
        if owner_id is None:
            return None
        with self._database.owner(owner_id) as connection:
            row = one(
                connection,
                "select owner_id, id, item_id, kind, subject_key, payload, state, reason, tries, held_until, url, created_at, ended_at"
                " from effects where owner_id = :owner and id = :id",
                owner=owner_id,
                id=effect_id,
            )
        return {**row, "sha256": content_hash(row["kind"], row["subject_key"], row["payload"])} if row else None

    def abandon(self, effect_id: UUID, *, actor: str) -> str | None:
        """A person gives an effect up that isn't being applied: `dropped`, None when it is over or under way."""
        return self._by_person(
            effect_id,
            actor,
            "effect.drop",
            "update effects set state = 'dropped', reason = :reason, held_until = null, ended_at = :now where owner_id = :owner and id = :id"
            " and state in ('pending', 'held', 'dead', 'unknown') returning state",
            reason=Reason.USER_CANCELLED,
        )

    def _by_person(self, effect_id: UUID, actor: str, action: str, sql: str, **values: Any) -> str | None:
        owner_id = self.owner_of(effect_id)
        if owner_id is None:
            return None
        now = self._clock.now()
        with self._database.owner(owner_id) as connection:
            row = one(connection, sql, owner=owner_id, id=effect_id, now=now, **values)
            if row is None:
                return None
            audit(connection, owner_id, actor, action, str(effect_id), {"state": row["state"]}, now)
            notify(connection, f"effect:{effect_id}")
        return str(row["state"])

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
