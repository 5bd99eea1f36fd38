"""What a missed delivery is, and what is done about it: nothing is lost, nothing is asked for twice, everything ends."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilo_pipelines.core.delivery_gaps import (
    GRACE,
    MAX_ASKS,
    MAX_PULLS,
    OVERLAP,
    PULL_CAP,
    RETENTION,
    WINDOW,
    Action,
    Attempt,
    Gap,
    GapState,
    Standing,
    by_guid,
    next_step,
    pull_wait,
    standing,
)
from kilo_pipelines.core.events import ADMITTED, LIFECYCLE
from kilo_pipelines.core.reasons import Reason

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
TICK = timedelta(minutes=10)
EVENTS = st.sampled_from([*sorted(ADMITTED | LIFECYCLE), "push", "star"])


def attempt(
    number: int = 1, guid: str = "g", age: timedelta = timedelta(hours=1), answered: bool = False, event: str = "pull_request"
) -> Attempt:
    return Attempt(number, guid, NOW - age, answered, event, "opened", 7, 8)


@st.composite
def logs(draw: st.DrawFn) -> list[Attempt]:
    """Attempts of a few events, some in two pages at once."""
    found = []
    for guid in draw(st.lists(st.sampled_from("abcde"), max_size=5, unique=True)):
        event = draw(EVENTS)
        for number in range(draw(st.integers(1, 3))):
            age = timedelta(seconds=draw(st.integers(0, 4 * 24 * 3600)))
            found.append(attempt(ord(guid) * 10 + number, guid, age, draw(st.booleans()), event))
    return found + draw(st.lists(st.sampled_from(found), max_size=3)) if found else []


def judged(attempts: list[Attempt], **more: object) -> dict[str, Standing]:
    known: dict[str, object] = {"connected_at": NOW - timedelta(days=9), "suspended": False, "stored": False, "provider_now": NOW}
    return {guid: standing(some, **{**known, **more}) for guid, some in by_guid(attempts).items()}  # type: ignore[arg-type]


@given(logs(), st.randoms(use_true_random=False))
def test_pages_in_any_order_and_lines_seen_twice_are_judged_alike(log: list[Attempt], chance: object) -> None:
    shuffled = list(log)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    assert judged(shuffled) == judged(log) and by_guid(shuffled) == by_guid(log)


@given(logs())
def test_nothing_of_ours_is_lost(log: list[Attempt]) -> None:
    """What a service or the integration takes and isn't stored is missing or too young, and then the overlap brings it again."""
    for guid, how in judged(log).items():
        newest = max((one for one in log if one.guid == guid), key=lambda one: (one.delivered_at, one.id))
        taken = newest.event in ADMITTED | LIFECYCLE
        young = newest.delivered_at > NOW - GRACE
        assert how is (Standing.NOT_TAKEN if not taken else Standing.TOO_YOUNG if young else Standing.MISSING)
    assert OVERLAP > GRACE


@given(logs())
def test_what_is_stored_or_not_ours_is_never_missing(log: list[Attempt]) -> None:
    for more in ({"stored": True}, {"connected_at": None}, {"connected_at": NOW + timedelta(days=1)}):
        assert Standing.MISSING not in judged(log, **more).values()
    suspended = judged(log, suspended=True)
    lifecycle = {one.guid for one in log if one.event in LIFECYCLE}
    assert {guid for guid, how in suspended.items() if how is Standing.MISSING} <= lifecycle


@given(st.timedeltas(timedelta(minutes=-9), timedelta(minutes=9)))
def test_a_clock_that_is_wrong_by_minutes_makes_no_gap_and_hides_none(skew: timedelta) -> None:
    """Ages are told by the provider's own clock; ours only says when an installation was connected, give or take the overlap."""
    assert judged([attempt(age=timedelta())], connected_at=NOW + skew) == {"g": Standing.TOO_YOUNG}
    assert judged([attempt(age=GRACE)], connected_at=NOW + skew - GRACE) == {"g": Standing.MISSING}


def gap(**more: object) -> Gap:
    made = Gap("pull_request", GapState.MISSING, False, 0, 0, NOW, NOW + RETENTION, True, False, None)
    return replace(made, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("more", "action", "state", "reason"),
    [
        ({}, Action.ASK, None, None),
        ({"answered": True}, Action.PULL, None, None),
        ({"event": "installation"}, Action.PULL, None, None),
        ({"state": GapState.ASKED, "asks": 1}, Action.PULL, None, None),
        ({"state": GapState.ASKED, "asks": 1, "not_before": NOW + WINDOW}, Action.WAIT, None, None),
        ({"stored_by_pull": False}, Action.END, GapState.REPAIRED, Reason.DELIVERY_REPAIRED),
        ({"stored_by_pull": True}, Action.END, GapState.PULLED, Reason.DELIVERY_PULLED),
        ({"connected": False}, Action.END, GapState.GAVE_UP, Reason.INTEGRATION_UNKNOWN),
        ({"suspended": True}, Action.END, GapState.GAVE_UP, Reason.INTEGRATION_SUSPENDED),
        ({"suspended": True, "event": "installation"}, Action.PULL, None, None),
        ({"deadline": NOW}, Action.END, GapState.GAVE_UP, Reason.DELIVERY_EXPIRED),
        ({"pulls": MAX_PULLS}, Action.END, GapState.GAVE_UP, Reason.RETRIES_EXHAUSTED),
        ({"deadline": NOW, "stored_by_pull": False}, Action.END, GapState.REPAIRED, Reason.DELIVERY_REPAIRED),
    ],
)
def test_each_gap_has_its_next_step(
    more: dict[str, object], action: Action, state: GapState | None, reason: Reason | None
) -> None:
    step = next_step(gap(**more), NOW)
    assert (step.action, step.state, step.reason) == (action, state, reason)


def test_what_a_run_may_ask_for_no_more_is_pulled() -> None:
    assert next_step(gap(), NOW, may_ask=False).action is Action.PULL


@given(
    st.sampled_from(sorted(ADMITTED | LIFECYCLE)),
    st.booleans(),
    st.lists(st.tuples(st.booleans(), st.integers(1, 40)), min_size=1, max_size=600),
)
def test_every_gap_ends_and_its_redelivery_is_asked_for_once(event: str, answered: bool, world: list[tuple[bool, int]]) -> None:
    """Runs at whatever distance, each of whose requests may fail: bounded tries, then an end with a reason."""
    now, state = NOW, gap(event=event, answered=answered)
    asks = pulls = 0
    for works, minutes in world:
        step = next_step(state, now)
        if step.action is Action.END:
            assert step.state is not None and step.reason is not None
            break
        if step.action is Action.ASK:
            asks += 1
            stored = False if works else None
            state = replace(state, state=GapState.ASKED, asks=asks, not_before=now + WINDOW, stored_by_pull=stored)
        elif step.action is Action.PULL:
            pulls += 1
            stored = True if works else None
            state = replace(state, pulls=pulls, not_before=now + pull_wait(pulls - 1), stored_by_pull=stored)
        now += timedelta(minutes=minutes)
    assert asks <= MAX_ASKS and pulls <= MAX_PULLS and not (event in LIFECYCLE and asks)
    assert next_step(state, NOW + RETENTION).action is Action.END


def test_two_runs_are_enough_when_the_ingress_stays_away() -> None:
    """The promise: asked for at the first one, pulled at the second."""
    first = next_step(gap(), NOW)
    asked = gap(state=GapState.ASKED, asks=1, not_before=NOW + WINDOW)
    assert first.action is Action.ASK and next_step(asked, NOW + TICK).action is Action.PULL


def test_failed_pulls_wait_longer_and_longer_and_end_before_github_forgets() -> None:
    waits = [pull_wait(number) for number in range(MAX_PULLS)]
    assert waits == sorted(waits) and waits[0] >= timedelta(minutes=1) and waits[-1] == PULL_CAP
    assert timedelta(hours=3) < sum(waits, timedelta()) < RETENTION
