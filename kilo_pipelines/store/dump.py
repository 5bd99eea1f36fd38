"""Copies of both databases with PostgreSQL's own programs, and what is read of a copy before it is trusted.

Does not belong here: secrets and archives (cli/backup.py), what restored work means (handover.py).
"""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import psycopg
from sqlalchemy import URL, make_url

from kilo_pipelines.store.embedded import binaries

# Our own database first: what Dagster's knows of it is then never older than it is, and a run too many is a run that moved on.
DATABASES = ("kilo", "dagster")
# A program that says nothing for this long hangs; dumps of some GB take minutes.
SECONDS = 3600


class DumpError(Exception):
    """A database can't be copied or restored; the message says why."""


def dump(admin_url: str, names: dict[str, str], target: Path) -> tuple[str, datetime]:
    """Writes `<database>.dump` of both into `target`: the schema's revision of ours, and the moment whose state they hold.

    Both are read as they are at one moment (snapshots taken within milliseconds of each other), whatever is written meanwhile.
    `names` are the databases' names on the server. DumpError when the login may not read past row-level security, or a program fails.
    """
    admin = make_url(admin_url)
    with ExitStack() as held:
        snapshots = {}
        for which in DATABASES:
            connection = held.enter_context(psycopg.connect(_plain(admin, names[which])))
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            sees_all = connection.execute("select rolsuper or rolbypassrls from pg_roles where rolname = current_user").fetchone()
            if not sees_all or not sees_all[0]:
                raise DumpError("the administrator's login must be a superuser or have BYPASSRLS, or it would copy nobody's rows")
            row = connection.execute("select pg_export_snapshot()").fetchone()
            assert row is not None  # noqa: S101  # a function answers
            snapshots[which] = row[0]
            if which == "kilo":
                revision = connection.execute("select version_num from alembic_version").fetchone()
        taken_at = datetime.now(UTC)
        for which, snapshot in snapshots.items():
            _program(admin, "pg_dump", names[which], "--format=custom", f"--snapshot={snapshot}", f"--file={target / which}.dump")
    if revision is None:
        raise DumpError("the database has no schema yet: there is nothing to copy")
    return str(revision[0]), taken_at


def refuse_used(admin_url: str, names: dict[str, str]) -> None:
    """DumpError when one of the databases has tables already: a restore writes over nothing."""
    admin = make_url(admin_url)
    with psycopg.connect(_plain(admin, str(admin.database))) as connection:
        known = {row[0] for row in connection.execute("select datname from pg_database")}
    for name in sorted(known & set(names.values())):
        with psycopg.connect(_plain(admin, name)) as connection:
            tables = connection.execute("select count(*) from pg_tables where schemaname = 'public'").fetchone()
        if tables and tables[0]:
            raise DumpError(f"the database {name} has tables already: restore into another server, or drop it first")


def load(admin_url: str, names: dict[str, str], source: Path) -> None:
    """Restores both copies into the empty databases that `provision` made; each wholly or not at all. DumpError."""
    admin = make_url(admin_url)
    for which in DATABASES:
        _program(admin, "pg_restore", names[which], "--exit-on-error", "--single-transaction", str(source / f"{which}.dump"))


def _plain(admin: URL, database: str) -> str:
    return admin.set(drivername="postgresql", database=database).render_as_string(hide_password=False)


def _program(admin: URL, program: str, database: str, *arguments: str) -> None:
    """One of PostgreSQL's programs; the password goes by the environment, where no process list shows it."""
    address = admin.set(drivername="postgresql", database=database)._replace(password=None).render_as_string()
    env = {"PATH": os.environ.get("PATH", ""), "PGPASSWORD": admin.password or "", "PGCONNECT_TIMEOUT": "10", "LC_ALL": "C"}
    done = subprocess.run(
        [str(binaries() / program), f"--dbname={address}", *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if done.returncode:
        raise DumpError(f"{program} of {database} failed: {done.stderr.strip()[-500:]}")
