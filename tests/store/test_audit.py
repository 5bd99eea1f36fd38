"""The audit chain: whatever is changed, removed, slipped in or cut off after its seal is found, with the seal that it broke."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.resources.upkeep import export_heads, read_heads
from tests.conftest import Database
from tests.support.store import World
from tests.support.two import connect


@pytest.fixture
def admin(database: Database, postgres_admin: str) -> Iterator[psycopg.Connection[Any]]:
    """Somebody who writes to the database past the platform."""
    with connect(database, postgres_admin) as connection:
        yield connection


@pytest.fixture
def heads(world: World, tmp_path: Path) -> dict[int, str]:
    """Two fresh seals with several events of two owners, exported with all before them."""
    other = World(world.store, world.clock)
    for _ in range(2):
        for one in (world, other):
            item = one.item()
            world.store.queue.cancel(item, reason="user_cancelled", actor="grace")
        assert world.store.audit.seal() is not None
    file = tmp_path / "audit" / "heads.log"
    export_heads(world.store, file)
    return read_heads(file)


def test_an_untouched_chain_holds_and_nothing_is_sealed_twice(world: World, heads: dict[int, str], tmp_path: Path) -> None:
    assert world.store.audit.verify(heads) is None and world.store.audit.unsealed() == 0
    assert world.store.audit.seal() is None, "an empty hour makes no seal"
    assert export_heads(world.store, tmp_path / "audit" / "heads.log") == []
    assert len(heads) == len(world.store.audit.seals())


TAMPERING = {
    "an actor is changed": ("update audit_events set actor = 'mallory' where seal = {n}", Reason.AUDIT_EVENTS_CHANGED),
    "a fact is changed": ("update audit_events set data = '{{}}' where seal = {n}", Reason.AUDIT_EVENTS_CHANGED),
    "a time is changed": (
        "update audit_events set at = at + interval '1 microsecond' where seal = {n}",
        Reason.AUDIT_EVENTS_CHANGED,
    ),
    "an event is removed": (
        "delete from audit_events where id = (select min(id) from audit_events where seal = {n})",
        Reason.AUDIT_EVENTS_CHANGED,
    ),
    "an event is slipped in": (
        "insert into audit_events (owner_id, at, actor, action, subject, seal) select owner_id, at, actor, action, 'forged', seal"
        " from audit_events where seal = {n} limit 1",
        Reason.AUDIT_EVENTS_CHANGED,
    ),
    "an event is taken out of its seal": ("update audit_events set seal = null where seal = {n}", Reason.AUDIT_EVENTS_CHANGED),
    "a seal's digest is changed": (
        "update audit_seals set events = repeat('0', 64) where number = {n}",
        Reason.AUDIT_EVENTS_CHANGED,
    ),
    "a seal's head is changed": ("update audit_seals set head = repeat('0', 64) where number = {n}", Reason.AUDIT_CHAIN_BROKEN),
    "a seal's time is changed": (
        "update audit_seals set sealed_at = sealed_at - interval '1 day' where number = {n}",
        Reason.AUDIT_CHAIN_BROKEN,
    ),
}


@pytest.mark.parametrize("name", TAMPERING)
def test_tampering_is_found_with_its_seal(world: World, heads: dict[int, str], admin: psycopg.Connection[Any], name: str) -> None:
    sql, reason = TAMPERING[name]
    number = max(heads) - 1
    with admin.transaction(force_rollback=False):
        before = admin.execute("select * from audit_events").fetchall(), admin.execute("select * from audit_seals").fetchall()
        admin.execute(sql.format(n=number).encode())
    broken = world.store.audit.verify(heads)
    _restore(admin, *before)
    assert broken is not None and (broken.seal, broken.reason) == (number, reason)
    assert world.store.audit.verify(heads) is None


def _restore(admin: psycopg.Connection[Any], events: list[Any], seals: list[Any]) -> None:
    admin.execute("truncate audit_events")
    admin.execute("truncate audit_seals")
    columns = [one.name for one in admin.execute("select * from audit_events").description or []]
    with admin.cursor() as cursor:
        cursor.executemany(
            f"insert into audit_events ({', '.join(columns)}) overriding system value values ({', '.join(['%s'] * len(columns))})".encode(),
            [tuple(psycopg.types.json.Jsonb(value) if isinstance(value, dict) else value for value in row) for row in events],
        )
        cursor.executemany(b"insert into audit_seals values (%s, %s, %s, %s, %s, %s)", seals)


def test_a_chain_written_anew_is_found_by_its_exported_heads(
    world: World, heads: dict[int, str], admin: psycopg.Connection[Any]
) -> None:
    """Whoever may do everything in the database can recompute every digest; the heads outside don't follow."""
    before = admin.execute("select * from audit_events").fetchall(), admin.execute("select * from audit_seals").fetchall()
    admin.execute("update audit_events set actor = 'mallory', seal = null")
    admin.execute("truncate audit_seals")
    assert world.store.audit.seal() is not None
    assert world.store.audit.verify({}) is None, "by itself the new chain is sound"
    broken = world.store.audit.verify(heads)
    _restore(admin, *before)
    assert broken is not None and broken.reason == Reason.AUDIT_HEAD_DIFFERS


def test_a_chain_that_was_cut_is_found(world: World, heads: dict[int, str], admin: psycopg.Connection[Any]) -> None:
    before = admin.execute("select * from audit_events").fetchall(), admin.execute("select * from audit_seals").fetchall()
    admin.execute("delete from audit_events where seal = %s", (max(heads),))
    admin.execute("delete from audit_seals where number = %s", (max(heads),))
    broken = world.store.audit.verify(heads)
    _restore(admin, *before)
    assert broken is not None and (broken.seal, broken.reason) == (max(heads), Reason.AUDIT_CHAIN_CUT)


def test_an_event_that_commits_late_belongs_to_the_next_seal(
    world: World, heads: dict[int, str], admin: psycopg.Connection[Any]
) -> None:
    """Its id and time are older than the seal; its absence there must not look like tampering, and it must not stay outside."""
    with psycopg.connect(admin.info.dsn, password=admin.info.password) as slow:
        slow.execute(
            "insert into audit_events (owner_id, at, actor, action, subject) values (%s, %s, 'slow', 'late', 'x')",
            (world.owner.id, world.clock.now()),
        )
        world.store.queue.cancel(world.item(), reason="user_cancelled", actor="grace")
        first = world.store.audit.seal()
        slow.commit()
    second = world.store.audit.seal()
    assert first is not None and second is not None and second.count == 1
    assert world.store.audit.verify(heads) is None


def test_two_sealers_make_one_chain(world: World, heads: dict[int, str]) -> None:
    for _ in range(20):
        world.store.queue.cancel(world.item(), reason="user_cancelled", actor="grace")
    threads = [threading.Thread(target=world.store.audit.seal) for _ in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert world.store.audit.verify(heads) is None and world.store.audit.unsealed() == 0


def test_a_head_whose_export_a_crash_prevented_is_exported_next_time(world: World, tmp_path: Path) -> None:
    world.store.queue.cancel(world.item(), reason="user_cancelled", actor="grace")
    file = tmp_path / "audit" / "heads.log"
    seal = world.store.audit.seal()
    assert seal is not None and read_heads(file) == {}
    assert export_heads(world.store, file)[-1] == seal and file.stat().st_mode & 0o777 == 0o600
    assert read_heads(file)[seal.number] == seal.head
