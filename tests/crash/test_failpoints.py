"""kill -9 before and after every commit of the engine and every write to a provider, on the process that makes it.

The list comes from the code: every function of the store that opens a transaction, and every kind of effect. A new one without
a scenario that reaches it fails.
"""

from __future__ import annotations

import ast
import random
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from kilo_pipelines.core.effects import EffectKind
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store.sessions import QUEUE_SECONDS
from tests.conftest import Database
from tests.crash.test_security_remediation import ENGINE_STEPS as REMEDIATION_STEPS
from tests.crash.test_security_remediation import SENDS
from tests.crash.test_security_work import ENGINE_STEPS
from tests.crash.test_security_work import SENDS as OTHER_SENDS
from tests.support.engine import Engine
from tests.support.figures import Figures

ROOT = Path(__file__).resolve().parents[2] / "kilo_pipelines"
# Opened only to read, or by a person's command that is repeated by hand: nothing durable follows them in another transaction.
NO_STEP = {
    "store.budget.Budgets.block",
    "store.budget.Budgets.take",
    "store.database.Database.check_roles",
    "store.database.Database.schema",
    "store.handover.Handover.busy",
    "store.handover.Handover.restored",
    "store.invariants.Invariants.offenders",
    "store.outbox.Outbox._by_person",
    "store.approvals.Approvals.give",
    "store.outbox.Outbox.get",
    "store.outbox.Outbox.listed",
    "store.outbox.Outbox.owner_of",
    "store.outbox.Outbox.release",
    "store.outbox.Outbox.of_item",
    "store.queue.Queue._audit_switch",
    "store.queue.Queue.attempts",
    "store.queue.Queue.counters",
    "store.queue.Queue.gauges",
    "store.queue.Queue.get",
    "store.queue.Queue.items",
    "store.queue.Queue.open",
    "store.queue.Queue.pause_reason",
    "store.queue.Queue.run_failed",
    "store.queue.Queue.run_lost",
    "store.queue.Queue.suggest_only",
    "store.queue.Queue.switch",
    "store.queue.Queue.switches",
    "store.queue.Queue.unswitch",
    "store.queue.Queue.trace_of",
    "store.queue.owner_of_item",
    "store.recovery.Recovery._effect_held",
    "store.recovery.Recovery._gap_deadline",
    "store.sessions.Sessions._owner",
    "store.sessions.Sessions.ensure_capacity",
    "store.sessions.Sessions.events",
    "store.sessions.Sessions.get",
    "store.spend.Spend.gauges",
    "store.spend.Spend.left",
    "store.spend.Spend.of_item",
    "store.spend.Spend.of_owner",
    "store.spend.Spend.of_session",
    "store.spend.Spend.over_budget",
    "store.spend.Spend.stopped",
    "store.spend.Spend.owners_today",
    "store.spend.Spend.record",  # a meter only grows: what a death keeps back is told with the next reading
    "store.spend.Spend.standing",
}
# Rooms of the store that people and events of the installation use, not the engine's way of an item; syncs: test_security_sync.py,
# the Security Agent's items: test_security_work.py, missed deliveries: tests/flow/test_delivery_repair.py; hosted sessions: test_hosted.py.
NOT_THE_ENGINE = (
    "store.hosted.",
    "store.owners.",
    "store.figures.",
    "store.audit.",
    "store.retention.",
    "store.keys.",
    "store.findings.",
    "store.analyses.",
    "store.notices.",
    "store.remediations.",
    "store.reports.",
    "store.delivery_gaps.",
    "store.people.",
    "store.api_keys.",
    "store.setup_links.",
)


def _opens(node: ast.AST) -> bool:
    return any(
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("owner", "system", "system_statement")
        and ast.unparse(call.func.value).endswith(("_database", "database"))
        for item in ast.walk(node)
        if isinstance(item, ast.With)
        for with_item in item.items
        for call in ast.walk(with_item.context_expr)
    )


def places() -> set[str]:
    """Every place with a commit of the engine, and every kind of write to a provider."""
    found = set()
    for file in sorted((ROOT / "store").glob("*.py")):
        module = f"store.{file.stem}"
        for node in ast.parse(file.read_text()).body:
            inner = [(f"{module}.{node.name}", one) for one in node.body] if isinstance(node, ast.ClassDef) else [(module, node)]
            for prefix, one in inner:
                if isinstance(one, ast.FunctionDef) and _opens(one):
                    found.add(f"{prefix}.{one.name}")
    engine = {
        one for one in found if not one.startswith(NOT_THE_ENGINE) and one not in NO_STEP | ENGINE_STEPS | REMEDIATION_STEPS
    }
    return engine | {f"send.{kind}" for kind in EffectKind} - SENDS - OTHER_SENDS


LATE_SECONDS = 0.2

# -- scenarios: each returns the pull request, what must stand there in the end and which item must have ended how --------------


def _review(engine: Engine) -> tuple[dict[str, Any], str]:
    """Opened, reviewed, posted."""
    pull = engine.control("open-pull", kind="planted")
    engine.deliver(pull)
    return pull, "completed"


def _superseded(engine: Engine) -> tuple[dict[str, Any], str]:
    """A push while the session is under way, and the newer head's review."""
    first = engine.control("open-pull", kind="planted")
    engine.deliver(first)
    engine.until(lambda: any(one["state"] == "running" for one in engine.store.queue.items(state="live")))
    pull = engine.control("push", full_name=first["repository"], number=first["number"])
    engine.deliver(pull)
    return pull, "completed"


def _closed(engine: Engine) -> tuple[dict[str, Any], str]:
    """Closed before its launch: no session."""
    pull = engine.control("open-pull", kind="planted")
    engine.deliver(pull)
    engine.control("act", full_name=pull["repository"], number=pull["number"], action="close")
    return pull, "cancelled"


def _with(word: str) -> Callable[[Engine], tuple[dict[str, Any], str]]:
    def scenario(engine: Engine) -> tuple[dict[str, Any], str]:
        (engine.home / "behaviour").write_text(word)
        return _review(engine)

    scenario.__doc__ = f"The first session ends as `{word}`; another one does the work."
    return scenario


def _cancelled(engine: Engine) -> tuple[dict[str, Any], str]:
    """Cancelled by a person at work and opened again."""
    pull, _ = _review(engine)
    engine.until(lambda: bool(engine.store.queue.items(state="live")))
    item = engine.store.queue.items(state="live")[0]["id"]
    while engine.child(lambda store: store.queue.cancel(item, reason=Reason.USER_CANCELLED, actor="test"))[0]:
        pass
    engine.until(lambda: engine.quiet())
    while engine.child(lambda store: store.queue.reopen(item, actor="test"))[0]:
        pass
    return pull, "completed"


def _dispatched(engine: Engine) -> tuple[dict[str, Any], str]:
    """Asked for again by hand after a first review."""
    pull, _ = _review(engine)
    engine.until(lambda: engine.quiet())
    row = engine.store.reviews.of_owner(engine.owner, limit=1)[0]
    item = row.item_id
    while engine.child(lambda store: store.queue.reopen(item, actor="test", force=True))[0]:
        pass
    return pull, "completed"


def _provider_away(engine: Engine) -> tuple[dict[str, Any], str]:
    """GitHub answers 502 to the launch's reads and to the first writes."""
    fault = {"kind": "error", "status": 502, "left": 2}
    faults = [{**fault, "method": "GET", "path": "/pulls/"}, {**fault, "method": "POST", "path": "/check-runs"}]
    engine.control("faults", faults=faults)
    return _review(engine)


def _answer_lost(engine: Engine) -> tuple[dict[str, Any], str]:
    """GitHub writes and the answer never comes, once for each kind."""
    paths = ("/check-runs", "/reviews", "/comments", "/reactions")
    engine.control("faults", faults=[{"kind": "lost", "method": "POST", "path": path, "left": 1} for path in paths])
    return _review(engine)


def _dead(point: str) -> Callable[[Engine], tuple[dict[str, Any], str]]:
    def scenario(engine: Engine) -> tuple[dict[str, Any], str]:
        (engine.points / point).touch()
        return _review(engine)

    scenario.__doc__ = f"A process dies {point}; whatever else is killed meets its recovery."
    return scenario


def _redelivered(engine: Engine) -> tuple[dict[str, Any], str]:
    """GitHub sends the same event twice before and once after its admission."""
    pull = engine.control("open-pull", kind="planted")
    engine.deliver(pull, times=2)
    engine.until(lambda: engine.quiet())
    engine.deliver(pull)
    return pull, "completed"


def _no_capacity(engine: Engine) -> tuple[dict[str, Any], str]:
    """No host takes the session for a working day."""
    engine.places = 0
    pull, _ = _review(engine)
    engine.until(lambda: any(one["state"] == "running" for one in engine.store.queue.items(state="live")))
    engine.clock.advance(timedelta(seconds=QUEUE_SECONDS) + timedelta(hours=1))
    engine.until(lambda: engine.quiet())
    engine.places = 4
    return pull, "failed"


def _deadline(engine: Engine) -> tuple[dict[str, Any], str]:
    """A session that beats for ever: the item's own deadline ends it."""
    (engine.home / "behaviour").write_text("endless")
    pull, _ = _review(engine)
    engine.until(lambda: any(one["state"] == "running" for one in engine.store.queue.items(state="live")))

    def runs() -> bool:
        (engine.home / "behaviour").write_text("endless")  # a killed worker took its order with it
        return engine.session_state() == "running"

    engine.until(runs)
    engine.clock.advance(timedelta(hours=12))
    engine.until(lambda: engine.quiet())
    engine.clock.advance(timedelta(days=1))
    engine.turn()
    return pull, "failed"


def _late_write(engine: Engine) -> tuple[dict[str, Any], str]:
    """GitHub's answer is lost and the write lands only afterwards, within the wait before the read-back."""
    paths = ("/check-runs", "/reviews", "/comments", "/reactions")
    faults = [{"kind": "late", "seconds": LATE_SECONDS, "method": "POST", "path": path, "left": 1} for path in paths]
    engine.control("faults", faults=faults)
    pull, ending = _review(engine)

    def answers_lost() -> set[tuple[Any, int]]:
        return {(one["id"], one["tries"]) for one in engine.store.outbox.listed() if one["reason"] == Reason.PROVIDER_UNAVAILABLE}

    seen: set[tuple[Any, int]] = set()
    while not engine.quiet():
        engine.turn()
        if answers_lost() - seen:  # the wait of real life, which this clock jumps over
            time.sleep(2 * LATE_SECONDS)
        seen |= answers_lost()
        engine.clock.advance(timedelta(seconds=5))
    return pull, ending


def _outsider(engine: Engine) -> tuple[dict[str, Any], str]:
    """An outsider's pull request waits until somebody who may write approves its head."""
    pull = engine.control("open-pull", kind="planted", fork=True, author="mallory", head_ref=f"fork-{uuid4().hex[:8]}")
    engine.deliver(pull)
    engine.until(lambda: any(one["reason"] == Reason.APPROVAL_NEEDED for one in engine.store.queue.items(state="waiting")))
    named = {"full_name": pull["repository"], "number": pull["number"]}
    engine.deliver(engine.control("act", **named, action="label", label="ok-to-test", by="grace"))
    return pull, "completed"


SCENARIOS: dict[str, Callable[[Engine], tuple[dict[str, Any], str]]] = {
    "review": _review,
    "superseded": _superseded,
    "closed": _closed,
    "outsider": _outsider,
    "crashed": _with("crash"),
    "stopping": _with("stopping"),
    "lost": _with("lost"),
    "cancelled": _cancelled,
    "dispatched": _dispatched,
    "provider_away": _provider_away,
    "answer_lost": _answer_lost,
    "late_write": _late_write,
    "redelivered": _redelivered,
    "dead_launch": _dead("after:store.queue.Queue.claim"),
    "dead_session": _dead("after:store.sessions.Sessions.claim"),
    "dead_effect": _dead("before:send.github.review"),
    "no_capacity": _no_capacity,
    "deadline": _deadline,
}


@pytest.fixture(scope="module")
def engine(database: Database) -> Iterator[Engine]:
    found = Engine(database.logins)
    yield found
    found.close()


def _reached(engine: Engine) -> dict[str, set[str]]:
    """Which points each scenario comes by."""
    found = {}
    record = engine.points / "record"
    for name, scenario in SCENARIOS.items():
        record.write_text("")
        scenario(engine)
        engine.until(lambda: engine.quiet())
        found[name] = set(record.read_text().split())
        record.unlink()
    return found


_known: dict[str, set[str]] = {}


@pytest.fixture(scope="module")
def reached(engine: Engine) -> dict[str, set[str]]:
    return _reached(engine)


def test_every_durable_step_is_reached_by_a_scenario(reached: dict[str, set[str]]) -> None:
    seen = {point.partition(":")[2] for points in reached.values() for point in points}
    assert places() - seen == set()


def _cases(reached: dict[str, set[str]], full: bool) -> list[tuple[str, str]]:
    """Scenario and point: in full each point in each scenario; bounded, each place once, before or after it, in one scenario."""
    wanted = {f"{moment}:{place}" for moment in ("before", "after") for place in places()}
    every = [(name, point) for name, points in reached.items() for point in sorted(points & wanted)]
    if full:
        return every
    chance = random.Random(20261123)  # which scenario meets which kill, the same in every run
    by_place: dict[str, list[tuple[str, str]]] = {}
    for name, point in every:
        by_place.setdefault(point.partition(":")[2], []).append((name, point))
    return [chance.choice(cases) for _, cases in sorted(by_place.items())]


@pytest.mark.timeout(3_600)
def test_a_kill_between_any_two_durable_steps_loses_nothing_and_doubles_nothing(
    engine: Engine, reached: dict[str, set[str]], full: bool, figures: Figures
) -> None:
    """Invariants 1 to 5: afterwards the same stands on the pull request as if nobody had been killed."""
    faults = []
    for name, point in _cases(reached, full):
        faults += _killed_once(engine, name, point, figures)
    assert faults == []


def _killed_once(engine: Engine, name: str, point: str, figures: Figures) -> list[str]:
    (engine.home / "behaviour").unlink(missing_ok=True)
    engine.control("faults", faults=[])
    armed = engine.points / point
    armed.touch()
    engine.killed_at = None
    pull, ending = SCENARIOS[name](engine)
    engine.until(lambda: engine.quiet())
    fired = not armed.exists()
    armed.unlink(missing_ok=True)
    back = (engine.clock.now() - engine.killed_at).total_seconds() if engine.killed_at else 0.0
    wrong = _wrong(engine, pull, ending)
    figures(tried=1, lost=sum("lost" in one for one in wrong), duplicated=sum("twice" in one for one in wrong), back_s=back)
    if not fired:
        wrong.append("the point was never reached")
    return [f"{name} killed {point}: {one}" for one in wrong]


def _wrong(engine: Engine, pull: dict[str, Any], ending: str) -> list[str]:
    """What differs from a run in which nobody was killed."""
    found = []
    rows = [one for one in engine.store.reviews.of_owner(engine.owner, limit=200) if one.head_sha == pull["head_sha"]]
    if [one.state for one in rows] != [ending]:
        found.append(f"lost: the head's reviews are {[(one.state, one.reason) for one in rows]}")
    newest_reason = rows[0].reason if rows else None
    seen = engine.seen(pull)
    runs = [one for one in seen["check_runs"] if one["head_sha"] == pull["head_sha"]]
    wanted = {"completed": "failure", "failed": "failure", "cancelled": "cancelled"}[ending]
    if newest_reason == Reason.DEADLINE_PASSED:
        wanted = "timed_out"
    if [one["conclusion"] for one in runs] != [wanted]:
        found.append(f"lost or twice: checks {[(one['status'], one['conclusion']) for one in runs]}")
    if ending == "completed":
        at_head = [one for one in seen["reviews"] if one["commit_id"] == pull["head_sha"]]
        if not at_head:
            found.append("lost: no review")
        bodies = [one["body"] for one in at_head]
        if len(bodies) != len(set(bodies)):
            found.append("twice: a review")
        if len(seen["comments"]) != 1:
            found.append(f"lost or twice: {len(seen['comments'])} summaries")
        places_of = [(one["path"], one["line"], one["commit_id"]) for one in seen["review_comments"]]
        if len(places_of) != len(set(places_of)):
            found.append("twice: an inline comment")
    found += [
        f"lost: {name} {rows}"
        for name in ("slots_belong_to_live_items", "live_items_hold_slots", "one_live_item_a_subject")
        if (rows := engine.store.invariants.offenders(name))
    ]
    dead = [one["kind"] for one in engine.store.outbox.listed(state="dead")]
    found += [f"lost: dead {kind}" for kind in dead]
    return found


def test_a_point_that_is_armed_kills(engine: Engine) -> None:
    """Else every other test here would pass for nothing."""
    (engine.points / "after:store.queue.Queue.gauges").touch()
    code, _ = engine.child(lambda store: store.queue.gauges())
    assert code == -9 and engine.clock.now() - timedelta(seconds=1) < engine.clock.now()
