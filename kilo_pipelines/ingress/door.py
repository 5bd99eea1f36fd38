"""The login before Dagster's UI, on the admin listener: operators only (threats, rules 18 and 19).

Holds: the operator's password and sessions, and a proxy that passes on what the UI needs and nothing else: pages and files by GET,
GraphQL by POST with JSON or by a websocket, both from our own origin. Does not belong here: anything of Dagster.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import anyio
import httpx
import websockets
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.asyncio.client import ClientConnection, unix_connect

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.rates import Rate, full, take
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.ingress.bodies import BodyError, read_body
from kilo_pipelines.settings import write_secret

COOKIE = "kilo_operator"
# A working day: who comes back tomorrow logs in again.
SESSION_LIFE = timedelta(hours=12)
# RFC 7914's interactive parameters, 32 MB and about 80 ms: a login is seldom, a guess is slow.
SCRYPT = {"n": 2**15, "r": 8, "p": 1, "maxmem": 64 * 2**20}
# Guesses over everybody: five at once, then one every ten seconds; a person who mistypes isn't locked out for long.
GUESSES = Rate(per_hour=360, burst=5)
# Queries of the UI have a few KB; a launch with configuration some more.
GRAPHQL_BYTES = 2**20
LOGIN_BYTES = 4_096
_PASSED_ON = frozenset(
    {"accept", "accept-encoding", "accept-language", "content-type", "if-none-match", "if-modified-since", "range"}
)
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "transfer-encoding", "upgrade", "set-cookie", "server", "date", "content-length"}
)
_HEADERS = {
    "x-frame-options": "DENY",
    "content-security-policy": "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    # Not `no-referrer`: browsers then send `Origin: null` with the login form, which no page of ours is.
    "referrer-policy": "same-origin",
    "cache-control": "no-store",
}


def new_password(file: Path, sessions: Path) -> str:
    """Makes the operator's password, keeps its hash, ends every session; the password itself is shown once and kept nowhere."""
    password = secrets.token_urlsafe(18)
    salt = os.urandom(16)
    digest = hashlib.scrypt(password.encode(), salt=salt, **SCRYPT)
    write_secret(file, json.dumps({"salt": salt.hex(), "scrypt": digest.hex()}))
    sessions.unlink(missing_ok=True)
    return password


class TooManyGuessesError(Exception):
    """Passwords were tried faster than a person does."""


class Operators:
    """The password and the sessions of who knows it, both in files of the home, so that a restart logs nobody out."""

    def __init__(self, password: Path, sessions: Path, clock: Clock) -> None:
        self._password = password
        self._sessions = sessions
        self._clock = clock
        self._lock = threading.Lock()
        self._guesses = full(GUESSES, clock.now())

    def log_in(self, password: str) -> str | None:
        """A new session's token for the right password; None for a wrong one. Raises TooManyGuessesError."""
        with self._lock:
            taken = take(self._guesses, GUESSES, 1, self._clock.now())
            self._guesses = taken.bucket
            if taken.wait_until is not None:
                raise TooManyGuessesError
            if not self._password.exists():
                return None
            held = json.loads(self._password.read_text())
            given = hashlib.scrypt(password.encode(), salt=bytes.fromhex(held["salt"]), **SCRYPT)
            if not hmac.compare_digest(given, bytes.fromhex(held["scrypt"])):
                return None
            token = secrets.token_urlsafe(32)
            self._keep({**self._live(), self._hash(token): (self._clock.now() + SESSION_LIFE).isoformat()})
            return token

    def knows(self, token: str) -> bool:
        """Whether this is the token of a session that lives."""
        return bool(token) and self._hash(token) in self._live()

    def log_out(self, token: str) -> None:
        """Ends a session."""
        with self._lock:
            self._keep({name: until for name, until in self._live().items() if name != self._hash(token)})

    @staticmethod
    def _hash(token: str) -> str:
        return hashlib.sha256(token.encode()).hexdigest()

    def _live(self) -> dict[str, str]:
        try:
            held: dict[str, str] = json.loads(self._sessions.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        now = self._clock.now()
        return {name: until for name, until in held.items() if datetime.fromisoformat(until) > now}

    def _keep(self, sessions: dict[str, str]) -> None:
        write_secret(self._sessions, json.dumps(sessions))


class Door:
    """Routes of the login and the proxy. `origins` are the addresses under which a browser may talk to us."""

    def __init__(self, operators: Operators, socket: Path, prefix: str, origins: frozenset[str]) -> None:
        self._operators = operators
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

    async def _known(self, connection: HTTPConnection) -> bool:
        return await anyio.to_thread.run_sync(self._operators.knows, connection.cookies.get(COOKIE, ""))

    async def _home(self, _request: Request) -> Response:
        return RedirectResponse(f"{self._prefix}/", 307)

    async def _form(self, request: Request) -> Response:
        if await self._known(request):
            return RedirectResponse(f"{self._prefix}/", 303, headers=_HEADERS)
        return _login_page("")

    async def _log_in(self, request: Request) -> Response:
        if self._foreign(request):
            return _refused(403, Reason.ORIGIN_REFUSED)
        try:
            body = await read_body(request, LOGIN_BYTES)
            password = _form_field(body, "password")
            token = await anyio.to_thread.run_sync(self._operators.log_in, password)
        except TooManyGuessesError:
            return _login_page("Too many tries. Wait half a minute.", 429)
        except BodyError as failure:
            return _refused(failure.status, failure.reason)
        if token is None:
            return _login_page("That is not the password. `kilo-pipelines password reset` makes a new one.", 401)
        answer = RedirectResponse(f"{self._prefix}/", 303, headers=_HEADERS)
        answer.set_cookie(
            COOKIE,
            token,
            max_age=int(SESSION_LIFE.total_seconds()),
            httponly=True,
            samesite="strict",
            secure=request.headers.get("origin", "").startswith("https://"),
        )
        return answer

    async def _log_out(self, request: Request) -> Response:
        if self._foreign(request):
            return _refused(403, Reason.ORIGIN_REFUSED)
        await anyio.to_thread.run_sync(self._operators.log_out, request.cookies.get(COOKIE, ""))
        answer = RedirectResponse("/login", 303, headers=_HEADERS)
        answer.delete_cookie(COOKIE)
        return answer

    # -- what goes through -----------------------------------------------------------------------------------------------

    async def _page(self, request: Request) -> Response:
        if not await self._known(request):
            wants_page = "text/html" in request.headers.get("accept", "")
            return RedirectResponse("/login", 303, headers=_HEADERS) if wants_page else _refused(401, Reason.LOGIN_REQUIRED)
        return await self._pass_on(request, b"")

    async def _graphql(self, request: Request) -> Response:
        """Dagster carries out mutations by GET, too: only JSON by POST from a page of ours goes through."""
        if not await self._known(request):
            return _refused(401, Reason.LOGIN_REQUIRED)
        if request.method != "POST":
            return _refused(405, Reason.METHOD_REFUSED)
        if self._foreign(request):
            return _refused(403, Reason.ORIGIN_REFUSED)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return _refused(415, Reason.METHOD_REFUSED)
        try:
            return await self._pass_on(request, await read_body(request, GRAPHQL_BYTES))
        except BodyError as failure:
            return _refused(failure.status, failure.reason)

    async def _pass_on(self, request: Request, body: bytes) -> Response:
        if self._client is None:
            transport = httpx.AsyncHTTPTransport(uds=str(self._socket))
            self._client = httpx.AsyncClient(transport=transport, timeout=60, trust_env=False, follow_redirects=False)
        headers = {name: value for name, value in request.headers.items() if name in _PASSED_ON}
        url = httpx.URL("http://dagster", raw_path=_raw_path(request))
        try:
            asked = self._client.build_request(request.method, url, headers=headers, content=body)
            answer = await self._client.send(asked, stream=True)
        except httpx.HTTPError:
            return _refused(502, Reason.UI_UNAVAILABLE)
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP}
        cacheable = {} if request.method == "POST" else {name: value for name, value in kept.items() if name == "cache-control"}
        return StreamingResponse(_body_of(answer), answer.status_code, headers={**kept, **_HEADERS, **cacheable})

    async def _live_queries(self, socket: WebSocket) -> None:
        """The UI's subscriptions; Dagster carries out mutations there, too, so the origin must be ours."""
        if not await self._known(socket) or socket.headers.get("origin") not in self._origins:
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

                    group.start_soon(ended, _to_dagster)
                    group.start_soon(ended, _to_browser)
        except (OSError, websockets.WebSocketException):
            await socket.close(1013)


async def _to_dagster(socket: WebSocket, upstream: ClientConnection) -> None:
    while True:
        await upstream.send(await socket.receive_text())


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
    return JSONResponse({"outcome": "refused", "reason": reason}, status, headers=_HEADERS)


def _login_page(message: str, status: int = 200) -> Response:
    note = f'<p class="note" role="alert">{message}</p>' if message else ""
    return HTMLResponse(_PAGE.replace("{note}", note), status, headers=_HEADERS)


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>kilo-pipelines: log in</title>
<style>body{font:16px/1.5 system-ui;display:grid;place-items:center;min-height:100vh;margin:0;background:#f4f4f2;color:#222}
form{background:#fff;border:1px solid #ddd;border-radius:8px;padding:2rem;width:20rem}h1{font-size:1.2rem;margin:0 0 1rem}
label{display:block;margin-bottom:.3rem}input{font:inherit;width:100%;box-sizing:border-box;padding:.5rem;border:1px solid #999;border-radius:4px}
button{font:inherit;margin-top:1rem;padding:.5rem 1rem;border:0;border-radius:4px;background:#1a56c4;color:#fff}
.note{color:#b00020}small{color:#666}</style>
<form method="post" action="/login"><h1>kilo-pipelines</h1>{note}
<label for="password">Operator password</label><input id="password" name="password" type="password" autocomplete="current-password" autofocus required>
<button>Log in</button><p><small>Printed once at the first start. <code>kilo-pipelines password reset</code> makes a new one.</small></p>
</form></html>"""
