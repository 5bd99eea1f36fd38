"""The embedded server itself: who may talk to it, and whether it stands up again after every kind of death."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from kilo_pipelines.store.crypto import Cipher, CipherError
from kilo_pipelines.store.embedded import EmbeddedPostgres


@pytest.fixture
def home() -> Iterator[Path]:
    """A home behind a private directory, as /root is; sockets need a short path."""
    private = Path(tempfile.mkdtemp(prefix="kilo-e-"))
    yield private
    shutil.rmtree(private, ignore_errors=True)


def _start(server: EmbeddedPostgres) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        server.command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd="/"
    )


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_it_listens_on_one_private_socket_asks_for_the_password_and_survives_a_kill(home: Path) -> None:
    server = EmbeddedPostgres(home / "pg", home / "s")
    server.prepare()
    assert _mode(home) == 0o700, "nobody's directories change their mode"
    assert _mode(server.home) == _mode(server.sockets) == 0o700
    process = _start(server)
    try:
        server.wait_ready(30)
        admin = server.admin_url.replace("+psycopg", "")
        with psycopg.connect(admin) as connection:
            settings = {name: connection.execute(f"show {name}".encode()).fetchone() for name in ("listen_addresses", "fsync")}
            connection.execute("create table kept (id int)")
            rules = connection.execute("select distinct auth_method from pg_hba_file_rules").fetchall()
        assert settings == {"listen_addresses": ("",), "fsync": ("on",)}
        assert rules == [("scram-sha-256",)]
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(f"postgresql://kilo_admin:wrong@/postgres?host={server.sockets}")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        assert (server.data / "postmaster.pid").exists(), "the dead server left its pid file"
        server.prepare()
        deadline = time.monotonic() + 20
        while True:  # for about a second the dead server may be taken for alive: the supervisor tries again
            process = _start(server)
            time.sleep(0.5)
            if process.poll() is None or time.monotonic() > deadline:
                break
        server.wait_ready(20)
        with psycopg.connect(admin) as connection:
            assert connection.execute("select count(*) from kept").fetchone() == (0,)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


def test_an_initdb_that_was_killed_half_way_is_made_again(home: Path) -> None:
    """It writes PG_VERSION first: what a killed one leaves looks like a cluster and never starts."""
    prepare = "import sys, pathlib; from kilo_pipelines.store.embedded import EmbeddedPostgres as E; E(*map(pathlib.Path, sys.argv[1:])).prepare()"
    child = subprocess.Popen(
        [sys.executable, "-c", prepare, str(home / "pg"), str(home / "s")],
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )
    deadline = time.monotonic() + 30
    while not list((home / "pg").glob("*/PG_VERSION")):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait(10)
    server = EmbeddedPostgres(home / "pg", home / "s")
    server.prepare()
    process = _start(server)
    try:
        server.wait_ready(20)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


def test_the_markers_key_stays_when_a_key_is_added() -> None:
    """Ids are random: the oldest key is the first of the file, not the smallest id. Comments of ours are found by this key."""
    old = Cipher({"ff000000": b"o" * 32}, "ff000000")
    both = Cipher({"ff000000": b"o" * 32, "00000001": b"n" * 32}, "00000001")
    assert old.derive("comment-markers") == both.derive("comment-markers")
    sealed = old.seal("secret", "row")
    assert both.open(sealed, "row") == "secret"
    for broken in (sealed[:-1] + b"x", both.seal("secret", "other row")):
        with pytest.raises(CipherError):
            both.open(broken, "row")


def test_a_key_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    key = tmp_path / "encryption.key"
    key.write_text(Cipher.new_key_file())
    key.chmod(0o640)
    with pytest.raises(CipherError, match="0600"):
        Cipher.from_file(key)


_MAKE = """
import sys, time
from kilo_pipelines.store import embedded
embedded.OS_USER = sys.argv[1]
while time.time() < float(sys.argv[2]):
    pass
print(embedded._os_user().pw_uid)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root makes users")
def test_the_first_servers_of_a_machine_agree_on_their_user() -> None:
    """Several at once, as the workers of a test run: a user that is made twice has two uids, and one server the wrong files."""
    for round_ in range(3):
        name, at = f"kilo-e-{os.getpid()}-{round_}", time.time() + 1.5
        made = [
            subprocess.Popen([sys.executable, "-c", _MAKE, name, str(at + place * 0.004)], stdout=subprocess.PIPE, text=True)
            for place in range(4)
        ]
        try:
            assert len({process.communicate(timeout=60)[0] for process in made}) == 1
            assert [process.returncode for process in made] == [0] * 4
        finally:
            subprocess.run(["userdel", name], check=False, capture_output=True)
