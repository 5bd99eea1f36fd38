"""The operator's API key: made once, kept in a file that only the operator reads, known to the database as a hash."""

from __future__ import annotations

from pathlib import Path

from kilo_pipelines.settings import write_secret
from kilo_pipelines.store import Store


def ensure_operator_key(store: Store, path: Path) -> str:
    """The operator's key out of `path` (0600); a new one when there is none or the database doesn't know it (any more).

    It has no end: whoever reads that file reads the home's other secrets, too, and a platform that locks its operator out is no safer.
    """
    if path.exists():
        key = path.read_text().strip()
        found = store.api_keys.principal(key)
        if found is not None and found.role == "operator":
            return key
    return new_operator_key(store, path)


def new_operator_key(store: Store, path: Path, *, alone: bool = False) -> str:
    """Makes the operator's key anew and keeps it in `path`; `alone`: every other operator's key ends with that."""
    made = store.api_keys.create("operator", expires_at=None, name=path.name, actor="platform")
    assert made is not None  # noqa: S101  # only a key of a person may be refused
    write_secret(path, made.value)
    if alone:
        store.api_keys.revoke_operators(made.id)
    return made.value
