"""Budgets, spend, repetition and authors at the claim, against a real PostgreSQL."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from kilo_pipelines.core.limits import CAP, SETTINGS, Ask, LimitsConfig, Price, Usage
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store import Claimed, Refused, StaleRevisionError, standing
from kilo_pipelines.store.queue import SERVICE_TABLES
from tests.conftest import Database
from tests.support.store import World, intent

PRICE = Price(input=Decimal(1), output=Decimal(4))
MODEL = "m"
ANY = Ask()


@pytest.fixture
def day(database: Database) -> World:
    """An owner at noon."""
    world = World(database.store, database.clock)
    noon = database.clock.now().replace(hour=12, minute=0, second=0, microsecond=0)
    database.clock.advance((noon if noon > database.clock.now() else noon + timedelta(days=1)) - database.clock.now())
    return world


def _limit(world: World, revision: int = 0, **limits: Any) -> int:
    config = LimitsConfig.model_validate(limits).model_dump(mode="json")
    return world.store.owners.put_config(world.owner.id, SETTINGS, config, enabled=True, expected_revision=revision, actor="test")


def _claim(world: World, item: UUID, ask: Ask = ANY, cap: int = 50) -> Any:
    pools = {"code_review": cap}
    return world.store.queue.claim(item, "code_review", run_id="r", pools=lambda _k, _p: pools, lease_s=600, ask=ask)


def _spend(
    world: World, claim: Claimed, usage: Usage, session: UUID | None = None, meter: str = "", price: Price | None = None
) -> int:
    return world.store.spend.record(
        world.owner.id,
        meter or uuid4().hex,
        item_id=claim.item_id,
        session_id=session,
        service="code_review",
        model=MODEL,
        usage=usage,
        price=price,
    )


def _refused(found: Any) -> tuple[str, str]:
    assert isinstance(found, Refused), found
    return found.outcome, found.state


def _not_before(world: World, item: UUID) -> datetime:
    return next(one["not_before"] for one in world.store.queue.items(owner_id=world.owner.id) if one["id"] == item)


def _audited(world: World, action: str) -> list[Any]:
    return [one for one in world.store.audit.listed(owner_id=world.owner.id) if one["action"] == action]


def test_twenty_dispatchers_spend_no_more_than_the_budget(day: World) -> None:
    """Bound: spent + reserved <= budget after every claim, however many claim at once."""
    budget, session = 1_000_000, 60_000
    _limit(day, daily={"tokens": budget}, session_tokens=session, author_burst=1_000)
    items = [day.item() for _ in range(40)]
    claimed: list[Claimed] = []
    barrier = threading.Barrier(20)

    def dispatch(mine: list[UUID]) -> None:
        barrier.wait()
        claimed.extend(one for one in (_claim(day, item) for item in mine) if isinstance(one, Claimed))

    threads = [threading.Thread(target=dispatch, args=(items[number::20],)) for number in range(20)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    granted = sum(one.granted.tokens for one in claimed if one.granted)
    assert len(claimed) == 17 and granted == budget
    for one in claimed:
        assert one.granted is not None
        _spend(day, one, Usage(one.granted.tokens, 0))
    (standing,) = day.store.spend.standing(day.owner.id)
    assert (standing["spent_tokens"], standing["reserved_tokens"]) == (budget, 0)


def test_a_spent_day_stops_and_the_next_one_goes_on(day: World) -> None:
    _limit(day, daily={"tokens": 100_000})
    first, second, third = day.item(), day.item(), day.item()
    claim = _claim(day, first)
    assert isinstance(claim, Claimed) and claim.granted is not None and claim.granted.tokens == 100_000
    # Nothing is spent yet, and everything is reserved.
    assert _refused(_claim(day, second)) == (Reason.BUDGET_RESERVED, "waiting")
    assert _not_before(day, second) <= day.clock.now() + timedelta(seconds=30)
    _spend(day, claim, Usage(60_000, 25_000))
    assert len(_audited(day, "budget.warning")) == 1
    day.store.queue.conclude(claim, "cancelled", Reason.PULL_CLOSED)
    assert _refused(_claim(day, second)) == (Reason.BUDGET_EXHAUSTED, "waiting")
    midnight = (day.clock.now() + timedelta(days=1)).astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    # Its sibling learns of it without a claim of its own.
    assert _not_before(day, second) == _not_before(day, third) == midnight
    assert all(set(offer.ids).isdisjoint({second, third}) for offer in day.store.queue.offers(100))
    assert len(_audited(day, "budget.exhausted")) == 1
    day.clock.advance(midnight - timedelta(microseconds=1) - day.clock.now())
    assert _refused(_claim(day, second)) == (Reason.BUDGET_EXHAUSTED, "waiting")
    day.clock.advance(timedelta(microseconds=1))
    assert isinstance(_claim(day, second), Claimed)
    assert len(_audited(day, "budget.exhausted")) == 1


def test_a_raised_budget_wakes_what_waits_at_once(day: World) -> None:
    revision = _limit(day, daily={"tokens": 0})
    item = day.item()
    assert _refused(_claim(day, item)) == (Reason.BUDGET_ZERO, "waiting")
    assert _not_before(day, item) > day.clock.now() + timedelta(hours=1)
    with pytest.raises(StaleRevisionError):
        _limit(day, revision + 5, daily={"tokens": 10})
    _limit(day, revision, daily={})
    assert any(item in offer.ids for offer in day.store.queue.offers(100))
    assert isinstance(_claim(day, item), Claimed)


def test_an_owners_own_limits_lift_no_cap_and_a_raised_cap_wakes_what_waits(day: World) -> None:
    _limit(day, daily={"tokens": 10**9}, services={"code_review": {"tokens": 10**9}})

    def cap(tokens: int, revision: int) -> None:
        config = {"tokens": tokens, "usd": None}
        day.store.owners.put_config(day.owner.id, CAP, config, enabled=True, expected_revision=revision, actor="operator")

    cap(50_000, 0)
    first, second = day.item(), day.item()
    claim = _claim(day, first)
    assert isinstance(claim, Claimed) and claim.granted is not None and claim.granted.tokens == 50_000
    _spend(day, claim, Usage(40_000, 5_000))
    day.store.queue.conclude(claim, "cancelled", Reason.PULL_CLOSED)
    assert _refused(_claim(day, second)) == (Reason.BUDGET_EXHAUSTED, "waiting")
    (whole, _) = day.store.spend.standing(day.owner.id)
    assert (whole["tokens"], whole["spent_tokens"]) == (50_000, 45_000)
    cap(0, 1)
    assert (day.owner.name, "the operator's cap", Reason.BUDGET_ZERO) in day.store.spend.stopped()
    cap(100_000, 2)
    assert isinstance(_claim(day, second), Claimed)
    assert CAP not in {one["service"] for one in day.store.owners.services(day.owner.id)}
    with day.store.database.owner(day.owner.id) as connection:
        connection.execute(text("update service_configs set config = '{\"tokens\": \"many\"}' where service = 'cap'"))
    assert _refused(_claim(day, day.item())) == (Reason.LIMITS_INVALID, "waiting"), "a cap that can't be read lets nothing run"


def test_a_meter_counts_once_and_over_midnight_on_both_days(day: World) -> None:
    claim, session = day.launched()
    for _ in range(3):
        _spend(day, claim, Usage(100, 10, 40), session, "meter", PRICE)
    day.clock.advance(timedelta(days=1))
    assert _spend(day, claim, Usage(150, 30, 40), session, "meter", PRICE) == 70
    assert _spend(day, claim, Usage(90, 10), session, "meter", PRICE) == 0, "an older reading comes late"
    assert _spend(day, claim, Usage(1, 0), session, "next launch", None) == 1
    days = day.store.spend.of_owner(day.owner.id, days=2)
    assert [(one["tokens_in"], one["tokens_out"], one["micro_usd"], one["unpriced_tokens"]) for one in days] == [
        (51, 20, 130, 1),
        (100, 10, 140, 0),
    ]
    assert sum(one["tokens_in"] for one in day.store.spend.of_item(day.owner.id, claim.item_id)) == 151


def test_what_is_cancelled_holds_its_part_until_its_session_has_stopped(day: World) -> None:
    _limit(day, daily={"tokens": 100_000})
    claim, held = day.running()
    assert day.store.queue.cancel(claim.item_id, reason=Reason.USER_CANCELLED, actor="test")
    other = day.item()
    assert _refused(_claim(day, other)) == (Reason.BUDGET_RESERVED, "waiting")
    _spend(day, claim, Usage(10_000, 0), held.session_id)
    assert day.store.sessions.finish(held, status="interrupted", reason="interrupted")
    found = _claim(day, other)
    assert isinstance(found, Claimed) and found.granted is not None and found.granted.tokens == 90_000


def test_money_without_a_price_and_limits_that_cannot_be_read_spend_nothing(day: World) -> None:
    _limit(day, daily={"usd": "1"})
    item = day.item()
    assert _refused(_claim(day, item)) == (Reason.PRICE_UNKNOWN, "waiting")
    found = _claim(day, item, Ask(MODEL, price=PRICE))
    assert isinstance(found, Claimed) and found.granted is not None and found.granted.micro_usd == 1_000_000
    with day.store.database.owner(day.owner.id) as connection:
        connection.execute(text("update service_configs set config = '{\"daily\": 7}' where service = 'limits'"))
    assert _refused(_claim(day, day.item())) == (Reason.LIMITS_INVALID, "waiting")


@pytest.mark.parametrize("service", sorted(SERVICE_TABLES))
def test_the_kill_switch_and_a_pause_stop_the_claims_of_every_service(day: World, service: str) -> None:
    item = _raw(day, service)
    for kind, reason in (("kill", Reason.KILL_SWITCH), ("pause", Reason.PAUSED)):
        day.store.queue.switch(f"owner:{day.owner.id}", kind, "test", actor="test")
        found = day.store.queue.claim(item, service, run_id="r", pools=lambda _k, _p: {service: 1}, lease_s=60)
        assert _refused(found) == (reason, "waiting")
    day.store.queue.unswitch(f"owner:{day.owner.id}")


def test_the_kill_switch_speaks_before_a_pause_and_both_before_a_budget(day: World) -> None:
    _limit(day, daily={"tokens": 0})
    item, queue = day.item(), day.store.queue
    queue.switch(f"owner:{day.owner.id}", "kill", "test", actor="test")
    queue.switch("service:code_review", "pause", "test", actor="test")
    try:
        assert _refused(_claim(day, item)) == (Reason.KILL_SWITCH, "waiting")
        queue.unswitch(f"owner:{day.owner.id}")
        assert _refused(_claim(day, item)) == (Reason.PAUSED, "waiting")
    finally:
        queue.unswitch("service:code_review")
    assert _refused(_claim(day, item)) == (Reason.BUDGET_ZERO, "waiting")


def test_automation_starts_a_subject_so_often_and_a_person_always(day: World) -> None:
    _limit(day, automation_starts=3, author_burst=100)
    for _ in range(3):
        claim = _claim(day, day.item(7))
        assert day.store.queue.conclude(claim, "cancelled", Reason.PULL_CLOSED)
    item = day.item(7)
    assert _refused(_claim(day, item)) == (Reason.LOOP_GUARDED, "cancelled")
    assert day.store.queue.reopen(item, actor="person")
    claim = _claim(day, item)
    assert isinstance(claim, Claimed) and claim.by_person
    day.store.queue.conclude(claim, "cancelled", Reason.PULL_CLOSED)
    day.clock.advance(timedelta(hours=25))
    assert isinstance(_claim(day, day.item(7)), Claimed)


def test_an_author_starts_so_many_and_the_rest_wait(day: World) -> None:
    _limit(day, author_burst=2, author_starts_per_hour=60)
    items = [day.item() for _ in range(3)]
    assert [isinstance(_claim(day, one), Claimed) for one in items] == [True, True, False]
    (waiting,) = day.store.queue.items(owner_id=day.owner.id, state="waiting")
    assert waiting["reason"] == Reason.AUTHOR_RATE_LIMITED
    day.clock.advance(waiting["not_before"] - day.clock.now())
    assert isinstance(_claim(day, items[2]), Claimed)


def test_who_finds_no_slot_has_paid_no_token(day: World) -> None:
    _limit(day, author_burst=1, author_starts_per_hour=0.001)
    item = day.item()
    for _ in range(3):
        assert _refused(_claim(day, item, cap=0)) == (Reason.NO_SLOT, "waiting")
    assert isinstance(_claim(day, item), Claimed)


def test_an_owner_over_its_budget_that_still_spends_is_told(day: World) -> None:
    _limit(day, daily={"tokens": 1_000}, services={"code_review": {"tokens": 1_000}})
    claim, session = day.launched()
    _spend(day, claim, Usage(900, 0), session, "meter")
    assert [one for one in day.store.spend.over_budget() if one["owner"] == day.owner.name] == []
    _spend(day, claim, Usage(1_100, 0), session, "meter")
    assert {one["scope"] for one in day.store.spend.over_budget() if one["owner"] == day.owner.name} == {"", "code_review"}


def test_a_cap_like_the_owners_budget_counts_what_was_spent_once(day: World) -> None:
    _limit(day, daily={"tokens": 1_000})

    def cap(config: dict[str, Any], revision: int) -> None:
        day.store.owners.put_config(day.owner.id, CAP, config, enabled=True, expected_revision=revision, actor="operator")

    def told() -> list[tuple[str, int]]:
        return [(one["scope"], int(one["tokens"])) for one in day.store.spend.over_budget() if one["owner"] == day.owner.name]

    cap({"tokens": 1_000, "usd": None}, 0)
    claim, session = day.launched()
    _spend(day, claim, Usage(600, 0), session, "meter")
    assert told() == []
    cap({"tokens": 500, "usd": None}, 1)
    assert told() == [("", 500)]
    day.clock.advance(timedelta(seconds=1))
    cap({"tokens": 400, "usd": None}, 2)
    assert told() == [], "nothing was spent since it was lowered"
    _spend(day, claim, Usage(700, 0), session, "meter")
    assert told() == [("", 400)]
    cap({"tokens": "many"}, 3)
    assert told() == [], "what is no number is nobody's budget; the claims stop"


def test_who_raises_a_budget_wakes_also_what_a_claim_puts_off_meanwhile(day: World) -> None:
    """The claim has read the old budget and commits later."""
    revision = _limit(day, daily={"tokens": 0})
    item = day.item()
    raising = threading.Thread(target=lambda: _limit(day, revision, daily={}))
    read = standing.read_limits

    def reading(*args: Any) -> LimitsConfig | None:
        found = read(*args)
        raising.start()
        raising.join(0.5)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kilo_pipelines.store.queue.read_limits", reading)
        assert _refused(_claim(day, item)) == (Reason.BUDGET_ZERO, "waiting")
    raising.join(10)
    assert isinstance(_claim(day, item), Claimed)
    assert _not_before(day, item) <= day.clock.now()


def _raw(world: World, service: str, *, by_person: bool = False) -> UUID:
    """A waiting item of any service, without its service's row."""
    item = uuid4()
    with world.store.database.owner(world.owner.id) as connection:
        connection.execute(
            text(
                "insert into work_items (owner_id, id, service, subject_key, repository_id, by_person, not_before, created_at, updated_at)"
                " values (:owner, :id, :service, 's', :repository, :person, now(), now(), now())"
            ),
            {"owner": world.owner.id, "id": item, "service": service, "repository": world.repository, "person": by_person},
        )
    return item


def _effects(world: World, item: UUID) -> list[tuple[str, str | None]]:
    return [(one["state"], one["reason"]) for one in world.store.outbox.of_item(item)]


def _settled(world: World, subject: str, *keys: str) -> UUID:
    """A review that ended with these intents."""
    claim, held = world.running()
    world.store.sessions.finish(held, status="completed", reason=None, result={})
    with world.store.settlements.open(claim.item_id) as tx:
        assert tx is not None
        effects = [intent(key, subject) for key in keys]
        tx.conclude(state="completed", reason="reviewed", verdict={}, evidence=None, effects=effects)
    return claim.item_id


def test_what_only_suggests_writes_nothing_and_one_effect_is_released_as_it_was_shown(day: World) -> None:
    outbox = day.store.outbox
    _limit(day, suggest_only=["code_review"])
    item = _settled(day, "s", "first")
    assert _effects(day, item) == [("held", Reason.SUGGEST_ONLY)]
    assert day.state(item) == "completed", "the slot is free with the verdict"
    assert outbox.claim_next(item) is None
    (listed,) = outbox.listed(item_id=item)
    shown = outbox.get(listed["id"])
    assert shown is not None
    assert outbox.release(listed["id"], "0" * 64, actor="p") is None, "another content was shown"
    with day.store.database.owner(day.owner.id) as connection:
        connection.execute(text('update effects set payload = \'{"content": "+1"}\' where id = :id'), {"id": listed["id"]})
    assert outbox.release(listed["id"], shown["sha256"], actor="p") is None, "its content isn't what was shown any more"
    shown = outbox.get(listed["id"])
    assert shown is not None and outbox.release(listed["id"], shown["sha256"], actor="p") == "pending"
    assert outbox.release(listed["id"], shown["sha256"], actor="p") is None
    assert outbox.claim_next(item) is not None
    assert [one["data"]["state"] for one in _audited(day, "effect.approve")] == ["pending"]


def test_a_newer_suggestion_takes_an_older_ones_place_and_old_ones_expire(day: World) -> None:
    scope = "service:code_review"
    day.store.queue.suggest_only(scope, True, "test", actor="operator")
    try:
        old, new = _settled(day, "t", "old"), _settled(day, "t", "new")
    finally:
        assert day.store.queue.suggest_only(scope, False, "", actor="operator")
    assert _effects(day, old) == [("dropped", Reason.SUPERSEDED)]
    assert _effects(day, new) == [("held", Reason.SUGGEST_ONLY)]
    # What was written since is newer than the suggestion: releasing that would turn it back.
    later = _settled(day, "t", "later")
    assert _effects(day, later) == [("pending", None)]
    (listed,) = day.store.outbox.listed(item_id=new)
    shown = day.store.outbox.get(listed["id"])
    assert shown is not None and day.store.outbox.release(listed["id"], shown["sha256"], actor="p") == "dropped"
    _limit(day, suggest_only=["all"])
    kept = _settled(day, "u", "kept")
    day.clock.advance(timedelta(days=14))
    assert day.store.recovery.reap()["effect_held"] >= 1
    assert _effects(day, kept) == [("dropped", Reason.SUGGESTION_EXPIRED)]


@pytest.mark.parametrize(
    ("service", "origin", "state"), [("remediation", "manual", "cancelled"), ("dismissal", "automatic", "cancelled")]
)
def test_what_would_write_before_anybody_looked_is_not_started(day: World, service: str, origin: str, state: str) -> None:
    item = _raw(day, service, by_person=origin == "manual")
    _limit(day, suggest_only=["all"])
    found = day.store.queue.claim(item, service, run_id="r", pools=lambda _k, _p: {service: 1}, lease_s=60)
    assert _refused(found) == (Reason.SUGGEST_ONLY, state)
