"""Retention and key rotation: what must stay stays, what is old goes, what was sealed can be opened."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import text

from kilo_pipelines.core.rates import Rate
from kilo_pipelines.store import Ages, Cipher, Store
from kilo_pipelines.store import retention as retention_module
from kilo_pipelines.store.crypto import CipherError
from kilo_pipelines.store.standing import take_author
from tests.conftest import Database
from tests.support.store import World

AGES = Ages(delivery_bodies=90, session_events=90, callbacks=7)


def _count(world: World, sql: str) -> int:
    with world.store.database.owner(world.owner.id) as connection:
        return int(connection.execute(text(sql)).scalar_one())


def _finished(world: World) -> None:
    _, held = world.running()
    world.store.sessions.event(held, "turn", {})
    world.store.sessions.finish(held, status="completed", reason=None, result={})


def test_what_is_old_goes_and_what_is_live_or_young_stays(world: World) -> None:
    _finished(world)
    _, live = world.running()
    world.store.sessions.event(live, "turn", {})
    waiting = world.store.inbox.record(world.delivery())
    world.clock.advance(timedelta(days=89))
    assert world.store.retention.sweep(AGES)["callbacks"] >= 1
    assert _count(world, "select count(*) from session_events") == 2
    world.clock.advance(timedelta(days=40))
    young = world.store.inbox.record(world.delivery(), skip="event_unknown")
    removed = world.store.retention.sweep(AGES)
    assert removed["delivery_bodies"] >= 2 and removed["session_events"] >= 1
    assert _count(world, "select count(*) from session_events") == 1, "the live session's step stays"
    assert _count(world, "select count(*) from callback_tokens") == 1
    kept = "select count(*) from deliveries where body <> '' and id in (:a, :b)"
    with world.store.database.owner(world.owner.id) as connection:
        assert connection.execute(text(kept), {"a": waiting.delivery_id, "b": young.delivery_id}).scalar() == 2
    assert _count(world, "select count(*) from work_items") == 2 and _count(world, "select count(*) from sessions") == 2


def test_a_full_bucket_goes_and_one_that_holds_an_author_back_stays(world: World) -> None:
    limits = {"author_starts_per_hour": 1.0, "author_burst": 2}
    world.store.owners.put_config(world.owner.id, "limits", limits, enabled=True, expected_revision=0, actor="test")
    rate = Rate(1.0, 2)

    def start(author: str) -> bool:
        with world.store.database.owner(world.owner.id) as connection:
            return take_author(connection, world.owner.id, world.repository, author, rate, world.clock.now()) is None

    def swept() -> int:
        world.store.retention.sweep(AGES)
        return _count(world, "select count(*) from author_buckets")

    assert [start("once") for _ in range(3)] == [True, True, False]
    world.clock.advance(timedelta(minutes=119))
    assert start("again") and swept() == 2
    world.clock.advance(timedelta(minutes=2))
    assert swept() == 1
    assert [start("again") for _ in range(2)] == [True, False], "what is left goes on as it was"
    assert [start("once") for _ in range(3)] == [True, True, False]


def test_a_redelivery_is_known_after_its_body_is_gone(world: World) -> None:
    """Its keys stay: the same event again is a duplicate for ever."""
    new = world.delivery()
    world.store.inbox.record(new, skip="event_unknown")
    world.clock.advance(timedelta(days=400))
    assert world.store.retention.sweep(AGES)["delivery_bodies"] >= 1
    assert world.store.inbox.record(new).outcome == "duplicate"


def test_a_sweep_is_bounded_and_the_next_one_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention_module, "BATCH", 2)
    monkeypatch.setattr(retention_module, "MOST_BATCHES", 2)
    for _ in range(7):
        world.store.inbox.record(world.delivery(), skip="event_unknown")
    world.clock.advance(timedelta(days=91))
    counts = [world.store.retention.sweep(AGES)["delivery_bodies"] for _ in range(4)]
    assert counts[0] == 4 and sum(counts) >= 7 and counts[-1] == 0


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "encryption.key"
    file.write_text(Cipher.new_key_file())
    file.chmod(0o600)
    return file


def test_after_a_rotation_old_and_new_processes_open_everything_and_old_keys_go(database: Database, key_file: Path) -> None:
    with database.store.database.system() as connection:  # what this module's other tests sealed with keys of their own
        connection.execute(text("update sessions set callback_token = null"))
    old = Store(database.logins["app"], database.logins["system"], Cipher.from_file(key_file), database.clock)
    world = World(old, database.clock)
    _, before = world.launched()
    key_file.write_text(Cipher.rotated(key_file.read_text()))
    new = Store(database.logins["app"], database.logins["system"], Cipher.from_file(key_file), database.clock)
    assert new.keys.reseal() == 1 and new.keys.reseal() == 0
    current, ids = Cipher.key_ids(key_file.read_text())
    assert new.keys.in_use() == {current} and len(ids) == 2
    held = world.session_claim(before)
    assert held.callback_token, "the old process read the new key when it met it"
    third = Cipher.rotated(key_file.read_text())
    key_file.write_text(third)
    newest = Store(database.logins["app"], database.logins["system"], Cipher.from_file(key_file), database.clock)
    newest.keys.reseal()
    key_file.write_text(Cipher.pruned(key_file.read_text(), newest.keys.in_use()))
    left = Cipher.key_ids(key_file.read_text())[1]
    assert left == [ids[0], Cipher.key_ids(third)[0]], "the middle key is forgotten, the first one derives the markers"
    assert Cipher.from_file(key_file).derive("markers") == old.cipher.derive("markers")
    for one in (old, new, newest):
        one.database.dispose()


def test_a_value_of_a_forgotten_key_or_another_row_is_refused(key_file: Path) -> None:
    cipher = Cipher.from_file(key_file)
    sealed = cipher.seal("secret", "callback:1")
    assert b"secret" not in sealed and cipher.open(sealed, "callback:1") == "secret"
    with pytest.raises(CipherError):
        cipher.open(sealed, "callback:2")
    held = json.loads(Cipher.new_key_file())
    with pytest.raises(CipherError):
        Cipher({name: bytes.fromhex(key) for name, key in held["keys"].items()}, held["current"]).open(sealed, "callback:1")
