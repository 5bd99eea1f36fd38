"""Sealing and verifying the audit events of all owners (goals, N12; docs/audit.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from kilo_pipelines.core.audit import GENESIS, digest_of, head_of
from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store import system_statements as system
from kilo_pipelines.store.database import Database, changed, one, rows

# One seal's events are read at once: about 20 MB of them at most.
EVENTS_A_SEAL = 20_000


@dataclass(frozen=True)
class Seal:
    """One link of the chain; hashes are hex."""

    number: int
    previous: str
    sealed_at: datetime
    count: int
    events: str
    head: str

    def exported(self) -> dict[str, Any]:
        """What is kept outside the database."""
        return {**asdict(self), "sealed_at": self.sealed_at.isoformat()}


@dataclass(frozen=True)
class Broken:
    """The first seal that doesn't hold, and why."""

    seal: int
    reason: Reason


class Audit:
    """Audit events of all owners."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def seal(self) -> Seal | None:
        """Seals what isn't sealed yet; None when there is nothing, or somebody else seals at this moment.

        An event whose transaction commits late belongs to the next seal: what counts is that it has none, not its id or time.
        """
        with self._database.system() as connection:
            if not _alone(connection):
                return None
            found = rows(connection, system.UNSEALED_EVENTS.sql, limit=EVENTS_A_SEAL)
            if not found:
                return None
            last = one(connection, system.LAST_SEAL.sql)
            number = last["number"] + 1 if last else 1
            previous = last["head"] if last else GENESIS
            count, events = digest_of(_in_order(found))
            sealed_at = self._clock.now().astimezone(UTC)
            seal = Seal(
                number, previous, sealed_at, count, events, head_of(number, previous, sealed_at.isoformat(), count, events)
            )
            changed(connection, system.MARK_SEALED.sql, number=number, ids=[row["id"] for row in found])
            changed(connection, system.NEW_SEAL.sql, **asdict(seal))
            return seal

    def seals(self, after: int = 0) -> list[Seal]:
        """The chain after a number."""
        with self._database.system() as connection:
            return [_seal(row) for row in rows(connection, system.SEALS.sql, after=after)]

    def verify(self, heads: Mapping[int, str]) -> Broken | None:
        """Recomputes the whole chain from the events and holds it against the exported `heads` (number -> head); None when it holds.

        Changed, removed and slipped-in events break their seal's digest; a seal that was written anew breaks the exported head;
        a chain that is shorter than the exported one was cut.
        """
        previous = GENESIS
        with self._database.system() as connection:
            seals = [_seal(row) for row in rows(connection, system.SEALS.sql, after=0)]
            for number, seal in enumerate(seals, 1):
                if seal.number != number or seal.previous != previous:
                    return Broken(number, Reason.AUDIT_CHAIN_BROKEN)
                count, events = digest_of(_in_order(rows(connection, system.SEALED_EVENTS.sql, number=seal.number)))
                if (count, events) != (seal.count, seal.events):
                    return Broken(number, Reason.AUDIT_EVENTS_CHANGED)
                head = head_of(number, previous, seal.sealed_at.astimezone(UTC).isoformat(), count, events)
                if head != seal.head:
                    return Broken(number, Reason.AUDIT_CHAIN_BROKEN)
                if heads.get(number, head) != head:
                    return Broken(number, Reason.AUDIT_HEAD_DIFFERS)
                previous = head
            stray = one(connection, system.STRAY_EVENTS.sql, most=len(seals))
        if stray and stray["n"]:
            return Broken(len(seals) + 1, Reason.AUDIT_EVENTS_CHANGED)
        missing = [number for number in heads if number > len(seals)]
        return Broken(min(missing), Reason.AUDIT_CHAIN_CUT) if missing else None

    def unsealed(self) -> int:
        """How many events no seal holds yet."""
        with self._database.system() as connection:
            row = one(connection, system.COUNT_UNSEALED.sql)
        return int(row["n"]) if row else 0

    def listed(self, *, owner_id: UUID | None = None, limit: int = 50) -> list[dict[str, Any]]:
        """Events, newest first: of one owner in its scope, or of all for the operator."""
        with self._database.scope(owner_id) as connection:
            return [dict(row) for row in rows(connection, system.AUDIT_OF_PEOPLE.sql, owner=owner_id, limit=limit)]


def _alone(connection: Connection) -> bool:
    row = one(connection, system.SEALER_LOCK.sql)
    return bool(row and row["alone"])


def _in_order(found: list[Any]) -> list[dict[str, Any]]:
    """By owner and id; times in UTC, whatever the session's time zone is."""
    ordered = sorted(found, key=lambda row: (str(row["owner_id"]), row["id"]))
    return [{**row, "at": row["at"].astimezone(UTC)} for row in ordered]


def _seal(row: Any) -> Seal:
    return Seal(**{name: row[name] for name in ("number", "previous", "sealed_at", "count", "events", "head")})
