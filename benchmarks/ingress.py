"""`ingress_rps`, `ingress_p99_ms`: webhooks to a real ingress process before a real PostgreSQL, beside two baselines.

The three take turns in rounds, so that a noisy neighbour troubles all of them, and the middle round counts.
"""

from __future__ import annotations

from collections.abc import Callable

import psycopg

from benchmarks import direct_insert, load
from benchmarks.homes import Server, Tenant, server, web
from benchmarks.results import Machine, Row, database_conditions, keep_raw, median, percentile, spread
from kilo_pipelines.cli.world import free_ports
from kilo_pipelines.settings import write_secret

CONNECTIONS = 32
BODY_BYTES = 1024
OWNERS = 20
SECRET = "benchmark-webhook-secret"  # of a scratch home
ROUNDS, SECONDS, WARMUP = 5, 6.0, 1.5


def run(*, quick: bool = False) -> list[Row]:
    """Rounds of direct insert, HMAC alone and the ingress."""
    machine = Machine()
    rounds, seconds = (1, 2.0) if quick else (ROUNDS, SECONDS)
    with server() as database:
        tenants = [Tenant.create(database.store, number) for number in range(OWNERS)]
        write_secret(database.home / "secrets" / "github-webhook-secret", SECRET)
        public, admin, bare = free_ports(3)
        ports = {"KILO_HOME": str(database.home), "KILO_PUBLIC_PORT": str(public), "KILO_ADMIN_PORT": str(admin)}
        with (
            web(
                ["-m", "kilo_pipelines.ingress"], f"http://127.0.0.1:{public}/health", database.home / "i.log", **ports
            ) as ingress,
            web(
                ["-m", "benchmarks.hmac_only", str(bare)],
                f"http://127.0.0.1:{bare}/",
                database.home / "h.log",
                BENCH_SECRET=SECRET,
            ),
        ):
            seen = _rounds(database, tenants, public, bare, rounds, seconds)
            rss = ingress.memory_info().rss / 2**20
        settings = database_conditions(database.postgres.admin_url)
    keep_raw("ingress", {name: [one.latencies_ms for one in found] for name, found in seen.items()})
    rates = {name: [one.rate for one in found] for name, found in seen.items()}
    tails = {name: [percentile(one.latencies_ms, 0.99) for one in found] for name, found in seen.items()}
    common = machine.conditions(
        settings,
        connections=CONNECTIONS,
        body_bytes=BODY_BYTES,
        owners=OWNERS,
        ingress_workers=1,
        load_generator="1 process, closed loop, requests signed beforehand; its CPU is on the same cores",
        load_generator_cores=round(median([one.cpu_s / (one.seconds + WARMUP) for one in seen["ingress"]]), 2),
        rounds=f"{rounds} of {seconds:.0f} s after {WARMUP} s of warm-up, taking turns; the middle one counts",
        samples={name: sum(len(one.latencies_ms) for one in found) for name, found in seen.items()},
        ingress_rss_mb_after=round(rss),
    )
    middle = {name: median(found) for name, found in rates.items()}
    tail = {name: median(found) for name, found in tails.items()}
    latency = {name: spread([sample for one in found for sample in one.latencies_ms]) for name, found in seen.items()}
    return [
        Row(
            "ingress_rps",
            middle["ingress"],
            middle["direct_insert"],
            common
            | {
                "hmac_only_rps": round(middle["hmac_only"]),
                "ratio_to_hmac_only": round(middle["ingress"] / middle["hmac_only"], 3),
                "rounds_rps": {name: [round(one) for one in found] for name, found in rates.items()},
            },
        ),
        Row(
            "ingress_p99_ms",
            tail["ingress"],
            tail["direct_insert"],
            common | {"hmac_only_p99_ms": round(tail["hmac_only"], 2), "latency_ms": latency},
        ),
    ]


def _rounds(
    database: Server, tenants: list[Tenant], public: int, bare: int, rounds: int, seconds: float
) -> dict[str, list[load.Seen]]:
    installations = [one.installation for one in tenants]
    places = [(str(one.owner), str(one.integration), one.installation) for one in tenants]

    def webhooks(port: int) -> load.Seen:
        seen = load.send(load.Order(port, "/webhooks/github", CONNECTIONS, WARMUP, seconds, SECRET, installations, BODY_BYTES))
        load.refuse_other_answers(seen, "202")
        return seen

    def ingress() -> load.Seen:
        before = _stored(database)
        seen = webhooks(public)
        # Stored before answered: what was counted must be there.
        if _stored(database) - before < len(seen.latencies_ms):
            raise RuntimeError("more was answered than stored")
        return seen

    turns: dict[str, Callable[[], load.Seen]] = {
        "direct_insert": lambda: direct_insert.insert(
            direct_insert.Order(database.system_url, CONNECTIONS, WARMUP, seconds, places, BODY_BYTES)
        ),
        "hmac_only": lambda: webhooks(bare),
        "ingress": ingress,
    }
    seen: dict[str, list[load.Seen]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            seen[name].append(turn())
    return seen


def _stored(database: Server) -> int:
    with psycopg.connect(database.system_url) as connection:
        row = connection.execute("select count(*) from deliveries").fetchone()
    return int(row[0]) if row else 0
