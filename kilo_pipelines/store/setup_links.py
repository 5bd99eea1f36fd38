"""Set-up links: one browser's right to set the platform up, and the one answer of the provider that it waits for.

Only hashes of the link, the cookie and the state are kept. Each of them works once: a guarded update takes it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal
from uuid import UUID, uuid4

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.store import system_statements as system
from kilo_pipelines.store.database import Database, changed, one

# GitHub's own limit for the code of a new App is an hour; a set-up is over by then or is begun again.
LINK_LIFE = timedelta(hours=1)
StateFor = Literal["manifest", "installation", "authorization"]


@dataclass(frozen=True)
class SetupLink:
    """An opened link: what the operator asked for, and what has come of it so far."""

    id: UUID
    request: dict[str, Any]
    notes: dict[str, Any]


def _hash(value: str) -> bytes:
    return hashlib.sha256(value.encode()).digest()


class SetupLinks:
    """Links of the whole platform; they belong to no owner."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def make(self, request: dict[str, Any]) -> str:
        """A new link's token, shown once; links that are over go."""
        token = secrets.token_urlsafe(32)
        now = self._clock.now()
        with self._database.system() as connection:
            changed(connection, system.FORGET_SETUP_LINKS.sql, now=now)
            changed(
                connection,
                system.NEW_SETUP_LINK.sql,
                id=uuid4(),
                link=_hash(token),
                request=json.dumps(request),
                now=now,
                expires=now + LINK_LIFE,
            )
        return token

    def open(self, token: str) -> str | None:
        """Takes a link; the cookie that stands for it from now on, None when it was used or is over."""
        cookie = secrets.token_urlsafe(32)
        with self._database.system() as connection:
            taken = one(connection, system.OPEN_SETUP_LINK.sql, link=_hash(token), cookie=_hash(cookie), now=self._clock.now())
        return cookie if taken else None

    def of(self, cookie: str) -> SetupLink | None:
        """The opened link of a browser; None for none."""
        with self._database.system() as connection:
            row = one(connection, system.SETUP_LINK.sql, cookie=_hash(cookie), now=self._clock.now())
        return SetupLink(**row) if row else None

    def expect(self, link: SetupLink, what: StateFor, notes: dict[str, Any] | None = None) -> str:
        """A fresh state for the next answer of the provider; the one before works no more. `notes` are added to the link's."""
        state = secrets.token_urlsafe(32)
        with self._database.system() as connection:
            changed(
                connection,
                system.EXPECT_SETUP_STATE.sql,
                id=link.id,
                state=_hash(state),
                what=what,
                notes=json.dumps(notes or {}),
            )
        return state

    def take(self, cookie: str, state: str, what: StateFor) -> SetupLink | None:
        """Takes the state that an answer brought, once; None when this browser's link doesn't wait for it."""
        with self._database.system() as connection:
            row = one(
                connection,
                system.TAKE_SETUP_STATE.sql,
                cookie=_hash(cookie),
                state=_hash(state),
                what=what,
                now=self._clock.now(),
            )
        return SetupLink(**row) if row else None

    def note(self, link: SetupLink, notes: dict[str, Any]) -> None:
        """Adds to what has come of a link."""
        with self._database.system() as connection:
            changed(connection, system.NOTE_SETUP_LINK.sql, id=link.id, notes=json.dumps(notes))
