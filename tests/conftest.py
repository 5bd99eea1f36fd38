"""Fixtures that several folders share: an embedded PostgreSQL for the session, a fresh database for each test module."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from kilo_pipelines.core.clock import ManualClock
from kilo_pipelines.store import Cipher, Store
from kilo_pipelines.store.embedded import EmbeddedPostgres
from kilo_pipelines.store.migrate import migrate, provision
from tests.support.figures import Figures, Summary, recorder
from tests.support.store import World


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--suite NAME` ends the run with one JSON line of counts, `--full` runs the suite's full form."""
    parser.addoption("--suite", default=None, help="Name of the suite; the run ends with one JSON line of its counts.")
    parser.addoption("--full", action="store_true", help="The suite's full form instead of the bounded one.")


def pytest_configure(config: pytest.Config) -> None:
    """Only the main process sums up."""
    if config.getoption("suite") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Summary(config.getoption("suite")), "figures-summary")


# Files that keep a worker for half a minute and more, the longest first: begun last they would run alone while the other one waits.
LONG = (
    "flow/test_platform.py",
    "flow/test_up.py",
    "crash/test_kill.py",
    "crash/test_failpoints.py",
    "flow/test_security_remediation.py",
    "flow/test_backup.py",
    "flow/test_sessions.py",
    "flow/test_two_machines.py",
    "flow/test_security_analysis.py",
    "hostile/test_changes.py",
    "hostile/test_door.py",
    "flow/test_security_dismissal.py",
    "crash/test_security_work.py",
    "flow/test_engine.py",
    "hostile/test_injections.py",
    "crash/test_security_remediation.py",
    "tenancy/test_ops.py",
    "contracts/test_github_provider.py",
    "flow/test_hosted.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, in their order; the others stay as they were shuffled."""

    def place(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((number for number, name in enumerate(LONG) if path.endswith(name)), len(LONG))

    items.sort(key=place)


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Figures:
    """Counts of a suite."""
    return recorder(request)


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether the suite's full form was asked for."""
    return bool(request.config.getoption("full"))


@pytest.fixture(scope="session")
def postgres_admin() -> Iterator[str]:
    """URL of the superuser of a server of this test session."""
    home = Path(tempfile.mkdtemp(prefix="kilo-t-"))
    server = EmbeddedPostgres(home / "pg", home / "s")
    home.chmod(0o711)
    server.prepare()
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(server.command(), stdout=log, stderr=log, start_new_session=True, cwd="/")
    server.wait_ready(30)
    yield server.admin_url
    process.send_signal(signal.SIGINT)
    process.wait(20)
    shutil.rmtree(home, ignore_errors=True)


@dataclass
class Database:
    """One fresh database of the platform."""

    logins: dict[str, str]
    store: Store
    clock: ManualClock


_known: dict[str, str] = {}


@pytest.fixture(scope="module")
def database(postgres_admin: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """Provisioned and migrated, under the same logins as in production; the clock is moved by hand."""
    with made_database(postgres_admin, tmp_path_factory) as made:
        yield made


@contextmanager
def made_database(postgres_admin: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """A database of the platform for as long as the block lasts."""
    global _known  # passwords of the roles stay the same over the session
    suffix = f"_{uuid4().hex[:10]}"
    logins = provision(postgres_admin, _known or None, suffix=suffix)
    _known = logins
    migrate(logins["migrator"])
    key = tmp_path_factory.mktemp("key") / "encryption.key"
    key.write_text(Cipher.new_key_file())
    key.chmod(0o600)
    clock = ManualClock(datetime.now(UTC))
    store = Store(logins["app"], logins["system"], Cipher.from_file(key), clock)
    yield Database(logins, store, clock)
    store.database.dispose()
    with psycopg.connect(postgres_admin.replace("+psycopg", ""), autocommit=True) as connection:
        for name in ("kilo", "dagster"):
            connection.execute(f'drop database "{name}{suffix}" with (force)'.encode())


@pytest.fixture
def world(database: Database) -> World:
    """A fresh owner with one repository in the module's database."""
    return World(database.store, database.clock)
