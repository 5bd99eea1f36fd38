"""From a session's result to verdict and effects: lines, duplicates, severities and the gate are decided here, by code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from kilo_pipelines.core.approval import COMMAND
from kilo_pipelines.core.diff import Hunk, commentable
from kilo_pipelines.core.effects import EffectIntent, EffectKind
from kilo_pipelines.core.evidence import Evidence
from kilo_pipelines.core.markers import Marker
from kilo_pipelines.core.reasons import MEANING, Reason
from kilo_pipelines.core.verdict import SEVERITIES, Conclusion, EvidenceKey, Verdict, conclude, fault_of, worst
from kilo_pipelines.core.work import WorkState
from kilo_pipelines.services.code_review import render
from kilo_pipelines.services.code_review.config import CodeReviewConfig

CHECK_NAME = "kilo/code-review"
# GitHub takes more, people don't: the rest is listed in the summary.
INLINE_LIMIT = 50


def _without_nul(value: str) -> str:
    """A result is kept in the database, which takes no NUL."""
    if "\x00" in value:
        raise ValueError("NUL in text")
    return value


Text = Annotated[str, AfterValidator(_without_nul)]


class Finding(BaseModel):
    """One problem that the agent reports."""

    model_config = ConfigDict(extra="forbid")

    path: Text = Field(min_length=1, max_length=1024)
    line: int = Field(ge=1, le=10_000_000)
    start_line: int | None = Field(default=None, ge=1, le=10_000_000)
    side: Literal["RIGHT", "LEFT"] = "RIGHT"
    severity: Literal["critical", "warning", "suggestion"]
    title: Text = Field(min_length=1, max_length=200)
    body: Text = Field(max_length=4_000)
    suggestion: Text | None = Field(default=None, max_length=4_000, description="replacement text for exactly these lines")


class ReviewResult(BaseModel):
    """The result of a review session."""

    model_config = ConfigDict(extra="forbid")

    nonce: str = Field(min_length=8, max_length=128)
    summary: Text = Field(min_length=1, max_length=8_000)
    findings: list[Finding] = Field(default=[], max_length=200)


class ExistingComment(Protocol):
    """A review comment that stands on the pull request already."""

    @property
    def path(self) -> str: ...
    @property
    def line(self) -> int | None: ...
    @property
    def body(self) -> str: ...
    @property
    def is_ours(self) -> bool: ...


@dataclass(frozen=True)
class ReviewSubject:
    """What is reviewed, as the engine holds it."""

    item_id: str
    attempt: int
    subject_key: str
    repository_id: int
    full_name: str
    pull_number: int
    base_ref: str
    head_sha: str
    details_url: str | None
    settings: CodeReviewConfig


@dataclass(frozen=True)
class SessionEnd:
    """How the session ended."""

    session_id: str
    status: str
    reason: str | None
    result: dict[str, Any] | None
    evidence: Evidence | None


@dataclass(frozen=True)
class Sibling:
    """The newest review of another open pull request with the same head."""

    pull_number: int
    state: str
    conclusion: str | None


@dataclass(frozen=True)
class Interpretation:
    """What the settle transaction commits."""

    state: WorkState
    reason: Reason
    verdict: Verdict
    counts: dict[str, int]
    effects: list[EffectIntent] = field(default_factory=list)

    def stored_verdict(self) -> dict[str, Any]:
        """The verdict as it is kept with the review."""
        return {
            "conclusion": str(self.verdict.conclusion),
            "reason": str(self.verdict.reason),
            "earned": self.verdict.earned,
            "counts": self.counts,
        }


def hunks_by_path(evidence: Evidence | None) -> dict[str, list[Hunk]]:
    """Line ranges that may carry a comment, by path."""
    return {entry.path: entry.hunks for entry in evidence.ledger} if evidence else {}


def interpret(
    subject: ReviewSubject,
    session: SessionEnd,
    existing: Sequence[ExistingComment],
    siblings: Sequence[Sibling],
    marker: Marker,
) -> Interpretation:
    """Verdict and effects of an ended session."""
    expected = EvidenceKey(subject.repository_id, subject.pull_number, subject.base_ref, subject.head_sha)
    if session.status == "completed" and session.result is not None:
        review = ReviewResult.model_validate(session.result)
        fault = fault_of(session.evidence, expected, accept_reported=subject.settings.accept_reported_evidence)
    else:
        review, fault = None, Reason(session.reason or Reason.RESULT_MISSING)
    findings = _distinct(review.findings) if review else []
    verdict = conclude(
        fault, [finding.severity for finding in findings], subject.settings.gate_threshold, advisory=subject.settings.advisory
    )
    counts = {severity: sum(1 for finding in findings if finding.severity == severity) for severity in SEVERITIES}
    state = (
        WorkState.COMPLETED if verdict.earned else WorkState.CANCELLED if session.status == "interrupted" else WorkState.FAILED
    )
    posts = _review_effects(subject, review, findings, existing, session, marker) if review and verdict.earned else []
    ending = [_check(subject, verdict, counts, session, siblings, marker), *_reaction(subject, state)]
    reason = verdict.reason if fault is not None else Reason.REVIEWED
    return Interpretation(state, reason, verdict, counts, [*posts, *ending])


def _distinct(findings: list[Finding]) -> list[Finding]:
    """One finding a place and title; the worst severity of equals stays."""
    kept: dict[tuple[str, int, str, str], Finding] = {}
    for finding in sorted(findings, key=lambda one: SEVERITIES.index(one.severity)):
        kept.setdefault((finding.path, finding.line, finding.side, finding.title.strip().lower()), finding)
    return sorted(kept.values(), key=lambda one: (SEVERITIES.index(one.severity), one.path, one.line))


def _review_effects(
    subject: ReviewSubject,
    review: ReviewResult,
    findings: list[Finding],
    existing: Sequence[ExistingComment],
    session: SessionEnd,
    marker: Marker,
) -> list[EffectIntent]:
    hunks = hunks_by_path(session.evidence)
    inline: list[dict[str, Any]] = []
    elsewhere: list[Finding] = []
    repeated = 0
    for finding in findings:
        body = render.inline_comment(finding, marker.make("finding", subject.subject_key, finding.path, finding.title))
        if not commentable(hunks.get(finding.path, []), finding.side, finding.line, finding.start_line):
            elsewhere.append(finding)
        elif any(
            one.is_ours and one.path == finding.path and one.line == finding.line and _title_of(one.body) == _title_of(body)
            for one in existing
        ):
            repeated += 1
        elif len(inline) >= INLINE_LIMIT:
            elsewhere.append(finding)
        else:
            inline.append(_comment(finding, body))
    effects = []
    key = f"{subject.item_id}:{subject.attempt}"
    if inline:
        mark = marker.make("review", subject.item_id, subject.attempt)
        effects.append(
            EffectIntent(
                kind=EffectKind.GITHUB_REVIEW,
                intent_key=f"{key}:review",
                subject_key=subject.subject_key,
                payload={
                    "full_name": subject.full_name,
                    "pull_number": subject.pull_number,
                    "commit_id": subject.head_sha,
                    "body": render.review_body(len(inline), mark),
                    "marker": mark,
                    "comments": inline,
                },
            )
        )
    mark = marker.make("summary", subject.subject_key)
    body = render.summary_comment(
        review.summary, findings, elsewhere, repeated, subject.head_sha, render.evidence_lines(session.evidence), mark
    )
    effects.append(
        EffectIntent(
            kind=EffectKind.GITHUB_SUMMARY_COMMENT,
            intent_key=f"{key}:summary",
            subject_key=subject.subject_key,
            payload={"full_name": subject.full_name, "pull_number": subject.pull_number, "body": body, "marker": mark},
        )
    )
    return effects


def _title_of(body: str) -> str:
    return body.split("\n", 1)[0].strip()


def _comment(finding: Finding, body: str) -> dict[str, Any]:
    comment: dict[str, Any] = {"path": finding.path, "line": finding.line, "side": finding.side, "body": body}
    if finding.start_line is not None and finding.start_line < finding.line:
        comment["start_line"] = finding.start_line
    return comment


def check_subject(subject: ReviewSubject) -> str:
    """Check runs are ordered by head, not by pull request: several pull requests may share one."""
    return f"github:{subject.repository_id}:head:{subject.head_sha}"


def _check(
    subject: ReviewSubject,
    verdict: Verdict,
    counts: dict[str, int],
    session: SessionEnd,
    siblings: Sequence[Sibling],
    marker: Marker,
) -> EffectIntent:
    """The head's check run: the worst over the pull requests that share the head; unfinished ones keep it open."""
    waiting = [
        one.pull_number for one in siblings if WorkState(one.state) in (WorkState.WAITING, WorkState.STARTING, WorkState.RUNNING)
    ]
    judged = [Conclusion(one.conclusion) for one in siblings if one.conclusion and one.conclusion != Conclusion.CANCELLED]
    conclusion = worst([verdict.conclusion, *judged])
    title, summary = render.check_texts(verdict, counts, session.evidence, session.session_id, subject.pull_number, siblings)
    payload: dict[str, Any] = _check_payload(subject, marker) | {"title": title, "summary": summary}
    payload |= {"status": "in_progress"} if waiting else {"status": "completed", "conclusion": str(conclusion)}
    return EffectIntent(
        kind=EffectKind.GITHUB_CHECK_RUN,
        intent_key=f"{subject.item_id}:{subject.attempt}:check:concluded",
        subject_key=check_subject(subject),
        payload=payload,
    )


def _check_payload(subject: ReviewSubject, marker: Marker) -> dict[str, Any]:
    return {
        "full_name": subject.full_name,
        "head_sha": subject.head_sha,
        "name": CHECK_NAME,
        "external_id": marker.token("check", subject.repository_id, subject.head_sha),
        "details_url": subject.details_url,
    }


def _reaction(subject: ReviewSubject, state: WorkState) -> list[EffectIntent]:
    """Contract A12: done or failed shows at the pull request; a cancelled review doesn't."""
    content = {WorkState.COMPLETED: "hooray", WorkState.FAILED: "confused"}.get(state)
    if content is None:
        return []
    return [_react(subject, content)]


def _react(subject: ReviewSubject, content: str) -> EffectIntent:
    return EffectIntent(
        kind=EffectKind.GITHUB_REACTION,
        intent_key=f"{subject.item_id}:{subject.attempt}:reaction:{content}",
        subject_key=subject.subject_key,
        payload={"full_name": subject.full_name, "pull_number": subject.pull_number, "content": content},
    )


def queued_effects(subject: ReviewSubject, marker: Marker) -> list[EffectIntent]:
    """From the admission on the check stands there, so that nobody merges before the review began."""
    check = _check_payload(subject, marker) | {"status": "queued", "title": "Review queued", "summary": "Waits for a free slot."}
    key = f"{subject.item_id}:{subject.attempt}:check:queued"
    return [EffectIntent(kind=EffectKind.GITHUB_CHECK_RUN, intent_key=key, subject_key=check_subject(subject), payload=check)]


def approval_effects(subject: ReviewSubject, marker: Marker, reason: Reason) -> list[EffectIntent]:
    """The check tells who may start the review, and of which commit that would be."""
    how = (
        f"Somebody who may write to this repository comments `{COMMAND} {subject.head_sha[:12]}`, or sets the label `ok-to-test`."
    )
    check = _check_payload(subject, marker) | {
        "status": "queued",
        "title": "Waits for approval",
        "summary": f"{MEANING[reason][0]} {how}",
    }
    key = f"{subject.item_id}:{subject.attempt}:check:{reason}:{subject.head_sha[:12]}"
    return [EffectIntent(kind=EffectKind.GITHUB_CHECK_RUN, intent_key=key, subject_key=check_subject(subject), payload=check)]


def start_effects(subject: ReviewSubject, marker: Marker, admitted_head: str) -> list[EffectIntent]:
    """While the session works: the check is in progress, and the pull request was seen.

    When the head moved since the admission, the check that was queued there gets its end: nobody else speaks of that head.
    """
    check = _check_payload(subject, marker) | {
        "status": "in_progress",
        "title": "Review in progress",
        "summary": "An agent session reads this change.",
    }
    moved = []
    if admitted_head != subject.head_sha:
        before = replace(subject, head_sha=admitted_head)
        ended = {"status": "completed", "conclusion": str(Conclusion.CANCELLED), "title": "Superseded"}
        moved.append(
            EffectIntent(
                kind=EffectKind.GITHUB_CHECK_RUN,
                intent_key=f"{subject.item_id}:{subject.attempt}:check:moved",
                subject_key=check_subject(before),
                payload=_check_payload(before, marker) | ended | {"summary": f"The review is of {subject.head_sha} now."},
            )
        )
    return [
        *moved,
        EffectIntent(
            kind=EffectKind.GITHUB_CHECK_RUN,
            intent_key=f"{subject.item_id}:{subject.attempt}:check:started",
            subject_key=check_subject(subject),
            payload=check,
        ),
        _react(subject, "eyes"),
    ]


def announce(subject: ReviewSubject, state: str, reason: Reason, siblings: Sequence[Sibling], marker: Marker) -> Interpretation:
    """Verdict and effects of an item that ended without a session's result: superseded, cancelled, reaped."""
    verdict = conclude(reason, [], subject.settings.gate_threshold, advisory=subject.settings.advisory)
    end = SessionEnd(session_id="", status=state, reason=reason, result=None, evidence=None)
    counts = dict.fromkeys(SEVERITIES, 0)
    work_state = WorkState(state)
    effects = [_check(subject, verdict, counts, end, siblings, marker), *_reaction(subject, work_state)]
    return Interpretation(work_state, reason, verdict, counts, effects)
