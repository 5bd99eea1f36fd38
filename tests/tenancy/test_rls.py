"""Owner scope in the database (threats, rule 17): generated over every table from the catalogue."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

from kilo_pipelines.store import system_statements
from tests.conftest import Database
from tests.support.store import World

SHARED = {"api_keys", "agent_capacity", "counters", "switches", "alembic_version"}


@pytest.fixture(scope="module")
def two(database: Database) -> tuple[World, World]:
    """Two owners with work of every kind."""
    worlds = World(database.store, database.clock), World(database.store, database.clock)
    for one in worlds:
        one.running()
    return worlds


def _owner_tables(database: Database) -> list[str]:
    with database.store.database.system() as connection:
        names = connection.execute(
            text("select relname from pg_class where relkind = 'r' and relnamespace = 'public'::regnamespace")
        ).scalars()
        return [name for name in names if name not in SHARED]


def test_every_owner_table_forces_row_level_security_with_its_policies(database: Database) -> None:
    """A new table without policies fails here."""
    with database.store.database.system() as connection:
        for table in _owner_tables(database):
            flags = connection.execute(
                text("select relrowsecurity, relforcerowsecurity from pg_class where relname = :t"), {"t": table}
            ).one()
            policies = connection.execute(
                text("select permissive, roles::text from pg_policies where tablename = :t"), {"t": table}
            ).all()
            assert tuple(flags) == (True, True), table
            assert {("RESTRICTIVE", "{kilo_app}"), ("PERMISSIVE", "{kilo_app}"), ("PERMISSIVE", "{kilo_system}")} == {
                tuple(one) for one in policies
            }, table


def test_no_owner_sees_or_changes_anothers_rows(database: Database, two: tuple[World, World]) -> None:
    ours, theirs = two
    for table in _owner_tables(database):
        column = "id" if table == "owners" else "owner_id"
        with database.store.database.owner(ours.owner.id) as connection:
            foreign = connection.execute(
                text(f"select count(*) from {table} where {column} = :o"), {"o": theirs.owner.id}
            ).scalar()
            assert foreign == 0, table
        for statement in (
            f"update {table} set {column} = {column} where {column} = :o",
            f"delete from {table} where {column} = :o",
        ):
            with database.store.database.owner(ours.owner.id) as connection:
                try:
                    changed = connection.execute(text(statement), {"o": theirs.owner.id}).rowcount
                except ProgrammingError as refusal:
                    assert "permission denied" in str(refusal)
                    connection.rollback()
                else:
                    assert changed == 0, statement


def test_nobody_writes_a_row_for_another_owner(two: tuple[World, World]) -> None:
    ours, theirs = two
    with pytest.raises(ProgrammingError, match="row-level security"), ours.store.database.owner(ours.owner.id) as connection:
        connection.execute(text("insert into service_configs (owner_id, service) values (:o, 'forged')"), {"o": theirs.owner.id})


def test_without_an_owner_nothing_is_visible(database: Database, two: tuple[World, World]) -> None:
    del two
    app = database.store.database._app
    with app.begin() as connection:
        for table in _owner_tables(database):
            assert connection.execute(text(f"select count(*) from {table}")).scalar() == 0, table


def test_keys_between_owner_tables_carry_the_owner(database: Database) -> None:
    """A plain foreign key looks past policies: each one must be composite; each unique key must start with the owner."""
    with database.store.database.system() as connection:
        keys = connection.execute(
            text(
                "select c.conrelid::regclass::text, c.contype::text, array(select a.attname from unnest(c.conkey) with ordinality k(n, i)"
                " join pg_attribute a on a.attrelid = c.conrelid and a.attnum = k.n order by k.i) as columns, c.confrelid::regclass::text"
                " from pg_constraint c where c.contype in ('f', 'u', 'p') and c.connamespace = 'public'::regnamespace"
            )
        ).all()
    for table, kind, columns, target in keys:
        if table in SHARED or table == "owners":
            continue
        assert columns[0] == "owner_id", (table, kind, columns)
        assert kind != "f" or target == "owners" or len(columns) > 1, (table, columns)


def test_audit_events_can_only_be_added(two: tuple[World, World]) -> None:
    ours, _ = two
    for statement in ("update audit_events set actor = 'x'", "delete from audit_events", "truncate audit_events"):
        with pytest.raises(ProgrammingError, match="permission denied"), ours.store.database.owner(ours.owner.id) as connection:
            connection.execute(text(statement))


def test_every_system_statement_has_its_reason() -> None:
    assert len(system_statements.STATEMENTS) >= 20
    for name, statement in system_statements.STATEMENTS.items():
        assert len(statement.reason) > 20, name
