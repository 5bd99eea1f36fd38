"""Baseline of the ingress: the same row of the same table by psycopg, as many connections, one commit each, no HTTP.

One prepared statement in autocommit mode is one round trip: nothing that stores each delivery by itself can be cheaper.
Run as `python -m benchmarks.direct_insert`; the order comes as JSON from stdin.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from uuid import UUID, uuid4

import psycopg

from benchmarks.load import PROCESS_SECONDS, Seen, answer, pull_request
from benchmarks.results import ROOT

INSERT = (
    "insert into deliveries (owner_id, id, integration_id, provider_delivery_id, event, action, body, body_sha256, headers, state,"
    " not_before, received_at) values (%s, %s, %s, %s, 'pull_request', 'opened', %s, %s, '{}', 'received', %s, %s)"
)


@dataclass(frozen=True)
class Order:
    """As the load generator's, with the database instead of the port; `places` are (owner, integration, installation)."""

    url: str
    connections: int
    warmup: float
    seconds: float
    places: list[tuple[str, str, int]]
    body_bytes: int = 1024
    most: int = 60_000


async def _connection(order: Order, work: list[tuple[str, str, bytes]], seen: Seen, window: tuple[float, float]) -> None:
    async with await psycopg.AsyncConnection.connect(order.url, autocommit=True) as connection:
        while work and (began := time.perf_counter()) < window[1]:
            owner, integration, body = work.pop()
            now = datetime.now(UTC)
            values = (UUID(owner), uuid4(), UUID(integration), str(uuid4()), body, hashlib.sha256(body).digest(), now, now)
            await connection.execute(INSERT, values, prepare=True)
            ended = time.perf_counter()
            if began >= window[0] and ended <= window[1]:
                seen.latencies_ms.append((ended - began) * 1000)


async def _run(order: Order) -> Seen:
    work = []
    for number in range(order.most):
        owner, integration, installation = order.places[number % len(order.places)]
        work.append((owner, integration, pull_request(installation, number + 1, order.body_bytes)))
    seen = Seen()
    began = time.perf_counter() + order.warmup
    window = (began, began + order.seconds)
    cpu = time.process_time()
    await asyncio.gather(*(_connection(order, work, seen, window) for _ in range(order.connections)))
    seen.seconds = min(time.perf_counter(), window[1]) - began
    seen.cpu_s = time.process_time() - cpu
    return seen


def insert(order: Order) -> Seen:
    """Carries an order out in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.direct_insert"],
        input=json.dumps(asdict(order)),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=PROCESS_SECONDS,
    )
    if done.returncode:
        raise RuntimeError(f"the direct insert failed:\n{done.stderr[-2000:]}")
    return Seen(**json.loads(done.stdout))


if __name__ == "__main__":
    import uvloop

    answer(uvloop.run(_run(Order(**json.loads(sys.stdin.read())))))
