"""Effects on GitHub: each one is read back before it is written, so that a lost answer never posts twice (invariant 5).

Holds: payloads of the effect kinds and how each is found and written. Does not belong here: which effects are wanted
(services), when they are tried (store), texts other than the list of inline comments that GitHub refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from github import GithubException
from github.CheckRun import CheckRun
from github.Commit import Commit
from github.PullRequest import PullRequest
from github.PullRequestReview import PullRequestReview
from github.Repository import Repository
from pydantic import BaseModel, ConfigDict, ValidationError

from kilo_pipelines import failpoints
from kilo_pipelines.core.diff import commentable, hunks_of
from kilo_pipelines.core.effects import EffectIntent, EffectKind, EffectReceipt
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.text import cut, one_line
from kilo_pipelines.providers import github_alerts
from kilo_pipelines.providers.github import GitHubInstallation, ProviderError, PullExistsError

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


class DismissAlertPayload(_Payload):
    """`github.dismiss_alert`: an open alert is dismissed; one that isn't open stays what its repository or a person made of it."""

    number: int
    reason: Literal["fix_started", "inaccurate", "no_bandwidth", "not_used", "tolerable_risk"]
    comment: str


class ReopenAlertPayload(_Payload):
    """`github.reopen_alert`: a dismissed alert is opened again."""

    number: int


class PullRequestPayload(_Payload):
    """`github.pull_request`: from a branch that we pushed, at the commit that we pushed; found by that branch, which is ours alone."""

    head_ref: str
    head_sha: str
    base_ref: str
    title: str
    body: str
    draft: bool


class LostLeaseError(Exception):
    """Right before the write the effect was somebody else's: nothing was written."""


def apply(installation: GitHubInstallation, intent: EffectIntent, before_write: Callable[[], bool]) -> EffectReceipt:
    """Makes one intended write and says what the provider holds now; LostLeaseError when `before_write` says no.

    Errors: ProviderError; `owner_changed` when the repository left the installation (threats, rule 16), `provider_invalid`
    for a payload that isn't its kind's.
    """
    gate = _gate(before_write, intent.kind)
    try:
        if intent.kind is EffectKind.GITHUB_CHECK_RUN:
            receipt = _check_run(installation, CheckRunPayload.model_validate(intent.payload), gate)
        elif intent.kind is EffectKind.GITHUB_REVIEW:
            receipt = _review(installation, ReviewPayload.model_validate(intent.payload), gate)
        elif intent.kind is EffectKind.GITHUB_SUMMARY_COMMENT:
            receipt = _summary_comment(installation, SummaryPayload.model_validate(intent.payload), gate)
        elif intent.kind is EffectKind.GITHUB_DISMISS_ALERT:
            receipt = _dismiss_alert(installation, DismissAlertPayload.model_validate(intent.payload), gate)
        elif intent.kind is EffectKind.GITHUB_REOPEN_ALERT:
            receipt = _reopen_alert(installation, ReopenAlertPayload.model_validate(intent.payload), gate)
        elif intent.kind is EffectKind.GITHUB_PULL_REQUEST:
            receipt = _pull_request(installation, PullRequestPayload.model_validate(intent.payload), gate)
        else:
            receipt = _reaction(installation, ReactionPayload.model_validate(intent.payload), gate)
    except ValidationError as failure:
        fields = ", ".join(".".join(str(part) for part in error["loc"]) for error in failure.errors())
        raise ProviderError(Reason.PROVIDER_INVALID, retryable=False, detail=f"payload of {intent.kind}: {fields}") from None
    failpoints.reach("after", f"send.{intent.kind}")
    return receipt


def _gate(before_write: Callable[[], bool], kind: EffectKind) -> Callable[[], None]:
    def gate() -> None:
        if not before_write():
            raise LostLeaseError("the effect's lease is somebody else's")
        failpoints.reach("before", f"send.{kind}")

    return gate


def _here(installation: GitHubInstallation, full_name: str) -> Repository:
    """The repository, provided that it is in the installation now: a cached token and a public repository would hide that."""
    try:
        repository = installation.repository(full_name)
    except ProviderError as failure:
        if failure.reason != Reason.PROVIDER_NOT_FOUND:
            raise
        raise _left(full_name) from failure
    with installation.errors():
        _, answer = repository.requester.requestJsonAndCheck("GET", "/installation/repositories", parameters={"per_page": 100})
    if repository.id not in {one["id"] for one in answer["repositories"]}:
        raise _left(full_name)
    return repository


def _left(full_name: str) -> ProviderError:
    return ProviderError(Reason.OWNER_CHANGED, retryable=False, detail=f"{full_name} is not in the installation any more")


def _check_run(installation: GitHubInstallation, wanted: CheckRunPayload, gate: Callable[[], None]) -> EffectReceipt:
    repository = _here(installation, wanted.full_name)
    values: dict[str, Any] = {
        "name": wanted.name,
        "external_id": wanted.external_id,
        "status": wanted.status,
        "output": {"title": wanted.title, "summary": cut(wanted.summary, MAX_BODY)},
    }
    if wanted.conclusion is not None:
        values["conclusion"] = wanted.conclusion
    if wanted.details_url is not None:
        values["details_url"] = wanted.details_url
    with installation.errors():
        runs = _commit(repository, wanted.head_sha).get_check_runs(check_name=wanted.name, filter="all")
        found = next((run for run in runs if run.external_id == wanted.external_id and _ours(run, installation)), None)
        gate()
        if found is None:
            made = repository.create_check_run(head_sha=wanted.head_sha, **values)
            return EffectReceipt(external_id=str(made.id), url=made.html_url, created=True)
        found.edit(**values)
        return EffectReceipt(external_id=str(found.id), url=found.html_url, created=False)


def _ours(run: CheckRun, installation: GitHubInstallation) -> bool:
    return f"{run.app.slug}[bot]" == installation.bot_login


def _commit(repository: Repository, sha: str) -> Commit:
    """A commit by its id, without asking for it."""
    return Commit(
        repository.requester,
        url=f"{repository.url}/commits/{sha}",
        attributes={"sha": sha, "url": f"{repository.url}/commits/{sha}"},
    )


def _review(installation: GitHubInstallation, wanted: ReviewPayload, gate: Callable[[], None]) -> EffectReceipt:
    repository = _here(installation, wanted.full_name)
    with installation.errors():
        pull = repository.get_pull(wanted.pull_number)
        for review in pull.get_reviews():
            by_us = review.user is not None and review.user.login == installation.bot_login
            if by_us and review.commit_id == wanted.commit_id and wanted.marker in (review.body or ""):
                return EffectReceipt(external_id=str(review.id), url=review.html_url, created=False)
        gate()
        try:
            made = _post_review(repository, pull, wanted, wanted.comments, [])
        except GithubException as failure:
            if failure.status != 422 or not wanted.comments:
                raise
            kept, refused = _commentable(pull, wanted.comments)
            gate()
            made = _post_review(repository, pull, wanted, kept, refused)
        return EffectReceipt(external_id=str(made.id), url=made.html_url, created=True)


def _post_review(
    repository: Repository, pull: PullRequest, wanted: ReviewPayload, comments: list[InlineComment], refused: list[InlineComment]
) -> PullRequestReview:
    return pull.create_review(
        commit=_commit(repository, wanted.commit_id),
        body=_with_refused(wanted.body, refused),
        event="COMMENT",
        comments=[_inline(comment) for comment in comments],
    )


def _inline(comment: InlineComment) -> Any:
    body: dict[str, Any] = {"path": comment.path, "line": comment.line, "side": comment.side, "body": cut(comment.body, MAX_BODY)}
    if comment.start_line is not None and comment.start_line < comment.line:
        body |= {"start_line": comment.start_line, "start_side": comment.side}
    return body


def _commentable(pull: PullRequest, comments: list[InlineComment]) -> tuple[list[InlineComment], list[InlineComment]]:
    """Those that lie in the diff as GitHub shows it, and the rest. GitHub's refusal names no comment.

    When all of them lie in its diff the refusal had another cause: then none is sent inline again.
    """
    hunks = {file.filename: hunks_of(file.patch or "") for file in pull.get_files()}
    kept: list[InlineComment] = []
    refused: list[InlineComment] = []
    for comment in comments:
        shown = hunks.get(comment.path, [])
        (kept if commentable(shown, comment.side, comment.line, comment.start_line) else refused).append(comment)
    return (kept, refused) if refused else ([], comments)


def _with_refused(body: str, refused: list[InlineComment]) -> str:
    """The body with the comments that GitHub didn't take inline, as many as fit."""
    text = body
    for number, comment in enumerate(refused):
        # The path is the pull request's author's own text, and here it stands in ours.
        place = one_line(comment.path, 200).replace("`", "")
        piece = f"\n\n**`{place}` line {comment.line}**\n\n{comment.body}"
        if len(text) + len(piece) > MAX_BODY:
            return f"{text}\n\n…and {len(refused) - number} more that don't fit here."
        text += piece
    return text


def _summary_comment(installation: GitHubInstallation, wanted: SummaryPayload, gate: Callable[[], None]) -> EffectReceipt:
    repository = _here(installation, wanted.full_name)
    with installation.errors():
        pull = repository.get_pull(wanted.pull_number)
        ours = [
            one
            for one in pull.get_issue_comments()
            if one.user is not None and one.user.login == installation.bot_login and wanted.marker in (one.body or "")
        ]
        newest = max(ours, key=lambda one: one.id, default=None)
        gate()
        if newest is None:
            newest = pull.create_issue_comment(wanted.body)
        elif newest.body != wanted.body:
            newest.edit(wanted.body)
        return EffectReceipt(external_id=str(newest.id), url=newest.html_url, created=not ours)


def _reaction(installation: GitHubInstallation, wanted: ReactionPayload, gate: Callable[[], None]) -> EffectReceipt:
    repository = _here(installation, wanted.full_name)
    with installation.errors():
        issue = repository.get_pull(wanted.pull_number).as_issue()
        gate()
        made = issue.create_reaction(wanted.content)
        return EffectReceipt(external_id=str(made.id), created=True)


def _pull_request(installation: GitHubInstallation, wanted: PullRequestPayload, gate: Callable[[], None]) -> EffectReceipt:
    """`head_moved` for a branch, or a pull request from it, that shows another commit than ours, or leads elsewhere: nobody checked that."""
    repository = _here(installation, wanted.full_name)
    if (found := _already_there(installation, wanted)) is not None:
        return found
    with installation.errors():
        if repository.get_commit(f"heads/{wanted.head_ref}").sha != wanted.head_sha:
            raise _moved(wanted.head_ref, "is at another commit")
    gate()
    try:
        made = installation.create_pull(
            wanted.full_name,
            title=wanted.title,
            body=cut(wanted.body, MAX_BODY),
            head=wanted.head_ref,
            base=wanted.base_ref,
            draft=wanted.draft,
        )
    except PullExistsError:
        # An earlier write of ours, whose answer was lost, has landed since we looked.
        if (found := _already_there(installation, wanted)) is None:
            raise
        return found
    if made.head_sha != wanted.head_sha:
        installation.close_pull(wanted.full_name, made.number)
        raise _moved(wanted.head_ref, "is at another commit")
    return EffectReceipt(external_id=str(made.number), url=made.url, created=True)


def _already_there(installation: GitHubInstallation, wanted: PullRequestPayload) -> EffectReceipt | None:
    """The pull request from our branch, when there is one, open or not; `head_moved` as in `_pull_request`."""
    found = installation.find_pull(wanted.full_name, wanted.head_ref)
    if found is None:
        return None
    if found.head_sha != wanted.head_sha:
        raise _moved(wanted.head_ref, "is at another commit")
    if found.base_ref != wanted.base_ref:
        raise _moved(wanted.head_ref, f"leads to {found.base_ref}")
    return EffectReceipt(external_id=str(found.number), url=found.url, created=False)


def _moved(head_ref: str, how: str) -> ProviderError:
    return ProviderError(Reason.HEAD_MOVED, retryable=False, detail=f"{head_ref} {how}")


def _dismiss_alert(installation: GitHubInstallation, wanted: DismissAlertPayload, gate: Callable[[], None]) -> EffectReceipt:
    return _alert(
        installation,
        wanted,
        "open",
        lambda: github_alerts.dismiss_alert(installation, wanted.full_name, wanted.number, wanted.reason, wanted.comment),
        gate,
    )


def _reopen_alert(installation: GitHubInstallation, wanted: ReopenAlertPayload, gate: Callable[[], None]) -> EffectReceipt:
    return _alert(
        installation,
        wanted,
        "dismissed",
        lambda: github_alerts.reopen_alert(installation, wanted.full_name, wanted.number),
        gate,
    )


def _alert(
    installation: GitHubInstallation,
    wanted: DismissAlertPayload | ReopenAlertPayload,
    leaves: str,
    write: Callable[[], dict[str, Any]],
    gate: Callable[[], None],
) -> EffectReceipt:
    """Writes only where the alert still is in the state that the write leaves: what was fixed or decided meanwhile stands."""
    found = github_alerts.get_alert(installation, wanted.full_name, wanted.number)
    written = found.get("state") == leaves
    if written:
        gate()
        found = write()
    url, state = (one if isinstance(one := found.get(name), str) else None for name in ("html_url", "state"))
    return EffectReceipt(external_id=str(wanted.number), url=url, created=written, state=state)
