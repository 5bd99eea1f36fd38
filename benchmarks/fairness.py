"""`fairness_wait_ratio`: what an owner with 10,000 waiting items costs the 99 others.

At the level of the store, without Dagster: two offerers in the place of the sensor shards, a queue in the broker's, three claimers
in the workers', all processes of their own over a real PostgreSQL and with the platform's own offers, claims and settlements. A
claimer holds each offer for `RUN_SECONDS`, as a worker holds a run. The others' items arrive by the same chance in both phases.

The bound is looked at by itself on an injected clock: in how many rounds of offers each of the others is served.
"""

from __future__ import annotations

import math
import multiprocessing
import queue
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from multiprocessing.synchronize import Event, Semaphore
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg

from benchmarks.homes import Server, Tenant, eventually, server
from benchmarks.results import Machine, Row, database_conditions, keep_raw, percentile, spread
from kilo_pipelines.cli.supervisor import DISPATCH_WORKERS
from kilo_pipelines.core.clock import ManualClock, SystemClock
from kilo_pipelines.core.owners import review_pools
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.services.code_review.admission import SERVICE
from kilo_pipelines.store import Cipher, Claimed, Offer, Store

OWNERS = 100
HOG_ITEMS = 10_000
# Fewer than there are owners, so that turns matter; a sensor's evaluation may offer more.
OFFERS = 20
SAMPLES = 500
PER_SECOND = 6.0
OFFERERS = 2
RUN_SECONDS = 0.05  # of one run in a warm worker, Dagster's share included
SEED = 7

Logins = tuple[str, str, str]


def run(*, quick: bool = False) -> list[Row]:
    """The others alone, then beside the hog, then the bound."""
    machine = Machine()
    samples, hog_items = (20, 100) if quick else (SAMPLES, HOG_ITEMS)
    with server() as database:
        settings = database_conditions(database.postgres.admin_url)
        tenants = [Tenant.create(database.store, number) for number in range(OWNERS)]
        hog, others = tenants[0], tenants[1:]
        alone = _phase(database, others, samples, 0)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(hog.review, range(1, hog_items + 1)))
        beside = _phase(database, others, samples, samples)
        left = _waiting(database, hog.owner)
        worst, bound = _rounds(database, tenants)
    keep_raw("fairness", {"alone": alone, "beside": beside})
    with_hog, without = percentile(beside, 0.95), percentile(alone, 0.95)
    allowed = max(0.1 * without, 0.3)
    conditions = machine.conditions(
        settings,
        samples={"alone": len(alone), "beside": len(beside)},
        owners=OWNERS,
        hog_items=hog_items,
        hog_items_left=left,
        arrivals_per_second=PER_SECOND,
        processes=f"{OFFERERS} offerers, {DISPATCH_WORKERS} claimers, {RUN_SECONDS} s a run; store level, no Dagster",
        wait_alone_s=spread(alone),
        wait_beside_s=spread(beside),
        p95_rise_s=round(with_hog - without, 4),
        p95_rise_allowed_s=round(allowed, 4),
        within=with_hog - without <= allowed,
        injected_clock={
            "rounds_of_offers_until_all_others_were_served": worst,
            "bound": bound,
            "offers_a_round": OFFERS,
            "hog_items": left,
        },
    )
    if left == 0:
        raise RuntimeError("the hog's items ran out during the measurement")
    return [Row("fairness_wait_ratio", with_hog / without, 1.0, conditions)]


def _phase(database: Server, others: list[Tenant], samples: int, offset: int) -> list[float]:
    """Waits of the others' items, from their creation to their claim (both stored, one clock)."""
    chance = random.Random(SEED)
    plan = [(chance.expovariate(PER_SECOND), chance.randrange(len(others))) for _ in range(samples)]
    items: list[UUID] = []
    with _workers(database):
        time.sleep(3)  # the line stands
        due = time.monotonic()
        for number, (pause, owner) in enumerate(plan):
            due += pause
            time.sleep(max(0.0, due - time.monotonic()))
            items.append(others[owner].review(1_000_000 + offset + number))
        query = "select extract(epoch from a.started_at - w.created_at) from work_items w join attempts a on a.owner_id = w.owner_id and a.item_id = w.id where w.id = any(%s)"
        with psycopg.connect(database.system_url, autocommit=True) as connection:
            found = eventually(
                lambda: rows if len(rows := connection.execute(query, (items,)).fetchall()) == samples else None,
                120,
                "all claims",
            )
    return [float(row[0]) for row in found]


@contextmanager
def _workers(database: Server) -> Iterator[None]:
    """Offerers and claimers for the length of a block."""
    spawn = multiprocessing.get_context("spawn")
    stop, broker, ready = spawn.Event(), spawn.Queue(), spawn.Semaphore(0)
    logins = (database.logins["app"], database.logins["system"], str(database.home / "secrets" / "encryption.key"))
    workers = [spawn.Process(target=_offer, args=(logins, broker, stop, ready), daemon=True) for _ in range(OFFERERS)]
    workers += [spawn.Process(target=_claim, args=(logins, broker, stop, ready), daemon=True) for _ in range(DISPATCH_WORKERS)]
    for one in workers:
        one.start()
    try:
        for _ in workers:  # a process takes seconds to import, which is nobody's wait
            if not ready.acquire(timeout=60):
                raise RuntimeError("a worker isn't ready after 60 s")
        yield
        if dead := [one.exitcode for one in workers if not one.is_alive()]:
            raise RuntimeError(f"workers ended early: {dead}")
    finally:
        stop.set()
        for one in workers:
            one.join(10)
            if one.is_alive():
                one.kill()


def _store(logins: Logins) -> Store:
    return Store(logins[0], logins[1], Cipher.from_file(Path(logins[2])), SystemClock())


def _offer(logins: Logins, broker: Any, stop: Event, ready: Semaphore) -> None:
    """As a sensor shard: offers when something was notified, at the latest after a while."""
    store = _store(logins)
    with store.listener("kilo_work") as wake:
        ready.release()
        while not stop.is_set():
            offers = store.queue.offers(limit=OFFERS)
            for offer in offers:
                broker.put(offer)
            if not offers:
                wake.wait(0.5)


def _claim(logins: Logins, broker: Any, stop: Event, ready: Semaphore) -> None:
    """As a worker: one offer after the other."""
    store = _store(logins)
    store.queue.pause_reason()  # connected
    ready.release()
    while not stop.is_set():
        with suppress(queue.Empty):
            _work(store, broker.get(timeout=0.2), RUN_SECONDS)


def _work(store: Store, offer: Offer, seconds: float) -> None:
    """What a start or settle run does at the store; a start ends its item at once."""
    time.sleep(seconds)
    for item in offer.ids:
        if offer.kind == "start":
            claim = store.queue.claim(item, SERVICE, run_id="benchmark", pools=review_pools, lease_s=60)
            if isinstance(claim, Claimed):
                store.queue.conclude(claim, "cancelled", Reason.PULL_CLOSED)
        elif offer.kind == "settle":
            with store.settlements.open(item) as tx:
                if tx is not None:
                    tx.announce({}, None, [])


def _waiting(database: Server, owner: UUID) -> int:
    with psycopg.connect(database.system_url) as connection:
        row = connection.execute("select count(*) from work_items where owner_id = %s and state = 'waiting'", (owner,)).fetchone()
    return int(row[0]) if row else 0


def _rounds(database: Server, tenants: list[Tenant]) -> tuple[int, int]:
    """On an injected clock, a day later: rounds of offers until every other owner's new item was offered, and the bound."""
    clock = ManualClock(datetime.now(UTC) + timedelta(days=1))
    key = Cipher.from_file(database.home / "secrets" / "encryption.key")
    store = Store(database.logins["app"], database.logins["system"], key, clock)
    later = [Tenant(store, one.owner, one.name, one.installation, one.repository, one.integration) for one in tenants[1:]]
    wanted = {one.review(5_000_000) for one in later}
    # The head of the hog's line is the oldest of all and takes one place in each round.
    bound, rounds = math.ceil(len(later) / (OFFERS - 1)), 0
    while wanted and rounds < 10 * bound:
        rounds += 1
        clock.advance(timedelta(seconds=1))
        offers = store.queue.offers(limit=OFFERS)
        wanted -= {item for offer in offers for item in offer.ids}
        for offer in offers:
            _work(store, offer, 0)
    store.database.dispose()
    return rounds, bound
