"""`kilo-pipelines security report|summary`: documents and figures of an owner's findings."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import click

from kilo_pipelines.cli.client import api
from kilo_pipelines.cli.common import as_json, end, show
from kilo_pipelines.cli.security import owner_option, security

_day = click.DateTime(["%Y-%m-%d"])
_repository = click.option(
    "--repository", type=click.IntRange(1, 2**63 - 1), help="Only of the repository with this id at the provider."
)


@security.command("report")
@owner_option
@click.option("--from", "first", type=_day, help="First UTC day. Default: 90 days with the last one.")
@click.option("--to", "last", type=_day, help="Last UTC day. Default: today.")
@click.option("--format", "form", type=click.Choice(["csv", "json", "vex"]), default="csv", show_default=True)
@_repository
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="A new file. Default: standard output.")
@as_json
def security_report(
    owner: UUID | None,
    first: datetime | None,
    last: datetime | None,
    form: str,
    repository: int | None,
    output: Path | None,
    plain: bool,
) -> None:
    """Writes the audit report of a period (csv, json), or what the findings mean for others (vex). `--json` wraps the answer."""
    made = api(plain).raw(
        "GET",
        "/security/report",
        {
            "owner": owner,
            "format": form,
            "from": first.date() if first else None,
            "to": last.date() if last else None,
            "repository": repository,
        },
    )
    if output is None and not plain:
        sys.stdout.buffer.write(made)
        return
    answer: dict[str, Any] = {"format": form, "bytes": len(made)}
    if output is None:
        answer["document"] = made.decode()
    else:
        try:
            with output.open("xb") as file:
                file.write(made)
        except OSError as failure:
            end(plain, f"{output}: {failure.strerror}")
        answer["output"] = str(output)
    show(plain, answer, lambda: f"{output}: {len(made)} bytes")


@security.command("summary")
@owner_option
@_repository
@as_json
def security_summary(owner: UUID | None, repository: int | None, plain: bool) -> None:
    """Shows the owner's figures: deadlines, analyses, times to fix, the longest overdue, the worst repositories."""
    found = api(plain).get("/security/summary", owner=owner, repository=repository)
    show(plain, found, lambda: "\n".join(_lines(found)))


def _lines(found: dict[str, Any]) -> list[str]:
    """The figures for people."""
    standing = {"all": found["sla"]["overall"], **found["sla"]["by_severity"]}
    times = {"all": found["time_to_fix"]["overall"], **found["time_to_fix"]["by_severity"]}
    lines = [f"{found['findings']} findings: " + ", ".join(f"{count} {name}" for name, count in found["by_status"].items())]
    for name, one in standing.items():
        share = "nothing to measure" if one["compliance_percent"] is None else f"{one['compliance_percent']} % within"
        took = times[name]
        fixed = f"; {took['fixed']} fixed in {took['median_days']} days (median)" if took["fixed"] else ""
        lines.append(f"  {name:<8} {one['within_sla']} within, {one['overdue']} overdue, {share}{fixed}")
    soon, untracked = found["sla"]["due_soon"], found["sla"]["untracked"]
    lines.append(
        f"due within seven days: {soon} ({found['sla']['due_soon_exploitable']} exploitable); without a deadline: {untracked}"
    )
    lines.append("analyses: " + ", ".join(f"{count} {name}" for name, count in found["analysis"].items() if count))
    lines += [
        f"  overdue {one['days_overdue']} days: {one['severity']} {one['repository']} {one['package_name']} {one['id']}"
        for one in found["overdue"]
    ]
    lines += [
        f"  {one['repository']}: {one['open']} open, {one['critical']} critical, {one['overdue']} overdue, {one['needs_action']} to act on"
        for one in found["repositories"]
    ]
    return lines
