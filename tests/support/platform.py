"""The whole platform as a user runs it: `kilo-pipelines up` in a home of its own, spoken to over HTTP and the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
from sqlalchemy.exc import OperationalError

from kilo_pipelines.cli import setup, supervisor
from kilo_pipelines.settings import Settings
from kilo_pipelines.store import Store
from kilo_pipelines.store.rows import ReviewRow
from tests.support.http import HTTP
from tests.support.sessions import free_port

T = TypeVar("T")


class RunningPlatform:
    """One platform with the scripted agent; `behaviour` is how that agent behaves."""

    def __init__(
        self,
        behaviour: str = "honest",
        lease_seconds: float = 4.0,
        prepare: Callable[[RunningPlatform], None] = lambda _: None,
        instead_of: RunningPlatform | None = None,
        **settings: str,
    ) -> None:
        """`prepare` is called before the first start; `settings` are more of the environment.

        `instead_of` is a platform that has ended: this one has its home, restored elsewhere, and its addresses.
        """
        self.home = Path(tempfile.mkdtemp(prefix="kilo-p-"))
        self.env = {
            **os.environ,
            "KILO_HOME": str(self.home),
            "KILO_AGENT": "scripted",
            "KILO_SCRIPTED_BEHAVIOUR": behaviour,
            "KILO_LEASE_SECONDS": str(lease_seconds),
            "KILO_AGENTS_MAX": "2",
            "KILO_SENSOR_SHARDS": "4",
            # A test asks more of the twin in a minute than an owner of GitHub in an hour; the budget has tests of its own.
            "KILO_GITHUB_READS_PER_HOUR": "1e6",
            "KILO_GITHUB_WRITES_PER_HOUR": "1e6",
            **{f"KILO_{name}_PORT": str(free_port()) for name in ("PUBLIC", "ADMIN", "TWIN")},
            **settings,
        }
        # Beside the password, as docs/login.md tells for the twin.
        self.env |= {
            "KILO_OIDC_ISSUER": f"http://localhost:{self.env['KILO_TWIN_PORT']}/oidc",
            "KILO_OIDC_CLIENT_ID": "kilo-public",
            "KILO_OIDC_OPERATORS": "ada@acme.test",
        }
        prepare(self)
        if instead_of is not None:
            self.env = instead_of.env
            self.home = Path(self.env["KILO_HOME"])
        self.process: subprocess.Popen[bytes]
        self.settings: Settings
        self.store: Store
        self.start()
        # The demonstration's own pull request is number 1; a test that came before it would get its pushes.
        self.wait(lambda: self.store.reviews.of_owner(self.owner), 120)

    def start(self) -> None:
        """Starts and waits until everything answers."""
        self.log = self.home.parent / f"{self.home.name}.log"
        before = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            argv = [sys.executable, "-m", "kilo_pipelines.cli.main", "up", "--agent", "scripted"]
            self.process = subprocess.Popen(argv, env=self.env, stdout=log, stderr=log, start_new_session=True)
        # Fifteen seconds on a quiet machine; other tests run beside this one.
        self.wait(lambda: b"pull request is on its way" in self.log.read_bytes()[before:] or None, 150)
        kept = {name: value for name, value in self.env.items() if name.startswith("KILO_")}
        outer = {name: os.environ.get(name) for name in kept}
        os.environ.update(kept)
        try:
            self.settings = Settings()
        finally:
            for name, value in outer.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        self.store = setup.open_store(self.settings)
        self.credentials = setup.twin_credentials(self.settings)
        self.wait(lambda: next((one for one in self.store.owners.all()), None), 30)
        self.owner = self.store.owners.all()[0].id

    def wait(self, look: Callable[[], T | None], seconds: float) -> T:
        """The first thing that `look` finds."""
        deadline = time.monotonic() + seconds
        while True:
            with suppress(OperationalError):  # a database that a test has killed comes back
                found = look()
                if found:
                    return found
            assert time.monotonic() < deadline, f"not within {seconds} s\n{self.log.read_text()[-3000:]}"
            time.sleep(0.1)

    def control(self, call: str, **body: Any) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {self.credentials['control_token']}"}
        answer: dict[str, Any] = HTTP.post(
            f"{self.settings.twin_url}/_twin/{call}", json=body, headers=headers, timeout=60
        ).json()
        assert "error" not in answer, answer
        return answer

    def review(self, pull: dict[str, Any]) -> ReviewRow | None:
        """The newest review of this pull request's head."""
        rows = self.store.reviews.of_owner(self.owner, limit=200)
        return next((one for one in rows if one.pull_number == pull["number"] and one.head_sha == pull["head_sha"]), None)

    def when(self, pull: dict[str, Any], ready: Callable[[ReviewRow], bool], seconds: float = 120) -> ReviewRow:
        """The review, as soon as it is as wanted."""

        def look() -> ReviewRow | None:
            row = self.review(pull)
            return row if row is not None and ready(row) else None

        return self.wait(look, seconds)

    def at_work(self, pull: dict[str, Any]) -> ReviewRow:
        """The review while its agent works in the sandbox."""

        def working(row: ReviewRow) -> bool:
            events = self.store.sessions.events(row.session_id) if row.session_id else []
            return row.session_state == "running" and any(one["kind"] == "agent_started" for one in events)

        return self.when(pull, working)

    def settled(self, pull: dict[str, Any], seconds: float = 150) -> ReviewRow:
        """The review after its end, with all effects applied."""

        def done(row: ReviewRow) -> bool:
            effects = self.store.outbox.of_item(row.item_id)
            return bool(
                row.ended_at and row.verdict and effects and all(one["state"] not in ("pending", "applying") for one in effects)
            )

        return self.when(pull, done, seconds)

    def read(self, pull: dict[str, Any]) -> dict[str, Any]:
        """What stands on the pull request, over REST."""
        from kilo_twin.__main__ import read_back

        return read_back(self.settings.twin_url, self.credentials, pull["repository"], pull["number"])

    def cli(self, *arguments: str, **env: str) -> tuple[int, Any]:
        """Exit status and JSON of a command; `env` is what only this one finds in its environment."""
        done = subprocess.run(
            [sys.executable, "-m", "kilo_pipelines.cli.main", *arguments, "--json"],
            env=self.env | env,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, json.loads(done.stdout) if done.stdout.strip() else done.stderr

    @cached_property
    def browser(self) -> httpx.Client:
        """An operator's browser, logged in with a new password."""
        password = self.cli("password", "reset")[1]["password"]
        client = httpx.Client(base_url=self.settings.admin_url, timeout=30, headers={"origin": self.settings.admin_url})
        # A test that guessed passwords has used up the guesses for a while.
        self.wait(lambda: client.post("/login", data={"password": password}).status_code == 303, 40)
        return client

    def graphql(self, query: str, **variables: Any) -> dict[str, Any]:
        """One request to the Dagster UI's API, through the door."""
        answer: dict[str, Any] = self.browser.post("/dagster/graphql", json={"query": query, "variables": variables}).json()
        assert "errors" not in answer, answer
        return dict(answer["data"])

    def child(self, name: str) -> psutil.Process:
        """A supervised process."""
        state = supervisor.read_state(self.settings)
        return psutil.Process(next(int(str(one["pid"])) for one in state["children"] if one["name"] == name))

    def alive(self, name: str) -> bool:
        """Whether a supervised process runs and answers."""
        try:
            return self.child(name).status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, StopIteration):
            return False

    def listening(self) -> set[tuple[str, int]]:
        """Address and port of every listening TCP socket of the platform's processes."""
        found: set[tuple[str, int]] = set()
        for one in psutil.Process(self.process.pid).children(recursive=True):
            # Run processes come and go: one that has ended listens on nothing.
            with suppress(psutil.NoSuchProcess):
                found |= {tuple(held.laddr) for held in one.net_connections("inet") if held.status == psutil.CONN_LISTEN}
        return found

    def delivery_lost(self, pull: dict[str, Any]) -> bool:
        """Whether the ingress never answered this event."""
        return pull["delivery"]["status_code"] not in (200, 202)

    def redelivered(self, pull: dict[str, Any]) -> bool:
        """A person presses Redeliver; whether the ingress answered."""
        return self.control("redeliver", delivery_id=pull["delivery"]["id"])["status_code"] in (200, 202)

    def crash_daemon(self, point: str) -> int:
        """Runs a second sensor daemon that kills itself at one of Dagster's crash points; its exit status."""
        env = self.env | supervisor.dagster_environment(self.settings)
        return subprocess.run([sys.executable, "-m", "tests.support.crashing_daemon", point], env=env, check=False).returncode

    def stop(self) -> float:
        """Ctrl-C; how long it took."""
        started = time.monotonic()
        self.store.database.dispose()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)
        return time.monotonic() - started

    def close(self) -> None:
        if "browser" in self.__dict__:
            self.browser.close()
        if self.process.poll() is None:
            self.stop()
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.rmtree(self.settings.sockets, ignore_errors=True)
        self.log.unlink(missing_ok=True)
