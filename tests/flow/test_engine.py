"""The engine as a state machine over the real store: whatever happens in whatever order, its invariants hold after every step.

Many hands at once: claimers that die, sessions whose workers were overtaken, callbacks that are altered, effects whose answers
were lost, a clock that jumps. Each late hand is remembered and tries again later.
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from datetime import timedelta
from typing import Any, ClassVar
from uuid import UUID, uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import event
from sqlalchemy.exc import DatabaseError

from kilo_pipelines.core.effects import EffectReceipt
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store import AdmissionTx, Claimed, ClaimedEffect, NewDelivery, SessionClaim
from tests.conftest import Database
from tests.support.figures import Figures
from tests.support.store import RECEIPT, World, intent
from tests.support.two import connect

CAP = 2
SERVICE = "code_review"

# Everything that may never be seen, as one statement: each row is a violation with its name.
VIOLATIONS = """
select 'slot without a live claimed item' as fault, s.owner_id::text from owner_slots s left join work_items w
    on w.owner_id = s.owner_id and w.id = s.item_id and w.state in ('starting', 'running') where s.item_id is not null and w.id is null
union all select 'claimed item without exactly one slot', w.id::text from work_items w where w.state in ('starting', 'running')
    and (select count(*) from owner_slots s where s.owner_id = w.owner_id and s.item_id = w.id and s.fence = w.fence) <> 1
union all select 'more claimed items than slots', owner_id::text from work_items where state in ('starting', 'running')
    group by owner_id having count(*) > %(cap)s
union all select 'two live items of one subject', subject_key from work_items where ended_at is null
    group by owner_id, service, subject_key having count(*) > 1
union all select 'claimed item without exactly one open attempt', w.id::text from work_items w where w.state in ('starting', 'running')
    and (select count(*) from attempts a where a.owner_id = w.owner_id and a.item_id = w.id and a.state = 'open' and a.number = w.attempt) <> 1
union all select 'open attempt of an ended item', a.item_id::text from attempts a join work_items w
    on w.owner_id = a.owner_id and w.id = a.item_id where a.state = 'open' and w.ended_at is not null
union all select 'state without its time', id::text from work_items where (state = 'waiting' and not_before is null)
    or (state = 'starting' and lease_until is null) or (state = 'running' and deadline is null)
union all select 'ended item with a lease', id::text from work_items where ended_at is not null
    and (lease_until is not null or deadline is not null or offer_until is not null and announced)
union all select 'session without its time', id::text from sessions where (state = 'queued' and deadline is null)
    or (state = 'running' and lease_until is null)
union all select 'running session that holds no place', s.id::text from sessions s where s.state = 'running'
    and (select count(*) from agent_capacity c where c.session_id = s.id) > 1
union all select 'place held by an ended session', c.session_id::text from agent_capacity c join sessions s on s.id = c.session_id
    where s.state in ('completed', 'failed', 'interrupted')
union all select 'live session of an ended item that nobody stops', s.id::text from sessions s join work_items w
    on w.owner_id = s.owner_id and w.id = s.item_id
    where s.ended_at is null and s.interrupt_requested is null and (w.ended_at is not null or w.session_id is distinct from s.id)
union all select 'running item without its session', w.id::text from work_items w where w.state = 'running'
    and not exists (select 1 from sessions s where s.owner_id = w.owner_id and s.id = w.session_id and s.item_id = w.id)
union all select 'effect without its time', id::text from effects where (state = 'pending' and not_before is null)
    or (state = 'applying' and lease_until is null) or ((state in ('pending', 'applying')) <> (ended_at is null))
union all select 'effects of one subject at once', subject_key from effects where state = 'applying'
    group by owner_id, subject_key having count(*) > 1
union all select 'completed item without a verdict', w.id::text from work_items w join reviews r
    on r.owner_id = w.owner_id and r.item_id = w.id where w.state = 'completed' and w.session_id is not null and r.verdict is null
"""


class Engine(RuleBasedStateMachine):
    """One owner with `CAP` slots; every hand that was ever given is kept."""

    database: Database
    admin: psycopg.Connection[Any]
    steps: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.items: list[UUID] = []
        self.deliveries: list[NewDelivery] = []
        self.claims: list[Claimed] = []
        self.sessions: list[UUID] = []
        self.hands: list[SessionClaim] = []
        self.effects: list[ClaimedEffect] = []
        self.fences: dict[str, int] = {}
        self.written: Counter[str] = Counter()
        self.subjects = 0

    @initialize()
    def begin(self) -> None:
        self.admin.execute("truncate owners, agent_capacity, counters, switches cascade")
        self.world = World(self.database.store, self.database.clock)
        self.store = self.database.store
        self.store.sessions.ensure_capacity(3)

    def choose(self, data: st.DataObject, found: list[Any]) -> Any:
        """The newest more often than the rest: late hands are the exception."""
        return found[-1 - data.draw(st.integers(0, len(found) - 1), label="from the end")]

    def row(self, table: str, id_: UUID) -> dict[str, Any]:
        found = self.admin.execute(f"select to_jsonb(x) from {table} x where id = %s".encode(), (id_,)).fetchone()
        assert found is not None
        return dict(found[0])

    def everything(self) -> str:
        """All rows but the counters of late writers."""
        names = (
            "work_items",
            "attempts",
            "owner_slots",
            "sessions",
            "session_events",
            "effects",
            "agent_capacity",
            "reviews",
            "deliveries",
        )
        parts = [
            f"select md5(coalesce(string_agg(to_jsonb(x)::text, '' order by to_jsonb(x)::text), '')) from {name} x"
            for name in names
        ]
        return str(self.admin.execute(" union all ".join(parts).encode()).fetchall())

    # --- events

    def _admit(self, new: NewDelivery, pull: int, *, supersede: bool) -> None:
        def admit(tx: AdmissionTx) -> None:
            known = tx.items(SERVICE, f"github:{self.world.repository}:pull:{pull}")
            live = [one for one in known if one.state in ("waiting", "starting", "running")]
            if live and not supersede:
                tx.skip(Reason.ALREADY_REVIEWED, live[0].id)
                return
            for one in live:
                tx.cancel(one.id, Reason.SUPERSEDED)
            self.items.append(tx.open(self.world.new_item(pull)))

        self.store.inbox.record(new)
        self.store.inbox.admit_next(admit, 5)

    @rule(data=st.data(), supersede=st.booleans())
    def event(self, data: st.DataObject, supersede: bool) -> None:
        pull = data.draw(st.integers(1, 3), label="pull")
        self.deliveries.append(self.world.delivery())
        self._admit(self.deliveries[-1], pull, supersede=supersede)

    @precondition(lambda self: self.deliveries)
    @rule(data=st.data(), same_id=st.booleans())
    def redeliver(self, data: st.DataObject, same_id: bool) -> None:
        new: NewDelivery = self.choose(data, self.deliveries)
        before = self.everything()
        again = new if same_id else NewDelivery(**{**vars(new), "provider_delivery_id": uuid4().hex})
        assert self.store.inbox.record(again).outcome == "duplicate"
        assert self.store.inbox.admit_next(lambda tx: tx.skip("event_unknown"), 5) == 0
        assert self.everything() == before

    @precondition(lambda self: self.items)
    @rule(data=st.data())
    def reexamine(self, data: st.DataObject) -> None:
        """An event that speaks against a claimed item sends it back to wait."""
        item = self.choose(data, self.items)
        before = self.row("work_items", item)
        self.store.inbox.record(self.world.delivery())

        def admit(tx: AdmissionTx) -> None:
            tx.reexamine(item, Reason.PULL_CLOSED)
            tx.skip(Reason.PULL_CLOSED)

        self.store.inbox.admit_next(admit, 5)
        after = self.row("work_items", item)
        moved = before["state"] in ("starting", "running")
        assert (after["state"], after["attempt"]) == (
            ("waiting", before["attempt"] + 1) if moved else (before["state"], before["attempt"])
        )

    # --- claims

    @precondition(lambda self: self.items)
    @rule(data=st.data(), claimers=st.integers(1, 3))
    def claim(self, data: st.DataObject, claimers: int) -> None:
        item = self.choose(data, self.items)
        before = self.row("work_items", item)
        found: list[Any] = []
        if claimers == 1:
            found.append(self.world.claim(item, cap=CAP))
        else:
            threads = [threading.Thread(target=lambda: found.append(self.world.claim(item, cap=CAP))) for _ in range(claimers)]
            for one in threads:
                one.start()
            for one in threads:
                one.join()
        won = [one for one in found if isinstance(one, Claimed)]
        assert len(found) == claimers and len(won) <= 1
        assert not won or (before["state"] == "waiting" and won[0].fence == before["fence"] + 1)
        self.claims += won

    def _is_current(self, claim: Claimed) -> bool:
        row = self.row("work_items", claim.item_id)
        return row["state"] == "starting" and row["fence"] == claim.fence

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), act=st.sampled_from(["launch", "launch", "launch", "release", "failed", "cancelled"]))
    def decide(self, data: st.DataObject, act: str) -> None:
        """A claimer ends its step; an overtaken one changes nothing."""
        claim = self.choose(data, self.claims)
        current, before = self._is_current(claim), self.everything()
        if act == "launch":
            session = uuid4()
            head = {name: claim.details[name] for name in ("head_sha", "base_sha", "base_ref", "title")}
            effects = [intent(f"{claim.item_id}:{claim.attempt}:started", claim.subject_key)]
            done = self.store.sessions.launch(
                claim, session_id=session, spec={}, head=head, effects=effects, cap_s=60, receipt=RECEIPT
            )
            self.sessions += [session] if done else []
        elif act == "release":
            done = self.store.queue.release(claim, not_before=self.world.clock.now(), reason=Reason.PROVIDER_UNAVAILABLE)
        else:
            done = self.store.queue.conclude(claim, act, Reason.PROVIDER_NOT_FOUND)
        assert done == current
        assert done or self.everything() == before

    # --- sessions

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        session = self.choose(data, self.sessions)
        before = self.row("sessions", session)
        held = self.store.sessions.claim(session, run_id=uuid4().hex, lease_s=30)
        if isinstance(held, SessionClaim):
            assert before["state"] == "queued" and held.fence == before["fence"] + 1
            self.hands.append(held)

    @precondition(lambda self: self.hands)
    @rule(data=st.data(), act=st.sampled_from(["beat", "event", "completed", "completed", "failed", "interrupted", "requeue"]))
    def session(self, data: st.DataObject, act: str) -> None:
        """A worker's word about its session; an overtaken worker's is void."""
        held = self.choose(data, self.hands)
        row, before = self.row("sessions", held.session_id), self.everything()
        current = row["state"] == "running" and row["fence"] == held.fence
        if act == "beat":
            said = self.store.sessions.beat(held, 30)
            assert said == ("lost" if not current else "cancel" if row["interrupt_requested"] else "ok")
        elif act == "event":
            self.store.sessions.event(held, "turn", {})
        elif act == "requeue":
            assert self.store.sessions.requeue(held, Reason.WORKER_STOPPING) == current
        else:
            result = {} if act == "completed" else None
            assert (
                self.store.sessions.finish(held, status=act, reason=None if result is not None else "x", result=result) == current
            )
        assert current or self.everything() == before

    @precondition(lambda self: len(self.hands) > 0)
    @rule(data=st.data(), act=st.sampled_from(["right", "altered", "foreign", "unknown"]))
    def callback(self, data: st.DataObject, act: str) -> None:
        """Callbacks are news: none of them changes work by itself."""
        held = self.choose(data, self.hands)
        before = self.everything()
        record = self.store.sessions.record_callback
        if act == "unknown":
            assert record(uuid4(), held.callback_token, b"{}") == "refused"
        elif act == "foreign":
            other = next((one for one in self.hands if one.session_id != held.session_id), None)
            assert other is None or record(held.session_id, other.callback_token, b"{}") == "refused"
        else:
            body = b"{}" if act == "right" else json.dumps({"nonce": uuid4().hex}).encode()
            stored = self.admin.execute(
                "select body, expires_at <= %s from callback_tokens where session_id = %s",
                (self.world.clock.now(), held.session_id),
            ).fetchone()
            assert stored is not None
            wanted = (
                "expired" if stored[1] else "accepted" if stored[0] is None else "duplicate" if stored[0] == body else "conflict"
            )
            assert record(held.session_id, held.callback_token, body) == wanted
        assert self.everything() == before

    # --- settling and effects

    @precondition(lambda self: self.items)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        item = self.choose(data, self.items)
        before = self.everything()
        with self.store.settlements.open(item) as tx:
            assert tx is not None
            session = tx.session()
            key = f"{item}:{tx.item.attempt}"
            if tx.item.state == "running" and session is not None and session.ended_at is not None:
                state = session.state if session.state != "interrupted" else "cancelled"
                effects = [intent(f"{key}:check", tx.item.subject_key), intent(f"{key}:review", tx.item.subject_key)]
                done = tx.conclude(state=state, reason="reviewed", verdict={"of": key}, evidence=None, effects=effects)
                assert done and not tx.conclude(state=state, reason="reviewed", verdict={}, evidence=None, effects=effects)
                return
            over = tx.item.state in ("completed", "failed", "cancelled")
            assert tx.announce({"of": key}, None, [intent(f"{key}:check", tx.item.subject_key)]) == (
                over and not tx.item.announced
            )
            if over and not tx.item.announced:
                return
        assert self.everything() == before

    @precondition(lambda self: self.items)
    @rule(data=st.data(), act=st.sampled_from(["ok", "ok", "lost", "refused", "dies"]))
    def apply(self, data: st.DataObject, act: str) -> None:
        """The provider is read back before it is written to; the answer may be lost, and the worker may die."""
        effect = self.store.outbox.claim_next(self.choose(data, self.items))
        if effect is None:
            return
        self.effects.append(effect)
        if act != "refused" and not self.written[effect.intent.intent_key]:
            self.written[effect.intent.intent_key] += 1
        if act == "ok":
            assert self.store.outbox.applied(effect, EffectReceipt(external_id="1", created=True))
        elif act in ("lost", "refused"):
            state = self.store.outbox.retry(effect, timedelta(seconds=5), Reason.PROVIDER_UNAVAILABLE, final=act == "refused")
            assert state == ("dead" if act == "refused" or effect.tries >= 7 else "pending")

    @precondition(lambda self: self.effects)
    @rule(data=st.data(), act=st.sampled_from(["applied", "retry", "drop"]))
    def late_effect(self, data: st.DataObject, act: str) -> None:
        effect = self.choose(data, self.effects)
        row, before = self.row("effects", effect.id), self.everything()
        current = row["state"] == "applying" and row["lease_no"] == effect.lease_no
        if act == "applied":
            done = self.store.outbox.applied(effect, EffectReceipt(external_id="1", created=False))
        elif act == "retry":
            done = self.store.outbox.retry(effect, timedelta(seconds=5), "x", final=False) != "late"
        else:
            done = self.store.outbox.drop(effect, "x")
        assert done == current
        assert done or self.everything() == before

    # --- short ways to the depths, where late hands are

    @rule(pull=st.integers(1, 3))
    def a_session_at_work(self, pull: int) -> None:
        self.deliveries.append(self.world.delivery())
        self._admit(self.deliveries[-1], pull, supersede=True)
        self._to_work(self.items[-1])

    def _to_work(self, item: UUID) -> None:
        claim = self.world.claim(item, cap=CAP)
        if not isinstance(claim, Claimed):
            return
        self.claims.append(claim)
        session = uuid4()
        head = {name: claim.details[name] for name in ("head_sha", "base_sha", "base_ref", "title")}
        effects = [intent(f"{item}:{claim.attempt}:{name}", claim.subject_key) for name in ("check", "eyes")]
        assert self.store.sessions.launch(
            claim, session_id=session, spec={}, head=head, effects=effects, cap_s=60, receipt=RECEIPT
        )
        self.sessions.append(session)
        held = self.store.sessions.claim(session, run_id=uuid4().hex, lease_s=30)
        self.hands += [held] if isinstance(held, SessionClaim) else []

    @precondition(lambda self: self.items)
    @rule(data=st.data())
    def overtaken(self, data: st.DataObject) -> None:
        """Every lease is over, and what is taken back is taken again: all earlier hands are late."""
        self.world.clock.advance(timedelta(seconds=61))
        self.store.recovery.reap()
        found = self.world.claim(self.choose(data, self.items), cap=CAP)
        self.claims += [found] if isinstance(found, Claimed) else []
        for session in self.sessions[-3:]:
            held = self.store.sessions.claim(session, run_id=uuid4().hex, lease_s=30)
            self.hands += [held] if isinstance(held, SessionClaim) else []
        effect = self.store.outbox.claim_next(self.items[-1])
        self.effects += [effect] if effect is not None else []

    @precondition(lambda self: self.claims)
    @rule()
    def all_late_claims(self) -> None:
        """Whoever once had a claim and has it no more launches."""
        for claim in self.claims:
            if not self._is_current(claim):
                before = self.everything()
                head = {name: claim.details[name] for name in ("head_sha", "base_sha", "base_ref", "title")}
                late = [intent(f"{claim.item_id}:late", claim.subject_key)]
                assert not self.store.sessions.launch(
                    claim, session_id=uuid4(), spec={}, head=head, effects=late, cap_s=60, receipt=RECEIPT
                )
                assert not self.store.queue.release(claim, not_before=self.world.clock.now(), reason="x")
                assert self.everything() == before

    @precondition(lambda self: self.hands)
    @rule()
    def all_late_hands(self) -> None:
        """Whoever once had a session or an effect and has it no more ends it."""
        before = self.everything()
        for held in self.hands:
            row = self.row("sessions", held.session_id)
            if (row["state"], row["fence"]) != ("running", held.fence):
                assert not self.store.sessions.finish(held, status="completed", reason=None, result={})
                assert not self.store.sessions.requeue(held, Reason.WORKER_STOPPING)
        for effect in self.effects:
            row = self.row("effects", effect.id)
            if (row["state"], row["lease_no"]) != ("applying", effect.lease_no):
                assert not self.store.outbox.applied(effect, EffectReceipt(external_id="1", created=True))
        assert self.everything() == before

    @precondition(lambda self: self.hands)
    @rule()
    def the_newest_session_ends_and_is_settled(self) -> None:
        held = self.hands[-1]
        self.store.sessions.finish(held, status="completed", reason=None, result={})
        with self.store.settlements.open(held.item_id) as tx:
            assert tx is not None
            session = tx.session()
            if tx.item.state == "running" and session is not None and session.ended_at is not None:
                effects = [
                    intent(f"{held.item_id}:{tx.item.attempt}:{name}", tx.item.subject_key) for name in ("check", "review")
                ]
                tx.conclude(state="completed", reason="reviewed", verdict={"of": "x"}, evidence=None, effects=effects)
        for _ in range(2):  # one worker for each: never two at once on a subject
            effect = self.store.outbox.claim_next(held.item_id)
            self.effects += [effect] if effect is not None else []

    # --- time and people

    @rule(seconds=st.sampled_from([1, 20, 31, 61, 400, 30_000, 60_000]))
    def time_passes(self, seconds: int) -> None:
        self.world.clock.advance(timedelta(seconds=seconds))

    @rule()
    def reap(self) -> None:
        self.store.recovery.reap()
        # At once again: nothing is left that is over.
        left = {name: count for name, count in self.store.recovery.reap().items() if count}
        assert left == {}

    @rule()
    def offers(self) -> None:
        made = self.store.queue.offers(20)
        for one in made:
            row = self.row("sessions" if one.kind == "session" else "work_items", one.ids[0])
            wanted = {"start": {"waiting"}, "session": {"queued"}, "settle": {"running", "completed", "failed", "cancelled"}}.get(
                one.kind
            )
            assert wanted is None or row["state"] in wanted
        assert not [one for one in self.store.queue.offers(20) if one.kind != "effects"], "what is offered is offered once"

    @precondition(lambda self: self.items)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        item = self.choose(data, self.items)
        live = self.row("work_items", item)["ended_at"] is None
        assert self.store.queue.cancel(item, reason=Reason.USER_CANCELLED, actor="test") == live

    @precondition(lambda self: self.items)
    @rule(data=st.data(), force=st.booleans())
    def reopen(self, data: st.DataObject, force: bool) -> None:
        item = self.choose(data, self.items)
        row = self.row("work_items", item)
        beside = self.admin.execute(
            "select count(*) from work_items where subject_key = %s and ended_at is null", (row["subject_key"],)
        ).fetchone()
        states = {"failed", "cancelled", "completed"} if force else {"failed", "cancelled"}
        assert self.store.queue.reopen(item, actor="test", force=force) == (row["state"] in states and beside == (0,))

    # --- what must hold

    @invariant()
    def nothing_is_wrong(self) -> None:
        if not hasattr(self, "world"):
            return
        Engine.steps["steps"] += 1
        found = self.admin.execute(VIOLATIONS.encode(), {"cap": CAP}).fetchall()
        Engine.steps["violations"] += len(found)
        assert found == []

    @invariant()
    def fences_only_rise(self) -> None:
        rows = self.admin.execute(
            "select 'item ' || id, fence from work_items union all select 'session ' || id, fence from sessions"
            " union all select 'effect ' || id, lease_no from effects union all select 'attempt ' || id, attempt from work_items"
        ).fetchall()
        for name, fence in rows:
            assert fence >= self.fences.get(name, 0), name
            self.fences[name] = fence

    @invariant()
    def nothing_is_written_twice(self) -> None:
        Engine.steps["twice"] += sum(count > 1 for count in self.written.values())
        assert all(count <= 1 for count in self.written.values())

    def teardown(self) -> None:
        """Left alone, everything comes to its end: what is live is worked off, reaped or announced."""
        if not hasattr(self, "world"):
            return
        for _ in range(60):
            self.world.clock.advance(timedelta(minutes=20))
            self.store.recovery.reap()
            for item in self.items:
                found = self.world.claim(item, cap=CAP)
                if isinstance(found, Claimed):
                    self.store.queue.conclude(found, "cancelled", Reason.PULL_CLOSED)
                with self.store.settlements.open(item) as tx:
                    if tx is not None:
                        tx.announce({"of": "teardown"}, None, [])
                while (effect := self.store.outbox.claim_next(item)) is not None:
                    self.store.outbox.applied(effect, EffectReceipt(external_id="1", created=False))
            left = self.admin.execute(
                "select (select count(*) from work_items where ended_at is null or not announced)"
                " + (select count(*) from effects where ended_at is null) + (select count(*) from owner_slots where item_id is not null)"
                " + (select count(*) from sessions where ended_at is null) + (select count(*) from attempts where state = 'open')"
            ).fetchone()
            if left == (0,):
                return
        Engine.steps["lost"] += 1
        raise AssertionError("something is never finished")


def run_engine(database: Database, postgres_admin: str, examples: int, steps: int, *, shrink: bool = True) -> Counter[str]:
    """Runs the machine; how many steps were made and what went wrong."""
    with connect(database, postgres_admin) as admin:
        Engine.database, Engine.admin, Engine.steps = database, admin, Counter()
        wanted = settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            derandomize=examples < 1_000,
            print_blob=True,
            phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        run_state_machine_as_test(Engine, settings=wanted)
        return Engine.steps


@pytest.mark.timeout(7_200)
def test_whatever_happens_the_engines_invariants_hold(
    database: Database, postgres_admin: str, full: bool, figures: Figures
) -> None:
    steps = run_engine(database, postgres_admin, 1_000 if full else 40, 40 if full else 30)
    figures(tried=steps["steps"], lost=steps["lost"], duplicated=steps["twice"])
    assert steps["steps"] > 500


# SQLAlchemy's dialect names the type of each bound value.
CASTS = re.compile(r"::(VARCHAR|INTEGER|BIGINT|UUID|TIMESTAMP WITH TIME ZONE)")

# One guard taken out of one statement each: what it says and what it says without.
REMOVALS: dict[str, tuple[str, str]] = {
    "a freed slot": ("update owner_slots set item_id = null, fence = null", "update owner_slots set taken_at = null"),
    "the slot's own emptiness": ("number <= %(cap)s and item_id is null", "number <= %(cap)s"),
    "the fence at the launch": ("and state = 'starting' and fence = %(fence)s and session_id is null", "and state = 'starting'"),
    "the state at the release": ("where owner_id = %(owner)s and id = %(item)s and state = 'starting' and fence", "where owner_id = %(owner)s and id = %(item)s and fence"),
    "that only live items end": ("and id = %(item)s and ended_at is null", "and id = %(item)s"),
    "the closed attempt": ("update attempts set state = %(state)s", "update attempts set started_at = started_at, state = case when false then %(state)s else state end"),
    "the stop of an ended item's session": ("update sessions set interrupt_requested = %(reason)s", "update sessions set interrupt_requested = case when false then %(reason)s end"),
    "one live item a subject at the reopening": ("and not exists (select 1 from work_items o where", "and not exists (select 1 from work_items o where false and"),
    "the fence at a session's end": ("and state = 'running' and fence = %(fence)s", "and state = 'running'"),
    "the lease number at an effect's end": ("and state = 'applying' and lease_no = %(lease)s", "and state = 'applying'"),
    "the order of a subject's effects": ("join heads h on h.id = e.id\n    where h.state = 'pending' and h.not_before <= %(now)s", "join heads h on e.owner_id = %(owner)s\n    where e.not_before <= %(now)s"),
    "the freed place of an ended session": ("update agent_capacity set session_id = null, lease_until = null where", "update agent_capacity set lease_until = null where false and"),
    "the announced ending": ("set announced = true, offer_until = null", "set offer_until = null"),
    "an offer's time": ("and (w.offer_until is null or w.offer_until <= %(now)s)\n", "\n"),
}  # fmt: skip
# The bounded form takes those that are found soonest.
BOUNDED = ("a freed slot", "the stop of an ended item's session", "one live item a subject at the reopening")


@pytest.mark.parametrize("name", REMOVALS)
def test_without_this_guard_the_invariants_break(
    database: Database, postgres_admin: str, full: bool, name: str, figures: Figures
) -> None:
    """The machine is not blind: each guard is missed when it is taken away."""
    if not full and name not in BOUNDED:
        pytest.skip("in the full form")
    old, new = REMOVALS[name]
    hits = 0

    def rewrite(_c: object, _cursor: object, statement: str, values: object, _context: object, _many: bool) -> tuple[str, object]:
        nonlocal hits
        plain = CASTS.sub("", statement)
        if old not in plain:
            return statement, values
        hits += 1
        return plain.replace(old, new), values

    engines = (database.store.database._app, database.store.database._system)
    for one in engines:
        event.listen(one, "before_cursor_execute", rewrite, retval=True)
    try:
        with pytest.raises((AssertionError, DatabaseError, ExceptionGroup)):
            run_engine(database, postgres_admin, 60, 30, shrink=False)
    finally:
        for one in engines:
            event.remove(one, "before_cursor_execute", rewrite)
    assert hits, "the statement is not written so any more: mend the list"
    figures(tried=1)
