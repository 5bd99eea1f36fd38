"""Effects on GitHub: each one is read back before it is written, so that a lost answer never posts twice (invariant 5).

Holds: payloads of the effect kinds and how each is found and written. Does not belong here: which effects are wanted
(services), when they are tried (store), texts other than the list of inline comments that GitHub refused.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from kilo_pipelines.core.effects import EffectIntent, EffectKind, EffectReceipt
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.providers.errors import ProviderError
from kilo_pipelines.providers.github import GitHubInstallation, IssueCommentAnswer, repository_path

# GitHub refuses longer bodies of reviews, comments and check summaries (65,536 characters); the rest is for the cut's own note.
MAX_BODY = 65_000


class _Payload(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    full_name: str


class CheckRunPayload(_Payload):
    """`github.check_run`: found by `external_id` on that commit among our own runs, updated in place."""

    head_sha: str
    name: str
    external_id: str
    status: Literal["queued", "in_progress", "completed"]
    conclusion: Literal["success", "failure", "timed_out", "cancelled", "action_required", "neutral"] | None = None
    title: str
    summary: str
    details_url: str | None = None


class InlineComment(BaseModel):
    """One inline comment of a review; lines are 1-based, of the file on that side of the diff."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    line: int
    side: Literal["LEFT", "RIGHT"]
    start_line: int | None = None
    body: str


class ReviewPayload(_Payload):
    """`github.review`: a review with event COMMENT; found by our marker in a review of ours on that commit."""

    pull_number: int
    commit_id: str
    body: str
    marker: str
    comments: list[InlineComment]


class SummaryPayload(_Payload):
    """`github.summary_comment`: one comment in the conversation, found by our marker and updated in place."""

    pull_number: int
    body: str
    marker: str


class ReactionPayload(_Payload):
    """`github.reaction` on the pull request itself; GitHub keeps one of each kind per user."""

    pull_number: int
    content: Literal["+1", "-1", "laugh", "confused", "heart", "hooray", "rocket", "eyes"]


class _User(BaseModel):
    login: str


class _App(BaseModel):
    id: int


class _ReviewAnswer(BaseModel):
    id: int
    user: _User | None = None
    body: str | None = None
    commit_id: str | None = None
    html_url: str


class _CheckRunAnswer(BaseModel):
    id: int
    external_id: str | None = None
    html_url: str | None = None
    app: _App | None = None


class _ReactionAnswer(BaseModel):
    id: int


class _FileAnswer(BaseModel):
    filename: str
    patch: str | None = None


def apply(installation: GitHubInstallation, intent: EffectIntent) -> EffectReceipt:
    """Makes one intended write and says what the provider holds now.

    The repository is the one that the client is limited to, under its *present* name: the payload's name is a label.
    Errors: ProviderError; `owner_changed` when the repository left the installation, `provider_invalid` for a payload
    that isn't its kind's.
    """
    try:
        if intent.kind is EffectKind.GITHUB_CHECK_RUN:
            return _check_run(installation, CheckRunPayload.model_validate(intent.payload))
        if intent.kind is EffectKind.GITHUB_REVIEW:
            return _review(installation, ReviewPayload.model_validate(intent.payload))
        if intent.kind is EffectKind.GITHUB_SUMMARY_COMMENT:
            return _summary_comment(installation, SummaryPayload.model_validate(intent.payload))
        return _reaction(installation, ReactionPayload.model_validate(intent.payload))
    except ValidationError as failure:
        fields = ", ".join(".".join(str(part) for part in error["loc"]) for error in failure.errors())
        raise ProviderError(Reason.PROVIDER_INVALID, retryable=False, detail=f"payload of {intent.kind}: {fields}") from failure


def _here(installation: GitHubInstallation) -> str:
    return repository_path(installation.repository_now().full_name)


def _check_run(installation: GitHubInstallation, wanted: CheckRunPayload) -> EffectReceipt:
    here = _here(installation)
    runs = installation.pages(
        f"{here}/commits/{wanted.head_sha}/check-runs",
        _CheckRunAnswer,
        under="check_runs",
        parameters={"check_name": wanted.name, "filter": "all"},
    )
    app_id = installation.app.app_id
    found = next((run for run in runs if run.external_id == wanted.external_id and run.app is not None and run.app.id == app_id), None)
    body: dict[str, Any] = {
        "name": wanted.name,
        "external_id": wanted.external_id,
        "status": wanted.status,
        "output": {"title": wanted.title, "summary": _cut(wanted.summary)},
    }
    if wanted.conclusion is not None:
        body["conclusion"] = wanted.conclusion
    if wanted.details_url is not None:
        body["details_url"] = wanted.details_url
    if found is None:
        made = installation.write("POST", f"{here}/check-runs", _CheckRunAnswer, {**body, "head_sha": wanted.head_sha})
    else:
        made = installation.write("PATCH", f"{here}/check-runs/{found.id}", _CheckRunAnswer, body)
    return EffectReceipt(external_id=str(made.id), url=made.html_url, created=found is None)


def _review(installation: GitHubInstallation, wanted: ReviewPayload) -> EffectReceipt:
    here = _here(installation)
    us = installation.app.login()
    pull = f"{here}/pulls/{wanted.pull_number}"
    for review in installation.pages(f"{pull}/reviews", _ReviewAnswer):
        by_us = review.user is not None and review.user.login == us
        if by_us and review.commit_id == wanted.commit_id and wanted.marker in (review.body or ""):
            return EffectReceipt(external_id=str(review.id), url=review.html_url, created=False)
    try:
        made = _post_review(installation, pull, wanted, wanted.comments, [])
    except ProviderError as failure:
        if failure.status != 422 or not wanted.comments:
            raise
        kept, refused = _commentable(installation, pull, wanted.comments)
        made = _post_review(installation, pull, wanted, kept, refused)
    return EffectReceipt(external_id=str(made.id), url=made.html_url, created=True)


def _post_review(
    installation: GitHubInstallation, pull: str, wanted: ReviewPayload, comments: list[InlineComment], refused: list[InlineComment]
) -> _ReviewAnswer:
    body = {
        "commit_id": wanted.commit_id,
        "event": "COMMENT",
        "body": _with_refused(wanted.body, refused),
        "comments": [_inline(comment) for comment in comments],
    }
    return installation.write("POST", f"{pull}/reviews", _ReviewAnswer, body)


def _inline(comment: InlineComment) -> dict[str, Any]:
    body: dict[str, Any] = {"path": comment.path, "line": comment.line, "side": comment.side, "body": _cut(comment.body)}
    if comment.start_line is not None and comment.start_line < comment.line:
        body |= {"start_line": comment.start_line, "start_side": comment.side}
    return body


def _commentable(
    installation: GitHubInstallation, pull: str, comments: list[InlineComment]
) -> tuple[list[InlineComment], list[InlineComment]]:
    """Those that lie in the diff as GitHub shows it, and the rest. GitHub's refusal names no comment.

    When all of them lie in its diff the refusal had another cause: then none is sent inline again.
    """
    lines = {file.filename: lines_of_patch(file.patch or "") for file in installation.pages(f"{pull}/files", _FileAnswer)}
    kept, refused = [], []
    for comment in comments:
        here = lines.get(comment.path, set())
        ends = {(comment.side, comment.line), (comment.side, comment.start_line or comment.line)}
        (kept if ends <= here else refused).append(comment)
    return (kept, refused) if refused else ([], comments)


def lines_of_patch(patch: str) -> set[tuple[str, int]]:
    """(side, line) of every line that a file's patch shows: where GitHub takes comments."""
    shown: set[tuple[str, int]] = set()
    left = right = 0
    for row in patch.split("\n"):
        if hunk := re.match(r"@@ -(\d+)(?:,\d+)? \+(\d+)(?:,\d+)? @@", row):
            left, right = int(hunk[1]), int(hunk[2])
        elif row.startswith("-"):
            shown.add(("LEFT", left))
            left += 1
        elif row.startswith("+"):
            shown.add(("RIGHT", right))
            right += 1
        elif row.startswith(" "):
            shown |= {("LEFT", left), ("RIGHT", right)}
            left, right = left + 1, right + 1
    return shown


def _with_refused(body: str, refused: list[InlineComment]) -> str:
    """The body with the comments that GitHub didn't take inline, as many as fit."""
    text = body
    for number, comment in enumerate(refused):
        piece = f"\n\n**`{comment.path}` line {comment.line}**\n\n{comment.body}"
        if len(text) + len(piece) > MAX_BODY:
            return f"{text}\n\n…and {len(refused) - number} more that don't fit here."
        text += piece
    return text


def _summary_comment(installation: GitHubInstallation, wanted: SummaryPayload) -> EffectReceipt:
    full_name = installation.repository_now().full_name
    here = repository_path(full_name)
    found = installation.summary_comment(full_name, wanted.pull_number, wanted.marker)
    if found is None:
        made = installation.write("POST", f"{here}/issues/{wanted.pull_number}/comments", IssueCommentAnswer, {"body": wanted.body})
    elif found.body == wanted.body:
        return EffectReceipt(external_id=str(found.id), url=found.url, created=False)
    else:
        made = installation.write("PATCH", f"{here}/issues/comments/{found.id}", IssueCommentAnswer, {"body": wanted.body})
    return EffectReceipt(external_id=str(made.id), url=made.html_url, created=found is None)


def _reaction(installation: GitHubInstallation, wanted: ReactionPayload) -> EffectReceipt:
    path = f"{_here(installation)}/issues/{wanted.pull_number}/reactions"
    made = installation.write("POST", path, _ReactionAnswer, {"content": wanted.content})
    return EffectReceipt(external_id=str(made.id), created=True)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_BODY else f"{text[:MAX_BODY]}\n\n…cut here: GitHub takes no longer text."
