"""Operators' sessions and the break-glass password, in files of the home, so that a restart logs nobody out (threats, rules 18, 19).

A session holds for as long as the way on which it was made is switched on and, of an issuer's person, as long as the settings name
one of the grounds on which it was made. Tokens are kept hashed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from starlette.responses import Response

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.operators import NOBODY, OperatorRule
from kilo_pipelines.core.rates import Rate, full, take
from kilo_pipelines.settings import write_secret

COOKIE = "kilo_operator"
# A working day: who comes back tomorrow logs in again.
PASSWORD_SESSION = timedelta(hours=12)
# Half of one: who was shut out at the issuer is out here by then, everybody else comes back with a click.
OIDC_SESSION = timedelta(hours=4)
# RFC 7914's interactive parameters, 32 MB and about 80 ms: a login is seldom, a guess is slow.
SCRYPT = {"n": 2**15, "r": 8, "p": 1, "maxmem": 64 * 2**20}
# Guesses over everybody: five at once, then one every ten seconds; a person who mistypes isn't locked out for long.
GUESSES = Rate(per_hour=360, burst=5)
PASSWORD = "password"  # noqa: S105
OIDC = "oidc"


def new_password(file: Path, sessions: Path) -> str:
    """Makes the operator's password, keeps its hash, ends every session; the password itself is shown once and kept nowhere."""
    password = secrets.token_urlsafe(18)
    salt = os.urandom(16)
    digest = hashlib.scrypt(password.encode(), salt=salt, **SCRYPT)
    write_secret(file, json.dumps({"salt": salt.hex(), "scrypt": digest.hex()}))
    sessions.unlink(missing_ok=True)
    return password


class TooManyGuessesError(Exception):
    """Logins were tried faster than a person does."""


@dataclass(frozen=True)
class Ways:
    """How operators may log in: with the password; at `issuer` (None: not), those whom `rule` names."""

    password: bool = True
    issuer: str | None = None
    rule: OperatorRule = NOBODY


@dataclass(frozen=True)
class Session:
    """Who came in how, and until when."""

    who: str
    way: str
    until: datetime


class Operators:
    """The password, the guesses at it and the sessions."""

    def __init__(self, password: Path, sessions: Path, clock: Clock, ways: Ways | None = None) -> None:
        self._password = password
        self._sessions = sessions
        self._clock = clock
        self.ways = ways or Ways()
        self._lock = threading.Lock()
        self._guesses = {way: full(GUESSES, clock.now()) for way in (PASSWORD, OIDC)}

    def guess(self, way: str) -> None:
        """Counts a try. Raises TooManyGuessesError."""
        with self._lock:
            taken = take(self._guesses[way], GUESSES, 1, self._clock.now())
            self._guesses[way] = taken.bucket
            if taken.wait_until is not None:
                raise TooManyGuessesError

    def log_in(self, password: str) -> str | None:
        """A new session's token for the right password; None for a wrong one. Raises TooManyGuessesError."""
        self.guess(PASSWORD)
        with self._lock:  # one at a time: each hash takes 32 MB
            right = self.ways.password and self._right(password)
        return self._begin({"who": "operator", "way": PASSWORD}, PASSWORD_SESSION) if right else None

    def _right(self, password: str) -> bool:
        if not self._password.exists():
            return False
        held = json.loads(self._password.read_text())
        given = hashlib.scrypt(password.encode(), salt=bytes.fromhex(held["salt"]), **SCRYPT)
        return hmac.compare_digest(given, bytes.fromhex(held["scrypt"]))

    def admit(self, who: str, grounds: frozenset[str]) -> str:
        """A new session's token for a person of the issuer, an operator on these grounds."""
        return self._begin({"who": who, "way": OIDC, "issuer": self.ways.issuer, "grounds": sorted(grounds)}, OIDC_SESSION)

    def session(self, token: str) -> Session | None:
        """The session that lives under this token."""
        found = self._live().get(self._hash(token)) if token else None
        return Session(found["who"], found["way"], datetime.fromisoformat(found["until"])) if found else None

    def log_out(self, token: str) -> None:
        """Ends a session."""
        with self._lock:
            self._keep({name: one for name, one in self._live().items() if name != self._hash(token)})

    def _begin(self, entry: dict[str, Any], life: timedelta) -> str:
        token = secrets.token_urlsafe(32)
        with self._lock:
            self._keep({**self._live(), self._hash(token): entry | {"until": (self._clock.now() + life).isoformat()}})
        return token

    @staticmethod
    def _hash(token: str) -> str:
        return hashlib.sha256(token.encode()).hexdigest()

    def _live(self) -> dict[str, dict[str, Any]]:
        try:
            held: dict[str, Any] = json.loads(self._sessions.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return {name: one for name, one in held.items() if isinstance(one, dict) and self._holds(one)}

    def _holds(self, entry: Mapping[str, Any]) -> bool:
        if datetime.fromisoformat(entry["until"]) <= self._clock.now():
            return False
        if entry["way"] == PASSWORD:
            return self.ways.password
        return entry["issuer"] == self.ways.issuer is not None and bool(set(entry["grounds"]) & self.ways.rule.configured)

    def _keep(self, sessions: Mapping[str, Any]) -> None:
        write_secret(self._sessions, json.dumps(sessions))


def set_session(answer: Response, token: str, life: timedelta, *, secure: bool) -> None:
    """Has the browser keep a session's token: for this site's own pages alone, and for no script."""
    answer.set_cookie(COOKIE, token, max_age=int(life.total_seconds()), httponly=True, samesite="strict", secure=secure)
