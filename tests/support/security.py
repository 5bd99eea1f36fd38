"""An owner whose alerts are the running twin's."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from kilo_pipelines.ops.security_sync import OwnerSync, sync_owner
from kilo_pipelines.resources.github import GitHubResource
from kilo_pipelines.services.security.config import SERVICE
from kilo_pipelines.settings import Settings, write_secret
from kilo_pipelines.store import Repository
from tests.conftest import Database
from tests.support.twin import Twin

_names = (f"sync-{number}" for number in count(1))
LOG = logging.getLogger("sync")


@contextmanager
def syncing(home: Path) -> Iterator[Twin]:
    """A twin, and settings that lead to it."""
    running = Twin(home / "twin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILO_HOME", str(home))
        patch.setenv("KILO_GITHUB_API_URL", running.api)
        patch.setenv("KILO_GITHUB_APP_ID", str(running.credentials["app_id"]))
        write_secret(Settings().github_private_key_file, running.credentials["private_key_pem"])
        yield running
    running.stop()


class Owner:
    """An owner with some repositories of the twin and the Security Agent on."""

    def __init__(self, database: Database, twin: Twin, repositories: int, alerts: int, **config: Any) -> None:
        self.twin, self.store = twin, database.store
        made = twin.control("seed-alerts", count=alerts, repositories=[next(_names) for _ in range(repositories)])["repositories"]
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
