"""People that the platform knows, and their roles in owners.

A person belongs to no owner: the same one may be a member of several. A membership is its owner's row. It is ended, never deleted, and
one that begins again is another period, so that keys of the former one stay dead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Connection

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store import system_statements as system
from kilo_pipelines.store.database import Database, changed, one, rows
from kilo_pipelines.store.queue import audit
from kilo_pipelines.store.rows import Member, Person

# (kind of the owner, present members with their roles) -> why not.
Rule = Callable[[str, Mapping[UUID, str]], Reason | None]


class People:
    """Persons and members."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def ensure(self, login: str) -> Person:
        """The person of a login (lower case), who is made known when there is none."""
        with self._database.system() as connection:
            changed(connection, system.NEW_PERSON.sql, id=uuid4(), login=login, now=self._clock.now())
            row = one(connection, system.PERSON_BY_LOGIN.sql, login=login)
        assert row is not None  # noqa: S101  # made a line above, and people are never deleted
        return Person(**row)

    def listed(self) -> list[dict[str, Any]]:
        """Every person with owners and roles, by login."""
        with self._database.system() as connection:
            return [dict(row) for row in rows(connection, system.PEOPLE.sql)]

    def members(self, owner_id: UUID) -> list[Member]:
        """An owner's present members, by login."""
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                "select person_id, role, period, added_at from owner_members where owner_id = :owner and removed_at is null",
                owner=owner_id,
            )
        with self._database.system() as connection:
            named = rows(connection, system.LOGINS.sql, ids=[row["person_id"] for row in found])
        logins = {row["id"]: row["login"] for row in named}
        return sorted((Member(login=logins[row["person_id"]], **row) for row in found), key=lambda member: member.login)

    def add(self, owner_id: UUID, person: Person, role: str, rule: Rule, *, actor: str) -> Reason | None:
        """Makes a person a member; why not, when `rule` refuses or the person is one already."""
        with self._database.owner(owner_id) as connection:
            kind, members = _locked(connection, owner_id)
            refusal = Reason.ALREADY_MEMBER if person.id in members else rule(kind, members)
            if refusal is not None:
                return refusal
            changed(
                connection,
                "insert into owner_members (owner_id, person_id, role, added_at) values (:owner, :person, :role, :now)"
                " on conflict (owner_id, person_id) do update set role = excluded.role, added_at = excluded.added_at, removed_at = null,"
                " period = owner_members.period + 1",
                owner=owner_id,
                person=person.id,
                role=role,
                now=self._clock.now(),
            )
            self._audit(connection, owner_id, actor, "member.add", person.id, {"login": person.login, "role": role})
        return None

    def change(self, owner_id: UUID, person_id: UUID, role: str | None, rule: Rule, *, actor: str) -> Reason | None:
        """Gives a member another role, or ends the membership (None); why not. `NOT_A_MEMBER` for whoever is none."""
        with self._database.owner(owner_id) as connection:
            kind, members = _locked(connection, owner_id)
            refusal = rule(kind, members) if person_id in members else Reason.NOT_A_MEMBER
            if refusal is not None:
                return refusal
            changed(
                connection,
                "update owner_members set role = coalesce(:role, role), removed_at = case when cast(:role as text) is null then cast(:now as timestamptz) end"
                " where owner_id = :owner and person_id = :person",
                owner=owner_id,
                person=person_id,
                role=role,
                now=self._clock.now(),
            )
            data = {"from": members[person_id], **({"role": role} if role else {})}
            self._audit(connection, owner_id, actor, "member.change" if role else "member.remove", person_id, data)
        return None

    def _audit(
        self, connection: Connection, owner_id: UUID, actor: str, action: str, person_id: UUID, data: dict[str, Any]
    ) -> None:
        audit(connection, owner_id, actor, action, str(person_id), data, self._clock.now())


def _locked(connection: Connection, owner_id: UUID) -> tuple[str, dict[UUID, str]]:
    """The owner's kind and its members; nobody else changes them until this transaction ends, or two could remove each other."""
    one(connection, "select pg_advisory_xact_lock(hashtextextended(:key, 0))", key=f"members:{owner_id}")
    owner = one(connection, "select kind from owners where id = :owner", owner=owner_id)
    found = rows(
        connection, "select person_id, role from owner_members where owner_id = :owner and removed_at is null", owner=owner_id
    )
    return (owner["kind"] if owner else "", {row["person_id"]: row["role"] for row in found})
