"""The operator's API key: made once, kept in a file that only the operator reads, known to the database as a hash."""

from __future__ import annotations

from pathlib import Path

from kilo_pipelines.settings import write_secret
from kilo_pipelines.store import Store


def ensure_operator_key(store: Store, path: Path) -> str:
    """The operator's key out of `path` (0600); a new one when there is none or the database doesn't know it (any more)."""
    if path.exists():
        key = path.read_text().strip()
        if store.owners.principal(key) == (None, "operator"):
            return key
    key = store.owners.create_api_key("operator")
    write_secret(path, key)
    return key
