"""Each process by itself, on as many machines as there are: `run`, `probe`, `init`, `bundle`.

The processes are the supervisor's: same argv, same environment, same readiness. What an orchestrator adds is here: which secrets a
process needs, where it gets them, and whether it fits the database before it starts. Does not belong here: what the processes do.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from json import dumps, loads
from pathlib import Path

import click
from sqlalchemy import URL, make_url

from kilo_pipelines.cli import setup, supervisor
from kilo_pipelines.cli.common import as_json, end, show
from kilo_pipelines.settings import Settings, SettingsError, private_dir, write_secret
from kilo_pipelines.store import DatabaseAwayError, Store
from kilo_pipelines.store.crypto import CipherError
from kilo_pipelines.store.migrate import SchemaError, chosen_logins, read_logins, refusal

# Leases are moments of one host's clock that another one's compares: beyond a fifth of the lease they aren't the same moments.
SKEW_SHARE = 0.2
# Dagster's own check loads Dagster, which takes seconds on a busy machine.
LIVENESS_SECONDS = 25


@dataclass(frozen=True)
class Role:
    """What one process needs of `secrets/`, besides `origin`; `logins` are the entries of database.json."""

    secrets: tuple[str, ...] = ()
    logins: tuple[str, ...] = ()


_ENGINE = ("app", "system", "dagster")
# To the outside: a run worker reads and writes at providers, sends mail and messages.
_WORKER = Role(
    (
        "encryption.key",
        "broker-password",
        "github-app.pem",
        "smtp-password",
        "slack-token",
        "cloud-agent-token",
        "cloud-agent-internal-key",
        "otlp-headers",
    ),
    _ENGINE,
)
_DAGSTER = Role(("encryption.key", "broker-password", "otlp-headers"), _ENGINE)

ROLES: dict[str, Role] = {
    "ingress": Role(
        ("encryption.key", "github-webhook-secret", "operator-password", "oidc-client-secret", "otlp-headers", "metrics-token"),
        ("app", "system"),
    ),
    "model-proxy": Role(("model-api-key", "otlp-headers")),
    "dagster-code": _DAGSTER,
    "dagster-daemon": _DAGSTER,
    "dagster-ui": _DAGSTER,
    "worker-dispatch": _WORKER,
    "worker-maintenance": _WORKER,
    "worker-agents": _WORKER,
}
# The one that makes and changes tables; it runs and ends.
INIT = Role(
    ("encryption.key", "broker-password", "operator-password", "metrics-token", "database-admin-url"),
    ("migrator", "app", "system", "dagster"),
)


def child_of(settings: Settings, name: str) -> supervisor.Child:
    """The process as the supervisor would start it."""
    outer = {child.name: child for child in supervisor.outer_processes(settings)}
    return outer.get(name) or next(child for child in supervisor.dagster_processes(settings) if child.name == name)


def adopt_secrets(settings: Settings) -> None:
    """Copies what the orchestrator mounted into the home, mode 0600: mounts have modes and owners of their own."""
    if settings.secrets_from is None:
        return
    private_dir(settings.home)
    for path in sorted(settings.secrets_from.iterdir()):
        if path.is_file():
            write_secret(settings.secrets_dir / path.name, path.read_text())


def check_database(settings: Settings, store: Store) -> None:
    """SchemaError, SettingsError when this process doesn't fit the database: its schema's revision, its clock, its login's rights."""
    store.database.check_roles()
    revision, database_now = store.database.schema()
    why = refusal(revision)
    if why is not None:
        raise SchemaError(why)
    skew = abs((datetime.now(UTC) - database_now).total_seconds())
    if skew > settings.lease_seconds * SKEW_SHARE:
        raise SettingsError(
            f"clock_skew: this host's clock and the database's are {skew:.1f} s apart, at most"
            f" {settings.lease_seconds * SKEW_SHARE:.1f} s are safe: synchronise both (NTP)"
        )


@click.command()
@click.argument("name", type=click.Choice(list(ROLES)))
def run(name: str) -> None:
    """Becomes one process of the platform, for systemd, containers and further machines; `up` starts all of them on one."""
    settings = Settings()
    try:
        adopt_secrets(settings)
        for directory in (settings.home, settings.home / "run", settings.sockets):
            private_dir(directory)
        setup.refuse_mixed_worlds(settings)
        if ROLES[name].logins:
            store = setup.open_store(settings)
            check_database(settings, store)
            store.database.dispose()
        child = child_of(settings, name)
    except DatabaseAwayError:
        end(False, "the database doesn't answer")
    except (SchemaError, SettingsError, CipherError, supervisor.SupervisorError, ValueError, OSError) as failure:
        end(False, str(failure))
    _role_file(settings).write_text(name)
    if child.socket is not None:
        child.socket.unlink(missing_ok=True)
    os.chdir(supervisor.checkout())
    os.execve(child.argv[0], child.argv, supervisor.environment(settings, child.inherits, name) | child.env)  # noqa: S606  # no shell is wanted


def _role_file(settings: Settings) -> Path:
    """Which process this home's `run` became last."""
    return settings.home / "run" / "role"


@click.command()
@click.argument("name", type=click.Choice(list(ROLES)), required=False)
def probe(name: str | None) -> None:
    """Exit status 0 when that process of this home answers (default: the one that `run` became); workers answer nobody and are well."""
    settings = Settings()
    if name is None and not _role_file(settings).exists():
        end(False, "nothing was started in this home by `run`")
    name = name or _role_file(settings).read_text()
    if name == "dagster-daemon":
        argv = [str(Path(sys.executable).parent / name), "liveness-check"]
        env = supervisor.environment(settings, True) | supervisor.dagster_environment(settings)
        done = subprocess.run(
            argv, env=env, cwd=supervisor.checkout(), capture_output=True, timeout=LIVENESS_SECONDS, check=False
        )
        sys.exit(1 if done.returncode else 0)
    sys.exit(0 if child_of(settings, name).ready() else 1)


@click.command()
@as_json
def init(plain: bool) -> None:
    """Prepares a given database (logins, schema, Dagster's tables) and missing secrets, starts nothing, and may be repeated."""
    settings = Settings()
    started = time.monotonic()
    try:
        adopt_secrets(settings)
        setup.refuse_mixed_worlds(settings)
        admin_url = settings.given_database()
        if admin_url is None:
            end(
                plain,
                f"set KILO_DATABASE_URL or write it to {settings.database_admin_file}; `up` prepares an embedded database itself",
            )
        for directory in (settings.home, settings.home / "run"):
            private_dir(directory)
        password = setup.prepare_secrets(settings)
        setup.prepare_database(settings, admin_url)
        store = setup.open_store(settings)
        check_database(settings, store)
        revision = store.database.schema()[0]
    except DatabaseAwayError:
        end(plain, "the database doesn't answer")
    except (SchemaError, SettingsError, CipherError, ValueError, OSError) as failure:
        end(plain, str(failure))
    took = round(time.monotonic() - started, 1)
    value = {"schema": revision, "seconds": took} | ({"operator_password": password} if password else {})
    shown = f"\noperator's password {password} (shown this once)" if password else ""
    show(plain, value, lambda: f"the database is ready: schema {revision}, {took} s{shown}")


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--database",
    envvar="KILO_DATABASE_URL",
    required=True,
    help="Administrator URL as the processes see it; without a password one is made, with one say it as KILO_DATABASE_URL.",
)
@as_json
def bundle(directory: Path, database: str, plain: bool) -> None:
    """Makes the secrets of a platform that an orchestrator runs: a directory for each process with what that one needs, no more.

    `secrets/` holds all of them: add github-app.pem, github-webhook-secret and model-api-key there and repeat the command.
    """
    admin = make_url(database)
    if admin.get_backend_name() != "postgresql" or not admin.host:
        end(plain, "--database: postgresql://user@host:port/postgres is needed", 2)
    settings = Settings(home=directory)
    try:
        private_dir(directory)
        password = setup.prepare_secrets(settings)
        _choose_database(settings, admin)
        for name, role in {**ROLES, "init": INIT}.items():
            _hand_out(settings.secrets_dir, directory / name, role)
        # What the broker's own image reads.
        write_secret(directory / "broker" / "auth.conf", f"requirepass {supervisor.broker_password(settings)}\n")
    except (SettingsError, OSError) as failure:
        end(plain, str(failure))
    value = {"directory": str(directory), "processes": [*ROLES, "init"]} | ({"operator_password": password} if password else {})
    shown = f"\noperator's password {password} (shown this once)" if password else ""
    show(plain, value, lambda: f"secrets lie in {directory}, a directory for each process{shown}")


def _choose_database(settings: Settings, admin: URL) -> None:
    """Passwords of the administrator, where the URL has none, and of our logins; those of an earlier time stay."""
    kept = settings.database_admin_file
    if admin.password is None:
        before = make_url(kept.read_text()).password if kept.exists() else None
        admin = admin.set(password=before or secrets.token_urlsafe(24))
    url = admin.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    write_secret(kept, url)
    logins = settings.secrets_dir / "database.json"
    write_secret(logins, dumps(chosen_logins(url, read_logins(logins))))
    # What the database's own image reads.
    write_secret(settings.home / "postgres" / "password", str(admin.password))


def _hand_out(source: Path, target: Path, role: Role) -> None:
    shutil.rmtree(target, ignore_errors=True)
    private_dir(target)
    for name in ("origin", *role.secrets):
        if (source / name).exists():
            write_secret(target / name, (source / name).read_text())
    if role.logins:
        logins = loads((source / "database.json").read_text())
        write_secret(target / "database.json", dumps({name: logins[name] for name in role.logins}))


COMMANDS = (run, probe, init, bundle)
