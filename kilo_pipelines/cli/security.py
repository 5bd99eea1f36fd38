"""`kilo-pipelines security`: findings, their deadlines, syncs."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import click
from pydantic import ValidationError

from kilo_pipelines.cli.common import OPERATOR, as_json, end, open_store, show
from kilo_pipelines.core.reasons import MEANING, Reason
from kilo_pipelines.services.security import sla
from kilo_pipelines.services.security.config import SERVICE, SecurityConfig, activated, policy_of
from kilo_pipelines.store import AnalysisRow, FindingRow, StaleRevisionError, Store

log = logging.getLogger(__name__)

_owner = click.option("--owner", type=click.UUID, help="Default: the only owner.")


def _the_owner(store: Store, owner: UUID | None, plain: bool) -> UUID:
    if owner is not None:
        return owner
    known = store.owners.all()
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


def config_of(store: Store, owner: UUID) -> SecurityConfig:
    """An owner's settings; the defaults when it has none."""
    setting = store.owners.config(owner, SERVICE)
    return SecurityConfig.model_validate(setting.config if setting else {})


@click.group()
def security() -> None:
    """The Security Agent: findings, their deadlines, syncs."""


@security.command("findings")
@_owner
@click.option("--status", type=click.Choice(["open", "fixed", "ignored"]), default="open", show_default=True)
@click.option("--severity", type=click.Choice(["critical", "high", "medium", "low"]))
@click.option("--overdue", is_flag=True)
@click.option("--limit", default=50, show_default=True)
@click.option("--offset", default=0, show_default=True)
@as_json
def security_findings(
    owner: UUID | None, status: str, severity: str | None, overdue: bool, limit: int, offset: int, plain: bool
) -> None:
    """Lists findings with their deadlines, the worst first."""
    _, store = open_store(plain)
    found = store.findings.listed(
        _the_owner(store, owner, plain), status=status, severity=severity, overdue=overdue, limit=limit, offset=offset
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
    state = _state(store, row, datetime.now(UTC))
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


def _state(store: Store, row: FindingRow, at: datetime) -> sla.SlaState:
    kept = store.findings.policy(row.owner_id, at)
    policy = sla.SlaPolicy.of_stored(*kept) if kept else policy_of(config_of(store, row.owner_id))
    history = store.findings.history(row.owner_id, [row.id]).get(row.id, [])
    steps = [sla.HistoryEvent(one.at, one.kind, one.severity, one.reconstructed) for one in history]
    return sla.evaluate(steps, policy, row.repository_id, at)


@security.command("sync")
@_owner
@click.option("--repository", type=int, help="Only the repository with this id at the provider, selected or not.")
@as_json
def security_sync(owner: UUID | None, repository: int | None, plain: bool) -> None:
    """Copies the owner's Dependabot alerts now."""
    # The orchestrator's library takes seconds to load, and only these two commands need it.
    from kilo_pipelines.ops.security_sync import sync_owner
    from kilo_pipelines.resources.github import GitHubResource

    _, store = open_store(plain)
    done = sync_owner(store, GitHubResource(), _the_owner(store, owner, plain), log, only=repository)

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
@_owner
@click.option(
    "--set", "changes", multiple=True, metavar="NAME=JSON", help="For example --set sla_preset='\"strict\"'; again for more."
)
@as_json
def security_settings(owner: UUID | None, changes: tuple[str, ...], plain: bool) -> None:
    """Shows the owner's settings, or changes some; deadlines follow at once. Saving never switches the service on."""
    _, store = open_store(plain)
    owner_id = _the_owner(store, owner, plain)
    setting = store.owners.config(owner_id, SERVICE)
    wanted = dict(setting.config) if setting else {}
    try:
        for change in changes:
            name, _, value = change.partition("=")
            wanted[name] = json.loads(value)
        before = SecurityConfig.model_validate(setting.config) if setting else None
        config = activated(before, SecurityConfig.model_validate(wanted), datetime.now(UTC))
    except ValidationError as failure:
        end(plain, "; ".join(f"{'.'.join(map(str, one['loc'])) or 'settings'}: {one['msg']}" for one in failure.errors()), 2)
    except ValueError:
        end(plain, f"not NAME=JSON: {change}", 2)
    if changes:
        try:
            store.owners.put_config(
                owner_id,
                SERVICE,
                config.model_dump(mode="json"),
                enabled=setting.enabled if setting else False,
                expected_revision=setting.revision if setting else 0,
                actor=OPERATOR,
            )
        except StaleRevisionError as failure:
            end(plain, str(failure))
        from kilo_pipelines.assets.security import recompute
        from kilo_pipelines.ops.security_sync import policy_for

        recompute(store, owner_id, policy_for(store, owner_id, config, actor=OPERATOR), datetime.now(UTC))
    shown = config.model_dump(mode="json")
    show(plain, shown, lambda: "\n".join(f"{name}: {json.dumps(value)}" for name, value in shown.items()))


@security.command("quarantine")
@_owner
@as_json
def security_quarantine(owner: UUID | None, plain: bool) -> None:
    """Lists alerts that could not be taken, and which of their fields are wrong."""
    _, store = open_store(plain)
    found = store.findings.quarantined(_the_owner(store, owner, plain))
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
    state = _state(store, row, at.replace(tzinfo=UTC) if at else datetime.now(UTC))
    show(plain, {"status": state.status, "due_at": state.due_at, "explained": sla.explain(state)}, lambda: sla.explain(state))


COMMANDS = (security,)
