"""kill -9 in the middle of a review: of the pool child, the whole worker, the daemon, the ingress, the model proxy, all of it.

Nothing is lost and nothing is done twice: one review, one summary, one check stand on the pull request (invariants 1-5).
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from sqlalchemy import text

from tests.support.platform import RunningPlatform


@pytest.fixture(scope="module")
def platform() -> Iterator[RunningPlatform]:
    found = RunningPlatform("slow")
    yield found
    # After all the killing: no slot is held, everything stops in time and nothing stays behind.
    with found.store.database.owner(found.owner) as connection:
        held = connection.execute(text("select count(*) from owner_slots where item_id is not null")).scalar()
    seconds = found.stop()
    left = [one for one in psutil.process_iter() if str(found.home) in " ".join(_cmdline(one))]
    found.close()
    assert (held, left) == (0, []) and seconds < 10


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
        _supervisor,
    ],
    ids=["pool-child", "agents-worker", "daemon", "ingress", "code-server", "model-proxy", "broker", "everything"],
)
def test_a_review_completes_once_whatever_is_killed(platform: RunningPlatform, kill: Callable[[RunningPlatform], Any]) -> None:
    pull = platform.control("open-pull", kind="planted")
    platform.at_work(pull)
    kill(platform)
    row = platform.settled(pull, 240)
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


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []
