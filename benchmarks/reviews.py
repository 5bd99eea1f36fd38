"""`reviews_20_launch_s`: twenty pending reviews of one owner, from the moment its slots open to the last launched session.

Real pull requests of the twin, so each start run mints a token, reads its pull request and records a session. The owner's twenty
slots are held by claims of the harness, which frees them in one transaction with the platform's NOTIFY: that is the clock's start.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any
from uuid import UUID, uuid4

import psycopg

from benchmarks.homes import Platform, Tenant, eventually, platform
from benchmarks.results import Machine, Row, database_conditions, keep_raw, median
from benchmarks.stock.home import stock
from kilo_pipelines.core.owners import review_pools
from kilo_pipelines.services.code_review.admission import SERVICE
from kilo_pipelines.store import Claimed

SHARDS = 16
REVIEWS = 20
ROUNDS = 5
AGENTS = 2
PATIENCE = 120.0
# One round fits GitHub's budget of a minute; the next ones would measure how it refills.
READS_PER_HOUR = "1000000"
HELD_REPOSITORY = 60_000_001  # known to our database only


def run(*, quick: bool = False) -> list[Row]:
    """Some rounds, each with pull requests of its own; the middle one counts."""
    machine = Machine()
    rounds = 1 if quick else ROUNDS
    launches: list[list[float]] = []
    with platform(
        SHARDS, KILO_AGENTS_MAX=str(AGENTS), KILO_LEASE_SECONDS="30", KILO_GITHUB_READS_PER_HOUR=READS_PER_HOUR
    ) as running:
        settings = database_conditions(running.system_url)
        owner = running.store.owners.all()[0].id
        for _ in range(rounds):
            launches.append(_round(running, owner))
    with stock() as plain:
        outcome = plain.feed(4 if quick else REVIEWS, 0, PATIENCE)
    keep_raw("reviews", {"launches": launches, "stock_waits": outcome.waits})
    value = median([max(one) for one in launches])
    conditions = machine.conditions(
        settings,
        shards=SHARDS,
        samples={
            "rounds": rounds,
            "launches": sum(map(len, launches)),
            "stock_runs": len(outcome.waits),
            "stock_unfinished": outcome.unfinished,
        },
        last_launch_s=[round(max(one), 2) for one in launches],
        first_launch_s=[round(min(one), 2) for one in launches],
        middle_launch_s=[round(median(one), 2) for one in launches],
        rate_budget=f"{READS_PER_HOUR} reads an hour, so that rounds don't wait for GitHub's budget",
        session="scripted agent; launched means that its session is recorded (sessions.created_at), not that the agent works: it has"
        f" {AGENTS} places, and what already runs competes for the cores",
        stock="20 rows at once to the first statement of the last op; no provider is asked",
    )
    return [Row("reviews_20_launch_s", value, PATIENCE if outcome.unfinished else max(outcome.waits), conditions)]


def _round(running: Platform, owner: UUID) -> list[float]:
    holder = Holder(running, owner)
    holder.take()
    pulls = [running.control("open-pull", kind="clean") for _ in range(REVIEWS)]
    with psycopg.connect(running.system_url, autocommit=True) as connection:
        query = (
            "select extract(epoch from s.created_at), w.id from work_items w join reviews r on r.owner_id = w.owner_id and r.item_id = w.id"
            " left join sessions s on s.owner_id = w.owner_id and s.id = w.session_id"
            " where w.owner_id = %s and r.pull_number = any(%s) and r.repository_id = %s"
        )
        values = (owner, [one["number"] for one in pulls], pulls[0]["repository_id"])

        def waiting() -> list[tuple[Any, ...]]:
            return connection.execute(query, values).fetchall()

        eventually(lambda: len(waiting()) == REVIEWS, PATIENCE, "admissions")
        time.sleep(6)  # every shard is back in its wait: Dagster's loop has a floor of 5 s
        early = sum(row[0] is not None for row in waiting())
        if early:
            raise RuntimeError(f"{early} reviews were launched before the slots opened")
        began = holder.open()
        with suppress(TimeoutError):
            eventually(lambda: all(row[0] is not None for row in waiting()), PATIENCE, "launches")
        found = [float(row[0]) - began if row[0] is not None else PATIENCE for row in waiting()]
        items = [row[1] for row in waiting()]
    for item in items:  # their agents need not work for the figure
        running.store.queue.cancel(item, reason="user_cancelled", actor="benchmark")
    holder.give_up()
    eventually(lambda: not any(what == "items" for what, _ in running.store.queue.gauges()), PATIENCE, "a quiet platform")
    running.quiet()
    return found


class Holder:
    """Holds all the owner's slots with real claims, of items that nothing else can take meanwhile."""

    def __init__(self, running: Platform, owner: UUID) -> None:
        self._running, self._owner = running, owner
        self._claims: list[Claimed] = []

    def take(self) -> None:
        """Claims one item after the other, before any run does; a run that comes later moves on."""
        store = self._running.store
        installation = store.owners.integrations(self._owner)[0]["installation_id"]
        tenant = Tenant.joined(store, self._owner, "held", installation, HELD_REPOSITORY)
        while len(self._claims) < REVIEWS:
            item = tenant.review(uuid4().int % 10**9)
            claim = store.queue.claim(item, SERVICE, run_id="benchmark", pools=review_pools, lease_s=900)
            if isinstance(claim, Claimed):
                self._claims.append(claim)

    def open(self) -> float:
        """All slots at once; the moment of the commit."""
        with psycopg.connect(self._running.system_url) as connection:
            connection.execute(
                "update owner_slots set item_id = null, fence = null, taken_at = null where owner_id = %s", (self._owner,)
            )
            connection.execute("select pg_notify('kilo_work', 'slots')")
        return time.time()

    def give_up(self) -> None:
        """Ends the held items."""
        for claim in self._claims:
            self._running.store.queue.cancel(claim.item_id, reason="user_cancelled", actor="benchmark")
