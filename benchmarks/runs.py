"""`runs_per_minute`, `cpu_s_per_run`, `burst_2000_s`: cheap items through a whole platform with 16 shards.

A cheap item is a review that was opened by hand (owner's scope, subject lock, audit event) of a service that waits for a person
since. Its start run ends it at the claim; a settle run announces the end, whose effects are dropped when the
twin refuses a token. No session. All of it waits behind the service's pause switch, and clearing the switch starts the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psycopg

from benchmarks.homes import Platform, Tenant, eventually, platform
from benchmarks.results import Machine, Row, database_conditions, keep_raw
from benchmarks.stock.home import stock

SHARDS = 16
OWNERS = 20
SCOPE = "service:code_review"
STEADY_ITEMS = 500
BURST_ITEMS = 2000
STOCK_ROWS = 30
# A burst that takes longer is reported as unfinished with this time as its lower bound.
PATIENCE = 900.0
CHEAP = (
    "a review opened by hand of a service that waits for a person since: one start run that ends it at the claim, one settle run,"
    " two effects dropped after a refused token; row-level policies and audit on; no session"
)


@dataclass(frozen=True)
class Batch:
    """What became of some cheap items; times in seconds after the switch was cleared."""

    items: int
    ended: list[float]
    announced_s: float
    runs: list[float]
    cpu_s: float

    def per_minute(self) -> float:
        """Finished runs a minute between the tenth and the ninetieth percent of them: without the edges."""
        marks = sorted(self.runs)
        first, last = marks[len(marks) // 10], marks[len(marks) * 9 // 10]
        between = sum(first < one <= last for one in marks)
        return between * 60 / (last - first)


def run(*, quick: bool = False) -> list[Row]:
    """A steady stretch, the burst, and the same through stock Dagster."""
    machine = Machine()
    steady_items, burst_items, rows = (40, 60, 4) if quick else (STEADY_ITEMS, BURST_ITEMS, STOCK_ROWS)
    with platform(SHARDS, KILO_AGENTS_MAX="1") as running:
        settings = database_conditions(running.system_url)
        steady = _work_off(running, steady_items, 0)
        burst = _work_off(running, burst_items, 1)
    with stock() as plain:
        outcome = plain.feed(rows, 0, 240)
    keep_raw("runs", {"steady": vars(steady), "burst": vars(burst), "stock_waits": outcome.waits})
    whole = len(burst.ended) == burst.items
    common = machine.conditions(
        settings,
        shards=SHARDS,
        owners=OWNERS,
        cheap_item=CHEAP,
        stock="polling sensor at 1 s, default launcher, one update as the op; all rows at once",
    )
    stock_samples = {"stock_runs": len(outcome.waits), "stock_unfinished": outcome.unfinished}
    samples = {"items": steady.items, "runs": len(steady.runs), **stock_samples}
    return [
        Row(
            "runs_per_minute",
            steady.per_minute(),
            outcome.runs_per_minute,
            common
            | {
                "samples": samples,
                "counted": "start and settle runs, 10th to 90th percent",
                "burst_runs_per_minute": round(burst.per_minute()),
            },
        ),
        Row(
            "cpu_s_per_run",
            steady.cpu_s / len(steady.runs),
            outcome.cpu_s_per_run,
            common
            | {
                "samples": samples,
                "counted": "user and system CPU of supervisor, PostgreSQL, broker, ingress, model proxy, code server, UI, daemon and workers; not the twin",
                "burst_cpu_s_per_run": round(burst.cpu_s / max(1, len(burst.runs)), 4),
            },
        ),
        Row(
            "burst_2000_s",
            max(burst.ended) if whole else PATIENCE,
            burst_items * 60 / outcome.runs_per_minute,
            common
            | {
                "samples": {"items": burst.items, "ended": len(burst.ended), "runs": len(burst.runs), **stock_samples},
                "finished": whole,
                "until_all_announced_s": round(burst.announced_s, 1),
                "baseline": "extrapolated from the stock's runs a minute, one run an item",
            },
        ),
    ]


def _work_off(running: Platform, count: int, series: int) -> Batch:
    """Opens items behind the switch, clears it, waits for the end of all of them and of their announcements."""
    running.store.queue.switch(SCOPE, "pause", "benchmark", actor="benchmark")
    tenants = [Tenant.create(running.store, 100 * series + number) for number in range(OWNERS)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: tenants[number % OWNERS].review(number + 1), range(count)))
    for tenant in tenants:
        tenant.stop_service()
    owners = [one.owner for one in tenants]
    with (
        psycopg.connect(running.system_url, autocommit=True) as ours,
        psycopg.connect(running.dagster_url, autocommit=True) as dagster,
    ):
        running.quiet()
        cpu = running.cpu()
        began = time.time()
        running.store.queue.unswitch(SCOPE)
        ended = _ended(ours, owners)
        with suppress(TimeoutError):
            eventually(lambda: ended(False) == count, PATIENCE, "ends of all items", 0.25)
        with suppress(TimeoutError):
            eventually(lambda: ended(True) == count, PATIENCE, "all announcements", 0.25)
        announced = time.time() - began
        running.quiet()
        spent = running.cpu() - cpu
        moments = ours.execute(
            "select extract(epoch from ended_at) from work_items where owner_id = any(%s) and ended_at is not null", (owners,)
        ).fetchall()
        runs = dagster.execute("select end_time from runs where start_time >= %s and end_time is not null", (began,)).fetchall()
    return Batch(count, [float(row[0]) - began for row in moments], announced, [float(row[0]) - began for row in runs], spent)


def _ended(connection: psycopg.Connection[Any], owners: list[Any]) -> Callable[[bool], int]:
    def count(announced: bool) -> int:
        row = connection.execute(
            "select count(*) from work_items where owner_id = any(%s) and ended_at is not null and (announced or not %s)",
            (owners, announced),
        ).fetchone()
        return int(row[0]) if row else 0

    return count
