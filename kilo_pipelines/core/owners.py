"""Owners and what their plan allows (contract A7.1)."""

from __future__ import annotations

# Reviews at once: an organization 20; a person 3 on a funded plan, else 1.
ORGANIZATION_REVIEWS = 20
FUNDED_PERSON_REVIEWS = 3
PERSON_REVIEWS = 1


def review_slots(kind: str, plan: str) -> int:
    """How many reviews an owner may have active at once."""
    if kind == "organization":
        return ORGANIZATION_REVIEWS
    return FUNDED_PERSON_REVIEWS if plan == "funded" else PERSON_REVIEWS
