"""What documents about an owner's findings are made of: events of a period and findings, each read in one snapshot and bounded."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store.analyses import latest_of
from kilo_pipelines.store.database import Database, rows
from kilo_pipelines.store.findings import read_findings, read_history, read_policy
from kilo_pipelines.store.queue import audit
from kilo_pipelines.store.rows import AnalysisRow, FindingEventRow, FindingRow

# Contract 14.
PAGE = 1_000
STATEMENT_SECONDS = 8.0
WHOLE_SECONDS = 25.0


@dataclass(frozen=True)
class Limits:
    """How much a document may be made of: rows (events or findings), seconds; bytes of events, and of the document itself."""

    rows: int
    bytes: int
    seconds: float = WHOLE_SECONDS
    statement_seconds: float = STATEMENT_SECONDS


@dataclass(frozen=True)
class FindingEvent:
    """An audit event and the finding that it is about."""

    id: int
    finding_id: UUID
    at: datetime
    actor: str
    action: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class PeriodRead:
    """What happened in a period, with the findings to which it happened, their whole history and the policy of its end."""

    events: list[FindingEvent]
    findings: dict[UUID, FindingRow]
    repositories: dict[int, str]
    history: dict[UUID, list[FindingEventRow]]
    policy: tuple[int, dict[str, Any]] | None


@dataclass(frozen=True)
class PresentRead:
    """Findings as they stand, with the newest completed analysis of each."""

    findings: list[FindingRow]
    repositories: dict[int, str]
    analyses: dict[UUID, AnalysisRow]


class Reports:
    """Readings for documents of all owners, each in its owner's scope. None of them writes but `made`."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def period(
        self,
        owner_id: UUID,
        start: datetime,
        end: datetime,
        as_of: datetime,
        actions: Sequence[str],
        repository_id: int | None,
        limits: Limits,
    ) -> PeriodRead | Reason:
        """Events of these actions from `start` until before `end`, in their order; the reason when there are too many or it takes too long."""
        deadline = time.monotonic() + limits.seconds
        events: list[FindingEvent] = []
        findings: dict[UUID, FindingRow] = {}
        history: dict[UUID, list[FindingEventRow]] = {}
        place: tuple[datetime, int] = (start, -1)
        read, size = 0, 0
        try:
            with self._database.snapshot(owner_id, limits.statement_seconds) as connection:
                while True:
                    page = rows(
                        connection,
                        _EVENTS,
                        owner=owner_id,
                        at=place[0],
                        id=place[1],
                        end=end,
                        actions=list(actions),
                        repository=repository_id,
                        limit=PAGE,
                    )
                    read, size = read + len(page), size + sum(row["bytes"] for row in page)
                    if read > limits.rows or size > limits.bytes:
                        return Reason.REPORT_TOO_LARGE
                    about = _findings_of(connection, owner_id, page)
                    new = sorted({one for found in about.values() for one in found} - set(findings), key=str)
                    findings |= {one.id: one for one in read_findings(connection, owner_id, new, repository_id)}
                    history |= read_history(connection, owner_id, new)
                    # Of several findings (a remediation) it is told with each; a repository's report holds that repository's alone.
                    events += [
                        FindingEvent(row["id"], finding_id, row["at"], row["actor"], row["action"], row["data"])
                        for row in page
                        for finding_id in about.get(row["id"], [])
                        if finding_id in findings
                    ]
                    if len(events) > limits.rows:
                        return Reason.REPORT_TOO_LARGE
                    if time.monotonic() > deadline:
                        return Reason.REPORT_OUT_OF_TIME
                    if len(page) < PAGE:
                        policy = read_policy(connection, owner_id, as_of)
                        names = _names(connection, owner_id)
                        return PeriodRead(events, findings, names, history, policy)
                    place = (page[-1]["at"], page[-1]["id"])
        except DBAPIError as failure:
            if isinstance(failure.orig, psycopg.errors.QueryCanceled):
                return Reason.REPORT_OUT_OF_TIME
            raise

    def present(self, owner_id: UUID, repository_id: int | None, limits: Limits) -> PresentRead | Reason:
        """An owner's findings by id, or the reason why they can't be told."""
        deadline = time.monotonic() + limits.seconds
        findings: list[FindingRow] = []
        analyses: dict[UUID, AnalysisRow] = {}
        after: UUID | None = None
        try:
            with self._database.snapshot(owner_id, limits.statement_seconds) as connection:
                while True:
                    page = read_findings(connection, owner_id, None, repository_id, after=after, limit=PAGE)
                    latest = latest_of(connection, owner_id, [one.id for one in page])
                    analyses |= latest
                    # No document holds descriptions, which may be 64 KB each: only whether an analysis is of the present one is asked.
                    findings += [one if one.id in latest else replace(one, description="") for one in page]
                    if len(findings) > limits.rows:
                        return Reason.REPORT_TOO_LARGE
                    if time.monotonic() > deadline:
                        return Reason.REPORT_OUT_OF_TIME
                    if len(page) < PAGE:
                        return PresentRead(findings, _names(connection, owner_id), analyses)
                    after = page[-1].id
        except DBAPIError as failure:
            if isinstance(failure.orig, psycopg.errors.QueryCanceled):
                return Reason.REPORT_OUT_OF_TIME
            raise

    def made(self, owner_id: UUID, actor: str, data: Mapping[str, Any]) -> None:
        """The making of a report is an audit event itself."""
        with self._database.owner(owner_id) as connection:
            audit(
                connection,
                owner_id,
                actor,
                "security.audit_report.generated",
                str(owner_id),
                dict(data),
                self._clock.now(),
            )


# An event's subject is a finding, or a work item of some; a repository's report looks at both.
_EVENTS = """
select a.id, a.at, a.actor, a.action, a.subject, a.data, octet_length(a.data::text) as bytes from audit_events a
where (a.owner_id = :owner) and ((a.at, a.id) > (:at, :id)) and (a.at < :end) and (a.action = any(:actions))
    and (cast(:repository as bigint) is null
        or a.subject in (select f.id::text from findings f where (f.owner_id = :owner) and (f.repository_id = :repository))
        or a.subject in (select w.id::text from work_items w where (w.owner_id = :owner) and (w.repository_id = :repository)))
order by a.at, a.id limit :limit
"""
_ITEMS = """
select item_id, array[finding_id] as findings from finding_analyses where (owner_id = :owner) and (item_id = any(:ids))
union all select item_id, array[finding_id] from dismissals where (owner_id = :owner) and (item_id = any(:ids))
union all select item_id, array(select distinct one from unnest(findings || finding_id) as one order by one) from remediations
    where (owner_id = :owner) and (item_id = any(:ids))
"""


def _findings_of(connection: Connection, owner_id: UUID, page: Sequence[Any]) -> dict[int, list[UUID]]:
    """The findings that each event is about: its subject, or those of its subject's work."""
    subjects = {row["id"]: found for row in page if (found := _uuid(row["subject"])) is not None}
    ids = sorted(set(subjects.values()), key=str)
    items = {row["item_id"]: list(row["findings"]) for row in rows(connection, _ITEMS, owner=owner_id, ids=ids)} if ids else {}
    return {event: items.get(subject, [subject]) for event, subject in subjects.items()}


def _uuid(subject: str) -> UUID | None:
    try:
        return UUID(subject)
    except ValueError:
        return None


def _names(connection: Connection, owner_id: UUID) -> dict[int, str]:
    found = rows(connection, "select external_id, full_name from repositories where (owner_id = :owner)", owner=owner_id)
    return {row["external_id"]: row["full_name"] for row in found}
