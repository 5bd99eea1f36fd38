"""Rate budgets: token buckets whose state lies in the database, so that every process spends from the same one (design, N7)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta


@dataclass(frozen=True)
class Rate:
    """How many requests an integration may make: `per_hour` on the long run, `burst` at once."""

    per_hour: float
    burst: float


@dataclass(frozen=True)
class Bucket:
    """A bucket as it was last written; `blocked_until` is the provider's own Retry-After."""

    tokens: float
    refilled_at: datetime
    blocked_until: datetime | None = None


@dataclass(frozen=True)
class Taken:
    """The bucket afterwards; `wait_until` is None when the tokens were taken."""

    bucket: Bucket
    wait_until: datetime | None


def full(rate: Rate, now: datetime) -> Bucket:
    """A bucket that was never used."""
    return Bucket(rate.burst, now)


def take(bucket: Bucket, rate: Rate, cost: float, now: datetime, leave: float = 0.0) -> Taken:
    """Takes `cost` tokens where `leave` more are there, or says when they will be.

    A cost above the burst is taken from a full bucket, which then owes: refused for ever it would never be done. A clock that
    went back gives nothing and takes nothing.
    """
    elapsed = max(0.0, (now - bucket.refilled_at).total_seconds())
    tokens = min(rate.burst, bucket.tokens + elapsed * rate.per_hour / 3600)
    refilled = Bucket(tokens, max(now, bucket.refilled_at), bucket.blocked_until)
    if bucket.blocked_until is not None and bucket.blocked_until > now:
        return Taken(refilled, bucket.blocked_until)
    needed = min(cost + leave, rate.burst)
    if tokens < needed:
        # A millisecond more than computed, so that rounding never sends anybody round again.
        return Taken(refilled, now + timedelta(seconds=(needed - tokens) * 3600 / rate.per_hour, milliseconds=1))
    return Taken(Bucket(tokens - cost, refilled.refilled_at), None)
