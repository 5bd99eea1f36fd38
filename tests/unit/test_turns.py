"""The spacing of dispatches over shards."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilo_pipelines.sensors import DAGSTER_LOOP_SECONDS, Turns


@given(st.integers(1, 32), st.lists(st.floats(0, 2), max_size=200))
def test_a_flood_never_sends_all_shards_away_at_once(shards: int, gaps: list[float]) -> None:
    """In any loop of Dagster at most half of the shards at once and then one every loop / shards leave: one is always there."""
    turns, now, taken = Turns(shards), 1_000.0, []
    for gap in gaps:
        now += gap
        if turns.take(now) == 0:
            taken.append(now)
    for start in taken:
        within = [one for one in taken if start <= one < start + DAGSTER_LOOP_SECONDS / 2]
        assert len(within) <= max(1, shards // 2) + shards / 2 + 1


@given(st.integers(2, 32))
def test_who_waits_as_told_has_a_turn(shards: int) -> None:
    turns, now = Turns(shards), 0.0
    for _ in range(3 * shards):
        wait = turns.take(now)
        if wait:
            assert wait <= DAGSTER_LOOP_SECONDS
            now += wait + 1e-9
            assert turns.take(now) == 0


@given(st.integers(2, 32))
def test_a_turn_that_led_to_nothing_costs_nothing(shards: int) -> None:
    turns = Turns(shards)
    for _ in range(1_000):
        assert turns.take(5.0) == 0
        turns.give_back()


def test_a_quiet_platform_is_never_held_up() -> None:
    """Two deliveries a second on sixteen shards, evenly or two at once."""
    turns = Turns(16)
    assert all(turns.take(second + part) == 0 for second in range(600) for part in (0.0, 0.0))
    assert Turns(1).take(0.0) == pytest.approx(0.0)
