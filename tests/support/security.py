"""An owner whose alerts are the running twin's."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from dagster import DagsterInstance
from sqlalchemy import text

from kilo_pipelines.cloud_agent.model_proxy import control_socket
from kilo_pipelines.jobs import default_jobs
from kilo_pipelines.ops.security_sync import OwnerSync, sync_owner
from kilo_pipelines.resources.cloud_agent import CloudAgentResource
from kilo_pipelines.resources.github import GitHubResource
from kilo_pipelines.resources.store import StoreResource
from kilo_pipelines.sensors import work_once
from kilo_pipelines.services.security.config import SERVICE, SecurityConfig, activated
from kilo_pipelines.settings import Settings, write_secret
from kilo_pipelines.store import FindingRow, ItemRow, Repository, Store
from tests.conftest import Database
from tests.support.twin import Twin

_made: Counter[str] = Counter()


def _new_name() -> str:
    """A name of the running test's own: the twin's alerts follow from the name, and so each test has its world in whatever order."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]
    _made[test] += 1
    return f"sync-{zlib.crc32(f'{test}:{_made[test]}'.encode()):08x}"


_storefronts: dict[int, dict[str, Any]] = {}
LOG = logging.getLogger("sync")


@contextmanager
def syncing(home: Path, **more: str) -> Iterator[Twin]:
    """A twin, and settings that lead to it."""
    running = Twin(home / "twin", **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILO_HOME", str(home))
        patch.setenv("KILO_GITHUB_API_URL", running.api)
        patch.setenv("KILO_GITHUB_APP_ID", str(running.credentials["app_id"]))
        write_secret(Settings().github_private_key_file, running.credentials["private_key_pem"])
        yield running
    running.stop()


@contextmanager
def with_model(running: Twin) -> Iterator[None]:
    """The model proxy before the twin's model, and the scripted agent; inside `syncing`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILO_MODEL_BASE_URL", f"http://localhost:{running.port}/model/v1")
        patch.setenv("KILO_AGENT", "scripted")
        patch.setenv("KILO_REGISTRIES", f'{{"npm": "http://localhost:{running.port}/npm"}}')
        settings = Settings()
        write_secret(settings.model_key_file, running.credentials["model_api_key"])
        proxy = subprocess.Popen([sys.executable, "-m", "kilo_pipelines.cloud_agent.model_proxy"], env=dict(os.environ))
        deadline = time.monotonic() + 20
        while not control_socket(settings).exists():
            assert proxy.poll() is None and time.monotonic() < deadline, "the model proxy doesn't start"
            time.sleep(0.05)
        yield
        proxy.terminate()
        proxy.wait(10)


class _Held:
    """What the store resource of these runs reaches: Dagster copies resources."""

    store: Store


class _TheStore(StoreResource):
    def get(self) -> Store:
        return _Held.store


class Dispatcher:
    """Carries out what the shards would ask for, run after run in this process, until nothing is left to do."""

    def __init__(self, database: Database, instance: DagsterInstance) -> None:
        self._database, self._instance = database, instance
        _Held.store = database.store
        self._jobs = {job.name: job for job in default_jobs()}
        self.runs: list[str] = []
        database.store.sessions.ensure_capacity(2)

    def run(self, job_name: str, op_name: str, ids: list[UUID], **tags: str) -> None:
        """One run of a job."""
        self.runs.append(job_name)
        done = self._jobs[job_name].execute_in_process(
            run_config={"ops": {op_name: {"config": {"ids": [str(one) for one in ids]}}}},
            resources={"store": _TheStore(), "github": GitHubResource(), "cloud_agent": CloudAgentResource()},
            instance=self._instance,
            tags=tags,
        )
        assert done.success

    def work(self, owner_id: UUID, rounds: int = 40) -> None:
        """All offers of an owner, until there are none."""
        for _ in range(rounds):
            if not self.once(owner_id):
                return
        raise AssertionError("there is always something to do")

    def once(self, owner_id: UUID) -> int:
        """What an owner is offered now; how many runs that were."""
        # The clock of these tests is moved by hand; the waits of the last round are over.
        self._database.clock.advance(timedelta(seconds=1))
        asked = [one for one in work_once(self._database.store) if one.tags["kilo/owner"] == str(owner_id)]
        for request in asked:
            ((op_name, config),) = request.run_config["ops"].items()
            self.run(str(request.job_name), op_name, [UUID(one) for one in config["config"]["ids"]], **request.tags)
        return len(asked)


def seeded(twin: Twin, alerts: int, names: list[str]) -> list[dict[str, Any]]:
    """New repositories with alerts. The twin's one storefront is told of when it is made, and kept in mind here."""
    made: list[dict[str, Any]] = twin.control("seed-alerts", count=alerts, repositories=names)["repositories"]
    for one in made:
        if one["repository"].endswith("/storefront"):
            _storefronts[twin.port] = one
    return made


class Owner:
    """An owner with some repositories of the twin and the Security Agent on."""

    def __init__(self, database: Database, twin: Twin, repositories: int, alerts: int, **config: Any) -> None:
        self.twin, self.store, self.clock = twin, database.store, database.clock
        made = seeded(twin, alerts, [_new_name() for _ in range(repositories)])
        self.repositories = made[:repositories]
        self.names = [str(one["repository"]) for one in self.repositories]
        self.id = self.store.owners.create("organization", self.names[0]).id
        self.store.owners.connect(
            self.id,
            provider="github",
            installation_id=twin.credentials["installation_id"],
            account="acme",
            repositories=[Repository(one["repository_id"], one["repository"], "main", False) for one in self.repositories],
            actor="test",
        )
        self.store.owners.put_config(self.id, SERVICE, config, enabled=True, expected_revision=0, actor="test")

    def connect(self, repository_id: int, full_name: str) -> None:
        """One more repository, which may be another owner's, too."""
        self.store.owners.connect(
            self.id,
            provider="github",
            installation_id=self.twin.credentials["installation_id"],
            account="acme",
            repositories=[Repository(repository_id, full_name, "main", False)],
            actor="test",
        )

    def sync(self, **more: Any) -> OwnerSync:
        return sync_owner(self.store, GitHubResource(), self.id, LOG, **more)

    def fault(self, name: str, kind: str = "error", **more: Any) -> None:
        self.twin.fault("GET", f"{name}/dependabot", kind, **more)

    def fresh(self) -> dict[str, bool]:
        return {one["full_name"]: one["succeeded_at"] is not None for one in self.store.findings.syncs(self.id)}

    def by_status(self) -> dict[str, int]:
        numbers = self.store.findings.numbers(self.id)
        return {name: numbers[name] for name in ("open", "fixed", "ignored")}

    def select(self, repositories: list[int]) -> None:
        """Only these repositories; on or off stays."""
        setting = self.store.owners.config(self.id, SERVICE)
        assert setting is not None
        chosen = {**setting.config, "repository_selection_mode": "selected", "selected_repository_ids": repositories}
        self.store.owners.put_config(
            self.id, SERVICE, chosen, enabled=setting.enabled, expected_revision=setting.revision, actor="test"
        )

    def configure(self, **config: Any) -> None:
        """Other settings, as `security settings` saves them."""
        setting = self.store.owners.config(self.id, SERVICE)
        assert setting is not None
        before = SecurityConfig.model_validate(setting.config)
        after = activated(before, SecurityConfig.model_validate(setting.config | config), self.clock.now())
        self.store.owners.put_config(
            self.id, SERVICE, after.model_dump(mode="json"), enabled=True, expected_revision=setting.revision, actor="test"
        )

    def findings(self, **wanted: Any) -> list[FindingRow]:
        """Findings with these values."""
        found = [
            one for number in self._ids() for one in self.store.findings.of_repository(self.id, number, open_or_superseded=False)
        ]
        return [one for one in found if all(getattr(one, name) == value for name, value in wanted.items())]

    def _ids(self) -> list[int]:
        return [int(one["repository_id"]) for one in self.repositories]

    def items(self, service: str) -> list[ItemRow]:
        """Its work items of a service, newest first."""
        found = [
            self.store.queue.get(one["id"]) for one in self.store.queue.items(owner_id=self.id, service=service, limit=1_000)
        ]
        return [one for one in found if one is not None]

    def audited(self, action: str) -> list[dict[str, Any]]:
        """Data of its audit events of an action."""
        with self.store.database.owner(self.id) as connection:
            found = connection.execute(
                text("select data from audit_events where action = :action order by id"), {"action": action}
            )
            return [row[0] for row in found]


class Storefront(Owner):
    """The twin's shop: one alert whose package is reached, one whose package nobody imports."""

    def __init__(self, database: Database, twin: Twin, **config: Any) -> None:
        self.twin, self.store, self.clock = twin, database.store, database.clock
        seeded(twin, 1, [_new_name()])
        self.repositories = [_storefronts[twin.port]]
        self.names = [str(one["repository"]) for one in self.repositories]
        self.id = self.store.owners.create("organization", _new_name()).id
        self.connect(int(self.repositories[0]["repository_id"]), self.names[0])
        self.store.owners.put_config(self.id, SERVICE, config, enabled=True, expected_revision=0, actor="test")
