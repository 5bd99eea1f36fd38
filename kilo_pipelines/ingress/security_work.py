"""The control API of the Security Agent's work (contract 16): analyses, dismissals, remediations, notices, quarantine.

What is asked for becomes a work item; its id is the answer, and the finding's page shows what became of it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any, Literal
from uuid import UUID

import anyio
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kilo_pipelines.acts import analysis, dismissal, remediation
from kilo_pipelines.core.reasons import MEANING, Reason
from kilo_pipelines.core.refusal import Refusal
from kilo_pipelines.ingress.control import (
    REFUSALS,
    Asked,
    Caller,
    Desk,
    Operation,
    Refused,
    Strict,
    StrictBody,
    body_of,
    id_in_path,
    not_found,
    refused,
    told,
)
from kilo_pipelines.services.permissions import Act
from kilo_pipelines.services.security.dismissal import DismissalReason
from kilo_pipelines.services.security.remediation import SERVICE as REMEDIATION
from kilo_pipelines.store import FindingRow

# A command over all open findings of an owner reads them page by page; two of them leave the other threads to webhooks.
BULK_AT_ONCE = 2


class ListQuery(Asked):
    """How many, the newest first."""

    limit: int = Field(default=50, ge=1, le=1_000)


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


class Cancelled(Strict):
    """It is over, its session with it."""

    outcome: Literal["cancelled"] = "cancelled"


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


_OPENED: dict[int, type[BaseModel]] = {202: Opened, **REFUSALS, 404: Refused, 409: Refused, 413: Refused}
_BULK: dict[int, type[BaseModel]] = {**REFUSALS, 409: Refused, 413: Refused}
OPERATIONS: dict[str, Operation] = {
    "analyze_finding": Operation("Has a finding analysed.", _OPENED, body=AnalysisWish),
    "dismiss_finding": Operation("Dismisses a finding, here and at its source.", _OPENED, body=DismissalWish),
    "remediate_finding": Operation("Has a pull request opened that ends a finding.", _OPENED, body=RemediationWish),
    "dismiss_findings": Operation(
        "Counts, or dismisses, all open findings of which the analyses of metadata say so.",
        {200: Counted, **_BULK},
        query=Asked,
        body=BulkDismissalWish,
    ),
    "remediate_findings": Operation(
        "Has pull requests opened for all open findings that the owner's settings let through.",
        {200: Admitted, **_BULK},
        query=Asked,
        body=BulkRemediationWish,
    ),
    "list_remediations": Operation("Remediations with their pull requests.", {200: RemediationList, **REFUSALS}, query=ListQuery),
    "cancel_remediation": Operation(
        "Ends a remediation that waits or runs.", {200: Cancelled, 401: Refused, 404: Refused, 409: Refused}
    ),
    "list_repositories": Operation("Repositories and their syncs.", {200: RepositoryList, **REFUSALS}, query=Asked),
    "list_notices": Operation("Who was told what.", {200: NoticeList, **REFUSALS}, query=ListQuery),
    "list_quarantine": Operation("Alerts that could not be taken.", {200: Quarantine, **REFUSALS}, query=Asked),
}


def security_work_routes(desk: Desk) -> list[Route]:
    """The routes; each asks who it is before it looks at anything else."""
    store = desk.store
    bulk = anyio.CapacityLimiter(BULK_AT_ONCE)

    async def open_for(
        request: Request, act: Act, wish: type[StrictBody], ask: Callable[[FindingRow, Caller, Any], UUID | Reason]
    ) -> Response:
        found = await desk.of_finding(request, act)
        if isinstance(found, Response):
            return found
        by, finding_id = found
        finding = await anyio.to_thread.run_sync(store.findings.get, by.owner_id, finding_id)
        if finding is None:
            return not_found()
        wanted = await body_of(request, wish)
        if isinstance(wanted, Response):
            return wanted
        answer = await anyio.to_thread.run_sync(ask, finding, by, wanted)
        return _why_not(answer) if isinstance(answer, Reason) else told(Opened(item=answer), 202)

    async def analyze_finding(request: Request) -> Response:
        def ask(finding: FindingRow, by: Caller, wish: AnalysisWish) -> UUID | Reason:
            return analysis.analyse(store, finding, role=by.role, actor=by.actor, deep=wish.deep, restart=wish.restart)

        return await open_for(request, "analyse", AnalysisWish, ask)

    async def dismiss_finding(request: Request) -> Response:
        def ask(finding: FindingRow, by: Caller, wish: DismissalWish) -> UUID | Reason:
            return dismissal.dismiss(store, finding, role=by.role, actor=by.actor, reason=wish.reason, comment=wish.comment)

        return await open_for(request, "dismiss", DismissalWish, ask)

    async def remediate_finding(request: Request) -> Response:
        def ask(finding: FindingRow, by: Caller, wish: RemediationWish) -> UUID | Reason:
            return remediation.admit(
                store, by.owner_id, finding.id, origin="manual", actor=by.actor, role=by.role, retry=wish.retry
            )

        return await open_for(request, "remediate", RemediationWish, ask)

    async def dismiss_findings(request: Request) -> Response:
        found = await desk.caller(request, "dismiss", Asked)
        if isinstance(found, Response):
            return found
        by, _ = found
        wish = await body_of(request, BulkDismissalWish)
        if isinstance(wish, Response):
            return wish
        ask = partial(dismissal.dismiss_many, store, by.owner_id, role=by.role, actor=by.actor, apply=wish.apply)
        counted = await anyio.to_thread.run_sync(ask, limiter=bulk)
        return _why_not(counted) if isinstance(counted, Reason) else told(Counted(applied=wish.apply, counted=dict(counted)))

    async def remediate_findings(request: Request) -> Response:
        found = await desk.caller(request, "remediate", Asked)
        if isinstance(found, Response):
            return found
        by, _ = found
        wish = await body_of(request, BulkRemediationWish)
        if isinstance(wish, Response):
            return wish
        done = await anyio.to_thread.run_sync(
            partial(remediation.remediate_all, store, by.owner_id, actor=by.actor, role=by.role), limiter=bulk
        )
        return _why_not(done) if isinstance(done, Reason) else told(Admitted(**vars(done)))

    async def list_remediations(request: Request) -> Response:
        found = await desk.caller(request, "read", ListQuery)
        if isinstance(found, Response):
            return found
        by, asked = found
        rows = await anyio.to_thread.run_sync(partial(store.remediations.of_owner, by.owner_id, limit=asked.limit))
        shown = [Remediation(**{name: getattr(one, name) for name in Remediation.model_fields}) for one in rows]
        return told(RemediationList(remediations=shown))

    async def cancel_remediation(request: Request) -> Response:
        found = await desk.who(request, "remediate")
        if isinstance(found, Response):
            return found
        owner_id, role = found
        item_id = id_in_path(request, "item")
        item = await anyio.to_thread.run_sync(store.queue.get, item_id) if item_id is not None else None
        if item is None or item.service != REMEDIATION or owner_id not in (None, item.owner_id):
            return not_found()
        actor = "operator" if owner_id is None else f"owner:{owner_id}"
        cancel = partial(remediation.cancel, store, item.owner_id, item.id, actor=actor, role=role)
        answer = await anyio.to_thread.run_sync(cancel)
        return told(Cancelled()) if answer is None else _why_not(answer)

    async def list_repositories(request: Request) -> Response:
        found = await desk.caller(request, "read", Asked)
        if isinstance(found, Response):
            return found
        rows = await anyio.to_thread.run_sync(store.findings.syncs, found[0].owner_id)
        shown = [RepositoryState(**{name: one[name] for name in RepositoryState.model_fields}) for one in rows]
        return told(RepositoryList(repositories=shown))

    async def list_notices(request: Request) -> Response:
        found = await desk.caller(request, "read", ListQuery)
        if isinstance(found, Response):
            return found
        by, asked = found
        rows = await anyio.to_thread.run_sync(store.notices.listed, by.owner_id, asked.limit)
        return told(NoticeList.model_validate({"notices": rows}))

    async def list_quarantine(request: Request) -> Response:
        found = await desk.caller(request, "read", Asked)
        if isinstance(found, Response):
            return found
        rows = await anyio.to_thread.run_sync(store.findings.quarantined, found[0].owner_id)
        return told(Quarantine.model_validate({"alerts": rows}))

    at = "/api/v1/security"
    return [
        Route(f"{at}/findings/{{finding}}/analyze", analyze_finding, methods=["POST"]),
        Route(f"{at}/findings/{{finding}}/dismiss", dismiss_finding, methods=["POST"]),
        Route(f"{at}/findings/{{finding}}/remediate", remediate_finding, methods=["POST"]),
        Route(f"{at}/dismiss", dismiss_findings, methods=["POST"]),
        Route(f"{at}/remediate", remediate_findings, methods=["POST"]),
        Route(f"{at}/remediations", list_remediations, methods=["GET"]),
        Route(f"{at}/remediations/{{item}}/cancel", cancel_remediation, methods=["POST"]),
        Route(f"{at}/repositories", list_repositories, methods=["GET"]),
        Route(f"{at}/notices", list_notices, methods=["GET"]),
        Route(f"{at}/quarantine", list_quarantine, methods=["GET"]),
    ]


def _why_not(reason: Reason) -> Response:
    return refused(Refusal(reason, MEANING[reason][0]))
