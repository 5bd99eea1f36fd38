"""`kilo-pipelines security`: findings, their deadlines, syncs."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import click

from kilo_pipelines.acts import security as acts
from kilo_pipelines.acts.security import config_of
from kilo_pipelines.cli.common import OPERATOR, as_json, end, open_store, show
from kilo_pipelines.core.reasons import MEANING, Reason
from kilo_pipelines.core.refusal import Refusal
from kilo_pipelines.services.security import sla
from kilo_pipelines.services.security.config import SERVICE
from kilo_pipelines.store import OUTCOMES, AnalysisRow, FindingRow, Store
from kilo_pipelines.store.finding_lists import ORDERS

log = logging.getLogger(__name__)

owner_option = click.option("--owner", type=click.UUID, help="Default: the only owner.")


def owner_of(store: Store, owner: UUID | None, plain: bool) -> UUID:
    """The owner that a command is for; ends it when several are there and none was named."""
    known = store.owners.all()
    if owner is not None:
        if owner not in {one.id for one in known}:
            end(plain, f"no owner {owner}")
        return owner
    if len(known) != 1:
        end(plain, "name an owner with --owner: " + ", ".join(f"{one.id} ({one.name})" for one in known), 2)
    return known[0].id


def finding_of(store: Store, finding: UUID, plain: bool) -> FindingRow:
    """The finding that a command names; ends the command when there is none."""
    owner = store.findings.owner_of(finding)
    row = store.findings.get(owner, finding) if owner else None
    if row is None:
        end(plain, f"no finding {finding}")
    return row


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
    _, store = open_store(plain)
    found = store.findings.listed(
        owner_of(store, owner, plain),
        status=status,
        severity=severity,
        repository_id=repository,
        outcome=outcome,
        overdue=overdue,
        sort=sort,
        limit=limit,
        offset=offset,
    )
    show(plain, found, lambda: "\n".join(map(_line, found)) or "no findings")


def _line(one: dict[str, Any]) -> str:
    due = one["due_at"].date().isoformat() if one["due_at"] else "no deadline"
    late = " OVERDUE" if one["overdue"] else ""
    return f"{one['id']}  {one['severity']:<8} {one['status']:<7} due {due}{late}  {one['repository']}  {one['package_name']}: {one['title'][:60]}"


@security.command("show")
@click.argument("finding", type=click.UUID)
@as_json
def security_show(finding: UUID, plain: bool) -> None:
    """Shows one finding: what the source says, what was decided here, its deadline and its history."""
    _, store = open_store(plain)
    row = finding_of(store, finding, plain)
    history = store.findings.history(row.owner_id, [row.id]).get(row.id, [])
    state = acts.state_of(store, row, history, datetime.now(UTC))
    answer = {
        **vars(row),
        "sla": {"status": state.status, "due_at": state.due_at, "explained": sla.explain(state)},
        "history": [vars(one) for one in history],
        "analyses": [vars(one) for one in store.analyses.of_finding(row.owner_id, row.id)],
    }

    def text() -> str:
        lines = [f"{row.severity} {row.status}  {row.package_name} ({row.package_ecosystem}) in {row.manifest_path}", row.title]
        lines += [f"{name}: {value}" for name, value in _facts(row) if value]
        lines += [_analysis_line(one) for one in store.analyses.of_finding(row.owner_id, row.id)]
        lines += [sla.explain(state), *(f"  {one.at:%Y-%m-%d %H:%M} {one.kind} {one.severity or ''}" for one in history)]
        return "\n".join(lines)

    show(plain, answer, text)


def _analysis_line(one: AnalysisRow) -> str:
    found = one.deep or one.triage or {}
    told = f": {found['action']}" if one.completed_at else ""
    how = "deep" if one.deep else "shallow" if one.completed_at else one.mode
    return f"analysis {one.item_id} {how} {one.state}{f' ({one.reason})' if one.reason else ''}{told}"


def _facts(row: FindingRow) -> list[tuple[str, str | None]]:
    decided = f"{row.disposition} ({row.disposition_reason}) by {row.disposition_actor}" if row.disposition else None
    return [
        ("advisory", " ".join(one for one in (row.cve_id, row.ghsa_id) if one)),
        ("fixed in", row.patched_version),
        ("upstream", row.upstream_state + (f" ({row.upstream_reason})" if row.upstream_reason else "")),
        ("decided here", decided),
        ("page", row.html_url),
    ]


@security.command("sync")
@owner_option
@click.option("--repository", type=int, help="Only the repository with this id at the provider, selected or not.")
@as_json
def security_sync(owner: UUID | None, repository: int | None, plain: bool) -> None:
    """Copies the owner's Dependabot alerts now."""
    # The orchestrator's library takes seconds to load, and only these two commands need it.
    from kilo_pipelines.ops.security_sync import Trigger, sync_owner
    from kilo_pipelines.resources.github import GitHubResource

    _, store = open_store(plain)
    by = Trigger("command", OPERATOR)
    done = sync_owner(store, GitHubResource(), owner_of(store, owner, plain), log, only=repository, trigger=by)

    if not done.repositories:
        meaning, remedy = MEANING[Reason(done.outcome)]
        end(plain, f"nothing was read: {meaning} {remedy} ({done.outcome})")

    def text() -> str:
        lines = [
            f"{done.outcome}: {done.inserted} new, {done.changed} changed, {done.unchanged} unchanged, {done.quarantined} in quarantine"
        ]
        return "\n".join([*lines, *(f"  {name}: {how}" for name, how in done.repositories.items())])

    show(plain, vars(done), text)
    if not done.complete:
        raise SystemExit(1)


@security.command("settings")
@owner_option
@click.option(
    "--set", "changes", multiple=True, metavar="NAME=JSON", help="For example --set sla_preset='\"strict\"'; again for more."
)
@as_json
def security_settings(owner: UUID | None, changes: tuple[str, ...], plain: bool) -> None:
    """Shows the owner's settings, or changes some; deadlines follow at once. Saving never switches the service on."""
    _, store = open_store(plain)
    owner_id = owner_of(store, owner, plain)
    setting = store.owners.config(owner_id, SERVICE)
    try:
        wanted = {name: json.loads(value) for name, _, value in (one.partition("=") for one in changes)}
    except ValueError:
        end(plain, f"not NAME=JSON: {', '.join(changes)}", 2)
    config = config_of(store, owner_id)
    if changes:
        from kilo_pipelines.assets.security import recompute

        saved = acts.save_settings(
            store,
            owner_id,
            wanted,
            expected_revision=setting.revision if setting else 0,
            role=OPERATOR,
            actor=OPERATOR,
            now=datetime.now(UTC),
            recompute=recompute,
        )
        if isinstance(saved, Refusal):
            end(plain, f"{saved.detail} ({saved.reason})", 2)
        config = saved.config
    shown = config.model_dump(mode="json")
    show(plain, shown, lambda: "\n".join(f"{name}: {json.dumps(value)}" for name, value in shown.items()))


@security.command("quarantine")
@owner_option
@as_json
def security_quarantine(owner: UUID | None, plain: bool) -> None:
    """Lists alerts that could not be taken, and which of their fields are wrong."""
    _, store = open_store(plain)
    found = store.findings.quarantined(owner_of(store, owner, plain))
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
    _, store = open_store(plain)
    row = finding_of(store, finding, plain)
    history = store.findings.history(row.owner_id, [row.id]).get(row.id, [])
    state = acts.state_of(store, row, history, at.replace(tzinfo=UTC) if at else datetime.now(UTC))
    show(plain, {"status": state.status, "due_at": state.due_at, "explained": sla.explain(state)}, lambda: sla.explain(state))


COMMANDS = (security,)
