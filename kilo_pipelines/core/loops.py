"""What our own writing looks like when it comes back as an event: it starts no work (threats, rule 21)."""

from __future__ import annotations

import re

# First segments of the branches that the platform pushes.
REMEDIATION_BRANCHES = "security-remediation"
OUR_BRANCHES = (f"{REMEDIATION_BRANCHES}/",)
# Whose text has one of our markers was written by us, or copied from it: neither is a person's command.
_MARKED = re.compile(r"<!-- kilo-pipelines:")


def is_our_branch(ref: str, *, same_repository: bool) -> bool:
    """Whether a branch is one that we pushed; a fork may call its branches what it likes."""
    return same_repository and ref.startswith(OUR_BRANCHES)


def is_marked(text: str) -> bool:
    """Whether a text bears a marker of ours."""
    return _MARKED.search(text) is not None
