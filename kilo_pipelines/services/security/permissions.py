"""Who may do what with the Security Agent (contract 2)."""

from __future__ import annotations

from typing import Literal

Act = Literal["read", "sync", "analyse", "dismiss", "remediate", "settings"]

# Until people have keys of their own there are operators, owners and readers; a member's key will be able to do what stands here.
_ALLOWED: dict[Act, frozenset[str]] = {
    "read": frozenset({"operator", "owner", "member", "reader"}),
    "sync": frozenset({"operator", "owner", "member"}),
    "analyse": frozenset({"operator", "owner", "member"}),
    "dismiss": frozenset({"operator", "owner"}),
    "remediate": frozenset({"operator", "owner", "member"}),
    "settings": frozenset({"operator", "owner"}),
}


def may(role: str, act: Act) -> bool:
    """Whether a role allows an act; an unknown role allows nothing."""
    return role in _ALLOWED[act]
