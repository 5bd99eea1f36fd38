"""The operators' door: a login, and Dagster's UI behind it, for operators only (threats, rules 18 and 19).

Holds: the routes of the login, and a proxy that passes on what the UI needs and nothing else: pages and files by GET,
GraphQL by POST with JSON or by a websocket, both from our own origin. Does not belong here: anything of Dagster.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode

import anyio
import httpx
import websockets
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.asyncio.client import ClientConnection, unix_connect

from kilo_pipelines.core.operators import landing
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.text import plain_line
from kilo_pipelines.ingress import metrics
from kilo_pipelines.ingress.bodies import BodyError, read_body
from kilo_pipelines.ingress.login_pages import HEADERS, login_page, session_page
from kilo_pipelines.ingress.oidc import CALLBACK, OidcLogin
from kilo_pipelines.ingress.oidc import refused as oidc_refused
from kilo_pipelines.ingress.operators import (
    COOKIE,
    PASSWORD,
    PASSWORD_SESSION,
    Operators,
    Session,
    TooManyGuessesError,
    set_session,
)

log = logging.getLogger(__name__)

# Queries of the UI have a few KB; a launch with configuration some more.
GRAPHQL_BYTES = 2**20
# How long an open connection of the UI may outlive its session.
SESSION_LOOK_SECONDS = 5.0
LOGIN_BYTES = 4_096
_PASSED_ON = frozenset(
    {"accept", "accept-encoding", "accept-language", "content-type", "if-none-match", "if-modified-since", "range"}
)
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "transfer-encoding", "upgrade", "set-cookie", "server", "date", "content-length"}
)
# The keyword without which GraphQL changes nothing.
_MUTATION = re.compile(r"\bmutation\b")


class Door:
    """Routes of the login and the proxy. `origins` are the addresses under which a browser may talk to us."""

    def __init__(
        self, operators: Operators, socket: Path, prefix: str, origins: frozenset[str], oidc: OidcLogin | None = None
    ) -> None:
        self._operators = operators
        self._oidc = oidc
        self._socket = socket
        self._prefix = prefix
        self._origins = origins
        # One client a process, made at the first request, in the loop that will use it.
        self._client: httpx.AsyncClient | None = None

    def routes(self) -> list[BaseRoute]:
        """What the admin listener serves for people."""
        return [
            Route("/", self._home, methods=["GET"]),
            Route("/login", self._form, methods=["GET"]),
            Route("/login", self._log_in, methods=["POST"]),
            Route("/login/oidc", self._begin_oidc, methods=["POST"]),
            Route(CALLBACK, self._finish_oidc, methods=["GET"]),
            Route("/session", self._session_page, methods=["GET"]),
            Route("/logout", self._log_out, methods=["POST"]),
            WebSocketRoute(f"{self._prefix}/graphql", self._live_queries),
            Route(f"{self._prefix}/graphql", self._graphql, methods=["GET", "POST"]),
            Route(self._prefix, self._page, methods=["GET"]),
            Route(f"{self._prefix}/{{path:path}}", self._page, methods=["GET"]),
        ]

    # -- who comes in ----------------------------------------------------------------------------------------------------

    def _foreign(self, connection: HTTPConnection) -> bool:
        """Whether a request that changes something doesn't come from a page of ours; one that says nothing is foreign too."""
        origin = connection.headers.get("origin")
        if origin is not None:
            return origin not in self._origins
        return connection.headers.get("sec-fetch-site") != "same-origin"

    async def _session(self, connection: HTTPConnection) -> Session | None:
        return await anyio.to_thread.run_sync(self._operators.session, connection.cookies.get(COOKIE, ""))

    async def _home(self, _request: Request) -> Response:
        return RedirectResponse(f"{self._prefix}/", 307)

    def _login_page(self, landing_: str, status: int = 200, reason: Reason | None = None) -> Response:
        return login_page(
            issuer=self._oidc.host if self._oidc else None,
            password=self._operators.ways.password,
            landing=landing_,
            reason=reason,
            status=status,
        )

    async def _form(self, request: Request) -> Response:
        onward = landing(request.query_params.get("next", ""), self._prefix)
        if await self._session(request) is not None:
            return RedirectResponse(onward, 303, headers=HEADERS)
        return self._login_page(onward)

    async def _log_in(self, request: Request) -> Response:
        if self._foreign(request):
            return _refused(403, Reason.ORIGIN_REFUSED)
        try:
            body = await read_body(request, LOGIN_BYTES)
        except BodyError as failure:
            return _refused(failure.status, failure.reason)
        onward = landing(_form_field(body, "next"), self._prefix)
        if not self._operators.ways.password:
            return self._password_refused(onward, 403, Reason.PASSWORD_LOGIN_OFF)
        try:
            token = await anyio.to_thread.run_sync(self._operators.log_in, _form_field(body, "password"))
        except TooManyGuessesError:
            return self._password_refused(onward, 429, Reason.LOGIN_TOO_OFTEN)
        if token is None:
            return self._password_refused(onward, 401, Reason.PASSWORD_WRONG)
        metrics.logins.labels(PASSWORD, "logged_in").inc()
        log.info("an operator logged in with the password")
        answer = RedirectResponse(onward, 303, headers=HEADERS)
        set_session(answer, token, PASSWORD_SESSION, secure=request.headers.get("origin", "").startswith("https://"))
        return answer

    def _password_refused(self, onward: str, status: int, reason: Reason) -> Response:
        metrics.logins.labels(PASSWORD, str(reason)).inc()
        return self._login_page(onward, status, reason)

    async def _begin_oidc(self, request: Request) -> Response:
        origin = request.headers.get("origin")
        if origin is None or origin not in self._origins:  # it becomes our redirect address
            return _refused(403, Reason.ORIGIN_REFUSED)
        if self._oidc is None:
            return oidc_refused(Reason.OIDC_NOT_CONFIGURED)
        try:
            body = await read_body(request, LOGIN_BYTES)
        except BodyError as failure:
            return _refused(failure.status, failure.reason)
        return await self._oidc.begin(origin, landing(_form_field(body, "next"), self._prefix))

    async def _finish_oidc(self, request: Request) -> Response:
        return oidc_refused(Reason.OIDC_NOT_CONFIGURED) if self._oidc is None else await self._oidc.finish(request)

    async def _session_page(self, request: Request) -> Response:
        held = await self._session(request)
        if held is None:
            return RedirectResponse("/login", 303, headers=HEADERS)
        return session_page(held.who, f"{held.until:%Y-%m-%d %H:%M} UTC", f"{self._prefix}/")

    async def _log_out(self, request: Request) -> Response:
        if self._foreign(request):
            return _refused(403, Reason.ORIGIN_REFUSED)
        held = await self._session(request)
        if held is not None:
            await anyio.to_thread.run_sync(self._operators.log_out, request.cookies.get(COOKIE, ""))
            log.info("operator %s logged out", held.who)
        answer = RedirectResponse("/login", 303, headers=HEADERS)
        answer.delete_cookie(COOKIE)
        return answer

    # -- what goes through -----------------------------------------------------------------------------------------------

    async def _page(self, request: Request) -> Response:
        if await self._session(request) is None:
            if "text/html" not in request.headers.get("accept", ""):
                return _refused(401, Reason.LOGIN_REQUIRED)
            return RedirectResponse(f"/login?{urlencode({'next': _raw_path(request).decode('latin-1')})}", 303, headers=HEADERS)
        return await self._pass_on(request, b"")

    async def _graphql(self, request: Request) -> Response:
        """Dagster carries out mutations by GET, too: only JSON by POST from a page of ours goes through."""
        held = await self._session(request)
        if held is None:
            return _refused(401, Reason.LOGIN_REQUIRED)
        if request.method != "POST":
            return _refused(405, Reason.METHOD_REFUSED)
        if self._foreign(request):
            return _refused(403, Reason.ORIGIN_REFUSED)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return _refused(415, Reason.METHOD_REFUSED)
        try:
            body = await read_body(request, GRAPHQL_BYTES)
        except BodyError as failure:
            return _refused(failure.status, failure.reason)
        _tell_changes(held, body)
        return await self._pass_on(request, body)

    async def _pass_on(self, request: Request, body: bytes) -> Response:
        if self._client is None:
            transport = httpx.AsyncHTTPTransport(uds=str(self._socket))
            self._client = httpx.AsyncClient(transport=transport, timeout=60, trust_env=False, follow_redirects=False)
        headers = {name: value for name, value in request.headers.items() if name in _PASSED_ON}
        url = httpx.URL("http://dagster", raw_path=_raw_path(request))
        if url.raw_path != _raw_path(request):
            # Dot segments are resolved there: what is asked for would be another route than the one that was checked.
            return _refused(404, Reason.UI_UNAVAILABLE)
        try:
            asked = self._client.build_request(request.method, url, headers=headers, content=body)
            answer = await self._client.send(asked, stream=True)
        except httpx.HTTPError:
            return _refused(502, Reason.UI_UNAVAILABLE)
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP}
        cacheable = {} if request.method == "POST" else {name: value for name, value in kept.items() if name == "cache-control"}
        return StreamingResponse(_body_of(answer), answer.status_code, headers={**kept, **HEADERS, **cacheable})

    async def _live_queries(self, socket: WebSocket) -> None:
        """The UI's subscriptions; Dagster carries out mutations there, too, so the origin must be ours."""
        held = await self._session(socket)
        if held is None or socket.headers.get("origin") not in self._origins:
            await socket.close(4403)
            return
        wanted = [one.strip() for one in socket.headers.get("sec-websocket-protocol", "").split(",") if one.strip()]
        try:
            async with unix_connect(
                str(self._socket),
                f"ws://dagster{self._prefix}/graphql",
                subprotocols=[websockets.Subprotocol(one) for one in wanted],
            ) as upstream:
                await socket.accept(subprotocol=upstream.subprotocol)
                async with anyio.create_task_group() as group:

                    async def ended(way: Any) -> None:
                        with suppress(WebSocketDisconnect, websockets.ConnectionClosed):
                            await way(socket, upstream)
                        group.cancel_scope.cancel()

                    group.start_soon(ended, partial(_to_dagster, held))
                    group.start_soon(ended, _to_browser)
                    group.start_soon(ended, self._while_logged_in)
        except (OSError, websockets.WebSocketException):
            await socket.close(1013)

    async def _while_logged_in(self, socket: WebSocket, _upstream: ClientConnection) -> None:
        """Ends the connection soon after its session ended, by logout, reset or time: it was asked for at the start only."""
        while await self._session(socket) is not None:
            await anyio.sleep(SESSION_LOOK_SECONDS)


def _tell_changes(held: Session, body: bytes | str) -> None:
    """A line of the log for what an operator changes in the UI: who, and the operation's name."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        return  # Dagster refuses it
    for one in told if isinstance(told, list) else [told]:
        asked = one.get("payload", one) if isinstance(one, dict) else None
        if isinstance(asked, dict) and _MUTATION.search(str(asked.get("query"))):
            log.info("operator %s changes in the UI: %s", held.who, plain_line(str(asked.get("operationName"))))


async def _to_dagster(held: Session, socket: WebSocket, upstream: ClientConnection) -> None:
    while True:
        message = await socket.receive_text()
        _tell_changes(held, message)
        await upstream.send(message)


async def _to_browser(socket: WebSocket, upstream: ClientConnection) -> None:
    async for message in upstream:
        await socket.send_text(message if isinstance(message, str) else message.decode())


async def _body_of(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    finally:
        await answer.aclose()


def _raw_path(request: Request) -> bytes:
    query: bytes = request.scope.get("query_string", b"")
    path: bytes = request.scope.get("raw_path") or request.url.path.encode()
    return path.partition(b"?")[0] + (b"?" + query if query else b"")


def _form_field(body: bytes, name: str) -> str:
    """One field of an urlencoded form; "" when it isn't there."""
    try:
        return parse_qs(body.decode("ascii"), max_num_fields=5).get(name, [""])[0]
    except ValueError:
        return ""


def _refused(status: int, reason: Reason) -> Response:
    return JSONResponse({"outcome": "refused", "reason": reason}, status, headers=HEADERS)
