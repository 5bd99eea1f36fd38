"""The control API of the Security Agent (contract 15 and 16): findings, figures, reports, settings, syncs."""

from __future__ import annotations

from dataclasses import asdict
from datetime import date, datetime
from functools import partial
from typing import Annotated, Any, Literal
from uuid import UUID

import anyio
from fastapi import APIRouter, Query
from pydantic import AwareDatetime, BeforeValidator, Field
from starlette.responses import Response

from kilo_pipelines.acts import security as acts
from kilo_pipelines.acts import services
from kilo_pipelines.acts.people import By
from kilo_pipelines.core.clock import Clock
from kilo_pipelines.ingress.control import (
    ABOUT_ONE,
    BIG,
    CHANGES,
    Asked,
    AskedOfRepository,
    NotFoundError,
    Refused,
    Strict,
    StrictBody,
    Who,
    act,
    by_owner_of,
    by_query,
    given,
)
from kilo_pipelines.services.security import sla
from kilo_pipelines.services.security.config import SERVICE, Recipient, SecurityConfig
from kilo_pipelines.services.security.report import AuditReport
from kilo_pipelines.store import FindingRow, Principal, Store, Wanted

AT = "/api/v1/security"
# Contract 15.
LIMIT, MOST = 50, 100
# A report holds a connection and some ten megabytes for up to 25 s; webhooks want theirs meanwhile.
REPORTS_AT_ONCE = 2

Severity = Literal["critical", "high", "medium", "low"]
Outcome = Literal[
    "all",
    "not_analyzed",
    "analyzing",
    "failed",
    "exploitable",
    "not_exploitable",
    "safe_to_dismiss",
    "needs_review",
    "triage_complete",
    "fixed",
    "dismissed",
]


def _day(value: object) -> object:
    """Only `2026-01-31`: a number would be taken for seconds."""
    if isinstance(value, str) and len(value) == 10 and value[4] == value[7] == "-":
        return value
    raise ValueError("a day is written YYYY-MM-DD")


Day = Annotated[date, BeforeValidator(_day)]


class FindingsQuery(AskedOfRepository):
    """Filters, order and place of a list."""

    status: Literal["open", "fixed", "ignored", "closed"] | None = Field(default=None, description="closed: fixed or ignored.")
    severity: Severity | None = None
    outcome: Outcome = "all"
    overdue: bool = False
    sort: Literal["severity_desc", "severity_asc", "sla_due_at_asc"] = "severity_desc"
    limit: int = Field(default=LIMIT, ge=1, le=MOST)
    offset: int = Field(default=0, ge=0, le=BIG)


class MomentQuery(Strict):
    """As of which moment; with its offset from UTC."""

    at: AwareDatetime | None = None


class ReportQuery(AskedOfRepository):
    """Which document; days are UTC, both included."""

    first: Day | None = Field(default=None, alias="from")
    last: Day | None = Field(default=None, alias="to")
    form: acts.Form = Field(default="json", alias="format")


class Listed(Strict):
    """A finding in a list."""

    id: UUID
    repository_id: int
    repository: str
    source_id: str
    severity: Severity
    package_name: str
    package_ecosystem: str
    manifest_path: str
    title: str
    cve_id: str | None
    ghsa_id: str | None
    patched_version: str | None
    status: Literal["open", "fixed", "ignored"]
    upstream_state: str
    disposition: str | None
    disposition_reason: str | None
    html_url: str | None
    detected_at: datetime
    due_at: datetime | None
    budget_days: int | None
    paused: bool
    closed_at: datetime | None
    overdue: bool
    outcome: str


class FindingsPage(Strict):
    """A page of findings and how many the filters let through."""

    findings: list[Listed]
    total: int
    limit: int
    offset: int


class Deadline(Strict):
    """Where a finding's deadline stands, and how it came to be."""

    status: str
    due_at: datetime | None
    explained: str


class Step(Strict):
    """One step of a finding's history."""

    at: datetime
    kind: str
    severity: str | None
    reconstructed: bool


class Analysis(Strict):
    """One analysis of a finding."""

    item_id: UUID
    state: str
    reason: str | None
    origin: str
    requested_by: str
    mode: str
    triage: dict[str, Any] | None
    deep: dict[str, Any] | None
    commit_sha: str | None
    completed_at: datetime | None
    created_at: datetime
    ended_at: datetime | None


class Effect(Strict):
    """What was, or is to be, written outside."""

    kind: str
    state: str
    reason: str | None
    url: str | None


class Work(Strict):
    """A work item of a finding."""

    id: UUID
    service: str
    state: str
    reason: str | None
    attempt: int
    created_at: datetime
    ended_at: datetime | None
    effects: list[Effect]


class Facts(Strict):
    """What the source says of a finding and what was decided here."""

    id: UUID
    repository_id: int
    source: str
    source_id: str
    severity: Severity
    ghsa_id: str | None
    cve_id: str | None
    package_name: str
    package_ecosystem: str
    manifest_path: str
    dependency_scope: str | None
    vulnerable_version_range: str | None
    patched_version: str | None
    title: str
    description: str
    cwe_ids: list[str]
    cvss_score: float | None
    html_url: str | None
    status: Literal["open", "fixed", "ignored"]
    upstream_state: str
    upstream_reason: str | None
    disposition: str | None
    disposition_reason: str | None
    disposition_by: str | None
    disposition_at: datetime | None
    canonical_id: UUID | None
    detected_at: datetime
    source_updated_at: datetime
    fixed_at: datetime | None
    dismissed_at: datetime | None
    auto_dismissed_at: datetime | None
    first_seen_at: datetime


class FindingAnswer(Strict):
    """One finding with all that is known of it."""

    finding: Facts
    sla: Deadline
    history: list[Step]
    analyses: list[Analysis]
    work: list[Work]


class Standing(Strict):
    """Open findings with a deadline; the share is null where none has one."""

    total: int
    within_sla: int
    overdue: int
    compliance_percent: float | None


class SlaFigures(Strict):
    """Deadlines of open findings; due soon: within seven days; untracked: without a deadline."""

    overall: Standing
    by_severity: dict[str, Standing]
    due_soon: int
    due_soon_exploitable: int
    untracked: int


class AnalysisFigures(Strict):
    """Open findings by outcome of their analysis; `analyzed` is the sum of the five results."""

    total: int
    analyzed: int
    exploitable: int
    not_exploitable: int
    safe_to_dismiss: int
    needs_review: int
    triage_complete: int
    analyzing: int
    not_analyzed: int
    failed: int


class TimeToFix(Strict):
    """Days from an alert to its fix, and the days that the policy gives."""

    fixed: int
    average_days: float | None
    median_days: float | None
    target_days: int | None


class TimesToFix(Strict):
    """The same in all and by severity."""

    overall: TimeToFix
    by_severity: dict[str, TimeToFix]


class Overdue(Strict):
    """An overdue finding; whole days."""

    id: UUID
    repository_id: int
    repository: str
    severity: Severity
    package_name: str
    title: str
    due_at: datetime
    days_overdue: int


class RepositoryHealth(Strict):
    """Open findings of a repository."""

    repository_id: int
    repository: str
    open: int
    critical: int
    high: int
    medium: int
    low: int
    overdue: int
    needs_action: int


class Summary(Strict):
    """The figures of an owner, or of one repository."""

    findings: int
    by_status: dict[str, int]
    open_by_severity: dict[str, int]
    sla: SlaFigures
    analysis: AnalysisFigures
    time_to_fix: TimesToFix
    overdue: list[Overdue] = Field(description="The ten longest overdue.")
    repositories: list[RepositoryHealth] = Field(description="The ten worst.")
    repositories_open: int = Field(description="Repositories with open findings in all.")


class RecipientKind(Strict):
    """A recipient as who may not change settings sees it: an address may hold a secret."""

    kind: Literal["email", "slack", "webhook"]


class ShownConfig(SecurityConfig):
    """Settings with recipients as the key's role sees them."""

    notice_recipients: list[Recipient | RecipientKind]  # type: ignore[assignment]  # wider, and only ever shown


class Settings(Strict):
    """An owner's settings; `revision` 0: none saved yet."""

    settings: ShownConfig
    enabled: bool
    revision: int
    action_required: dict[str, Any] | None


class SettingsChange(StrictBody):
    """Settings to change, over the revision that was read; what isn't named stays."""

    expected_revision: int = Field(ge=0, le=2**31 - 1)
    settings: dict[str, Any]


class SyncWish(StrictBody):
    """Of which repository (numeric id), selected or not; none: of all selected ones."""

    repository: int | None = Field(default=None, ge=1, le=BIG)


class SyncRequested(Strict):
    """`waiting`: a sync waits or runs already, and this one is the same; else the work item that was opened."""

    outcome: Literal["accepted", "waiting"]
    item: UUID | None


class SettingsSaved(Strict):
    """What is stored now, and how many deadlines were looked at and changed."""

    settings: SecurityConfig
    enabled: bool
    revision: int
    deadlines_looked: int
    deadlines_changed: int


def security_routes(router: APIRouter, store: Store, clock: Clock) -> None:
    """Adds the routes."""
    reports = anyio.CapacityLimiter(REPORTS_AT_ONCE)

    @router.get(f"{AT}/findings", responses=ABOUT_ONE, **act("read"))
    def list_findings(who: Who, asked: Annotated[FindingsQuery, Query()]) -> FindingsPage:
        """Findings with their deadlines."""
        by = by_query(store, who, asked)
        outcome = None if asked.outcome == "all" else asked.outcome
        wanted = Wanted(asked.status, asked.severity, asked.repository, outcome, asked.overdue)
        page, total = store.findings.page(by.owner_id, wanted, sort=asked.sort, limit=asked.limit, offset=asked.offset)
        return FindingsPage(findings=[Listed(**one) for one in page], total=total, limit=asked.limit, offset=asked.offset)

    @router.get(f"{AT}/findings/{{finding}}", responses=ABOUT_ONE, **act("read"))
    def show_finding(who: Who, finding: UUID) -> FindingAnswer:
        """One finding: facts, deadline, history, analyses, work."""
        return _finding(store, finding_of(store, who, finding)[1], clock.now())

    @router.get(f"{AT}/findings/{{finding}}/deadline", responses=ABOUT_ONE, **act("read"))
    def explain_deadline(who: Who, finding: UUID, asked: Annotated[MomentQuery, Query()]) -> Deadline:
        """How a finding's deadline came to be, now or at a past moment under the policy of that time."""
        found = finding_of(store, who, finding)[1]
        history = store.findings.history(found.owner_id, [finding]).get(finding, [])
        state = acts.state_of(store, found, history, asked.at or clock.now())
        return Deadline(status=state.status, due_at=state.due_at, explained=sla.explain(state))

    @router.get(f"{AT}/summary", responses=ABOUT_ONE, **act("read"))
    def show_summary(who: Who, asked: Annotated[AskedOfRepository, Query()]) -> Summary:
        """The owner's figures."""
        by = by_query(store, who, asked)
        return Summary.model_validate(acts.summary_of(store, by.owner_id, asked.repository, clock.now()))

    @router.get(
        f"{AT}/report",
        response_model=AuditReport,
        responses=ABOUT_ONE
        | {200: {"content": {acts.MEDIA_TYPES[one].split(";")[0]: {} for one in ("csv", "vex")}}, 413: {"model": Refused}},
        **act("read"),
    )
    async def make_report(who: Who, asked: Annotated[ReportQuery, Query()]) -> Response:
        """An audit report of a period (csv, json), or a VEX document of the present."""
        by = await anyio.to_thread.run_sync(by_query, store, who, asked)
        wish = acts.Wish(asked.form, asked.first, asked.last, asked.repository)
        make = partial(acts.make_document, store, by.owner_id, wish, role=by.role, actor=by.actor, now=clock.now())
        made = given(await anyio.to_thread.run_sync(make, limiter=reports))
        name = f"security-{asked.form}-{clock.now():%Y-%m-%d}.{'csv' if asked.form == 'csv' else 'json'}"
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return Response(made, media_type=acts.MEDIA_TYPES[asked.form], headers=headers)

    @router.get(f"{AT}/settings", responses=ABOUT_ONE, **act("read"))
    def show_settings(who: Who, asked: Annotated[Asked, Query()]) -> Settings:
        """The owner's settings."""
        by = by_query(store, who, asked)
        found = given(services.settings_of(store, SERVICE, by=by))
        known = store.owners.services(by.owner_id)
        return Settings(
            settings=ShownConfig.model_validate(found.config),
            enabled=found.enabled,
            revision=found.revision,
            action_required=next((one["action_required"] for one in known if one["service"] == SERVICE), None),
        )

    @router.put(f"{AT}/settings", responses=CHANGES | {422: {"model": Refused}}, **act("settings"))
    def save_settings(who: Who, asked: Annotated[Asked, Query()], wanted: SettingsChange) -> SettingsSaved:
        """Changes settings; never switches the service on or off. Deadlines follow before the answer."""
        by = by_query(store, who, asked)
        saved = given(
            acts.save_settings(
                store,
                by.owner_id,
                wanted.settings,
                expected_revision=wanted.expected_revision,
                role=by.role,
                actor=by.actor,
                now=clock.now(),
                recompute=acts.recompute_deadlines,
            )
        )
        return SettingsSaved(
            settings=saved.config,
            enabled=saved.enabled,
            revision=saved.revision,
            deadlines_looked=saved.looked,
            deadlines_changed=saved.changed,
        )

    @router.post(f"{AT}/sync", status_code=202, responses=CHANGES, **act("sync"))
    def request_sync(who: Who, asked: Annotated[Asked, Query()], wish: SyncWish) -> SyncRequested:
        """Asks for a sync; a run begins as soon as a worker is free."""
        by = by_query(store, who, asked)
        item = given(acts.request_sync(store, by.owner_id, wish.repository, role=by.role, actor=by.actor))
        return SyncRequested(outcome="waiting" if item is None else "accepted", item=item)


def finding_of(store: Store, who: Principal, finding_id: UUID) -> tuple[By, FindingRow]:
    """Who asks about the finding that the path names, and the finding; NotFoundError for what is another owner's or nobody's."""
    owner_id = who.owner_id if who.owner_id is not None else store.findings.owner_of(finding_id)
    by = by_owner_of(who, owner_id)
    found = store.findings.get(by.owner_id, finding_id)
    if found is None:
        raise NotFoundError
    return by, found


def _finding(store: Store, row: FindingRow, now: datetime) -> FindingAnswer:
    owner_id, finding_id = row.owner_id, row.id
    history = store.findings.history(owner_id, [finding_id]).get(finding_id, [])
    state = acts.state_of(store, row, history, now)
    return FindingAnswer(
        finding=Facts(**{name: getattr(row, name) for name in Facts.model_fields}),
        sla=Deadline(status=state.status, due_at=state.due_at, explained=sla.explain(state)),
        history=[Step(**asdict(one)) for one in history],
        analyses=[
            Analysis(**{name: getattr(one, name) for name in Analysis.model_fields})
            for one in store.analyses.of_finding(owner_id, finding_id)
        ],
        work=[Work(**one) for one in store.findings.work(owner_id, finding_id)],
    )
