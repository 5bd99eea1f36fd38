"""Rate budgets as a pure function of time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from kilo_pipelines.core.rates import Bucket, Rate, full, take

START = datetime(2026, 1, 1, tzinfo=UTC)
rates = st.builds(Rate, per_hour=st.floats(1, 100_000), burst=st.floats(1, 1_000))
steps = st.lists(st.tuples(st.floats(-60, 7_200), st.floats(0.5, 50)), min_size=1, max_size=40)


@given(rate=rates, steps=steps)
def test_never_more_is_given_than_burst_and_refill(rate: Rate, steps: list[tuple[float, float]]) -> None:
    """Over any history, also with a clock that goes back."""
    bucket, now, latest, given_out = full(rate, START), START, START, 0.0
    for seconds, cost in steps:
        now += timedelta(seconds=seconds)
        latest = max(latest, now)
        taken = take(bucket, rate, cost, now)
        bucket = taken.bucket
        if taken.wait_until is None:
            given_out += cost
        # A cost above the burst may owe once.
        allowed = rate.burst + (latest - START).total_seconds() * rate.per_hour / 3600 + max(0.0, cost - rate.burst)
        assert given_out <= allowed * 1.000001 + max(cost for _, cost in steps)


@given(rate=rates, cost=st.floats(0.5, 5_000), spent=st.floats(0, 1_000))
def test_after_the_told_wait_the_tokens_are_there(rate: Rate, cost: float, spent: float) -> None:
    """One told wait is enough: nobody is sent round in circles."""
    bucket = Bucket(rate.burst - spent, START)
    first = take(bucket, rate, cost, START)
    if first.wait_until is not None:
        assert first.wait_until > START
        again = take(first.bucket, rate, cost, first.wait_until + timedelta(milliseconds=1))
        assert again.wait_until is None


def test_a_providers_own_wait_stands_above_the_tokens() -> None:
    blocked = Bucket(100, START, START + timedelta(seconds=30))
    assert take(blocked, Rate(3600, 100), 1, START).wait_until == START + timedelta(seconds=30)
    assert take(blocked, Rate(3600, 100), 1, START + timedelta(seconds=30)).wait_until is None


@given(rate=rates, spent=st.floats(0, 1_000), leave=st.floats(0, 2_000))
def test_who_leaves_something_never_takes_it(rate: Rate, spent: float, leave: float) -> None:
    bucket = Bucket(rate.burst - spent, START)
    taken = take(bucket, rate, 0.5, START, leave)
    assert taken.wait_until is not None or bucket.tokens >= min(0.5 + leave, rate.burst)
