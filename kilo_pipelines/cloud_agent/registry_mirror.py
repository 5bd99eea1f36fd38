"""The registry mirror: GET-only access of one write session to the package registries that its owner allows (design, section 7).

`python -m kilo_pipelines.cloud_agent.registry_mirror` reads one JSON line {socket, address, registries} on stdin, serves
`/registry/<name>/<path>` on that unix socket until stdin ends, and prints {requests, bytes, refused}. One process a session,
with an empty environment: it holds no key, no token and no secret that a confused request could carry away. The model proxy
passes requests on to it, so that the sandbox keeps its one way out; nothing of a request but method and path arrives here.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

CONNECT_SECONDS = 10
READ_SECONDS = 60  # a registry that is silent for a minute doesn't answer
START_SECONDS = 20
STOP_SECONDS = 3
# A lock file of a large application names about 1,500 packages, each asked for twice.
MAX_REQUESTS = 3_000
# PyPI takes no file above 100 MB without asking; what npm tells of its largest package has 40 MB.
MAX_RESPONSE_BYTES = 128 * 2**20
MAX_SESSION_BYTES = 2**30
CONNECTIONS = 16  # as many sockets as npm opens
# Ours alone, nothing of the agent's. The short form of npm's metadata is a tenth of the long one.
_HEADERS = {
    "accept": "application/vnd.npm.install-v1+json, */*;q=0.8",
    "accept-encoding": "identity",
    "user-agent": "kilo-pipelines",
}
_PATH = re.compile(r"[A-Za-z0-9@._~!$&'()*+,;=:%/-]*")
_REWRITTEN = re.compile(r"text/html|application/(?:[a-z0-9.+-]+\+)?json", re.IGNORECASE)


class MirrorError(Exception):
    """The mirror doesn't start."""


class RefusedError(Exception):
    """A request that isn't passed on."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


@dataclass
class Counts:
    """What a session asked for."""

    requests: int = 0
    bytes: int = 0
    refused: int = 0


def target(base: str, path: str) -> str:
    """The address of a raw (percent-encoded) path below a base; RefusedError for any path that could leave it."""
    decoded = path
    while (further := unquote(decoded)) != decoded:
        decoded = further
    parts = re.split(r"[/\\]", decoded)
    if not _PATH.fullmatch(path) or ".." in parts or "." in parts or "" in parts[:-1] or not decoded.isprintable():
        raise RefusedError(400, "path_refused")
    return base + path


class Rewriter:
    """Replaces addresses in a body that comes in pieces; holds back no more than the longest address."""

    def __init__(self, addresses: dict[bytes, bytes]) -> None:
        self._addresses = addresses
        longest_first = sorted(addresses, key=len, reverse=True)
        self._longest = len(longest_first[0])
        self._pattern = re.compile(b"|".join(re.escape(one) for one in longest_first))
        self._pending = b""

    def feed(self, piece: bytes) -> bytes:
        """What can be told after this piece."""
        self._pending += piece
        return self._take(max(0, len(self._pending) - self._longest + 1))

    def end(self) -> bytes:
        """The rest."""
        return self._take(len(self._pending))

    def _take(self, until: int) -> bytes:
        """Everything before `until`, an address that begins there included."""
        told, position = b"", 0
        for match in self._pattern.finditer(self._pending):
            if match.start() >= until:
                break
            told += self._pending[position : match.start()] + self._addresses[match[0]]
            position = match.end()
        end = max(until, position)
        told += self._pending[position:end]
        self._pending = self._pending[end:]
        return told


class RegistryMirror:
    """The application of one session; `registries` are base addresses by name, each ending with a slash."""

    def __init__(self, address: str, registries: dict[str, str]) -> None:
        self.counts = Counts()
        self._registries = registries
        self._addresses = {base.encode(): f"{address}/registry/{name}/".encode() for name, base in registries.items()}
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=CONNECTIONS),
            follow_redirects=False,
            trust_env=False,
            # A registry's cookie would tie one request to the next.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        )

    def application(self) -> Starlette:
        """Its one route."""
        return Starlette(routes=[Route("/registry/{name}/{path:path}", self._serve, methods=["GET"])])

    async def _serve(self, request: Request) -> Response:
        try:
            return await self._pass_on(request)
        except RefusedError as refusal:
            self.counts.refused += 1
            return JSONResponse({"error": refusal.code}, refusal.status)

    async def _pass_on(self, request: Request) -> Response:
        self.counts.requests += 1
        if request.method != "GET":  # the router lets HEAD through with it
            raise RefusedError(405, "method_refused")
        if self.counts.requests > MAX_REQUESTS or self.counts.bytes >= MAX_SESSION_BYTES:
            raise RefusedError(403, "registry_budget_exceeded")
        base = self._registries.get(request.path_params["name"])
        if base is None:
            raise RefusedError(404, "registry_unknown")
        if request.scope["query_string"]:
            raise RefusedError(400, "query_refused")
        prefix = f"/registry/{request.path_params['name']}/"
        address = target(base, request.scope["raw_path"].decode("ascii", "replace").removeprefix(prefix))
        try:
            outgoing = self._client.build_request("GET", address, headers=_HEADERS)
            upstream = await self._client.send(outgoing, stream=True)
        except (httpx.HTTPError, httpx.InvalidURL):
            raise RefusedError(502, "registry_unreachable") from None
        refusal = _refusal(upstream)
        if refusal is not None:
            await upstream.aclose()
            raise refusal
        kind = upstream.headers.get("content-type", "application/octet-stream")
        return StreamingResponse(self._body(upstream, kind), media_type=None, headers={"content-type": kind})

    async def _body(self, upstream: httpx.Response, kind: str) -> AsyncIterator[bytes]:
        """The body, with the registries' addresses as the sandbox reaches them; cut off beyond the caps, which breaks it visibly."""
        rewriter = Rewriter(self._addresses) if _REWRITTEN.match(kind) else None
        size = 0
        try:
            async for piece in upstream.aiter_raw():
                size += len(piece)
                self.counts.bytes += len(piece)
                if size > MAX_RESPONSE_BYTES or self.counts.bytes > MAX_SESSION_BYTES:
                    self.counts.refused += 1
                    raise ConnectionAbortedError("larger than a package may be")
                yield rewriter.feed(piece) if rewriter else piece
            if rewriter:
                yield rewriter.end()
        finally:
            await upstream.aclose()


def _refusal(upstream: httpx.Response) -> RefusedError | None:
    """Only a whole, plain answer is passed on; a redirect would lead somewhere that nobody allowed."""
    if upstream.status_code != 200:
        return RefusedError(upstream.status_code if upstream.status_code >= 400 else 502, "registry_refused")
    if upstream.headers.get("content-encoding", "identity") != "identity":
        return RefusedError(502, "encoding_refused")
    length = upstream.headers.get("content-length", "")
    if length.isdigit() and int(length) > MAX_RESPONSE_BYTES:
        return RefusedError(502, "response_too_large")
    return None


class Mirror:
    """The mirror's process, as the runner holds it. MirrorError when it doesn't start."""

    def __init__(self, socket: Path, address: str, registries: dict[str, str]) -> None:
        self.socket = socket
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kilo_pipelines.cloud_agent.registry_mirror"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.environ.get("PATH", ""), "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        request = {"socket": str(socket), "address": address, "registries": registries}
        with suppress(BrokenPipeError):
            self._in.write(json.dumps(request).encode() + b"\n")
            self._in.flush()
        if self._within(START_SECONDS, self._out.readline) != b"ready\n":
            self.close()
            raise MirrorError("the mirror of package registries doesn't start")

    def close(self) -> Counts:
        """Ends the process; what the session asked for."""
        with suppress(BrokenPipeError):
            self._in.close()
        said = self._within(STOP_SECONDS, self._out.read)
        self._out.close()
        self._process.kill()
        self._process.wait()
        self.socket.unlink(missing_ok=True)
        return Counts(**json.loads(said)) if said else Counts()

    @property
    def _in(self) -> IO[bytes]:
        assert self._process.stdin is not None  # noqa: S101  # asked for above
        return self._process.stdin

    @property
    def _out(self) -> IO[bytes]:
        assert self._process.stdout is not None  # noqa: S101  # asked for above
        return self._process.stdout

    def _within(self, seconds: float, read: Callable[[], bytes]) -> bytes:
        """What can be read until then; a process that hangs is killed, which ends its output."""
        alarm = threading.Timer(seconds, self._process.kill)
        alarm.start()
        try:
            return read()
        finally:
            alarm.cancel()


async def serve(request: dict[str, Any]) -> None:
    """Serves until stdin ends: with the session, however that ends."""
    mirror = RegistryMirror(request["address"], request["registries"])
    config = uvicorn.Config(
        mirror.application(),
        uds=request["socket"],
        log_level="error",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve())
    while not server.started:
        if task.done():
            return
        await asyncio.sleep(0.01)
    print("ready", flush=True)  # noqa: T201
    await asyncio.to_thread(sys.stdin.read)
    server.should_exit = True
    await task
    print(json.dumps(asdict(mirror.counts)), flush=True)  # noqa: T201


if __name__ == "__main__":
    os.umask(0o077)
    asyncio.run(serve(json.loads(sys.stdin.readline())))
