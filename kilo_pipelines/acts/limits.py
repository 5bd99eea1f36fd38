"""What people do with an owner's limits: read and set budgets, release suggestions, approve outsiders' pull requests, suggest-only mode.

Each takes the acting role and answers with a `Refusal` instead of raising.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

from pydantic import ValidationError

from kilo_pipelines.acts.security import fields_of
from kilo_pipelines.core.limits import SETTINGS, LimitsConfig
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.refusal import Refusal
from kilo_pipelines.core.work import FINAL, WorkState
from kilo_pipelines.store import StaleRevisionError, Store

Act = Literal["read", "settings", "approve", "suggest"]

# Who may do what: who pays sets the bounds; who may merge approves what is written; the platform's mode is the operator's.
_ALLOWED: dict[Act, frozenset[str]] = {
    "read": frozenset({"operator", "owner", "member", "viewer"}),
    "settings": frozenset({"operator", "owner"}),
    "approve": frozenset({"operator", "owner", "member"}),
    "suggest": frozenset({"operator"}),
}


def may(role: str, act: Act) -> bool:
    """Whether a role allows an act; an unknown role allows nothing."""
    return role in _ALLOWED[act]


@dataclass(frozen=True)
class Kept:
    """An owner's limits and their revision, 0 while none are set."""

    config: LimitsConfig
    revision: int


def limits_of(store: Store, owner_id: UUID, *, role: str) -> Kept | Refusal:
    """An owner's limits; `limits_invalid` when what is stored can't be read."""
    if not may(role, "read"):
        return Refusal(Reason.ROLE_NOT_ALLOWED, role)
    stored = store.owners.config(owner_id, SETTINGS)
    try:
        return Kept(LimitsConfig.model_validate(stored.config if stored else {}), stored.revision if stored else 0)
    except ValidationError as failure:
        return Refusal(Reason.LIMITS_INVALID, fields_of(failure))


def set_limits(
    store: Store, owner_id: UUID, changes: Mapping[str, Any], *, expected_revision: int, role: str, actor: str
) -> Kept | Refusal:
    """Lays changes over the stored limits, compare-and-set; what isn't named stays, and what waited for a budget is looked at again."""
    if not may(role, "settings"):
        return Refusal(Reason.ROLE_NOT_ALLOWED, role)
    stored = store.owners.config(owner_id, SETTINGS)
    revision = stored.revision if stored else 0
    if revision != expected_revision:
        return Refusal(Reason.SETTINGS_STALE, f"they are at revision {revision}")
    try:
        wanted = LimitsConfig.model_validate({**(stored.config if stored else {}), **changes})
    except ValidationError as failure:
        return Refusal(Reason.SETTINGS_INVALID, fields_of(failure))
    config = wanted.model_dump(mode="json")
    try:
        made = store.owners.put_config(owner_id, SETTINGS, config, enabled=True, expected_revision=expected_revision, actor=actor)
    except StaleRevisionError:
        return Refusal(Reason.SETTINGS_STALE, "somebody was quicker")
    return Kept(wanted, made)


def approve_effect(store: Store, effect_id: UUID, sha256: str, *, role: str, actor: str) -> str | Refusal:
    """Releases one held effect exactly as it was shown; its new state."""
    if not may(role, "approve"):
        return Refusal(Reason.ROLE_NOT_ALLOWED, role)
    state = store.outbox.release(effect_id, sha256, actor=actor)
    return state if state is not None else Refusal(Reason.APPROVAL_STALE, "it isn't held any more, or isn't what was shown")


def approve_review(store: Store, item_id: UUID, head_sha: str, *, role: str, actor: str) -> UUID | Refusal:
    """Approves an outsider's pull request at the head that a waiting review names; at another one nothing is approved."""
    if not may(role, "approve"):
        return Refusal(Reason.ROLE_NOT_ALLOWED, role)
    item = store.queue.get(item_id)
    if item is None or item.service != "code_review" or WorkState(item.state) in FINAL:
        return Refusal(Reason.MOVED_ON, "no such review waits")
    if len(head_sha) < 7 or not str(item.details["head_sha"]).startswith(head_sha):
        return Refusal(Reason.APPROVAL_STALE, f"it is at {item.details['head_sha'][:12]}")
    return store.approvals.give(item.owner_id, item.details, item.subject_key, actor=actor)


def suggest_only(store: Store, scope: str, on: bool, reason: str, *, role: str, actor: str) -> bool | Refusal:
    """Suggest-only mode for `all`, `service:<name>` or `owner:<id>`; False when it wasn't on."""
    if not may(role, "suggest"):
        return Refusal(Reason.ROLE_NOT_ALLOWED, role)
    return store.queue.suggest_only(scope, on, reason, actor=actor)
