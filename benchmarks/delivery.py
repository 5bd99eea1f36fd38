"""`delivery_to_op_*`: from a signed webhook to the first statement of its run's op, through a whole platform with 16 shards.

Both moments are this host's clock: `deliveries.received_at` is taken by the ingress just before the insert is committed (so
the commit counts as waiting), `attempts.started_at` by the op in its worker as it begins its claim, after one look-up.
Each delivery makes one run: the twin answers the claim's first question with "503, come back in an hour", so that no settle run
and no session competes with the next delivery.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

import httpx
import psycopg

from benchmarks.homes import FIRST_INSTALLATION, Platform, Tenant, eventually, platform
from benchmarks.load import headers, pull_request
from benchmarks.results import Machine, Row, database_conditions, keep_raw, percentile, spread
from benchmarks.stock.home import stock
from kilo_pipelines.store import app_secrets

SHARDS = 16
OWNERS = 20
SECONDS = 90
WARM = 10  # the first deliveries after a pause, not counted
STOCK_ROWS = 30
# What has not begun by then counts with this wait: a lower bound, and the row says how many.
PATIENCE = 120.0
COME_BACK_SECONDS = 7200


def run(*, quick: bool = False) -> list[Row]:
    """2/s and 8/s through the platform, then the same rates through stock Dagster."""
    machine = Machine()
    seconds, rows = (8, 4) if quick else (SECONDS, STOCK_ROWS)
    waits: dict[str, list[float]] = {}
    unfinished: dict[str, int] = {}
    with platform(SHARDS, KILO_AGENTS_MAX="1") as running:
        tenants = [Tenant.create(running.store, number) for number in range(OWNERS)]
        send_back(running)
        settings = database_conditions(running.system_url)
        offset = 0
        for rate in (2, 8):
            _deliver(running, tenants, rate, WARM, offset)
            found, missing = _deliver(running, tenants, rate, seconds * rate, offset + WARM)
            waits[f"{rate}/s"], unfinished[f"{rate}/s"] = found, missing
            offset += WARM + seconds * rate
    with stock() as plain:
        for rate in (2, 8):
            outcome = plain.feed(rows, rate, PATIENCE)
            waits[f"stock {rate}/s"] = outcome.waits + [PATIENCE] * outcome.unfinished
            unfinished[f"stock {rate}/s"] = outcome.unfinished
    keep_raw("delivery", waits)

    def row(name: str, rate: str, share: float) -> Row:
        conditions = machine.conditions(
            settings,
            shards=SHARDS,
            rate=rate,
            owners=OWNERS,
            wait_s=spread(waits[rate]),
            stock_wait_s=spread(waits[f"stock {rate}"]),
            samples={"platform": len(waits[rate]), "stock": len(waits[f"stock {rate}"])},
            unfinished={"platform": unfinished[rate], "stock": unfinished[f"stock {rate}"]},
            delivery="one run each: claimed, then put back for two hours because the twin answers 503 with Retry-After",
            clock="deliveries.received_at (before its commit) to attempts.started_at (the op's claim), one host",
            stock="polling sensor at 1 s, default launcher; row committed to the op's first statement; its rows come in a short burst at"
            " this rate, so its figure is a lower bound for a steady one",
        )
        return Row(name, percentile(waits[rate], share), percentile(waits[f"stock {rate}"], share), conditions)

    return [
        row("delivery_to_op_p50_s", "2/s", 0.5),
        row("delivery_to_op_p95_s", "2/s", 0.95),
        row("delivery_to_op_p95_s_at_8", "8/s", 0.95),
    ]


def send_back(running: Platform) -> None:
    """The twin answers everything about our installations with 503 and a long Retry-After."""
    answer = {"status": 503, "headers": {"retry-after": str(COME_BACK_SECONDS)}, "kind": "error", "method": "POST", "left": 10**9}
    prefix = str(FIRST_INSTALLATION)[:4]
    running.control("faults", faults=[{"path": f"/app/installations/{prefix}", **answer}])


def _deliver(running: Platform, tenants: list[Tenant], rate: int, count: int, offset: int) -> tuple[list[float], int]:
    """Sends webhooks at a steady rate whatever becomes of them; their waits, and how many runs never began."""
    guids = asyncio.run(_send(running, tenants, rate, count, offset))
    query = (
        "select d.provider_delivery_id, extract(epoch from a.started_at - d.received_at) from deliveries d"
        " join attempts a on a.owner_id = d.owner_id and a.item_id = d.item_id and a.number = 1 where d.provider_delivery_id = any(%s)"
    )
    with psycopg.connect(running.system_url, autocommit=True) as connection:

        def begun() -> list[tuple[Any, ...]]:
            return connection.execute(query, (guids,)).fetchall()

        with suppress(TimeoutError):
            eventually(lambda: len(begun()) == count, PATIENCE, "runs of all deliveries", 0.5)
        found = begun()
    missing = count - len(found)
    return [float(row[1]) for row in found] + [PATIENCE] * missing, missing


async def _send(running: Platform, tenants: list[Tenant], rate: int, count: int, offset: int) -> list[str]:
    secret = app_secrets.read(running.settings).webhook_secrets[0].value
    guids: list[str] = []
    url = f"{running.settings.public_url}/webhooks/github"

    async def one(client: httpx.AsyncClient, number: int) -> None:
        body = pull_request(tenants[number % len(tenants)].installation, number + 1, 1024)
        sent = headers(secret, body)
        guids.append(sent["x-github-delivery"])
        answer = await client.post(url, content=body, headers=sent)
        if answer.status_code != 202:
            raise RuntimeError(f"a delivery was answered {answer.status_code}: {answer.text[:200]}")

    async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
                group.create_task(one(client, offset + number))
    return guids
