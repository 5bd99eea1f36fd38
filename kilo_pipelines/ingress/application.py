"""The two applications. Every answer is JSON with an `outcome` and, when something was refused or skipped, a reason code."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, partial
from typing import Any, Protocol
from uuid import UUID

import anyio
from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kilo_pipelines import __version__
from kilo_pipelines.core.clock import Clock, SystemClock
from kilo_pipelines.core.events import ADMITTED, LIFECYCLE
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
from kilo_pipelines.ingress.control import HANDLERS, ControlRoute, Gate
from kilo_pipelines.ingress.deliveries import delivery_routes
from kilo_pipelines.ingress.limits import limit_routes
from kilo_pipelines.ingress.owners import owner_routes
from kilo_pipelines.ingress.page import page_routes
from kilo_pipelines.ingress.security import security_routes
from kilo_pipelines.ingress.security_work import security_work_routes
from kilo_pipelines.ingress.together import Together
from kilo_pipelines.ingress.work import work_routes
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
from kilo_pipelines.telemetry import traces

log = logging.getLogger(__name__)

HEADER_LIMIT = 200
_KEPT_HEADERS = ("x-github-hook-id", "x-github-hook-installation-target-id", "user-agent", "content-type")


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
        begun_ns = time.time_ns()
        try:
            answer = await _webhook(ingress, request, begun_ns)
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

    return Starlette(
        routes=[
            Route("/webhooks/github", webhook, methods=["POST"]),
            Route("/callbacks/sessions/{session}", callback, methods=["POST"]),
            Route("/health", health, methods=["GET"]),
        ],
        # Only requests to our own names, here and at the admin listener: a page in somebody's browser must not talk to us under a name
        # of its own.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=sorted(ingress.allowed_hosts))],
        exception_handlers={SQLAlchemyError: _store_unavailable},
    )


async def _store_unavailable(_request: Request, failure: Exception) -> Response:
    log.error("the store doesn't answer", exc_info=failure)
    return _answer(503, "refused", Reason.STORE_UNAVAILABLE)


async def health(_request: Request) -> Response:
    """The process answers; nothing else is claimed."""
    return _answer(200, "ok")


async def _webhook(ingress: Ingress, request: Request, begun_ns: int) -> Response:
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
    # Whoever holds the secret is traced, nobody else: a flood of forged webhooks leaves no spans.
    with traces.span("delivery", since_ns=begun_ns, bytes=len(body)) as span:
        traces.past("verify", begun_ns, time.time_ns())
        async with parsed(body) as payload:
            return await _signed(ingress, request, body, payload, answer, span)


def _note_seen(ingress: Ingress, secret: WebhookSecret) -> None:
    """The newest secret is in use at GitHub: the one before may go. Where that can't be noted, it goes by its own end."""
    try:
        ingress.webhook_secrets.seen(secret, ingress.clock.now())
    except (OSError, CipherError) as failure:
        log.warning("the use of webhook secret %s can't be noted: %s", secret.id, type(failure).__name__)


async def _signed(
    ingress: Ingress,
    request: Request,
    body: bytes,
    payload: dict[str, Any],
    answer: Callable[..., JSONResponse],
    span: traces.Span,
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
    if integration.suspended and event not in LIFECYCLE:
        return answer(200, "ignored", Reason.INTEGRATION_SUSPENDED)
    if not shape_matches(event, payload):
        return answer(400, "refused", Reason.PAYLOAD_SHAPE_MISMATCH)
    skip = None if event in ADMITTED else Reason.LIFECYCLE_APPLIED if event in LIFECYCLE else Reason.EVENT_UNKNOWN
    action = payload.get("action")
    new = NewDelivery(
        owner_id=integration.owner_id,
        integration_id=integration.id,
        provider_delivery_id=delivery,
        event=event,
        action=storable(action)[:HEADER_LIMIT] if isinstance(action, str) else None,
        body=body,
        headers={name: request.headers[name][:HEADER_LIMIT] for name in _KEPT_HEADERS if name in request.headers},
        trace=traces.here(),
    )
    span.set(owner=new.owner_id, integration=new.integration_id, event=event)
    if event in LIFECYCLE:
        # Applied before it is recorded, so that a crash between loses nothing; what is recorded was applied, and a replay of it
        # must not turn back what came later.
        known = await anyio.to_thread.run_sync(ingress.store.inbox.known, new)
        if known is None:
            await anyio.to_thread.run_sync(_apply_lifecycle, ingress.store, integration, event, payload)
    with traces.span("store"):
        if len(body) <= INLINE_BYTES:
            receipt = await ingress.record((new, skip))
        else:  # by itself: its neighbours would wait for its bytes
            receipt = await anyio.to_thread.run_sync(lambda: ingress.store.inbox.record(new, skip=skip))
    span.set(delivery=receipt.delivery_id, outcome=receipt.outcome, reason=skip)
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
            store.owners.disconnect(integration.owner_id, integration.id)
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


def admin_application(ingress: Ingress, door: Sequence[BaseRoute] = ()) -> FastAPI:
    """Control API and metrics, where every route but health and the API's page asks for an API key; and the `door` for people."""
    application = FastAPI(
        title="kilo-pipelines control API",
        version=__version__,
        # Both would be open to anybody: the description and its page are routes of ours (ingress/page.py).
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={**HANDLERS, SQLAlchemyError: _store_unavailable},
        generate_unique_id_function=lambda route: route.name,
    )
    application.add_middleware(Unkept)
    application.add_middleware(TrustedHostMiddleware, allowed_hosts=sorted(ingress.allowed_hosts))
    application.state.admit = Gate(ingress.store).admit
    router = application.router
    router.route_class = ControlRoute
    # For the description alone: who asks is looked up before (control.ControlRoute).
    router.dependencies.append(Security(HTTPBearer(scheme_name="apiKey", auto_error=False)))
    owner_routes(router, ingress.store, ingress.clock)
    work_routes(router, ingress.store, ingress.clock)
    limit_routes(router, ingress.store)
    delivery_routes(router, ingress.store)
    security_routes(router, ingress.store, ingress.clock)
    security_work_routes(router, ingress.store)
    page_routes(application)
    router.routes += [Route("/health", health, methods=["GET"]), *door]
    return application


class Unkept:
    """Answers of the control API hold keys and findings: no browser or proxy keeps them, or takes them for something else."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Adds two headers where the path is the API's."""
        if scope["type"] != "http" or not scope["path"].startswith("/api/"):
            await self._app(scope, receive, send)
            return

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("cache-control", "no-store")
                headers.setdefault("x-content-type-options", "nosniff")
            await send(message)

        await self._app(scope, receive, told)
