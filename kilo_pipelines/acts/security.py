"""What the control API and the command line do for a person with the Security Agent: documents, settings, figures.

Each takes the acting role and answers with a `Refusal` instead of raising.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, Literal
from uuid import UUID

from pydantic import ValidationError

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.refusal import Refusal
from kilo_pipelines.core.text import storable
from kilo_pipelines.services.permissions import may
from kilo_pipelines.services.security import report, sla, vex
from kilo_pipelines.services.security.config import SERVICE, SecurityConfig, activated, policy_of, selects
from kilo_pipelines.store import FindingEventRow, FindingRow, Limits, NewItem, SlaRow, StaleRevisionError, Store, SyncTarget
from kilo_pipelines.store.finding_lists import ANALYZED

Form = Literal["csv", "json", "vex"]
MEDIA_TYPES: dict[Form, str] = {"csv": "text/csv; charset=utf-8", "json": "application/json", "vex": vex.MEDIA_TYPE}
LIMITS = Limits(rows=report.MAX_EVENTS, bytes=report.MAX_BYTES)
# (store, owner, policy, now) -> (findings looked at, deadlines changed)
Recompute = Callable[[Store, UUID, sla.SlaPolicy, datetime], tuple[int, int]]


@dataclass(frozen=True)
class Wish:
    """Which document; days are UTC, both included."""

    form: Form
    first: date | None = None
    last: date | None = None
    repository_id: int | None = None


def make_document(
    store: Store, owner_id: UUID, wish: Wish, *, role: str, actor: str, now: datetime, limits: Limits = LIMITS
) -> bytes | Refusal:
    """An audit report or a VEX document; that it was made is an audit event before anybody has it."""
    if not may(role, "read"):
        return Refusal(Reason.ROLE_NOT_ALLOWED, role)
    made = _vex(store, owner_id, wish, limits) if wish.form == "vex" else _report(store, owner_id, wish, now, limits)
    if isinstance(made, Refusal):
        return made
    content, about = made
    if len(content) > limits.bytes:
        return Refusal(Reason.REPORT_TOO_LARGE, f"{len(content)} bytes")
    about |= {"format": wish.form, "repository_id": wish.repository_id, "sha256": hashlib.sha256(content).hexdigest()}
    store.reports.made(owner_id, actor, about)
    return content


def _report(store: Store, owner_id: UUID, wish: Wish, now: datetime, limits: Limits) -> tuple[bytes, dict[str, Any]] | Refusal:
    period = report.period_of(wish.first, wish.last, now)
    if isinstance(period, Refusal):
        return period
    read = store.reports.period(
        owner_id, period.start, period.end, period.as_of(now), list(report.EVIDENCE), wish.repository_id, limits
    )
    if isinstance(read, Reason):
        return Refusal(read, f"{period.first} to {period.last}")
    policy = sla.SlaPolicy.of_stored(*read.policy) if read.policy else policy_of(config_of(store, owner_id))
    made = report.build(
        owner_id,
        period,
        read.events,
        read.findings,
        read.repositories,
        lambda finding_id: sla.steps_of(read.history.get(finding_id, [])),
        policy,
        now,
    )
    about = {"from": period.first.isoformat(), "to": period.last.isoformat(), "events": made.event_count}
    return report.as_csv(made) if wish.form == "csv" else report.as_json(made), about


def _vex(store: Store, owner_id: UUID, wish: Wish, limits: Limits) -> tuple[bytes, dict[str, Any]] | Refusal:
    if wish.first is not None or wish.last is not None:
        return Refusal(Reason.REPORT_PERIOD_INVALID, "a VEX export tells the present")
    read = store.reports.present(owner_id, wish.repository_id, limits)
    if isinstance(read, Reason):
        return Refusal(read, "a VEX export of all findings")
    return vex.document(owner_id, read.findings, read.analyses, read.repositories), {"findings": len(read.findings)}


def config_of(store: Store, owner_id: UUID) -> SecurityConfig:
    """An owner's settings; the defaults when it has none."""
    setting = store.owners.config(owner_id, SERVICE)
    return SecurityConfig.model_validate(setting.config if setting else {})


def policy_at(store: Store, owner_id: UUID, at: datetime) -> sla.SlaPolicy:
    """The policy of a moment; before there was any, what the settings ask for."""
    kept = store.findings.policy(owner_id, at)
    return sla.SlaPolicy.of_stored(*kept) if kept else policy_of(config_of(store, owner_id))


def state_of(store: Store, row: FindingRow, history: list[FindingEventRow], at: datetime) -> sla.SlaState:
    """Where a finding's deadline stands at a moment, under the policy of that time."""
    return sla.evaluate(sla.steps_of(history), policy_at(store, row.owner_id, at), row.repository_id, at)


@dataclass(frozen=True)
class Saved:
    """What was saved, and how many deadlines were looked at and changed."""

    config: SecurityConfig
    enabled: bool
    revision: int
    looked: int
    changed: int


def save_settings(
    store: Store,
    owner_id: UUID,
    changes: Mapping[str, Any],
    *,
    expected_revision: int,
    role: str,
    actor: str,
    now: datetime,
    recompute: Recompute,
) -> Saved | Refusal:
    """Lays changes over the stored settings (contract 4): what isn't named stays, on or off stays (17.1), deadlines follow at once (17.19).

    `expected_revision` is the one that was read, 0 for none yet.
    """
    if not may(role, "settings"):
        return Refusal(Reason.ROLE_NOT_ALLOWED, role)
    stored = store.owners.config(owner_id, SERVICE)
    if (stored.revision if stored else 0) != expected_revision:
        return Refusal(Reason.SETTINGS_STALE, f"they are at revision {stored.revision if stored else 0}")
    try:
        before = SecurityConfig.model_validate(stored.config) if stored else None
        wanted = SecurityConfig.model_validate({**(stored.config if stored else {}), **changes})
    except ValidationError as failure:
        return Refusal(Reason.SETTINGS_INVALID, fields_of(failure))
    if not is_storable(wanted.model_dump(mode="json")):
        return Refusal(Reason.SETTINGS_INVALID, "a text holds characters that no database takes")
    config = activated(before, wanted, now)
    enabled = stored.enabled if stored else False
    try:
        revision = store.owners.put_config(
            owner_id,
            SERVICE,
            config.model_dump(mode="json"),
            enabled=enabled,
            expected_revision=expected_revision,
            actor=actor,
        )
    except StaleRevisionError:
        return Refusal(Reason.SETTINGS_STALE, "somebody was quicker")
    policy = policy_of(config)
    policy = policy.at_version(store.findings.keep_policy(owner_id, policy.stored(), actor=actor))
    looked, changed = recompute(store, owner_id, policy, now)
    return Saved(config, enabled, revision, looked, changed)


def request_sync(store: Store, owner_id: UUID, repository_id: int | None, *, role: str, actor: str) -> UUID | Refusal | None:
    """Opens a sync of an owner, or of one repository, selected or not (contract 7.2.3); None when one waits or runs already."""
    if not may(role, "sync"):
        return Refusal(Reason.ROLE_NOT_ALLOWED, role)
    setting = store.owners.config(owner_id, SERVICE)
    if setting is None or not setting.enabled:
        return Refusal(Reason.SECURITY_DISABLED, "it is off")
    if setting.action_required is not None:
        return Refusal(Reason.ACTION_REQUIRED, "see the owner's services")
    wanted = targets_of(store, owner_id, SecurityConfig.model_validate(setting.config), repository_id)
    if not wanted:
        return Refusal(Reason.NO_REPOSITORIES, "nothing to read" if repository_id is None else f"repository {repository_id}")
    item = NewItem(
        service="security_sync",
        subject_key="sync" if repository_id is None else f"sync:{repository_id}",
        repository_id=wanted[0].repository_id,
        priority=0,
        details={"repository_id": repository_id, "requested_by": actor},
    )
    return store.queue.open(owner_id, item, actor=actor, act="security.sync.triggered")


def enable(store: Store, owner_id: UUID, *, role: str, actor: str) -> bool | Refusal:
    """Switches the Security Agent on where there is something to watch (contract 4); False without settings."""
    if not may(role, "settings"):
        return Refusal(Reason.ROLE_NOT_ALLOWED, role)
    setting = store.owners.config(owner_id, SERVICE)
    if setting is None:
        return False
    if not targets_of(store, owner_id, SecurityConfig.model_validate(setting.config)):
        return Refusal(Reason.NO_REPOSITORIES, "nothing to read")
    return store.owners.enable_service(owner_id, SERVICE, True, actor=actor)


def check_readable(store: Store, owner_id: UUID, unreadable: Callable[[SyncTarget], Reason | None]) -> Refusal | None:
    """Whether the provider lets the Security Agent read, asked for one selected repository of each installation (contract 4).

    For who holds the App's credentials and is about to switch it on; `unreadable` asks the provider why a repository's alerts may not be
    read. Where nobody asked, the sync that follows does.
    """
    setting = store.owners.config(owner_id, SERVICE)
    targets = targets_of(store, owner_id, SecurityConfig.model_validate(setting.config if setting else {}))
    for target in {one.installation_id: one for one in targets}.values():
        reason = unreadable(target)
        if reason is not None:
            return Refusal(reason, f"asked for {target.full_name}")
    return None


def targets_of(store: Store, owner_id: UUID, config: SecurityConfig, only: int | None = None) -> list[SyncTarget]:
    """The repositories of an owner's working installations that its settings select, or the one asked for, selected or not."""
    return [
        one
        for one in store.owners.sync_targets(owner_id)
        if (selects(config, one.repository_id) if only is None else one.repository_id == only)
    ]


def is_storable(value: Any) -> bool:
    """Whether every text in a JSON value is one that the database takes."""
    if isinstance(value, str):
        return storable(value) == value
    if isinstance(value, Mapping):
        return all(map(is_storable, value.values()))
    return not isinstance(value, list) or all(map(is_storable, value))


def fields_of(failure: ValidationError) -> str:
    """Which fields are wrong and how, without their values."""
    found = (f"{'.'.join(map(str, one['loc'])) or 'all'}: {one['msg']}" for one in failure.errors(include_input=False))
    return "; ".join(found)[:1_000]


def recompute_deadlines(store: Store, owner_id: UUID, policy: sla.SlaPolicy, now: datetime) -> tuple[int, int]:
    """Brings all deadlines of an owner to what history and policy say, block by block and without pandas."""
    return store.findings.follow_policy(
        owner_id,
        policy.version,
        lambda history, repository: SlaRow(**sla.kept(sla.steps_of(history), policy, repository, now)),
    )


def summary_of(store: Store, owner_id: UUID, repository_id: int | None, now: datetime) -> dict[str, Any]:
    """The figures of contract 15, with the days that the policy gives each severity."""
    found = store.findings.summary(owner_id, repository_id)
    policy = policy_at(store, owner_id, now)
    overall, by_severity = found["overall"], found["by_severity"]
    return {
        "findings": overall["findings"],
        "by_status": {name: overall[name] for name in ("open", "fixed", "ignored")},
        "open_by_severity": {name: counted["open"] for name, counted in by_severity.items()},
        "sla": {
            "overall": _standing(overall),
            "by_severity": {name: _standing(counted) for name, counted in by_severity.items()},
            "due_soon": overall["due_soon"],
            "due_soon_exploitable": overall["due_soon_exploitable"],
            "untracked": overall["untracked"],
        },
        "analysis": {
            "total": overall["open"],
            "analyzed": sum(overall[name] for name in ANALYZED),
            **{name: overall[name] for name in (*ANALYZED, "analyzing", "not_analyzed", "failed")},
        },
        "time_to_fix": {
            "overall": _time(overall, None),
            "by_severity": {
                name: _time(counted, policy.overrides.get(repository_id or 0, policy.days)[name])
                for name, counted in by_severity.items()
            },
        },
        "overdue": found["overdue"],
        "repositories": found["repositories"],
        "repositories_open": found["repositories_open"],
    }


def _standing(counted: Mapping[str, Any]) -> dict[str, Any]:
    """Open findings with a deadline; the share is None where none has one."""
    within, overdue = counted["within_due"], counted["overdue"]
    return {
        "total": within + overdue,
        "within_sla": within,
        "overdue": overdue,
        "compliance_percent": sla.percent(within, within + overdue),
    }


def _time(counted: Mapping[str, Any], target: int | None) -> dict[str, Any]:
    mean, median = counted["mean_days"], counted["median_days"]
    return {
        "fixed": counted["fixed_dated"],
        "average_days": None if mean is None else round(float(mean), 1),
        "median_days": None if median is None else round(float(median), 1),
        "target_days": target,
    }
