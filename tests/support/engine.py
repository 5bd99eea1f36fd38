"""The engine without Dagster's processes: each step in a forked child that may be killed, on a clock that is moved by hand.

Real: the database, the store, the ops' own functions, the GitHub client, the twin. Left out: Dagster's runs (the platform tests
have them) and the sandbox: a session's end is made up from the pull request's real diff.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import httpx
import jwt
from dagster import OpExecutionContext
from sqlalchemy import text

from kilo_pipelines import failpoints
from kilo_pipelines.cli import setup
from kilo_pipelines.core.clock import ManualClock
from kilo_pipelines.core.diff import hunks_of
from kilo_pipelines.ops import code_review as ops
from kilo_pipelines.ops.effects import apply_effects_of
from kilo_pipelines.resources.cloud_agent import CloudAgentResource
from kilo_pipelines.resources.github import GitHubResource
from kilo_pipelines.resources.github import _app as github_app
from kilo_pipelines.sensors import RECOVERY_INTERVAL_SECONDS, work_once
from kilo_pipelines.settings import Settings, write_secret
from kilo_pipelines.store import Cipher, NewDelivery, SessionClaim, Store
from kilo_twin.__main__ import read_back
from tests.support.http import HTTP
from tests.support.sessions import free_port

LEASE_SECONDS = 10.0
# Longer than an item's own deadline (9.5 h): a session that beats for ever.
ENDLESS_SECONDS = 13 * 3600.0
# Runs that were started and not seen to end are over when their worker's lease would be.
KILLED = -signal.SIGKILL


def _look(store: Store) -> list[Any]:
    """One evaluation of recovery and of a shard."""
    store.recovery.reap()
    return work_once(store)


class _Context:
    """What the ops ask of Dagster: a log, a run without parent, no instance tags."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.run = SimpleNamespace(tags={}, parent_run_id=None)
        self.log = logging.getLogger("engine")

    def add_output_metadata(self, _metadata: dict[str, Any]) -> None:
        """Metadata is the UI's."""


class Engine:
    """One home with a twin, in a given database."""

    def __init__(self, logins: dict[str, str]) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="kilo-e-"))
        self.points = self.home / "points"
        self.points.mkdir()
        port = free_port()
        argv = [sys.executable, "-m", "kilo_twin", "serve", "--home", str(self.home / "twin"), "--port", str(port)]
        self._twin = subprocess.Popen([*argv, "--webhook-url", "http://127.0.0.1:9/nobody"], stderr=subprocess.DEVNULL)
        self.url = f"http://localhost:{port}"
        deadline = time.monotonic() + 30
        while not self._answers():
            assert time.monotonic() < deadline, "the twin doesn't answer"
            time.sleep(0.05)
        self.credentials = json.loads((self.home / "twin" / "credentials.json").read_text())
        self._env = {
            "KILO_HOME": str(self.home),
            "KILO_GITHUB_API_URL": f"{self.url}/api/v3",
            "KILO_GITHUB_APP_ID": str(self.credentials["app_id"]),
            "KILO_LEASE_SECONDS": str(LEASE_SECONDS),
            # The clock jumps; budgets have tests of their own.
            "KILO_GITHUB_READS_PER_HOUR": "1e9",
            "KILO_GITHUB_WRITES_PER_HOUR": "1e9",
            "KILO_PUBLIC_PORT": "9",
        }
        os.environ.update(self._env)
        settings = Settings()
        write_secret(settings.github_private_key_file, self.credentials["private_key_pem"])
        write_secret(settings.encryption_key_file, Cipher.new_key_file())
        write_secret(settings.secrets_dir / "database.json", json.dumps(logins))
        self._logins = logins
        self.clock = ManualClock(datetime.now(UTC))
        self.store = self._open()
        self.owner = setup.ensure_demo_owner(settings, self.store, self.credentials, "critical")
        integration = self.store.owners.by_installation("github", self.credentials["installation_id"])
        assert integration is not None
        self.integration = integration.id
        self.killed_at: datetime | None = None
        # Of agents on this host.
        self.places = 4

    def _answers(self) -> bool:
        try:
            return HTTP.get(f"{self.url}/health").status_code == 200
        except httpx.HTTPError:
            return False

    def _open(self) -> Store:
        settings = Settings()
        return Store(self._logins["app"], self._logins["system"], Cipher.from_file(settings.encryption_key_file), self.clock)

    def close(self) -> None:
        """Ends the twin and forgets the home."""
        self.store.database.dispose()
        self._twin.terminate()
        self._twin.wait(10)
        for name in self._env:
            os.environ.pop(name, None)
        shutil.rmtree(self.home, ignore_errors=True)

    def control(self, call: str, **body: Any) -> dict[str, Any]:
        """What a person does at GitHub."""
        headers = {"authorization": f"Bearer {self.credentials['control_token']}"}
        answer: dict[str, Any] = HTTP.post(f"{self.url}/_twin/{call}", json=body, headers=headers, timeout=60).json()
        assert "error" not in answer, answer
        return answer

    def payload(self, pull: dict[str, Any]) -> bytes:
        """The body of the webhook that the twin sent for this."""
        now = int(time.time())
        token = jwt.encode(
            {"iss": str(self.credentials["app_id"]), "iat": now - 10, "exp": now + 300},
            self.credentials["private_key_pem"],
            "RS256",
        )
        found = HTTP.get(
            f"{self.url}/api/v3/app/hook/deliveries/{pull['delivery']['id']}",
            headers={"authorization": f"Bearer {token}"},
            timeout=30,
        ).json()
        return json.dumps(found["request"]["payload"]).encode()

    # -- processes ---------------------------------------------------------------------------------------------------

    def child(self, work: Callable[[Store], Any]) -> tuple[int, Any]:
        """Runs one step in a process of its own, which may be killed; exit status and what it returned.

        While no point is armed nothing can kill it, and it runs here: a process of its own costs a fork, two connections and a token.
        """
        if not any(one.name != "record" for one in self.points.iterdir()):
            failpoints.arm(self.points)
            try:
                return 0, work(self.store)
            finally:
                failpoints.arm(None)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(reading)
                failpoints.arm(self.points)
                github_app.cache_clear()  # its connections are the parent's
                store = self._open()
                answer = work(store)
                store.database.dispose()
                with os.fdopen(writing, "wb") as pipe:
                    pickle.dump(answer, pipe)
                status = 0
            except BaseException:  # noqa: BLE001  # the parent reads the trace and fails
                (self.home / "step.log").write_text(traceback.format_exc())
            finally:
                os._exit(status)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            content = pipe.read()
        _, waited = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(waited)
        if code == KILLED:
            self.killed_at = self.clock.now()
        else:
            assert code == 0, (self.home / "step.log").read_text()
        return code, pickle.loads(content) if content else None

    # -- steps -------------------------------------------------------------------------------------------------------

    def deliver(self, pull: dict[str, Any], times: int = 1) -> None:
        """GitHub's delivery and its redelivery, until the ingress has answered so many times."""
        body, delivery = self.payload(pull), uuid4().hex
        new = NewDelivery(self.owner, self.integration, delivery, "pull_request", json.loads(body)["action"], body, {})
        answered = 0
        for _ in range(times + 2):
            # Small bodies go together with others, large ones alone (ingress/application.py): both ways are walked.
            if times == 1:
                answered += self.child(lambda store: store.inbox.record_many([(new, None)]))[0] == 0
            else:
                answered += self.child(lambda store: store.inbox.record(new))[0] == 0
            if answered == times:
                return
        raise AssertionError("the delivery was never answered")

    def _run(self, request: Any) -> int:
        ids = next(iter(request.run_config["ops"].values()))["config"]["ids"]
        github, cloud_agent = GitHubResource(), CloudAgentResource()
        run_id = str(uuid4())

        def work(store: Store) -> None:
            context = cast(OpExecutionContext, _Context(run_id))
            if request.job_name == "code_review":
                for one in ids:
                    ops._launch(context, store, github, cloud_agent, UUID(one))
            elif request.job_name == "settle_code_review":
                for one in ids:
                    ops._settle(context, store, github, cloud_agent, UUID(one))
            elif request.job_name == "agent_session":
                self._session(store, UUID(ids[0]), run_id)
                return
            apply_effects_of(context, store, github, ids)

        code, _ = self.child(work)
        return code

    def _session(self, store: Store, session_id: UUID, run_id: str) -> None:
        """A session in the order of `ops.agent_session`: claim, beats and events, end, callback."""
        how = self.behaviour()
        lease = ENDLESS_SECONDS if how == "endless" else LEASE_SECONDS
        claim = store.sessions.claim(session_id, run_id=run_id, lease_s=lease)
        if not isinstance(claim, SessionClaim) or how == "endless":
            return
        store.sessions.event(claim, "agent_started", {})
        asked = store.sessions.beat(claim, LEASE_SECONDS)
        if asked == "cancel":
            store.sessions.finish(claim, status="interrupted", reason="interrupted")
            return
        if how == "stopping":
            store.sessions.requeue(claim, "worker_stopping")
            return
        if how == "crash":
            store.sessions.finish(claim, status="failed", reason="agent_crashed")
        else:
            result, evidence = self._review(claim.spec)
            store.sessions.finish(claim, status="completed", reason=None, result=result, evidence=evidence)
        body = json.dumps({"sessionId": str(session_id)}).encode()
        store.sessions.record_callback(session_id, claim.callback_token, body)

    def behaviour(self) -> str:
        """How sessions go: `crash`, `stopping` and `endless` hold for the first launch of a scenario, then all goes well."""
        plan = self.home / "behaviour"
        if not plan.exists():
            return "honest"
        word = plan.read_text()
        plan.unlink()
        return word

    def _review(self, spec: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """A bound result over the pull request's real diff: one finding on its first changed line."""
        pull = f"{self.url}/api/v3/repos/{spec['repository']['full_name']}/pulls/{spec['pull_number']}"
        token = (
            GitHubResource()
            ._app()
            .token(
                self.credentials["installation_id"],
                [spec["repository"]["external_id"]],
                {"metadata": "read", "pull_requests": "read"},
            )
        )
        files = HTTP.get(f"{pull}/files", headers={"authorization": f"Bearer {token}"}, timeout=30).json()
        ledger, findings = [], []
        for number, file in enumerate(files):
            hunks = hunks_of(file["patch"])
            ledger.append(
                {
                    "entry_id": str(number),
                    "path": file["filename"],
                    "status": "modified",
                    "old_blob": "0" * 40,
                    "new_blob": "1" * 40,
                    "old_mode": "100644",
                    "new_mode": "100644",
                    "bytes": len(file["patch"]),
                    "sent_turn": 1,
                    "hunks": [list(hunk) for hunk in hunks],
                }
            )
            if not findings and hunks:
                findings.append(
                    {
                        "path": file["filename"],
                        "line": hunks[0].new_start,
                        "severity": "critical",
                        "title": "A defect",
                        "body": "Here.",
                    }
                )
        evidence = {
            "evidence_class": "observed",
            "repository_id": spec["repository"]["external_id"],
            "pull_number": spec["pull_number"],
            "base_ref": spec["base_ref"],
            "merge_base": spec["base_sha"],
            "head": spec["head_sha"],
            "diff_hash": "2" * 64,
            "turns": 1,
            "ledger": ledger,
            "result_sha256": "3" * 64,
            "result_turns": [1],
            "agent": "engine",
        }
        return {"nonce": "n" * 16, "summary": "Looked at.", "findings": findings}, evidence

    def turn(self) -> int:
        """One evaluation of a shard, its runs, and one look of recovery; how many runs were asked for."""
        self.store.sessions.ensure_capacity(self.places)
        _, requests = self.child(_look)
        for request in requests or []:
            self._run(request)
        return len(requests or [])

    def until(self, done: Callable[[], bool], *, most: timedelta = timedelta(minutes=10)) -> None:
        """Turns until it is done; the clock moves by recovery's own interval when nothing was to do."""
        end = self.clock.now() + most
        while not done():
            assert self.clock.now() < end, f"not done within {most}: {self.live()}"
            if not self.turn():
                self.clock.advance(timedelta(seconds=RECOVERY_INTERVAL_SECONDS))

    def session_state(self) -> str | None:
        """Of the newest live item's session."""
        live = self.store.queue.items(state="live", limit=1)
        session = self.store.sessions.get(live[0]["session_id"]) if live and live[0]["session_id"] else None
        return session.state if session else None

    def live(self) -> list[dict[str, Any]]:
        """What is under way."""
        return self.store.queue.items(state="live", limit=20) + [
            one for one in self.store.outbox.listed(limit=50) if one["state"] in ("pending", "applying", "dead", "unknown")
        ]

    def quiet(self) -> bool:
        """Nothing waits, runs or is to be written."""
        with self.store.database.system() as connection:
            left = connection.execute(
                text(
                    "select (select count(*) from deliveries where state = 'received') + (select count(*) from effects where state in"
                    " ('pending', 'applying')) + (select count(*) from work_items where ended_at is null or not announced)"
                )
            ).scalar_one()
        return left == 0

    def seen(self, pull: dict[str, Any]) -> dict[str, Any]:
        """What stands on the pull request, over REST."""
        return read_back(self.url, self.credentials, pull["repository"], pull["number"])
