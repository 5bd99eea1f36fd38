"""Owners and what their plan allows (contract A7.1)."""

from __future__ import annotations

# Reviews at once: an organization 20; a person 3 on a funded plan, else 1.
ORGANIZATION_REVIEWS = 20
FUNDED_PERSON_REVIEWS = 3
PERSON_REVIEWS = 1


def review_pools(kind: str, plan: str) -> dict[str, int]:
    """The pools that a review takes a slot from, and how many slots an owner has in each.

    The pool that bears the service's name is the one that its offers are measured by.
    """
    if kind == "organization":
        return {"code_review": ORGANIZATION_REVIEWS}
    return {"code_review": FUNDED_PERSON_REVIEWS if plan == "funded" else PERSON_REVIEWS}


# Analyses at once, and those of them that nobody asked for (contract 8.3).
ANALYSES = 3
AUTOMATIC_ANALYSES = 2


def analysis_pools(*, automatic: bool) -> dict[str, int]:
    """The pools that an analysis takes a slot from: whoever asked for it by hand always finds one more than the automatic ones take."""
    pools = {"security_analysis": ANALYSES}
    return pools | {"security_analysis.automatic": AUTOMATIC_ANALYSES} if automatic else pools


def remediation_pools(repository_id: int) -> dict[str, int]:
    """One remediation at a time of an owner, and of an owner's repository; another owner's count for nothing here (contract 13.2)."""
    return {"remediation": 1, f"remediation:{repository_id}": 1}


# Dismissals at once: each fetches the repository, and five fetches of one owner beside each other are what a host bears.
DISMISSALS = 5


def dismissal_pools(_kind: str, _plan: str) -> dict[str, int]:
    """The pool that a dismissal takes a slot from."""
    return {"dismissal": DISMISSALS}


# Notices at once: each only decides; what is slow is sending, which the outbox does.
NOTICES = 4


def notice_pools(_kind: str, _plan: str) -> dict[str, int]:
    """The pool that a notice takes a slot from."""
    return {"notice": NOTICES}
