"""States of work items, sessions and attempts, and which may follow which. The store's guarded updates follow these tables."""

from __future__ import annotations

from enum import StrEnum


class WorkState(StrEnum):
    """A work item's life."""

    WAITING = "waiting"
    STARTING = "starting"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class SessionState(StrEnum):
    """A session's life; `queued` again when its worker died."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


FINAL = frozenset({WorkState.COMPLETED, WorkState.FAILED, WorkState.CANCELLED})

# Services of work items whose settings stand under another service's name; every other service has its own.
SETTINGS_OF = dict.fromkeys(("security_analysis", "dismissal", "remediation", "notice", "security_sync"), "security_agent")

# A new attempt (re-execute) leads from an end back to `waiting`; `completed` only when a person forces it.
TRANSITIONS: dict[WorkState, frozenset[WorkState]] = {
    WorkState.WAITING: frozenset({WorkState.STARTING, WorkState.CANCELLED, WorkState.FAILED}),
    # Straight to completed: work that needs no session (a dismissal, a notice, an alert that its metadata settles).
    WorkState.STARTING: frozenset({WorkState.WAITING, WorkState.RUNNING, *FINAL}),
    # Back to waiting: the retry policy opens the next attempt (core/retry.py).
    WorkState.RUNNING: frozenset({WorkState.WAITING, *FINAL}),
    WorkState.COMPLETED: frozenset({WorkState.WAITING}),
    WorkState.FAILED: frozenset({WorkState.WAITING}),
    WorkState.CANCELLED: frozenset({WorkState.WAITING}),
}

SESSION_TRANSITIONS: dict[SessionState, frozenset[SessionState]] = {
    SessionState.QUEUED: frozenset({SessionState.RUNNING, SessionState.INTERRUPTED, SessionState.FAILED}),
    SessionState.RUNNING: frozenset({SessionState.QUEUED, SessionState.COMPLETED, SessionState.FAILED, SessionState.INTERRUPTED}),
    SessionState.COMPLETED: frozenset(),
    SessionState.FAILED: frozenset(),
    SessionState.INTERRUPTED: frozenset(),
}
