"""The retry policy is one table over all reasons, and every retry has a bound."""

from __future__ import annotations

import ast
from datetime import timedelta
from pathlib import Path

import pytest

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.retry import CLASS_OF, LAUNCH_WAIT_CAP, POLICY, FailureClass, disables, launch_wait, next_attempt

ROOT = Path(__file__).resolve().parents[2] / "kilo_pipelines"
# Where sessions and launches get their reasons from.
SOURCES = ["cloud_agent", "ops", "providers/github.py", "store/recovery.py", "core/verdict.py"]
# Reasons that are said there and end no attempt: answers to a claim, verdicts, notes on a lease that is taken again, outcomes of a
# sync, which the next one repeats by the clock.
NO_FAILURE = {
    Reason.MOVED_ON,
    Reason.ALREADY_REVIEWED,
    Reason.REVIEWED,
    Reason.GATE_FAILED,
    Reason.EVENT_UNKNOWN,
    Reason.PAYLOAD_SHAPE_MISMATCH,
    Reason.WORKER_LOST,
    Reason.WORKER_STOPPING,
    Reason.SECURITY_DISABLED,
    Reason.NO_REPOSITORIES,
    Reason.SYNC_OUT_OF_TIME,
    Reason.SYNC_FAILED,
    Reason.ALERTS_SYNCED,
    Reason.SYNC_PARTLY,
    Reason.ALERTS_DISABLED,
    Reason.PAGE_CURSOR_REFUSED,
    Reason.PROVIDER_AUTH,
    Reason.NOT_SYNCED_YET,
    Reason.ALERT_OUTDATED,
    Reason.ALERT_MALFORMED,
    Reason.ALERT_REFUSED,
    Reason.FINDING_NOT_FOUND,
    Reason.FINDING_NOT_OPEN,
    Reason.ROLE_NOT_ALLOWED,
    Reason.ANALYSIS_NOT_WANTED,
    Reason.ANALYSIS_ACTIVE,
    Reason.NOTICE_NOT_WANTED,
    Reason.NOTIFIED,
    Reason.CHANNEL_MISSING,
    Reason.CHANNEL_REFUSED,
    Reason.CHANNEL_UNAVAILABLE,
    Reason.ADDRESS_REFUSED,
    Reason.INVALID_DISMISS_TARGET,
    Reason.DISMISSED,
    Reason.AUTO_DISMISS_DISABLED,
    Reason.NEVER_DISMISSED,
    Reason.CATALOGUE_MISSING,
    Reason.ANALYSIS_SPEAKS_AGAINST,
    Reason.CONFIDENCE_TOO_LOW,
    Reason.DISMISSAL_ACTIVE,
    Reason.GROUND_CHANGED,
    Reason.REPO_NOT_IN_SCOPE,
    Reason.ANALYSIS_REQUIRED,
    Reason.SANDBOX_ANALYSIS_REQUIRED,
    Reason.STALE_ANALYSIS,
    Reason.REMEDIATION_ACTIVE,
    Reason.PR_ALREADY_OPENED,
    Reason.MONITOR_REQUIRED,
    Reason.EXPLOITABILITY_UNKNOWN,
    Reason.TRIAGE_ONLY,
    Reason.ACTION_NOT_CONCRETE,
    Reason.NOT_EXPLOITABLE,
    Reason.MANUAL_REVIEW_REQUIRED,
    Reason.AUTO_REMEDIATION_DISABLED,
    Reason.APPROVAL_REQUIRED,
    Reason.INCLUDE_EXISTING_DISABLED,
    Reason.BELOW_THRESHOLD,
    Reason.BEFORE_ENABLEMENT,
    Reason.DUPLICATE_ANALYSIS_RESULT,
    Reason.RETRY_NOT_ALLOWED,
    Reason.COVERED_BY_OPEN_PULL,
    Reason.REMEDIATED,
    Reason.NO_CHANGES_NEEDED,
    Reason.REMEDIATION_BLOCKED,
    Reason.ANALYSIS_LOOP,
    Reason.ANALYSED,
    Reason.ANALYSIS_CONTRADICTED,
    Reason.TRIAGE_UNUSABLE,
    # ends of missed deliveries, which have tries of their own (core/delivery_gaps)
    Reason.DELIVERY_REPAIRED,
    Reason.DELIVERY_PULLED,
    Reason.DELIVERY_EXPIRED,
    Reason.DUPLICATE_DELIVERY,
    Reason.LIFECYCLE_APPLIED,
    Reason.BODY_TOO_LARGE,
    Reason.INSTALLATION_ID_MISSING,
    Reason.ACTION_IGNORED,
    Reason.APPROVAL_NOTED,
    Reason.APPROVAL_STALE,
    Reason.APPROVAL_REFUSED,
    Reason.SUGGESTION_EXPIRED,
}


def _said() -> set[Reason]:
    files = [
        file for source in SOURCES for file in ([ROOT / source] if source.endswith(".py") else (ROOT / source).rglob("*.py"))
    ]
    names = {
        node.attr
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Reason"
    }
    return {Reason[name] for name in names}


def test_every_reason_that_code_gives_is_classified() -> None:
    assert _said() - NO_FAILURE - set(CLASS_OF) == set()


@pytest.mark.parametrize("reason", list(CLASS_OF))
def test_no_failure_is_tried_for_ever(reason: Reason) -> None:
    assert next_attempt(reason, 1_000) is None


def test_infrastructure_gets_exactly_one_more_attempt() -> None:
    """Contract A11: at most one attempt-level retry per review."""
    assert next_attempt(Reason.AGENT_CRASHED, 1) == POLICY[FailureClass.INFRASTRUCTURE].delay
    assert next_attempt(Reason.AGENT_CRASHED, 2) is None


@pytest.mark.parametrize(
    "reason",
    [
        Reason.SESSION_TIMEOUT,
        Reason.INTERRUPTED,
        Reason.SUPERSEDED,
        Reason.USER_CANCELLED,
        Reason.RESULT_UNBOUND,
        Reason.KILL_SWITCH,
    ],
)
def test_caps_pushes_cancels_and_lies_are_never_tried_again(reason: Reason) -> None:
    assert next_attempt(reason, 1) is None


def test_what_the_owner_must_mend_disables_and_nothing_else_does() -> None:
    assert {reason for reason in Reason if disables(reason)} == {
        reason for reason, failure in CLASS_OF.items() if failure is FailureClass.ACTION_REQUIRED
    }
    assert disables(Reason.PROVIDER_REFUSED) and not disables(Reason.MODEL_REFUSED)


def test_a_launch_waits_longer_each_time_and_obeys_retry_after() -> None:
    waits = [launch_wait(Reason.PROVIDER_UNAVAILABLE, tries, None) for tries in range(12)]
    assert waits == sorted(waits, key=lambda one: one or timedelta()) and waits[-1] == LAUNCH_WAIT_CAP
    assert launch_wait(Reason.PROVIDER_RATE_LIMITED, 9, timedelta(seconds=7)) == timedelta(seconds=7)
    assert launch_wait(Reason.PROVIDER_REFUSED, 2, None) is None
