"""Analyses of findings: the rows that hang on work items of `security_analysis`, and which of a finding holds at present."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Connection

from kilo_pipelines.store.database import Database, rows
from kilo_pipelines.store.rows import AnalysisRow

_COLUMNS = ", ".join(
    f"{'w' if name in ('state', 'reason', 'created_at', 'ended_at') else 'a'}.{name}" for name in AnalysisRow.__dataclass_fields__
)


class Analyses:
    """Analyses of all owners, each in its owner's scope."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of_finding(self, owner_id: UUID, finding_id: UUID) -> list[AnalysisRow]:
        """Every analysis of a finding, newest first."""
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                f"select {_COLUMNS} from finding_analyses a join work_items w on w.owner_id = a.owner_id and w.id = a.item_id"
                " where a.owner_id = :owner and a.finding_id = :finding order by w.created_at desc, w.id",
                owner=owner_id,
                finding=finding_id,
            )
        return [AnalysisRow(**row) for row in found]

    def latest(self, owner_id: UUID, finding_ids: Sequence[UUID]) -> dict[UUID, AnalysisRow]:
        """The newest completed analysis of each of these findings that has one."""
        with self._database.owner(owner_id) as connection:
            return latest_of(connection, owner_id, finding_ids)


def latest_of(connection: Connection, owner_id: UUID, finding_ids: Sequence[UUID]) -> dict[UUID, AnalysisRow]:
    """The same in an owner's scope."""
    found = rows(
        connection,
        f"select distinct on (a.finding_id) {_COLUMNS} from finding_analyses a join work_items w on w.owner_id = a.owner_id and w.id = a.item_id"
        " where a.owner_id = :owner and a.finding_id = any(:findings) and a.completed_at is not null and w.state = 'completed'"
        " order by a.finding_id, a.completed_at desc, w.id",
        owner=owner_id,
        findings=list(finding_ids),
    )
    return {row["finding_id"]: AnalysisRow(**row) for row in found}
