"""`backup` and `restore`: both databases, secrets and what lies beside them in one file, into a home that has nothing yet.

The file is a tar: `manifest.json` (what, when, of which schema, sizes and SHA-256 of everything), `manifest.mac` (made with a key of
the passphrase, so that nobody else can make a file that `restore` would run), the dumps, and `sealed`: the secrets under AES-256-GCM.
Does not belong here: what restored work means (store/handover.py).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import psycopg
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import make_url

from kilo_pipelines import __version__
from kilo_pipelines.cli import setup, supervisor
from kilo_pipelines.cli.common import as_json, end, show
from kilo_pipelines.settings import Settings, SettingsError, private_dir, write_secret
from kilo_pipelines.store import DatabaseAwayError
from kilo_pipelines.store.crypto import Cipher, CipherError
from kilo_pipelines.store.dump import DumpError, dump, load, refuse_used
from kilo_pipelines.store.embedded import EmbeddedPostgres, EmbeddedPostgresError
from kilo_pipelines.store.migrate import SchemaError, fit, head, migrate, provision

FORMAT = 1
# Guessing a passphrase costs a quarter of a second and 64 MiB a try (OWASP's strongest row for scrypt asks for 128 MiB at p = 1).
SCRYPT = {"n": 2**16, "r": 8, "p": 1, "maxmem": 2**27, "dklen": 64}
# Short enough to remember, long enough that the above holds.
PASSPHRASE = 12
NONCE_BYTES = 12  # GCM's own size
# Of a home, besides the databases: sealed, and open.
SEALED = ("secrets", "twin")
OPEN = ("config.env", "audit/heads.log")
# Sessions of browsers end with the home: who restores logs in again.
LEFT_OUT = ("operator-sessions",)
# What a manifest may be at most, so that a foreign file fills no memory.
MANIFEST_BYTES = 2**20
FAULTS = (
    DumpError,
    SchemaError,
    SettingsError,
    CipherError,
    supervisor.SupervisorError,
    EmbeddedPostgresError,
    DatabaseAwayError,
    psycopg.Error,
    OSError,
    ValueError,
    subprocess.SubprocessError,
)


class ArchiveError(Exception):
    """A backup that can't be read or isn't trusted; the message says why."""


@contextmanager
def _database(settings: Settings, say: Any) -> Iterator[str]:
    """The administrator's URL; an embedded server is started for the time being when the platform doesn't run."""
    given = settings.given_database()
    if given is not None:
        yield given
        return
    if supervisor.is_running(settings):
        yield EmbeddedPostgres(settings.home / "postgres", settings.sockets / "pg").admin_url
        return
    platform = supervisor.Platform(settings, say)
    try:
        platform.lock()
        server, child = supervisor.postgres(settings)
        platform.start([child])
        server.wait_ready(20)
        yield server.admin_url
    finally:
        platform.stop()


def _names(logins: dict[str, str]) -> dict[str, str]:
    return {"kilo": str(make_url(logins["migrator"]).database), "dagster": str(make_url(logins["dagster"]).database)}


def _passphrase(file: str, plain: bool) -> str:
    try:
        text = sys.stdin.readline() if file == "-" else Path(file).read_text()
    except OSError as failure:
        end(plain, str(failure))
    found = text.partition("\n")[0].strip()
    if len(found) < PASSPHRASE:
        end(plain, f"the passphrase needs at least {PASSPHRASE} characters")
    return found


def _keys(passphrase: str, salt: bytes) -> tuple[bytes, bytes]:
    """One key that seals, one that signs."""
    both = hashlib.scrypt(passphrase.encode(), salt=salt, **SCRYPT)
    return both[:32], both[32:]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_passphrase_option = click.option(
    "--passphrase-file", required=True, help="File whose first line seals the secrets; - reads it from stdin."
)


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@_passphrase_option
@click.option(
    "--without-secrets", is_flag=True, help="Leaves the secrets out: keep encryption.key elsewhere, or nothing can be restored."
)
@as_json
def backup(file: Path, passphrase_file: str, without_secrets: bool, plain: bool) -> None:
    """Writes databases, secrets and the offline world into one file (0600), whether the platform runs or not."""
    settings = Settings()
    if file.exists():
        end(plain, f"{file} is there already")
    passphrase = _passphrase(passphrase_file, plain)
    try:
        with tempfile.TemporaryDirectory(prefix=".kilo-backup-", dir=file.absolute().parent) as scratch:
            with _database(settings, lambda _line: None) as admin_url:
                revision, taken_at = dump(admin_url, _names(settings.database_logins()), Path(scratch))
            manifest = _write(settings, Path(scratch), file, passphrase, revision, taken_at, secrets=not without_secrets)
    except FAULTS as failure:
        end(plain, str(failure))
    value = {"file": str(file), "bytes": file.stat().st_size, "schema": revision, "taken_at": manifest["taken_at"]}
    show(plain, value, lambda: f"{file}: {value['bytes']} bytes, schema {revision}, state of {manifest['taken_at']}")


def _write(
    settings: Settings, scratch: Path, file: Path, passphrase: str, revision: str, taken_at: datetime, *, secrets: bool
) -> dict[str, Any]:
    """The archive, in one step: a broken attempt leaves no file of that name."""
    salt = os.urandom(16)
    sealing, signing = _keys(passphrase, salt)
    if secrets:
        nonce = os.urandom(NONCE_BYTES)
        (scratch / "sealed").write_bytes(nonce + AESGCM(sealing).encrypt(nonce, _packed(settings.home), b"sealed"))
    for name in OPEN:
        if (settings.home / name).exists():
            shutil.copyfile(settings.home / name, scratch / name.replace("/", "."))
    parts = sorted(path for path in scratch.iterdir())
    manifest = {
        "format": FORMAT,
        "program": __version__,
        "schema": revision,
        "taken_at": taken_at.isoformat(),
        "salt": salt.hex(),
        "secrets": secrets,
        "key_ids": Cipher.key_ids(settings.encryption_key_file.read_text())[1],
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in parts},
    }
    text = json.dumps(manifest, indent=1).encode()
    (scratch / "manifest.json").write_bytes(text)
    (scratch / "manifest.mac").write_text(hmac.new(signing, text, hashlib.sha256).hexdigest())
    partial = scratch / "archive"
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream, tarfile.open(fileobj=stream, mode="w") as archive:
        for path in (scratch / "manifest.json", scratch / "manifest.mac", *parts):
            archive.add(path, path.name, filter=_anonymous)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)
    return manifest


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if Path(member.name).name in LEFT_OUT:
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _packed(home: Path) -> bytes:
    packed = BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name in SEALED:
            if (home / name).is_dir():
                archive.add(home / name, name, filter=_anonymous)
    return packed.getvalue()


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@_passphrase_option
@click.option(
    "--secrets", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Where secrets lie that the backup left out."
)
@as_json
def restore(file: Path, passphrase_file: str, secrets: Path | None, plain: bool) -> None:
    """Restores a backup into KILO_HOME, which must be empty or not there, and pauses everything: `resume` when the old platform is dead."""
    settings = Settings()
    if settings.home.exists() and any(settings.home.iterdir()):
        end(plain, f"{settings.home} isn't empty: restore into another KILO_HOME")
    passphrase = _passphrase(passphrase_file, plain)
    private_dir(settings.home)
    counts = None
    try:
        with tempfile.TemporaryDirectory(prefix=".restore-", dir=settings.home) as scratch:
            counts = _restore(settings, file, Path(scratch), passphrase, secrets)
    except (ArchiveError, *FAULTS) as failure:
        end(plain, str(failure))
    finally:
        if counts is None:  # everything in it is ours: it was empty
            shutil.rmtree(settings.home)
    value = {"home": str(settings.home), **counts}

    def text() -> str:
        held = ", ".join(f"{count} {what}" for what, count in counts["reconciled"].items())
        return (
            f"restored into {settings.home}: state of {counts['taken_at']}, schema {counts['schema']}; {held}\n"
            "everything is paused: start it, look, make sure that the old platform is dead, then `kilo-pipelines resume`"
        )

    show(plain, value, text)


def _restore(settings: Settings, file: Path, scratch: Path, passphrase: str, secrets: Path | None) -> dict[str, Any]:
    manifest, sealing = _read(file, scratch, passphrase)
    if fit(manifest["schema"]) == "newer":
        raise ArchiveError(
            f"the backup's schema is {manifest['schema']}, which is newer than this program's {head()}: install the newer program"
        )
    _place(settings, scratch, sealing, secrets, manifest)
    settings = Settings()  # with the restored config.env
    taken_at = datetime.fromisoformat(manifest["taken_at"])
    logins: dict[str, str] = json.loads((settings.secrets_dir / "database.json").read_text())
    with _database(settings, lambda _line: None) as admin_url:
        refuse_used(admin_url, _names(logins))
        logins = provision(admin_url, logins)
        load(admin_url, _names(logins), scratch)
        write_secret(settings.secrets_dir / "database.json", json.dumps(logins))
        migrate(logins["migrator"])
        store = setup.open_store(settings)
        counts = store.handover.restored(taken_at)
        store.database.dispose()
        _end_runs(settings)
    private_dir(settings.home / "run")
    (settings.home / "run" / "dagster-tables").write_text("restored\n")
    return {"taken_at": manifest["taken_at"], "schema": head(), "reconciled": counts}


def _read(file: Path, scratch: Path, passphrase: str) -> tuple[dict[str, Any], bytes]:
    """Unpacks an archive into `scratch` once it is known to be whole and ours; its manifest and the key that opens its secrets."""
    try:
        with tarfile.open(file) as archive:
            text, mac = _member(archive, "manifest.json"), _member(archive, "manifest.mac")
            manifest: dict[str, Any] = json.loads(text)
            if manifest.get("format") != FORMAT:
                raise ArchiveError(f"{file} has format {manifest.get('format')}, this program reads {FORMAT}")
            sealing, signing = _keys(passphrase, bytes.fromhex(manifest["salt"]))
            if not hmac.compare_digest(hmac.new(signing, text, hashlib.sha256).hexdigest().encode(), mac):
                raise ArchiveError("wrong passphrase, or the manifest was altered")
            archive.extractall(scratch, filter="data", members=[archive.getmember(name) for name in manifest["files"]])
    except (tarfile.TarError, KeyError, ValueError, TypeError) as failure:
        raise ArchiveError(f"{file} is no backup of this platform: {type(failure).__name__}") from None
    for name, known in manifest["files"].items():
        if _digest(scratch / name) != known["sha256"]:
            raise ArchiveError(f"{name} was altered: its checksum isn't the manifest's")
    return manifest, sealing


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    found = archive.extractfile(name)
    if found is None:
        raise KeyError(name)
    return found.read(MANIFEST_BYTES)


def _place(settings: Settings, scratch: Path, sealing: bytes, secrets: Path | None, manifest: dict[str, Any]) -> None:
    """Secrets, the offline world and open files into the home."""
    if manifest["secrets"]:
        if secrets is not None:
            raise ArchiveError("this backup holds its secrets: leave --secrets out")
        content = (scratch / "sealed").read_bytes()
        try:
            packed = AESGCM(sealing).decrypt(content[:NONCE_BYTES], content[NONCE_BYTES:], b"sealed")
        except InvalidTag:
            raise ArchiveError("the secrets can't be opened") from None
        with tarfile.open(fileobj=BytesIO(packed)) as archive:
            archive.extractall(settings.home, filter="data")
        private_dir(settings.secrets_dir)
    elif secrets is None:
        raise ArchiveError("this backup holds no secrets: name their directory with --secrets")
    else:
        for path in secrets.iterdir():
            write_secret(settings.secrets_dir / path.name, path.read_text())
    missing = set(manifest["key_ids"]) - set(Cipher.key_ids(settings.encryption_key_file.read_text())[1])
    if missing:
        raise ArchiveError(f"encryption.key lacks the keys {', '.join(sorted(missing))}: what they sealed could not be opened")
    for name in OPEN:
        if (scratch / name.replace("/", ".")).exists():
            private_dir((settings.home / name).parent)
            shutil.copyfile(scratch / name.replace("/", "."), settings.home / name)


def _end_runs(settings: Settings) -> None:
    """Runs that the backup saw at work have no process any more; told to Dagster in a process of its own, which takes seconds to load it."""
    env = supervisor.environment(settings, True) | supervisor.dagster_environment(settings)
    argv = [sys.executable, "-m", "kilo_pipelines.resources.lost_runs", f"restored at {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"]
    subprocess.run(argv, env=env, cwd=supervisor.checkout(), check=True, capture_output=True)


COMMANDS = (backup, restore)
