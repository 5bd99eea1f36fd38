"""kill -9 of the process that takes a hosted session's step: the review goes on, and one session with one turn ran at the service."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from kilo_pipelines import failpoints
from tests.conftest import Database
from tests.support.engine import KILLED, LEASE_SECONDS
from tests.support.hosted import Hosted, hosted_platform, time_for_the_agent

STORE = Path(failpoints.__file__).parent / "store" / "hosted.py"
# Only read.
READS = {"get"}
# An offer that is lost is made again (tests/store/test_hosted.py).
OFFERS = {"offers"}
STEPS = {"claim", "_write", "_after_the_end"}
# Between the service's answer and our commit, and on both sides of each commit, at its first time.
POINTS = ["after:hosted_prepare", "after:hosted_initiate"]
POINTS += [f"{moment}:store.hosted.Hosted.{step}" for step in sorted(STEPS) for moment in ("before", "after")]


@pytest.fixture(scope="module")
def platform(database: Database) -> Iterator[Hosted]:
    with hosted_platform(database.logins) as made:
        made.accept_reported(accepted=True)
        made.service()
        yield made


def test_every_durable_step_is_killed() -> None:
    (room,) = [one for one in ast.parse(STORE.read_text()).body if isinstance(one, ast.ClassDef) and one.name == "Hosted"]
    writing = {one.name for one in room.body if isinstance(one, ast.FunctionDef) and "self._database.owner" in ast.unparse(one)}
    offering = {one.name for one in room.body if isinstance(one, ast.FunctionDef) and "OFFER_" in ast.unparse(one)}
    assert (writing - READS, offering) == (STEPS, OFFERS)


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_step_costs_time_and_no_second_session(platform: Hosted, point: str) -> None:
    before = len(platform.told()["sessions"])
    _, item, session = platform.launched()
    armed = platform.engine.points / point
    armed.touch()
    killed = 0
    for _ in range(20):
        code, _ = platform.engine.child(lambda store: platform.take(store, session))
        killed += code == KILLED
        held = platform.store.hosted.get(session)
        if held is not None and held["state"] == "closed":
            break
        # The lease of a dead step, the poll of a parked one.
        platform.clock.advance(timedelta(seconds=max(LEASE_SECONDS, 61)))
        platform.store.recovery.reap()
        time_for_the_agent()
    assert (killed, armed.exists()) == (1, False)
    row = platform.store.sessions.get(session)
    assert row is not None and row.state == "completed"
    sessions = platform.told()["sessions"][before:]
    assert [len(one["turns"]) for one in sessions if one["initiated"]] == [1]
    assert all(one["deleted"] for one in sessions if one["initiated"])
    platform.runs()
    assert platform.store.queue.get(item).state == "completed"  # type: ignore[union-attr]
