"""Deliveries that the provider sent and we don't have: what is one, and what is done about it next (goals, N3).

GitHub never redelivers by itself. Its log of an App's deliveries lists *attempts*; those of one event share a guid, which is the
delivery id of the webhook. A guid that we should have and don't is a *gap*: its redelivery is asked for once, and where that doesn't
bring it, its payload is pulled out of the log. Two clocks meet here: ages of attempts are told by the provider's, waits by ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from kilo_pipelines.core.events import ADMITTED, LIFECYCLE
from kilo_pipelines.core.reasons import Reason

# GitHub lists, redelivers and shows deliveries of the last three days; an hour less, so that a clock that is wrong by minutes and a
# run that is late ask for nothing that is gone.
RETENTION = timedelta(days=3) - timedelta(hours=1)
# GitHub waits ten seconds for an answer (Enterprise Server: 30), and our commit may come after it gave up: what is younger may still
# be on its way.
GRACE = timedelta(seconds=90)
# How far behind the last comparison the next one begins: longer than GRACE, for what was too young then, and for attempts that
# came into the log late or out of order.
OVERLAP = timedelta(minutes=10)
# A redelivery comes within seconds. Shorter than the time between two runs (schedules.REPAIR_CRON): the second one pulls.
WINDOW = timedelta(minutes=5)
# A redelivery that failed or got lost fails again while the ingress is away; a pull needs no ingress. Asking twice would only
# break the promise that everything is here within two runs.
MAX_ASKS = 1
# A pull that fails is tried again after one minute, doubled up to an hour: the ten tries span some five hours of an outage of GitHub's.
MAX_PULLS = 10
PULL_BASE = timedelta(minutes=1)
PULL_CAP = timedelta(hours=1)


@dataclass(frozen=True)
class Attempt:
    """One line of the provider's log. `answered`: our side took it (2xx or 3xx), as far as the provider saw."""

    id: int
    guid: str
    delivered_at: datetime
    answered: bool
    event: str
    action: str | None
    installation_id: int | None
    repository_id: int | None


class Standing(StrEnum):
    """What a guid of the log is to us."""

    PRESENT = "present"
    MISSING = "missing"
    NOT_TAKEN = "not_taken"  # no service admits such events
    NOT_OURS = "not_ours"  # no owner's installation, or one that several owners hold
    BEFORE_US = "before_us"  # sent before the installation was connected
    SUSPENDED = "suspended"
    TOO_YOUNG = "too_young"  # may still be on its way


def by_guid(attempts: Iterable[Attempt]) -> dict[str, list[Attempt]]:
    """Attempts of each event, oldest first, each once; the order of the log's pages doesn't matter."""
    found: dict[str, dict[int, Attempt]] = {}
    for one in attempts:
        found.setdefault(one.guid, {})[one.id] = one
    return {guid: sorted(some.values(), key=lambda one: (one.delivered_at, one.id)) for guid, some in found.items()}


def standing(
    attempts: Sequence[Attempt], *, connected_at: datetime | None, suspended: bool, stored: bool, provider_now: datetime
) -> Standing:
    """What a guid with these attempts (oldest first) is; `connected_at` None: its installation is nobody's or ambiguous."""
    newest = attempts[-1]
    if newest.event not in ADMITTED | LIFECYCLE:
        return Standing.NOT_TAKEN
    if connected_at is None:
        return Standing.NOT_OURS
    if stored:
        return Standing.PRESENT
    # Our clock against the provider's: what was sent shortly before counts as sent after, which costs nothing.
    if newest.delivered_at < connected_at - OVERLAP:
        return Standing.BEFORE_US
    if suspended and newest.event not in LIFECYCLE:
        return Standing.SUSPENDED
    if newest.delivered_at > provider_now - GRACE:
        return Standing.TOO_YOUNG
    return Standing.MISSING


class GapState(StrEnum):
    """`missing` and `asked` have a deadline; the others are final."""

    MISSING = "missing"
    ASKED = "asked"
    REPAIRED = "repaired"  # it came: by a redelivery, ours or somebody's
    PULLED = "pulled"
    GAVE_UP = "gave_up"


class Action(StrEnum):
    """What is done about a gap that is due."""

    ASK = "ask"
    PULL = "pull"
    END = "end"
    WAIT = "wait"


@dataclass(frozen=True)
class Gap:
    """What the next step depends on. `stored`: None, or whether what is there was pulled. `connected`: the installation is its owner's."""

    event: str
    state: GapState
    answered: bool
    asks: int
    pulls: int
    not_before: datetime
    deadline: datetime
    connected: bool
    suspended: bool
    stored_by_pull: bool | None


@dataclass(frozen=True)
class Step:
    """`state` and `reason` are those of an end."""

    action: Action
    state: GapState | None = None
    reason: Reason | None = None


def next_step(gap: Gap, now: datetime, *, may_ask: bool = True) -> Step:
    """The next step of an open gap. `may_ask` False: as many redeliveries as a run may ask for were asked for, so it is pulled."""
    if gap.stored_by_pull is not None:
        if gap.stored_by_pull:
            return Step(Action.END, GapState.PULLED, Reason.DELIVERY_PULLED)
        return Step(Action.END, GapState.REPAIRED, Reason.DELIVERY_REPAIRED)
    refusal = _refusal(gap, now)
    if refusal is not None:
        return Step(Action.END, GapState.GAVE_UP, refusal)
    if now < gap.not_before:
        return Step(Action.WAIT)
    # Lifecycle events aren't asked for: the ingress applies them as they come, and an old one would undo a newer one. One that was
    # answered had its turn at the ingress, and is not here.
    if gap.event in LIFECYCLE or gap.answered or gap.asks >= MAX_ASKS or not may_ask:
        return Step(Action.PULL)
    return Step(Action.ASK)


def _refusal(gap: Gap, now: datetime) -> Reason | None:
    if not gap.connected:
        return Reason.INTEGRATION_UNKNOWN
    if gap.suspended and gap.event not in LIFECYCLE:
        return Reason.INTEGRATION_SUSPENDED
    if now >= gap.deadline:
        return Reason.DELIVERY_EXPIRED
    if gap.pulls >= MAX_PULLS:
        return Reason.RETRIES_EXHAUSTED
    return None


def pull_wait(pulls: int) -> timedelta:
    """How long the next pull waits when the one after `pulls` others fails."""
    return min(PULL_CAP, PULL_BASE * (1 << min(pulls, MAX_PULLS)))
