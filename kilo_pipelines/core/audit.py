"""The audit chain: digests of sealed events and the heads that bind them, as pure functions (goals, N12).

A seal holds the digest of its events and the head of the seal before it; whoever keeps a head outside the database can prove that
nothing before it was changed, removed or slipped in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

# The head before the first seal.
GENESIS = "0" * 64


def canonical(value: Any) -> bytes:
    """One byte string for one JSON value: sorted keys, no spaces, times and ids as text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str).encode()


def digest_of(events: Iterable[Mapping[str, Any]]) -> tuple[int, str]:
    """Number and SHA-256 (hex) of events in the order given: owner, id, at (UTC), actor, action, subject, data of each."""
    count, digest = 0, hashlib.sha256()
    for event in events:
        line = [
            event["owner_id"],
            event["id"],
            event["at"].isoformat(),
            event["actor"],
            event["action"],
            event["subject"],
            event["data"],
        ]
        digest.update(canonical(line) + b"\n")
        count += 1
    return count, digest.hexdigest()


def head_of(number: int, previous: str, sealed_at: str, count: int, events: str) -> str:
    """The head (SHA-256, hex) of seal `number`; `events` is its events' digest, `previous` the head before it."""
    return hashlib.sha256(canonical([number, previous, sealed_at, count, events])).hexdigest()
