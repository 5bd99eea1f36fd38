"""Shops of the twin whose lock file has vulnerable packages, and analyses that were made by nobody."""

from __future__ import annotations

import subprocess
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import text

from kilo_pipelines.acts.remediation import admit
from kilo_pipelines.ops.findings import policy_for
from kilo_pipelines.ops.security_sync import SOURCE, AlertTaker
from kilo_pipelines.services.security.analysis import snapshot_of
from kilo_pipelines.services.security.config import SERVICE, SecurityConfig
from kilo_pipelines.store import Claimed, FindingRow, NewItem, RemediationRow
from kilo_twin.world_alerts import storefront_history
from tests.conftest import Database
from tests.support.alerts import alert
from tests.support.security import Owner, seeded
from tests.support.twin import Twin

_shops = (f"shop-{number}" for number in count(1))
_known: set[int] = set()
DEEP: dict[str, Any] = {
    "exploitable": True,
    "reasoning": "It is reached.",
    "locations": [],
    "search": [],
    "suggested_fix": "",
    "action": "open_pr",
    "summary": "Reached.",
}


def analysed(
    owner: Owner, finding: FindingRow, *, commit: str | None = None, triage: dict[str, Any] | None = None, **deep: Any
) -> UUID:
    """A completed analysis of the finding as it is: a deep one of a commit, or with `triage` a shallow one."""
    new = NewItem(
        service="security_analysis",
        subject_key=f"finding:{finding.id}",
        repository_id=finding.repository_id,
        priority=0,
        details={"finding_id": str(finding.id), "origin": "manual", "requested_by": "test", "mode": "deep"},
    )
    item = owner.store.queue.open(owner.id, new, actor="test")
    assert item is not None
    claim = owner.store.queue.claim(item, "security_analysis", run_id="test", pools=lambda _kind, _plan: {}, lease_s=60)
    assert isinstance(claim, Claimed), claim
    found = {"deep": DEEP | deep, "commit_sha": commit} if triage is None else {"triage": triage}
    details = {"snapshot": snapshot_of(finding), "completed_at": owner.clock.now().isoformat(), **found}
    assert owner.store.queue.complete(claim, "analysed", details=details, effects=[])
    return item


def leave(database: Database, owner_id: UUID) -> None:
    """An owner's installation is nobody's again: two owners of one are held apart by writing for neither (threats, rule 16)."""
    with database.store.database.owner(owner_id) as connection:
        connection.execute(text("update integrations set disconnected_at = now() where owner_id = :owner"), {"owner": owner_id})


class Shop(Owner):
    """An owner with a repository of its own whose lock file has two vulnerable packages, each with its alert."""

    def __init__(self, database: Database, twin: Twin, home: Path, **config: Any) -> None:
        self.twin, self.store, self.clock = twin, database.store, database.clock
        if twin.port not in _known:
            _known.add(twin.port)
            seeded(twin, 1, [f"advisories-{twin.port}"])  # a scan knows the advisories then
        name = next(_shops)
        path = home / name
        path.mkdir()
        git = ["git", "-c", "user.name=grace", "-c", "user.email=grace@example.test"]
        subprocess.run([*git, "init", "-q", "-b", "main"], cwd=path, check=True)
        for subject, files in storefront_history():
            for file, content in files.items():
                (path / file).parent.mkdir(exist_ok=True)
                (path / file).write_text(content or "")
            subprocess.run([*git, "add", "-A"], cwd=path, check=True)
            subprocess.run([*git, "commit", "-qm", subject], cwd=path, check=True)
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "Nothing"], cwd=path, check=True)
        made = twin.control("import-repository", path=str(path), base="HEAD~1", head="HEAD")
        self.full_name = str(made["repository"])
        self.repository_id = int(made["repository_id"])
        self.repositories = [{"repository": self.full_name, "repository_id": self.repository_id}]
        self.names = [self.full_name]
        twin.control("scan", repository=self.full_name)
        self.id = self.store.owners.create("organization", name).id
        self.connect(self.repository_id, self.full_name)
        settings = {"remediation_registries": ["npm"], **config}
        self.store.owners.put_config(self.id, SERVICE, settings, enabled=True, expected_revision=0, actor="test")
        self.sync()

    def finding(self, package: str) -> FindingRow:
        """Its finding of a package."""
        (found,) = [one for one in self.findings(package_name=package) if int(one.source_id) < 900]
        return found

    def another(self, package: str, number: int = 901) -> FindingRow:
        """One more finding of a package that the shop has an alert of, with the same patch; the twin knows nothing of it."""
        first = self.finding(package)
        raw = alert(
            number,
            **{
                "dependency.package.name": package,
                "security_vulnerability.package.name": package,
                "security_vulnerability.first_patched_version.identifier": first.patched_version,
                "dependency.manifest_path": first.manifest_path,
            },
        )
        policy = policy_for(self.store, self.id, SecurityConfig(), actor="test")
        taker = AlertTaker(self.id, self.repository_id, policy, first_sync=True)
        good, bad = taker.sort([raw])
        assert not bad
        self.store.findings.apply_page(self.id, self.repository_id, SOURCE, good, taker.decide, cursor=None)
        (found,) = self.findings(source_id=str(number))
        return found

    def asked(self, finding: FindingRow, **more: Any) -> UUID:
        """A remediation that a person starts."""
        item = admit(self.store, self.id, finding.id, origin="manual", actor="test", role="owner", **more)
        assert isinstance(item, UUID), item
        return item

    def row(self, item: UUID) -> RemediationRow:
        """The remediation of an item."""
        (found,) = [one for one in self.store.remediations.of_owner(self.id) if one.item_id == item]
        return found

    def pulls(self) -> list[dict[str, Any]]:
        """Open pull requests of ours on the twin."""
        found = self.twin.installation(repository_id=self.repository_id).repository(self.full_name).get_pulls(state="all")
        return [one.raw_data for one in found if one.head.ref.startswith("security-remediation/")]
