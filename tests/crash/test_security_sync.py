"""kill -9 of the process that syncs, before and after each of its commits; the next sync ends where an undisturbed one does."""

from __future__ import annotations

import ast
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from kilo_pipelines import failpoints
from kilo_pipelines.core.clock import SystemClock
from kilo_pipelines.ops import security_sync
from kilo_pipelines.store import Store
from tests.conftest import Database
from tests.support.figures import Figures
from tests.support.security import LOG, Owner, syncing
from tests.support.twin import Twin

FINDINGS = Path(security_sync.__file__).resolve().parents[1] / "store" / "findings.py"
# What a sync commits; the rest of the room reads, or is a person's.
STEPS = ("begin_sync", "quarantine", "apply_page", "end_sync", "keep_policy", "dispose", "note_sync")
READS = {
    "syncs",
    "quarantined",
    "history",
    "owner_of",
    "get",
    "of_repository",
    "listed",
    "numbers",
    "posture",
    "offenders",
    "owners",
    "changed_owners",
    "open_after",
    "open_of_package",
    "bound",
    "dismissed_on",
    "policy",
    "page",
    "summary",
    "work",
    "behind_policy",
    "deadlines_csv",
}
# Written by the assets' recomputing, which begins anew whatever was written before.
# Kills there: test_security_work.py.
DISMISSALS = {"undo", "rebind"}
RECOMPUTED = {"write_sla"}


def test_every_commit_of_the_room_is_a_step_or_a_reading() -> None:
    (room,) = [one for one in ast.parse(FINDINGS.read_text()).body if isinstance(one, ast.ClassDef) and one.name == "Findings"]
    named = {one.name for one in room.body if isinstance(one, ast.FunctionDef) and "_database." in ast.unparse(one)}
    assert named == set(STEPS) | READS | RECOMPUTED | DISMISSALS


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twin]:
    with syncing(tmp_path_factory.mktemp("sync")) as running:
        yield running


@pytest.fixture
def points(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    failpoints.arm(None)


def _facts(owner: Owner) -> tuple[object, ...]:
    """What an owner's findings, history, deadlines and audit say, without our own ids and clocks."""
    with owner.store.database.owner(owner.id) as connection:
        return tuple(
            tuple(map(tuple, connection.execute(text(statement)).all()))
            for statement in (
                "select source_id::int, upstream_state, disposition, severity from findings order by 1",
                "select f.source_id::int, e.at, e.kind from finding_events e join findings f on f.id = e.finding_id"
                " where e.kind <> 'ignored' or f.disposition is null order by 1, 2, 3",
                "select f.source_id::int, s.due_at, s.closed_at from finding_sla s join findings f on f.id = s.finding_id order by 1",
                "select action, count(*) from audit_events where action like 'security.%' and action not like 'security.sync.%'"
                " group by 1 order by 1",
                "select source_id, reason from quarantined_alerts order by 1",
            )
        )


def _killed(owner: Owner, database: Database, points: Path, point: str) -> bool:
    """A sync in a process of its own that dies at the point; whether it did."""
    (points / point).touch()
    pid = os.fork()
    if pid == 0:
        try:
            failpoints.arm(points)
            store = Store(database.logins["app"], database.logins["system"], owner.store.cipher, SystemClock())
            security_sync.sync_owner(store, security_sync.GitHubResource(), owner.id, LOG)
        finally:
            os._exit(0)
    status = os.waitpid(pid, 0)[1]
    (points / point).unlink(missing_ok=True)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_killed_sync_loses_nothing_and_writes_nothing_twice(
    database: Database,
    twin: Twin,
    points: Path,
    step: str,
    moment: str,
    figures: Figures,  # the fixture
) -> None:
    disturbed = Owner(database, twin, 1, 230)
    twin.control("spoil-alert", repository=disturbed.names[0], number=7, kind="unknown_state")
    with disturbed.store.database.owner(disturbed.id) as connection:
        undisturbed = connection.execute(text("select external_id, full_name from repositories")).one()
    fired = _killed(disturbed, database, points, f"{moment}:store.findings.Findings.{step}")
    assert disturbed.sync().complete
    other = Owner(database, twin, 1, 1)
    with other.store.database.owner(other.id) as connection:
        connection.execute(text("update repositories set removed_at = now()"))
    other.connect(undisturbed[0], undisturbed[1])
    assert other.sync().complete
    same = _facts(disturbed) == _facts(other)
    figures(tried=1, lost=int(not same))
    assert fired and same
