"""The scenario `security` of the demonstration: alerts, deadlines, analyses, a dismissal and a pull request, seen from outside."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar
from uuid import UUID

from kilo_pipelines.acts.analysis import analyse
from kilo_pipelines.acts.dismissal import dismiss
from kilo_pipelines.acts.remediation import admit
from kilo_pipelines.cli import setup
from kilo_pipelines.cli.supervisor import Platform
from kilo_pipelines.cli.world import DEMO_ALERTS
from kilo_pipelines.services.security import sla
from kilo_pipelines.settings import Settings
from kilo_pipelines.store import AnalysisRow, FindingRow, Store

T = TypeVar("T")

ACTOR = "demo"
SHOP = "acme/storefront"
# The slowest step is a session with the real agent; one that takes ten minutes has failed.
STEP_SECONDS = 600.0


class DemoError(ValueError):
    """A step didn't come to its end; the message says which."""


def demo(platform: Platform, say: Callable[[str], None]) -> dict[str, Any]:
    """The scenario's JSON object, with `ok`."""
    settings = platform.settings
    store = setup.open_store(settings)
    owner_id = setup.ensure_demo_owner(settings, store, setup.twin_credentials(settings), "critical")
    step = _Steps(platform, store, owner_id, say)
    synced = step.sync()
    found = step.analyses()
    dismissed = step.dismissal(found["unused"])
    pull = step.remediation(found["reached"])
    numbers = store.findings.numbers(owner_id)
    quarantined = len(store.findings.quarantined(owner_id))
    within = sla.percent(numbers["within_due"], numbers["within_due"] + numbers["overdue"])
    return {
        "findings": numbers["findings"],
        "overdue": numbers["overdue"],
        "quarantined": quarantined,
        "analyses": len(found),
        "dismissed": int(dismissed),
        "remediation_pr": pull,
        "compliance_percent": within,
        "seconds": {"sync": round(synced, 2)},
        "ok": quarantined == 1 and numbers["findings"] > DEMO_ALERTS * 0.9 and dismissed and pull is not None,
    }


class _Steps:
    def __init__(self, platform: Platform, store: Store, owner_id: UUID, say: Callable[[str], None]) -> None:
        self._platform, self._store, self._owner, self._say = platform, store, owner_id, say
        self._settings: Settings = platform.settings

    def _until(self, what: str, look: Callable[[], T | None]) -> T:
        deadline = time.monotonic() + STEP_SECONDS
        while time.monotonic() < deadline:
            self._platform.check()
            found = look()
            if found:
                return found
            time.sleep(0.2)
        raise DemoError(f"{what}: not within {STEP_SECONDS:.0f} s")

    def sync(self) -> float:
        """Switches the Security Agent on; the platform syncs by itself. Seconds from the first repository's begin to the last one's end."""
        self._say(f"{DEMO_ALERTS} alerts in the offline world, one of them broken; the Security Agent is switched on:")
        setup.ensure_demo_security(self._settings, self._store, self._owner, DEMO_ALERTS)

        def done() -> list[dict[str, Any]] | None:
            rows = [one for one in self._store.findings.syncs(self._owner) if one["full_name"] != "acme/orders"]
            return rows if rows and all(one["succeeded_at"] is not None for one in rows) else None

        rows = self._until("sync", done)
        seconds: float = (max(one["succeeded_at"] for one in rows) - min(one["attempted_at"] for one in rows)).total_seconds()
        numbers = self._store.findings.numbers(self._owner)
        self._say(
            f"  synced        {numbers['findings']} findings of {len(rows)} repositories in {seconds:.1f} s:"
            f" {numbers['open']} open, {numbers['overdue']} overdue"
        )
        self._say(f"  assets        {self._settings.dagster_url}/assets/security_findings")
        return seconds

    def analyses(self) -> dict[str, FindingRow]:
        """One finding that its metadata settle, and the shop's two, for which the repository is read."""
        listed = self._store.findings.listed(self._owner, status="open", limit=5_000)
        shop = {one["package_name"]: one["id"] for one in listed if one["repository"] == SHOP}
        rows = {"reached": self._finding(shop["twin-unpack"]), "unused": self._finding(shop["twin-tables"])}
        tools = (self._finding(one["id"]) for one in listed if one["severity"] in ("medium", "low"))
        rows["tool"] = next(one for one in tools if one.dependency_scope == "development")
        self._say("analyses of a tool of the build, a package that requests reach, and one that nobody imports:")
        for finding in rows.values():
            analyse(self._store, finding, role="owner", actor=ACTOR)
        for name, finding in rows.items():
            done = self._until(f"analysis of {name}", lambda finding=finding: self._analysed(finding))  # type: ignore[misc]
            how = done.deep or done.triage or {}
            self._say(f"  {finding.package_name:<13} {'deep' if done.deep else 'shallow'} {done.state}: {how.get('action')}")
            if done.state != "completed":
                raise DemoError(f"the analysis of {finding.package_name} ended {done.state} ({done.reason})")
        return rows

    def _finding(self, finding_id: UUID) -> FindingRow:
        row = self._store.findings.get(self._owner, finding_id)
        assert row is not None  # noqa: S101  # it was just listed
        return row

    def _analysed(self, finding: FindingRow) -> AnalysisRow | None:
        (row,) = self._store.analyses.of_finding(self._owner, finding.id)
        return row if row.ended_at is not None else None

    def dismissal(self, finding: FindingRow) -> bool:
        """The unused package's alert is dismissed here and, seen from outside, at the provider."""
        item = dismiss(self._store, finding, role="owner", actor=ACTOR, reason="not_used", comment="Nobody imports it.")
        if not isinstance(item, UUID):
            raise DemoError(f"the dismissal was refused: {item}")

        def there() -> str | None:
            read = setup.twin_call(self._settings, "read-alert", "--repo", SHOP, "--number", finding.source_id)
            return str(read["dismissed_comment"]) if read["state"] == "dismissed" else None

        comment = self._until("dismissal", there)
        self._say(f"  dismissed     {finding.package_name} at the provider, too: {comment}")
        return self._finding(finding.id).status == "ignored"

    def remediation(self, finding: FindingRow) -> str | None:
        """The reached package is updated by a pull request that stands open at the provider."""
        item = admit(self._store, self._owner, finding.id, origin="manual", actor=ACTOR, role="owner")
        if not isinstance(item, UUID):
            raise DemoError(f"the remediation was refused: {item}")

        def opened() -> list[dict[str, Any]] | None:
            state = self._store.queue.get(item)
            if state is not None and state.state in ("failed", "cancelled"):
                raise DemoError(f"the remediation ended {state.state} ({state.reason})")
            return [one for one in self._store.outbox.of_item(item) if one["state"] == "applied" and one["url"]]

        effect = self._until("remediation", opened)[0]
        seen = setup.twin_call(self._settings, "read", "--repo", SHOP, "--pull", str(effect["external_id"]))
        self._say(f"  pull request  {seen['url']}")
        return str(seen["url"])
