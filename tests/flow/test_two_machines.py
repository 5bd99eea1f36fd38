"""Two machines: database, broker, ingress and daemon on one, agents on the other; the network between them is cut and restored."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.support.machines import Machines, missing

LEASE_SECONDS = 4.0
REASON = missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    found = Machines(LEASE_SECONDS, "slow")
    try:
        found.build()
        found.start("a", "ingress", "dagster-code", "worker-dispatch")
        found.start("b", "model-proxy", "worker-agents")
        found.wait(lambda: (found.home / "a" / "s" / "code.sock").exists(), 60)
        found.start("a", "dagster-daemon")
        yield found
    finally:
        found.close()


def _sandboxes(machines: Machines) -> int:
    worker = machines.process("b", "worker-agents")
    return sum(1 for one in worker.children(recursive=True) if one.name() == "bwrap")


def test_a_link_that_is_cut_in_a_session_loses_nothing_and_doubles_nothing(machines: Machines) -> None:
    pull = machines.control("open-pull", kind="planted")
    row = machines.wait(lambda: _at_work(machines, pull), 90)
    assert row.session_id is not None
    machines.link(up=False)
    cut = time.monotonic()
    # The cut session stops by itself: nobody can tell it that its lease is over.
    machines.wait(lambda: not _sandboxes(machines), 3 * LEASE_SECONDS)
    stopped = time.monotonic() - cut
    machines.wait(lambda: getattr(machines.store.sessions.get(row.session_id), "state", "") == "queued", 30)
    time.sleep(max(0.0, cut + 3 * LEASE_SECONDS - time.monotonic()))
    machines.link(up=True)
    ended = machines.settled(pull, 90)
    assert stopped < 2 * LEASE_SECONDS
    seen = machines.read(pull)
    assert (ended.state, ended.reason, ended.attempt) == ("completed", "reviewed", 1)
    assert len(seen["reviews"]) == len(seen["comments"]) == len(seen["check_runs"]) == 1 and len(seen["review_comments"]) == 5
    assert seen["check_runs"][0]["conclusion"] == "failure"
    session = machines.store.sessions.get(row.session_id)
    assert session is not None and session.launches == 2, "the same session, launched again: no second one was counted"
    live = {what: count for what, count in machines.store.queue.gauges().items() if what[0] != "effects" and count}
    with machines.store.database.system() as connection:
        held = connection.exec_driver_sql(
            "select (select count(*) from owner_slots where item_id is not null) + (select count(*) from agent_capacity where session_id is not null)"
        ).scalar_one()
    assert held == 0, live


def _at_work(machines: Machines, pull: dict[str, object]) -> object:
    row = machines.review(pull)
    events = machines.store.sessions.events(row.session_id) if row and row.session_id else []
    return row if any(one["kind"] == "agent_started" for one in events) else None
