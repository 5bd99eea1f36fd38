"""Secrets as canaries: which there are, how a thief would spell them, and where they have turned up."""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import psycopg

from kilo_pipelines.settings import Settings
from kilo_pipelines.store import app_secrets

# Shorter pieces occur by chance; the obedient agent slices at this length.
WINDOW = 12
_PASSWORD = re.compile(r"//[^:/]+:([^@/]+)@")


def of_home(settings: Settings) -> dict[str, str]:
    """Every secret of a home: the random part of each, since a public prefix says nothing."""
    held, app = settings.secrets_dir, app_secrets.read(settings)
    found = {
        "webhook secret": app.webhook_secrets[0].value,
        "client secret": app.client_secret or "",
        "model key": settings.model_key_file.read_text().strip().rpartition("-")[2],
        "operator key": settings.operator_key_file.read_text().strip().partition("_")[2],
        "metrics token": settings.metrics_token_file.read_text().strip(),
        "broker password": (held / "broker-password").read_text().strip(),
        "twin's control token": json.loads((settings.home / "twin/credentials.json").read_text())["control_token"],
    }
    keys = json.loads(settings.encryption_key_file.read_text())["keys"]
    found |= {f"encryption key {key_id}": key for key_id, key in keys.items()}
    found |= {f"password of {name}": _PASSWORD.findall(url)[0] for name, url in settings.database_logins().items()}
    lines = (app.private_key or "").strip().split("\n")[1:-1]
    # The first line of every such key begins alike.
    return found | {f"App key, line {number}": line for number, line in enumerate(lines[1:], 2)}


class Search:
    """Looks for canaries in any spelling: as they are, in slices, reversed, in base64 at any offset, in hexadecimal."""

    def __init__(self, canaries: dict[str, str]) -> None:
        # By length: a hexadecimal spelling says half as much a character, and commits' ids in a body are spelled so, too.
        self._windows: dict[int, dict[str, str]] = {WINDOW: {}, 2 * WINDOW: {}}
        for name, value in canaries.items():
            assert len(value) >= WINDOW, f"{name} is too short to be a canary"
            for spelling, length in self._spellings(value):
                for at in range(len(spelling) - length + 1):
                    self._windows[length][spelling[at : at + length]] = name

    @staticmethod
    def _spellings(value: str) -> Iterator[tuple[str, int]]:
        for one in (value, value[::-1]):
            yield one, WINDOW
            yield one.encode().hex(), 2 * WINDOW
            for offset in range(3):
                # What surrounds a canary decides the outer characters: only the inner ones are always the same.
                code = base64.b64encode(b"\0" * offset + one.encode()).decode().rstrip("=")
                yield code[2 if offset else 0 : -2][2 if offset else 0 :], WINDOW

    def names_in(self, text: str) -> set[str]:
        """Which canaries a text holds."""
        return {
            known[window]
            for length, known in self._windows.items()
            for window in (text[at : at + length] for at in range(len(text) - length + 1))
            if window in known
        }


def texts_of_files(home: Path, without: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Every file below a directory, logs included, but what lies below `without`."""
    left_out = list(without)
    for path in sorted(home.rglob("*")):
        if path.is_file() and not path.is_symlink() and not any(path.is_relative_to(one) for one in left_out):
            yield str(path.relative_to(home)), path.read_bytes().decode("latin-1")


def texts_of_database(url: str) -> Iterator[tuple[str, str]]:
    """Every row of every table, whole, whatever its columns are; what Dagster compressed is unpacked."""
    with psycopg.connect(url, autocommit=True) as connection:
        tables = connection.execute(
            "select table_schema, table_name from information_schema.tables where table_type = 'BASE TABLE'"
            " and table_schema not in ('information_schema') and (table_schema <> 'pg_catalog' or table_name = 'pg_description')"
        ).fetchall()
        for schema, table in tables:
            for (row,) in connection.execute(f'select t::text from "{schema}"."{table}" t'.encode()):
                yield f"{schema}.{table}", row
        packed = connection.execute(
            "select table_schema, table_name, column_name from information_schema.columns where data_type = 'bytea'"
            " and table_schema not in ('information_schema', 'pg_catalog')"
        ).fetchall()
        for schema, table, column in packed:
            for (value,) in connection.execute(
                f'select "{column}" from "{schema}"."{table}" where "{column}" is not null'.encode()
            ):
                try:
                    content = zlib.decompress(value)
                except zlib.error:
                    content = bytes(value)
                yield f"{schema}.{table}.{column}", content.decode("latin-1")
