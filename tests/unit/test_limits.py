"""What a claim may give, as pure rules: no order of claims, readings and ends spends more than a budget."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kilo_pipelines.core.limits import (
    LEAST_TOKENS,
    Amount,
    Ask,
    Budget,
    Grant,
    LimitsConfig,
    Price,
    Standing,
    Usage,
    cost,
    day_of,
    grant,
    is_near,
    next_day,
)
from kilo_pipelines.core.reasons import Reason

PRICE = Price(input=Decimal(3), output=Decimal(15))
NOTHING = Amount()
amounts = st.integers(0, 5_000_000)


def _standing(
    tokens: int | None = None, usd: str | None = None, *, spent: Amount = NOTHING, reserved: Amount = NOTHING
) -> Standing:
    return Standing(Budget(tokens=tokens, usd=Decimal(usd) if usd else None), spent, reserved)


@given(
    budget=st.integers(1, 3_000_000),
    usd=st.decimals("0.01", "20", places=6),
    steps=st.lists(st.tuples(st.integers(0, 2), st.floats(0, 1)), max_size=60),
)
def test_whatever_is_claimed_used_and_ended_no_budget_is_passed(
    budget: int, usd: Decimal, steps: list[tuple[int, float]]
) -> None:
    """Claims reserve, meters move what is reserved to what is spent, ends give the rest back."""
    config, spent, running = LimitsConfig(), Amount(), []
    limit = Budget(tokens=budget, usd=usd)
    for what, share in steps:
        if what == 0:
            held = Amount(sum(one[0] for one in running), sum(one[1] for one in running))
            found = grant([Standing(limit, spent, held)], Ask(tokens=400_000, price=PRICE), config)
            if isinstance(found, Grant):
                assert found.tokens > 0 and found.micro_usd is not None and found.micro_usd > 0
                running.append((found.tokens, found.micro_usd))
        elif running:
            tokens, micro = running.pop(0)
            used, paid = int(tokens * share), int(micro * share)
            spent = Amount(spent.tokens + used, spent.micro_usd + paid)
            if what == 1:
                running.append((tokens - used, micro - paid))
        assert spent.tokens + sum(one[0] for one in running) <= budget
        assert spent.micro_usd + sum(one[1] for one in running) <= usd * 1_000_000
        assert all(one[0] >= 0 and one[1] >= 0 for one in running)


@given(spent=amounts, reserved=amounts, budget=st.integers(1, 5_000_000))
def test_a_refusal_says_whether_the_day_or_running_work_is_in_the_way(spent: int, reserved: int, budget: int) -> None:
    found = grant([_standing(budget, spent=Amount(spent), reserved=Amount(reserved))], Ask(), LimitsConfig())
    idle = grant([_standing(budget, spent=Amount(spent))], Ask(), LimitsConfig())
    if found is Reason.BUDGET_EXHAUSTED:
        assert idle is Reason.BUDGET_EXHAUSTED
    elif found is Reason.BUDGET_RESERVED:
        assert isinstance(idle, Grant) and reserved
    else:
        assert isinstance(found, Grant) and found.tokens <= budget - spent - reserved


def test_zero_unset_and_small_budgets_mean_what_they_say() -> None:
    assert grant([_standing(0)], Ask(), LimitsConfig()) is Reason.BUDGET_ZERO
    assert grant([_standing(usd="0"), _standing(10**9)], Ask(price=PRICE), LimitsConfig()) is Reason.BUDGET_ZERO
    assert grant([], Ask(tokens=7), LimitsConfig()) == Grant(7, None)
    # A budget below what a session needs is the owner's own choice: one session a day has it all.
    assert grant([_standing(900)], Ask(), LimitsConfig()) == Grant(900, None, cut=True)
    assert grant([_standing(900, spent=Amount(1))], Ask(), LimitsConfig()) is Reason.BUDGET_EXHAUSTED
    # A rest in which nothing can be done isn't burnt.
    rest = _standing(1_000_000, spent=Amount(1_000_001 - LEAST_TOKENS))
    assert grant([rest], Ask(), LimitsConfig()) is Reason.BUDGET_EXHAUSTED


_TOKENS = st.none() | st.integers(0, 10**9)
_USD = st.none() | st.decimals(0, 10_000, places=2)


@given(st.builds(Budget, tokens=_TOKENS, usd=_USD), st.builds(Budget, tokens=_TOKENS, usd=_USD))
def test_the_lower_of_owners_and_operators_word_holds(daily: Budget, cap: Budget) -> None:
    found = LimitsConfig(daily=daily).under(cap).daily
    for mine, theirs, both in ((daily.tokens, cap.tokens, found.tokens), (daily.usd, cap.usd, found.usd)):
        assert both == (mine if theirs is None else theirs if mine is None else min(mine, theirs))


def test_money_without_a_price_is_refused_and_tokens_go_on() -> None:
    assert grant([_standing(usd="5")], Ask(), LimitsConfig()) is Reason.PRICE_UNKNOWN
    assert grant([], Ask(), LimitsConfig(session_usd=Decimal(1))) is Reason.PRICE_UNKNOWN
    assert isinstance(grant([_standing(10**9)], Ask(), LimitsConfig()), Grant)


def test_the_service_the_owner_and_the_session_each_bound_a_grant() -> None:
    config = LimitsConfig(daily=Budget(tokens=500_000), services={"code_review": Budget(tokens=100_000)}, session_tokens=60_000)
    assert [scope for scope, _ in config.scopes("code_review")] == ["", "code_review"]
    assert [scope for scope, _ in config.scopes("remediation")] == [""]
    standings = [_standing(500_000), _standing(100_000, spent=Amount(50_000))]
    assert grant(standings, Ask(), config) == Grant(50_000, None, cut=True)
    assert grant([_standing(500_000)], Ask(), config) == Grant(60_000, None)
    with pytest.raises(ValidationError):
        LimitsConfig(daily=Budget(tokens=1), services={"remediation": Budget(tokens=2)})


@given(tokens_in=st.integers(0, 10**7), tokens_out=st.integers(0, 10**7), cached=st.integers(0, 2 * 10**7))
def test_a_ledger_never_tells_less_than_the_bill(tokens_in: int, tokens_out: int, cached: int) -> None:
    price = Price(input=Decimal("0.15"), output=Decimal("0.6"), cached=Decimal("0.075"))
    found = cost(price, Usage(tokens_in, tokens_out, cached))
    exact = (tokens_in - min(cached, tokens_in)) * Decimal("0.15") + min(cached, tokens_in) * Decimal("0.075")
    exact += tokens_out * Decimal("0.6")
    assert exact <= found < exact + 1
    assert found <= price.worst(tokens_in + tokens_out)


@given(st.floats(0, 6e8), st.integers(-12, 14))
def test_days_are_utc_days_whatever_clock_says_the_moment(seconds: float, hours: int) -> None:
    there = datetime(2020, 1, 1, tzinfo=timezone(timedelta(hours=hours))) + timedelta(seconds=seconds)
    begins = next_day(there)
    assert there < begins <= there + timedelta(days=1) and day_of(begins) == day_of(there) + timedelta(days=1)
    assert day_of(begins - timedelta(microseconds=1)) == day_of(there) == there.astimezone(UTC).date()


def test_the_edge_of_a_day() -> None:
    last = datetime(2026, 2, 28, 23, 59, 59, 999_999, UTC)
    assert (day_of(last), next_day(last)) == (date(2026, 2, 28), datetime(2026, 3, 1, tzinfo=UTC))
    assert day_of(datetime(2026, 3, 1, tzinfo=UTC)) == date(2026, 3, 1)


def test_the_warning_comes_at_its_share_and_not_before() -> None:
    budget = Budget(tokens=1_000, usd=Decimal(1))
    assert not is_near(budget, Amount(799, 799_999), 80)
    assert is_near(budget, Amount(800, 0), 80) and is_near(budget, Amount(0, 800_000), 80)
    assert not is_near(Budget(), Amount(10**9, 10**9), 1)
