"""Logins (threats, rules 17 and 18): what each may reach, and the start-up check by breaking the roles."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import make_url, text
from sqlalchemy.exc import OperationalError, ProgrammingError

from kilo_pipelines.store.database import Database as Connections
from kilo_pipelines.store.database import RoleError
from kilo_pipelines.store.migrate import provision
from tests.conftest import Database


def test_neither_login_empties_a_table_or_changes_the_schema(database: Database) -> None:
    for engine in (database.store.database._app, database.store.database._system):
        for statement in (
            "truncate work_items",
            "drop table reviews",
            "create table mine (id int)",
            "alter table effects disable row level security",
        ):
            with pytest.raises(ProgrammingError), engine.begin() as connection:
                connection.execute(text(statement))


def test_logins_reach_their_own_database_only(database: Database) -> None:
    kilo, dagster = make_url(database.logins["app"]), make_url(database.logins["dagster"])
    for login, foreign in ((kilo, dagster.database), (dagster.set(drivername="postgresql+psycopg"), kilo.database)):
        engine = sa.create_engine(login.set(database=foreign))
        with pytest.raises(OperationalError, match="permission denied"), engine.connect():
            pass
        engine.dispose()


@dataclass
class Breakable:
    """A role of its own, so that breaking it harms no other test."""

    admin: psycopg.Connection[tuple[object, ...]]
    name: str
    connections: Connections


@pytest.fixture
def role(database: Database, postgres_admin: str) -> Iterator[Breakable]:
    name, password = f"t_{secrets.token_hex(4)}", secrets.token_hex(8)
    url = make_url(database.logins["app"])
    admin_url = postgres_admin.replace("+psycopg", "")
    with psycopg.connect(admin_url, autocommit=True, dbname=url.database or "") as admin:
        admin.execute(f"create role {name} login password '{password}'".encode())
        admin.execute(f'grant connect on database "{url.database}" to {name}'.encode())
        mine = url.set(username=name, password=password).render_as_string(hide_password=False)
        connections = Connections(mine, mine)
        yield Breakable(admin, name, connections)
        connections.dispose()
        admin.execute(f"alter table if exists switches owner to kilo_migrator; drop owned by {name}; drop role {name}".encode())


@pytest.mark.parametrize(
    "breakage",
    ["alter role {0} superuser", "alter role {0} bypassrls", "grant kilo_migrator to {0}", "alter table switches owner to {0}"],
)
def test_start_up_refuses_a_login_that_sees_past_the_policies(role: Breakable, breakage: str) -> None:
    role.connections.check_roles()
    role.admin.execute(breakage.format(role.name).encode())
    with pytest.raises(RoleError):
        role.connections.check_roles()


def test_provisioning_again_keeps_the_logins_and_sends_no_password(database: Database, postgres_admin: str) -> None:
    """A statement that fails is logged by the server; it must hold a verifier and nothing that logs in."""
    sent: list[str] = []

    def listen(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        sent.append(statement)

    sa.event.listen(sa.engine.Engine, "before_cursor_execute", listen)
    try:
        suffix = str(make_url(database.logins["app"]).database).removeprefix("kilo")
        again = provision(postgres_admin, database.logins, suffix=suffix)
    finally:
        sa.event.remove(sa.engine.Engine, "before_cursor_execute", listen)
    assert again == database.logins
    passwords = [str(make_url(url).password) for url in again.values()]
    assert any("SCRAM-SHA-256$" in statement for statement in sent)
    assert not [statement for statement in sent for password in passwords if password in statement]
    engine = sa.create_engine(again["app"])
    with engine.connect() as connection:
        assert connection.execute(text("select current_user")).scalar_one() == "kilo_app"
    engine.dispose()
