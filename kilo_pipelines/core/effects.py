"""Effects: intended writes to the outside, committed together with the state that wants them (invariant 5)."""

from __future__ import annotations

import hashlib
import json
from datetime import timedelta
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Delivery(StrEnum):
    """How an effect kind survives a lost answer."""

    READ_BACK = "read_back"  # find our marker at the provider first, then write
    IDEMPOTENT = "idempotent"  # writing twice equals writing once
    AT_MOST_ONCE = "at_most_once"  # ends `unknown` after a lost answer, never resent by itself


class EffectKind(StrEnum):
    """Every kind of write that the platform makes."""

    GITHUB_CHECK_RUN = "github.check_run"
    GITHUB_REVIEW = "github.review"
    GITHUB_SUMMARY_COMMENT = "github.summary_comment"
    GITHUB_REACTION = "github.reaction"
    GITHUB_DISMISS_ALERT = "github.dismiss_alert"
    GITHUB_REOPEN_ALERT = "github.reopen_alert"
    GITHUB_PULL_REQUEST = "github.pull_request"
    NOTICE_EMAIL = "notice.email"
    NOTICE_SLACK = "notice.slack"
    NOTICE_WEBHOOK = "notice.webhook"


DELIVERY: dict[EffectKind, Delivery] = {
    EffectKind.GITHUB_CHECK_RUN: Delivery.READ_BACK,
    EffectKind.GITHUB_REVIEW: Delivery.READ_BACK,
    EffectKind.GITHUB_SUMMARY_COMMENT: Delivery.READ_BACK,
    EffectKind.GITHUB_REACTION: Delivery.IDEMPOTENT,  # GitHub answers 200 with the existing reaction
    # Nobody can be asked whether a mail or a message arrived: after a lost answer a person looks.
    EffectKind.NOTICE_EMAIL: Delivery.AT_MOST_ONCE,
    EffectKind.NOTICE_SLACK: Delivery.AT_MOST_ONCE,
    EffectKind.NOTICE_WEBHOOK: Delivery.IDEMPOTENT,  # its id is the same each time, and the receiver sorts it out
    EffectKind.GITHUB_DISMISS_ALERT: Delivery.READ_BACK,  # the alert's own state tells
    EffectKind.GITHUB_REOPEN_ALERT: Delivery.READ_BACK,
    EffectKind.GITHUB_PULL_REQUEST: Delivery.READ_BACK,  # found by its branch, which is ours alone
}


# A suggestion that nobody took up within two weeks speaks of code that has moved on.
HELD_FOR = timedelta(days=14)

# Each undoes the other at the same alert.
ALERT_EFFECTS = frozenset({EffectKind.GITHUB_DISMISS_ALERT, EffectKind.GITHUB_REOPEN_ALERT})

# To people, past the provider: they take nothing of its budget.
NOTICES = frozenset({EffectKind.NOTICE_EMAIL, EffectKind.NOTICE_SLACK, EffectKind.NOTICE_WEBHOOK})


class EffectState(StrEnum):
    """States of an effect in the outbox."""

    PENDING = "pending"
    HELD = "held"  # suggest-only mode: a person releases it, or it expires
    APPLYING = "applying"
    APPLIED = "applied"
    DROPPED = "dropped"  # no longer wanted: superseded intent, owner changed
    UNKNOWN = "unknown"  # at_most_once whose answer was lost
    DEAD = "dead"  # out of tries; a person decides


class EffectIntent(BaseModel):
    """One intended write.

    `intent_key` is unique per owner: the same intent committed twice is one effect.
    `subject_key` orders effects: those of one subject apply in the order of their commit.
    `payload` is the kind's own structure (see `providers/github_effects.py`), without any secret.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: EffectKind
    intent_key: str
    subject_key: str
    payload: dict[str, Any] = Field(default_factory=dict)


def content_hash(kind: str, subject_key: str, payload: dict[str, Any]) -> str:
    """SHA-256 of exactly what would be written, and where: what a person's approval is bound to."""
    told = json.dumps([kind, subject_key, payload], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(told.encode()).hexdigest()


class EffectReceipt(BaseModel):
    """What the provider holds after an effect was applied."""

    external_id: str
    url: str | None = None
    created: bool = Field(description="False when read-back found it or an existing object was updated")
    state: str | None = Field(
        default=None, description="The state in which the provider's object is now, where that matters here"
    )
