"""What people let go, and what they hold back: suggestions, outsiders' pull requests, suggest-only mode. Budgets are settings (acts/services).

Each takes the acting role and answers with a `Refusal` instead of raising.
"""

from __future__ import annotations

from uuid import UUID

from kilo_pipelines.acts.people import By
from kilo_pipelines.acts.work import reaches
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.refusal import Refusal
from kilo_pipelines.core.work import FINAL, WorkState
from kilo_pipelines.services.permissions import may
from kilo_pipelines.store import Store


def approve_effect(store: Store, effect_id: UUID, sha256: str, *, by: By) -> str | Refusal:
    """Releases one held effect exactly as it was shown; its new state."""
    if not may(by.role, "effects"):
        return Refusal(Reason.ROLE_NOT_ALLOWED, by.role)
    state = store.outbox.release(effect_id, sha256, actor=by.actor)
    return state if state is not None else Refusal(Reason.APPROVAL_STALE, "it isn't held any more, or isn't what was shown")


def approve_review(store: Store, item_id: UUID, head_sha: str, *, by: By) -> UUID | Refusal:
    """Approves an outsider's pull request at the head that a waiting review names; at another one nothing is approved."""
    if not may(by.role, "work"):
        return Refusal(Reason.ROLE_NOT_ALLOWED, by.role)
    item = store.queue.get(item_id)
    if item is None or item.service != "code_review" or WorkState(item.state) in FINAL:
        return Refusal(Reason.MOVED_ON, "no such review waits")
    if len(head_sha) < 7 or not str(item.details["head_sha"]).startswith(head_sha):
        return Refusal(Reason.APPROVAL_STALE, f"it is at {item.details['head_sha'][:12]}")
    return store.approvals.give(item.owner_id, item.details, item.subject_key, actor=by.actor)


def suggest_only(
    store: Store, scope: str, on: bool, reason: str, *, owner_id: UUID | None, role: str, actor: str
) -> Refusal | None:
    """Suggest-only mode for `all`, `service:<name>` or `owner:<id>`. What the operator set, only the operator changes.

    `owner_id`: whose key acts, which reaches that owner's scope and no other; None for the operator.
    """
    if not reaches(scope, owner_id, role):
        return Refusal(Reason.ROLE_NOT_ALLOWED, role)
    if store.queue.suggest_only(scope, on, reason, actor=actor):
        return None
    held = f"suggest:{scope}" in {one["scope"] for one in store.queue.switches()}
    return Refusal(Reason.SWITCH_HELD if held else Reason.SWITCH_NOT_SET, scope)
