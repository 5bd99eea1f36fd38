"""What the store hands out: frozen rows. Times are UTC, ids are UUIDs of ours unless a name says otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from kilo_pipelines.core.effects import EffectIntent
from kilo_pipelines.core.limits import Grant, LimitsConfig
from kilo_pipelines.core.people import lower_of


@dataclass(frozen=True)
class Owner:
    id: UUID
    kind: str
    name: str
    plan: str
    enabled: bool


@dataclass(frozen=True)
class Integration:
    owner_id: UUID
    id: UUID
    provider: str
    installation_id: int
    account: str
    suspended: bool
    connected_at: datetime


@dataclass(frozen=True)
class Repository:
    external_id: int
    full_name: str
    default_branch: str
    private: bool


@dataclass(frozen=True)
class ServiceConfig:
    config: dict[str, Any]
    enabled: bool
    revision: int
    action_required: dict[str, Any] | None = None


@dataclass(frozen=True)
class NewDelivery:
    """One verified inbound event. `body` is the raw bytes that the signature covers."""

    owner_id: UUID
    integration_id: UUID
    provider_delivery_id: str
    event: str
    action: str | None
    body: bytes
    headers: dict[str, str]
    trace: str | None = None


@dataclass(frozen=True)
class Receipt:
    """`outcome`: stored, resumed (known but not admitted yet), duplicate, id_reused (same id, another body)."""

    delivery_id: UUID
    outcome: str


@dataclass(frozen=True)
class DeliveryRow:
    owner_id: UUID
    id: UUID
    integration_id: UUID
    event: str
    action: str | None
    payload: Any
    received_at: datetime


@dataclass(frozen=True)
class ItemView:
    """A work item of a subject as admission sees it."""

    id: UUID
    state: str
    reason: str | None
    head_sha: str
    head_since: datetime
    base_ref: str
    session_id: UUID | None


@dataclass(frozen=True)
class NewItem:
    """A work item to open; `details` is the row of the service's own table. It is offered after `wait_s` seconds."""

    service: str
    subject_key: str
    repository_id: int
    priority: int
    details: dict[str, Any]
    wait_s: float = 0

    @property
    def by_person(self) -> bool:
        """Whether somebody asked for exactly this: every service's row says where it comes from."""
        return self.details.get("origin", self.details.get("trigger")) in ("manual", "bulk", "label")


@dataclass(frozen=True)
class Offer:
    """A hint that something waits; `kind`: start, session, settle, effects. `labels` become run tags."""

    kind: str
    service: str
    owner_id: UUID
    ids: list[UUID]
    offer_no: int
    labels: dict[str, str]


@dataclass(frozen=True)
class Claimed:
    """An item that this run now owns, until its lease is over or a later claim raises the fence."""

    owner_id: UUID
    owner_kind: str
    item_id: UUID
    service: str
    subject_key: str
    fence: int
    attempt: int
    tries: int
    repository_id: int
    installation_id: int
    integration_id: UUID
    details: dict[str, Any]
    # Since when it waited, and where its trace goes on.
    since: datetime | None = None
    trace: str | None = None
    by_person: bool = False
    # What its session may use; None for services that ask no model.
    granted: Grant | None = None
    limits: LimitsConfig = LimitsConfig()  # noqa: RUF009  # frozen


@dataclass(frozen=True)
class Refused:
    """Nothing was claimed; `outcome` is a reason code, `state` the item's (or session's) present state."""

    outcome: str
    state: str
    session_id: UUID | None = None


@dataclass(frozen=True)
class SessionClaim:
    owner_id: UUID
    session_id: UUID
    item_id: UUID
    fence: int
    spec: dict[str, Any]
    callback_token: str
    # The outcome that an earlier launch was about to push.
    accepted: dict[str, Any] | None = None
    trace: str | None = None


@dataclass(frozen=True)
class SessionRow:
    id: UUID
    item_id: UUID
    attempt: int
    state: str
    reason: str | None
    detail: str | None
    spec: dict[str, Any]
    result: dict[str, Any] | None
    evidence: dict[str, Any] | None
    receipt: dict[str, Any] | None
    run_id: str | None
    launches: int
    started_at: datetime | None
    ended_at: datetime | None


@dataclass(frozen=True)
class ClaimedEffect:
    owner_id: UUID
    id: UUID
    lease_no: int
    tries: int
    installation_id: int
    integration_id: UUID
    repository_id: int
    intent: EffectIntent
    trace: str | None = None


@dataclass(frozen=True)
class ItemRow:
    owner_id: UUID
    id: UUID
    service: str
    subject_key: str
    repository_id: int
    installation_id: int
    state: str
    reason: str | None
    attempt: int
    fence: int
    session_id: UUID | None
    announced: bool
    details: dict[str, Any]


@dataclass(frozen=True)
class ReviewRow:
    """A review with its item's state, for lists, the CLI and the control API."""

    owner_id: UUID
    item_id: UUID
    state: str
    reason: str | None
    attempt: int
    session_id: UUID | None
    session_state: str | None
    run_id: str | None
    session_run_id: str | None
    repository: str
    repository_id: int
    pull_number: int
    title: str
    author: str
    url: str
    base_ref: str
    head_ref: str
    head_sha: str
    verdict: dict[str, Any] | None
    evidence: dict[str, Any] | None
    created_at: datetime
    ended_at: datetime | None


@dataclass(frozen=True)
class FindingRow:
    """One security alert of one owner: what the source says, what was decided here, and the status that follows from both."""

    owner_id: UUID
    id: UUID
    repository_id: int
    source: str
    source_id: str
    severity: str
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
    upstream_state: str
    upstream_reason: str | None
    upstream_by: str | None
    upstream_comment: str | None
    disposition: str | None
    disposition_reason: str | None
    disposition_by: str | None
    disposition_actor: str | None
    disposition_at: datetime | None
    disposition_evidence: dict[str, Any] | None
    canonical_id: UUID | None
    status: str
    fingerprint: str
    detected_at: datetime
    source_updated_at: datetime
    fixed_at: datetime | None
    dismissed_at: datetime | None
    auto_dismissed_at: datetime | None
    first_seen_at: datetime
    changed_at: datetime


@dataclass(frozen=True)
class FindingEventRow:
    """One step of a finding's history, as the SLA reads it."""

    at: datetime
    kind: str
    severity: str | None
    reconstructed: bool


@dataclass(frozen=True)
class NewFindingEvent:
    """A step to add; the same `event_key` is added once. With an `action` it is an audit event too, with `data`."""

    at: datetime
    kind: str | None
    severity: str | None
    reconstructed: bool
    event_key: str
    action: str
    data: dict[str, Any]


@dataclass(frozen=True)
class SlaRow:
    """A finding's computed deadline; what depends on the present moment (overdue) is derived from it, never stored."""

    severity: str
    started_at: datetime | None
    due_at: datetime | None
    budget_days: int | None
    paused_seconds: int
    paused: bool
    period: int
    closed_at: datetime | None
    reconstructed: bool
    policy_version: int
    # Deadlines of periods that ended before the present one began.
    met_due: Sequence[datetime]
    missed_due: Sequence[datetime]
    # Of how many steps of history it was computed.
    events: int


@dataclass(frozen=True)
class SyncRow:
    """What an owner's sync of a repository learnt last; `cursor` is where an interrupted one goes on."""

    etag: str | None
    cursor: str | None
    outcome: str | None
    detail: str | None
    alerts: int | None
    attempted_at: datetime | None
    succeeded_at: datetime | None
    read_at: datetime | None
    not_before: datetime | None
    syncs: int


@dataclass(frozen=True)
class SyncTarget:
    """A repository that an owner's installation can see, with the installation that reads it.

    `refused_until`: GitHub refused the installation's token (for whichever of its repositories), and it isn't asked before then.
    """

    repository_id: int
    full_name: str
    installation_id: int
    integration_id: UUID
    refused_until: datetime | None


@dataclass(frozen=True)
class RemediationRow:
    """One remediation with its item's state and its pull request as the outbox knows it; `findings`: all that it ends."""

    item_id: UUID
    repository_id: int
    subject_key: str
    finding_id: UUID
    findings: list[UUID]
    state: str
    reason: str | None
    attempt: int
    origin: str
    requested_by: str
    analysis_id: UUID
    fingerprint: str
    branch: str | None
    commit_sha: str | None
    base_ref: str | None
    summary: str | None
    pull_number: int | None
    pull_url: str | None
    effect_state: str | None
    pull_state: str | None
    merged_at: datetime | None
    closed_at: datetime | None
    syncs_since_merge: int
    confirmed_at: datetime | None
    set_aside_at: datetime | None
    flagged_at: datetime | None
    created_at: datetime
    ended_at: datetime | None


@dataclass(frozen=True)
class AnalysisRow:
    """One analysis of a finding with its item's state. `snapshot`, `triage` and `deep`: services/security/analysis.py."""

    item_id: UUID
    finding_id: UUID
    state: str
    reason: str | None
    origin: str
    requested_by: str
    mode: str
    snapshot: dict[str, Any] | None
    triage: dict[str, Any] | None
    deep: dict[str, Any] | None
    commit_sha: str | None
    completed_at: datetime | None
    created_at: datetime
    ended_at: datetime | None


@dataclass(frozen=True)
class Person:
    """Somebody whom the platform knows by a login."""

    id: UUID
    login: str


@dataclass(frozen=True)
class Member:
    """A person's present role in an owner; `period` counts how often the membership began."""

    person_id: UUID
    login: str
    role: str
    period: int
    added_at: datetime


@dataclass(frozen=True)
class Principal:
    """Who asks: the key, its owner (None: the operator), the role that it has at this moment, and its person where it has one."""

    key_id: UUID
    owner_id: UUID | None
    role: str
    person_id: UUID | None
    login: str | None


@dataclass(frozen=True)
class ApiKey:
    """An owner's key without its value. `present`: its person's present role; `live`: neither over nor revoked, and its person is a member."""

    id: UUID
    owner_id: UUID
    person_id: UUID | None
    login: str | None
    role: str
    present: str | None
    name: str
    created_by: str
    created_at: datetime
    expires_at: datetime
    last_used_at: datetime | None
    rotated_at: datetime | None
    revoked_at: datetime | None
    live: bool

    @property
    def role_now(self) -> str | None:
        """What it may at this moment; None when it is not live."""
        if not self.live:
            return None
        return self.role if self.person_id is None else lower_of(self.role, self.present)
