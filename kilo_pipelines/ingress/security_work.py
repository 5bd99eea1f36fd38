"""The control API of the Security Agent's work (contract 16): analyses, dismissals, remediations, notices, quarantine.

What is asked for becomes a work item; its id is the answer, and the finding's page shows what became of it.
"""

from __future__ import annotations

import base64
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Literal
from uuid import UUID

import anyio
from fastapi import APIRouter, Query
from pydantic import Field

from kilo_pipelines.acts import analysis, dismissal, remediation
from kilo_pipelines.core.reasons import MEANING, Reason
from kilo_pipelines.core.refusal import Refusal
from kilo_pipelines.ingress.control import (
    ABOUT_ONE,
    CHANGES,
    Asked,
    NotFoundError,
    RefusedError,
    Strict,
    StrictBody,
    Who,
    act,
    by_owner_of,
    by_query,
)
from kilo_pipelines.ingress.security import AT, finding_of
from kilo_pipelines.ingress.work import Cancelled, ListQuery
from kilo_pipelines.services.security.dismissal import DismissalReason
from kilo_pipelines.services.security.remediation import SERVICE as REMEDIATION
from kilo_pipelines.store import Store

# A command over all open findings of an owner reads them page by page; two of them leave the other threads to webhooks.
BULK_AT_ONCE = 2


class Opened(Strict):
    """The work item that does what was asked for."""

    outcome: Literal["accepted"] = "accepted"
    item: UUID


class AnalysisWish(StrictBody):
    """`deep`: read the repository, whatever the metadata say; `restart`: cancel what is under way and start over, deep."""

    deep: bool = False
    restart: bool = False


class DismissalWish(StrictBody):
    """Why, in the source's words, and a sentence for it; what is longer than the source takes is cut there."""

    reason: DismissalReason
    comment: str = Field(default="", max_length=4_000)


class RemediationWish(StrictBody):
    """`retry`: once more after one that failed, was cancelled, was blocked or changed nothing."""

    retry: bool = False


class BulkDismissalWish(StrictBody):
    """Without `apply` they are only counted."""

    apply: bool = False


class BulkRemediationWish(StrictBody):
    """Nothing to say: the owner's settings decide."""


class Counted(Strict):
    """Open findings by the confidence of what lets them go, and by the reason of what doesn't."""

    applied: bool
    counted: dict[str, int]


class Admitted(Strict):
    """What a command over all open findings did; `skipped` by reason."""

    scanned: int
    admitted: list[UUID]
    skipped: dict[str, int]


class Remediation(Strict):
    """One remediation and its pull request."""

    item_id: UUID
    repository_id: int
    findings: list[UUID]
    state: str
    reason: str | None
    attempt: int
    origin: str
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


class RemediationList(Strict):
    """Remediations, the newest first."""

    remediations: list[Remediation]


class Message(Strict):
    """One message to one recipient."""

    channel: str
    state: str
    reason: str | None


class Notice(Strict):
    """One notice of a finding and what became of its messages."""

    finding_id: UUID
    kind: str
    state: str
    reason: str | None
    created_at: datetime
    messages: list[Message]


class NoticeList(Strict):
    """Notices, the newest first."""

    notices: list[Notice]


class WebhookSecret(Strict):
    """The secret in the form of Standard Webhooks: `whsec_` and base64."""

    secret: str


class RepositoryState(Strict):
    """A repository and how its last sync ended; `succeeded_at`: fresh as of then; `not_before`: not asked again earlier."""

    repository_id: int
    full_name: str
    outcome: str | None
    detail: str | None
    alerts: int | None
    attempted_at: datetime | None
    succeeded_at: datetime | None
    not_before: datetime | None
    quarantined: int


class RepositoryList(Strict):
    """The repositories that the owner's installations see, by name."""

    repositories: list[RepositoryState]


class Quarantined(Strict):
    """An alert that could not be taken; `detail` names the wrong fields."""

    repository_id: int
    full_name: str
    source_id: str
    reason: str
    detail: str
    first_seen_at: datetime
    last_seen_at: datetime


class Quarantine(Strict):
    """Alerts that could not be taken, the newest first."""

    alerts: list[Quarantined]


def security_work_routes(router: APIRouter, store: Store) -> None:
    """Adds the routes."""
    bulk = anyio.CapacityLimiter(BULK_AT_ONCE)

    @router.post(f"{AT}/findings/{{finding}}/analyze", status_code=202, responses=CHANGES, **act("analyse"))
    def analyze_finding(who: Who, finding: UUID, wish: AnalysisWish) -> Opened:
        """Has a finding analysed."""
        by, found = finding_of(store, who, finding)
        return _opened(analysis.analyse(store, found, role=by.role, actor=by.actor, deep=wish.deep, restart=wish.restart))

    @router.post(f"{AT}/findings/{{finding}}/dismiss", status_code=202, responses=CHANGES, **act("dismiss"))
    def dismiss_finding(who: Who, finding: UUID, wish: DismissalWish) -> Opened:
        """Dismisses a finding, here and at its source."""
        by, found = finding_of(store, who, finding)
        return _opened(dismissal.dismiss(store, found, role=by.role, actor=by.actor, reason=wish.reason, comment=wish.comment))

    @router.post(f"{AT}/findings/{{finding}}/remediate", status_code=202, responses=CHANGES, **act("remediate"))
    def remediate_finding(who: Who, finding: UUID, wish: RemediationWish) -> Opened:
        """Has a pull request opened that ends a finding."""
        by, found = finding_of(store, who, finding)
        return _opened(
            remediation.admit(store, by.owner_id, found.id, origin="manual", actor=by.actor, role=by.role, retry=wish.retry)
        )

    @router.post(f"{AT}/dismiss", responses=CHANGES, **act("dismiss"))
    async def dismiss_findings(who: Who, asked: Annotated[Asked, Query()], wish: BulkDismissalWish) -> Counted:
        """Counts, or dismisses, all open findings of which the analyses of metadata say so."""
        by = await anyio.to_thread.run_sync(by_query, store, who, asked)
        ask = partial(dismissal.dismiss_many, store, by.owner_id, role=by.role, actor=by.actor, apply=wish.apply)
        counted = _unless_reason(await anyio.to_thread.run_sync(ask, limiter=bulk))
        return Counted(applied=wish.apply, counted=dict(counted))

    @router.post(f"{AT}/remediate", responses=CHANGES, **act("remediate"))
    async def remediate_findings(who: Who, asked: Annotated[Asked, Query()], wish: BulkRemediationWish) -> Admitted:
        """Has pull requests opened for all open findings that the owner's settings let through."""
        by = await anyio.to_thread.run_sync(by_query, store, who, asked)
        ask = partial(remediation.remediate_all, store, by.owner_id, actor=by.actor, role=by.role)
        return Admitted(**vars(_unless_reason(await anyio.to_thread.run_sync(ask, limiter=bulk))))

    @router.get(f"{AT}/remediations", responses=ABOUT_ONE, **act("read"))
    def list_remediations(who: Who, asked: Annotated[ListQuery, Query()]) -> RemediationList:
        """Remediations with their pull requests."""
        rows = store.remediations.of_owner(by_query(store, who, asked).owner_id, limit=asked.limit)
        return RemediationList(
            remediations=[Remediation(**{name: getattr(one, name) for name in Remediation.model_fields}) for one in rows]
        )

    @router.post(f"{AT}/remediations/{{item}}/cancel", responses=CHANGES, **act("remediate"))
    def cancel_remediation(who: Who, item: UUID) -> Cancelled:
        """Ends a remediation that waits or runs."""
        found = store.queue.get(item)
        if found is None or found.service != REMEDIATION:
            raise NotFoundError
        by = by_owner_of(who, found.owner_id)
        reason = remediation.cancel(store, by.owner_id, found.id, actor=by.actor, role=by.role)
        if reason is not None:
            _unless_reason(reason)
        return Cancelled()

    @router.get(f"{AT}/repositories", responses=ABOUT_ONE, **act("read"))
    def list_repositories(who: Who, asked: Annotated[Asked, Query()]) -> RepositoryList:
        """Repositories and their syncs."""
        rows = store.findings.syncs(by_query(store, who, asked).owner_id)
        return RepositoryList(
            repositories=[RepositoryState(**{name: one[name] for name in RepositoryState.model_fields}) for one in rows]
        )

    @router.get(f"{AT}/notices", responses=ABOUT_ONE, **act("read"))
    def list_notices(who: Who, asked: Annotated[ListQuery, Query()]) -> NoticeList:
        """Who was told what."""
        rows = store.notices.listed(by_query(store, who, asked).owner_id, asked.limit)
        return NoticeList.model_validate({"notices": rows})

    @router.get(f"{AT}/notices/webhook-secret", responses=ABOUT_ONE, **act("settings"))
    def show_webhook_secret(who: Who, asked: Annotated[Asked, Query()]) -> WebhookSecret:
        """What the owner's webhooks are signed with."""
        secret = store.cipher.derive(f"notice-webhook:{by_query(store, who, asked).owner_id}")
        return WebhookSecret(secret="whsec_" + base64.b64encode(secret).decode())

    @router.get(f"{AT}/quarantine", responses=ABOUT_ONE, **act("read"))
    def list_quarantine(who: Who, asked: Annotated[Asked, Query()]) -> Quarantine:
        """Alerts that could not be taken."""
        rows = store.findings.quarantined(by_query(store, who, asked).owner_id)
        return Quarantine.model_validate({"alerts": rows})


def _opened(answer: UUID | Reason) -> Opened:
    return Opened(item=_unless_reason(answer))


def _unless_reason(answer: Any) -> Any:
    if isinstance(answer, Reason):
        raise RefusedError(Refusal(answer, MEANING[answer][0]))
    return answer
