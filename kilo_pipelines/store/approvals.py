"""Approvals of outsiders' pull requests: asked for by an event, granted once the provider said that its author may write."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Connection

from kilo_pipelines.core.approval import WAITING_FOR_APPROVAL
from kilo_pipelines.core.clock import Clock
from kilo_pipelines.store.database import Database, changed, notify, one, rows
from kilo_pipelines.store.queue import audit
from kilo_pipelines.store.standing import wake

# The newest ones decide; a pull request that is commented on without end isn't read without end.
LOOKED_AT = 20


# Whoever was given the right to write meanwhile says so again.
ASKED_AGAIN_AFTER = timedelta(hours=1)


@dataclass(frozen=True)
class Approval:
    id: UUID
    head_sha: str
    login: str
    how: str
    granted: bool | None
    reason: str | None
    asked_at: datetime

    @property
    def by(self) -> str:
        """Who gave it: a person of the provider, by its name, or one of the platform."""
        return self.login if self.how == "platform" else f"github:{self.login}"


def note_approval(
    connection: Connection,
    owner_id: UUID,
    repository_id: int,
    pull_number: int,
    *,
    head_sha: str,
    login: str,
    how: str,
    subject_key: str,
    granted: bool | None,
    now: datetime,
) -> UUID:
    """Keeps an approval and wakes what waits for one; `granted` is None for an event's, which the next claim asks the provider about.

    The same person's word on the same head is asked about once an hour: comments cost nothing, questions and runs do. The audit calls
    people of the provider by its name, so that nobody there can be called as one of ours.
    """
    approval_id = uuid4()
    known = granted is None and one(
        connection,
        "select id from approvals where owner_id = :owner and repository_id = :repository and pull_number = :pull and head_sha = :head"
        " and login = :login and how <> 'platform' and (granted is null or asked_at > :since) limit 1",
        owner=owner_id,
        repository=repository_id,
        pull=pull_number,
        head=head_sha,
        login=login,
        since=now - ASKED_AGAIN_AFTER,
    )
    if known:
        return UUID(str(known["id"]))
    changed(
        connection,
        "insert into approvals (owner_id, id, repository_id, pull_number, head_sha, login, how, granted, asked_at, decided_at)"
        " values (:owner, :id, :repository, :pull, :head, :login, :how, :granted, :now, :decided)",
        owner=owner_id,
        id=approval_id,
        repository=repository_id,
        pull=pull_number,
        head=head_sha,
        login=login,
        how=how,
        granted=granted,
        now=now,
        decided=None if granted is None else now,
    )
    told = {"head": head_sha, "how": how, "granted": granted}
    actor = login if how == "platform" else f"github:{login}"
    audit(connection, owner_id, actor, "review.approve", subject_key, told, now)
    if wake(connection, owner_id, WAITING_FOR_APPROVAL, now, subject_key):
        notify(connection, f"approval:{approval_id}")
    return approval_id


class Approvals:
    """Approvals of all owners, each in its owner's scope."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def of_pull(self, owner_id: UUID, repository_id: int, pull_number: int) -> list[Approval]:
        """The newest approvals of a pull request, newest first."""
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                "select id, head_sha, login, how, granted, reason, asked_at from approvals where owner_id = :owner"
                " and repository_id = :repository and pull_number = :pull order by asked_at desc, id limit :most",
                owner=owner_id,
                repository=repository_id,
                pull=pull_number,
                most=LOOKED_AT,
            )
        return [Approval(**row) for row in found]

    def decide(self, owner_id: UUID, approval_id: UUID, *, granted: bool, reason: str | None = None) -> None:
        """What the provider says of the giver's permission; the first answer stands."""
        now = self._clock.now()
        with self._database.owner(owner_id) as connection:
            if changed(
                connection,
                "update approvals set granted = :granted, reason = :reason, decided_at = :now"
                " where owner_id = :owner and id = :id and granted is null",
                owner=owner_id,
                id=approval_id,
                granted=granted,
                reason=reason,
                now=now,
            ):
                told = {"granted": granted, "reason": reason}
                audit(connection, owner_id, "platform", "review.approval_checked", str(approval_id), told, now)

    def give(self, owner_id: UUID, details: dict[str, Any], subject_key: str, *, actor: str) -> UUID:
        """A person of the platform approves the head that a review's row names."""
        with self._database.owner(owner_id) as connection:
            return note_approval(
                connection,
                owner_id,
                details["repository_id"],
                details["pull_number"],
                head_sha=details["head_sha"],
                login=actor,
                how="platform",
                subject_key=subject_key,
                granted=True,
                now=self._clock.now(),
            )
