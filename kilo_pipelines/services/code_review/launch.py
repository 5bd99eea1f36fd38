"""What a launch decides after the pull request was read again (events are hints; design, section 3)."""

from __future__ import annotations

from typing import Any, Protocol

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.text import clean
from kilo_pipelines.core.work import WorkState

# The description goes into the brief, capped there; what is stored is capped here.
BODY_LIMIT = 20_000


class Pull(Protocol):
    """A pull request as the provider tells it now."""

    @property
    def repository_id(self) -> int: ...
    @property
    def number(self) -> int: ...
    @property
    def state(self) -> str: ...
    @property
    def draft(self) -> bool: ...
    @property
    def title(self) -> str: ...
    @property
    def body(self) -> str: ...
    @property
    def author(self) -> str: ...
    @property
    def author_type(self) -> str: ...
    @property
    def url(self) -> str: ...
    @property
    def full_name(self) -> str: ...
    @property
    def head_sha(self) -> str: ...
    @property
    def head_ref(self) -> str: ...
    @property
    def base_sha(self) -> str: ...
    @property
    def base_ref(self) -> str: ...


def stop_reason(pull: Pull, repository_id: int, *, reviewed: bool = False) -> tuple[WorkState, Reason] | None:
    """Why no session is launched after all; None when it is. `reviewed`: another item reviewed this head and base already."""
    if pull.repository_id != repository_id:
        return WorkState.CANCELLED, Reason.OWNER_CHANGED
    if pull.state != "open":
        return WorkState.CANCELLED, Reason.PULL_CLOSED
    if pull.draft:
        return WorkState.CANCELLED, Reason.SKIPPED_DRAFT
    if reviewed:
        return WorkState.CANCELLED, Reason.ALREADY_REVIEWED
    return None


def head_of(pull: Pull) -> dict[str, Any]:
    """The review's columns that follow the pull request's present state."""
    return {"head_sha": pull.head_sha, "base_sha": pull.base_sha, "base_ref": pull.base_ref, "title": clean(pull.title)[:300]}


def details_of(pull: Pull, settings: dict[str, Any]) -> dict[str, Any]:
    """The review's row when a person asks for it by the pull request."""
    return {
        "repository_id": pull.repository_id,
        "full_name": pull.full_name,
        "pull_number": pull.number,
        "author": clean(pull.author),
        "author_type": pull.author_type,
        "url": pull.url,
        "head_ref": clean(pull.head_ref),
        "trigger": "manual",
        "settings": settings,
        **head_of(pull),
    }


def task_of(pull: Pull, details: dict[str, Any], *, previous_summary: str | None, previous_head: str | None) -> dict[str, Any]:
    """The inputs of the brief (`brief.ReviewInputs`)."""
    return {
        "title": pull.title[:300],
        "body": pull.body[:BODY_LIMIT],
        "author": pull.author,
        "head_ref": pull.head_ref,
        "base_ref": pull.base_ref,
        "full_name": details["full_name"],
        "pull_number": pull.number,
        "previous_summary": previous_summary[:BODY_LIMIT] if previous_summary else None,
        "previous_head": previous_head,
        "settings": details["settings"],
    }
