"""API keys: known to the database as hashes; whose they are, what they may, until when."""

from __future__ import annotations

import hashlib
import json
import secrets
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from sqlalchemy import Connection

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.people import lower_of
from kilo_pipelines.store import system_statements as system
from kilo_pipelines.store.database import Database, changed, one, rows
from kilo_pipelines.store.rows import ApiKey, Principal

# The last use is for finding forgotten keys, not for watching people: to the hour, and an hour's requests write once.
USED_EVERY = timedelta(hours=1)


class NewKey(NamedTuple):
    """A key that was made now; `value` is shown once and kept nowhere."""

    id: UUID
    value: str
    expires_at: datetime | None


class ApiKeys:
    """Keys of owners and of the operator. They are no owner's table: whose a key is, is what is asked of them."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def create(
        self,
        role: str,
        owner_id: UUID | None = None,
        *,
        expires_at: datetime | None,
        name: str = "",
        person_id: UUID | None = None,
        actor: str,
    ) -> NewKey | None:
        """A new key; None when the person is no member of the owner. Only the operator's has no owner, and may have no end."""
        with self._database.system() as connection:
            made = self._make(connection, role, owner_id, person_id, name, expires_at, actor)
            if made is not None and owner_id is not None:
                self._audit(connection, owner_id, actor, "key.create", made.id, {"role": role, "name": name})
            return made

    def rotate(self, key_id: UUID, *, expires_at: datetime, old_until: datetime, actor: str) -> NewKey | None:
        """A key of the same owner, person, role and name in place of a live one, which stays valid until `old_until` at most; None when it is over.

        A key is rotated once: in its overlap it makes no further ones.
        """
        with self._database.system() as connection:
            old = one(connection, system.ROTATED_KEY.sql, id=key_id, now=self._clock.now(), until=old_until)
            if old is None:
                return None
            made = self._make(connection, old["role"], old["owner_id"], old["person_id"], old["name"], expires_at, actor)
            if made is not None:
                data = {"new": str(made.id), "old_until": old_until.isoformat()}
                self._audit(connection, old["owner_id"], actor, "key.rotate", key_id, data)
            return made

    def revoke(self, key_id: UUID, *, actor: str) -> bool:
        """Ends a key at once; False when it was revoked before."""
        with self._database.system() as connection:
            row = one(connection, system.REVOKE_KEY.sql, id=key_id, now=self._clock.now())
            if row is not None:
                self._audit(connection, row["owner_id"], actor, "key.revoke", key_id, {})
            return row is not None

    def revoke_operators(self, apart_from: UUID) -> int:
        """Ends every operator's key but one; how many."""
        with self._database.system() as connection:
            return changed(connection, system.REVOKE_OPERATOR_KEYS.sql, id=apart_from, now=self._clock.now())

    def of_owner(self, owner_id: UUID) -> list[ApiKey]:
        """An owner's keys, the newest first, with the role that each has now."""
        with self._database.system() as connection:
            found = rows(connection, system.KEYS_OF_OWNER.sql, owner=owner_id, now=self._clock.now())
        return [ApiKey(**row) for row in found]

    def get(self, key_id: UUID) -> ApiKey | None:
        """One key of an owner by its id; never an operator's."""
        with self._database.system() as connection:
            row = one(connection, system.KEY_BY_ID.sql, id=key_id, now=self._clock.now())
        return ApiKey(**row) if row else None

    def principal(self, value: str) -> Principal | None:
        """Who asks with this key; None for an unknown, expired or revoked one, and for one whose person is no member any more."""
        now = self._clock.now()
        with self._database.system_statement() as connection:
            row = one(connection, system.API_KEY.sql, hash=_hash(value), now=now, used_before=now - USED_EVERY)
        if row is None:
            return None
        role = row["role"] if row["person_id"] is None else lower_of(row["role"], row["present"])
        return None if role is None else Principal(row["id"], row["owner_id"], role, row["person_id"], row["login"])

    def _make(
        self,
        connection: Connection,
        role: str,
        owner_id: UUID | None,
        person_id: UUID | None,
        name: str,
        expires_at: datetime | None,
        actor: str,
    ) -> NewKey | None:
        key_id = uuid4()
        # The id's first part is how people tell keys apart; all that keeps a key secret are the 256 bits behind it.
        value = f"{prefix_of(key_id)}_{secrets.token_urlsafe(32)}"
        made = changed(
            connection,
            system.NEW_API_KEY.sql,
            id=key_id,
            owner=owner_id,
            person=person_id,
            role=role,
            name=name,
            actor=actor,
            hash=_hash(value),
            now=self._clock.now(),
            expires=expires_at,
        )
        return NewKey(key_id, value, expires_at) if made else None

    def _audit(self, connection: Connection, owner_id: UUID, actor: str, action: str, key_id: UUID, data: dict[str, Any]) -> None:
        values = {"actor": actor, "action": action, "subject": str(key_id), "data": json.dumps(data)}
        changed(connection, system.AUDIT_KEY.sql, owner=owner_id, now=self._clock.now(), **values)


def prefix_of(key_id: UUID) -> str:
    """What a key's value begins with."""
    return f"kilo_{key_id.hex[:8]}"


def _hash(value: str) -> bytes:
    """The values are random: a fast hash tells nothing of them."""
    return hashlib.sha256(value.encode()).digest()
