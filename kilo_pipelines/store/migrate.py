"""Roles, databases and migrations. Idempotent: every start runs it."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, make_url, text

ROLES = ("kilo_migrator", "kilo_app", "kilo_system", "kilo_dagster")
MIGRATIONS = Path(__file__).parent / "migrations"
# Any number that nobody else locks: two starts at once migrate one after the other.
MIGRATION_LOCK = 5_413_190_811


def provision(admin_url: str, known: dict[str, str] | None = None, *, suffix: str = "") -> dict[str, str]:
    """Makes the four logins and the two databases where they are missing; returns their URLs by login.

    `known` are the URLs of an earlier start: their passwords stay. `suffix` names other databases, for tests.
    """
    passwords = {name: _password_of(known, name) or secrets.token_urlsafe(24) for name in ROLES}
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
        for database, owner in ((f"kilo{suffix}", "kilo_migrator"), (f"dagster{suffix}", "kilo_dagster")):
            if not connection.execute(text("select 1 from pg_database where datname = :name"), {"name": database}).first():
                connection.execute(text(f'create database "{database}" owner {owner}'))
            connection.execute(text(f'revoke all on database "{database}" from public'))
        connection.execute(text(f'grant connect on database "kilo{suffix}" to kilo_app, kilo_system'))
        connection.execute(text("select pg_advisory_unlock(:lock)"), {"lock": MIGRATION_LOCK})
    engine.dispose()
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
    host = base.query.get("host")
    query = f"?host={quote(str(host), safe='')}" if host else ""
    return f"{driver}://{role}:{quote(passwords[role])}@{base.host or ''}{port}/{database}{query}"


def migrate(migrator_url: str) -> None:
    """Brings the schema of `kilo` to the newest revision, under an advisory lock."""
    engine = create_engine(migrator_url, hide_parameters=True)
    with engine.begin() as connection:
        connection.execute(text("select pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
        command.upgrade(_config(connection), "head")
    engine.dispose()


def newest_revision() -> str | None:
    """The revision of the schema that this version wants."""
    return ScriptDirectory(str(MIGRATIONS)).get_current_head()


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    return config


def read_logins(path: Path) -> dict[str, str] | None:
    """The logins of an earlier start, None at the first."""
    return json.loads(path.read_text()) if path.exists() else None
