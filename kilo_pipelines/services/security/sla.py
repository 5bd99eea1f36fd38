"""The deadline of a finding as a pure function of its history and a policy: any past date can be computed again.

A budget is counted over time that counts: all of it, or Monday to Friday (UTC) with `business_days`; without the stretches in
which the finding was ignored, unless the policy says otherwise. All moments are UTC.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

RANK = {"critical": 0, "high": 1, "medium": 2, "low": 3}
# What was due in the last 90 days is compared (contract section 14: the longest report).
PERIOD = timedelta(days=90)

Status = Literal["open_within", "open_overdue", "paused", "met", "missed", "untracked"]


@dataclass(frozen=True)
class SlaPolicy:
    """Days by severity, for all repositories and for some; how days are counted; which version of the owner's policy it is."""

    days: Mapping[str, int]
    business_days: bool = False
    overrides: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    pause_while_ignored: bool = True
    version: int = 0

    def budget(self, severity: str, repository_id: int) -> int:
        """Days that a finding of this severity may stay open there."""
        return self.overrides.get(repository_id, self.days)[severity]

    def at_version(self, version: int) -> SlaPolicy:
        """The same under the version that the store keeps it as."""
        return replace(self, version=version)

    def stored(self) -> dict[str, Any]:
        """As JSON, without the version."""
        return {
            "days": dict(self.days),
            "business_days": self.business_days,
            "overrides": {str(key): dict(value) for key, value in self.overrides.items()},
            "pause_while_ignored": self.pause_while_ignored,
        }

    @classmethod
    def of_stored(cls, version: int, stored: Mapping[str, Any]) -> SlaPolicy:
        """The policy that was kept under a version."""
        overrides = {int(key): value for key, value in stored["overrides"].items()}
        return cls(stored["days"], stored["business_days"], overrides, stored["pause_while_ignored"], version)


@dataclass(frozen=True)
class HistoryEvent:
    """One step: `kind` is opened, severity, ignored, reopened or fixed; `severity` is told by opened and severity.

    `reconstructed`: learnt from the alert's dates, because it happened before the first sync.
    """

    at: datetime
    kind: str
    severity: str | None = None
    reconstructed: bool = False


def steps_of(stored: Iterable[Any]) -> list[HistoryEvent]:
    """Stored steps as these rules read them."""
    return [HistoryEvent(one.at, one.kind, one.severity, one.reconstructed) for one in stored]


@dataclass(frozen=True)
class SlaState:
    """Where a finding stands. `due_at` is None when untracked, and while it is paused in time (it depends on when it comes back).

    `met_due` and `missed_due`: deadlines of periods that a fix ended before the present one began.
    """

    status: Status
    severity: str | None = None
    started_at: datetime | None = None
    due_at: datetime | None = None
    closed_at: datetime | None = None
    budget_days: int | None = None
    paused_seconds: int = 0
    period: int = 0
    reconstructed: bool = False
    policy_version: int = 0
    steps: tuple[str, ...] = ()
    met_due: tuple[datetime, ...] = ()
    missed_due: tuple[datetime, ...] = ()


def advance(start: datetime, budget: timedelta, business_days: bool) -> datetime:
    """The moment at which this much counted time has passed since `start` (before it for a negative budget)."""
    if not business_days:
        return start + budget
    return _from_counted(_counted(start) + budget)


def counted(start: datetime, end: datetime, business_days: bool) -> timedelta:
    """Time that counts between two moments; negative when `end` is earlier."""
    return _counted(end) - _counted(start) if business_days else end - start


# A Monday: counted time is measured from here in weeks of five days.
_MONDAY = datetime(1970, 1, 5, tzinfo=UTC)
_WEEK, _WORKING_WEEK = timedelta(days=7), timedelta(days=5)


def _counted(moment: datetime) -> timedelta:
    weeks, rest = divmod(moment - _MONDAY, _WEEK)
    return weeks * _WORKING_WEEK + min(rest, _WORKING_WEEK)


def _from_counted(time: timedelta) -> datetime:
    """The earliest moment: a budget that ends with a Friday is due as Saturday begins."""
    weeks, rest = divmod(time, _WORKING_WEEK)
    if not rest:
        weeks, rest = weeks - 1, _WORKING_WEEK
    return _MONDAY + weeks * _WEEK + rest


@dataclass
class _Clock:
    """What is known so far while a history is read."""

    policy: SlaPolicy
    repository_id: int
    severity: str | None = None
    started: datetime | None = None
    due: datetime | None = None
    closed: datetime | None = None
    ended_ignored: bool = False
    # Counted time that was left when the pause began.
    left: timedelta | None = None
    paused_at: datetime | None = None
    paused: timedelta = timedelta()
    pauses: timedelta = timedelta()
    period: int = 0
    reconstructed: bool = False
    steps: list[str] = field(default_factory=list)
    met_due: list[datetime] = field(default_factory=list)
    missed_due: list[datetime] = field(default_factory=list)

    def read(self, event: HistoryEvent) -> None:
        """One step."""
        if event.kind == "opened" and self.started is None and event.severity in RANK:
            self.severity = event.severity
            self._start(event.at, "opened")
        elif self.started is None:
            return
        elif event.kind == "severity" and event.severity in RANK and event.severity != self.severity:
            self._severity(event.at, str(event.severity))
        elif event.kind == "ignored" and self.closed is None and self.paused_at is None:
            self._ignored(event.at)
        elif event.kind == "reopened":
            self._reopened(event.at)
        elif event.kind == "fixed" and self._fixable():
            self._fixed(event.at)
        else:
            return
        self.reconstructed |= event.reconstructed

    @property
    def _budget(self) -> timedelta:
        return timedelta(days=self.policy.budget(str(self.severity), self.repository_id))

    def _start(self, at: datetime, word: str) -> None:
        self.period += 1
        self.started, self.closed, self.ended_ignored = at, None, False
        self.paused = self.pauses = timedelta()
        self.paused_at = self.left = None
        self.due = advance(at, self._budget, self.policy.business_days)
        self.steps.append(f"{word} {at:%Y-%m-%d} as {self.severity}: {self._budget.days} {self._unit} until {self.due:%Y-%m-%d}")

    @property
    def _unit(self) -> str:
        return "working days" if self.policy.business_days else "days"

    def _severity(self, at: datetime, severity: str) -> None:
        raised = RANK[severity] < RANK[str(self.severity)]
        before, self.severity = self.severity, severity
        if self.closed is not None and not self.ended_ignored:
            return
        fresh = self._budget
        if self.left is not None:
            spent = counted(self._begin, self.paused_at or at, self.policy.business_days) - self.pauses
            self.left = min(self.left, fresh) if raised else fresh - spent
            self.due = advance(self.paused_at or at, self.left, self.policy.business_days)
            self.steps.append(f"{before} became {severity} {at:%Y-%m-%d} while it was ignored")
            return
        old = self.due
        if raised:
            self.due = min(self._end, advance(at, fresh, self.policy.business_days))
        else:
            self.due = advance(self._begin, fresh + self.pauses, self.policy.business_days)
        self.steps.append(
            f"{before} became {severity} {at:%Y-%m-%d}: due {self.due:%Y-%m-%d}"
            + (" as before" if self.due == old else f" ({'the earlier of the two' if raised else 'as from the start'})")
        )

    @property
    def _begin(self) -> datetime:
        assert self.started is not None  # noqa: S101  # read() looks first
        return self.started

    @property
    def _end(self) -> datetime:
        assert self.due is not None  # noqa: S101  # set with the start
        return self.due

    def _ignored(self, at: datetime) -> None:
        if not self.policy.pause_while_ignored:
            self.closed, self.ended_ignored = at, True
            self.steps.append(f"ignored {at:%Y-%m-%d}")
            return
        self.paused_at = at
        self.left = counted(at, self._end, self.policy.business_days)
        self.steps.append(f"ignored {at:%Y-%m-%d}: the clock stands")

    def _reopened(self, at: datetime) -> None:
        if self.paused_at is not None and self.left is not None:
            self._resume(at)
            self.steps.append(f"back {at:%Y-%m-%d}: due {self.due:%Y-%m-%d}")
        elif self.closed is not None and self.ended_ignored:
            self.closed, self.ended_ignored = None, False
            self.steps.append(f"back {at:%Y-%m-%d}: due {self.due:%Y-%m-%d} as before")
        elif self.closed is not None:
            (self.met_due if self.closed <= self._end else self.missed_due).append(self._end)
            self._start(at, "came back")

    def _resume(self, at: datetime) -> None:
        assert self.paused_at is not None and self.left is not None  # noqa: S101  # the callers look first
        self.paused += at - self.paused_at
        self.pauses += counted(self.paused_at, at, self.policy.business_days)
        if not self._passed:
            # Nothing left on a weekend is counted back to its beginning, but no pause makes anybody late.
            self.due = max(at, advance(at, self.left, self.policy.business_days))
        self.paused_at = self.left = None

    @property
    def _passed(self) -> bool:
        """Ignored after its deadline: that one was missed, and no pause moves it.

        By the moments: on the weekend after a deadline no counted time has gone by.
        """
        return self.paused_at is not None and self._end < self.paused_at

    def _fixable(self) -> bool:
        return self.closed is None or self.ended_ignored

    def _fixed(self, at: datetime) -> None:
        if self.paused_at is not None:
            self._resume(at)
        if self.closed is None:
            self.closed = at
        self.ended_ignored = False
        self.steps.append(f"fixed {at:%Y-%m-%d}")

    def state(self, at: datetime) -> SlaState:
        """Where it stands at a moment after everything that was read."""
        if self.started is None or self.severity is None:
            return SlaState("untracked", policy_version=self.policy.version)
        status: Status
        if self.closed is not None:
            status = "met" if self.closed <= self._end else "missed"
        elif self.paused_at is not None:
            status = "paused"
        else:
            status = "open_overdue" if self._end <= at else "open_within"
        return SlaState(
            status=status,
            severity=self.severity,
            started_at=self.started,
            due_at=None if status == "paused" and not self._passed else self.due,
            closed_at=self.closed,
            budget_days=self._budget.days,
            paused_seconds=int(self.paused.total_seconds()),
            period=self.period,
            reconstructed=self.reconstructed,
            policy_version=self.policy.version,
            steps=tuple(self.steps),
            met_due=tuple(self.met_due),
            missed_due=tuple(self.missed_due),
        )


def evaluate(history: Sequence[HistoryEvent], policy: SlaPolicy, repository_id: int, at: datetime) -> SlaState:
    """Where a finding with this history stands at a moment; what happened later is not looked at.

    A raised severity is due at the earlier of the old deadline and its own days from the change. A lowered one gets the days that
    it would have had from the start: it was never worse than what it is called now. After a fix a new period begins.
    """
    clock = _Clock(policy, repository_id)
    for event in in_order(history):
        if event.at <= at:
            clock.read(event)
    return clock.state(at)


def in_order(history: Iterable[HistoryEvent]) -> list[HistoryEvent]:
    """The steps in the one order in which they are read; those of one moment as they were recorded."""
    return sorted(history, key=lambda one: one.at)


def kept(history: Sequence[HistoryEvent], policy: SlaPolicy, repository_id: int, now: datetime) -> dict[str, Any]:
    """What is stored of a finding's deadline: nothing that changes by the clock alone.

    All steps are read, also those of a source whose clock is ahead of ours.
    """
    state = evaluate(history, policy, repository_id, max([now, *(one.at for one in history)]))
    return {
        "severity": state.severity or "",
        "started_at": state.started_at,
        "due_at": state.due_at,
        "budget_days": state.budget_days,
        "paused_seconds": state.paused_seconds,
        "paused": state.status == "paused",
        "period": state.period,
        "closed_at": state.closed_at,
        "reconstructed": state.reconstructed,
        "policy_version": state.policy_version,
        "met_due": list(state.met_due),
        "missed_due": list(state.missed_due),
        "events": len(history),
    }


def simple_due(started_at: datetime, severity: str, policy: SlaPolicy, repository_id: int) -> datetime:
    """The deadline of a finding that was opened and nothing else: what `evaluate` says, for tables."""
    return advance(started_at, timedelta(days=policy.budget(severity, repository_id)), policy.business_days)


def explain(state: SlaState) -> str:
    """How the deadline came to be, in a sentence or two for people."""
    if state.status == "untracked":
        return "No deadline: it has no known severity or was never seen open."
    if state.status == "paused" and state.due_at is not None:
        end = f"It is ignored since after its deadline, {state.due_at:%Y-%m-%d %H:%M} UTC."
    elif state.status == "paused":
        end = "It is ignored; the deadline is set when it comes back."
    elif state.closed_at is not None:
        end = f"It was closed {state.closed_at:%Y-%m-%d %H:%M} UTC, {'in time' if state.status == 'met' else 'too late'}."
    else:
        end = f"It is open and {'is' if state.status == 'open_within' else 'was'} due {state.due_at:%Y-%m-%d %H:%M} UTC."
    path = "; ".join(state.steps)
    source = " Its dates before the first sync are the provider's." if state.reconstructed else ""
    return f"{path[:1].upper()}{path[1:]}. {end} Policy version {state.policy_version}.{source}"


def percent(part: int, whole: int) -> float | None:
    """A share in percent with one decimal; None of nothing."""
    return round(100 * part / whole, 1) if whole else None


def compliance(states: Iterable[SlaState], at: datetime) -> dict[str, float | int | None]:
    """The two figures: open findings within their deadline, and met of what was due in the `PERIOD` before `at`.

    Every period of a finding has a deadline of its own; one that was ignored after its deadline missed it.
    """
    within = overdue = met = missed = 0
    for state in states:
        within += state.status == "open_within"
        overdue += state.status == "open_overdue"
        met += sum(at - PERIOD < due <= at for due in state.met_due)
        missed += sum(at - PERIOD < due <= at for due in state.missed_due)
        if state.due_at is not None and at - PERIOD < state.due_at <= at:
            met += state.status == "met"
            missed += state.status != "met"
    return {
        "open_within": within,
        "open_overdue": overdue,
        "met": met,
        "missed": missed,
        "open_within_percent": percent(within, within + overdue),
        "met_percent": percent(met, met + missed),
    }
