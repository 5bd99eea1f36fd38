"""What is measured: a PostgreSQL server alone, an ingress before it, or the whole platform as `kilo-pipelines up` runs it.

Every home is a scratch directory with free ports on loopback, and is removed at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import httpx
import psutil
import psycopg
from sqlalchemy import text

from benchmarks.results import ROOT
from kilo_pipelines.cli import setup
from kilo_pipelines.cli.world import free_ports
from kilo_pipelines.core.clock import Clock, SystemClock
from kilo_pipelines.services.code_review.admission import SERVICE
from kilo_pipelines.services.code_review.config import CodeReviewConfig
from kilo_pipelines.settings import Settings, write_secret
from kilo_pipelines.store import Cipher, NewItem, Repository, Store
from kilo_pipelines.store.embedded import EmbeddedPostgres
from kilo_pipelines.store.migrate import migrate, provision

T = TypeVar("T")

# Installations of our own making start here: the twin knows none of them.
FIRST_INSTALLATION = 9_000_001
FIRST_REPOSITORY = 70_000_001
SHA = "b" * 40


def environment(**values: str) -> dict[str, str]:
    """Our environment without any `KILO_*` or `DAGSTER_*` of the caller's, and these values."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KILO_", "DAGSTER_"))}
    return kept | {"PYTHONUNBUFFERED": "1"} | values


def eventually(look: Callable[[], T | None], seconds: float, what: str, pause: float = 0.1) -> T:
    """The first truthy thing that `look` finds; TimeoutError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(pause)
    return found


def end(process: subprocess.Popen[bytes], how: int, seconds: float = 20) -> None:
    """Ends a process of ours, by force when it doesn't follow."""
    if process.poll() is None:
        process.send_signal(how)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Server:
    """An embedded PostgreSQL of its own, with the platform's roles, schema and settings."""

    def __init__(self, clock: Clock | None = None) -> None:
        # Short and directly under the temporary directory: a unix socket's path may have 107 bytes.
        self.home = Path(tempfile.mkdtemp(prefix="kilo-b-"))
        self.home.chmod(0o711)
        self.postgres = EmbeddedPostgres(self.home / "pg", self.home / "s")
        self.postgres.prepare()
        with (self.home / "postgres.log").open("wb") as log:
            self._process = subprocess.Popen(self.postgres.command(), stdout=log, stderr=log, start_new_session=True, cwd="/")
        try:
            self.postgres.wait_ready(30)
            self.logins = provision(self.postgres.admin_url)
            migrate(self.logins["migrator"])
            secrets = self.home / "secrets"
            write_secret(secrets / "database.json", json.dumps(self.logins))
            write_secret(secrets / "encryption.key", Cipher.new_key_file())
            self.store = Store(
                self.logins["app"], self.logins["system"], Cipher.from_file(secrets / "encryption.key"), clock or SystemClock()
            )
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The server's first process."""
        return self._process.pid

    @property
    def system_url(self) -> str:
        """The system login, for psycopg."""
        return self.logins["system"].replace("+psycopg", "")

    def close(self) -> None:
        """Stops the server and removes the home."""
        if hasattr(self, "store"):
            self.store.database.dispose()
        end(self._process, signal.SIGINT)
        shutil.rmtree(self.home, ignore_errors=True)


@contextmanager
def server(clock: Clock | None = None) -> Iterator[Server]:
    """A database server for the length of a block."""
    running = Server(clock)
    try:
        yield running
    finally:
        running.close()


@contextmanager
def web(argv: list[str], url: str, log: Path, **env: str) -> Iterator[psutil.Process]:
    """A web server of ours that answers at `url`, for the length of a block."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *argv], env=environment(**env), stdout=output, stderr=output, start_new_session=True, cwd=ROOT
        )
    try:

        def answers() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"{argv} ended:\n{log.read_text()[-2000:]}")
            with suppress(httpx.TransportError):
                return httpx.get(url, timeout=2, trust_env=False).status_code < 500
            return False

        eventually(answers, 30, url, 0.05)
        yield psutil.Process(process.pid)
    finally:
        end(process, signal.SIGTERM)


@dataclass(frozen=True)
class Tenant:
    """An owner with a repository that only our database knows, and the short ways to its work."""

    store: Store
    owner: UUID
    name: str
    installation: int
    repository: int
    integration: UUID

    @classmethod
    def create(cls, store: Store, number: int, kind: str = "organization") -> Tenant:
        """A new owner with everything that admission and claims look at; Code Review is switched on."""
        name = f"bench-{number}"
        owner = store.owners.create(kind, name).id
        tenant = cls.joined(store, owner, name, FIRST_INSTALLATION + number, FIRST_REPOSITORY + number)
        wanted = CodeReviewConfig().model_dump(mode="json")
        store.owners.put_config(owner, SERVICE, wanted, enabled=True, expected_revision=0, actor="benchmark")
        return tenant

    @classmethod
    def joined(cls, store: Store, owner: UUID, name: str, installation: int, repository: int) -> Tenant:
        """An owner that exists, with one more repository."""
        repositories = [Repository(repository, f"{name}/code", "main", True)]
        integration = store.owners.connect(
            owner,
            provider="github",
            installation_id=installation,
            account=name,
            repositories=repositories,
            actor="benchmark",
        )
        return cls(store, owner, name, installation, repository, integration)

    def stop_service(self) -> None:
        """As a failure that waits for a person does it (contract A13): what waits ends at its claim."""
        with self.store.database.owner(self.owner) as connection:
            connection.execute(
                text("update service_configs set action_required = cast(:why as jsonb) where service = :service"),
                {"why": json.dumps({"reason": "benchmark"}), "service": SERVICE},
            )

    def review(self, pull: int) -> UUID:
        """A waiting review, opened as by hand: under the owner's policies, with its audit event and its NOTIFY."""
        details = {
            "repository_id": self.repository,
            "full_name": f"{self.name}/code",
            "pull_number": pull,
            "title": "Benchmark",
            "author": f"author-{pull}",  # one alone would meet the flood guard
            "author_type": "User",
            "url": f"http://localhost/{self.name}/code/pull/{pull}",
            "base_ref": "main",
            "base_sha": SHA,
            "head_ref": "topic",
            "head_sha": f"{pull:040x}",
            "trigger": "dispatch",
            "settings": CodeReviewConfig().model_dump(mode="json"),
        }
        subject = f"github:{self.repository}:pull:{pull}"
        item = self.store.queue.open(self.owner, NewItem(SERVICE, subject, self.repository, 0, details), actor="benchmark")
        if item is None:
            raise RuntimeError(f"{subject} has a live review already")
        return item


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """CPU of process trees since they began: user and system, and of children that ended and were waited for."""
    spent, seen = 0.0, set()
    for root in processes:
        with suppress(psutil.NoSuchProcess):
            for one in [root, *root.children(recursive=True)]:
                if one.pid in seen:
                    continue
                seen.add(one.pid)
                with suppress(psutil.NoSuchProcess):
                    times = one.cpu_times()
                    spent += times.user + times.system + times.children_user + times.children_system
    return spent


class Platform:
    """The whole platform with the scripted agent, started by its own command; its seeded review has ended when it is up."""

    def __init__(self, shards: int, **more: str) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="kilo-b-"))
        ports = zip(("PUBLIC", "ADMIN", "DAGSTER", "TWIN"), free_ports(4), strict=True)
        kilo = {
            "KILO_HOME": str(self.home),
            "KILO_AGENT": "scripted",
            "KILO_SENSOR_SHARDS": str(shards),
            **{f"KILO_{name}_PORT": str(port) for name, port in ports},
            **more,
        }
        self.log = self.home.parent / f"{self.home.name}.log"
        with self.log.open("wb") as log:
            argv = [sys.executable, "-m", "kilo_pipelines.cli.main", "up", "--agent", "scripted"]
            self.process = subprocess.Popen(
                argv, env=environment(**kilo), stdout=log, stderr=log, start_new_session=True, cwd=ROOT
            )
        try:
            eventually(self._up, 180, "the platform's first review")
            with _environ(kilo):
                self.settings = Settings()
            self.store = setup.open_store(self.settings)
            self.credentials = setup.twin_credentials(self.settings)
        except BaseException:
            self.close()
            raise

    def _up(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"the platform ended:\n{self.log.read_text()[-3000:]}")
        return b"Ctrl-C stops everything" in self.log.read_bytes()

    @property
    def system_url(self) -> str:
        """The system login, for psycopg."""
        return self.settings.database_logins()["system"].replace("+psycopg", "")

    @property
    def dagster_url(self) -> str:
        """Dagster's own database, for psycopg."""
        return self.settings.database_logins()["dagster"].replace("+psycopg2", "")

    def quiet(self) -> None:
        """Returns when no run is on its way (after a minute at most): the work of before must not be counted."""
        with psycopg.connect(self.dagster_url, autocommit=True) as connection, suppress(TimeoutError):
            query = "select 1 from runs where status not in ('SUCCESS', 'FAILURE', 'CANCELED') limit 1"
            eventually(lambda: connection.execute(query).fetchone() is None, 60, "open runs", 0.25)

    def control(self, call: str, **body: Any) -> dict[str, Any]:
        """What a person does at the twin's GitHub."""
        headers = {"authorization": f"Bearer {self.credentials['control_token']}"}
        url = f"{self.settings.twin_url}/_twin/{call}"
        answer: dict[str, Any] = httpx.post(url, json=body, headers=headers, timeout=60, trust_env=False).json()
        if "error" in answer:
            raise RuntimeError(str(answer["error"]))
        return answer

    def processes(self) -> list[psutil.Process]:
        """The supervisor and its children, without the twin: that is the world, not the platform."""
        root = psutil.Process(self.process.pid)
        return [one for one in root.children() if "kilo_twin" not in one.cmdline()]

    def cpu(self) -> float:
        """CPU seconds of the platform until now: PostgreSQL, broker, ingress, proxies, Dagster, workers, supervisor."""
        own = psutil.Process(self.process.pid).cpu_times()
        return cpu_seconds(self.processes()) + float(own.user + own.system)

    def child(self, module: str) -> psutil.Process:
        """The supervised process with this word in its command."""
        return next(one for one in self.processes() if any(module in word for word in one.cmdline()))

    def close(self) -> None:
        """Ctrl-C, and nothing is left."""
        if hasattr(self, "store"):
            self.store.database.dispose()
        end(self.process, signal.SIGINT, 30)
        if hasattr(self, "settings"):
            shutil.rmtree(self.settings.sockets, ignore_errors=True)
        shutil.rmtree(self.home, ignore_errors=True)
        self.log.unlink(missing_ok=True)


@contextmanager
def platform(shards: int, **more: str) -> Iterator[Platform]:
    """The whole platform for the length of a block."""
    running = Platform(shards, **more)
    try:
        yield running
    finally:
        running.close()


@contextmanager
def _environ(values: dict[str, str]) -> Iterator[None]:
    outer = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in outer.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
