"""Work items: offers, claims, slots, and every way an item ends. Guarded updates only (invariants 2 and 3)."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Connection, text

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.effects import EffectIntent
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store import system_statements as system
from kilo_pipelines.store.database import Database, changed, count_late_write, notify, one, rows
from kilo_pipelines.store.rows import Claimed, ItemRow, Offer, Refused

# How long an offer stands before the item may be offered again (docs/decisions/0008): a lost offer costs at most this.
OFFER_SECONDS = 20
# After "no slot" the item is offered again after this; a freed slot makes waiting items due at once.
NO_SLOT_SECONDS = 30
# Effects younger than this are being applied by the run that intended them; offering them too would only cost a run.
EFFECT_GRACE_SECONDS = 15
# Outstanding offers are capped near 4 x worker slots, so that the broker never holds the backlog.
OUTSTANDING_CAP = 32

_DETAILS = "select to_jsonb(r) - 'owner_id' as details from reviews r where r.owner_id = :owner and r.item_id = :item"


def owner_of_item(database: Database, item_id: UUID) -> UUID | None:
    """Whose item this is; None when there is none."""
    with database.system() as connection:
        row = one(connection, system.ITEM_OWNER.sql, id=item_id)
    return row["owner_id"] if row else None


def lock_subject(connection: Connection, owner_id: UUID, service: str, subject_key: str) -> None:
    """Whoever opens, reopens or supersedes items of a subject does so one after the other, until commit."""
    key = f"{owner_id}:{service}:{subject_key}"
    connection.execute(text("select pg_advisory_xact_lock(hashtextextended(:key, 0))"), {"key": key})


def details_of(connection: Connection, owner_id: UUID, item_id: UUID) -> dict[str, Any]:
    """The service's own row of an item."""
    row = one(connection, _DETAILS, owner=owner_id, item=item_id)
    return dict(row["details"]) if row else {}


def free_slots(connection: Connection, owner_id: UUID, item_id: UUID, now: datetime) -> None:
    """Frees what the item holds and makes as many of the owner's waiting items due (the NOTIFY follows at commit).

    Only as many: waking all of them starts a run for each, and the rest finds no slot again.
    """
    freed = changed(
        connection,
        "update owner_slots set item_id = null, fence = null, taken_at = null where owner_id = :owner and item_id = :item",
        owner=owner_id,
        item=item_id,
    )
    if freed:
        changed(
            connection,
            "update work_items set not_before = :now, offer_until = null where owner_id = :owner and state = 'waiting' and id in ("
            " select id from work_items where owner_id = :owner and state = 'waiting' and reason = :no_slot"
            " and service = (select service from work_items where owner_id = :owner and id = :item)"
            " order by priority desc, created_at limit :freed for update skip locked)",
            owner=owner_id,
            item=item_id,
            now=now,
            no_slot=Reason.NO_SLOT,
            freed=freed,
        )


def intend(connection: Connection, owner_id: UUID, item_id: UUID, effects: list[EffectIntent], now: datetime) -> None:
    """Commits intended effects with the state that wants them; the same intent twice is one effect."""
    for effect in effects:
        changed(
            connection,
            "insert into effects (owner_id, id, item_id, kind, intent_key, subject_key, payload, not_before, created_at)"
            " values (:owner, :id, :item, :kind, :key, :subject, cast(:payload as jsonb), :now, :now)"
            " on conflict (owner_id, intent_key) do nothing",
            owner=owner_id,
            id=uuid4(),
            item=item_id,
            kind=effect.kind,
            key=effect.intent_key,
            subject=effect.subject_key,
            payload=json.dumps(effect.payload),
            now=now,
        )


def end_item(
    connection: Connection,
    *,
    owner_id: UUID,
    item_id: UUID,
    state: str,
    reason: str | None,
    now: datetime,
    announced: bool,
    guard: str = "",
    **guard_values: Any,
) -> bool:
    """Ends a live item, closes its attempt, asks its session to stop and frees its slots. False: it was not live (or not ours)."""
    ended = changed(
        connection,
        "update work_items set state = :state, reason = :reason, ended_at = :now, updated_at = :now, lease_until = null,"
        f" deadline = null, offer_until = null, announced = :announced where owner_id = :owner and id = :item and ended_at is null {guard}",
        owner=owner_id,
        item=item_id,
        state=state,
        reason=reason,
        now=now,
        announced=announced,
        **guard_values,
    )
    if not ended:
        count_late_write(connection, "item")
        return False
    changed(
        connection,
        "update attempts set state = :state, reason = :reason, ended_at = :now where owner_id = :owner and item_id = :item and state = 'open'",
        owner=owner_id,
        item=item_id,
        state=state,
        reason=reason,
        now=now,
    )
    # One statement for both states: a session that is claimed meanwhile would slip between two.
    changed(
        connection,
        "update sessions set interrupt_requested = :reason, state = case state when 'queued' then 'interrupted' else state end,"
        " reason = case state when 'queued' then :reason else reason end,"
        " ended_at = case state when 'queued' then cast(:now as timestamptz) end"
        " where owner_id = :owner and item_id = :item and ended_at is null",
        owner=owner_id,
        item=item_id,
        reason=reason or state,
        now=now,
    )
    free_slots(connection, owner_id, item_id, now)
    notify(connection, f"item:{item_id}")
    return True


class Queue:
    """The engine's queue over all owners."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def pause_reason(self) -> str | None:
        """Why all work stands still, None when it doesn't."""
        with self._database.system() as connection:
            row = one(connection, system.PAUSE.sql)
        return row["reason"] if row else None

    def switch(self, scope: str, kind: str, reason: str) -> None:
        """Sets a switch: `pause` or `kill` for scope `all`, `service:<name>` or `owner:<id>`. Nothing is claimed while it is set."""
        with self._database.system() as connection:
            changed(connection, system.SET_SWITCH.sql, scope=scope, kind=kind, reason=reason)

    def unswitch(self, scope: str) -> bool:
        """Clears a switch and wakes whoever waited; False when there was none."""
        with self._database.system() as connection:
            done = changed(connection, system.CLEAR_SWITCH.sql, scope=scope)
            notify(connection, f"switch:{scope}")
        return bool(done)

    def offers(self, limit: int) -> list[Offer]:
        """Offers of all four kinds, ended work first, so that slots come free before new work is offered."""
        now = self._clock.now()
        until = now + timedelta(seconds=OFFER_SECONDS)
        with self._database.system() as connection:
            made = [
                self._offer("settle", row)
                for row in rows(connection, system.OFFER_SETTLEMENTS.sql, now=now, until=until, limit=limit)
            ]
            made += self._effect_offers(connection, now, until, limit)
            free = one(connection, system.FREE_CAPACITY.sql, now=now)
            if free and free["free"] > 0:
                sessions = rows(connection, system.OFFER_SESSIONS.sql, now=now, until=until, limit=limit, capacity=free["free"])
                made += [self._offer("session", row) for row in sessions]
            outstanding = one(connection, system.OUTSTANDING_OFFERS.sql, now=now)
            room = min(limit, OUTSTANDING_CAP - (outstanding["n"] if outstanding else 0))
            if room > 0:
                made += [
                    self._offer("start", row)
                    for row in rows(connection, system.OFFER_ITEMS.sql, now=now, until=until, limit=room)
                ]
        return made

    def _effect_offers(self, connection: Connection, now: datetime, until: datetime, limit: int) -> list[Offer]:
        """One offer an item, however many of its effects are due."""
        overlooked = now - timedelta(seconds=EFFECT_GRACE_SECONDS)
        seen: dict[UUID, Offer] = {}
        for row in rows(connection, system.OFFER_EFFECTS.sql, now=now, until=until, overlooked=overlooked, limit=limit):
            offer = self._offer("effects", {**row, "id": row["item_id"], "attempt": None})
            seen.setdefault(
                offer.ids[0], Offer(**{**vars(offer), "labels": offer.labels, "offer_no": row["offer_no"] * 1000 + len(seen)})
            )
        return list(seen.values())

    @staticmethod
    def _offer(kind: str, row: Any) -> Offer:
        item = row["item_id"] if kind == "session" else row["id"]
        labels = {"repository": row["repository"] or "", "subject": row["subject_key"], "item": str(item)}
        if kind == "session":
            labels["session"] = str(row["id"])
        elif row.get("session_id"):
            labels["session"] = str(row["session_id"])
        if row.get("attempt"):
            labels["attempt"] = str(row["attempt"])
        return Offer(
            kind=kind, service=row["service"], owner_id=row["owner_id"], ids=[row["id"]], offer_no=row["offer_no"], labels=labels
        )

    def claim(
        self, item_id: UUID, service: str, *, run_id: str, slots: Callable[[str, str], int], lease_s: float
    ) -> Claimed | Refused:
        """Takes a waiting item with one slot of its service's pool, a lease and a higher fence, in one transaction.

        `slots(owner kind, plan)` says how many slots the owner may hold in the pool (contract A7.1).
        """
        owner_id = owner_of_item(self._database, item_id)
        if owner_id is None:
            return Refused(Reason.MOVED_ON, "unknown")
        now = self._clock.now()
        with self._database.owner(owner_id) as connection:
            item = one(
                connection,
                "select w.*, i.installation_id, o.kind, o.plan, o.enabled, (i.suspended_at is not null or i.disconnected_at is not null) as cut_off,"
                " (r.removed_at is not null) as removed"
                " from work_items w join owners o on o.id = w.owner_id"
                " join repositories r on r.owner_id = w.owner_id and r.external_id = w.repository_id"
                " join integrations i on i.owner_id = r.owner_id and i.id = r.integration_id"
                " where w.owner_id = :owner and w.id = :item and w.service = :service for update of w",
                owner=owner_id,
                item=item_id,
                service=service,
            )
            if item is None:
                return Refused(Reason.MOVED_ON, "unknown")
            if item["state"] != "waiting":
                return Refused(Reason.MOVED_ON, item["state"], item["session_id"])
            blocked = one(
                connection,
                "select kind from switches where scope in ('all', :service, :owner) limit 1",
                service=f"service:{service}",
                owner=f"owner:{owner_id}",
            )
            if blocked is not None:
                held = Reason.KILL_SWITCH if blocked["kind"] == "kill" else Reason.PAUSED
                self._put_back(connection, owner_id, item_id, held, now + timedelta(seconds=NO_SLOT_SECONDS))
                return Refused(held, "waiting")
            if item["cut_off"] or item["removed"] or not item["enabled"]:
                reason = Reason.OWNER_CHANGED if item["removed"] else Reason.INTEGRATION_SUSPENDED
                end_item(
                    connection,
                    owner_id=owner_id,
                    item_id=item_id,
                    state="cancelled",
                    reason=reason,
                    now=now,
                    announced=False,
                )
                return Refused(reason, "cancelled")
            fence = item["fence"] + 1
            if not self._take_slot(connection, owner_id, service, slots(item["kind"], item["plan"]), item_id, fence, now):
                self._put_back(connection, owner_id, item_id, Reason.NO_SLOT, now + timedelta(seconds=NO_SLOT_SECONDS))
                return Refused(Reason.NO_SLOT, "waiting")
            return self._start(connection, item, fence, run_id, now, lease_s)

    @staticmethod
    def _start(connection: Connection, item: Any, fence: int, run_id: str, now: datetime, lease_s: float) -> Claimed:
        attempt = item["attempt"] or 1
        owner_id, item_id = item["owner_id"], item["id"]
        changed(
            connection,
            "update work_items set state = 'starting', reason = null, fence = :fence, attempt = :attempt, run_id = :run, offer_until = null,"
            " lease_until = :lease, session_id = null, updated_at = :now where owner_id = :owner and id = :item and state = 'waiting'",
            owner=owner_id,
            item=item_id,
            fence=fence,
            attempt=attempt,
            run=run_id,
            lease=now + timedelta(seconds=lease_s),
            now=now,
        )
        changed(
            connection,
            "insert into attempts (owner_id, item_id, number, started_at) values (:owner, :item, :number, :now) on conflict do nothing",
            owner=owner_id,
            item=item_id,
            number=attempt,
            now=now,
        )
        return Claimed(
            owner_id=owner_id,
            owner_kind=item["kind"],
            item_id=item_id,
            subject_key=item["subject_key"],
            fence=fence,
            attempt=attempt,
            repository_id=item["repository_id"],
            installation_id=item["installation_id"],
            details=details_of(connection, owner_id, item_id),
        )

    @staticmethod
    def _take_slot(connection: Connection, owner_id: UUID, pool: str, cap: int, item_id: UUID, fence: int, now: datetime) -> bool:
        """Takes one slot row below the cap; rows are made as the plan allows and never counted."""
        changed(
            connection,
            "insert into owner_slots (owner_id, pool, number) select :owner, :pool, n from generate_series(1, :cap) n on conflict do nothing",
            owner=owner_id,
            pool=pool,
            cap=cap,
        )
        return bool(
            changed(
                connection,
                "update owner_slots set item_id = :item, fence = :fence, taken_at = :now where owner_id = :owner and pool = :pool and number = ("
                " select number from owner_slots where owner_id = :owner and pool = :pool and number <= :cap and item_id is null"
                " order by number limit 1 for update skip locked)",
                owner=owner_id,
                pool=pool,
                cap=cap,
                item=item_id,
                fence=fence,
                now=now,
            )
        )

    @staticmethod
    def _put_back(connection: Connection, owner_id: UUID, item_id: UUID, reason: str | None, not_before: datetime) -> None:
        changed(
            connection,
            "update work_items set offer_until = null, not_before = :after, reason = :reason where owner_id = :owner and id = :item and state = 'waiting'",
            owner=owner_id,
            item=item_id,
            after=not_before,
            reason=reason,
        )

    def release(self, claim: Claimed, *, not_before: datetime, reason: str) -> bool:
        """starting -> waiting: nothing was launched; the slot is free. False for a late writer."""
        now = self._clock.now()
        with self._database.owner(claim.owner_id) as connection:
            done = changed(
                connection,
                "update work_items set state = 'waiting', reason = :reason, lease_until = null, offer_until = null, not_before = :after, tries = tries + 1,"
                " updated_at = :now where owner_id = :owner and id = :item and state = 'starting' and fence = :fence and session_id is null",
                owner=claim.owner_id,
                item=claim.item_id,
                fence=claim.fence,
                reason=reason,
                after=not_before,
                now=now,
            )
            if not done:
                count_late_write(connection, "release")
                return False
            free_slots(connection, claim.owner_id, claim.item_id, now)
            return True

    def conclude(self, claim: Claimed, state: str, reason: str) -> bool:
        """Ends a claimed item before any session was made; its ending is announced by a settle run."""
        with self._database.owner(claim.owner_id) as connection:
            return end_item(
                connection,
                owner_id=claim.owner_id,
                item_id=claim.item_id,
                state=state,
                reason=reason,
                now=self._clock.now(),
                announced=False,
                guard="and state = 'starting' and fence = :fence",
                fence=claim.fence,
            )

    def cancel(self, item_id: UUID | str, *, reason: str, actor: str) -> bool:
        """Cancels a live item whatever its state; False when it was over (or unknown) already."""
        item = UUID(str(item_id))
        owner_id = owner_of_item(self._database, item)
        if owner_id is None:
            return False
        now = self._clock.now()
        with self._database.owner(owner_id) as connection:
            done = end_item(
                connection, owner_id=owner_id, item_id=item, state="cancelled", reason=reason, now=now, announced=False
            )
            if done:
                audit(connection, owner_id, actor, "item.cancel", str(item), {"reason": reason}, now)
            return done

    def reopen(self, item_id: UUID, *, actor: str, force: bool = False) -> bool:
        """failed or cancelled -> waiting as a new attempt (with `force` also completed); False when active or unknown.

        An item whose subject has another live item of its service stays closed: two reviews of one head would race.
        """
        owner_id = owner_of_item(self._database, item_id)
        if owner_id is None:
            return False
        now = self._clock.now()
        states = "('failed', 'cancelled', 'completed')" if force else "('failed', 'cancelled')"
        with self._database.owner(owner_id) as connection:
            place = one(
                connection,
                "select service, subject_key from work_items where owner_id = :owner and id = :id",
                owner=owner_id,
                id=item_id,
            )
            assert place is not None  # noqa: S101  # its owner was just read from it, and items are never deleted
            lock_subject(connection, owner_id, place["service"], place["subject_key"])
            done = changed(
                connection,
                "update work_items w set state = 'waiting', reason = null, ended_at = null, attempt = attempt + 1, session_id = null, tries = 0, run_id = null,"
                f" announced = false, offer_until = null, not_before = :now, updated_at = :now where owner_id = :owner and id = :item and state in {states}"
                " and not exists (select 1 from work_items o where o.owner_id = w.owner_id and o.service = w.service"
                "   and o.subject_key = w.subject_key and o.ended_at is null)",
                owner=owner_id,
                item=item_id,
                now=now,
            )
            if done:
                audit(connection, owner_id, actor, "item.reopen", str(item_id), {"force": force}, now)
                notify(connection, f"item:{item_id}")
            return bool(done)

    def get(self, item_id: UUID) -> ItemRow | None:
        """An item with its installation and the service's row."""
        owner_id = owner_of_item(self._database, item_id)
        if owner_id is None:
            return None
        with self._database.owner(owner_id) as connection:
            return read_item(connection, owner_id, item_id)

    def run_lost(self, run_id: str) -> bool:
        """Whether a lease that this Dagster run took is over."""
        with self._database.system() as connection:
            row = one(connection, system.RUN_LOST.sql, run=run_id, now=self._clock.now())
        return bool(row and row["lost"])

    def gauges(self) -> dict[tuple[str, str], int]:
        """Live rows by (what, state): items, effects, deliveries."""
        with self._database.system() as connection:
            return {(row["what"], row["state"]): row["n"] for row in rows(connection, system.WORK_GAUGES.sql)}

    def counters(self) -> dict[str, int]:
        """Counted oddities, such as late writes."""
        with self._database.system() as connection:
            return {row["name"]: row["value"] for row in rows(connection, system.COUNTERS.sql)}


def read_item(connection: Connection, owner_id: UUID, item_id: UUID, *, lock: bool = False) -> ItemRow | None:
    """An item in an owner's scope, locked for a settle when asked to."""
    row = one(
        connection,
        "select w.*, i.installation_id from work_items w"
        " join repositories r on r.owner_id = w.owner_id and r.external_id = w.repository_id"
        " join integrations i on i.owner_id = r.owner_id and i.id = r.integration_id"
        f" where w.owner_id = :owner and w.id = :item {'for update of w' if lock else ''}",
        owner=owner_id,
        item=item_id,
    )
    if row is None:
        return None
    wanted = (
        "owner_id",
        "id",
        "service",
        "subject_key",
        "repository_id",
        "installation_id",
        "state",
        "reason",
        "attempt",
        "fence",
        "session_id",
        "announced",
    )
    return ItemRow(**{name: row[name] for name in wanted}, details=details_of(connection, owner_id, item_id))


def audit(
    connection: Connection, owner_id: UUID, actor: str, action: str, subject: str, data: dict[str, Any], now: datetime
) -> None:
    """One append-only audit event."""
    changed(
        connection,
        "insert into audit_events (owner_id, at, actor, action, subject, data) values (:owner, :now, :actor, :action, :subject, cast(:data as jsonb))",
        owner=owner_id,
        now=now,
        actor=actor,
        action=action,
        subject=subject,
        data=json.dumps(data),
    )
