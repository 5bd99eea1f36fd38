"""Deliveries that are committed together: each answers for itself (invariant 1), whoever owns its neighbours."""

from __future__ import annotations

import dataclasses
from uuid import uuid4

from sqlalchemy import text

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store import AmbiguousInstallationError, NewDelivery, Receipt, Repository
from tests.conftest import Database
from tests.support.store import World


def _stored(world: World, delivery: NewDelivery) -> list[tuple[str, str | None, bytes]]:
    with world.store.database.owner(delivery.owner_id) as connection:
        found = connection.execute(
            text("select state, reason, body from deliveries where provider_delivery_id = :id"),
            {"id": delivery.provider_delivery_id},
        )
        return [(row.state, row.reason, bytes(row.body)) for row in found]


def test_deliveries_of_several_owners_are_each_stored_under_their_own(database: Database) -> None:
    worlds = [World(database.store, database.clock) for _ in range(3)]
    news = [(world.delivery(text="ü\\u0000"), None) for world in worlds for _ in range(4)]
    answers = worlds[0].store.inbox.record_many(news)
    assert [answer.outcome for answer in answers if isinstance(answer, Receipt)] == ["stored"] * 12
    for number, (new, _) in enumerate(news):
        assert _stored(worlds[number // 4], new) == [("received", None, new.body)]
        assert _stored(worlds[0], dataclasses.replace(new, owner_id=worlds[(number // 4 + 1) % 3].owner.id)) == []


def test_a_bad_delivery_fails_alone(world: World) -> None:
    """Another owner's integration, or text that PostgreSQL refuses: its neighbours are stored all the same."""
    stranger = World(world.store, world.clock)
    foreign = dataclasses.replace(world.delivery(), integration_id=stranger.integration)
    unstorable = dataclasses.replace(world.delivery(), event="nul\x00")
    for bad in (foreign, unstorable):
        good = [world.delivery(), world.delivery()]
        answers = world.store.inbox.record_many([(good[0], None), (bad, None), (good[1], None)])
        assert isinstance(answers[1], Exception)
        assert [answer.outcome for answer in (answers[0], answers[2]) if isinstance(answer, Receipt)] == ["stored", "stored"]
        assert [len(_stored(world, one)) for one in (*good, bad)] == [1, 1, 0] if bad is foreign else True


def test_known_ones_answer_as_alone(world: World) -> None:
    """Twice in one batch, known before its admission, known after it, and a reused id."""
    twice, waiting, settled = world.delivery(), world.delivery(), world.delivery()
    first = world.store.inbox.record(waiting).delivery_id
    world.store.inbox.record(settled, skip=Reason.EVENT_UNKNOWN)
    reused = dataclasses.replace(world.delivery(), provider_delivery_id=waiting.provider_delivery_id)
    fresh = world.delivery()
    answers = world.store.inbox.record_many([(one, None) for one in (twice, twice, waiting, settled, reused, fresh)])
    receipts = [answer for answer in answers if isinstance(answer, Receipt)]
    assert [one.outcome for one in receipts] == ["stored", "resumed", "resumed", "duplicate", "id_reused", "stored"]
    assert receipts[1].delivery_id == receipts[0].delivery_id
    assert receipts[2].delivery_id == first


def test_each_keeps_its_own_skip(world: World) -> None:
    kept, skipped = world.delivery(), world.delivery()
    world.store.inbox.record_many([(kept, None), (skipped, Reason.EVENT_UNKNOWN)])
    assert _stored(world, kept) == [("received", None, kept.body)]
    assert _stored(world, skipped) == [("skipped", Reason.EVENT_UNKNOWN, skipped.body)]


def test_a_batch_wakes_who_waits_for_work(world: World) -> None:
    with world.store.listener("kilo_work") as wake:
        world.store.inbox.record_many([(world.delivery(), None), (world.delivery(), None)])
        assert wake.wait(5) == "kilo_work"


def test_installations_are_looked_up_together_and_refused_by_themselves(database: Database) -> None:
    known, twin, other = (World(database.store, database.clock) for _ in range(3))
    database.store.owners.connect(
        other.owner.id,
        provider="github",
        installation_id=twin.installation,
        account="octo",
        repositories=[Repository(5, "octo/other", "main", False)],
        actor="test",
    )
    unknown = uuid4().int % 10**9 + 10**9
    found = database.store.owners.by_installations("github", [unknown, known.installation, twin.installation, known.installation])
    assert found[0] is None
    assert found[1] == found[3] == database.store.owners.by_installation("github", known.installation)
    assert isinstance(found[2], AmbiguousInstallationError)
