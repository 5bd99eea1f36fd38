"""Work goes from one set of processes to another: over an upgrade, out of a backup, away from hosts that are gone."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from alembic import command
from sqlalchemy import create_engine, text

from kilo_pipelines.cli import roles
from kilo_pipelines.core.effects import EffectIntent, EffectKind
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.settings import Settings, SettingsError
from kilo_pipelines.store import Claimed, SessionClaim, migrate
from kilo_pipelines.store.migrate import SchemaError, head
from tests.conftest import Database, made_database
from tests.support.store import World


def _revision(database: Database, word: str) -> None:
    engine = create_engine(database.logins["migrator"])
    with engine.begin() as connection:
        if word == "-1":
            command.downgrade(migrate._config(connection), word)
        else:
            connection.execute(text("update alembic_version set version_num = :word"), {"word": word})
    engine.dispose()


def test_a_waiting_item_goes_on_over_an_upgrade_that_waits_until_nobody_of_the_old_program_is_connected(
    postgres_admin: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "ALONE_SECONDS", 0.3)
    with made_database(postgres_admin, tmp_path_factory) as database:
        world = World(database.store, database.clock)
        item = world.item()
        database.store.database.dispose()
        _revision(database, "-1")
        with (
            psycopg.connect(database.logins["app"].replace("+psycopg", "")),
            pytest.raises(SchemaError, match=r"1 connections .* drain and stop"),
        ):
            migrate.migrate(database.logins["migrator"])
        monkeypatch.setattr(migrate, "ALONE_SECONDS", 10)
        migrate.migrate(database.logins["migrator"])
        assert database.store.database.schema()[0] == head()
        assert [offer.ids for offer in database.store.queue.offers(10)] == [[item]] and isinstance(world.claim(item), Claimed)
        migrate.migrate(database.logins["migrator"])  # nothing to change: no reason to wait for anybody


@pytest.mark.parametrize(
    ("revision", "why"), [("0011", "run `kilo-pipelines init` first"), ("9999", "newer than this program's")]
)
def test_a_process_that_does_not_fit_the_database_does_not_start(
    database: Database, tmp_path: Path, revision: str, why: str
) -> None:
    settings = Settings(home=tmp_path)
    roles.check_database(settings, database.store)
    _revision(database, revision)
    try:
        with pytest.raises(SchemaError, match=why):
            roles.check_database(settings, database.store)
        if revision == "9999":
            with pytest.raises(SchemaError, match=why):
                migrate.migrate(database.logins["migrator"])
    finally:
        _revision(database, head())


def test_a_host_whose_clock_is_elsewhere_does_not_start(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(roles.datetime):
        @classmethod
        def now(cls, tz: object = None) -> roles.datetime:
            return super().now(tz) - timedelta(seconds=5)  # type: ignore[arg-type]

    monkeypatch.setattr(roles, "datetime", Late)
    with pytest.raises(SettingsError, match="clock_skew"):
        roles.check_database(Settings(home=tmp_path), database.store)


def test_after_a_restore_old_hands_hold_nothing_recovery_goes_on_and_no_message_is_sent_twice(world: World) -> None:
    store, clock = world.store, world.clock
    claim, held = world.running()
    starting = world.claim(world.item(), lease=3600)
    mail = EffectIntent(kind=EffectKind.NOTICE_EMAIL, intent_key="mail", subject_key="mail", payload={})
    comment = EffectIntent(kind=EffectKind.GITHUB_SUMMARY_COMMENT, intent_key="comment", subject_key="comment", payload={})
    done, session = world.launched()
    ended = world.session_claim(session)
    assert isinstance(ended, SessionClaim) and store.sessions.finish(ended, status="completed", reason=None, result={})
    with store.settlements.open(done.item_id) as tx:
        assert tx is not None
        tx.conclude(state="completed", reason="reviewed", verdict={}, evidence=None, effects=[mail, comment])
    try:
        assert store.handover.restored(clock.now())["unknown"] == 1
        assert {one["kind"]: (one["state"], one["reason"]) for one in store.outbox.of_item(done.item_id)} == {
            EffectKind.NOTICE_EMAIL: ("unknown", Reason.RESTORED),
            EffectKind.GITHUB_SUMMARY_COMMENT: ("pending", None),
        }
        assert "restored from a backup" in (store.queue.pause_reason() or "")
        # The lost platform, should it still speak to this database.
        assert store.sessions.beat(held, 30) == "lost"
        assert not store.sessions.finish(held, status="completed", reason=None, result={})
        assert not store.queue.release(starting, not_before=clock.now(), reason="x")
        assert store.handover.busy() == {"claims": 0, "sessions": 0, "effects": 0}
        store.recovery.reap()
        again = store.sessions.get(held.session_id)
        assert again is not None and (again.state, again.reason) == ("queued", Reason.WORKER_LOST)
        assert (world.state(starting.item_id), world.state(claim.item_id)) == ("waiting", "running")
    finally:
        store.queue.unswitch("all")
    fresh = world.session_claim(held.session_id)
    assert isinstance(fresh, SessionClaim) and fresh.fence > held.fence + 100


def test_nothing_is_offered_for_a_host_that_is_silent_and_its_places_come_back_with_it(world: World) -> None:
    store, clock = world.store, world.clock
    _, session = world.launched()

    def offered() -> bool:
        return any(offer.kind == "session" and offer.ids == [session] for offer in store.queue.offers(200))

    store.sessions.ensure_capacity(64)
    clock.advance(timedelta(seconds=91))
    assert not offered()
    store.sessions.ensure_capacity(64)
    assert offered()
    clock.advance(timedelta(seconds=25))
    store.sessions.ensure_capacity(0)
    assert not offered(), "the host took leave"
