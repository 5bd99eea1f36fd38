"""kill -9 in the middle of a review: of the pool child, the whole worker, the daemon, the ingress, the model proxy, all of it.

Nothing is lost and nothing is done twice: one review, one summary, one check stand on the pull request (invariants 1-5).
"""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psutil
import psycopg
import pytest
from sqlalchemy import text

from tests.support.figures import Figures
from tests.support.platform import RunningPlatform


@pytest.fixture(scope="module")
def platform() -> Iterator[RunningPlatform]:
    found = RunningPlatform("slow")
    yield found
    # After all the killing: no slot is held, everything stops in time and nothing stays behind.
    # The first review that `up` shows was killed beside the tests' own: it ends too, and every slot is free.
    found.wait(lambda: _held_slots(found) == 0, 60)
    seconds = found.stop()
    left = [one for one in psutil.process_iter() if str(found.home) in " ".join(_cmdline(one))]
    found.close()
    assert left == [] and seconds < 10


def _held_slots(found: RunningPlatform) -> int:
    with found.store.database.owner(found.owner) as connection:
        return int(connection.execute(text("select count(*) from owner_slots where item_id is not null")).scalar_one())


def _pool_child(platform: RunningPlatform) -> None:
    """The prefork child that holds the running sandbox."""
    for child in platform.child("worker-agents").children():
        if child.children():
            child.kill()


def _kill(name: str) -> Callable[[RunningPlatform], None]:
    def kill(platform: RunningPlatform) -> None:
        for process in [*platform.child(name).children(recursive=True), platform.child(name)]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue

    return kill


_MODEL_PROXY = _kill("model-proxy")


def _backends(platform: RunningPlatform) -> None:
    """Every connection to the database is cut, as by a fail-over."""
    for login, url in platform.settings.database_logins().items():
        if login == "migrator":
            continue
        with psycopg.connect(re.sub(r"\+psycopg2?", "", url), autocommit=True) as connection:
            connection.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where usename = current_user and pid <> pg_backend_pid()"
            )


def _broker_without_data(platform: RunningPlatform) -> None:
    """The broker's machine is lost: it starts again with an empty memory."""
    _kill("redis")(platform)
    for left in (platform.settings.home / "redis").glob("appendonly*"):
        left.unlink()


def _supervisor(platform: RunningPlatform) -> None:
    """Everything at once: the supervisor first, so that it restarts nothing."""
    children = psutil.Process(platform.process.pid).children(recursive=True)
    platform.process.send_signal(signal.SIGKILL)
    platform.process.wait(10)
    for process in children:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    platform.store.database.dispose()
    platform.start()


# One of each kind: a worker, the orchestrator, the broker with its memory, the database, everything. The others take the same
# ways through recovery and are killed in the full form.
BOUNDED = {"agents-worker", "daemon", "broker-without-data", "postgres", "everything"}


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "kill",
    [
        _pool_child,
        _kill("worker-agents"),
        _kill("dagster-daemon"),
        _kill("ingress"),
        _kill("dagster-code"),
        _MODEL_PROXY,
        _kill("redis"),
        _broker_without_data,
        _kill("postgres"),
        _backends,
        _supervisor,
    ],
    ids=[
        "pool-child",
        "agents-worker",
        "daemon",
        "ingress",
        "code-server",
        "model-proxy",
        "broker",
        "broker-without-data",
        "postgres",
        "backends",
        "everything",
    ],
)
def test_a_review_completes_once_whatever_is_killed(
    platform: RunningPlatform,
    kill: Callable[[RunningPlatform], Any],
    full: bool,
    figures: Figures,
    request: pytest.FixtureRequest,
) -> None:
    if not full and request.node.callspec.id not in BOUNDED:
        pytest.skip("killed in the full form: make suite-crash")
    pull = platform.control("open-pull", kind="planted")
    platform.at_work(pull)
    kill(platform)
    killed = time.monotonic()
    row = platform.settled(pull, 240)
    figures(tried=1, settled_s=round(time.monotonic() - killed, 1))
    seen = platform.read(pull)
    session = platform.store.sessions.get(row.session_id) if row.session_id else None
    if row.state == "failed":
        # The model's only door died under the agent: the review ends with its reason and isn't green.
        assert kill is _MODEL_PROXY and row.reason in ("model_unreachable", "agent_crashed"), session
        assert seen["check_runs"][0]["conclusion"] == "failure"
        return
    assert (row.state, row.reason) == ("completed", "reviewed")
    assert len(seen["reviews"]) == 1 and len(seen["comments"]) == 1 and len(seen["check_runs"]) == 1
    assert seen["check_runs"][0]["conclusion"] == "failure"
    assert len(seen["review_comments"]) == 5


# Of the supervised processes, those whose death in a review's way must not be seen afterwards.
VICTIMS = ("ingress", "dagster-code", "dagster-daemon", "worker-dispatch", "worker-agents", "redis")


@pytest.mark.timeout(3_600)
def test_random_kills_leave_one_review_each(platform: RunningPlatform, full: bool, figures: Figures) -> None:
    """Whole processes at random moments of a review's life, two in each."""
    chance = random.Random(5)
    for _ in range(30 if full else 1):
        pull = platform.control("open-pull", kind="planted")
        for _ in range(2):
            time.sleep(chance.uniform(0, 2.5))
            platform.wait(lambda: all(platform.alive(name) for name in VICTIMS), 30)
            _kill(chance.choice(VICTIMS))(platform)
        if platform.delivery_lost(pull):  # GitHub never redelivers by itself: a person, or the repair, does
            platform.wait(partial(platform.redelivered, pull), 30)
        row = platform.settled(pull, 240)
        seen = platform.read(pull)
        figures(tried=1, lost=row.state != "completed", duplicated=len(seen["reviews"]) + len(seen["comments"]) != 2)
        assert (row.state, len(seen["reviews"]), len(seen["comments"]), len(seen["check_runs"])) == ("completed", 1, 1, 1)


@pytest.mark.timeout(3_600)
def test_the_daemon_dies_at_its_own_crash_points(platform: RunningPlatform, full: bool, figures: Figures) -> None:
    """Between the tick's rows and the runs that it asks for: what was offered is offered again."""
    if not full:  # a minute: what the dead one had offered is offered again only when that has lapsed
        pytest.skip("killed in the full form: make suite-crash")
    for point in ("TICK_CREATED", "TICK_HELD", "RUN_CREATED", "RUN_LAUNCHED"):
        daemon = platform.child("dagster-daemon")
        daemon.suspend()
        try:
            pull = platform.control("open-pull", kind="planted")
            assert platform.crash_daemon(point) == -signal.SIGKILL, f"nobody came by {point}"
        finally:
            daemon.resume()
        row = platform.settled(pull, 120)
        seen = platform.read(pull)
        figures(tried=1, lost=row.state != "completed", duplicated=len(seen["reviews"]) != 1)
        assert (row.state, len(seen["reviews"]), len(seen["comments"]), len(seen["check_runs"])) == ("completed", 1, 1, 1)


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []
