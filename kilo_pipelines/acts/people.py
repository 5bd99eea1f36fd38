"""Owners, their members and their keys: what the acting role may change."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from kilo_pipelines.core import people as rules
from kilo_pipelines.core.people import Role
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.refusal import Refusal
from kilo_pipelines.services.code_review.admission import SERVICE as CODE_REVIEW
from kilo_pipelines.services.code_review.config import CodeReviewConfig
from kilo_pipelines.services.permissions import may
from kilo_pipelines.store import ApiKey, NewKey, Owner, Person, Store


@dataclass(frozen=True)
class By:
    """Who acts: the owner that is acted on, the role and the name in audit events; of a key also its id and its person."""

    owner_id: UUID
    role: str
    actor: str
    person_id: UUID | None = None
    key_id: UUID | None = None


def create_owner(store: Store, kind: str, name: str, plan: str, login: str | None, *, role: str, actor: str) -> Owner | Refusal:
    """A new owner with Code Review at its defaults, and its first person as owner. A person's own owner has exactly one."""
    if not may(role, "platform"):
        return Refusal(Reason.ROLE_NOT_ALLOWED, role)
    if kind == "user" and login is None:
        return Refusal(Reason.PERSONAL_OWNER, "a person's own owner needs that person's login")
    known = None if login is None else rules.login_of(login)
    if login is not None and known is None:
        return Refusal(Reason.PAYLOAD_SHAPE_MISMATCH, "login: it is none")
    owner = store.owners.create(kind, name, plan)
    if known is not None:
        person = store.people.ensure(known)
        store.people.add(
            owner.id, person, "owner", lambda kind, members: rules.refuse_change(kind, members, person.id, "owner"), actor=actor
        )
    config = CodeReviewConfig().model_dump(mode="json")
    store.owners.put_config(owner.id, CODE_REVIEW, config, enabled=True, expected_revision=0, actor=actor)
    return owner


def add_member(store: Store, login: str, role: Role, *, by: By) -> Person | Refusal:
    """Makes a person a member; whoever isn't known yet becomes known."""
    if not may(by.role, "members"):
        return Refusal(Reason.ROLE_NOT_ALLOWED, by.role)
    known = rules.login_of(login)
    if known is None:
        return Refusal(Reason.PAYLOAD_SHAPE_MISMATCH, "login: it is none")
    person = store.people.ensure(known)
    refusal = store.people.add(
        by.owner_id,
        person,
        role,
        lambda kind, members: rules.refuse_change(kind, members, person.id, role),
        actor=by.actor,
    )
    return person if refusal is None else Refusal(refusal, known)


def change_member(store: Store, person_id: UUID, role: Role | None, *, by: By) -> Refusal | None:
    """Gives a member another role, or ends the membership (None): that person's keys sink or die with it, at the next request."""
    if not may(by.role, "members"):
        return Refusal(Reason.ROLE_NOT_ALLOWED, by.role)
    refusal = store.people.change(
        by.owner_id,
        person_id,
        role,
        lambda kind, members: rules.refuse_change(kind, members, person_id, role),
        actor=by.actor,
    )
    return None if refusal is None else Refusal(refusal, str(person_id))


def create_key(
    store: Store, role: Role, name: str, person_id: UUID | None, days: int, *, by: By, now: datetime
) -> NewKey | Refusal:
    """A new key of the owner; of a person, it is never more than that person is."""
    if not may(by.role, "keys"):
        return Refusal(Reason.ROLE_NOT_ALLOWED, by.role)
    if person_id is not None:
        present = next((one.role for one in store.people.members(by.owner_id) if one.person_id == person_id), None)
        if present is not None and not rules.covers(present, role):
            return Refusal(Reason.ROLE_TOO_HIGH, f"the person is {present}")
    made = store.api_keys.create(
        role, by.owner_id, expires_at=rules.key_ends(now, days), name=name, person_id=person_id, actor=by.actor
    )
    return Refusal(Reason.NOT_A_MEMBER, str(person_id)) if made is None else made


def keys_of(store: Store, *, by: By) -> list[ApiKey]:
    """The owner's keys; without the right to make some, those of the own person, and the one that asks."""
    return [one for one in store.api_keys.of_owner(by.owner_id) if _sees(by, one)]


def rotate_key(store: Store, key_id: UUID, days: int, overlap_hours: int, *, by: By, now: datetime) -> NewKey | Refusal:
    """A new key in place of a live one, which stays valid for the overlap at most.

    Never above the asking key's role, or a small key of a person would be exchanged for a bigger one.
    """
    held = _held(store, key_id, by)
    if held is None:
        return Refusal(Reason.KEY_UNKNOWN, str(key_id))
    if not rules.covers(by.role, held.role_now):
        return Refusal(Reason.ROLE_NOT_ALLOWED, by.role)
    ends, until = rules.key_ends(now, days), rules.overlap_ends(now, overlap_hours)
    made = store.api_keys.rotate(key_id, expires_at=ends, old_until=until, actor=by.actor)
    return Refusal(Reason.KEY_NOT_LIVE, str(key_id)) if made is None else made


def revoke_key(store: Store, key_id: UUID, *, by: By) -> Refusal | None:
    """Ends a key at once."""
    if _held(store, key_id, by) is None:
        return Refusal(Reason.KEY_UNKNOWN, str(key_id))
    return None if store.api_keys.revoke(key_id, actor=by.actor) else Refusal(Reason.KEY_NOT_LIVE, str(key_id))


def _held(store: Store, key_id: UUID, by: By) -> ApiKey | None:
    """A key that whoever acts may handle; what is another owner's is none."""
    found = store.api_keys.get(key_id)
    return found if found is not None and found.owner_id == by.owner_id and _sees(by, found) else None


def _sees(by: By, key: ApiKey) -> bool:
    own = by.person_id is not None and key.person_id == by.person_id
    return may(by.role, "keys") or own or key.id == by.key_id
