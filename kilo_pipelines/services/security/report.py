"""The audit report of a period: what happened to each finding, and whether its deadline held (contract 14).

Only what an action's allow-list names leaves the platform, and of whoever did it only the kind.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal, Protocol
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.redact import redact
from kilo_pipelines.core.refusal import Refusal
from kilo_pipelines.core.text import clean
from kilo_pipelines.services.security import sla
from kilo_pipelines.services.security.alerts import without_addresses

# Contract 14.
MAX_DAYS = 90
MAX_EVENTS = 10_000
MAX_BYTES = 8 * 2**20
# Longest value of a cell: titles are cut at 500 when they are read.
VALUE_LIMIT = 500

Verdict = Literal["unknown", "terminal_met", "terminal_missed", "open_within_deadline", "open_past_deadline"]
Kind = Literal["system", "operator", "owner", "person"]
Scalar = str | int | float | bool | None

# What a report tells of each action; everything else of an event stays here. Free text of people and models is in none of them.
_CHANGE = ("before", "after")
_PULL = ("pull_request", "number")
EVIDENCE: dict[str, tuple[str, ...]] = {
    "security.finding.created": ("severity", "upstream_state"),
    "security.finding.severity_changed": _CHANGE,
    "security.finding.status_change": _CHANGE,
    "security.finding.reopened": ("canonical", "reason"),
    "security.finding.dismissed": (*_CHANGE, "reason", "origin"),
    "security.finding.auto_dismissed": (*_CHANGE, "reason", "origin"),
    "security.finding.superseded": ("canonical",),
    "security.finding.analysis_completed": ("mode", "exploitable", "action", "confidence"),
    "security.finding.analysis_failed": ("mode", "reason"),
    "security.finding.deleted": (),
    "security.remediation.queued": ("origin",),
    "security.remediation.retried": ("origin",),
    "security.remediation.pushed": (),
    "security.remediation.pr_opened": _PULL,
    "security.remediation.pr_merged": _PULL,
    "security.remediation.pr_closed": _PULL,
    "security.remediation.pr_reopened": _PULL,
    "security.remediation.confirmed": _PULL,
    "security.remediation.set_aside": _PULL,
    "security.remediation.unconfirmed": _PULL,
    "security.remediation.failed": ("reason",),
    "security.remediation.blocked": ("reason",),
    "security.remediation.no_changes_needed": ("reason",),
    "security.remediation.cancelled": ("reason",),
}
_STATUS_AFTER = {"opened": "open", "reopened": "open", "ignored": "ignored", "fixed": "fixed"}
_SYSTEM = frozenset({"platform", "dependabot", "system"})


@dataclass(frozen=True)
class Period:
    """Whole UTC days, both included."""

    first: date
    last: date

    @property
    def start(self) -> datetime:
        """The first moment."""
        return datetime(self.first.year, self.first.month, self.first.day, tzinfo=UTC)

    @property
    def end(self) -> datetime:
        """The first moment after it."""
        return datetime(self.last.year, self.last.month, self.last.day, tzinfo=UTC) + timedelta(days=1)

    def as_of(self, now: datetime) -> datetime:
        """The moment at which deadlines are judged: the period's last one, or now while it lasts."""
        return min(now, self.end - timedelta(microseconds=1))


def period_of(first: date | None, last: date | None, now: datetime) -> Period | Refusal:
    """The period that is asked for; by default the last `MAX_DAYS` days up to the day that is named, or today."""
    today = now.astimezone(UTC).date()
    last = last or today
    first = first or date.fromordinal(max(1, last.toordinal() - MAX_DAYS + 1))
    if first > last:
        return Refusal(Reason.REPORT_PERIOD_INVALID, "it begins after its end")
    if last > today:
        return Refusal(Reason.REPORT_PERIOD_INVALID, "its end is in the future")
    if (last - first).days >= MAX_DAYS:
        return Refusal(Reason.REPORT_PERIOD_INVALID, f"it has more than {MAX_DAYS} days")
    return Period(first, last)


class Finding(Protocol):
    """A stored finding, as far as a report looks at it."""

    @property
    def id(self) -> UUID: ...
    @property
    def repository_id(self) -> int: ...
    @property
    def source_id(self) -> str: ...
    @property
    def severity(self) -> str: ...
    @property
    def package_name(self) -> str: ...
    @property
    def package_ecosystem(self) -> str: ...
    @property
    def manifest_path(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def cve_id(self) -> str | None: ...
    @property
    def ghsa_id(self) -> str | None: ...
    @property
    def html_url(self) -> str | None: ...


class Event(Protocol):
    """An audit event of one finding."""

    @property
    def finding_id(self) -> UUID: ...
    @property
    def at(self) -> datetime: ...
    @property
    def actor(self) -> str: ...
    @property
    def action(self) -> str: ...
    @property
    def data(self) -> Mapping[str, Any]: ...


class ReportedEvent(BaseModel):
    """One event: when it was recorded, when it happened at the source if that tells, and what its action's allow-list names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    at: datetime
    occurred_at: datetime | None
    action: str
    by: Kind = Field(description="Who did it: the platform or the source, its operator, a key of the owner, or a person.")
    evidence: dict[str, Scalar]


class ReportedFinding(BaseModel):
    """A finding to which something happened in the period, as it stood at the period's end."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: UUID
    repository_id: int
    repository: str
    alert: str
    severity: str
    package: str
    ecosystem: str
    manifest: str
    title: str
    cve: str | None
    ghsa: str | None
    url: str | None
    status: Literal["open", "fixed", "ignored", "unknown"]
    sla: Verdict
    due_at: datetime | None
    explained: str
    events: list[ReportedEvent]


class AuditReport(BaseModel):
    """The report as JSON; `from` and `to` are UTC days, both included."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    owner: UUID
    first: date = Field(serialization_alias="from")
    last: date = Field(serialization_alias="to")
    as_of: datetime = Field(description="When deadlines were judged: the period's end, or the making of a report of today.")
    policy_version: int
    event_count: int
    verdicts: dict[str, int] = Field(description="Findings by SLA verdict.")
    findings: list[ReportedFinding]


def verdict(history: Sequence[sla.HistoryEvent], policy: sla.SlaPolicy, repository_id: int, at: datetime) -> Verdict:
    """Whether the deadline held, as of a moment. What is ignored is judged by where it stood when that began."""
    state = sla.evaluate(history, policy, repository_id, at)
    if state.status == "paused":  # a deadline that passed before is told, one that stands isn't
        return "terminal_met" if state.due_at is None else "terminal_missed"
    by_status: dict[str, Verdict] = {
        "untracked": "unknown",
        "met": "terminal_met",
        "missed": "terminal_missed",
        "open_within": "open_within_deadline",
        "open_overdue": "open_past_deadline",
    }
    return by_status[state.status]


def status_at(history: Sequence[sla.HistoryEvent], at: datetime) -> Literal["open", "fixed", "ignored", "unknown"]:
    """What a finding was at a moment, by its history."""
    status = "unknown"
    for one in sla.in_order(history):
        if one.at <= at:
            status = _STATUS_AFTER.get(one.kind, status)
    return status  # type: ignore[return-value]


def build(
    owner_id: UUID,
    period: Period,
    events: Iterable[Event],
    findings: Mapping[UUID, Finding],
    repositories: Mapping[int, str],
    history: Callable[[UUID], Sequence[sla.HistoryEvent]],
    policy: sla.SlaPolicy,
    now: datetime,
) -> AuditReport:
    """The report out of what the store read: events in their order, grouped by finding."""
    at = period.as_of(now)
    grouped: dict[UUID, list[ReportedEvent]] = {}
    count = 0
    for event in events:
        grouped.setdefault(event.finding_id, []).append(_event(event))
        count += 1
    reported = [
        _finding(findings[finding_id], repositories, history(finding_id), policy, at, happened)
        for finding_id, happened in sorted(grouped.items(), key=lambda pair: str(pair[0]))
    ]
    verdicts: dict[str, int] = {}
    for one in reported:
        verdicts[one.sla] = verdicts.get(one.sla, 0) + 1
    return AuditReport(
        owner=owner_id,
        first=period.first,
        last=period.last,
        as_of=at,
        policy_version=policy.version,
        event_count=count,
        verdicts=dict(sorted(verdicts.items())),
        findings=reported,
    )


def _finding(
    finding: Finding,
    repositories: Mapping[int, str],
    history: Sequence[sla.HistoryEvent],
    policy: sla.SlaPolicy,
    at: datetime,
    events: list[ReportedEvent],
) -> ReportedFinding:
    state = sla.evaluate(history, policy, finding.repository_id, at)
    return ReportedFinding(
        id=finding.id,
        repository_id=finding.repository_id,
        repository=repositories.get(finding.repository_id, str(finding.repository_id)),
        alert=finding.source_id,
        # The severity of that time: what it became later is another report's.
        severity=state.severity or finding.severity,
        package=told(finding.package_name),
        ecosystem=told(finding.package_ecosystem),
        manifest=told(finding.manifest_path),
        title=told(finding.title),
        cve=told(finding.cve_id) if finding.cve_id else None,
        ghsa=told(finding.ghsa_id) if finding.ghsa_id else None,
        url=finding.html_url,
        status=status_at(history, at),
        sla=verdict(history, policy, finding.repository_id, at),
        due_at=state.due_at,
        explained=sla.explain(state),
        events=events,
    )


def _event(event: Event) -> ReportedEvent:
    return ReportedEvent(
        at=event.at,
        occurred_at=_moment(event.data.get("source_occurred_at")),
        action=event.action,
        by=kind_of(event.actor),
        evidence=evidence_of(event.action, event.data),
    )


def kind_of(actor: str) -> Kind:
    """The kind of an actor; who it was isn't told."""
    if actor in _SYSTEM:
        return "system"
    if actor == "operator":
        return "operator"
    # A key of an owner that belongs to no person; `owner:` stands in events from before keys were told apart.
    return "owner" if actor.startswith(("key:", "owner:")) else "person"


def evidence_of(action: str, data: Mapping[str, Any]) -> dict[str, Scalar]:
    """What an action's allow-list names, from the event or its snapshot of the finding: plain values, cut and redacted."""
    snapshot = data.get("finding")
    nested: Mapping[str, Any] = snapshot if isinstance(snapshot, Mapping) else {}
    found: dict[str, Scalar] = {}
    for name in EVIDENCE.get(action, ()):
        value = data[name] if name in data else nested.get(name)
        if isinstance(value, str):
            found[name] = told(value)
        elif isinstance(value, bool | int | float):
            found[name] = value
    return found


def told(text: str) -> str:
    """One line of outside text, without e-mail addresses and what looks like a credential."""
    return without_addresses(redact(" ".join(clean(text).split())))[:VALUE_LIMIT]


def _moment(value: object) -> datetime | None:
    if not isinstance(value, str):
        return None
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        return None
    return moment.astimezone(UTC) if moment.tzinfo else None


# -- as CSV ----------------------------------------------------------------------------------------------------------------

COLUMNS = (
    "finding",
    "repository",
    "alert",
    "severity",
    "package",
    "ecosystem",
    "manifest",
    "title",
    "cve",
    "ghsa",
    "url",
    "status",
    "sla",
    "due_at",
    "at",
    "occurred_at",
    "action",
    "by",
    "evidence",
)
# What makes a spreadsheet compute a cell (OWASP, "CSV Injection"), their full-width forms included.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def csv_cell(value: object) -> str:
    """A cell that no spreadsheet takes for a formula: what would begin one gets an apostrophe before it."""
    text = "" if value is None else value.isoformat() if isinstance(value, date) else str(value)
    return f"'{text}" if text.startswith(_FORMULA) else text


def as_csv(report: AuditReport) -> bytes:
    """RFC 4180: a header, then a line for each event. Every cell is quoted."""
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for one in report.findings:
        facts = (one.id, one.repository, one.alert, one.severity, one.package, one.ecosystem, one.manifest, one.title)
        standing = (one.cve, one.ghsa, one.url, one.status, one.sla, one.due_at)
        for event in one.events:
            evidence = "; ".join(f"{name}={value}" for name, value in event.evidence.items())
            row = (*facts, *standing, event.at, event.occurred_at, event.action, event.by, evidence)
            writer.writerow([csv_cell(value) for value in row])
    return out.getvalue().encode()


def as_json(report: AuditReport) -> bytes:
    """The same as one JSON document."""
    return report.model_dump_json(by_alias=True).encode() + b"\n"
