"""A running ingress: its own process over a real PostgreSQL, spoken to over sockets only."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import text

from kilo_pipelines.core.clock import SystemClock
from kilo_pipelines.settings import write_secret
from kilo_pipelines.store import Repository, Store
from kilo_pipelines.store.app_secrets import WebhookSecret
from kilo_pipelines.store.crypto import Cipher
from kilo_pipelines.store.embedded import EmbeddedPostgres
from kilo_pipelines.store.migrate import migrate, provision
from tests.support.http import HTTP
from tests.support.keys import api_key

SECRET = "canary-webhook-secret-5f1c"
INSTALLATION = 4711
REPOSITORY = 990_001


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def sign(body: bytes, secret: str = SECRET) -> str:
    """GitHub's signature of a body."""
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def pull_request(**changes: Any) -> dict[str, Any]:
    """A `pull_request` payload with the fields that GitHub sends and the platform uses; fresh head, so that bodies differ."""
    sha = hashlib.sha1(uuid4().bytes).hexdigest()
    payload: dict[str, Any] = {
        "action": "opened",
        "number": 7,
        "pull_request": {
            "number": 7,
            "title": "Add a cache",
            "draft": False,
            "state": "open",
            "html_url": "http://localhost/octo/demo/pull/7",
            "labels": [],
            "user": {"id": 5, "login": "octocat", "type": "User"},
            "head": {"sha": sha, "ref": "feature", "repo": {"id": REPOSITORY, "full_name": "octo/demo"}},
            "base": {"sha": "b" * 40, "ref": "main", "repo": {"id": REPOSITORY, "full_name": "octo/demo"}},
        },
        "repository": {"id": REPOSITORY, "full_name": "octo/demo", "name": "demo", "private": True},
        "installation": {"id": INSTALLATION},
        "sender": {"id": 5, "login": "octocat", "type": "User"},
    }
    return payload | changes


def lifecycle(action: str, **more: Any) -> dict[str, Any]:
    """An `installation` or `installation_repositories` payload with its full installation object."""
    installation = {
        "id": INSTALLATION,
        "account": {"id": 9, "login": "octo", "type": "Organization"},
        "access_tokens_url": "http://localhost/app/installations/4711/access_tokens",
        "nonce": uuid4().hex,
    }
    return {"action": action, "installation": installation, "sender": {"id": 5, "login": "octocat"}} | more


class OneSecret:
    """What the ingress asks for secrets: one value, or none."""

    def __init__(self, value: str | None) -> None:
        self._secrets = (WebhookSecret(id="test", value=value),) if value else ()

    def valid(self, _now: datetime) -> tuple[WebhookSecret, ...]:
        return self._secrets

    def seen(self, secret: WebhookSecret, now: datetime) -> None:
        """Nothing is rotated."""


class IngressWorld:
    """Home, database, one owner with one integration, and `python -m kilo_pipelines.ingress` in front of them."""

    def __init__(self) -> None:
        # Short and directly under the temporary directory: a unix socket's path may have 107 bytes.
        self.home = Path(tempfile.mkdtemp(prefix="kilo-in-"))
        self.home.chmod(0o711)
        self.postgres = EmbeddedPostgres(self.home / "pg", self.home / "s")
        self.postgres.prepare()
        with (self.home / "postgres.log").open("wb") as log:
            self._server = subprocess.Popen(self.postgres.command(), stdout=log, stderr=log, start_new_session=True, cwd="/")
        self.postgres.wait_ready(30)
        logins = provision(self.postgres.admin_url)
        migrate(logins["migrator"])
        secrets = self.home / "secrets"
        write_secret(secrets / "database.json", json.dumps(logins))
        write_secret(secrets / "encryption.key", Cipher.new_key_file())
        write_secret(secrets / "github-webhook-secret", SECRET)
        self.metrics_token = "scraped"
        write_secret(secrets / "metrics-token", self.metrics_token)
        self.store = Store(logins["app"], logins["system"], Cipher.from_file(secrets / "encryption.key"), SystemClock())
        self.owner = self.store.owners.create("organization", "octo")
        self.other = self.store.owners.create("user", "stranger")
        self.integration = self.connect(self.owner.id, INSTALLATION)
        self.operator_key = api_key(self.store, "operator")
        self.owner_key = api_key(self.store, "owner", self.owner.id)
        self.viewer_key = api_key(self.store, "viewer", self.owner.id)
        self.stranger_key = api_key(self.store, "owner", self.other.id)
        self.public = free_port()
        self.admin = free_port()
        self.started_after = 0.0
        self._ingress: subprocess.Popen[bytes] | None = None
        self.start()

    def connect(self, owner: UUID, installation: int) -> UUID:
        """Connects an installation with the one repository."""
        return self.store.owners.connect(
            owner,
            provider="github",
            installation_id=installation,
            account="octo",
            repositories=[Repository(REPOSITORY, "octo/demo", "main", True)],
            actor="test",
        )

    @property
    def log(self) -> str:
        """Everything that the ingress wrote."""
        return (self.home / "ingress.log").read_text(errors="replace")

    def start(self, listeners: str = "both") -> None:
        """Starts the ingress and waits until its listeners answer."""
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("KILO_")},
            "KILO_HOME": str(self.home),
            "KILO_PUBLIC_PORT": str(self.public),
            "KILO_ADMIN_PORT": str(self.admin),
            "KILO_LISTENERS": listeners,
        }
        began = time.monotonic()
        with (self.home / "ingress.log").open("ab") as log:
            self._ingress = subprocess.Popen(
                [sys.executable, "-m", "kilo_pipelines.ingress"], env=environment, stdout=log, stderr=log, start_new_session=True
            )
        for port in (self.public, self.admin) if listeners == "both" else (self.public,):
            while True:
                try:
                    HTTP.get(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except httpx.TransportError:
                    if self._ingress.poll() is not None or time.monotonic() - began > 30:
                        raise RuntimeError(f"the ingress didn't start:\n{self.log}") from None
                    time.sleep(0.02)
        self.started_after = time.monotonic() - began

    def stop_ingress(self) -> float:
        """Ends the ingress as the supervisor does; seconds that it took."""
        assert self._ingress is not None
        began = time.monotonic()
        self._ingress.send_signal(signal.SIGTERM)
        self._ingress.wait(20)
        return time.monotonic() - began

    def stop_database(self) -> None:
        """Ends PostgreSQL at once, as a crash of the machine's memory would."""
        os.killpg(self._server.pid, signal.SIGQUIT)
        self._server.wait(20)

    def start_database(self) -> None:
        """PostgreSQL again over the same data."""
        with (self.home / "postgres.log").open("ab") as log:
            self._server = subprocess.Popen(self.postgres.command(), stdout=log, stderr=log, start_new_session=True, cwd="/")
        self.postgres.wait_ready(30)

    def close(self) -> None:
        """Ends both processes and removes the home."""
        self.stop_ingress()
        self.store.database.dispose()
        os.killpg(self._server.pid, signal.SIGINT)
        self._server.wait(20)
        shutil.rmtree(self.home, ignore_errors=True)

    def post(self, path: str, body: bytes, headers: dict[str, str]) -> httpx.Response:
        """One request to the public listener."""
        return HTTP.post(f"http://127.0.0.1:{self.public}{path}", content=body, headers=headers, timeout=60)

    def webhook(
        self, payload: Any, event: str = "pull_request", *, delivery: str | None = None, body: bytes | None = None, **headers: str
    ) -> httpx.Response:
        """A webhook with a right signature."""
        body = json.dumps(payload).encode() if body is None else body
        sent = {
            "X-GitHub-Event": event,
            "X-GitHub-Delivery": delivery or str(uuid4()),
            "X-Hub-Signature-256": sign(body),
            "Content-Type": "application/json",
        }
        return self.post("/webhooks/github", body, sent | headers)

    def api(self, method: str, path: str, key: str | None = None, **more: Any) -> httpx.Response:
        """One request to the admin listener."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return HTTP.request(method, f"http://127.0.0.1:{self.admin}{path}", headers=headers, timeout=30, **more)

    def scrape(self, port: int, **headers: str) -> httpx.Response:
        """What Prometheus is told by a listener."""
        shown = {"Authorization": f"Bearer {self.metrics_token}"}
        return HTTP.get(f"http://127.0.0.1:{port}/metrics", headers=shown | headers, timeout=30)

    def deliveries(self) -> list[dict[str, Any]]:
        """Stored deliveries of the owner."""
        with self.store.database.owner(self.owner.id) as connection:
            return [dict(row) for row in connection.execute(text("select * from deliveries order by received_at")).mappings()]

    def raw(self, data: bytes, *, port: int | None = None, seconds: float = 30) -> bytes:
        """Bytes as they are, over one connection; what came back before it closed or went quiet."""
        with socket.create_connection(("127.0.0.1", port or self.public), timeout=seconds) as wire:
            with contextlib.suppress(OSError):  # answered and closed while we were still sending
                wire.sendall(data)
            received = b""
            try:
                while chunk := wire.recv(65_536):
                    received += chunk
                    if b"\r\n\r\n" in received:
                        break
            except OSError:
                pass
            return received


@pytest.fixture(scope="session")
def world() -> Iterator[IngressWorld]:
    """One running ingress for a test module."""
    running = IngressWorld()
    yield running
    running.close()
