"""kill -9 of the process that works on the Security Agent's items, before and after each of its commits: nothing lost, nothing twice."""

from __future__ import annotations

import ast
import os
import signal
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from dagster import DagsterInstance
from sqlalchemy import text

from kilo_pipelines import failpoints
from kilo_pipelines.core.clock import ManualClock
from kilo_pipelines.ops.security_analysis import analyse
from kilo_pipelines.store import Store
from tests.conftest import Database
from tests.support.figures import Figures
from tests.support.security import Dispatcher, Owner, syncing, with_model
from tests.support.twin import Twin

STORE = Path(failpoints.__file__).parent / "store"
# Rooms of the Security Agent's work, and functions of theirs that only read.
ROOMS = ("analyses",)
READS = {"of_finding", "latest", "owners", "candidates", "waiting_automatic", "completed_since"}
# Steps of the engine that only this service's items take.
ENGINE_STEPS = {f"store.queue.Queue.{one}" for one in ("keep", "complete", "block_service", "unblock_service")}


def _steps() -> set[str]:
    """Every function of these rooms that opens a transaction to write."""
    found = set()
    for room in ROOMS:
        for node in ast.parse((STORE / f"{room}.py").read_text()).body:
            if isinstance(node, ast.ClassDef):
                found |= {
                    f"store.{room}.{node.name}.{one.name}"
                    for one in node.body
                    if isinstance(one, ast.FunctionDef) and "_database." in ast.unparse(one) and one.name not in READS
                }
    return found


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twin]:
    with syncing(tmp_path_factory.mktemp("a")) as running, with_model(running):
        yield running


@pytest.fixture
def points(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    failpoints.arm(None)


def _child(database: Database, work: Callable[[Database], None], points: Path) -> bool:
    """Works in a process of its own with failpoints; whether it was killed."""
    pid = os.fork()
    if pid == 0:
        try:
            failpoints.arm(points)
            clock = ManualClock(database.clock.now())
            store = Store(database.logins["app"], database.logins["system"], database.store.cipher, clock)
            work(Database(database.logins, store, clock))
        finally:
            os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def _through(owner: Owner, database: Database, points: Path, first: Callable[[Store], object]) -> int:
    """Has work done to its end by processes that may be killed; how many were."""

    def work(inner: Database) -> None:
        first(inner.store)
        with DagsterInstance.ephemeral() as instance:
            Dispatcher(inner, instance).work(owner.id)

    kills = 0
    for _ in range(6):
        killed = _child(database, work, points)
        kills += killed
        database.clock.advance(timedelta(minutes=31))  # longer than any lease and than the first wait without credit
        database.store.recovery.reap()
        if not killed and not [
            one for one in owner.items("security_analysis") if one.state in ("waiting", "starting", "running")
        ]:
            return kills
    raise AssertionError("it never ends")


def _analysed(owner: Owner, database: Database, points: Path) -> tuple[int, list[str]]:
    """One finding, asked for by hand, settled by its metadata."""
    finding = owner.findings(status="open")[0]

    def ask(store: Store) -> object:
        if store.analyses.of_finding(owner.id, finding.id):
            return None
        return analyse(store, finding, role="owner", actor="test")

    kills = _through(owner, database, points, ask)
    wrong = []
    states = [one.state for one in owner.store.analyses.of_finding(owner.id, finding.id)]
    if states != ["completed"]:
        wrong.append(f"lost or twice: {states}")
    if len(owner.audited("security.finding.analysis_completed")) != 1:
        wrong.append("twice: the audit")
    with owner.store.database.owner(owner.id) as connection:
        held = connection.execute(text("select count(*) from owner_slots where item_id is not null")).scalar()
    if held:
        wrong.append("lost: a slot")
    return kills, wrong


def _blocked(owner: Owner, database: Database, points: Path) -> tuple[int, list[str]]:
    """The same, after an hour without credit."""
    owner.twin.fault("POST", "/chat/completions", status=402)
    return _analysed(owner, database, points)


SCENARIOS = {"analysed": _analysed, "blocked": _blocked}


def test_every_step_is_reached_and_a_kill_there_loses_nothing_and_doubles_nothing(
    database: Database, twin: Twin, points: Path, full: bool, figures: Figures
) -> None:
    record = points / "record"
    reached: dict[str, set[str]] = {}
    for name, scenario in SCENARIOS.items():
        record.write_text("")
        assert scenario(_owner(database, twin), database, points) == (0, [])
        reached[name] = {one for one in record.read_text().split() if one.partition(":")[2] in _steps() | ENGINE_STEPS}
    record.unlink()
    assert {one.partition(":")[2] for found in reached.values() for one in found} == _steps() | ENGINE_STEPS
    faults = []
    for name, found in reached.items():
        for point in sorted(found) if full else sorted(found)[:: 1 if name == "analysed" else 3]:
            (points / point).touch()
            kills, wrong = SCENARIOS[name](_owner(database, twin), database, points)
            figures(tried=1, lost=sum("lost" in one for one in wrong), duplicated=sum("twice" in one for one in wrong))
            faults += [f"{name} killed {point}: {one}" for one in (*wrong, *([] if kills else ["the point was never reached"]))]
    assert faults == []


def _owner(database: Database, twin: Twin) -> Owner:
    owner = Owner(database, twin, 1, 12, analysis_mode="shallow")
    owner.sync()
    return owner
