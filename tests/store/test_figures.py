"""Figures out of the database: what ended is counted once, claims by their outcome, and a trace goes on from row to row."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from uuid import uuid4

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from kilo_pipelines.ingress.metrics import Platform
from kilo_pipelines.store import AdmissionTx, Claimed, SessionClaim
from kilo_pipelines.store.figures import COMMIT_LAG
from kilo_pipelines.telemetry import traces
from tests.conftest import Database
from tests.support.store import World, intent


def _finished(world: World, seconds: float) -> Claimed:
    claim, held = world.running()
    assert isinstance(held, SessionClaim)
    world.clock.advance(timedelta(seconds=seconds))
    evidence = {"tokens_in": 700, "tokens_out": 30, "turns": 2}
    assert world.store.sessions.finish(held, status="completed", reason=None, result={}, evidence=evidence)
    world.clock.advance(timedelta(seconds=1))
    with world.store.settlements.open(claim.item_id) as tx:
        assert tx is not None
        effects = [intent(uuid4().hex, str(claim.item_id))]
        tx.conclude(state="completed", reason="reviewed", verdict={}, evidence=None, effects=effects)
    return claim


def _values(platform: Platform) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in platform.collect()
        for sample in family.samples
    }


def test_each_ended_session_is_counted_once_whenever_the_scrapes_come(database: Database, world: World) -> None:
    platform, clock = Platform(), world.clock

    def scrape() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        platform.look(world.store, clock.now())
        return _values(platform)

    service = (("service", "code_review"),)
    assert ("kilo_session_seconds_count", service) not in scrape(), "what ended before this process looked isn't its"
    clock.advance(COMMIT_LAG + timedelta(seconds=10))
    _finished(world, 45)
    clock.advance(timedelta(seconds=10))
    assert ("kilo_session_seconds_count", service) not in scrape(), "what may still commit is left to the next look"
    clock.advance(COMMIT_LAG)
    assert scrape()["kilo_session_seconds_count", service] == 0, "seen at zero first, else no rate would know of it"
    assert scrape()["kilo_sessions_ended_total", (("reason", "none"), *service, ("state", "completed"))] == 0
    for _ in range(3):
        clock.advance(COMMIT_LAG)
        seen = scrape()
        assert seen["kilo_session_seconds_count", service] == 1
        assert seen["kilo_session_seconds_sum", service] == pytest.approx(45, abs=0.1)
        assert seen["kilo_session_seconds_bucket", (("le", "30.0"), *service)] == 0
        assert seen["kilo_session_seconds_bucket", (("le", "60.0"), *service)] == 1
        assert seen["kilo_settle_seconds_bucket", (("le", "2.5"), *service)] == 1
        assert seen["kilo_session_tokens_total", (("direction", "in"), *service)] == 700
        assert seen["kilo_sessions_ended_total", (("reason", "none"), *service, ("state", "completed"))] == 1
        assert seen["kilo_items_ended_total", (("reason", "reviewed"), *service, ("state", "completed"))] == 1
    assert seen["kilo_effects_live", (("kind", "github.reaction"), ("state", "pending"))] == 1


def test_scrapes_in_a_row_cost_one_look(database: Database, world: World) -> None:
    platform = Platform()
    platform.look(world.store, world.clock.now())
    world.item()
    platform.look(world.store, world.clock.now())
    waiting = ("kilo_items_waiting", (("reason", "none"), ("service", "code_review")))
    before = _values(platform).get(waiting, 0)
    world.clock.advance(timedelta(seconds=6))
    platform.look(world.store, world.clock.now())
    assert _values(platform)[waiting] == before + 1


def test_claims_are_counted_by_outcome_and_beats_by_age(world: World) -> None:
    def claims() -> dict[str, int]:
        return {row["outcome"]: row["n"] for row in world.store.figures.now().claims}

    before = claims()
    item = world.item()
    assert isinstance(world.claim(item), Claimed)
    world.claim(item)
    after = claims()
    assert after["claimed"] == before.get("claimed", 0) + 1 and after["moved_on"] == before.get("moved_on", 0) + 1
    assert not [name for name in world.store.queue.counters() if name.startswith("claim:")]
    world.store.figures.beat("recovery")
    world.clock.advance(timedelta(seconds=7))
    (beat,) = [row for row in world.store.figures.now().heartbeats if row["name"] == "recovery"]
    assert beat["age"] == pytest.approx(7)


def test_a_trace_goes_on_from_the_delivery_to_item_session_and_effect(world: World) -> None:
    spans = InMemorySpanExporter()
    traces.send_to(SimpleSpanProcessor(spans), "test")
    try:
        with traces.span("delivery"):
            new = replace(world.delivery(), trace=traces.here())
        world.store.inbox.record_many([(new, None)])
        opened = []

        def admit(tx: AdmissionTx) -> None:
            opened.append(tx.open(world.new_item(77)))
            tx.intend(opened[0], [intent(uuid4().hex, str(opened[0]))])

        while not opened:
            world.store.inbox.admit_next(admit, 1)
        place = world.store.queue.trace_of(opened[0])
        with traces.following(place, "launch"):
            claim, session = world.launched(opened[0])
        held = world.session_claim(session)
        effect = world.store.outbox.claim_next(opened[0])
    finally:
        traces.disarm()
    by_id = {one.context.span_id: one for one in spans.get_finished_spans() if one.context}
    name_of = {f"{key:016x}": one.name for key, one in by_id.items()}
    assert isinstance(held, SessionClaim) and held.trace and effect is not None and effect.trace and claim.trace == place
    assert name_of[held.trace[36:52]] == "launch" and name_of[effect.trace[36:52]] == "admit"
    assert {held.trace[3:35], effect.trace[3:35]} == {(new.trace or "")[3:35]}
    parents = {one.name: by_id[one.parent.span_id].name for one in by_id.values() if one.parent}
    assert parents == {"admit": "delivery", "launch": "admit", "wait": "admit", "claim": "launch"}


def test_the_database_takes_no_place_that_is_not_ours(world: World) -> None:
    item = world.item()
    with pytest.raises(IntegrityError), world.store.database.owner(world.owner.id) as connection:
        connection.execute(text("update work_items set trace = 'of a header' where id = :id"), {"id": item})
