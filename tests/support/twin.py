"""The twin as a process of its own, and clients of the platform against it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx

from kilo_pipelines.core.clock import SystemClock
from kilo_pipelines.core.effects import EffectIntent, EffectKind
from kilo_pipelines.providers.github import GitHubApp, GitHubInstallation
from tests.support.http import HTTP

READ = {"metadata": "read", "pull_requests": "read", "contents": "read"}
POST = {"metadata": "read", "pull_requests": "write", "issues": "write", "checks": "write"}


class Twin:
    """`python -m kilo_twin serve` in a home of its own, with one open pull request for those who ask for it."""

    def __init__(self, home: Path, webhook_url: str = "http://localhost:9/nobody") -> None:
        self.webhook_url = webhook_url
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.api = f"http://localhost:{self.port}/api/v3"
        self.home = home
        self.start()
        self.credentials: dict[str, Any] = json.loads((home / "credentials.json").read_text())

    def start(self) -> None:
        """Starts the process over what is in its home."""
        command = [sys.executable, "-m", "kilo_twin", "serve", "--home", str(self.home), "--port", str(self.port)]
        self.process = subprocess.Popen([*command, "--webhook-url", self.webhook_url])
        deadline = time.monotonic() + 30
        while True:
            try:
                HTTP.get(f"http://localhost:{self.port}/health")
                break
            except httpx.TransportError:
                assert self.process.poll() is None and time.monotonic() < deadline, "the twin doesn't start"
                time.sleep(0.05)

    @cached_property
    def pull(self) -> dict[str, Any]:
        """The pull request, opened when somebody asks for it."""
        return self.control("open-pull", kind="planted")

    def credentials_now(self) -> dict[str, Any]:
        """The App's as they are now: another one may have taken its place."""
        found: dict[str, Any] = json.loads((self.home / "credentials.json").read_text())
        return found

    def control(self, call: str, **body: Any) -> dict[str, Any]:
        """One call of the twin's control API."""
        headers = {"Authorization": f"Bearer {self.credentials['control_token']}"}
        answer: dict[str, Any] = HTTP.post(
            f"http://localhost:{self.port}/_twin/{call}", json=body, headers=headers, timeout=60
        ).json()
        assert "error" not in answer, answer
        return answer

    def fault(self, method: str, path: str, kind: str = "error", times: int = 1, **more: Any) -> None:
        """The next calls of this method, whose path holds this text, go wrong."""
        self.control("faults", faults=[{"method": method, "path": path, "kind": kind, "left": times, **more}])

    def app(self, clock: Any = None) -> GitHubApp:
        """A client with nothing cached."""
        return GitHubApp(self.api, self.credentials["app_id"], self.credentials["private_key_pem"], clock or SystemClock())

    def installation(self, permissions: dict[str, str] = POST, repository_id: int | None = None) -> GitHubInstallation:
        """A client for one repository: the pull request's unless told otherwise."""
        repository_id = repository_id or self.pull["repository_id"]
        return self.app().installation(self.credentials["installation_id"], [repository_id], permissions)

    def stop(self) -> None:
        """Ends the process."""
        self.process.terminate()
        self.process.wait(10)

    def intent(self, kind: EffectKind, **payload: Any) -> EffectIntent:
        """An effect on the one repository."""
        return EffectIntent(kind=kind, intent_key="k", subject_key="s", payload={"full_name": self.pull["repository"], **payload})

    def read(self) -> dict[str, Any]:
        """The pull request as a separate process reads it back."""
        from kilo_twin.__main__ import read_back

        return read_back(f"http://localhost:{self.port}", self.credentials, self.pull["repository"], self.pull["number"])
