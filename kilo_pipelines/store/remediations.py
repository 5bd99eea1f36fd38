"""Remediations: the rows that hang on work items of `remediation`, their pull requests, and what became of merged ones.

Number and address of a pull request are what its effect was answered with; they are joined, never copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.effects import EffectKind
from kilo_pipelines.store.database import Database, changed, rows
from kilo_pipelines.store.findings import noted
from kilo_pipelines.store.queue import audit, lock_subject, open_item
from kilo_pipelines.store.rows import NewFindingEvent, NewItem, RemediationRow

# Events with the finding that each is of.
Events = Sequence[tuple[UUID, NewFindingEvent]]

_OF_ITEM = ("repository_id", "subject_key", "state", "reason", "attempt", "created_at", "ended_at")
_OF_EFFECT = {"pull_number": "p.number", "pull_url": "p.url", "effect_state": "p.state"}
_COLUMNS = ", ".join(
    f"{_OF_EFFECT[name]} as {name}" if name in _OF_EFFECT else f"{'w' if name in _OF_ITEM else 'm'}.{name}"
    for name in RemediationRow.__dataclass_fields__
)
_FROM = (
    " from remediations m join work_items w on w.owner_id = m.owner_id and w.id = m.item_id"
    " left join lateral (select e.state, e.url, case when e.state = 'applied' then e.external_id::integer end as number from effects e"
    f" where e.owner_id = m.owner_id and e.item_id = m.item_id and e.kind = '{EffectKind.GITHUB_PULL_REQUEST}' order by e.seq desc limit 1) p on true"
)


class Remediations:
    """Remediations of all owners, each in its owner's scope."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def _read(self, owner_id: UUID, where: str, *, limit: int | None = None, **values: Any) -> list[RemediationRow]:
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                f"select {_COLUMNS}{_FROM} where m.owner_id = :owner and {where} order by w.created_at desc, w.id limit :limit",
                owner=owner_id,
                limit=limit,
                **values,
            )
        return [RemediationRow(**row) for row in found]

    def of_findings(self, owner_id: UUID, finding_ids: Sequence[UUID]) -> list[RemediationRow]:
        """Every remediation that ends one of these findings, newest first."""
        return self._read(owner_id, "m.findings && cast(:findings as uuid[])", findings=list(finding_ids))

    def of_subject(self, owner_id: UUID, subject_key: str) -> list[RemediationRow]:
        """Every remediation of a package of a manifest, newest first."""
        return self._read(owner_id, "w.service = 'remediation' and w.subject_key = :subject", subject=subject_key)

    def of_owner(self, owner_id: UUID, *, limit: int = 100) -> list[RemediationRow]:
        """The owner's newest remediations."""
        return self._read(owner_id, "true", limit=limit)

    def followed(self, owner_id: UUID, repository_id: int, *, reopened_within: timedelta) -> list[RemediationRow]:
        """Those of a repository whose pull request is not over, and whose fix has not shown.

        A closed one may be opened again: it is followed while a finding of it is open, and for as long as `reopened_within`.
        """
        return self._read(
            owner_id,
            "w.service = 'remediation' and w.repository_id = :repository and p.number is not null"
            " and m.confirmed_at is null and m.set_aside_at is null and (coalesce(m.pull_state, 'open') <> 'closed'"
            "  or (m.closed_at > :since and exists (select 1 from findings f where f.owner_id = m.owner_id and f.id = any(m.findings)"
            "   and finding_status(f.upstream_state, f.disposition) = 'open')))",
            repository=repository_id,
            since=self._clock.now() - reopened_within,
        )

    def open(self, owner_id: UUID, new: NewItem, events: Callable[[UUID], Events], *, actor: str) -> UUID | None:
        """A waiting item with the audit events of its findings; None beside a live one of its subject."""
        now = self._clock.now()
        with self._database.owner(owner_id) as connection:
            lock_subject(connection, owner_id, new.service, new.subject_key)
            item_id = open_item(connection, owner_id, new, now)
            if item_id is not None:
                audit(connection, owner_id, actor, "item.open", str(item_id), {"service": new.service}, now)
                note_all(owner_id, events(item_id), actor=actor, now=now)(connection)
        return item_id

    def follow(
        self,
        owner_id: UUID,
        row: RemediationRow,
        *,
        pull_state: str,
        outcome: str | None,
        events: Events,
    ) -> bool:
        """Keeps what a sync saw of a pull request: its state and, once it is merged, what that has led to (`AfterMerge`; None: awaited).

        False when another sync was quicker: then nothing is changed and nothing counted.
        """
        now = self._clock.now()
        merged = pull_state == "merged"
        with self._database.owner(owner_id) as connection:
            done = changed(
                connection,
                "update remediations set pull_state = :state, merged_at = case when :merged then coalesce(merged_at, :now) end,"
                " closed_at = case when :state = 'closed' then :now else closed_at end,"
                # The sync that saw the merge first may have read the alerts before it.
                " syncs_since_merge = syncs_since_merge + (:merged and pull_state is not distinct from 'merged')::int,"
                " confirmed_at = case when :outcome = 'confirmed' then :now else confirmed_at end,"
                " set_aside_at = case when :outcome = 'set_aside' then :now else set_aside_at end,"
                " flagged_at = case when :outcome = 'unconfirmed' then coalesce(flagged_at, :now) else flagged_at end"
                " where owner_id = :owner and item_id = :item and pull_state is not distinct from :known and syncs_since_merge = :syncs"
                " and confirmed_at is null and set_aside_at is null",
                owner=owner_id,
                item=row.item_id,
                state=pull_state,
                merged=merged,
                outcome=outcome,
                known=row.pull_state,
                syncs=row.syncs_since_merge,
                now=now,
            )
            if done:
                note_all(owner_id, events, actor="platform", now=now)(connection)
        return bool(done)


def note_all(owner_id: UUID, events: Events, *, actor: str, now: datetime) -> Callable[[Connection], None]:
    """`noted` for events of several findings."""
    notes = [noted(owner_id, finding_id, [event], actor=actor, now=now) for finding_id, event in events]

    def write(connection: Connection) -> None:
        for note in notes:
            note(connection)

    return write
