"""The two applications. Every answer is JSON with an `outcome` and, when something was refused or skipped, a reason code."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID

import anyio
from prometheus_client import generate_latest
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.ingress import metrics
from kilo_pipelines.ingress.bodies import CALLBACK_BYTES, WEBHOOK_BYTES, BodyError, parse_object, read_body
from kilo_pipelines.providers.github_webhooks import verify_signature
from kilo_pipelines.services.code_review.events import PullRequestEvent
from kilo_pipelines.store import AmbiguousInstallationError, Integration, NewDelivery, Repository, Store

log = logging.getLogger(__name__)

HEADER_LIMIT = 200
_KEPT_HEADERS = ("x-github-hook-id", "x-github-hook-installation-target-id", "user-agent", "content-type")
_LIFECYCLE = frozenset({"installation", "installation_repositories"})


@dataclass(frozen=True)
class Ingress:
    """What the applications need: the store and the webhook secret (None: not configured)."""

    store: Store
    webhook_secret: str | None
    allowed_hosts: frozenset[str]


def _answer(status: int, outcome: str, reason: str | None = None, **more: Any) -> JSONResponse:
    return JSONResponse({"outcome": outcome, **({"reason": reason} if reason else {}), **more}, status_code=status)


def public_application(ingress: Ingress) -> Starlette:
    """Webhooks, callbacks, health."""

    async def webhook(request: Request) -> Response:
        started = time.perf_counter()
        try:
            answer = await _webhook(ingress, request)
        except BodyError as failure:
            answer = _answer(failure.status, "refused", failure.reason)
        except SQLAlchemyError:
            log.exception("a delivery could not be stored")
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
            return _answer(503, "refused", Reason.STORE_UNAVAILABLE)

    return _guarded(
        ingress,
        [
            Route("/webhooks/github", webhook, methods=["POST"]),
            Route("/callbacks/sessions/{session}", callback, methods=["POST"]),
            Route("/health", health, methods=["GET"]),
        ],
    )


def _guarded(ingress: Ingress, routes: list[Route]) -> Starlette:
    """Only requests to our own names: a page in somebody's browser must not talk to us under a name of its own."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=sorted(ingress.allowed_hosts))])


async def health(_request: Request) -> Response:
    """The process answers; nothing else is claimed."""
    return _answer(200, "ok")


async def _webhook(ingress: Ingress, request: Request) -> Response:
    """The ladder of contract A4.1: secret, size, signature, JSON, headers, installation, shape, duplicate, stored."""

    def answer(status: int, outcome: str, reason: str | None = None, **more: Any) -> JSONResponse:
        metrics.deliveries.labels(reason or outcome).inc()
        return _answer(status, outcome, reason, **more)

    if not ingress.webhook_secret:
        return answer(503, "refused", Reason.WEBHOOK_SECRET_MISSING)
    body = await read_body(request, WEBHOOK_BYTES)
    if not verify_signature(ingress.webhook_secret, body, request.headers.get("x-hub-signature-256")):
        return answer(401, "refused", Reason.SIGNATURE_INVALID)
    payload = await anyio.to_thread.run_sync(parse_object, body)
    event, delivery = (request.headers.get(name, "")[:HEADER_LIMIT] for name in ("x-github-event", "x-github-delivery"))
    if not event or not delivery:
        return answer(400, "refused", Reason.HEADER_MISSING)
    if event == "ping":
        return answer(200, "pong")
    installation = payload.get("installation")
    number = installation.get("id") if isinstance(installation, dict) else None
    if not isinstance(number, int) or isinstance(number, bool) or not 0 < number < 2**63:
        return answer(400, "refused", Reason.INSTALLATION_ID_MISSING)
    try:
        integration = await anyio.to_thread.run_sync(ingress.store.owners.by_installation, "github", number)
    except AmbiguousInstallationError:
        return answer(404, "refused", Reason.INTEGRATION_AMBIGUOUS)
    if integration is None:
        return answer(404, "refused", Reason.INTEGRATION_UNKNOWN)
    if integration.suspended and event not in _LIFECYCLE:
        return answer(200, "ignored", Reason.INTEGRATION_SUSPENDED)
    if not _shape_matches(event, payload):
        return answer(400, "refused", Reason.PAYLOAD_SHAPE_MISMATCH)
    skip = None if event == "pull_request" else Reason.LIFECYCLE_APPLIED if event in _LIFECYCLE else Reason.EVENT_UNKNOWN
    action = payload.get("action")
    new = NewDelivery(
        owner_id=integration.owner_id,
        integration_id=integration.id,
        provider_delivery_id=delivery,
        event=event,
        action=action[:HEADER_LIMIT] if isinstance(action, str) else None,
        body=body,
        headers={name: request.headers[name][:HEADER_LIMIT] for name in _KEPT_HEADERS if name in request.headers},
    )
    if event in _LIFECYCLE:
        await anyio.to_thread.run_sync(_apply_lifecycle, ingress.store, integration, event, payload)
    receipt = await anyio.to_thread.run_sync(lambda: ingress.store.inbox.record(new, skip=skip))
    if receipt.outcome == "id_reused":
        return answer(409, "refused", Reason.DELIVERY_ID_REUSED)
    if receipt.outcome == "duplicate":
        return answer(200, "duplicate", Reason.DUPLICATE_DELIVERY, delivery=str(receipt.delivery_id))
    if skip is not None:
        return answer(200, "ignored" if skip is Reason.EVENT_UNKNOWN else "applied", skip, delivery=str(receipt.delivery_id))
    return answer(202, receipt.outcome, delivery=str(receipt.delivery_id))


def _shape_matches(event: str, payload: dict[str, Any]) -> bool:
    """The event header isn't signed: the body must be what it says (threats, rule 15)."""
    if event == "pull_request":
        try:
            PullRequestEvent.model_validate(payload)
        except ValidationError:
            return False
        return True
    # An event that nothing handles must at least not be a pull request in disguise.
    return not ("pull_request" in payload and "number" in payload and event in _LIFECYCLE)


def _apply_lifecycle(store: Store, integration: Integration, event: str, payload: dict[str, Any]) -> None:
    """Keeps the integration in step with the installation; repeating it changes nothing."""
    action = payload.get("action")
    if event == "installation":
        if action == "deleted":
            store.owners.disconnect(integration)
        elif action in ("suspend", "unsuspend"):
            store.owners.set_suspended(integration, action == "suspend")
        return
    added = [one for one in payload.get("repositories_added") or [] if isinstance(one, dict)]
    removed = [one for one in payload.get("repositories_removed") or [] if isinstance(one, dict)]
    store.owners.change_repositories(
        integration,
        # The event doesn't tell the default branch; it is read again before anything is fetched.
        added=[
            Repository(one["id"], one["full_name"], "HEAD", bool(one.get("private", True)))
            for one in added
            if isinstance(one.get("id"), int) and isinstance(one.get("full_name"), str)
        ],
        removed=[one["id"] for one in removed if isinstance(one.get("id"), int)],
    )


async def _callback(ingress: Ingress, request: Request) -> Response:
    """Stores a session's callback under its own token (contract A10, threats rule 24)."""

    def answer(status: int, outcome: str, reason: str | None = None) -> JSONResponse:
        metrics.callbacks.labels(reason or outcome).inc()
        return _answer(status, outcome, reason)

    try:
        session = UUID(request.path_params["session"])
    except ValueError:
        return answer(401, "refused", Reason.CALLBACK_REFUSED)
    body = await read_body(request, CALLBACK_BYTES)
    token = request.headers.get("x-callback-token", "")
    parse_object(body)
    outcome = await anyio.to_thread.run_sync(ingress.store.sessions.record_callback, session, token, body)
    if outcome == "refused":
        return answer(401, "refused", Reason.CALLBACK_REFUSED)
    if outcome == "expired":
        return answer(410, "refused", Reason.CALLBACK_EXPIRED)
    if outcome == "conflict":
        return answer(409, "refused", Reason.CALLBACK_CONFLICT)
    return answer(200, outcome)


def admin_application(ingress: Ingress) -> Starlette:
    """Control API and metrics; every route but health asks for an API key."""

    async def principal(request: Request) -> tuple[UUID | None, str] | None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            return None
        return await anyio.to_thread.run_sync(ingress.store.owners.principal, key)

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
        owners = [found[0]] if found[0] else [owner.id for owner in await anyio.to_thread.run_sync(ingress.store.owners.list)]
        reviews = [asdict(one) for owner in owners for one in await anyio.to_thread.run_sync(ingress.store.reviews.list, owner)]
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

    return _guarded(
        ingress,
        [
            Route("/health", health, methods=["GET"]),
            Route("/metrics", show_metrics, methods=["GET"]),
            Route("/api/v1/reviews", list_reviews, methods=["GET"]),
            Route("/api/v1/reviews/{item}", show_review, methods=["GET"]),
            Route("/api/v1/reviews/{item}/cancel", cancel_review, methods=["POST"]),
        ],
    )


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
