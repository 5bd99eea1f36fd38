"""Connections: the application's login under an owner's scope, the system login for the engine's own statements."""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg
import sqlalchemy as sa
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.exc import OperationalError

from kilo_pipelines import failpoints
from kilo_pipelines.store import system_statements as system

# A machine that is cut off from its database must notice before a lease (15 s) is over, or it would wait in a call while somebody else
# does its work: unanswered bytes are given up after 8 s, a silent peer is asked after 5 s and given up after 9 s. Unix sockets
# know none of this and take no notice.
CONNECTION = {
    "connect_timeout": 5,
    "tcp_user_timeout": 8_000,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 2,
}
POOL_SIZE = 5  # a process runs one op or a handful of requests at once
MAX_OVERFLOW = 15


# What every call raises while the database doesn't answer.
DatabaseAwayError = OperationalError


class RoleError(Exception):
    """The application's login could see past row-level security; the platform refuses to start."""


class Database:
    """Two pools, one a login; opened at first use."""

    def __init__(self, app_url: str, system_url: str) -> None:
        self._app = _engine(app_url)
        self._system = _engine(system_url)

    @contextmanager
    def owner(self, owner_id: UUID) -> Iterator[Connection]:
        """A transaction that sees one owner's rows only."""
        with self._app.begin() as connection:
            connection.execute(text("select set_config('kilo.owner_id', :owner, true)"), {"owner": str(owner_id)})
            yield connection
            failpoints.reach("before")
        failpoints.reach("after")

    @contextmanager
    def snapshot(self, owner_id: UUID, statement_seconds: float) -> Iterator[Connection]:
        """The same for reading only: every statement sees the database as the first one did, and ends after `statement_seconds`."""
        reading = self._app.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        with reading.begin() as connection:
            connection.execute(
                text("select set_config('kilo.owner_id', :owner, true), set_config('statement_timeout', :limit, true)"),
                {"owner": str(owner_id), "limit": str(round(statement_seconds * 1000))},
            )
            yield connection

    @contextmanager
    def system(self) -> Iterator[Connection]:
        """A transaction of the engine itself: claims, recovery, lookups before the owner is known."""
        with self._system.begin() as connection:
            yield connection
            failpoints.reach("before")
        failpoints.reach("after")

    @contextmanager
    def scope(self, owner_id: UUID | None) -> Iterator[Connection]:
        """`owner` where one is known, else `system`: for lists that people read of one owner or of all."""
        with self.system() if owner_id is None else self.owner(owner_id) as connection:
            yield connection

    @contextmanager
    def system_statement(self) -> Iterator[Connection]:
        """The same for one statement, which is a transaction of its own: BEGIN and COMMIT would be two more round trips."""
        with self._system.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            failpoints.reach("before")
            yield connection
        failpoints.reach("after")

    @contextmanager
    def listener(self, *channels: str) -> Iterator[Listener]:
        """A connection that hears these channels; nothing that is sent after this call is missed."""
        url = self._system.url.set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(url, autocommit=True, **CONNECTION) as connection:  # type: ignore[arg-type]  # libpq's words
            for channel in channels:
                connection.execute(f"listen {channel}")  # names of ours
            yield Listener(connection)

    def check_roles(self) -> None:
        """RoleError when the application's login is a superuser, bypasses policies, or is or may become a table's owner (threats, rule 17)."""
        with self._app.begin() as connection:
            row = connection.execute(
                text(
                    "select r.rolsuper, r.rolbypassrls, exists (select 1 from pg_class c where c.relkind in ('r', 'p')"
                    " and c.relnamespace = 'public'::regnamespace and pg_has_role(r.oid, c.relowner, 'member')) from pg_roles r where r.rolname = current_user"
                )
            ).one()
        if any(row):
            raise RoleError(
                "the application's database login must be neither superuser nor BYPASSRLS nor a member of a table's owner"
            )

    def schema(self) -> tuple[str, datetime]:
        """The schema's revision, and what the database's clock says."""
        with self.system() as connection:
            row = one(connection, system.SCHEMA_REVISION.sql)
        assert row is not None  # noqa: S101  # alembic keeps one row
        return row["revision"], row["now"]

    def dispose(self) -> None:
        """Closes both pools."""
        self._app.dispose()
        self._system.dispose()


class Listener:
    """Waits for notifications."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        # Several notifications may arrive in one packet; those behind the first wait here.
        self._heard: deque[str] = deque()

    def wait(self, seconds: float) -> str | None:
        """The channel of the first notification within `seconds`, None after a quiet wait.

        Everything that has arrived is taken at once, a channel counts once, and none is lost: behind a burst of work a stop is heard
        with the next call.
        """
        deadline = time.monotonic() + seconds
        while not self._heard and (left := deadline - time.monotonic()) > 0:
            self._take(0)
            if not self._heard:
                select.select([self._connection.fileno()], [], [], left)
                self._take(0.01)
        return self._heard.popleft() if self._heard else None

    def _take(self, seconds: float) -> None:
        for notice in self._connection.notifies(timeout=seconds):
            if notice.channel not in self._heard:
                self._heard.append(notice.channel)


def _engine(url: str) -> Engine:
    return create_engine(
        url,
        pool_size=POOL_SIZE,
        max_overflow=MAX_OVERFLOW,
        pool_pre_ping=True,
        hide_parameters=True,
        connect_args=dict(CONNECTION),
    )


def one(connection: Connection, sql: str, **values: Any) -> Any | None:
    """The first row of a statement as a mapping, or None."""
    return connection.execute(text(sql), values).mappings().first()


def rows(connection: Connection, sql: str, **values: Any) -> list[Any]:
    """All rows of a statement as mappings."""
    return list(connection.execute(text(sql), values).mappings())


def changed(connection: Connection, sql: str, **values: Any) -> int:
    """How many rows a statement changed."""
    result: sa.CursorResult[Any] = connection.execute(text(sql), values)
    return result.rowcount


def notify(connection: Connection, what: str) -> None:
    """Wakes the sensors at commit; the payload is a kind and an id, nothing else."""
    connection.execute(text(system.NOTIFY.sql), {"what": what})


def count_late_write(connection: Connection, name: str) -> None:
    """A write of somebody whose fence is over changed nothing; it is counted (invariant 3)."""
    connection.execute(text(system.COUNT.sql), {"name": f"late_write:{name}"})
