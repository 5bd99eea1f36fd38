"""The one retry policy: which failures of the work are tried again, how often, after how long, and which disable a service.

Source: contract A11 (one attempt more after an infrastructure failure, never after a cap, a cancel or a push) and A13
(reasons that need a person switch the service off). Effects have the outbox's own back-off; this is about attempts.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

from kilo_pipelines.core.reasons import Reason


class FailureClass(StrEnum):
    """Why a session or a launch did not lead to a verdict."""

    INFRASTRUCTURE = "infrastructure"  # a worker, a sandbox or the agent's process died
    DEPENDENCY = "dependency"  # model, provider or git host did not answer
    ACTION_REQUIRED = "action_required"  # the owner has to change something at the provider
    OPERATOR = "operator"  # the operator has to change a key or the machine; the owner's service stays on
    INPUT = "input"  # what was asked can't be done, or was done and did not count
    STOPPED = "stopped"  # a person, a push or the platform ended it
    BUDGET = "budget"  # the day's budget ran out in the middle: the next day has another one
    LIMIT = "limit"  # a cap of ours: the same work would meet it again


@dataclass(frozen=True)
class Policy:
    """`attempts` in all for one item; `delay` before the next; `disables` the owner's service until a person acts."""

    attempts: int
    delay: timedelta = timedelta()
    disables: bool = False


POLICY: dict[FailureClass, Policy] = {
    # A host that just lost a worker is given ten seconds to get one again.
    FailureClass.INFRASTRUCTURE: Policy(attempts=2, delay=timedelta(seconds=10)),
    # Outages of minutes are common, of seconds rare.
    FailureClass.DEPENDENCY: Policy(attempts=2, delay=timedelta(seconds=60)),
    FailureClass.ACTION_REQUIRED: Policy(attempts=1, disables=True),
    FailureClass.OPERATOR: Policy(attempts=1),
    FailureClass.INPUT: Policy(attempts=1),
    FailureClass.STOPPED: Policy(attempts=1),
    # The claim lets it wait for the day; who runs out of two days' rests will run out of the third.
    FailureClass.BUDGET: Policy(attempts=2),
    FailureClass.LIMIT: Policy(attempts=1),
}

# Every reason with which a session or a launch may fail; a test holds it against the reasons that code gives.
CLASS_OF: dict[Reason, FailureClass] = {
    Reason.AGENT_CRASHED: FailureClass.INFRASTRUCTURE,
    Reason.SESSION_LOST: FailureClass.INFRASTRUCTURE,
    Reason.CHECKOUT_FAILED: FailureClass.INFRASTRUCTURE,
    Reason.FETCH_FAILED: FailureClass.DEPENDENCY,
    Reason.MODEL_UNREACHABLE: FailureClass.DEPENDENCY,
    Reason.PROVIDER_UNAVAILABLE: FailureClass.DEPENDENCY,
    Reason.PROVIDER_RATE_LIMITED: FailureClass.DEPENDENCY,
    Reason.PUSH_FAILED: FailureClass.DEPENDENCY,
    Reason.CLOUD_AGENT_UNAVAILABLE: FailureClass.DEPENDENCY,
    Reason.CLOUD_AGENT_BUSY: FailureClass.DEPENDENCY,
    Reason.CLOUD_AGENT_PROTOCOL: FailureClass.DEPENDENCY,  # a page of something in between passes
    Reason.CLOUD_AGENT_SESSION_GONE: FailureClass.INFRASTRUCTURE,
    Reason.CLOUD_AGENT_FAILED: FailureClass.INFRASTRUCTURE,
    Reason.CLOUD_AGENT_REFUSED: FailureClass.OPERATOR,
    Reason.CLOUD_AGENT_ADDRESS_REFUSED: FailureClass.OPERATOR,
    Reason.HOSTED_WORK_REFUSED: FailureClass.OPERATOR,
    Reason.HOSTED_UNMETERED: FailureClass.OPERATOR,
    Reason.CLOUD_AGENT_INVALID: FailureClass.INPUT,
    Reason.PROVIDER_REFUSED: FailureClass.ACTION_REQUIRED,
    Reason.PERMISSION_MISSING: FailureClass.ACTION_REQUIRED,
    Reason.MODEL_REFUSED: FailureClass.OPERATOR,
    Reason.MODEL_MISSING: FailureClass.OPERATOR,
    Reason.MODEL_NOT_ALLOWED: FailureClass.OPERATOR,
    Reason.INSUFFICIENT_CREDITS: FailureClass.OPERATOR,
    Reason.GITHUB_APP_MISSING: FailureClass.OPERATOR,
    Reason.SANDBOX_UNAVAILABLE: FailureClass.OPERATOR,
    Reason.AGENT_UNAVAILABLE: FailureClass.OPERATOR,
    Reason.PROVIDER_NOT_FOUND: FailureClass.INPUT,
    Reason.PROVIDER_INVALID: FailureClass.INPUT,
    Reason.REPOSITORY_TOO_LARGE: FailureClass.INPUT,
    Reason.GROUND_TOO_WIDE: FailureClass.INPUT,
    Reason.DIFF_TOO_LARGE: FailureClass.INPUT,
    Reason.DIFF_EMPTY: FailureClass.INPUT,
    Reason.RESULT_MISSING: FailureClass.INPUT,  # the runner has had its repair turn
    Reason.RESULT_INVALID: FailureClass.INPUT,
    Reason.RESULT_UNBOUND: FailureClass.INPUT,
    Reason.NO_TURNS: FailureClass.INPUT,
    Reason.COVERAGE_GAP: FailureClass.INPUT,
    Reason.EVIDENCE_MISSING: FailureClass.INPUT,
    Reason.EVIDENCE_MISMATCH: FailureClass.INPUT,
    Reason.EVIDENCE_REPORTED: FailureClass.INPUT,
    # The same tree would be refused again.
    Reason.CHANGE_UNREADABLE: FailureClass.INPUT,
    Reason.CHANGE_PACK_REFUSED: FailureClass.INPUT,
    Reason.CHANGE_HISTORY: FailureClass.INPUT,
    Reason.CHANGE_NESTED_REPOSITORY: FailureClass.INPUT,
    Reason.CHANGE_GITLINK: FailureClass.INPUT,
    Reason.CHANGE_SYMLINK: FailureClass.INPUT,
    Reason.CHANGE_MODE: FailureClass.INPUT,
    Reason.CHANGE_PATH: FailureClass.INPUT,
    Reason.CHANGE_PROTECTED: FailureClass.INPUT,
    Reason.CHANGE_FOREIGN_SOURCE: FailureClass.INPUT,
    Reason.CHANGE_INSTALL_SCRIPT: FailureClass.INPUT,
    Reason.CHANGE_TOO_LARGE: FailureClass.INPUT,
    Reason.BRANCH_TAKEN: FailureClass.INPUT,
    Reason.REGISTRY_UNKNOWN: FailureClass.OPERATOR,
    Reason.REGISTRY_MIRROR_FAILED: FailureClass.INFRASTRUCTURE,
    Reason.BUDGET_EXHAUSTED: FailureClass.BUDGET,
    Reason.BUDGET_EXCEEDED: FailureClass.LIMIT,
    Reason.SESSION_SILENT: FailureClass.LIMIT,
    Reason.SESSION_TIMEOUT: FailureClass.LIMIT,
    Reason.DEADLINE_PASSED: FailureClass.LIMIT,
    Reason.NO_CAPACITY: FailureClass.LIMIT,
    Reason.RETRIES_EXHAUSTED: FailureClass.LIMIT,
    **dict.fromkeys((Reason.RULE_OF_TWO, Reason.SECRETS_MEET_OUTSIDERS, Reason.WRITE_UNAPPROVED), FailureClass.INPUT),
    Reason.LOOP_GUARDED: FailureClass.STOPPED,
    Reason.OUTSIDER_SKIPPED: FailureClass.STOPPED,
    Reason.SUGGEST_ONLY: FailureClass.STOPPED,
    Reason.HEAD_MOVED: FailureClass.STOPPED,
    Reason.INTERRUPTED: FailureClass.STOPPED,
    Reason.SUPERSEDED: FailureClass.STOPPED,
    Reason.USER_CANCELLED: FailureClass.STOPPED,
    Reason.PULL_CLOSED: FailureClass.STOPPED,
    Reason.SKIPPED_DRAFT: FailureClass.STOPPED,
    Reason.OWNER_CHANGED: FailureClass.STOPPED,
    Reason.KILL_SWITCH: FailureClass.STOPPED,
    Reason.INTEGRATION_SUSPENDED: FailureClass.STOPPED,
    Reason.ACTION_REQUIRED: FailureClass.STOPPED,
}


def next_attempt(reason: Reason, attempt: int) -> timedelta | None:
    """After how long an item whose attempt (from 1) failed so is tried again; None: not again. Unknown reasons never are."""
    failure = CLASS_OF.get(reason)
    if failure is None or attempt >= POLICY[failure].attempts:
        return None
    return POLICY[failure].delay


def disables(reason: Reason) -> bool:
    """Whether the owner's service is switched off until a person acts."""
    failure = CLASS_OF.get(reason)
    return failure is not None and POLICY[failure].disables


# A provider that was away is asked again after this, doubled with every try up to the cap; the item waits meanwhile without a
# slot and is never failed by its age (invariant 4).
LAUNCH_WAIT = timedelta(seconds=30)
LAUNCH_WAIT_CAP = timedelta(minutes=15)
# A refused token is minted anew once or twice; a third refusal is an answer.
REFUSED_TRIES = 3


def launch_wait(reason: Reason, tries: int, retry_after: timedelta | None) -> timedelta | None:
    """How long a claimed item waits after its launch met a provider's failure that may pass; None: it ends."""
    if reason is Reason.PROVIDER_REFUSED and tries + 1 >= REFUSED_TRIES:
        return None
    return retry_after or min(LAUNCH_WAIT_CAP, LAUNCH_WAIT * 2 ** min(tries, 10))


# Without credit at the model's provider the owner's service waits as a whole: half an hour first, then twice as long each time up
# to a day; after the fifth time in a row a person has to act (contract 8.4 has a flat half hour, weakness 21).
BLOCKING = frozenset({Reason.INSUFFICIENT_CREDITS})
BLOCK = timedelta(minutes=30)
BLOCK_CAP = timedelta(hours=24)
BLOCKS_UNTIL_A_PERSON_ACTS = 5


def block(times: int) -> timedelta | None:
    """How long an owner's service is blocked for the time `times` in a row (from 1); None: until a person acts."""
    if times > BLOCKS_UNTIL_A_PERSON_ACTS:
        return None
    return min(BLOCK_CAP, BLOCK * (1 << (times - 1)))


# Launches of one item that a model's or provider's failure sent back to wait (contract 8.4).
MAX_LAUNCH_TRIES = 5


# A hosted session's call that may be made again: after 5 s, then twice as long each time up to five minutes; an outage that
# outlasts them all (about a quarter of an hour) ends the attempt, and the policy above tries the work once more.
HOSTED_WAIT = timedelta(seconds=5)
HOSTED_WAIT_CAP = timedelta(minutes=5)
HOSTED_TRIES = 9
# What an ended session left at the service is tried to be closed for about two hours: no turn lives longer there (contract B4).
HOSTED_CLOSINGS = 30


def hosted_wait(tries: int, most: int = HOSTED_TRIES) -> timedelta | None:
    """How long a hosted session waits after a call failed for the time `tries` in a row (from 1); None: it ends."""
    return None if tries >= most else min(HOSTED_WAIT_CAP, HOSTED_WAIT * (1 << (tries - 1)))
