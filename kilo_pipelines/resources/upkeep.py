"""Heads of the audit chain, outside the database: a file that only grows, and the log."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from kilo_pipelines.settings import private_dir
from kilo_pipelines.store import Seal, Store

log = logging.getLogger(__name__)


def read_heads(file: Path) -> dict[int, str]:
    """Exported heads by number; {} before the first. ValueError when a line is no head."""
    if not file.exists():
        return {}
    return {int(one["number"]): str(one["head"]) for one in map(json.loads, file.read_text().splitlines())}


def export_heads(store: Store, file: Path) -> list[Seal]:
    """Appends every seal that the file doesn't hold yet (also one whose export a crash prevented), and logs it."""
    private_dir(file.parent)
    missing = store.audit.seals(after=max(read_heads(file), default=0))
    if not missing:
        return []
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "a") as heads:
        for seal in missing:
            heads.write(json.dumps(seal.exported()) + "\n")
            log.info("audit seal %s: %s events, head %s", seal.number, seal.count, seal.head)
        heads.flush()
        os.fsync(heads.fileno())
    return missing
