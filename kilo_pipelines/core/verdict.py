"""The earned verdict (invariant 6): what a session's evidence allows us to conclude, and a check's conclusion."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from kilo_pipelines.core.evidence import Evidence
from kilo_pipelines.core.reasons import Reason


class Conclusion(StrEnum):
    """Conclusions of a check run (GitHub's words)."""

    SUCCESS = "success"
    NEUTRAL = "neutral"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
    ACTION_REQUIRED = "action_required"
    FAILURE = "failure"


# From best to worst; the conclusion of a head is the worst over its open pull requests (threats, rule 9).
_ORDER = list(Conclusion)

# Not reviewed is never green: GitHub lets `neutral` and `skipped` merge, so these conclusions are used instead.
_OF_REASON = {
    Reason.SESSION_TIMEOUT: Conclusion.TIMED_OUT,
    Reason.SESSION_SILENT: Conclusion.TIMED_OUT,
    Reason.DEADLINE_PASSED: Conclusion.TIMED_OUT,
    Reason.SUPERSEDED: Conclusion.CANCELLED,
    Reason.USER_CANCELLED: Conclusion.CANCELLED,
    Reason.PULL_CLOSED: Conclusion.CANCELLED,
    Reason.ALREADY_REVIEWED: Conclusion.CANCELLED,
    Reason.SKIPPED_DRAFT: Conclusion.CANCELLED,
    Reason.INTERRUPTED: Conclusion.CANCELLED,
    Reason.DIFF_TOO_LARGE: Conclusion.ACTION_REQUIRED,
    Reason.REPOSITORY_TOO_LARGE: Conclusion.ACTION_REQUIRED,
    Reason.SANDBOX_UNAVAILABLE: Conclusion.ACTION_REQUIRED,
    Reason.AGENT_UNAVAILABLE: Conclusion.ACTION_REQUIRED,
    Reason.INTEGRATION_SUSPENDED: Conclusion.ACTION_REQUIRED,
    Reason.ACTION_REQUIRED: Conclusion.ACTION_REQUIRED,
    Reason.PROVIDER_REFUSED: Conclusion.ACTION_REQUIRED,
    Reason.MODEL_REFUSED: Conclusion.ACTION_REQUIRED,
    Reason.GITHUB_APP_MISSING: Conclusion.ACTION_REQUIRED,
    Reason.KILL_SWITCH: Conclusion.CANCELLED,
    Reason.CLOUD_AGENT_REFUSED: Conclusion.ACTION_REQUIRED,
    Reason.CLOUD_AGENT_ADDRESS_REFUSED: Conclusion.ACTION_REQUIRED,
    Reason.BUDGET_EXHAUSTED: Conclusion.ACTION_REQUIRED,
    Reason.LOOP_GUARDED: Conclusion.ACTION_REQUIRED,
    Reason.OUTSIDER_SKIPPED: Conclusion.ACTION_REQUIRED,
    Reason.RULE_OF_TWO: Conclusion.ACTION_REQUIRED,
    Reason.SECRETS_MEET_OUTSIDERS: Conclusion.ACTION_REQUIRED,
    Reason.WRITE_UNAPPROVED: Conclusion.ACTION_REQUIRED,
}

SEVERITIES = ("critical", "warning", "suggestion")
# Which severities each gate threshold forbids (contract A14).
GATES: dict[str, frozenset[str]] = {
    "off": frozenset(),
    "critical": frozenset({"critical"}),
    "warning": frozenset({"critical", "warning"}),
    "all": frozenset(SEVERITIES),
}


@dataclass(frozen=True)
class EvidenceKey:
    """What evidence must be of (threats, rule 9)."""

    repository_id: int
    pull_number: int | None
    base_ref: str
    head: str


@dataclass(frozen=True)
class Verdict:
    """A conclusion and its reason; `earned` says that the whole change was reviewed with observed (or allowed) evidence."""

    conclusion: Conclusion
    reason: Reason
    earned: bool


def fault_of(evidence: Evidence | None, expected: EvidenceKey, *, accept_reported: bool) -> Reason | None:
    """The first reason why this evidence proves no review of what is expected; None when it does."""
    if evidence is None:
        return Reason.EVIDENCE_MISSING
    found = EvidenceKey(evidence.repository_id, evidence.pull_number, evidence.base_ref, evidence.head)
    if found != expected or not evidence.merge_base or not evidence.diff_hash:
        return Reason.EVIDENCE_MISMATCH
    if evidence.turns < 1:
        return Reason.NO_TURNS
    if evidence.result_sha256 is None or not evidence.result_turns:
        return Reason.RESULT_UNBOUND
    if not evidence.ledger:
        return Reason.DIFF_EMPTY
    if evidence.gaps:
        return Reason.COVERAGE_GAP
    if evidence.evidence_class == "reported" and not accept_reported:
        return Reason.EVIDENCE_REPORTED
    return None


def conclude(fault: Reason | None, severities: Iterable[str], gate: str, *, advisory: bool) -> Verdict:
    """The conclusion for a review: its fault first, then the gate.

    `advisory` is the owner's choice that this check never blocks: then whatever isn't an earned success is `neutral`.
    """
    if fault is None:
        broken = GATES[gate] & set(severities)
        verdict = (
            Verdict(Conclusion.FAILURE, Reason.GATE_FAILED, True)
            if broken
            else Verdict(Conclusion.SUCCESS, Reason.REVIEWED, True)
        )
    else:
        verdict = Verdict(_OF_REASON.get(fault, Conclusion.FAILURE), fault, False)
    if advisory and verdict.conclusion is not Conclusion.SUCCESS:
        return Verdict(Conclusion.NEUTRAL, verdict.reason, verdict.earned)
    return verdict


def worst(conclusions: Iterable[Conclusion]) -> Conclusion:
    """The worst of at least one conclusion."""
    return max(conclusions, key=_ORDER.index)
