"""kill -9 of the process that works on the Security Agent's items, before and after each of its commits: nothing lost, nothing twice."""

from __future__ import annotations

import ast
import json
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from dagster import DagsterInstance
from sqlalchemy import text

from kilo_pipelines import failpoints
from kilo_pipelines.acts.analysis import analyse
from kilo_pipelines.acts.dismissal import dismiss
from kilo_pipelines.core.clock import ManualClock
from kilo_pipelines.core.effects import NOTICES, EffectKind
from kilo_pipelines.ops.security_sync import sync_owner
from kilo_pipelines.providers.github_alerts import get_alert
from kilo_pipelines.resources.github import GitHubResource
from kilo_pipelines.services.security.dismissal import binding
from kilo_pipelines.services.security.notices import subject_key
from kilo_pipelines.settings import Settings, write_secret
from kilo_pipelines.store import FindingRow, NewItem, Store
from tests.conftest import Database
from tests.support.channels import channels
from tests.support.figures import Figures
from tests.support.security import LOG, Dispatcher, Owner, syncing, with_model
from tests.support.twin import Twin

STORE = Path(failpoints.__file__).parent / "store"
# Rooms of the Security Agent's work, and functions of theirs that only read.
ROOMS = ("analyses",)
READS = {"of_finding", "latest", "owners", "candidates", "waiting_automatic", "changed_since", "completed_since"}
# Steps of the engine that only this service's items take.
SENDS = {f"send.{one}" for one in (EffectKind.GITHUB_DISMISS_ALERT, EffectKind.GITHUB_REOPEN_ALERT, *NOTICES)}
# Of the room of findings: what takes a dismissal back, and what notes that its ground still stands.
FINDING_STEPS = {f"store.findings.Findings.{one}" for one in ("undo", "rebind")}
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


_orders: dict[int, dict[str, Any]] = {}


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
            os._exit(0)
        except BaseException:  # noqa: BLE001  # a child that fails must not go on as a second parent
            traceback.print_exc()
        os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed by itself"
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
        items = [one for service in ("security_analysis", "dismissal", "notice") for one in owner.items(service)]
        live = [one for one in items if one.state in ("waiting", "starting", "running")]
        waiting = [one for item in items for one in owner.store.outbox.of_item(item.id) if one["state"] == "pending"]
        if not killed and not live and not waiting:
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


def _dismissed(owner: Owner, database: Database, points: Path) -> tuple[int, list[str]]:
    """A person's dismissal, here and at the source; then its ground is another one, and it is taken back on both sides."""
    finding = next(one for one in owner.findings(status="open") if _upstream(owner, one) == "open")

    def ask(store: Store) -> object:
        if store.queue.items(owner_id=owner.id, service="dismissal"):
            return None
        return dismiss(store, finding, role="owner", actor="test", reason="not_used", comment="")

    kills = _through(owner, database, points, ask)
    wrong = [] if _both(owner, finding) == ("ignored", "dismissed") else [f"lost: {_both(owner, finding)}"]
    item = owner.items("dismissal")[0].id
    other = {"commit": "0" * 40, "files": {"gone": "1"}, "search": [], "hits": 0, "hits_sha256": ""}
    with owner.store.database.owner(owner.id) as connection:
        connection.execute(
            text("update findings set disposition_evidence = cast(:evidence as jsonb) where id = :id"),
            {"id": finding.id, "evidence": json.dumps({"item": str(item), "binding": other})},
        )
    kills += _through(owner, database, points, lambda store: sync_owner(store, GitHubResource(), owner.id, LOG))
    owner.sync()
    wrong += [] if _both(owner, finding) == ("open", "open") else [f"lost: {_both(owner, finding)}"]
    for action in ("dismissed", "reopened"):
        said = [one for one in owner.audited(f"security.finding.{action}") if one.get("item") == str(item)]
        wrong += [] if len(said) == 1 else [f"twice: {len(said)} times {action}"]
    return kills, wrong


def _still(owner: Owner, database: Database, points: Path) -> tuple[int, list[str]]:
    """A dismissal whose ground is found again at a later commit."""
    finding = next(one for one in owner.findings(status="open") if _upstream(owner, one) == "open")

    def ask(store: Store) -> object:
        if store.queue.items(owner_id=owner.id, service="dismissal"):
            return None
        return dismiss(store, finding, role="owner", actor="test", reason="not_used", comment="")

    kills = _through(owner, database, points, ask)
    ground = binding("0" * 40, {}, [], [])
    with owner.store.database.owner(owner.id) as connection:
        connection.execute(
            text(
                "update findings set manifest_path = 'none/none', disposition_evidence = cast(:evidence as jsonb) where id = :id"
            ),
            {"id": finding.id, "evidence": json.dumps({"item": str(owner.items("dismissal")[0].id), "binding": ground})},
        )
    kills += _through(owner, database, points, lambda store: sync_owner(store, GitHubResource(), owner.id, LOG))
    owner.sync()
    row = owner.store.findings.get(owner.id, finding.id)
    kept = row is not None and (row.disposition_evidence or {})["binding"]["commit"] != "0" * 40
    return kills, [] if kept and _both(owner, finding) == ("ignored", "dismissed") else ["lost: the ground"]


def _noticed(owner: Owner, database: Database, points: Path) -> tuple[int, list[str]]:
    """One passed deadline, told by mail, Slack and webhook."""
    row = next(one for one in owner.store.findings.listed(owner.id, status="open", overdue=True, limit=100))
    with channels() as told, pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILO_SMTP_URL", told.smtp)
        patch.setenv("KILO_SMTP_FROM", "kilo@acme.test")
        patch.setenv("KILO_SLACK_API_URL", f"{told.http}/slack")
        write_secret(Settings().slack_token_file, "xoxb-test")
        to = [
            {"kind": "email", "address": "ada@acme.test"},
            {"kind": "slack", "channel": "#security"},
            {"kind": "webhook", "url": f"{told.http}/hook"},
        ]
        owner.configure(notice_recipients=to, sla_notice_min_severity="all")
        details = {"finding_id": str(row["id"]), "kind": "sla_breach"}
        new = NewItem("notice", subject_key(row["id"], "sla_breach"), row["repository_id"], 0, details)

        def ask(store: Store) -> object:
            return None if owner.items("notice") else store.queue.open(owner.id, new, actor="test")

        kills = _through(owner, database, points, ask)
        slack = [one for one in told.posts if one[0].startswith("/slack")]
        hooks = [{name.lower(): value for name, value in one[1].items()}["webhook-id"] for one in told.posts if one[0] == "/hook"]
    states = [one["state"] for one in owner.store.outbox.of_item(owner.items("notice")[0].id)]
    wrong = [] if len(told.mails) <= 1 and len(slack) <= 1 and len(set(hooks)) == 1 else ["twice: a message"]
    # Whoever died with a mail in hand can't say whether it went out: a person is shown that.
    fine = {"applied"} if not kills else {"applied", "unknown"}
    wrong += [] if len(states) == 3 and set(states) <= fine else [f"lost: {states}"]
    return kills, wrong


def _both(owner: Owner, finding: FindingRow) -> tuple[str, str]:
    row = owner.store.findings.get(owner.id, finding.id)
    return (row.status if row else "none", _upstream(owner, finding))


def _upstream(owner: Owner, finding: FindingRow) -> str:
    installation = owner.twin.app().installation(
        owner.twin.credentials["installation_id"], [finding.repository_id], {"metadata": "read", "vulnerability_alerts": "read"}
    )
    return str(get_alert(installation, owner.names[0], int(finding.source_id))["state"])


SCENARIOS = {"analysed": _analysed, "blocked": _blocked, "dismissed": _dismissed, "still": _still, "noticed": _noticed}


def test_every_step_is_reached_and_a_kill_there_loses_nothing_and_doubles_nothing(
    database: Database, twin: Twin, points: Path, full: bool, figures: Figures
) -> None:
    record = points / "record"
    wanted = _steps() | ENGINE_STEPS | SENDS | FINDING_STEPS
    reached: dict[str, set[str]] = {}
    for name, scenario in SCENARIOS.items():
        record.write_text("")
        assert scenario(_owner(database, twin), database, points) == (0, [])
        reached[name] = {one for one in record.read_text().split() if one.partition(":")[2] in wanted}
    record.unlink()
    assert {one.partition(":")[2] for found in reached.values() for one in found} == wanted
    faults = []
    for name, found in reached.items():
        for point in sorted(found) if full else sorted(found)[:: 1 if name == "analysed" else 2]:
            (points / point).touch()
            kills, wrong = SCENARIOS[name](_owner(database, twin), database, points)
            figures(tried=1, lost=sum("lost" in one for one in wrong), duplicated=sum("twice" in one for one in wrong))
            faults += [f"{name} killed {point}: {one}" for one in (*wrong, *([] if kills else ["the point was never reached"]))]
    assert faults == []


def _owner(database: Database, twin: Twin) -> Owner:
    # One installation, one owner that holds it; its repository has a history.
    for one in database.store.owners.all():
        with database.store.database.owner(one.id) as connection:
            connection.execute(text("update integrations set disconnected_at = now() where disconnected_at is null"))
    owner = Owner(database, twin, 1, 1, analysis_mode="shallow")
    if twin.port not in _orders:
        _orders[twin.port] = twin.control("seed-alerts", count=40, repositories=["orders"])["repositories"][0]
    with database.store.database.owner(owner.id) as connection:
        connection.execute(text("update repositories set removed_at = now()"))
    owner.repositories, owner.names = [_orders[twin.port]], [_orders[twin.port]["repository"]]
    owner.connect(_orders[twin.port]["repository_id"], owner.names[0])
    owner.sync()
    return owner
