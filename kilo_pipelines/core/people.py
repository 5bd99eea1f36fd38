"""Roles of people in an owner, and what an API key may be: pure rules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Literal
from uuid import UUID

from kilo_pipelines.core.reasons import Reason

# Roles within an owner, the lowest first; the operator stands outside of every owner.
Role = Literal["viewer", "member", "owner"]
RANKS: dict[str, int] = {"viewer": 0, "member": 1, "owner": 2}

# A quarter: long enough that nobody is tempted to leave a key unrotated, short enough that a forgotten one ends.
KEY_DAYS = 90
# What a key may be given at most, at its making and at each rotation.
KEY_DAYS_MOST = 365
# A day for whoever holds the old key to take the new one; a week over a holiday.
OVERLAP_HOURS = 24
OVERLAP_HOURS_MOST = 168

# A login of GitHub or of a mail system. Lower case, since two people who differ in case alone are one.
_LOGIN = re.compile(r"[a-z0-9][a-z0-9._@+-]{0,99}")


def login_of(text: str) -> str | None:
    """The login as it is kept; None when it is none."""
    found = text.strip().lower()
    return found if _LOGIN.fullmatch(found) else None


def lower_of(granted: str, present: str | None) -> str | None:
    """The role that a key has now: never above its person's present one; None when that person is no member (any more).

    An unknown role is none, too (invariant 9).
    """
    if present is None or granted not in RANKS or present not in RANKS:
        return None
    return min(granted, present, key=RANKS.__getitem__)


def key_ends(now: datetime, days: int = KEY_DAYS) -> datetime:
    """When a key that is made now ends; ValueError beyond the cap."""
    if not 1 <= days <= KEY_DAYS_MOST:
        raise ValueError(f"a key lives 1 to {KEY_DAYS_MOST} days")
    return now + timedelta(days=days)


def overlap_ends(now: datetime, hours: int = OVERLAP_HOURS) -> datetime:
    """Until when a key that is rotated now stays valid, where it doesn't end before; ValueError beyond the cap."""
    if not 0 <= hours <= OVERLAP_HOURS_MOST:
        raise ValueError(f"the overlap is 0 to {OVERLAP_HOURS_MOST} hours")
    return now + timedelta(hours=hours)


def covers(role: str, other: str | None) -> bool:
    """Whether a role within an owner reaches as far as another one; the operator's reaches everywhere, and an unknown one nowhere."""
    return role == "operator" or RANKS.get(role, -1) >= RANKS.get(other or "viewer", len(RANKS))


def refuse_change(kind: str, members: Mapping[UUID, str], person: UUID, role: str | None) -> Reason | None:
    """Why a person's role in an owner may not become `role` (None: leaves); `members` are the present ones with their roles.

    A person's own owner belongs to that one person; an organization that has an owner keeps one.
    """
    after = {**members, person: role}
    if kind == "user" and [one for one in after.values() if one is not None] != ["owner"]:
        return Reason.PERSONAL_OWNER
    if "owner" in members.values() and "owner" not in after.values():
        return Reason.LAST_OWNER
    return None
