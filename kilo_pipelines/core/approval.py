"""Pull requests of outsiders: what the owner's policy makes of one, and what approves it (threats, rules 7 and 8). Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, Protocol

from kilo_pipelines.core.reasons import Reason

Policy = Literal["approve", "review", "skip"]
COMMAND = "/ok-to-test"
# Beside the command a label approves; and so does the one by which a review is asked for.
LABELS = frozenset({"ok-to-test", "kilo"})
# What approvals may release.
WAITING_FOR_APPROVAL = (Reason.APPROVAL_NEEDED, Reason.APPROVAL_STALE, Reason.APPROVAL_REFUSED)
_COMMAND = re.compile(r"^[ \t]*/ok-to-test(?:[ \t]+([0-9a-f]{7,64}))?[ \t]*\r?$", re.MULTILINE)


class Given(Protocol):
    """An approval as it is stored; `granted` is None until its giver's permission was asked of the provider."""

    @property
    def head_sha(self) -> str: ...
    @property
    def granted(self) -> bool | None: ...


def command_of(body: str) -> str | None:
    """The commit that a comment approves (its first digits, empty for the present one); None when it isn't the command.

    On a line of its own: a quoted or explained command approves nothing.
    """
    found = _COMMAND.search(body)
    return None if found is None else found.group(1) or ""


def is_outside(*, head_repository_id: int | None, repository_id: int, author_may_write: bool) -> bool:
    """Whether a pull request's content is an outsider's: from a fork (or one that is gone), or of an author who may not write here."""
    return head_repository_id != repository_id or not author_may_write


def refusal(policy: Policy, head_sha: str, approvals: Sequence[Given]) -> Reason | None:
    """Why an outsider's head isn't looked at now; None when it is. Approvals are the newest first."""
    if policy == "review":
        return None
    if policy == "skip":
        return Reason.OUTSIDER_SKIPPED
    if any(one.granted and one.head_sha == head_sha for one in approvals):
        return None
    if any(one.granted for one in approvals):
        return Reason.APPROVAL_STALE
    return (
        Reason.APPROVAL_REFUSED
        if any(one.granted is False and one.head_sha == head_sha for one in approvals)
        else Reason.APPROVAL_NEEDED
    )
