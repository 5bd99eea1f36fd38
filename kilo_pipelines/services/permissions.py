"""Who may do what: one table of acts and roles for all services, the command line and the control API.

Each route of the control API names its act, and what holds for it stands here (contract 2 of the Security Agent; threats, rule 20).
"""

from __future__ import annotations

from typing import Literal, get_args

Act = Literal[
    # any key of an owner
    "read",
    "own_keys",
    # work
    "sync",
    "analyse",
    "dismiss",
    "remediate",
    "work",
    # the owner's own affairs
    "settings",
    "members",
    "keys",
    "switch",
    "effects",
    "audit",
    # the platform's
    "platform",
]

ROLES = ("operator", "owner", "member", "viewer")
_EVERYBODY = frozenset(ROLES)
_WORKERS = frozenset({"operator", "owner", "member"})
_OWNERS = frozenset({"operator", "owner"})
ALLOWED: dict[Act, frozenset[str]] = {
    "read": _EVERYBODY,
    # A person's keys, seen and ended by any key of that person.
    "own_keys": _EVERYBODY,
    "sync": _WORKERS,
    "analyse": _WORKERS,
    # A dismissal ends an alert for everybody.
    "dismiss": _OWNERS,
    "remediate": _WORKERS,
    # Reviews and items: repeat and cancel, where the item's service doesn't ask for more (`act_on`).
    "work": _WORKERS,
    "settings": _OWNERS,
    "members": _OWNERS,
    "keys": _OWNERS,
    # Its own owner's scope for an owner; every scope for the operator.
    "switch": _OWNERS,
    # Writes to the outside that a person repeats or gives up, whatever work they are of.
    "effects": _OWNERS,
    "audit": _OWNERS,
    "platform": frozenset({"operator"}),
}


def may(role: str, act: Act) -> bool:
    """Whether a role allows an act; an unknown role allows nothing."""
    return role in ALLOWED[act]


# Repeating or cancelling these items is the act that they do.
_ACTS_ON: dict[str, Act] = {
    "dismissal": "dismiss",
    "remediation": "remediate",
    "security_analysis": "analyse",
    "security_sync": "sync",
}


def act_on(service: str) -> Act:
    """What somebody does who repeats or cancels an item of a service."""
    return _ACTS_ON.get(service, "work")


def act_of(name: object) -> Act:
    """The act of a name; ValueError for what is none."""
    for one in get_args(Act):
        if one == name:
            found: Act = one
            return found
    raise ValueError(f"no act: {name}")
