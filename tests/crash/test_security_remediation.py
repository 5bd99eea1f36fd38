"""kill -9 around each commit of a remediation's own and around the opening of its pull request: one pull request, confirmed once."""

from __future__ import annotations

import ast
import os
import signal
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from dagster import DagsterInstance

from kilo_pipelines import failpoints
from kilo_pipelines.core.clock import ManualClock
from kilo_pipelines.core.effects import EffectKind
from kilo_pipelines.store import Store
from tests.conftest import Database
from tests.support.figures import Figures
from tests.support.git import git
from tests.support.remediation import Shop, analysed, leave
from tests.support.security import Dispatcher, syncing, with_model
from tests.support.twin import Twin

ROOM = Path(failpoints.__file__).parent / "store" / "remediations.py"
READS = {"_read"}
# What only sessions do that write: the outcome kept before the push, and the push.
ENGINE_STEPS = {"store.sessions.Sessions.accept"}
PUSH = {"push"}
SENDS = {f"send.{EffectKind.GITHUB_PULL_REQUEST}"}


def _steps() -> set[str]:
    """Every function of the room that opens a transaction to write, the push, and the write to the provider."""
    return (
        SENDS
        | ENGINE_STEPS
        | PUSH
        | {
            f"store.remediations.{node.name}.{one.name}"
            for node in ast.parse(ROOM.read_text()).body
            if isinstance(node, ast.ClassDef)
            for one in node.body
            if isinstance(one, ast.FunctionDef) and "_database." in ast.unparse(one) and one.name not in READS
        }
    )


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twin]:
    with syncing(tmp_path_factory.mktemp("c")) as running, with_model(running):
        yield running


@pytest.fixture
def points(tmp_path: Path) -> Iterator[Path]:
    found = tmp_path / "points"
    found.mkdir()
    yield found
    failpoints.arm(None)


def _killed(database: Database, shop: Shop, points: Path, work: Callable[[Shop, Database], None]) -> bool:
    """Works in a process of its own with failpoints; whether it was killed. Anything but a kill or success fails the test."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            failpoints.arm(points)
            clock = ManualClock(database.clock.now())
            store = Store(database.logins["app"], database.logins["system"], database.store.cipher, clock)
            shop.store, shop.clock = store, clock
            work(shop, Database(database.logins, store, clock))
            status = 0
        finally:
            os._exit(status)
    ended = os.waitpid(pid, 0)[1]
    killed = os.WIFSIGNALED(ended) and os.WTERMSIG(ended) == signal.SIGKILL
    assert killed or os.WEXITSTATUS(ended) == 0, "the process failed by itself"
    return killed


def _through(database: Database, twin: Twin, home: Path, points: Path) -> tuple[int, list[str]]:
    """Asked for, opened, merged, confirmed; every step is done again after a kill. Kills, and what is wrong in the end."""
    home.mkdir()
    shop = Shop(database, twin, home)
    analysed(shop, shop.finding("twin-unpack"))

    def ask(inner: Shop, again: Database) -> None:
        if not inner.store.remediations.of_owner(inner.id):
            inner.asked(inner.finding("twin-unpack"))
        with DagsterInstance.ephemeral() as instance:
            Dispatcher(again, instance).work(inner.id)

    def follow(inner: Shop, _again: Database) -> None:
        inner.sync()

    kills = 0
    for step, done in ((ask, lambda row: row.effect_state == "applied"), (follow, lambda row: row.confirmed_at is not None)):
        for _ in range(6):
            kills += _killed(database, shop, points, step)
            database.clock.advance(timedelta(minutes=31))  # longer than any lease and than the wait after a lost answer
            database.store.recovery.reap()
            rows = shop.store.remediations.of_owner(shop.id)
            if rows and done(rows[0]):
                break
        if step is ask:
            for pull in shop.pulls():
                twin.control("merge", repository=shop.full_name, number=pull["number"])
            twin.control("scan", repository=shop.full_name)
    leave(database, shop.id)
    rows = shop.store.remediations.of_owner(shop.id)
    wrong = [] if [one.state for one in rows] == ["completed"] else [f"lost or twice: items {[one.state for one in rows]}"]
    branches = git(
        shop.twin.home / "git" / f"{shop.full_name}.git", "for-each-ref", "refs/heads/security-remediation"
    ).splitlines()
    wrong += [] if len(branches) == 1 else [f"lost or twice: {len(branches)} branches"]
    wrong += [] if len(shop.pulls()) == 1 else [f"lost or twice: {len(shop.pulls())} pull requests"]
    for action in ("queued", "pushed", "pr_opened", "pr_merged", "confirmed"):
        count = len(shop.audited(f"security.remediation.{action}"))
        wrong += [] if count == 1 else [f"lost or twice: {count} times {action}"]
    return kills, wrong


def test_a_kill_at_any_step_of_a_remediation_leaves_one_pull_request_that_is_confirmed_once(
    database: Database, twin: Twin, tmp_path: Path, points: Path, full: bool, figures: Figures
) -> None:
    record = points / "record"
    record.write_text("")
    assert _through(database, twin, tmp_path / "whole", points) == (0, [])
    reached = {one for one in record.read_text().split() if one.partition(":")[2] in _steps()}
    record.unlink()
    assert {one.partition(":")[2] for one in reached} == _steps()
    faults = []
    for number, point in enumerate(sorted(reached) if full else sorted(one for one in reached if "after:" in one)):
        (points / point).touch()
        kills, wrong = _through(database, twin, tmp_path / str(number), points)
        figures(tried=1, lost=sum("lost" in one for one in wrong), duplicated=sum("twice" in one for one in wrong))
        faults += [f"{point}: {one}" for one in (*wrong, *([] if kills else ["the point was never reached"]))]
    assert faults == []
