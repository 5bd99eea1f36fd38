"""`idle_core_percent`, `idle_core_percent_2_shards`, `ingress_rss_mb`: what a platform without work costs."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

from benchmarks.homes import cpu_seconds, platform, web
from benchmarks.results import RAW, Machine, Row, database_conditions, keep_raw
from benchmarks.stock.home import stock
from kilo_pipelines.cli.world import free_ports

SECONDS = 60.0
CALM = 30.0  # after the seeded review: schedules, first evaluations of all shards, imports


def run(*, quick: bool = False) -> list[Row]:
    """16 shards, 2 shards, the stock daemon, each idle for a minute."""
    machine = Machine()
    calm, seconds = (3.0, 5.0) if quick else (CALM, SECONDS)
    percent: dict[int, float] = {}
    shares: dict[int, dict[str, float]] = {}
    settings, rss = {}, 0.0
    for shards in (16, 2):
        with platform(shards, KILO_AGENTS_MAX="1") as running:
            settings = database_conditions(running.system_url)
            time.sleep(calm)
            before = _by_process(running.processes())
            percent[shards] = _percent(running.cpu, seconds)
            after = _by_process(running.processes())
            shares[shards] = {name: round((after[name] - before.get(name, 0.0)) / seconds * 100, 2) for name in sorted(after)}
            rss = max(rss, running.child("kilo_pipelines.ingress").memory_info().rss / 2**20)
    with stock() as plain:
        time.sleep(calm)
        bare_percent = _percent(plain.cpu, seconds)
    port = free_ports(1)[0]
    RAW.mkdir(exist_ok=True)
    with web(["-m", "benchmarks.hmac_only", str(port)], f"http://127.0.0.1:{port}/", RAW / "hmac.log", BENCH_SECRET="x") as bare:
        bare_rss = bare.memory_info().rss / 2**20
    keep_raw("idle", {"percent": percent, "shares": shares, "stock": bare_percent})

    def row(name: str, shards: int) -> Row:
        conditions = machine.conditions(
            settings,
            shards=shards,
            samples={"seconds": seconds},
            percent_by_process=shares[shards],
            counted="all processes of the platform and their children, supervisor included, without the twin; one core is 100 %",
        )
        return Row(name, percent[shards], bare_percent, conditions)

    memory = machine.conditions(
        settings,
        samples={"processes": 1},
        counted="resident set of the idle ingress after one review; ingress_rps tells it after load",
    )
    return [row("idle_core_percent", 16), row("idle_core_percent_2_shards", 2), Row("ingress_rss_mb", rss, bare_rss, memory)]


def _percent(cpu: Callable[[], float], seconds: float) -> float:
    began, before = time.monotonic(), cpu()
    time.sleep(seconds)
    return (cpu() - before) / (time.monotonic() - began) * 100


def _by_process(processes: list[psutil.Process]) -> dict[str, float]:
    """CPU seconds by supervised process, named by its program."""
    spent: dict[str, float] = {}
    for one in processes:
        name = _name(one.cmdline())
        spent[name] = spent.get(name, 0.0) + cpu_seconds([one])
    return spent


def _name(argv: list[str]) -> str:
    words = [word.rsplit("/", 1)[-1] for word in argv]
    if "-Q" in words:
        return f"worker {words[words.index('-Q') + 1]}"
    known = (
        "postgres",
        "redis-server",
        "kilo_pipelines.ingress",
        "kilo_pipelines.cloud_agent.model_proxy",
        "dagster-webserver",
        "dagster-daemon",
    )
    return next((name for name in known if any(name in word for word in words)), "dagster code server")
