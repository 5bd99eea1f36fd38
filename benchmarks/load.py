"""The load generator: signed webhooks over keep-alive connections, in a process of its own, in a closed loop.

`python -m benchmarks.load` reads its order as JSON from stdin and answers with JSON. Requests are rendered and signed before
the clock starts, and answers are parsed by hand (status line and Content-Length): an HTTP client library would take more of
the machine than the server that it measures.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, cast
from uuid import uuid4

from benchmarks.results import ROOT

# A server that stops answering must not stop the benchmark; rendering the requests comes before.
GRACE_SECONDS = 20.0
PROCESS_SECONDS = 120.0


@dataclass(frozen=True)
class Order:
    """What to send: a closed loop of `connections`, counted after `warmup` for `seconds`; at most `most` requests."""

    port: int
    path: str
    connections: int
    warmup: float
    seconds: float
    secret: str
    installations: list[int]
    body_bytes: int = 1024
    most: int = 80_000


@dataclass
class Seen:
    """What came back: latencies in ms of what began and ended within the counted time."""

    latencies_ms: list[float] = field(default_factory=list)
    seconds: float = 0.0
    statuses: dict[str, int] = field(default_factory=dict)
    cpu_s: float = 0.0

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.latencies_ms) / self.seconds


def pull_request(installation: int, number: int, size: int) -> bytes:
    """A signed-size `pull_request` body of exactly `size` bytes, never the same twice."""
    sha = hashlib.sha1(uuid4().bytes, usedforsecurity=False).hexdigest()
    payload: dict[str, Any] = {
        "action": "opened",
        "number": number,
        "pull_request": {
            "number": number,
            "title": "",
            "draft": False,
            "state": "open",
            "html_url": f"http://localhost/bench/code/pull/{number}",
            "labels": [],
            "user": {"id": 5, "login": "grace", "type": "User"},
            "head": {"sha": sha, "ref": "topic", "repo": {"id": 1, "full_name": "bench/code"}},
            "base": {"sha": "b" * 40, "ref": "main", "repo": {"id": 1, "full_name": "bench/code"}},
        },
        "repository": {"id": installation - 9_000_001 + 70_000_001, "full_name": "bench/code", "name": "code", "private": True},
        "installation": {"id": installation},
        "sender": {"id": 5, "login": "grace", "type": "User"},
    }
    payload["pull_request"]["title"] = "x" * (size - len(json.dumps(payload)))
    return json.dumps(payload).encode()


def signature(secret: str, body: bytes) -> str:
    """GitHub's signature of a body."""
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def headers(secret: str, body: bytes) -> dict[str, str]:
    """GitHub's headers of a new delivery."""
    return {
        "user-agent": "GitHub-Hookshot/benchmark",
        "content-type": "application/json",
        "x-github-event": "pull_request",
        "x-github-delivery": str(uuid4()),
        "x-hub-signature-256": signature(secret, body),
    }


def render(order: Order, number: int) -> bytes:
    """One request as bytes."""
    body = pull_request(order.installations[number % len(order.installations)], number + 1, order.body_bytes)
    lines = [f"POST {order.path} HTTP/1.1", f"host: 127.0.0.1:{order.port}", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers(order.secret, body).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


class _Client(asyncio.Protocol):
    """One connection that sends the next request as soon as the last one is answered."""

    def __init__(self, work: list[bytes], seen: Seen, window: tuple[float, float], done: asyncio.Future[None]) -> None:
        self._work, self._seen, (self._from, self._until), self._done = work, seen, window, done
        self._answer = b""
        self._began = 0.0
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods only
        self._next()

    def _next(self) -> None:
        if time.perf_counter() >= self._until or not self._work:
            self._finish()
            return
        self._began = time.perf_counter()
        self._transport.write(self._work.pop())

    def _finish(self) -> None:
        if not self._done.done():
            self._done.set_result(None)
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head = self._answer.find(b"\r\n\r\n")
        if head < 0:
            return
        name = self._answer.lower().find(b"content-length:", 0, head)
        length = int(self._answer[name + 15 : self._answer.find(b"\r\n", name)]) if name >= 0 else 0
        if len(self._answer) < head + 4 + length:
            return
        ended = time.perf_counter()
        if self._began >= self._from and ended <= self._until:
            status = self._answer[9:12].decode()
            self._seen.statuses[status] = self._seen.statuses.get(status, 0) + 1
            self._seen.latencies_ms.append((ended - self._began) * 1000)
        self._answer = b""
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(ConnectionError(f"the server closed a connection: {exc}"))


async def _run(order: Order) -> Seen:
    loop = asyncio.get_running_loop()
    work = [render(order, number) for number in range(order.most)]
    work.reverse()
    seen = Seen()
    began = time.perf_counter() + order.warmup
    window = (began, began + order.seconds)
    cpu = time.process_time()
    ends: list[asyncio.Future[None]] = [loop.create_future() for _ in range(order.connections)]
    for one in ends:
        await loop.create_connection(lambda one=one: _Client(work, seen, window, one), "127.0.0.1", order.port)  # type: ignore[misc]
    async with asyncio.timeout(order.warmup + order.seconds + GRACE_SECONDS):
        await asyncio.gather(*ends)
    # Requests ran out before the time: the rate is that of the time that they lasted.
    seen.seconds = min(time.perf_counter(), window[1]) - began
    seen.cpu_s = time.process_time() - cpu
    return seen


def send(order: Order) -> Seen:
    """Carries an order out in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load"],
        input=json.dumps(asdict(order)),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=PROCESS_SECONDS,
    )
    if done.returncode:
        raise RuntimeError(f"the load generator failed:\n{done.stderr[-2000:]}")
    return Seen(**json.loads(done.stdout))


def answer(seen: Seen) -> None:
    """To stdout through a buffer of our own: with PYTHONUNBUFFERED a pipe may take only a part of it, and the rest is lost."""
    with os.fdopen(os.dup(1), "w") as out:
        json.dump(asdict(seen), out)


def refuse_other_answers(seen: Seen, wanted: str) -> None:
    """RuntimeError when anything but `wanted` was answered: fast refusals are no throughput."""
    if set(seen.statuses) != {wanted}:
        raise RuntimeError(f"answers other than {wanted}: {Counter(seen.statuses)}")


if __name__ == "__main__":
    import uvloop

    answer(uvloop.run(_run(Order(**json.loads(sys.stdin.read())))))
