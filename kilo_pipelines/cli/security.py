"""`kilo-pipelines security`: findings, their deadlines, syncs."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import click

from kilo_pipelines.cli.client import api
from kilo_pipelines.cli.common import as_json, end, show
from kilo_pipelines.cli.work import settings_of
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.work import FINAL, WorkState
from kilo_pipelines.services.security.config import SERVICE
from kilo_pipelines.store import OUTCOMES
from kilo_pipelines.store.finding_lists import ORDERS

# The control API's largest page.
PAGE = 100
# An owner's share of a run is shorter; behind others it waits for its turn.
SYNC_SECONDS = 3_600.0

owner_option = click.option("--owner", type=click.UUID, help="Default: the only owner.")


@click.group()
def security() -> None:
    """The Security Agent: findings, their deadlines, syncs."""


@security.command("findings")
@owner_option
@click.option("--repository", type=click.IntRange(1, 2**63 - 1), help="Only of the repository with this id at the provider.")
@click.option("--status", type=click.Choice(["open", "fixed", "ignored", "closed"]), default="open", show_default=True)
@click.option("--severity", type=click.Choice(["critical", "high", "medium", "low"]))
@click.option(
    "--outcome", type=click.Choice(OUTCOMES), help="Of the analysis; fixed and dismissed want a --status that lets them through."
)
@click.option("--overdue", is_flag=True)
@click.option("--sort", type=click.Choice(list(ORDERS)), default="severity_desc", show_default=True)
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@click.option("--offset", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@as_json
def security_findings(
    owner: UUID | None,
    repository: int | None,
    status: str,
    severity: str | None,
    outcome: str | None,
    overdue: bool,
    sort: str,
    limit: int,
    offset: int,
    plain: bool,
) -> None:
    """Lists findings with their deadlines, the worst first."""
    asked = api(plain)
    found: list[dict[str, Any]] = []
    while len(found) < limit:
        page = asked.get(
            "/security/findings",
            owner=owner,
            status=status,
            severity=severity,
            repository=repository,
            outcome=outcome,
            overdue=overdue,
            sort=sort,
            limit=min(PAGE, limit - len(found)),
            offset=offset + len(found),
        )
        found += page["findings"]
        if not page["findings"] or offset + len(found) >= page["total"]:
            break
    show(plain, found, lambda: "\n".join(map(_line, found)) or "no findings")


def _line(one: dict[str, Any]) -> str:
    due = one["due_at"][:10] if one["due_at"] else "no deadline"
    late = " OVERDUE" if one["overdue"] else ""
    return f"{one['id']}  {one['severity']:<8} {one['status']:<7} due {due}{late}  {one['repository']}  {one['package_name']}: {one['title'][:60]}"


@security.command("show")
@click.argument("finding", type=click.UUID)
@as_json
def security_show(finding: UUID, plain: bool) -> None:
    """Shows one finding: what the source says, what was decided here, its deadline and its history."""
    found = api(plain).get(f"/security/findings/{finding}")
    row = found["finding"]

    def text() -> str:
        lines = [
            f"{row['severity']} {row['status']}  {row['package_name']} ({row['package_ecosystem']}) in {row['manifest_path']}",
            row["title"],
        ]
        lines += [f"{name}: {value}" for name, value in _facts(row) if value]
        lines += map(_analysis_line, found["analyses"])
        lines.append(found["sla"]["explained"])
        lines += [f"  {one['at'][:16]} {one['kind']} {one['severity'] or ''}" for one in found["history"]]
        return "\n".join(lines)

    show(plain, found, text)


def _analysis_line(one: dict[str, Any]) -> str:
    result = one["deep"] or one["triage"] or {}
    told = f": {result['action']}" if one["completed_at"] else ""
    how = "deep" if one["deep"] else "shallow" if one["completed_at"] else one["mode"]
    return f"analysis {one['item_id']} {how} {one['state']}{_in_brackets(one['reason'])}{told}"


def _in_brackets(word: str | None) -> str:
    return f" ({word})" if word else ""


def _facts(row: dict[str, Any]) -> list[tuple[str, str | None]]:
    decided = f"{row['disposition']} ({row['disposition_reason']}) by {row['disposition_by']}" if row["disposition"] else None
    return [
        ("advisory", " ".join(one for one in (row["cve_id"], row["ghsa_id"]) if one)),
        ("fixed in", row["patched_version"]),
        ("upstream", row["upstream_state"] + (f" ({row['upstream_reason']})" if row["upstream_reason"] else "")),
        ("decided here", decided),
        ("page", row["html_url"]),
    ]


@security.command("sync")
@owner_option
@click.option(
    "--repository", type=click.IntRange(1, 2**63 - 1), help="Only the repository with this id at the provider, selected or not."
)
@click.option("--wait", is_flag=True, help="Until it has ended, an hour at most; exit status 1 when something wasn't read.")
@as_json
def security_sync(owner: UUID | None, repository: int | None, wait: bool, plain: bool) -> None:
    """Asks for a copy of the owner's Dependabot alerts now; a run begins as soon as a worker is free."""
    asked = api(plain)
    wish = {"repository": repository} if repository else {}
    done = asked.post("/security/sync", wish, owner=owner)
    if done["item"] is None:
        end(plain, "a sync waits or runs already: `kilo-pipelines items list --service security_sync --state live` shows it")
    if not wait:
        show(plain, done, lambda: f"waiting as item {done['item']}")
        return
    until = time.monotonic() + SYNC_SECONDS
    while (item := asked.get(f"/items/{done['item']}"))["state"] not in FINAL:
        if time.monotonic() > until:
            end(plain, f"item {done['item']} hasn't ended; `kilo-pipelines items show` tells")
        time.sleep(1)
    read = asked.get("/security/repositories", owner=owner)["repositories"]
    lines = [f"{item['state']} ({item['reason']})", *(f"  {one['full_name']}: {one['outcome']}" for one in read)]
    show(plain, {**done, "state": item["state"], "reason": item["reason"], "repositories": read}, lambda: "\n".join(lines))
    if item["state"] != WorkState.COMPLETED or item["reason"] != Reason.ALERTS_SYNCED:
        raise SystemExit(1)


@security.command("settings")
@owner_option
@click.option(
    "--set", "changes", multiple=True, metavar="NAME=JSON", help="For example --set sla_preset='\"strict\"'; again for more."
)
@as_json
def security_settings(owner: UUID | None, changes: tuple[str, ...], plain: bool) -> None:
    """Shows the owner's settings, or changes some; deadlines follow at once. Saving never switches the service on."""
    shown = settings_of(SERVICE, owner, changes, plain)
    show(plain, shown, lambda: "\n".join(f"{name}: {json.dumps(value)}" for name, value in shown.items()))


@security.command("quarantine")
@owner_option
@as_json
def security_quarantine(owner: UUID | None, plain: bool) -> None:
    """Lists alerts that could not be taken, and which of their fields are wrong."""
    found = api(plain).get("/security/quarantine", owner=owner)["alerts"]
    show(
        plain,
        found,
        lambda: (
            "\n".join(f"{one['full_name']} alert {one['source_id']}: {one['reason']} ({one['detail']})" for one in found)
            or "nothing is in quarantine"
        ),
    )


@security.group("sla")
def security_sla() -> None:
    """Deadlines."""


@security_sla.command("explain")
@click.argument("finding", type=click.UUID)
@click.option("--at", type=click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]), help="At this moment (UTC). Default: now.")
@as_json
def security_sla_explain(finding: UUID, at: datetime | None, plain: bool) -> None:
    """Says how a finding's deadline came to be, now or at any past moment under the policy of that time."""
    moment = at.replace(tzinfo=UTC).isoformat() if at else None
    found = api(plain).get(f"/security/findings/{finding}/deadline", at=moment)
    show(plain, found, lambda: str(found["explained"]))


COMMANDS = (security,)
