"""The operator's catalogue of vulnerabilities that are exploited in the wild, in the shape in which CISA publishes its own."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from kilo_pipelines.settings import current

# CISA's whole catalogue has some 2 MB.
MAX_BYTES = 64 * 2**20


def known_exploited() -> frozenset[str] | None:
    """CVE ids in capitals; None without a file, or with one that isn't a catalogue: then nothing is dismissed automatically."""
    file = current().known_exploited_file
    if file is None:
        return None
    try:
        state = file.stat()
    except OSError:
        return None
    return _read(file, state.st_mtime_ns, state.st_size) if state.st_size <= MAX_BYTES else None


@lru_cache(maxsize=2)
def _read(file: Path, _changed: int, _size: int) -> frozenset[str] | None:
    try:
        found = [one["cveID"] for one in json.loads(file.read_bytes())["vulnerabilities"]]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    # A catalogue without a word is a mistake, not a world without attackers.
    return frozenset(one.upper() for one in found) if found and all(isinstance(one, str) for one in found) else None
