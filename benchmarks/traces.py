"""`ingress_traced_rps`, `span_off_us`: what traces cost an ingress, on beside off, and what a span costs that nobody asked for.

Two ingress processes before one PostgreSQL take turns in rounds; the middle round counts. The collector is a process that takes every
batch and keeps none, and shares the cores.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

from benchmarks import load
from benchmarks.homes import Tenant, server, web
from benchmarks.ingress import BODY_BYTES, CONNECTIONS, OWNERS, SECRET, WARMUP
from benchmarks.results import Machine, Row, database_conditions, keep_raw, median, percentile
from kilo_pipelines.cli.world import free_ports
from kilo_pipelines.settings import write_secret
from kilo_pipelines.telemetry import traces

ROUNDS, SECONDS = 5, 6.0
SPANS = 200_000


def run(*, quick: bool = False) -> list[Row]:
    """Rounds of off and on; then spans that are off."""
    machine = Machine()
    rounds, seconds = (1, 2.0) if quick else (ROUNDS, SECONDS)
    with server() as database:
        tenants = [Tenant.create(database.store, number) for number in range(OWNERS)]
        write_secret(database.home / "secrets" / "github-webhook-secret", SECRET)
        off, off_admin, on, on_admin, sink = free_ports(5)
        home = {"KILO_HOME": str(database.home)}
        plain = {**home, "KILO_PUBLIC_PORT": str(off), "KILO_ADMIN_PORT": str(off_admin)}
        traced = {**home, "KILO_PUBLIC_PORT": str(on), "KILO_ADMIN_PORT": str(on_admin)}
        traced["KILO_OTLP_ENDPOINT"] = f"http://127.0.0.1:{sink}"
        log = database.home / "web.log"
        with (
            web(["-m", "benchmarks.otlp_sink", str(sink)], f"http://127.0.0.1:{sink}/", log),
            web(["-m", "kilo_pipelines.ingress"], f"http://127.0.0.1:{off}/health", log, **plain),
            web(["-m", "kilo_pipelines.ingress"], f"http://127.0.0.1:{on}/health", log, **traced),
        ):
            seen: dict[str, list[load.Seen]] = {"off": [], "on": []}
            for number in range(rounds):
                for name, port in (("off", off), ("on", on)) if number % 2 == 0 else (("on", on), ("off", off)):
                    seen[name].append(_webhooks(port, [one.installation for one in tenants], seconds))
        settings = database_conditions(database.postgres.admin_url)
    keep_raw("traces", {name: [one.latencies_ms for one in found] for name, found in seen.items()})
    rates = {name: [one.rate for one in found] for name, found in seen.items()}
    tails = {name: median([percentile(one.latencies_ms, 0.99) for one in found]) for name, found in seen.items()}
    common = machine.conditions(
        settings,
        connections=CONNECTIONS,
        body_bytes=BODY_BYTES,
        owners=OWNERS,
        collector="a process that takes every batch and keeps none, on the same cores",
        spans_a_webhook=3,
        rounds=f"{rounds} of {seconds:.0f} s after {WARMUP} s of warm-up, taking turns; the middle one counts",
        samples={name: sum(len(one.latencies_ms) for one in found) for name, found in seen.items()},
    )
    rounds_rps = {name: [round(one) for one in found] for name, found in rates.items()}
    return [
        Row(
            "ingress_traced_rps",
            median(rates["on"]),
            median(rates["off"]),
            common | {"rounds_rps": rounds_rps, "p99_ms": {name: round(one, 2) for name, one in tails.items()}},
        ),
        Row("span_off_us", _spans(), _empty(), common | {"samples": SPANS}),
    ]


def _webhooks(port: int, installations: list[int], seconds: float) -> load.Seen:
    seen = load.send(load.Order(port, "/webhooks/github", CONNECTIONS, WARMUP, seconds, SECRET, installations, BODY_BYTES))
    load.refuse_other_answers(seen, "202")
    return seen


def _spans() -> float:
    """Microseconds of a span with two facts while traces are off."""
    owner = uuid4()
    began = time.perf_counter()
    for _ in range(SPANS):
        with traces.span("delivery", owner=owner) as span:
            span.set(outcome="stored")
    return (time.perf_counter() - began) / SPANS * 1e6


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _empty() -> float:
    """Microseconds of a block that does nothing at its begin and end."""
    began = time.perf_counter()
    for _ in range(SPANS):
        with _nothing():
            pass
    return (time.perf_counter() - began) / SPANS * 1e6
