"""Invariants 2 to 5 and 9 against a real PostgreSQL, each by an attempt to break it."""

from __future__ import annotations

import threading
from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from kilo_pipelines.core.effects import EffectReceipt
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store import AdmissionTx, Claimed, Refused, SessionClaim
from kilo_pipelines.store.recovery import MAX_LAUNCHES, RECONCILERS
from tests.conftest import Database
from tests.support.store import RECEIPT, World, intent


def test_redelivery_before_admission_resumes_and_after_it_is_a_duplicate(world: World) -> None:
    new = world.delivery()
    first = world.store.inbox.record(new)
    assert (first.outcome, world.store.inbox.record(new).outcome) == ("stored", "resumed")
    world.store.inbox.admit_next(lambda tx: tx.skip("event_unknown"), 50)
    again = world.store.inbox.record(new)
    assert (again.outcome, again.delivery_id) == ("duplicate", first.delivery_id)


def test_the_same_body_under_another_id_is_a_duplicate_and_the_same_id_with_another_body_is_refused(world: World) -> None:
    """The id header isn't signed (threats, rule 15)."""
    new = world.delivery()
    world.store.inbox.record(new)
    world.store.inbox.admit_next(lambda tx: tx.skip("event_unknown"), 50)
    assert world.store.inbox.record(type(new)(**{**vars(new), "provider_delivery_id": "forged"})).outcome == "duplicate"
    assert world.store.inbox.record(type(new)(**{**vars(new), "body": b'{"other": 1}'})).outcome == "id_reused"


def test_an_admission_that_raises_loses_nothing_and_ends_visibly(world: World) -> None:
    receipt = world.store.inbox.record(world.delivery())

    def broken(_tx: AdmissionTx) -> None:
        raise ValueError("a rule with a defect")

    for _ in range(6):
        world.store.inbox.admit_next(broken, 10)
        world.clock.advance(timedelta(hours=1))
    with world.store.database.owner(world.owner.id) as connection:
        row = connection.execute(
            text("select state, reason, tries from deliveries where id = :id"), {"id": receipt.delivery_id}
        ).one()
    assert tuple(row) == ("skipped", Reason.ADMISSION_ERROR, 5)


@pytest.mark.parametrize("cap", [1, 3])
def test_many_claimers_never_exceed_the_cap_and_claim_each_item_once(world: World, cap: int) -> None:
    items = [world.item() for _ in range(24)]
    claimed: list[Claimed] = []
    lock = threading.Lock()
    peak = [0]

    def held() -> int:
        with world.store.database.owner(world.owner.id) as connection:
            return int(connection.execute(text("select count(*) from owner_slots where item_id is not null")).scalar_one())

    def claimer() -> None:
        for item in items:
            found = world.claim(item, cap=cap)
            if isinstance(found, Claimed):
                with lock:
                    claimed.append(found)
                    peak[0] = max(peak[0], held())

    threads = [threading.Thread(target=claimer) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == cap == peak[0]
    while claimed:
        done = claimed.pop()
        assert world.store.queue.conclude(done, "cancelled", Reason.PULL_CLOSED)
        world.clock.advance(timedelta(minutes=5))
        for item in items:
            found = world.claim(item, cap=cap)
            if isinstance(found, Claimed):
                claimed.append(found)
    assert {world.state(item) for item in items} == {"cancelled"}


def test_every_claim_raises_the_fence_and_a_late_writer_changes_nothing(world: World) -> None:
    item = world.item()
    zombie = world.claim(item, lease=5)
    world.clock.advance(timedelta(seconds=6))
    assert world.store.recovery.reap()["starting_lease"] >= 1
    fresh = world.claim(item)
    assert isinstance(fresh, Claimed) and fresh.fence == zombie.fence + 1
    before = world.store.queue.counters().get("late_write:launch", 0)
    head = {name: zombie.details[name] for name in ("head_sha", "base_sha", "base_ref", "title")}
    assert not world.store.sessions.launch(
        zombie, session_id=uuid4(), spec={}, head=head, effects=[intent("late")], cap_s=1, receipt=RECEIPT
    )
    assert not world.store.queue.release(zombie, not_before=world.clock.now(), reason="x")
    assert world.state(item) == "starting"
    assert world.store.outbox.of_item(item) == []
    assert world.store.queue.counters()["late_write:launch"] == before + 1


def test_a_second_claim_of_a_running_item_moves_on(world: World) -> None:
    claim, session = world.launched()
    refused = world.claim(claim.item_id)
    assert isinstance(refused, Refused) and (refused.outcome, refused.session_id) == (Reason.MOVED_ON, session)


def test_offers_are_made_once_until_they_expire(world: World) -> None:
    item = world.item()

    def offered() -> bool:
        return any(offer.ids == [item] for offer in world.store.queue.offers(100))

    assert offered()
    assert not offered()
    world.clock.advance(timedelta(seconds=121))
    assert offered()


def test_a_dead_sessions_worker_is_followed_by_another_at_most_three_times(world: World) -> None:
    claim, session = world.launched()
    for launch in range(1, MAX_LAUNCHES + 1):
        held = world.session_claim(session, lease=5)
        assert isinstance(held, SessionClaim) and held.fence >= launch
        world.clock.advance(timedelta(seconds=6))
        world.store.recovery.reap()
        assert not world.store.sessions.finish(held, status="completed", reason=None, result={}), "a zombie's outcome"
    row = world.store.sessions.get(session)
    assert row is not None and (row.state, row.reason, row.launches) == ("failed", Reason.SESSION_LOST, MAX_LAUNCHES)
    assert any(offer.kind == "settle" and offer.ids == [claim.item_id] for offer in world.store.queue.offers(100))


def test_a_cancelled_item_frees_its_slot_and_its_queued_session_never_starts(world: World) -> None:
    claim, session = world.launched()
    assert world.store.queue.cancel(claim.item_id, reason=Reason.USER_CANCELLED, actor="test")
    refused = world.session_claim(session)
    assert isinstance(refused, Refused)
    with world.store.database.owner(world.owner.id) as connection:
        assert (
            connection.execute(text("select count(*) from owner_slots where item_id = :item"), {"item": claim.item_id}).scalar()
            == 0
        )


def test_a_running_sessions_interrupt_is_told_at_the_next_heartbeat(world: World) -> None:
    claim, held = world.running()
    assert world.store.sessions.beat(held, 30) == "ok"
    world.store.queue.cancel(claim.item_id, reason=Reason.SUPERSEDED, actor="test")
    assert world.store.sessions.beat(held, 30) == "cancel"


def test_verdict_effects_and_slot_are_one_transaction(world: World) -> None:
    claim, held = world.running()
    world.store.sessions.finish(held, status="completed", reason=None, result={})
    with pytest.raises(RuntimeError), world.store.settlements.open(claim.item_id) as tx:
        assert tx is not None
        tx.conclude(state="completed", reason="reviewed", verdict={}, evidence=None, effects=[intent("one")])
        raise RuntimeError("the process dies here")
    assert world.state(claim.item_id) == "running" and world.store.outbox.of_item(claim.item_id) == []
    with world.store.settlements.open(claim.item_id) as tx:
        assert tx is not None and tx.conclude(
            state="completed", reason="reviewed", verdict={}, evidence=None, effects=[intent("one")]
        )
    with world.store.settlements.open(claim.item_id) as tx:
        assert tx is not None
        assert not tx.conclude(state="failed", reason="reviewed", verdict={}, evidence=None, effects=[intent("two")])
    assert [one["intent_key"] for one in world.store.outbox.of_item(claim.item_id)] == ["one"]


def test_effects_apply_in_their_subjects_order_and_a_lost_lease_is_taken_over(world: World) -> None:
    claim, held = world.running()
    world.store.sessions.finish(held, status="completed", reason=None, result={})
    with world.store.settlements.open(claim.item_id) as tx:
        assert tx is not None
        tx.conclude(
            state="completed",
            reason="reviewed",
            verdict={},
            evidence=None,
            effects=[intent("a"), intent("b"), intent("x", "other")],
        )
    first = world.store.outbox.claim_next(claim.item_id)
    second = world.store.outbox.claim_next(claim.item_id)
    assert first and second and {first.intent.intent_key, second.intent.intent_key} == {"a", "x"}
    assert world.store.outbox.claim_next(claim.item_id) is None, "b waits for a"
    world.clock.advance(timedelta(seconds=61))
    assert world.store.recovery.reap()["effect_lease"] >= 2
    again = world.store.outbox.claim_next(claim.item_id)
    assert again is not None and again.lease_no == 2
    late = first if again.id == first.id else second
    assert not world.store.outbox.applied(late, EffectReceipt(external_id="1", created=True))
    assert world.store.outbox.applied(again, EffectReceipt(external_id="1", created=True))


def test_an_effect_that_fails_for_ever_ends_dead_and_lets_the_next_pass(world: World) -> None:
    claim, held = world.running()
    world.store.sessions.finish(held, status="completed", reason=None, result={})
    with world.store.settlements.open(claim.item_id) as tx:
        assert tx is not None
        tx.conclude(state="completed", reason="reviewed", verdict={}, evidence=None, effects=[intent("p"), intent("q")])
    tries = 0
    while (effect := world.store.outbox.claim_next(claim.item_id)) and effect.intent.intent_key == "p":
        tries += 1
        world.store.outbox.retry(effect, timedelta(seconds=1), Reason.PROVIDER_UNAVAILABLE, final=False)
        world.clock.advance(timedelta(seconds=2))
    assert tries == 8 and effect is not None and effect.intent.intent_key == "q"
    assert world.store.outbox.of_item(claim.item_id)[0]["state"] == "dead"


def test_a_reopened_item_is_a_new_attempt_and_never_beside_a_live_one(world: World) -> None:
    first = world.item(pull=7)
    world.store.queue.cancel(first, reason=Reason.SUPERSEDED, actor="test")
    second = world.item(pull=7)
    assert not world.store.queue.reopen(first, actor="test")
    world.store.queue.cancel(second, reason=Reason.SUPERSEDED, actor="test")
    assert world.store.queue.reopen(first, actor="test")
    claim = world.claim(first)
    assert isinstance(claim, Claimed) and claim.attempt == 1
    world.store.queue.conclude(claim, "failed", Reason.PROVIDER_NOT_FOUND)
    assert world.store.queue.reopen(first, actor="test")
    again = world.claim(first)
    assert isinstance(again, Claimed) and again.attempt == 2 and again.fence > claim.fence


def test_a_callback_is_bound_to_its_session_and_altered_ones_are_counted(world: World) -> None:
    _, held = world.running()
    _, other = world.running()
    record = world.store.sessions.record_callback
    assert record(held.session_id, other.callback_token, b"{}") == "refused"
    assert record(uuid4(), held.callback_token, b"{}") == "refused"
    assert record(held.session_id, held.callback_token, b"{}") == "accepted"
    assert record(held.session_id, held.callback_token, b"{}") == "duplicate"
    assert record(held.session_id, held.callback_token, b'{"a":1}') == "conflict"
    world.clock.advance(timedelta(days=2))
    assert record(other.session_id, other.callback_token, b"{}") == "expired"


def test_a_paused_or_killed_service_claims_nothing(world: World) -> None:
    item = world.item()
    scope = f"owner:{world.owner.id}"
    with world.store.database.system() as connection:
        connection.execute(text("insert into switches (scope, kind, reason) values (:scope, 'kill', 'test')"), {"scope": scope})
    refused = world.claim(item)
    assert isinstance(refused, Refused) and refused.outcome == Reason.KILL_SWITCH
    with world.store.database.system() as connection:
        connection.execute(text("delete from switches where scope = :scope"), {"scope": scope})
    assert isinstance(world.claim(item), Claimed)


def test_every_non_final_state_has_a_reconciler(database: Database) -> None:
    """Invariant 4: states are read from the tables' own constraints."""
    final = {
        "completed",
        "failed",
        "cancelled",
        "interrupted",
        "admitted",
        "skipped",
        "applied",
        "dropped",
        "unknown",
        "dead",
        "closed",
        "repaired",
        "pulled",
        "gave_up",
    }
    with database.store.database.system() as connection:
        rows = connection.execute(
            text(
                "select c.conrelid::regclass::text as name, pg_get_constraintdef(c.oid) as body from pg_constraint c"
                " where c.contype = 'c' and pg_get_constraintdef(c.oid) like '%(state = ANY%'"
            )
        ).all()
    found = set()
    for name, body in rows:
        if "ended_at" in body or "settled_at" in body:
            continue
        found |= {f"{name}.{word}" for word in body.split("'")[1::2] if word not in final and word.islower()}
    assert found == set(RECONCILERS)


def test_the_application_login_can_be_checked(database: Database) -> None:
    database.store.database.check_roles()


def test_secrets_lie_encrypted_in_the_database(world: World) -> None:
    _, held = world.running()
    with world.store.database.system() as connection:
        tables = ("sessions", "callback_tokens", "work_items", "session_events")
        dump = "".join(
            str(tuple(row)) for table in tables for row in connection.execute(text(f"select to_jsonb(t)::text from {table} t"))
        )
    assert held.callback_token not in dump and held.callback_token.encode().hex() not in dump


def test_unknown_ids_change_nothing(world: World) -> None:
    nobody = UUID(int=0)
    assert not world.store.queue.cancel(nobody, reason="x", actor="t")
    assert not world.store.queue.reopen(nobody, actor="t")
    assert world.store.sessions.get(nobody) is None
