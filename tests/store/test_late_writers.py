"""Invariants 2 and 3 where they are hard to keep: late writers, races between two statements, poison and starvation."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store import AdmissionTx, Claimed, Refused, SessionClaim
from kilo_pipelines.store.outbox import MAX_TRIES
from tests.conftest import Database
from tests.support.store import World, intent


def _capacity_of(world: World, session: object) -> int:
    with world.store.database.system() as connection:
        held = connection.execute(text("select count(*) from agent_capacity where session_id = :s"), {"s": session}).scalar_one()
    return int(held)


def _overtaken(world: World) -> tuple[SessionClaim, SessionClaim]:
    """A worker that lost its lease and the one that took over."""
    _, zombie = world.running()
    world.clock.advance(timedelta(seconds=31))
    world.store.recovery.reap()
    fresh = world.session_claim(zombie.session_id)
    assert isinstance(fresh, SessionClaim)
    return zombie, fresh


def test_a_late_worker_that_stops_takes_no_capacity_from_its_successor(world: World) -> None:
    """More sessions than places on the host would run otherwise."""
    zombie, fresh = _overtaken(world)
    before = world.store.queue.counters().get("late_write:requeue", 0)
    assert not world.store.sessions.requeue(zombie, Reason.WORKER_STOPPING)
    assert _capacity_of(world, fresh.session_id) == 1
    assert world.store.sessions.beat(fresh, 30) == "ok"
    assert world.store.queue.counters()["late_write:requeue"] == before + 1


def test_a_late_workers_events_are_not_kept(world: World) -> None:
    zombie, fresh = _overtaken(world)
    world.store.sessions.event(zombie, "turn", {"of": "zombie"})
    world.store.sessions.event(fresh, "turn", {"of": "successor"})
    assert [one["data"]["of"] for one in world.store.sessions.events(fresh.session_id)] == ["successor"]


def test_what_a_late_worker_was_about_to_push_is_not_kept(world: World) -> None:
    """Its successor's session would end with a commit that nobody pushed."""
    zombie, fresh = _overtaken(world)
    before = world.store.queue.counters().get("late_write:accept", 0)
    assert not world.store.sessions.accept(zombie, result={"of": "zombie"}, evidence={})
    assert world.store.queue.counters()["late_write:accept"] == before + 1
    assert world.store.sessions.accept(fresh, result={"of": "successor"}, evidence={"turns": 1})
    assert world.store.sessions.requeue(fresh, Reason.WORKER_STOPPING)
    again = world.session_claim(fresh.session_id)
    assert isinstance(again, SessionClaim)
    assert again.accepted == {"status": "completed", "result": {"of": "successor"}, "evidence": {"turns": 1}}


def test_a_stopping_worker_ends_a_session_that_was_asked_to_stop(world: World) -> None:
    """Queued again it would be offered for hours and claimed by nobody."""
    claim, held = world.running()
    world.store.queue.cancel(claim.item_id, reason=Reason.SUPERSEDED, actor="test")
    assert world.store.sessions.requeue(held, Reason.WORKER_STOPPING)
    row = world.store.sessions.get(held.session_id)
    assert row is not None and (row.state, row.reason) == ("interrupted", Reason.SUPERSEDED)


def test_worker_stops_count_as_launches(world: World) -> None:
    _, held = world.running()
    for _ in range(2):
        assert world.store.sessions.requeue(held, Reason.WORKER_STOPPING)
        held = world.session_claim(held.session_id)
        assert isinstance(held, SessionClaim)
    assert world.store.sessions.requeue(held, Reason.WORKER_STOPPING)
    row = world.store.sessions.get(held.session_id)
    assert row is not None and (row.state, row.reason, row.launches) == ("failed", Reason.SESSION_LOST, 3)


@contextmanager
def _between(database: Database, marker: str, act: threading.Thread) -> Iterator[None]:
    """Starts `act` right after the statement that holds `marker` ran, and gives it time to commit or to wait for a lock."""
    engine = database.store.database._app

    def after(_c: object, _cursor: object, statement: str, *_rest: object) -> None:
        if marker in statement and not act.ident:
            act.start()
            act.join(1)

    event.listen(engine, "after_cursor_execute", after)
    try:
        yield
    finally:
        event.remove(engine, "after_cursor_execute", after)
        act.join(10)


def test_a_session_that_is_claimed_while_its_item_is_cancelled_is_told_to_stop(database: Database, world: World) -> None:
    """The claim falls between any two statements of the cancellation: the session never runs on unasked."""
    for marker in ("update work_items set state", "update attempts set state", "update sessions set"):
        claim, session = world.launched()
        claimed: list[object] = []
        racer = threading.Thread(target=lambda found=claimed, one=session: found.append(world.session_claim(one)))
        with _between(database, marker, racer):
            assert world.store.queue.cancel(claim.item_id, reason=Reason.SUPERSEDED, actor="test")
        (found,) = claimed
        if isinstance(found, SessionClaim):
            assert world.store.sessions.beat(found, 30) == "cancel", marker
        else:
            row = world.store.sessions.get(session)
            assert row is not None and row.state == "interrupted", marker


def test_a_body_that_is_not_json_blocks_no_other_delivery(world: World) -> None:
    new = world.delivery()
    poison = world.store.inbox.record(type(new)(**{**vars(new), "body": b"not json"}))
    world.clock.advance(timedelta(seconds=1))
    good = world.store.inbox.record(world.delivery())
    for _ in range(6):
        world.store.inbox.admit_next(lambda tx: tx.skip("event_unknown"), 10)
        world.clock.advance(timedelta(hours=1))
    with world.store.database.owner(world.owner.id) as connection:
        found = connection.execute(
            text("select id, reason from deliveries where id in (:a, :b)"), {"a": poison.delivery_id, "b": good.delivery_id}
        )
        state = {row.id: row.reason for row in found}
    assert state == {poison.delivery_id: Reason.ADMISSION_ERROR, good.delivery_id: "event_unknown"}


def test_a_redelivery_resumes_what_a_defect_had_ended(world: World) -> None:
    """Invariant 1: a duplicate only when its admission is committed; an operator repairs the rule and redelivers."""
    new = world.delivery()
    first = world.store.inbox.record(new)

    def broken(_tx: AdmissionTx) -> None:
        raise ValueError("a rule with a defect")

    for _ in range(6):
        world.store.inbox.admit_next(broken, 10)
        world.clock.advance(timedelta(hours=1))
    again = world.store.inbox.record(new)
    assert (again.outcome, again.delivery_id) == ("resumed", first.delivery_id)
    assert world.store.inbox.admit_next(lambda tx: tx.skip("event_unknown"), 10) == 1
    assert world.store.inbox.record(new).outcome == "duplicate"


def test_a_full_owner_keeps_nobody_waiting(world: World) -> None:
    """One owner's backlog without slots never hides another owner's one item from the offers."""
    busy, quiet = world, World(world.store, world.clock)
    for _ in range(80):
        busy.item()
    busy.claim(busy.item(), cap=1)
    world.clock.advance(timedelta(seconds=5))
    wanted = quiet.item()
    for _ in range(2):
        offers = [one for one in world.store.queue.offers(20) if one.kind == "start"]
        if any(one.ids == [wanted] for one in offers):
            return
        for one in offers:
            world.claim(one.ids[0], cap=1)
    pytest.fail("the quiet owner's item was not offered within two rounds")


def test_a_freed_slot_wakes_one_waiting_item(world: World) -> None:
    """Waking the whole backlog would start a run for each, and all but one would find no slot."""
    holder = world.claim(world.item(), cap=1)
    waiting = [world.item() for _ in range(5)]
    for one in waiting:
        assert isinstance(world.claim(one, cap=1), Refused)
    assert not [one for one in world.store.queue.offers(100) if one.ids[0] in waiting]
    world.store.queue.conclude(holder, "cancelled", Reason.PULL_CLOSED)
    woken = [one.ids[0] for one in world.store.queue.offers(100) if one.ids[0] in waiting]
    assert len(woken) == 1


def test_a_waiting_item_says_why_the_switch_holds_it(world: World) -> None:
    item = world.item()
    world.store.queue.switch(f"owner:{world.owner.id}", "kill", "test", actor="test")
    refused = world.claim(item)
    assert isinstance(refused, Refused) and refused.outcome == Reason.KILL_SWITCH
    found = world.store.queue.get(item)
    assert found is not None and found.reason == Reason.KILL_SWITCH
    assert world.store.queue.unswitch(f"owner:{world.owner.id}")
    assert isinstance(world.claim(item), Claimed)


@pytest.mark.parametrize("scope", ["all", "service:code_review", "owner"])
def test_a_pause_holds_sessions_that_wait(world: World, scope: str) -> None:
    """An agent that wasn't started yet isn't started while the switch is set."""
    _, session = world.launched()
    place = f"owner:{world.owner.id}" if scope == "owner" else scope
    world.store.queue.switch(place, "pause", "test", actor="test")
    world.store.sessions.ensure_capacity(64)
    try:
        assert not [one for one in world.store.queue.offers(100) if one.ids == [session]]
        refused = world.session_claim(session)
        assert isinstance(refused, Refused) and refused.outcome == Reason.PAUSED
        assert _capacity_of(world, session) == 0
    finally:
        world.store.queue.unswitch(place)
    world.clock.advance(timedelta(seconds=31))
    assert isinstance(world.session_claim(session), SessionClaim)


@pytest.mark.parametrize("scope", ["all", "service:code_review", "owner"])
def test_the_kill_switch_stops_what_runs_and_leaves_what_waits(world: World, scope: str) -> None:
    claim, held = world.running()
    waiting = world.item()
    place = f"owner:{world.owner.id}" if scope == "owner" else scope
    try:
        assert world.store.queue.switch(place, "kill", "test", actor="test") >= 1
        assert world.store.sessions.beat(held, 30) == "cancel"
        assert (world.state(claim.item_id), world.state(waiting)) == ("cancelled", "waiting")
    finally:
        world.store.queue.unswitch(place)


@pytest.mark.parametrize("scope", ["all", "service:code_review", "owner"])
@pytest.mark.parametrize(("kind", "reason"), [("kill", Reason.KILL_SWITCH), ("pause", Reason.PAUSED)])
def test_what_waits_behind_a_switch_says_so_although_nobody_claims_it(
    world: World, scope: str, kind: str, reason: Reason
) -> None:
    item = world.item()
    place = f"owner:{world.owner.id}" if scope == "owner" else scope

    def told() -> set[Any]:
        listed = [one for one in world.store.queue.items(owner_id=world.owner.id) if one["id"] == item]
        return {world.store.queue.get(item).reason, world.store.reviews.get(item).reason, *(one["reason"] for one in listed)}  # type: ignore[union-attr]

    assert told() == {None}
    world.store.queue.switch(place, kind, "test", actor="test")
    try:
        assert told() == {reason}
        assert reason in {row["reason"] for row in world.store.figures.now().waiting}
    finally:
        world.store.queue.unswitch(place)
    assert told() == {None}


def test_a_kill_waits_for_a_claim_that_has_looked_already_and_stops_it(world: World) -> None:
    """Otherwise the item would start unseen behind the kill, and work on once that is lifted."""
    item, place, stopped = world.item(), f"owner:{world.owner.id}", list[int | None]()
    killer = threading.Thread(target=lambda: stopped.append(world.store.queue.switch(place, "kill", "test", actor="test")))

    def pools(_kind: str, _plan: str) -> dict[str, int]:
        """Asked within the claim, after its look at the switches."""
        killer.start()
        killer.join(0.5)
        return {"code_review": 20}

    claim = world.store.queue.claim(item, "code_review", run_id="r", pools=pools, lease_s=30)
    killer.join(10)
    world.store.queue.unswitch(place)
    assert isinstance(claim, Claimed) and stopped == [1]
    assert world.state(item) == "cancelled"


def test_a_kill_that_can_not_wait_is_set_and_audited_and_asked_for_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database goes away while it waits for claims: nothing new starts, and who set it is known."""
    claim, place = world.claim(world.item()), f"owner:{world.owner.id}"

    def away(*_: object) -> None:
        raise OperationalError("lock", None, Exception("gone"))

    with monkeypatch.context() as patch:
        patch.setattr("kilo_pipelines.store.queue.wait_for_claims", away)
        with pytest.raises(OperationalError):
            world.store.queue.switch(place, "kill", "test", actor="grace")
    assert [one["scope"] for one in world.store.queue.switches() if one["kind"] == "kill"] == [place]
    told = [one for one in world.store.audit.listed(owner_id=world.owner.id) if one["action"] == "switch.kill"]
    assert [one["actor"] for one in told] == ["grace"]
    assert world.store.queue.switch(place, "kill", "test", actor="grace") == 1
    assert world.state(claim.item_id) == "cancelled"
    world.store.queue.unswitch(place)


def test_reopening_waits_for_an_admission_of_the_same_subject(world: World) -> None:
    """Both at once would leave two live items of one pull request."""
    number = 4711
    first = world.item(pull=number)
    world.store.queue.cancel(first, reason=Reason.SUPERSEDED, actor="test")
    world.store.inbox.record(world.delivery())
    reopened: list[bool] = []
    racer = threading.Thread(target=lambda: reopened.append(world.store.queue.reopen(first, actor="test")))
    opened = []

    def admit(tx: AdmissionTx) -> None:
        subject = f"github:{world.repository}:pull:{number}"
        assert tx.items("code_review", subject)
        racer.start()
        racer.join(1)
        opened.append(tx.open(world.new_item(number)))

    world.store.inbox.admit_next(admit, 1)
    racer.join(10)
    assert opened and reopened == [False]
    assert world.state(first) == "cancelled"


def test_an_effect_whose_worker_dies_each_time_ends_dead(world: World) -> None:
    """A write that kills its process is tried as often as one that fails, not for ever."""
    claim, held = world.running()
    world.store.sessions.finish(held, status="completed", reason=None, result={})
    with world.store.settlements.open(claim.item_id) as tx:
        assert tx is not None
        tx.conclude(state="completed", reason="reviewed", verdict={}, evidence=None, effects=[intent("deadly"), intent("next")])
    tries = 0
    while (effect := world.store.outbox.claim_next(claim.item_id)) and effect.intent.intent_key == "deadly":
        tries += 1
        assert tries <= MAX_TRIES
        world.clock.advance(timedelta(seconds=61))
        world.store.recovery.reap()
    assert effect is not None and effect.intent.intent_key == "next"
    first = world.store.outbox.of_item(claim.item_id)[0]
    assert (first["state"], first["reason"], tries) == ("dead", Reason.RETRIES_EXHAUSTED, MAX_TRIES)


def test_a_late_effect_worker_changes_nothing(world: World) -> None:
    claim, held = world.running()
    world.store.sessions.finish(held, status="completed", reason=None, result={})
    with world.store.settlements.open(claim.item_id) as tx:
        assert tx is not None
        tx.conclude(state="completed", reason="reviewed", verdict={}, evidence=None, effects=[intent("slow")])
    late = world.store.outbox.claim_next(claim.item_id)
    assert late is not None
    world.clock.advance(timedelta(seconds=61))
    world.store.recovery.reap()
    fresh = world.store.outbox.claim_next(claim.item_id)
    assert fresh is not None and fresh.lease_no > late.lease_no
    assert world.store.outbox.retry(late, timedelta(seconds=1), "x", final=True) == "late"
    assert not world.store.outbox.drop(late, "x")
    assert world.store.outbox.of_item(claim.item_id)[0]["state"] == "applying"


def test_an_item_that_was_reopened_is_not_announced_as_ended(world: World) -> None:
    claim, _ = world.launched()
    world.store.queue.cancel(claim.item_id, reason=Reason.USER_CANCELLED, actor="test")
    assert world.store.queue.reopen(claim.item_id, actor="test")
    with world.store.settlements.open(claim.item_id) as tx:
        assert tx is not None
        assert not tx.announce({"conclusion": "cancelled"}, None, [intent(uuid4().hex)])
    assert world.store.outbox.of_item(claim.item_id) == []
    assert isinstance(world.claim(claim.item_id), Claimed)


def test_an_item_whose_repository_left_the_installation_is_not_claimed(world: World) -> None:
    item = world.item()
    with world.store.database.owner(world.owner.id) as connection:
        connection.execute(text("update repositories set removed_at = now() where external_id = :id"), {"id": world.repository})
    refused = world.claim(item)
    assert isinstance(refused, Refused) and refused.outcome == Reason.OWNER_CHANGED
    assert world.state(item) == "cancelled"


def test_a_stop_is_heard_behind_a_burst_of_other_news(world: World) -> None:
    with world.store.listener("kilo_work", "kilo_stop") as wake:
        with world.store.database.system() as connection:
            for number in range(5):
                connection.execute(text("select pg_notify('kilo_work', :n)"), {"n": f"item:{number}"})
            connection.execute(text("select pg_notify('kilo_stop', '')"))
        time.sleep(0.2)  # all of it arrives in one packet
        heard = [wake.wait(0.5) for _ in range(6)]
    assert "kilo_stop" in heard


@pytest.mark.parametrize("cap", [1, 3])
def test_eight_claimers_work_off_sixty_items_within_the_cap(world: World, cap: int) -> None:
    """No item is lost, none is claimed twice, and at no moment more than `cap` are held."""
    items = [world.item() for _ in range(60)]
    claims: list[object] = []
    holding, most = 0, 0
    lock = threading.Lock()

    def claimer(number: int) -> None:
        nonlocal holding, most
        left = items[number:] + items[:number]
        while left:
            found = world.claim(left[0], cap=cap)
            if isinstance(found, Claimed):
                with lock:
                    claims.append(found.item_id)
                    holding += 1
                    most = max(most, holding)
                time.sleep(0.002)
                with lock:
                    holding -= 1
                assert world.store.queue.conclude(found, "cancelled", Reason.PULL_CLOSED)
            if isinstance(found, Claimed) or found.outcome == Reason.MOVED_ON:
                left.pop(0)

    claimers = [threading.Thread(target=claimer, args=(number * 7,)) for number in range(8)]
    for one in claimers:
        one.start()
    for one in claimers:
        one.join(60)
    assert sorted(map(str, claims)) == sorted(map(str, items))
    assert 1 <= most <= cap
    with world.store.database.owner(world.owner.id) as connection:
        held = connection.execute(text("select count(*) from owner_slots where item_id is not null")).scalar_one()
    assert held == 0


def test_many_shards_admit_each_delivery_once(world: World) -> None:
    """Eight shards wake at once for thirty deliveries: each is admitted by exactly one."""
    wanted = {world.store.inbox.record(world.delivery()).delivery_id for _ in range(30)}
    seen: list[object] = []
    lock = threading.Lock()

    def admit(tx: AdmissionTx) -> None:
        with lock:
            seen.append(tx.delivery.id)
        tx.skip("event_unknown")

    shards = [threading.Thread(target=lambda: world.store.inbox.admit_next(admit, 30)) for _ in range(8)]
    for one in shards:
        one.start()
    for one in shards:
        one.join(60)
    ours = [one for one in seen if one in wanted]
    assert len(ours) == len(set(ours)) == 30
