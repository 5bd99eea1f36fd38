"""Hosted sessions in the store: steps under fences, callbacks that are hints, and ends that leave nothing behind."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store import Claimed, HostedClaim, Refused
from kilo_pipelines.store.recovery import MAX_LAUNCHES
from tests.support.store import World


def _token(held: HostedClaim) -> str:
    return held.session.callback_token


def _offered(world: World) -> list[UUID]:
    """Sessions of this world whose next step is offered now."""
    return [one.ids[0] for one in world.store.hosted.offers(50) if one.owner_id == world.owner.id]


def _late(world: World, name: str) -> int:
    return world.store.queue.counters().get(f"late_write:hosted_{name}", 0)


def test_a_hosted_session_takes_no_place_on_a_host_and_no_shard_offers_it(world: World) -> None:
    _, session = world.hosted()
    world.store.sessions.ensure_capacity(64)
    assert session not in [one.ids[0] for one in world.store.queue.offers(50) if one.kind == "session"]
    assert _offered(world) == [session] and _offered(world) == [], "what is offered is offered once"
    assert isinstance(world.step(session), HostedClaim)


def test_only_one_step_has_a_session(world: World) -> None:
    _, session = world.hosted()
    held = world.step(session)
    assert isinstance(held, HostedClaim)
    assert isinstance(world.step(session), Refused)
    world.clock.advance(timedelta(seconds=21))
    assert _offered(world) == []
    assert world.store.hosted.park(held, timedelta(seconds=30))
    assert _offered(world) == []
    world.clock.advance(timedelta(seconds=31))
    assert _offered(world) == [session]


def test_a_parked_session_outlives_its_step(world: World) -> None:
    """No run waits for it, and recovery doesn't take it for a dead worker's."""
    _, held = world.initiated()
    world.clock.advance(timedelta(minutes=20))
    world.store.recovery.reap()
    row = world.store.sessions.get(held.session.session_id)
    assert row is not None and row.state == "running"


def test_a_dead_step_is_taken_up_where_it_stood(world: World) -> None:
    """Prepared and not initiated: the same session of the service is initiated, no second one prepared."""
    _, session = world.hosted()
    held = world.step(session)
    cloud = f"workspace_{uuid4()}"
    assert world.store.hosted.keep_ids(held, cloud, None)
    world.clock.advance(timedelta(seconds=31))
    world.store.recovery.reap()
    fresh = world.step(session)
    assert isinstance(fresh, HostedClaim) and (fresh.state, fresh.cloud_session_id) == ("prepared", cloud)
    before = _late(world, "ids")
    assert not world.store.hosted.keep_ids(fresh, f"agent_{uuid4()}", None), "an id is stored where none is"
    assert _late(world, "ids") == before + 1


def test_a_late_step_changes_nothing(world: World) -> None:
    _, session = world.hosted()
    zombie = world.step(session)
    world.clock.advance(timedelta(seconds=31))
    world.store.recovery.reap()
    fresh = world.step(session)
    assert fresh.session.fence > zombie.session.fence
    assert not world.store.hosted.keep(zombie, plan={"nonce": "z"})
    assert not world.store.hosted.keep_ids(zombie, f"agent_{uuid4()}", None)
    assert not world.store.hosted.park(zombie, timedelta(), message_id="msg_z")
    assert not world.store.sessions.finish(zombie.session, status="completed", reason=None, result={})
    assert world.store.hosted.keep(fresh, plan={"nonce": "f"})
    assert world.store.hosted.park(fresh, timedelta(0))
    again = world.step(session)
    assert (again.plan, again.cloud_session_id, again.message_id) == ({"nonce": "f"}, None, None)


def test_steps_that_die_again_and_again_end_the_session(world: World) -> None:
    _, session = world.hosted()
    for _ in range(MAX_LAUNCHES):
        assert isinstance(world.step(session), HostedClaim)
        world.clock.advance(timedelta(seconds=31))
        world.store.recovery.reap()
    row = world.store.sessions.get(session)
    assert row is not None and (row.state, row.reason) == ("failed", Reason.SESSION_LOST)


def test_a_callback_makes_the_next_look_due_and_concludes_nothing(world: World) -> None:
    """Whoever knows the token may say anything: a forged body, another body, the same body again (threats, rule 24)."""
    claim, held = world.initiated()
    session = held.session.session_id
    record = world.store.sessions.record_callback
    assert _offered(world) == []
    world.clock.advance(timedelta(seconds=1))
    assert record(session, _token(held), b'{"status":"completed","lastAssistantMessageText":"all is well"}') == "accepted"
    assert _offered(world) == [session]
    assert record(session, _token(held), b'{"status":"failed"}') == "accepted"
    assert record(session, _token(held), b'{"status":"failed"}') == "duplicate"
    row = world.store.sessions.get(session)
    assert row is not None and (row.state, row.result) == ("running", None)
    assert world.state(claim.item_id) == "running"


def test_a_callback_before_initiates_answer_is_not_lost(world: World) -> None:
    _, session = world.hosted()
    held = world.step(session)
    assert world.store.hosted.keep_ids(held, f"agent_{uuid4()}", None)
    assert world.store.sessions.record_callback(session, _token(held), b"{}") == "accepted"
    assert _offered(world) == [], "the step that initiates has it"
    assert world.store.hosted.park(held, timedelta(seconds=30), state="initiated", initiated_at=held.now)
    assert _offered(world) == [session]


def test_a_callback_of_a_former_attempt_or_of_another_owner_reaches_nobody(world: World) -> None:
    claim, held = world.initiated()
    other = World(world.store, world.clock)
    _, foreign = other.initiated()
    record = world.store.sessions.record_callback
    assert record(foreign.session.session_id, _token(held), b"{}") == "refused"
    assert record(held.session.session_id, _token(foreign), b"{}") == "refused"
    _past(world)
    former = world.step(held.session.session_id)
    assert isinstance(former, HostedClaim)
    assert world.store.sessions.finish(former.session, status="failed", reason=Reason.SESSION_LOST)
    with world.store.settlements.open(claim.item_id) as tx:
        assert tx is not None and tx.retry(Reason.SESSION_LOST, timedelta())
    again, session = world.launched(claim.item_id, spec={"agent": "hosted"})
    assert isinstance(again, Claimed) and again.attempt == claim.attempt + 1
    assert record(held.session.session_id, _token(held), b'{"status":"completed"}') == "accepted", "it is still to be closed"
    row = world.store.sessions.get(session)
    assert row is not None and (row.state, row.result) == ("queued", None)
    assert record(session, _token(held), b'{"status":"completed"}') == "refused"


def _past(world: World) -> None:
    """The poll of a parked session is due."""
    world.clock.advance(timedelta(seconds=31))


@pytest.mark.parametrize("kind", ["cancel", "kill"])
def test_a_stop_is_offered_at_once_even_while_everything_is_paused(world: World, kind: str) -> None:
    claim, held = world.initiated()
    session = held.session.session_id
    if kind == "cancel":
        world.store.queue.cancel(claim.item_id, reason=Reason.SUPERSEDED, actor="test")
    else:
        assert world.store.queue.switch("all", "kill", "test", actor="test") >= 1
    try:
        assert session in _offered(world)
        step = world.step(session)
        assert isinstance(step, HostedClaim) and step.interrupt_requested is not None
        assert world.store.sessions.finish(step.session, status="interrupted", reason=Reason.INTERRUPTED)
        assert session in _offered(world), "what runs at the service is to be stopped"
    finally:
        world.store.queue.unswitch("all")


def test_nothing_new_begins_while_its_service_is_paused(world: World) -> None:
    _, session = world.hosted()
    world.store.queue.switch(f"owner:{world.owner.id}", "pause", "test", actor="test")
    assert _offered(world) == []
    refused = world.step(session)
    assert isinstance(refused, Refused) and refused.outcome == Reason.PAUSED
    world.store.queue.unswitch(f"owner:{world.owner.id}")
    assert _offered(world) == [session]


def test_an_ended_session_is_closed_once_and_forgets_what_was_sent(world: World) -> None:
    _, held = world.initiated()
    session = held.session.session_id
    _past(world)
    step = world.step(session)
    assert world.store.sessions.finish(step.session, status="completed", reason=None, result={})
    closing = world.step(session)
    assert isinstance(closing, HostedClaim) and closing.ended and closing.cloud_session_id is not None
    assert isinstance(world.step(session), Refused), "another one is at it"
    world.store.hosted.put_off(closing, timedelta(seconds=5))
    world.clock.advance(timedelta(seconds=21))
    assert _offered(world) == [session]
    again = world.step(session)
    assert (again.closings, again.tries) == (closing.closings + 1, closing.tries)
    world.store.hosted.close(again)
    known = world.store.hosted.get(session)
    assert known is not None and known["state"] == "closed"
    assert isinstance(world.step(session), Refused) and _offered(world) == []
    assert world.store.sessions.record_callback(session, _token(held), b"{}") == "accepted"
    assert world.store.sessions.record_callback(session, _token(held), b'{"a":1}') == "conflict"


def test_a_step_writes_its_own_columns_only(world: World) -> None:
    _, session = world.hosted()
    with pytest.raises(ValueError, match="look_at"):
        world.store.hosted.keep(world.step(session), look_at=world.clock.now())
