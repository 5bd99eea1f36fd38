"""From a pull-request event to a decision: the ladders A4.2 and A4.3 of the contract, in their order.

Left out on purpose: step 5 (merge commits). Changed: step 9 blocks only on an active or a completed review (weakness 2),
and an edited base re-opens the check (threats, rule 9).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import UUID

from kilo_pipelines.core.approval import LABELS, command_of
from kilo_pipelines.core.limits import LimitsConfig
from kilo_pipelines.core.loops import is_marked, is_our_branch
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.text import clean, storable
from kilo_pipelines.core.work import FINAL, WorkState
from kilo_pipelines.services.code_review.config import CodeReviewConfig
from kilo_pipelines.services.code_review.events import IssueCommentEvent, PullRequestEvent

SERVICE = "code_review"
REVIEWED_ACTIONS = frozenset({"opened", "synchronize", "reopened", "ready_for_review"})
# A person asks for a review by this label (contract A4.2).
LABEL = "kilo"
TITLE_LIMIT = 300


class ExistingItem(Protocol):
    """What admission needs to know of an earlier item of the same pull request."""

    @property
    def id(self) -> UUID: ...
    @property
    def state(self) -> str: ...
    @property
    def head_sha(self) -> str: ...
    @property
    def base_ref(self) -> str: ...


class OwnerSetting(Protocol):
    """An owner's stored settings."""

    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def enabled(self) -> bool: ...
    @property
    def action_required(self) -> dict[str, Any] | None: ...


@dataclass(frozen=True)
class AdmissionDecision:
    """Either a reason to skip, or the details of a new item; which older items end, and which are to read the pull request again.

    Events are hints and may come late: one that opens no item ends none either. What it speaks against is interrupted and
    waits again, and its claim reads the present state.
    """

    skip: Reason | None = None
    existing_item: UUID | None = None
    # Seconds that the new item waits for the next push.
    wait_s: float = 0
    supersede: list[UUID] = field(default_factory=list)
    reexamine: list[UUID] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def subject_key(event: PullRequestEvent) -> str:
    """The pull request's key: by the repository's immutable id."""
    return subject(event.repository.id, event.pull_request.number)


def subject(repository_id: int, pull_number: int) -> str:
    """The key of a pull request."""
    return f"github:{repository_id}:pull:{pull_number}"


def _wanted(event: PullRequestEvent) -> bool:
    if event.action in REVIEWED_ACTIONS:
        return True
    if event.action == "labeled":
        return event.label is not None and event.label.name.strip().lower() == LABEL and event.pull_request.state == "open"
    return event.action == "edited" and event.changes is not None and event.changes.base is not None


def by_person(event: PullRequestEvent) -> bool:
    """Whether somebody asks for this review: by the label, set by a person."""
    return event.action == "labeled" and event.sender is not None and event.sender.type == "User"


def approval_of(event: PullRequestEvent) -> str | None:
    """Who approves this head by a label, as the signed payload tells it; whether they may is asked of the provider later."""
    if event.label is None or event.label.name.strip().lower() not in LABELS or event.sender is None or not by_person(event):
        return None
    return storable(clean(event.sender.login))


def command(event: IssueCommentEvent) -> str | Reason:
    """The commit that a comment approves (its first digits, or nothing), or why it approves none.

    Only as it was written: an edit may come from somebody else and changes what was looked at.
    """
    named = command_of(event.comment.body)
    if event.action != "created" or event.issue.pull_request is None or named is None:
        return Reason.ACTION_IGNORED
    if event.issue.state != "open":
        return Reason.PULL_CLOSED
    people = event.comment.user.type == "User" and event.sender.type == "User" and event.comment.user.id == event.sender.id
    if not people or is_marked(event.comment.body):
        return Reason.LOOP_GUARDED
    return named


def decide(
    event: PullRequestEvent,
    *,
    setting: OwnerSetting | None,
    repository_known: bool,
    items: Sequence[ExistingItem],
    limits: LimitsConfig | None = None,
) -> AdmissionDecision:
    """The decision for one event, given the owner's settings and limits and the pull request's earlier items (newest first)."""
    limits = limits or LimitsConfig()
    pull = event.pull_request
    live = [item for item in items if WorkState(item.state) not in FINAL]
    # What waits reads the pull request anyway; what was claimed has read it before this event came.
    has_read = [item for item in live if WorkState(item.state) is not WorkState.WAITING]
    if event.action == "closed":
        return AdmissionDecision(skip=Reason.PULL_CLOSED, reexamine=[item.id for item in has_read])
    if not _wanted(event):
        return AdmissionDecision(skip=Reason.ACTION_IGNORED)
    if pull.draft:
        return AdmissionDecision(skip=Reason.SKIPPED_DRAFT)
    if setting is None or not setting.enabled:
        return AdmissionDecision(skip=Reason.REVIEWER_NOT_ENABLED)
    if setting.action_required is not None:
        return AdmissionDecision(skip=Reason.ACTION_REQUIRED)
    if not repository_known:
        return AdmissionDecision(skip=Reason.REPOSITORY_UNKNOWN)
    config = CodeReviewConfig.model_validate(setting.config)
    if config.repository_selection_mode == "selected" and event.repository.id not in config.selected_repository_ids:
        return AdmissionDecision(skip=Reason.REPOSITORY_NOT_SELECTED)

    # Superseding comes before the last two skips on purpose: an obsolete review must end even when nothing follows it.
    def same(item: ExistingItem) -> bool:
        return item.head_sha == pull.head.sha and item.base_ref == pull.base.ref

    obsolete = [item.id for item in live if not same(item)]
    if pull.state != "open":
        return AdmissionDecision(skip=Reason.PULL_CLOSED, reexamine=[item.id for item in has_read if not same(item)])
    if pull.user.type == "Bot" and config.skip_bot_pull_requests and pull.user.login not in limits.allowed_bots:
        return AdmissionDecision(skip=Reason.SKIPPED_BOT_AUTHOR, supersede=obsolete)
    ours = is_our_branch(pull.head.ref, same_repository=pull.head.repo is not None and pull.head.repo.id == event.repository.id)
    if (ours or event.action == "labeled") and not by_person(event):
        return AdmissionDecision(skip=Reason.LOOP_GUARDED, supersede=obsolete if ours else [])
    standing = [item for item in items if same(item) and (item in live or item.state == WorkState.COMPLETED)]
    if standing:
        # A launch under way may have read the pull request before this event, and be about to end for it.
        doubtful = [item.id for item in has_read if not same(item) or item.state == WorkState.STARTING]
        return AdmissionDecision(skip=Reason.ALREADY_REVIEWED, existing_item=standing[0].id, reexamine=doubtful)
    wait_s = limits.push_debounce_seconds if obsolete and event.action == "synchronize" else 0
    return AdmissionDecision(supersede=obsolete, wait_s=wait_s, details=_details(event, config))


def _details(event: PullRequestEvent, config: CodeReviewConfig) -> dict[str, Any]:
    pull = event.pull_request
    return {
        "repository_id": event.repository.id,
        "full_name": event.repository.full_name,
        "pull_number": pull.number,
        "title": clean(pull.title)[:TITLE_LIMIT],
        "author": clean(pull.user.login),
        "author_type": pull.user.type,
        "url": pull.html_url,
        "base_ref": clean(pull.base.ref),
        "base_sha": pull.base.sha,
        "head_ref": clean(pull.head.ref),
        "head_sha": pull.head.sha,
        "trigger": "label" if by_person(event) else "webhook",
        "settings": config.model_dump(mode="json"),
    }
