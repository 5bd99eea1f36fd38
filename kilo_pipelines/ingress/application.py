"""The two applications. Every answer is JSON with an `outcome` and, when something was refused or skipped, a reason code."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cached_property, partial
from typing import Any, Protocol
from uuid import UUID

import anyio
from prometheus_client import generate_latest
from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from kilo_pipelines.core.clock import Clock, SystemClock
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.text import storable
from kilo_pipelines.ingress import metrics
from kilo_pipelines.ingress.bodies import (
    CALLBACK_BYTES,
    INLINE_BYTES,
    WEBHOOK_BYTES,
    BodyError,
    parse_object,
    parsed,
    read_body,
)
from kilo_pipelines.ingress.control import Desk
from kilo_pipelines.ingress.openapi import description
from kilo_pipelines.ingress.security import security_routes
from kilo_pipelines.ingress.security_work import security_work_routes
from kilo_pipelines.ingress.together import Together
from kilo_pipelines.providers.github_webhooks import (
    InstallationRepositoriesShape,
    InstallationShape,
    RepositoryLabel,
    RepositoryShape,
    installation_id,
    shape_matches,
    signed_with,
)
from kilo_pipelines.store import AmbiguousInstallationError, Integration, NewDelivery, Receipt, Repository, Store
from kilo_pipelines.store.app_secrets import WebhookSecret
from kilo_pipelines.store.crypto import CipherError

log = logging.getLogger(__name__)

HEADER_LIMIT = 200
_KEPT_HEADERS = ("x-github-hook-id", "x-github-hook-installation-target-id", "user-agent", "content-type")
# Events that a service admits; everything else is stored as settled.
_ADMITTED = {"pull_request", "dependabot_alert"}
_LIFECYCLE = frozenset({"installation", "installation_repositories", "repository"})

# A dispatch finds its pull request among this many newest reviews of an owner.
DISPATCH_LOOK_BACK = 1_000


class Dispatch(BaseModel):
    """Body of a dispatch: a pull request that the platform knows; `force` repeats a completed review."""

    model_config = ConfigDict(extra="forbid", strict=True)

    repository: str
    pull_number: int
    force: bool = False


class SigningSecrets(Protocol):
    """Where the valid webhook secrets come from: during a rotation there are two."""

    def valid(self, now: datetime) -> tuple[WebhookSecret, ...]:
        """The valid ones, the newest first; CipherError when they can't be opened."""
        ...

    def seen(self, secret: WebhookSecret, now: datetime) -> None:
        """A delivery was signed with this one."""
        ...


@dataclass(frozen=True)
class Ingress:
    """What the applications need: the store and the webhook secrets that are valid now (none: not configured)."""

    store: Store
    webhook_secrets: SigningSecrets
    allowed_hosts: frozenset[str]
    clock: Clock = field(default_factory=SystemClock)

    @cached_property
    def integration_of(self) -> Together[int, Integration | None]:
        """An installation's integration; requests that wait together share one query."""
        return Together(partial(self.store.owners.by_installations, "github"))

    @cached_property
    def record(self) -> Together[tuple[NewDelivery, str | None], Receipt]:
        """Stores a delivery; requests that wait together share one commit, and none is answered before it."""
        return Together(self.store.inbox.record_many)


def _answer(status: int, outcome: str, reason: str | None = None, **more: Any) -> JSONResponse:
    return JSONResponse({"outcome": outcome, **({"reason": reason} if reason else {}), **more}, status_code=status)


def public_application(ingress: Ingress) -> Starlette:
    """Webhooks, callbacks, health."""

    async def webhook(request: Request) -> Response:
        started = time.perf_counter()
        try:
            answer = await _webhook(ingress, request)
        except BodyError as failure:
            metrics.deliveries.labels(str(failure.reason)).inc()
            answer = _answer(failure.status, "refused", failure.reason)
        except SQLAlchemyError:
            log.exception("a delivery could not be stored")
            metrics.deliveries.labels(str(Reason.STORE_UNAVAILABLE)).inc()
            answer = _answer(503, "refused", Reason.STORE_UNAVAILABLE)
        metrics.answer_seconds.observe(time.perf_counter() - started)
        return answer

    async def callback(request: Request) -> Response:
        try:
            return await _callback(ingress, request)
        except BodyError as failure:
            metrics.callbacks.labels(str(failure.reason)).inc()
            return _answer(failure.status, "refused", failure.reason)
        except SQLAlchemyError:
            log.exception("a callback could not be stored")
            metrics.callbacks.labels(str(Reason.STORE_UNAVAILABLE)).inc()
            return _answer(503, "refused", Reason.STORE_UNAVAILABLE)

    return _guarded(
        ingress,
        [
            Route("/webhooks/github", webhook, methods=["POST"]),
            Route("/callbacks/sessions/{session}", callback, methods=["POST"]),
            Route("/health", health, methods=["GET"]),
        ],
    )


def _guarded(ingress: Ingress, routes: Sequence[BaseRoute]) -> Starlette:
    """Only requests to our own names: a page in somebody's browser must not talk to us under a name of its own."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    return Starlette(
        routes=routes,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=sorted(ingress.allowed_hosts))],
        exception_handlers={SQLAlchemyError: _store_unavailable},
    )


async def _store_unavailable(_request: Request, failure: Exception) -> Response:
    log.error("the store doesn't answer", exc_info=failure)
    return _answer(503, "refused", Reason.STORE_UNAVAILABLE)


async def health(_request: Request) -> Response:
    """The process answers; nothing else is claimed."""
    return _answer(200, "ok")


async def _webhook(ingress: Ingress, request: Request) -> Response:
    """The ladder of contract A4.1: secret, size, signature, JSON, headers, installation, shape, duplicate, stored."""

    def answer(status: int, outcome: str, reason: str | None = None, **more: Any) -> JSONResponse:
        metrics.deliveries.labels(reason or outcome).inc()
        return _answer(status, outcome, reason, **more)

    try:
        secrets = ingress.webhook_secrets.valid(ingress.clock.now())
    except CipherError as failure:
        log.error("webhooks are refused: %s", failure)
        return answer(503, "refused", Reason.SECRET_UNREADABLE)
    if not secrets:
        return answer(503, "refused", Reason.WEBHOOK_SECRET_MISSING)
    signatures = request.headers.getlist("x-hub-signature-256")
    body = await read_body(request, WEBHOOK_BYTES)
    values = [one.value for one in secrets]
    if len(signatures) != 1:
        return answer(401, "refused", Reason.SIGNATURE_INVALID)
    if len(body) <= INLINE_BYTES:
        which = signed_with(values, body, signatures[0])
    else:
        which = await anyio.to_thread.run_sync(signed_with, values, body, signatures[0])
    if which is None:
        return answer(401, "refused", Reason.SIGNATURE_INVALID)
    metrics.signatures.labels("previous" if which else "current").inc()
    if secrets[which].seen_at is None and secrets[which].until is None:
        await anyio.to_thread.run_sync(_note_seen, ingress, secrets[which])
    async with parsed(body) as payload:
        return await _signed(ingress, request, body, payload, answer)


def _note_seen(ingress: Ingress, secret: WebhookSecret) -> None:
    """The newest secret is in use at GitHub: the one before may go. Where that can't be noted, it goes by its own end."""
    try:
        ingress.webhook_secrets.seen(secret, ingress.clock.now())
    except (OSError, CipherError) as failure:
        log.warning("the use of webhook secret %s can't be noted: %s", secret.id, type(failure).__name__)


async def _signed(
    ingress: Ingress, request: Request, body: bytes, payload: dict[str, Any], answer: Callable[..., JSONResponse]
) -> Response:
    """The ladder from the headers on: everything here is of somebody who holds the secret."""
    event, delivery = (request.headers.get(name, "")[:HEADER_LIMIT] for name in ("x-github-event", "x-github-delivery"))
    if not event or not delivery:
        return answer(400, "refused", Reason.HEADER_MISSING)
    if event == "ping":
        return answer(200, "pong") if shape_matches(event, payload) else answer(400, "refused", Reason.PAYLOAD_SHAPE_MISMATCH)
    number = installation_id(payload)
    if number is None:
        return answer(400, "refused", Reason.INSTALLATION_ID_MISSING)
    try:
        integration = await ingress.integration_of(number)
    except AmbiguousInstallationError:
        return answer(404, "refused", Reason.INTEGRATION_AMBIGUOUS)
    if integration is None and event == "installation":
        # A new or long gone installation: connecting one is a person's act, and there is nothing to disconnect.
        return answer(200, "ignored", Reason.INTEGRATION_UNKNOWN)
    if integration is None:
        return answer(404, "refused", Reason.INTEGRATION_UNKNOWN)
    if integration.suspended and event not in _LIFECYCLE:
        return answer(200, "ignored", Reason.INTEGRATION_SUSPENDED)
    if not shape_matches(event, payload):
        return answer(400, "refused", Reason.PAYLOAD_SHAPE_MISMATCH)
    skip = None if event in _ADMITTED else Reason.LIFECYCLE_APPLIED if event in _LIFECYCLE else Reason.EVENT_UNKNOWN
    action = payload.get("action")
    new = NewDelivery(
        owner_id=integration.owner_id,
        integration_id=integration.id,
        provider_delivery_id=delivery,
        event=event,
        action=storable(action)[:HEADER_LIMIT] if isinstance(action, str) else None,
        body=body,
        headers={name: request.headers[name][:HEADER_LIMIT] for name in _KEPT_HEADERS if name in request.headers},
    )
    if event in _LIFECYCLE:
        # Applied before it is recorded, so that a crash between loses nothing; what is recorded was applied, and a replay of it
        # must not turn back what came later.
        known = await anyio.to_thread.run_sync(ingress.store.inbox.known, new)
        if known is None:
            await anyio.to_thread.run_sync(_apply_lifecycle, ingress.store, integration, event, payload)
    if len(body) <= INLINE_BYTES:
        receipt = await ingress.record((new, skip))
    else:  # by itself: its neighbours would wait for its bytes
        receipt = await anyio.to_thread.run_sync(lambda: ingress.store.inbox.record(new, skip=skip))
    if receipt.outcome == "id_reused":
        return answer(409, "refused", Reason.DELIVERY_ID_REUSED)
    if receipt.outcome == "duplicate":
        return answer(200, "duplicate", Reason.DUPLICATE_DELIVERY, delivery=str(receipt.delivery_id))
    if skip is not None:
        return answer(200, "ignored" if skip is Reason.EVENT_UNKNOWN else "applied", skip, delivery=str(receipt.delivery_id))
    return answer(202, receipt.outcome, delivery=str(receipt.delivery_id))


def _apply_lifecycle(store: Store, integration: Integration, event: str, payload: dict[str, Any]) -> None:
    """Keeps the integration in step with the installation; repeating it changes nothing. The shape was checked before."""
    if event == "installation":
        change = InstallationShape.model_validate(payload)
        if change.action == "deleted":
            store.owners.disconnect(integration)
        elif change.action in ("suspend", "unsuspend"):
            store.owners.set_suspended(integration, change.action == "suspend")
        return
    if event == "repository":
        about = RepositoryShape.model_validate(payload)
        if about.action in ("renamed", "transferred"):  # the receiver of a transfer is told of it; the giver's list changes
            store.owners.rename(integration.owner_id, about.repository.id, about.repository.full_name)
        elif about.action == "deleted":
            store.owners.change_repositories(integration, added=[], removed=[about.repository.id])
        return
    lists = InstallationRepositoriesShape.model_validate(payload)
    store.owners.change_repositories(
        integration,
        added=[_labelled(store, integration, one) for one in lists.repositories_added],
        removed=[one.id for one in lists.repositories_removed],
    )


def _labelled(store: Store, integration: Integration, one: RepositoryLabel) -> Repository:
    """The event doesn't tell the default branch: a known one stays, else git's own word for it stands until it is read."""
    known = store.owners.repository(integration.owner_id, one.id)
    return Repository(one.id, one.full_name, known.default_branch if known else "HEAD", one.private)


async def _callback(ingress: Ingress, request: Request) -> Response:
    """Stores a session's callback under its own token (contract A10, threats rule 24)."""

    def answer(status: int, outcome: str, reason: str | None = None) -> JSONResponse:
        metrics.callbacks.labels(reason or outcome).inc()
        return _answer(status, outcome, reason)

    try:
        session = UUID(request.path_params["session"])
    except ValueError:
        return answer(401, "refused", Reason.CALLBACK_REFUSED)
    token = request.headers.get("x-callback-token", "")
    if not token:
        return answer(401, "refused", Reason.CALLBACK_REFUSED)
    body = await read_body(request, CALLBACK_BYTES)
    await anyio.to_thread.run_sync(parse_object, body)
    outcome = await anyio.to_thread.run_sync(ingress.store.sessions.record_callback, session, token, body)
    if outcome == "refused":
        return answer(401, "refused", Reason.CALLBACK_REFUSED)
    if outcome == "expired":
        return answer(410, "refused", Reason.CALLBACK_EXPIRED)
    if outcome == "conflict":
        return answer(409, "refused", Reason.CALLBACK_CONFLICT)
    return answer(202 if outcome == "accepted" else 200, outcome)


def admin_application(ingress: Ingress, door: Sequence[BaseRoute] = ()) -> Starlette:
    """Control API and metrics, where every route but health asks for an API key; and the `door` for people."""

    async def principal(request: Request) -> tuple[UUID | None, str] | None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            return None
        return await anyio.to_thread.run_sync(ingress.store.owners.principal, key)

    desk = Desk(ingress.store, principal)

    async def show_metrics(request: Request) -> Response:
        found = await principal(request)
        if found is None or found[1] != "operator":
            return _answer(401, "refused")
        await anyio.to_thread.run_sync(_refresh_gauges, ingress.store)
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    async def list_reviews(request: Request) -> Response:
        found = await principal(request)
        if found is None:
            return _answer(401, "refused")
        owners = [found[0]] if found[0] else [owner.id for owner in await anyio.to_thread.run_sync(ingress.store.owners.all)]
        reviews = [
            asdict(one) for owner in owners for one in await anyio.to_thread.run_sync(ingress.store.reviews.of_owner, owner)
        ]
        return JSONResponse({"reviews": _plain(reviews)})

    async def show_review(request: Request) -> Response:
        found = await principal(request)
        if found is None:
            return _answer(401, "refused")
        review = await _review_of(ingress, request, found[0])
        return JSONResponse(_plain(asdict(review))) if review else _answer(404, "not_found")

    async def cancel_review(request: Request) -> Response:
        found = await principal(request)
        if found is None or found[1] == "reader":
            return _answer(401, "refused")
        review = await _review_of(ingress, request, found[0])
        if review is None:
            return _answer(404, "not_found")
        actor = "operator" if found[0] is None else f"owner:{found[0]}"
        done = await anyio.to_thread.run_sync(
            lambda: ingress.store.queue.cancel(review.item_id, reason=Reason.USER_CANCELLED, actor=actor)
        )
        return _answer(200, "cancelled") if done else _answer(409, "refused", Reason.MOVED_ON)

    async def dispatch_review(request: Request) -> Response:
        found = await principal(request)
        if found is None or found[1] == "reader":
            return _answer(401, "refused")
        try:
            wanted = Dispatch.model_validate(parse_object(await read_body(request, CALLBACK_BYTES)))
        except ValidationError:
            return _answer(400, "refused", Reason.PAYLOAD_SHAPE_MISMATCH)
        except BodyError as failure:
            return _answer(failure.status, "refused", failure.reason)
        owners = [found[0]] if found[0] else [owner.id for owner in await anyio.to_thread.run_sync(ingress.store.owners.all)]
        newest_of = partial(ingress.store.reviews.of_owner, limit=DISPATCH_LOOK_BACK)
        reviews = [one for owner in owners for one in await anyio.to_thread.run_sync(newest_of, owner)]
        same = [one for one in reviews if (one.repository, one.pull_number) == (wanted.repository, wanted.pull_number)]
        if not same:
            return _answer(404, "not_found")
        if len({one.owner_id for one in same}) > 1:  # the operator's key: two owners hold a repository of this name
            return _answer(409, "refused", Reason.INTEGRATION_AMBIGUOUS)
        actor = "operator" if found[0] is None else f"owner:{found[0]}"
        newest = max(same, key=lambda one: one.created_at)
        done = await anyio.to_thread.run_sync(lambda: ingress.store.queue.reopen(newest.item_id, actor=actor, force=wanted.force))
        return _answer(202, "dispatched", review=str(newest.item_id)) if done else _answer(409, "refused", Reason.MOVED_ON)

    async def list_owners(request: Request) -> Response:
        found = await principal(request)
        if found is None:
            return _answer(401, "refused")
        owners = await anyio.to_thread.run_sync(ingress.store.owners.all)
        return JSONResponse({"owners": _plain([asdict(one) for one in owners if found[0] in (None, one.id)])})

    async def list_integrations(request: Request) -> Response:
        found = await principal(request)
        if found is None:
            return _answer(401, "refused")
        owners = [found[0]] if found[0] else [owner.id for owner in await anyio.to_thread.run_sync(ingress.store.owners.all)]
        lists = {str(owner): await anyio.to_thread.run_sync(ingress.store.owners.integrations, owner) for owner in owners}
        return JSONResponse(
            {"integrations": _plain([{"owner_id": owner} | one for owner, some in lists.items() for one in some])}
        )

    async def describe(request: Request) -> Response:
        if await principal(request) is None:
            return _answer(401, "refused")
        return JSONResponse(description(routes))

    routes = [
        Route("/health", health, methods=["GET"]),
        Route("/metrics", show_metrics, methods=["GET"]),
        Route("/api/v1/reviews", list_reviews, methods=["GET"]),
        Route("/api/v1/reviews/dispatch", dispatch_review, methods=["POST"]),
        Route("/api/v1/reviews/{item}", show_review, methods=["GET"]),
        Route("/api/v1/reviews/{item}/cancel", cancel_review, methods=["POST"]),
        Route("/api/v1/owners", list_owners, methods=["GET"]),
        Route("/api/v1/integrations", list_integrations, methods=["GET"]),
        *security_routes(desk, ingress.clock),
        *security_work_routes(desk),
        Route("/api/v1/openapi.json", describe, methods=["GET"]),
    ]
    return _guarded(ingress, [*routes, *door])


async def _review_of(ingress: Ingress, request: Request, owner: UUID | None) -> Any:
    """The review that the path names, when the principal may see it; an owner's key never sees another owner's."""
    try:
        item = UUID(request.path_params["item"])
    except ValueError:
        return None
    review = await anyio.to_thread.run_sync(ingress.store.reviews.get, item)
    return review if review is not None and owner in (None, review.owner_id) else None


def _refresh_gauges(store: Store) -> None:
    metrics.live.clear()
    for (what, state), count in store.queue.gauges().items():
        metrics.live.labels(what, state).set(count)
    for name, value in store.queue.counters().items():
        metrics.counted.labels(name).set(value)


def _plain(value: Any) -> Any:
    """Rows as JSON: ids and times as text."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
