"""`kilo-pipelines security remediate` and `remediations`: pull requests that end findings."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import click

from kilo_pipelines.cli.client import api
from kilo_pipelines.cli.common import as_json, end, show
from kilo_pipelines.cli.security import owner_option, security


@security.command("remediate")
@click.argument("finding", type=click.UUID, required=False)
@click.option("--retry", is_flag=True, help="Once more after one that failed, was cancelled, was blocked or changed nothing.")
@click.option("--bulk", is_flag=True, help="Every open finding of the owner that its settings let through.")
@owner_option
@as_json
def security_remediate(finding: UUID | None, retry: bool, bulk: bool, owner: UUID | None, plain: bool) -> None:
    """Has a pull request opened that ends a finding; the item that does it is watched with `security remediations`."""
    if bulk == (finding is not None) or (bulk and retry) or (finding is not None and owner is not None):
        end(plain, "name a finding, or say --bulk, for which there is no --retry; --owner belongs to --bulk", 2)
    asked = api(plain)
    if finding is not None:
        done = asked.post(f"/security/findings/{finding}/remediate", {"retry": retry})
        show(plain, {"item": done["item"]}, lambda: f"waiting as item {done['item']}")
        return
    done = asked.post("/security/remediate", {}, owner=owner)
    skipped = sorted(done["skipped"].items(), key=lambda one: -one[1])
    lines = [f"{done['scanned']} open findings, {len(done['admitted'])} remediations", *(f"{n} {why}" for why, n in skipped)]
    show(plain, done, lambda: "\n".join(lines))


@security.command("remediations")
@owner_option
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 1_000))
@as_json
def security_remediations(owner: UUID | None, limit: int, plain: bool) -> None:
    """Lists remediations with their pull requests, the newest first."""
    found = api(plain).get("/security/remediations", owner=owner, limit=limit)["remediations"]
    show(plain, found, lambda: "\n".join(map(_line, found)) or "no remediations")


def _line(one: dict[str, Any]) -> str:
    pull = f"{one['pull_url']} {one['pull_state'] or 'open'}" if one["pull_url"] else "no pull request"
    if one["confirmed_at"] is not None:
        pull += ", confirmed"
    elif one["set_aside_at"] is not None:
        pull += ", its findings dismissed"
    elif one["flagged_at"] is not None:
        pull += f", NOT confirmed by {one['syncs_since_merge']} syncs"
    why = f" ({one['reason']})" if one["reason"] else ""
    return f"{one['item_id']}  {one['origin']:<9} {one['state']}{why}  {len(one['findings'])} findings  {pull}"
