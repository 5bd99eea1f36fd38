"""A twin and a model proxy as processes, and sessions run against them without the database or Dagster."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import httpx
from pydantic import BaseModel, ValidationError

from kilo_pipelines.cloud_agent.adapters import AgentAdapter
from kilo_pipelines.cloud_agent.adapters.scripted import ScriptedAdapter
from kilo_pipelines.cloud_agent.install import package_directory
from kilo_pipelines.cloud_agent.model_proxy import control_socket
from kilo_pipelines.cloud_agent.protocol import Heartbeat, RepositoryRef, SessionLimits, SessionOutcome, SessionSpec
from kilo_pipelines.cloud_agent.runner import RunnerConfig, SelfHostedRunner
from kilo_pipelines.cloud_agent.sandbox import Sandbox
from kilo_pipelines.core.clock import SystemClock
from kilo_pipelines.core.evidence import Evidence
from kilo_pipelines.core.limits import Usage
from kilo_pipelines.core.markers import Marker
from kilo_pipelines.core.session import Brief, BriefPart, SessionTask, WorkspaceFacts
from kilo_pipelines.providers.github import GitHubApp
from kilo_pipelines.services.code_review.brief import CodeReviewTask
from kilo_pipelines.services.code_review.config import CodeReviewConfig
from kilo_pipelines.services.code_review.launch import task_of
from kilo_pipelines.services.code_review.outcome import Interpretation, ReviewSubject, SessionEnd, interpret
from kilo_pipelines.settings import Settings, write_secret
from tests.support.git import BareRepository, git
from tests.support.http import HTTP


class Control:
    """Heartbeats that a test decides about, events that it can read."""

    def __init__(self, cancel_after: float | None = None) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.kept: SessionOutcome | None = None
        self.meters: dict[str, Usage] = {}
        self._cancel_at = None if cancel_after is None else time.monotonic() + cancel_after

    def beat(self) -> Heartbeat:
        return Heartbeat.CANCEL if self._cancel_at and time.monotonic() > self._cancel_at else Heartbeat.OK

    def event(self, kind: str, data: dict[str, Any]) -> None:
        self.events.append((kind, data))

    def spent(self, meter: str, usage: Usage) -> bool:
        self.meters[meter] = usage
        return True

    def accepted(self, outcome: SessionOutcome) -> bool:
        self.kept = outcome
        return True


class ChangeResult(BaseModel):
    """What the agent of a write session answers in tests."""

    nonce: str
    status: Literal["done", "blocked"]
    summary: str


class ChangeTask:
    """The smallest half of a write session; `orders` go into the brief, fields of its own would be let through."""

    def __init__(self, task: dict[str, Any]) -> None:
        self._orders, self._message = task.get("orders", ""), task.get("message", "Update demo\n\nTo 1.0.1.")

    def compose(self, facts: WorkspaceFacts, nonce: str, result_path: str) -> Brief:
        prompt = (
            f"Nonce: {nonce}\nResult path: {result_path}\nCommit: {facts.head_sha}\n{self._orders}\n"
            f"Schema:\n{json.dumps(ChangeResult.model_json_schema())}"
        )
        return Brief(parts=[BriefPart(prompt, {})])

    def validate(self, result: object, nonce: str) -> list[str]:
        try:
            return [] if ChangeResult.model_validate(result).nonce == nonce else ["nonce"]
        except ValidationError as failure:
            return [str(failure)]

    def repair_prompt(self, problems: list[str], nonce: str, result_path: str) -> str:
        return f"Nonce: {nonce}\nResult path: {result_path}\nSchema:\n{json.dumps(ChangeResult.model_json_schema())}"

    def merge(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        return results[0]

    def commit_message(self, result: dict[str, Any]) -> str | None:
        return self._message


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class SessionWorld:
    """The offline world below the engine."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="kilo-s-"))
        self.port = free_port()
        self.twin_home = self.home / "twin"
        argv = [sys.executable, "-m", "kilo_twin", "serve", "--home", str(self.twin_home), "--port", str(self.port)]
        self._twin = subprocess.Popen([*argv, "--webhook-url", "http://127.0.0.1:9/nobody"])
        self._wait(lambda: HTTP.get(f"http://localhost:{self.port}/health").status_code == 200)
        self.credentials = json.loads((self.twin_home / "credentials.json").read_text())
        self.settings = Settings(home=self.home, run_dir=self.home / "s", model_base_url=f"http://localhost:{self.port}/model/v1")
        write_secret(self.settings.model_key_file, self.credentials["model_api_key"])
        env = os.environ | {
            "KILO_HOME": str(self.home),
            "KILO_RUN_DIR": str(self.home / "s"),
            "KILO_MODEL_BASE_URL": str(self.settings.model_base_url),
            "KILO_MODEL": "scripted-reviewer",
        }
        self._proxy = subprocess.Popen([sys.executable, "-m", "kilo_pipelines.cloud_agent.model_proxy"], env=env)
        self._wait(lambda: control_socket(self.settings).exists())
        self.app = GitHubApp(
            f"http://localhost:{self.port}/api/v3", self.credentials["app_id"], self.credentials["private_key_pem"], SystemClock()
        )

    @staticmethod
    def _wait(ready: Any) -> None:
        deadline = time.monotonic() + 20
        while True:
            try:
                if ready():
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, "not ready"
            time.sleep(0.05)

    def control(self, call: str, **body: Any) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {self.credentials['control_token']}"}
        answer: dict[str, Any] = HTTP.post(
            f"http://localhost:{self.port}/_twin/{call}", json=body, headers=headers, timeout=60
        ).json()
        assert "error" not in answer, answer
        return answer

    def spec(self, pull: dict[str, Any], limits: SessionLimits | None = None, **settings: Any) -> SessionSpec:
        reader = self.app.installation(
            self.credentials["installation_id"],
            [pull["repository_id"]],
            {"metadata": "read", "pull_requests": "read", "contents": "read"},
        )
        state = reader.pull(pull["repository"], pull["number"])
        config = CodeReviewConfig.model_validate(settings).model_dump(mode="json")
        return SessionSpec(
            session_id=uuid4(),
            owner_id=uuid4(),
            service="code_review",
            repository=RepositoryRef(
                provider="github",
                external_id=state.repository_id,
                full_name=state.full_name,
                clone_url=state.clone_url,
                default_branch=state.default_branch,
            ),
            pull_number=state.number,
            base_ref=state.base_ref,
            base_sha=state.base_sha,
            head_sha=state.head_sha,
            checkout_ref=f"refs/pull/{state.number}/head",
            agent="scripted",
            model="scripted-reviewer",
            limits=limits or SessionLimits(),
            task=task_of(state, {"full_name": state.full_name, "settings": config}, previous_summary=None, previous_head=None),
        )

    def branch_spec(self, pull: dict[str, Any], head: str, service: str = "remediation", **changes: Any) -> SessionSpec:
        """A session on the head of `main`, without a pull request."""
        found = self.spec(pull).model_dump()
        writing = {"writes": True, "branch": f"kilo/{uuid4()}/1"} if service == "remediation" else {}
        on_branch = {
            "pull_number": None,
            "base_ref": "main",
            "base_sha": head,
            "head_sha": head,
            "checkout_ref": "refs/heads/main",
        }
        return SessionSpec.model_validate({**found, **on_branch, "service": service, "task": {}, **writing, **changes})

    def token(self, repository_id: int, level: str) -> str:
        """A token for the contents of one repository."""
        return self.app.token(self.credentials["installation_id"], [repository_id], {"metadata": "read", "contents": level})

    def run(
        self,
        spec: SessionSpec,
        adapter: AgentAdapter,
        control: Control | None = None,
        sandbox: Sandbox | None = None,
        registries: dict[str, str] | None = None,
        task: SessionTask | None = None,
        accepted: SessionOutcome | None = None,
    ) -> SessionOutcome:
        config = RunnerConfig(
            self.home / "repositories",
            self.home / "work",
            control_socket(self.settings),
            lambda: sandbox or Sandbox.find(package_directory()),
            registries or {},
        )
        if task is None:
            task = CodeReviewTask(spec.task) if spec.service == "code_review" else ChangeTask(spec.task)
        repository_id = spec.repository.external_id
        return SelfHostedRunner(config, adapter).run(
            spec,
            task,
            control or Control(),
            lambda: self.token(repository_id, "read"),
            lambda: self.token(repository_id, "write"),
            accepted,
        )

    def judge(self, spec: SessionSpec, outcome: SessionOutcome, gate: str = "critical") -> Interpretation:
        """What the platform would conclude of this outcome."""
        subject = ReviewSubject(
            "item",
            1,
            "subject",
            spec.repository.external_id,
            spec.repository.full_name,
            spec.pull_number or 0,
            spec.base_ref,
            spec.head_sha,
            None,
            CodeReviewConfig.model_validate({"gate_threshold": gate}),
        )
        evidence: Evidence | None = outcome.evidence
        end = SessionEnd(str(spec.session_id), str(outcome.status), outcome.reason, outcome.result, evidence)
        return interpret(subject, end, [], [], Marker(b"k" * 32))

    def close(self) -> None:
        for process in (self._proxy, self._twin):
            process.terminate()
            process.wait(10)
        shutil.rmtree(self.home, ignore_errors=True)


# The repository holds what the attacks need: a link, a submodule, a program, a directory.
FILES: dict[str, bytes | tuple[str, bytes] | None] = {
    "package.json": b'{"name": "demo", "version": "2.0.0", "dependencies": {"leftish": "1.0.0"}}\n',
    "package-lock.json": b'{"name": "demo", "lockfileVersion": 3, "packages": {"node_modules/leftish": {"version": "1.0.0"}}}\n',
    ".gitignore": b"node_modules/\n",
    "link": ("120000", b"package.json"),
    "lib": ("160000", b"c" * 40),
    "run.sh": ("100644", b"#!/bin/sh\n"),
    "src/index.js": b"require('leftish')\n",
    "docs/notes.md": b"notes\n",
}


class Provider:
    """The twin's repository that the sessions write to."""

    def __init__(self, world: SessionWorld) -> None:
        self.world = world
        self.pull = world.control("open-pull", kind="clean")
        self.server = BareRepository(world.twin_home / "git" / f"{self.pull['repository']}.git")
        self.head = self.server.commit(FILES, git(self.server.path, "rev-parse", "refs/heads/main"))
        git(self.server.path, "update-ref", "refs/heads/main", self.head)

    def refs(self) -> dict[str, str]:
        listed = git(self.server.path, "for-each-ref", "--format=%(refname) %(objectname)").splitlines()
        return dict(line.split() for line in listed)  # type: ignore[misc]

    def change(self, deed: str, control: Control | None = None, **changes: Any) -> tuple[SessionSpec, SessionOutcome]:
        """A write session of the agent that does this."""
        spec = self.world.branch_spec(self.pull, self.head, **changes)
        return spec, self.world.run(spec, ScriptedAdapter(f"write_{deed}"), control)

    def changed(self, commit: str) -> list[tuple[str, str]]:
        """(mode, path) of what a commit changes."""
        raw = git(self.server.path, "diff-tree", "-r", "--raw", "--no-renames", f"{commit}^", commit)
        return [(line.split()[1], line.split("\t")[1]) for line in raw.splitlines()]
