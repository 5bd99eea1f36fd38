"""Roles, databases and migrations. Idempotent: every start runs it."""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import psycopg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, make_url, text

ROLES = ("kilo_migrator", "kilo_app", "kilo_system", "kilo_dagster")
MIGRATIONS = Path(__file__).parent / "migrations"
# Words of the administrator's URL that every login's URL takes over: where the server is, and how it proves who it is.
_KEPT = ("host", "sslmode", "sslrootcert", "sslcert", "sslkey", "channel_binding")
# A machine that vanished in a transaction must not hold its locks until the kernel gives up after hours: its connections end within
# half a minute, and a transaction of ours that waits for anything but the database for a minute has lost its process.
_PATIENCE = {
    "tcp_keepalives_idle": "10s",
    "tcp_keepalives_interval": "5s",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "25s",
    "idle_in_transaction_session_timeout": "60s",
}
# Any number that nobody else locks: two starts at once migrate one after the other.
MIGRATION_LOCK = 5_413_190_811
# A command line that is just ending, a killed process whose server side hasn't noticed.
ALONE_SECONDS = 10.0


def provision(admin_url: str, known: dict[str, str] | None = None, *, suffix: str = "") -> dict[str, str]:
    """Makes the four logins and the two databases where they are missing; returns their URLs by login.

    `known` are the URLs of an earlier start: their passwords stay. `suffix` names other databases, for tests.
    """
    passwords = _passwords(known)
    engine = create_engine(admin_url, isolation_level="AUTOCOMMIT", hide_parameters=True)
    with engine.connect() as connection:
        connection.execute(text("select pg_advisory_lock(:lock)"), {"lock": MIGRATION_LOCK})
        for role, password in passwords.items():
            exists = connection.execute(text("select 1 from pg_roles where rolname = :role"), {"role": role}).first()
            verb = "alter" if exists else "create"
            # The server gets the verifier, made here: a statement that fails is written to logs, and no password may stand in it.
            # Role names are constants of ours and verifiers are base64 with separators: nothing to quote.
            connection.exec_driver_sql(
                f"{verb} role {role} login nosuperuser nobypassrls nocreatedb nocreaterole password '{_verifier(connection, role, password)}'"
            )
        for role in ("kilo_app", "kilo_system", "kilo_dagster"):
            for name, value in _PATIENCE.items():
                connection.exec_driver_sql(f"alter role {role} set {name} = '{value}'")
        for database, owner in ((f"kilo{suffix}", "kilo_migrator"), (f"dagster{suffix}", "kilo_dagster")):
            if not connection.execute(text("select 1 from pg_database where datname = :name"), {"name": database}).first():
                connection.execute(text(f'create database "{database}" owner {owner}'))
            connection.execute(text(f'revoke all on database "{database}" from public'))
        connection.execute(text(f'grant connect on database "kilo{suffix}" to kilo_app, kilo_system'))
        connection.execute(text("select pg_advisory_unlock(:lock)"), {"lock": MIGRATION_LOCK})
    engine.dispose()
    return _logins(admin_url, passwords, suffix)


def chosen_logins(admin_url: str, known: dict[str, str] | None = None) -> dict[str, str]:
    """The same URLs before there is a server: who provisions one with them as `known` makes their passwords true."""
    return _logins(admin_url, _passwords(known), "")


def _passwords(known: dict[str, str] | None) -> dict[str, str]:
    return {name: _password_of(known, name) or secrets.token_urlsafe(24) for name in ROLES}


def _logins(admin_url: str, passwords: dict[str, str], suffix: str) -> dict[str, str]:
    return {
        "migrator": _url(admin_url, "postgresql+psycopg", "kilo_migrator", passwords, f"kilo{suffix}"),
        "app": _url(admin_url, "postgresql+psycopg", "kilo_app", passwords, f"kilo{suffix}"),
        "system": _url(admin_url, "postgresql+psycopg", "kilo_system", passwords, f"kilo{suffix}"),
        "dagster": _url(admin_url, "postgresql+psycopg2", "kilo_dagster", passwords, f"dagster{suffix}"),
    }


def _verifier(connection: Connection, role: str, password: str) -> str:
    driver: psycopg.Connection[Any] = connection.connection.driver_connection  # type: ignore[assignment]  # the driver of our URL
    return driver.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256").decode()


def _password_of(known: dict[str, str] | None, role: str) -> str | None:
    url = (known or {}).get(role.removeprefix("kilo_"))
    return make_url(url).password if url else None


def _url(admin_url: str, driver: str, role: str, passwords: dict[str, str], database: str) -> str:
    base = make_url(admin_url)
    port = f":{base.port}" if base.port else ""
    kept = [f"{name}={quote(str(base.query[name]), safe='')}" for name in _KEPT if name in base.query]
    query = f"?{'&'.join(kept)}" if kept else ""
    return f"{driver}://{role}:{quote(passwords[role], safe='')}@{base.host or ''}{port}/{database}{query}"


class SchemaError(Exception):
    """Program and database don't fit together, or others work on the schema's old state; the message says what to do."""


def migrate(migrator_url: str) -> None:
    """Brings the schema of `kilo` to the newest revision, under an advisory lock.

    SchemaError when the database is newer than this program, or when processes of the platform are still connected while there is
    something to change: an older one would go on writing what it knows into tables that it doesn't (docs/decisions/0032).
    """
    engine = create_engine(migrator_url, hide_parameters=True)
    try:
        with engine.begin() as connection:
            connection.execute(text("select pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
            config = _config(connection)
            revision = MigrationContext.configure(connection).get_current_revision()
            if revision is not None:
                if fit(revision) == "newer":
                    raise SchemaError(refusal(revision))
                if fit(revision) == "older":
                    _alone(connection)
            command.upgrade(config, "head")
    finally:
        engine.dispose()


def _alone(connection: Connection) -> None:
    """Waits a little until no process of the platform is connected; SchemaError when one stays."""
    deadline = time.monotonic() + ALONE_SECONDS
    while True:
        connection.execute(text("select pg_stat_clear_snapshot()"))
        others = connection.execute(
            text(
                "select count(*) from pg_stat_activity where usename in ('kilo_app', 'kilo_system') and datname = current_database()"
            )
        ).scalar_one()
        if not others:
            return
        if time.monotonic() > deadline:
            raise SchemaError(
                f"{others} connections of the platform's processes are open, and the schema is to change: drain and stop them first"
                " (docs/deploy.md, Upgrade)"
            )
        time.sleep(0.25)


def head() -> str:
    """The schema's revision that this program works with."""
    revision = _scripts().get_current_head()
    assert revision is not None  # noqa: S101  # there are migrations
    return revision


def fit(revision: str) -> Literal["equal", "older", "newer"]:
    """How a database of this revision stands to this program: one that the program has never heard of was made by a newer one."""
    scripts = _scripts()
    if revision == scripts.get_current_head():
        return "equal"
    return "older" if any(one.revision == revision for one in scripts.walk_revisions()) else "newer"


def refusal(revision: str) -> str | None:
    """Why this program doesn't work on a database of this revision, None when it does."""
    match fit(revision):
        case "older":
            return f"the database's schema is {revision}, this program works with {head()}: run `kilo-pipelines init` first"
        case "newer":
            return f"the database's schema is {revision}, which is newer than this program's {head()}: install the newer program"
        case _:
            return None


def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(MIGRATIONS))


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    return config


def read_logins(path: Path) -> dict[str, str] | None:
    """The logins of an earlier start, None at the first."""
    return json.loads(path.read_text()) if path.exists() else None
