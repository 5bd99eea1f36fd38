"""Work items: offers, claims, slots, and every way an item ends. Guarded updates only (invariants 2 and 3)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID, uuid4

from sqlalchemy import Connection, text

from kilo_pipelines.core import retry
from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.effects import HELD_FOR, NOTICES, EffectIntent, EffectKind
from kilo_pipelines.core.limits import SPENDING, Ask, Grant, LimitsConfig, grant, next_day
from kilo_pipelines.core.rates import Rate
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.work import FINAL, SETTINGS_OF, WorkState
from kilo_pipelines.store import system_statements as system
from kilo_pipelines.store.budget import Cost, take_budget
from kilo_pipelines.store.database import Database, changed, count_late_write, notify, one, rows
from kilo_pipelines.store.figures import told_of_claims
from kilo_pipelines.store.rows import Claimed, ItemRow, NewItem, Offer, Refused
from kilo_pipelines.store.standing import (
    automatic_starts,
    claims_under_way,
    lock_budget,
    mark,
    put_off_service,
    read_limits,
    standings,
    suggests_only,
    take_author,
    wait_for_claims,
)
from kilo_pipelines.telemetry import traces

# How long an offer stands before the item may be offered again (docs/decisions/0008): a lost offer costs at most this.
OFFER_SECONDS = 20
# A switch or a pool that isn't the service's own stood in the way: looked at again after this.
BLOCKED_SECONDS = 30
# A person tops up an account within hours, not seconds: a claim costs a run.
PERSON_WAIT = timedelta(minutes=15)
# Effects younger than this are being applied by the run that intended them; offering them too would only cost a run.
EFFECT_GRACE_SECONDS = 15
# Offers are made for runs of one item each while this many suffice (about 3 x dispatch workers); beyond, runs grow.
SINGLE_ITEM_RUNS = 8
# Items of one run at most: at 50 ms each it still ends within a second or two, and a killed one leaves little to reap.
ITEMS_A_RUN = 25
# A host with agents says every half minute that it is there (worker.py); after three silent turns nothing is offered for it.
HOST_SEEN_SECONDS = 30.0
HOST_SILENT = timedelta(seconds=3 * HOST_SEEN_SECONDS)
# Outstanding offers are capped near 4 x worker slots of the largest runs, so that the broker never holds the backlog.
OUTSTANDING_CAP = 4 * 3 * ITEMS_A_RUN

# How a service calls a model: one question through the proxy, or an agent's session. Each may have a model, hence a bill, of its own.
Call = Literal["question", "session"]

# The table of each service's own row of an item; all have the columns item_id, verdict and evidence.
SERVICE_TABLES = {
    "code_review": "reviews",
    "security_analysis": "finding_analyses",
    "dismissal": "dismissals",
    "remediation": "remediations",
    "notice": "notices",
    "security_sync": "sync_requests",
}


def owner_of_item(database: Database, item_id: UUID) -> UUID | None:
    """Whose item this is; None when there is none."""
    with database.system() as connection:
        row = one(connection, system.ITEM_OWNER.sql, id=item_id)
    return row["owner_id"] if row else None


def lock_subject(connection: Connection, owner_id: UUID, service: str, subject_key: str) -> None:
    """Whoever opens, reopens or supersedes items of a subject does so one after the other, until commit."""
    key = f"{owner_id}:{service}:{subject_key}"
    connection.execute(text("select pg_advisory_xact_lock(hashtextextended(:key, 0))"), {"key": key})


def details_of(connection: Connection, owner_id: UUID, item_id: UUID, service: str) -> dict[str, Any]:
    """The service's own row of an item."""
    row = one(
        connection,
        f"select to_jsonb(r) - 'owner_id' as details from {SERVICE_TABLES[service]} r where r.owner_id = :owner and r.item_id = :item",
        owner=owner_id,
        item=item_id,
    )
    return dict(row["details"]) if row else {}


def set_details(connection: Connection, owner_id: UUID, item_id: UUID, service: str, columns: Mapping[str, Any]) -> None:
    """Writes columns of the service's own row; the names are ours, never text from outside."""
    if columns:
        changed(
            connection,
            f"update {SERVICE_TABLES[service]} set {', '.join(f'{name} = x.{name}' for name in columns)}"
            f" from jsonb_populate_record(null::{SERVICE_TABLES[service]}, cast(:details as jsonb)) x"
            f" where {SERVICE_TABLES[service]}.owner_id = :owner and {SERVICE_TABLES[service]}.item_id = :item",
            owner=owner_id,
            item=item_id,
            details=json.dumps(columns, default=str),
        )


def open_item(connection: Connection, owner_id: UUID, new: NewItem, now: datetime) -> UUID | None:
    """A waiting item with its service's own row, and a wake-up; None beside a live item of its subject, whose lock the caller holds."""
    item_id = uuid4()
    opened = changed(
        connection,
        "insert into work_items (owner_id, id, service, subject_key, repository_id, priority, by_person, not_before, created_at, updated_at, trace)"
        " select :owner, :id, :service, :subject, :repository, :priority, :by_person, :after, :now, :now, :trace where not exists ("
        " select 1 from work_items where owner_id = :owner and service = :service and subject_key = :subject and ended_at is null)",
        owner=owner_id,
        id=item_id,
        service=new.service,
        subject=new.subject_key,
        repository=new.repository_id,
        priority=new.priority,
        by_person=new.by_person,
        after=now + timedelta(seconds=new.wait_s),
        now=now,
        trace=traces.here(),
    )
    if not opened:
        return None
    table = SERVICE_TABLES[new.service]
    changed(
        connection,
        f"insert into {table} (owner_id, item_id, {', '.join(new.details)})"  # column names of ours
        f" select :owner, :item, {', '.join('x.' + name for name in new.details)}"
        f" from jsonb_populate_record(null::{table}, cast(:details as jsonb)) x",
        owner=owner_id,
        item=item_id,
        details=json.dumps(new.details, default=str),
    )
    notify(connection, f"item:{item_id}")
    return item_id


def free_slots(connection: Connection, owner_id: UUID, item_id: UUID) -> None:
    """Frees what the item holds. `taken_at` stays: it is the pool's last turn. Waiting items are offered as soon as a slot is free."""
    changed(
        connection,
        "update owner_slots set item_id = null, fence = null where owner_id = :owner and item_id = :item",
        owner=owner_id,
        item=item_id,
    )


def intend(connection: Connection, owner_id: UUID, item_id: UUID, effects: list[EffectIntent], now: datetime) -> None:
    """Commits intended effects with the state that wants them; the same intent twice is one effect.

    In suggest-only mode what goes to others than the owner's own people is held, and a newer word takes the place of an older one.
    """
    if not effects:
        return
    item = one(
        connection, "select service, by_person from work_items where owner_id = :owner and id = :id", owner=owner_id, id=item_id
    )
    assert item is not None  # noqa: S101  # effects are intended with their item
    suggested = suggests_only(connection, owner_id, item["service"])
    for effect in effects:
        decided = item["by_person"] and effect.kind is EffectKind.GITHUB_DISMISS_ALERT
        held = suggested and not decided and effect.kind not in NOTICES
        if held:
            changed(
                connection,
                "update effects set state = 'dropped', reason = :reason, held_until = null, ended_at = :now where owner_id = :owner"
                " and subject_key = :subject and kind = :kind and state = 'held' and intent_key <> :key",
                owner=owner_id,
                subject=effect.subject_key,
                kind=effect.kind,
                key=effect.intent_key,
                reason=Reason.SUPERSEDED,
                now=now,
            )
        changed(
            connection,
            "insert into effects (owner_id, id, item_id, kind, intent_key, subject_key, payload, state, reason, held_until, not_before, created_at, trace)"
            " values (:owner, :id, :item, :kind, :key, :subject, cast(:payload as jsonb), :state, :reason, :held_until, :now, :now, :trace)"
            " on conflict (owner_id, intent_key) do nothing",
            owner=owner_id,
            id=uuid4(),
            item=item_id,
            kind=effect.kind,
            key=effect.intent_key,
            subject=effect.subject_key,
            payload=json.dumps(effect.payload),
            state="held" if held else "pending",
            reason=Reason.SUGGEST_ONLY if held else None,
            held_until=now + HELD_FOR if held else None,
            now=now,
            trace=traces.here(),
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
    free_slots(connection, owner_id, item_id)
    notify(connection, f"item:{item_id}")
    return True


def require_action(connection: Connection, owner_id: UUID, service: str, reason: str, item_id: UUID, now: datetime) -> None:
    """Switches the owner's service off until a person acts (contract A13): the first moment stays, the last one moves."""
    settings = SETTINGS_OF.get(service, service)
    changed(
        connection,
        "update service_configs set action_required = jsonb_build_object('reason', cast(:reason as text), 'detected_at',"
        " case when action_required ->> 'reason' = :reason then action_required ->> 'detected_at' else cast(:now as text) end,"
        " 'last_seen_at', cast(:now as text), 'item', cast(:item as text)), updated_at = now() where owner_id = :owner and service = :service",
        owner=owner_id,
        service=settings,
        reason=reason,
        now=now.isoformat(),
        item=str(item_id),
    )
    audit(connection, owner_id, "platform", "service.action_required", settings, {"reason": reason, "item": str(item_id)}, now)


def _no_longer_wanted(item: Any) -> tuple[str, Reason] | None:
    """State and reason with which a waiting item ends at its claim, None when it may start (threats, rule 16; contract A13)."""
    if item["removed"]:
        return "cancelled", Reason.OWNER_CHANGED
    if item["cut_off"] or not item["enabled"]:
        return "cancelled", Reason.INTEGRATION_SUSPENDED
    if item["action_required"]:
        return "failed", Reason.ACTION_REQUIRED
    return None


def items_a_run(backlog: int) -> int:
    """How many items of an owner a run takes: one while there are few, growing with the backlog (design, section 5)."""
    return min(ITEMS_A_RUN, max(1, -(-backlog // SINGLE_ITEM_RUNS)))


def _grouped(kind: str, found: list[Any]) -> list[Offer]:
    """Offers for rows: of one owner and service each, in the order of their first rows."""
    size = items_a_run(len(found))
    groups: list[list[Any]] = []
    open_group: dict[tuple[UUID, str], list[Any]] = {}
    for row in found:
        key = (row["owner_id"], row["service"])
        group = open_group.get(key)
        if group is None or len(group) == size:
            group = open_group[key] = []
            groups.append(group)
        group.append(row)
    return [_offer(kind, group) for group in groups]


def _offer(kind: str, found: list[Any]) -> Offer:
    """One run for these rows; with a single row its labels tell the item."""
    row = found[0]
    labels: dict[str, str] = {}
    if len(found) == 1:
        item = row["item_id"] if kind == "session" else row["id"]
        session = row["id"] if kind == "session" else row.get("session_id")
        labels = {"repository": row["repository"] or "", "subject": row["subject_key"], "item": str(item)}
        labels |= {"session": str(session)} if session else {}
        labels |= {"attempt": str(row["attempt"])} if row.get("attempt") else {}
    return Offer(
        kind=kind,
        service=row["service"],
        owner_id=row["owner_id"],
        ids=[one["id"] for one in found],
        offer_no=row["offer_no"],
        labels=labels,
    )


def session_offer(row: Any) -> Offer:
    """One run for one session's row."""
    return _offer("session", [row])


def reopen_item(connection: Connection, *, owner_id: UUID, item_id: UUID, states: str, now: datetime) -> bool:
    """An ended item waits again as a new attempt; never beside a live one of its subject, whose lock the caller holds."""
    return bool(
        changed(
            connection,
            "update work_items w set state = 'waiting', reason = null, ended_at = null, attempt = attempt + 1, session_id = null, tries = 0, run_id = null,"
            f" announced = false, offer_until = null, not_before = :now, updated_at = :now where owner_id = :owner and id = :item and state in {states}"
            " and not exists (select 1 from work_items o where o.owner_id = w.owner_id and o.service = w.service"
            "   and o.subject_key = w.subject_key and o.ended_at is null)",
            owner=owner_id,
            item=item_id,
            now=now,
        )
    )


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

    def switch(self, scope: str, kind: str, reason: str, *, actor: str) -> int | None:
        """Sets a switch for scope `all`, `service:<name>` or `owner:<id>`: nothing in it is claimed while it is set.

        `pause` lets what runs end; `kill` cancels it. Returns how many items were cancelled; None when the operator set one there, which
        only the operator changes.
        """
        with self._database.system() as connection:
            if not changed(connection, system.SET_SWITCH.sql, scope=scope, kind=kind, reason=reason, actor=actor):
                return None
            notify(connection, f"switch:{scope}")
        self._audit_switch(scope, f"switch.{kind}", actor, {"reason": reason})
        if kind != "kill":
            return 0
        with self._database.system() as connection:
            # A claim that looked before the switch was there may not have committed: its item would work on, unseen.
            wait_for_claims(connection, scope)
            live = rows(connection, system.LIVE_ITEMS.sql, scope=scope)
        return sum(self.cancel(row["id"], reason=Reason.KILL_SWITCH, actor=actor) for row in live)

    def suggest_only(self, scope: str, on: bool, reason: str, *, actor: str) -> bool:
        """Sets or ends suggest-only mode for a scope as in `switch`. What is held stays held.

        False when the operator set it there and somebody else acts, or when it should end and wasn't set.
        """
        key = f"suggest:{scope}"
        with self._database.system() as connection:
            if on:
                done = changed(connection, system.SET_SWITCH.sql, scope=key, kind="suggest", reason=reason, actor=actor)
            else:
                done = changed(connection, system.CLEAR_SWITCH.sql, scope=key, actor=actor)
        if done:
            self._audit_switch(scope, f"suggest_only.{'on' if on else 'off'}", actor, {"reason": reason} if on else {})
        return bool(done)

    def switches(self) -> list[dict[str, Any]]:
        """Every switch that is set."""
        with self._database.system() as connection:
            return [dict(row) for row in rows(connection, system.SWITCHES.sql)]

    def unswitch(self, scope: str, *, actor: str = "operator") -> bool:
        """Clears a switch and wakes whoever waited; False when there was none, or it was the operator's and somebody else acts."""
        with self._database.system() as connection:
            done = changed(connection, system.CLEAR_SWITCH.sql, scope=scope, actor=actor)
            notify(connection, f"switch:{scope}")
        if done:
            self._audit_switch(scope, "switch.release", actor, {})
        return bool(done)

    def _audit_switch(self, scope: str, action: str, actor: str, data: dict[str, Any]) -> None:
        """What was done to one owner's scope is that owner's audit event; the platform's own switches are in `switches` alone."""
        if scope.startswith("owner:"):
            owner_id = UUID(scope.removeprefix("owner:"))
            with self._database.owner(owner_id) as connection:
                audit(connection, owner_id, actor, action, scope, data, self._clock.now())

    def offers(self, limit: int) -> list[Offer]:
        """Offers of all four kinds, ended work first, so that slots come free before new work is offered.

        Items of one owner share a run when there are many; a session always has a run of its own.
        """
        now = self._clock.now()
        until = now + timedelta(seconds=OFFER_SECONDS)
        with self._database.system() as connection:
            outstanding = one(connection, system.OUTSTANDING_OFFERS.sql, now=now)
            assert outstanding is not None  # noqa: S101  # counts always answer
            # Runs that the broker holds longer than an offer stands would find their work done by others.
            room = {kind: max(0, min(limit, OUTSTANDING_CAP - count)) for kind, count in outstanding.items()}
            ended = rows(connection, system.OFFER_SETTLEMENTS.sql, now=now, until=until, limit=room["settlements"])
            overlooked = now - timedelta(seconds=EFFECT_GRACE_SECONDS)
            effects = rows(
                connection, system.OFFER_EFFECTS.sql, now=now, until=until, overlooked=overlooked, limit=room["effects"]
            )
            free = one(connection, system.FREE_CAPACITY.sql, now=now, seen=now - HOST_SILENT)
            capacity = free["free"] if free else 0
            sessions = (
                rows(connection, system.OFFER_SESSIONS.sql, now=now, until=until, limit=limit, capacity=capacity)
                if capacity > 0
                else []
            )
            items = rows(connection, system.OFFER_ITEMS.sql, now=now, until=until, limit=room["items"]) if room["items"] else []
            items.sort(key=lambda row: row["place"])
        due = {row["item_id"]: {**row, "id": row["item_id"], "attempt": None} for row in effects}
        return [
            *_grouped("settle", ended),
            *_grouped("effects", list(due.values())),
            *(_offer("session", [row]) for row in sessions),
            *_grouped("start", items),
        ]

    @told_of_claims
    def claim(
        self,
        item_id: UUID,
        service: str,
        *,
        run_id: str,
        pools: Callable[[str, str], dict[str, int]],
        lease_s: float,
        costs: Sequence[Cost] = (),
        ask: Ask = Ask(),  # noqa: B008  # frozen
    ) -> Claimed | Refused:
        """Takes a waiting item with a slot of every pool that its service names, a lease and a higher fence, in one transaction.

        `pools(owner kind, plan)` says how many slots the owner may hold in each pool (contract A7.1); they are taken in the order
        of their names, all or none. `costs` is what the launch will ask of the provider, taken from the integration's budget. `ask`
        is what a session would use of a model: services that spend are granted a part of the day's budget with the claim, or wait.
        The refusals stand in a fixed order (docs/limits.md).
        """
        owner_id = owner_of_item(self._database, item_id)
        if owner_id is None:
            return Refused(Reason.MOVED_ON, "unknown")
        now = self._clock.now()
        with self._database.owner(owner_id) as connection:
            # Before any row: who changes limits waits for claims, and then for the rows that these put off.
            claims_under_way(connection, "all", f"service:{service}", f"owner:{owner_id}", f"limits:{owner_id}")
            item = one(
                connection,
                "select w.*, i.installation_id, i.id as integration_id, o.kind, o.plan, o.enabled,"
                " (i.suspended_at is not null or i.disconnected_at is not null) as cut_off, (r.removed_at is not null) as removed,"
                " exists (select 1 from service_configs c where c.owner_id = w.owner_id and c.service = :settings and c.action_required is not null)"
                " as action_required,"
                " exists (select 1 from service_blocks b where b.owner_id = w.owner_id and b.service = w.service and b.action_required is not null)"
                " as needs_person"
                " from work_items w join owners o on o.id = w.owner_id"
                " join repositories r on r.owner_id = w.owner_id and r.external_id = w.repository_id"
                " join integrations i on i.owner_id = r.owner_id and i.id = r.integration_id"
                " where w.owner_id = :owner and w.id = :item and w.service = :service for update of w",
                owner=owner_id,
                item=item_id,
                service=service,
                settings=SETTINGS_OF.get(service, service),
            )
            if item is None:
                return Refused(Reason.MOVED_ON, "unknown")
            if item["state"] != "waiting":
                return Refused(Reason.MOVED_ON, item["state"], item["session_id"])
            blocked = one(
                connection,
                # The kill switch speaks before a pause, whichever of their scopes is the wider one.
                "select kind from switches where scope in ('all', :service, :owner) order by kind limit 1",
                service=f"service:{service}",
                owner=f"owner:{owner_id}",
            )
            if blocked is not None:
                held = Reason.KILL_SWITCH if blocked["kind"] == "kill" else Reason.PAUSED
                self._put_back(connection, owner_id, item_id, held, now + timedelta(seconds=BLOCKED_SECONDS))
                return Refused(held, "waiting")
            held_until = one(
                connection,
                "select reason, blocked_until from service_blocks where owner_id = :owner and service = :service and blocked_until > :now"
                " order by blocked_until desc limit 1",
                owner=owner_id,
                service=service,
                now=now,
            )
            if held_until is not None:
                self._put_back(connection, owner_id, item_id, held_until["reason"], held_until["blocked_until"])
                return Refused(held_until["reason"], "waiting")
            ending = _no_longer_wanted(item)
            if ending is not None:
                state, reason = ending
                end_item(connection, owner_id=owner_id, item_id=item_id, state=state, reason=reason, now=now, announced=False)
                return Refused(reason, state)
            if item["needs_person"]:
                # Credit is no fault of the item: it starts once there is some, whoever opened it.
                self._put_back(connection, owner_id, item_id, Reason.ACTION_REQUIRED, now + PERSON_WAIT)
                return Refused(Reason.ACTION_REQUIRED, "waiting")
            allowed = self._within_limits(connection, item, ask, now)
            if isinstance(allowed, Refused):
                return allowed
            limits, granted = allowed
            fence = item["fence"] + 1
            # What waits holds nothing; a slot that it seems to hold (a defect, a hand in the database) must not stop its every claim.
            free_slots(connection, owner_id, item_id)
            missing = self._take_slots(connection, owner_id, pools(item["kind"], item["plan"]), item_id, fence, now)
            if missing is not None:
                free_slots(connection, owner_id, item_id)
                # Offers are measured by the service's own free slots, so there the next free one makes it due.
                wait = 0 if missing == service else BLOCKED_SECONDS
                self._put_back(connection, owner_id, item_id, Reason.NO_SLOT, now + timedelta(seconds=wait))
                return Refused(Reason.NO_SLOT, "waiting")
            # Last, so that buckets are spent only by who starts, and their rows are locked for as short as may be.
            savepoint = connection.begin_nested()
            why, wait_until = Reason.AUTHOR_RATE_LIMITED, self._take_author(connection, item, limits, now)
            if wait_until is None:
                why, wait_until = (
                    Reason.PROVIDER_RATE_LIMITED,
                    take_budget(connection, owner_id, item["integration_id"], costs, now),
                )
            if wait_until is not None:
                savepoint.rollback()
                free_slots(connection, owner_id, item_id)
                self._put_back(connection, owner_id, item_id, why, wait_until)
                return Refused(why, "waiting")
            savepoint.commit()
            return self._start(connection, item, fence, run_id, now, lease_s, granted, limits)

    def _within_limits(
        self, connection: Connection, item: Any, ask: Ask, now: datetime
    ) -> tuple[LimitsConfig, Grant | None] | Refused:
        """The owner's limits and what a session of it is granted, or the refusal: suggest-only, repetition, budgets, in this order."""
        owner_id, item_id, service = item["owner_id"], item["id"], item["service"]

        def ended(reason: Reason) -> Refused:
            end_item(connection, owner_id=owner_id, item_id=item_id, state="cancelled", reason=reason, now=now, announced=False)
            return Refused(reason, "cancelled")

        def waits(reason: Reason, until: datetime) -> Refused:
            self._put_back(connection, owner_id, item_id, reason, until)
            return Refused(reason, "waiting")

        # A person's own dismissal is the decision itself; a remediation pushes before anybody could look at what.
        acts_by_itself = service == "remediation" or (service == "dismissal" and not item["by_person"])
        if acts_by_itself and suggests_only(connection, owner_id, service):
            return ended(Reason.SUGGEST_ONLY)
        limits = read_limits(connection, owner_id)
        if service not in SPENDING:
            return limits or LimitsConfig(), None
        if limits is None:
            return waits(Reason.LIMITS_INVALID, now + PERSON_WAIT)
        if not item["by_person"]:
            starts = automatic_starts(connection, owner_id, service, item["subject_key"], now)
            if starts >= limits.automation_starts:
                return ended(Reason.LOOP_GUARDED)
        scopes = limits.scopes(service)
        if scopes:
            lock_budget(connection, owner_id)
        found = standings(connection, owner_id, scopes, now)
        granted = grant(found, ask, limits)
        if isinstance(granted, Grant):
            return limits, granted
        if granted is Reason.BUDGET_RESERVED:
            return waits(granted, now + timedelta(seconds=BLOCKED_SECONDS))
        if granted is Reason.PRICE_UNKNOWN:
            return waits(granted, now + PERSON_WAIT)
        for (scope, _), standing in zip(scopes, found, strict=True):
            if grant([standing], ask, limits) is Reason.BUDGET_EXHAUSTED and mark(connection, owner_id, scope, "exhausted", now):
                told = {"tokens": standing.spent.tokens, "micro_usd": standing.spent.micro_usd}
                audit(connection, owner_id, "platform", "budget.exhausted", scope or "all services", told, now)
        put_off_service(connection, owner_id, service, granted, next_day(now))
        return waits(granted, next_day(now))

    @staticmethod
    def _take_author(connection: Connection, item: Any, limits: LimitsConfig, now: datetime) -> datetime | None:
        """An automatic start of a pull request's author; an item that was claimed before has paid."""
        if item["service"] != "code_review" or item["by_person"] or item["fence"] > 0:
            return None
        author = details_of(connection, item["owner_id"], item["id"], item["service"]).get("author", "")
        rate = Rate(limits.author_starts_per_hour, limits.author_burst)
        return take_author(connection, item["owner_id"], item["repository_id"], author, rate, now)

    @staticmethod
    def _start(
        connection: Connection,
        item: Any,
        fence: int,
        run_id: str,
        now: datetime,
        lease_s: float,
        granted: Grant | None,
        limits: LimitsConfig,
    ) -> Claimed:
        attempt = item["attempt"] or 1
        owner_id, item_id = item["owner_id"], item["id"]
        changed(
            connection,
            "update work_items set state = 'starting', reason = null, fence = :fence, attempt = :attempt, run_id = :run, offer_until = null,"
            " lease_until = :lease, session_id = null, reserved_tokens = :tokens, reserved_micro_usd = :micro, updated_at = :now"
            " where owner_id = :owner and id = :item and state = 'waiting'",
            owner=owner_id,
            item=item_id,
            fence=fence,
            attempt=attempt,
            tokens=granted.tokens if granted else 0,
            micro=(granted.micro_usd or 0) if granted else 0,
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
            service=item["service"],
            subject_key=item["subject_key"],
            fence=fence,
            attempt=attempt,
            tries=item["tries"],
            repository_id=item["repository_id"],
            installation_id=item["installation_id"],
            integration_id=item["integration_id"],
            details=details_of(connection, owner_id, item_id, item["service"]),
            since=item["updated_at"],
            trace=item["trace"],
            by_person=item["by_person"],
            granted=granted,
            limits=limits,
        )

    @staticmethod
    def _take_slots(
        connection: Connection, owner_id: UUID, pools: dict[str, int], item_id: UUID, fence: int, now: datetime
    ) -> str | None:
        """Takes one slot row of each pool; the name of the first pool that has none. Rows are made as the plan allows, never counted."""
        for pool, cap in sorted(pools.items()):
            changed(
                connection,
                "insert into owner_slots (owner_id, pool, number) select :owner, :pool, n from generate_series(1, :cap) n on conflict do nothing",
                owner=owner_id,
                pool=pool,
                cap=cap,
            )
            changed(
                connection,
                "update owner_slots set retired = number > :cap where owner_id = :owner and pool = :pool and retired <> (number > :cap)",
                owner=owner_id,
                pool=pool,
                cap=cap,
            )
            taken = changed(
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
            if not taken:
                return pool
        return None

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
            free_slots(connection, claim.owner_id, claim.item_id)
            notify(connection, f"item:{claim.item_id}")  # its slot is another item's now
            return True

    def hold(
        self, claim: Claimed, *, until: datetime, reason: str, details: Mapping[str, Any], effects: list[EffectIntent]
    ) -> bool:
        """starting -> waiting for somebody: with what was read meanwhile and what is told outside. False for a late writer.

        Unlike `release` it counts as no try: nothing failed, and it may be looked at for weeks.
        """
        now = self._clock.now()
        with self._database.owner(claim.owner_id) as connection:
            done = changed(
                connection,
                "update work_items set state = 'waiting', reason = :reason, lease_until = null, offer_until = null, not_before = :until,"
                " updated_at = :now where owner_id = :owner and id = :item and state = 'starting' and fence = :fence and session_id is null",
                owner=claim.owner_id,
                item=claim.item_id,
                fence=claim.fence,
                reason=reason,
                until=until,
                now=now,
            )
            if not done:
                count_late_write(connection, "hold")
                return False
            set_details(connection, claim.owner_id, claim.item_id, claim.service, details)
            free_slots(connection, claim.owner_id, claim.item_id)
            intend(connection, claim.owner_id, claim.item_id, effects, now)
            notify(connection, f"item:{claim.item_id}")  # its slot is another item's now
        return True

    def block_service(self, owner_id: UUID, service: str, call: Call, reason: str, item_id: UUID) -> datetime | None:
        """Lets one of an owner's services wait, longer each time in a row that this kind of call to a model failed (`core.retry.block`).

        Until when; None when a person has to act now: then its items end, and what needs no model goes on.
        """
        now = self._clock.now()
        with self._database.owner(owner_id) as connection:
            row = one(
                connection,
                "insert into service_blocks (owner_id, service, call, reason, times, blocked_until) values (:owner, :service, :call, :reason, 1, :now)"
                " on conflict (owner_id, service, call) do update set reason = excluded.reason,"
                # Whoever meets the same shortage meanwhile adds nothing to it.
                " times = service_blocks.times + (service_blocks.blocked_until <= :now)::int returning times",
                owner=owner_id,
                service=service,
                call=call,
                reason=reason,
                now=now,
            )
            assert row is not None  # noqa: S101  # upserts return their row
            wait = retry.block(row["times"])
            until = now + wait if wait is not None else None
            needed = {"reason": reason, "detected_at": now.isoformat(), "service": service, "item": str(item_id)}
            changed(
                connection,
                "update service_blocks set blocked_until = greatest(blocked_until, :until),"
                " action_required = coalesce(action_required, cast(:needed as jsonb))"
                " where owner_id = :owner and service = :service and call = :call",
                owner=owner_id,
                service=service,
                call=call,
                until=until or now,
                needed=None if until else json.dumps(needed),
            )
            if until is None:
                told = {"reason": reason, "item": str(item_id)}
                audit(connection, owner_id, "platform", "service.action_required", service, told, now)
        return until

    def unblock_service(self, owner_id: UUID, service: str, call: Call) -> None:
        """This kind of call was answered again: the next shortage begins with the shortest wait."""
        with self._database.owner(owner_id) as connection:
            changed(
                connection,
                "update service_blocks set times = 0, blocked_until = :now, action_required = null"
                " where owner_id = :owner and service = :service and call = :call and times > 0",
                owner=owner_id,
                service=service,
                call=call,
                now=self._clock.now(),
            )

    def open(self, owner_id: UUID, new: NewItem, *, actor: str, act: str = "item.open") -> UUID | None:
        """Opens an item by hand or by a rule; None when its subject has a live one already. `act` names it in the audit."""
        now = self._clock.now()
        with (
            traces.span("open", owner=owner_id, service=new.service, repository=new.repository_id) as span,
            self._database.owner(owner_id) as connection,
        ):
            lock_subject(connection, owner_id, new.service, new.subject_key)
            item_id = open_item(connection, owner_id, new, now)
            span.set(item=item_id, outcome="opened" if item_id else "live_already")
            if item_id is not None:
                audit(connection, owner_id, actor, act, str(item_id), {"service": new.service}, now)
        return item_id

    def conclude(self, claim: Claimed, state: str, reason: str) -> bool:
        """Ends a claimed item before any session was made; its ending is announced by a settle run.

        ValueError for an end that a claim alone doesn't lead to: what was done is said by `complete`.
        """
        if WorkState(state) not in FINAL - {WorkState.COMPLETED}:
            raise ValueError(f"a claimed item doesn't end as {state}")
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

    def keep(self, claim: Claimed, details: Mapping[str, Any]) -> bool:
        """Writes columns of a claimed item's own row, so that a later claim need not find them out again; False for a late writer."""
        with self._database.owner(claim.owner_id) as connection:
            held = one(
                connection,
                "select 1 from work_items where owner_id = :owner and id = :item and state = 'starting' and fence = :fence for update",
                owner=claim.owner_id,
                item=claim.item_id,
                fence=claim.fence,
            )
            if held is None:
                count_late_write(connection, "keep")
                return False
            set_details(connection, claim.owner_id, claim.item_id, claim.service, details)
        return True

    def complete(
        self,
        claim: Claimed,
        reason: str,
        *,
        details: Mapping[str, Any],
        effects: list[EffectIntent],
        also: Callable[[Connection], None] | None = None,
    ) -> bool:
        """Ends a claimed item whose work needed no session: done, with columns of its own row and its effects, in one transaction.

        `also` writes what belongs to it in the same transaction. False for a late writer: nothing was changed.
        """
        now = self._clock.now()
        with self._database.owner(claim.owner_id) as connection:
            done = end_item(
                connection,
                owner_id=claim.owner_id,
                item_id=claim.item_id,
                state=WorkState.COMPLETED,
                reason=reason,
                now=now,
                announced=True,
                guard="and state = 'starting' and fence = :fence",
                fence=claim.fence,
            )
            if done:
                set_details(connection, claim.owner_id, claim.item_id, claim.service, details)
                intend(connection, claim.owner_id, claim.item_id, effects, now)
                if also is not None:
                    also(connection)
        return done

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
            done = reopen_item(connection, owner_id=owner_id, item_id=item_id, states=states, now=now)
            if done:
                # From now on it is a person's wish, which no guard against repetition stops.
                changed(
                    connection,
                    "update work_items set by_person = true where owner_id = :owner and id = :id",
                    owner=owner_id,
                    id=item_id,
                )
                audit(connection, owner_id, actor, "item.reopen", str(item_id), {"force": force}, now)
                notify(connection, f"item:{item_id}")
            return done

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

    def run_failed(self, run_id: str) -> int:
        """Dagster reports a run of ours as failed: the leases that it held are over now. How many there were."""
        with self._database.system() as connection:
            row = one(connection, system.HINT_RUN_FAILED.sql, run=run_id, now=self._clock.now())
        return int(row["n"]) if row else 0

    def items(
        self, *, owner_id: UUID | None = None, service: str | None = None, state: str | None = None, limit: int = 50
    ) -> list[dict[str, Any]]:
        """Work items, newest first: of one owner in its scope, or of all for the operator; `state` may also be `live`."""
        with self._database.scope(owner_id) as connection:
            found = rows(connection, system.ITEMS_OF_PEOPLE.sql, owner=owner_id, service=service, state=state, limit=limit)
        return [dict(row) for row in found]

    def attempts(self, item_id: UUID) -> list[dict[str, Any]]:
        """The attempts of an item, first one first."""
        owner_id = owner_of_item(self._database, item_id)
        if owner_id is None:
            return []
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                "select number, state, reason, session_id, started_at, ended_at from attempts where owner_id = :owner and item_id = :item order by number",
                owner=owner_id,
                item=item_id,
            )
        return [dict(row) for row in found]

    def trace_of(self, item_id: UUID) -> str | None:
        """Where the item's trace goes on; None for an unknown item and for one that was opened while traces were off."""
        with self._database.system() as connection:
            row = one(connection, system.ITEM_TRACE.sql, id=item_id)
        return row["trace"] if row else None

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
        f"select w.*, {system.WHY} as why, i.installation_id from work_items w"
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
    shown = {name: row[name] for name in wanted} | {"reason": row["why"]}
    return ItemRow(**shown, details=details_of(connection, owner_id, item_id, row["service"]))


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
