"""The hands on work: repeating and cancelling items, effects that wait for a person, the switches."""

from __future__ import annotations

from typing import Literal
from uuid import UUID

from kilo_pipelines.acts.people import By
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.refusal import Refusal
from kilo_pipelines.services.permissions import act_on, may
from kilo_pipelines.store import ItemRow, Store


def cancel_item(store: Store, item: ItemRow, *, by: By) -> Refusal | None:
    """Ends a live item, its session with it."""
    if not may(by.role, act_on(item.service)):
        return Refusal(Reason.ROLE_NOT_ALLOWED, by.role)
    done = store.queue.cancel(item.id, reason=Reason.USER_CANCELLED, actor=by.actor)
    return None if done else Refusal(Reason.MOVED_ON, str(item.id))


def retry_item(store: Store, item: ItemRow, *, force: bool, by: By) -> Refusal | None:
    """Opens a new attempt of an item that failed or was cancelled, with `force` of a completed one, too."""
    if not may(by.role, act_on(item.service)):
        return Refusal(Reason.ROLE_NOT_ALLOWED, by.role)
    return None if store.queue.reopen(item.id, actor=by.actor, force=force) else Refusal(Reason.MOVED_ON, str(item.id))


def change_effect(store: Store, effect_id: UUID, act: Literal["retry", "drop"], *, by: By) -> str | Refusal:
    """Tries a dead or unknown effect again, or gives one up that isn't being applied; its new state."""
    if not may(by.role, "effects"):
        return Refusal(Reason.ROLE_NOT_ALLOWED, by.role)
    change = store.outbox.revive if act == "retry" else store.outbox.abandon
    return change(effect_id, actor=by.actor) or Refusal(Reason.MOVED_ON, str(effect_id))


def set_switch(
    store: Store, scope: str, kind: Literal["pause", "kill"], reason: str, *, owner_id: UUID | None, role: str, actor: str
) -> int | Refusal:
    """Pauses or stops a scope; how many items were cancelled. What the operator set, only the operator changes.

    `owner_id`: whose key acts, which reaches that owner's scope and no other; None for the operator.
    """
    if not reaches(scope, owner_id, role):
        return Refusal(Reason.ROLE_NOT_ALLOWED, role)
    stopped = store.queue.switch(scope, kind, reason, actor=actor)
    return Refusal(Reason.SWITCH_HELD, scope) if stopped is None else stopped


def release_switch(store: Store, scope: str, *, owner_id: UUID | None, role: str, actor: str) -> Refusal | None:
    """Releases a pause or kill switch of the same scope."""
    if not reaches(scope, owner_id, role):
        return Refusal(Reason.ROLE_NOT_ALLOWED, role)
    if store.queue.unswitch(scope, actor=actor):
        return None
    held = {one["scope"] for one in store.queue.switches()}
    return Refusal(Reason.SWITCH_HELD if scope in held else Reason.SWITCH_NOT_SET, scope)


def reaches(scope: str, owner_id: UUID | None, role: str) -> bool:
    """Whether whoever acts may switch this scope: the operator every one, an owner's key (`owner_id`) its own owner's alone."""
    return may(role, "switch") and (role == "operator" if owner_id is None else scope == f"owner:{owner_id}")
