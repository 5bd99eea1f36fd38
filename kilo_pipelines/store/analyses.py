"""Analyses of findings: the rows that hang on work items of `security_analysis`, and which of a finding holds at present."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.store import system_statements as system
from kilo_pipelines.store.database import Database, notify, rows
from kilo_pipelines.store.findings import read_findings
from kilo_pipelines.store.queue import audit
from kilo_pipelines.store.rows import AnalysisRow, FindingRow

# Items opened in one transaction: each holds its subject's lock until the commit, and the lock table has room for thousands.
BATCH = 200
# How often a finding that comes back, or whose facts change, is analysed again by itself (contract 7.3).
MAX_REOPENED = 2
# What was begun and came to nothing is opened again after a quarter of an hour, then twice as long each time: eight times span a day
# and a third, which no outage of a model or a provider outlasts unseen.
MAX_PASSED = 8
PASSED_WAIT = timedelta(minutes=15)

_COLUMNS = ", ".join(
    f"{'w' if name in ('state', 'reason', 'created_at', 'ended_at') else 'a'}.{name}" for name in AnalysisRow.__dataclass_fields__
)

# Findings, and what their analyses so far count for: when the last one that counts was asked for, how many followed a return, how many
# were begun since and ended for a reason that passes.
_PASSED = "(w.ended_at is not null and w.state <> 'completed' and coalesce(w.reason = any(:passing), false))"
_DUE = f"""
from findings f join repositories r on r.owner_id = f.owner_id and r.external_id = f.repository_id and r.removed_at is null
join integrations i on i.owner_id = r.owner_id and i.id = r.integration_id and i.suspended_at is null and i.disconnected_at is null
left join lateral (select max(w.created_at) filter (where not {_PASSED}) as settled,
    count(*) filter (where x.origin = 'reopened' and not {_PASSED}) as reopened, bool_or(w.ended_at is null) as live
    from finding_analyses x join work_items w on w.owner_id = x.owner_id and w.id = x.item_id
    where x.owner_id = f.owner_id and x.finding_id = f.id) a on true
left join lateral (select count(*) as times, max(w.ended_at) as last
    from finding_analyses x join work_items w on w.owner_id = x.owner_id and w.id = x.item_id
    where x.owner_id = f.owner_id and x.finding_id = f.id and w.attempt > 0 and {_PASSED}
      and w.created_at > coalesce(a.settled, '-infinity')) t on true
where f.owner_id = :owner and finding_status(f.upstream_state, f.disposition) = 'open' and f.severity = any(:severities)
and (cast(:since as timestamptz) is null or f.first_seen_at >= :since) and not coalesce(a.live, false)
and t.times < :begun and (t.times = 0 or t.last + cast(:wait as interval) * power(2, t.times - 1) <= :now)
and not exists (select 1 from service_blocks b where b.owner_id = f.owner_id and b.service = 'security_analysis' and b.action_required is not null)
"""


class Analyses:
    """Analyses of all owners, each in its owner's scope."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

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
        """What holds of each of these findings: its newest completed analysis, before that the newest deep one of the same facts."""
        with self._database.owner(owner_id) as connection:
            return latest_of(connection, owner_id, finding_ids)

    def owners(self) -> list[UUID]:
        """Owners whose analyses a sweep looks at, in the order of their ids."""
        with self._database.system() as connection:
            return [row["owner_id"] for row in rows(connection, system.ANALYSING_OWNERS.sql)]

    def candidates(
        self, owner_id: UUID, severities: Sequence[str], seen_since: datetime | None, passing: Collection[str], *, limit: int
    ) -> dict[str, list[UUID]]:
        """Open findings that automatic analysis is due to, by why: `automatic` (never analysed), `reopened` (came back since), `looping`.

        `seen_since`: only findings that were first seen then or later; None is all. The worst first. An analysis that ended for one of
        the reasons `passing` doesn't count, but for the waits and the cap of what was begun. Nothing is due where it couldn't start.
        """
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                f"select f.id, case when a.settled is null then 'automatic' when a.reopened < :most then 'reopened' else 'looping' end as origin {_DUE}"
                " and (a.settled is null or exists (select 1 from finding_events e where e.owner_id = f.owner_id and e.finding_id = f.id"
                "   and e.kind = 'reopened' and e.recorded_at > a.settled))"
                " order by array_position(array['critical', 'high', 'medium', 'low'], f.severity), f.detected_at, f.id limit :limit",
                **self._due(owner_id, severities, seen_since, passing),
                limit=limit,
            )
        by_origin: dict[str, list[UUID]] = {}
        for row in found:
            by_origin.setdefault(row["origin"], []).append(row["id"])
        return by_origin

    def changed_since(
        self,
        owner_id: UUID,
        severities: Sequence[str],
        seen_since: datetime | None,
        passing: Collection[str],
        after: UUID | None,
        *,
        limit: int,
    ) -> list[tuple[FindingRow, str]]:
        """The next findings, in the order of their ids, whose row changed since they were analysed, with `reopened` or `looping`.

        What of the row changed is for the caller to see.
        """
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                f"select f.id, case when a.reopened < :most then 'reopened' else 'looping' end as origin {_DUE}"
                " and f.changed_at > a.settled and (cast(:after as uuid) is null or f.id > :after) order by f.id limit :limit",
                **self._due(owner_id, severities, seen_since, passing),
                after=after,
                limit=limit,
            )
            origins = {row["id"]: row["origin"] for row in found}
            return [(one, origins[one.id]) for one in read_findings(connection, owner_id, list(origins), None)]

    def _due(
        self, owner_id: UUID, severities: Sequence[str], seen_since: datetime | None, passing: Collection[str]
    ) -> dict[str, Any]:
        return {
            "owner": owner_id,
            "severities": list(severities),
            "since": seen_since,
            "passing": sorted(passing),
            "most": MAX_REOPENED,
            "begun": MAX_PASSED,
            "wait": PASSED_WAIT,
            "now": self._clock.now(),
        }

    def open(
        self, owner_id: UUID, finding_ids: Sequence[UUID], *, origin: str, mode: str, actor: str, skip: str | None = None
    ) -> list[UUID]:
        """Waiting items for those of these findings that are open and have no live analysis; the opened items' ids.

        With `skip` they have ended for this reason when they begin: that nothing is done is on record. What a person asked for goes first, then the worse before the better, each in the order of its asking (contract 8.3).
        """
        opened: list[UUID] = []
        for start in range(0, len(finding_ids), BATCH):
            opened += self._open(owner_id, finding_ids[start : start + BATCH], origin, mode, actor, skip)
        return opened

    def _open(
        self, owner_id: UUID, finding_ids: Sequence[UUID], origin: str, mode: str, actor: str, skip: str | None
    ) -> list[UUID]:
        now = self._clock.now()
        with self._database.owner(owner_id) as connection:
            # As `queue.lock_subject` locks one: whoever opens analyses of these findings does so one after the other.
            rows(
                connection,
                "select pg_advisory_xact_lock(hashtextextended(:prefix || x.id, 0)) from (select unnest(cast(:ids as text[])) as id order by 1) x",
                prefix=f"{owner_id}:security_analysis:finding:",
                ids=[str(one) for one in finding_ids],
            )
            found = rows(
                connection,
                """
with wanted as (
    select f.id, f.repository_id, f.severity, 'finding:' || f.id as subject, gen_random_uuid() as item from findings f
    where f.owner_id = :owner and f.id = any(:ids) and finding_status(f.upstream_state, f.disposition) = 'open'
      and not exists (select 1 from work_items w where w.owner_id = f.owner_id and w.service = 'security_analysis'
        and w.subject_key = 'finding:' || f.id and w.ended_at is null)
), items as (
    insert into work_items (owner_id, id, service, subject_key, repository_id, priority, not_before, created_at, updated_at,
        state, reason, ended_at, announced)
    select :owner, item, 'security_analysis', subject, repository_id,
        case when :origin = 'manual' then 100 else 40 - 10 * coalesce(array_position(array['critical', 'high', 'medium'], severity), 4) end,
        :now, :now, :now, case when cast(:skip as text) is null then 'waiting' else 'cancelled' end, :skip,
        case when cast(:skip as text) is not null then cast(:now as timestamptz) end, cast(:skip as text) is not null from wanted returning id
)
insert into finding_analyses (owner_id, item_id, finding_id, origin, requested_by, mode)
select :owner, w.item, w.id, :origin, :actor, :mode from wanted w returning item_id
""",
                owner=owner_id,
                ids=list(finding_ids),
                origin=origin,
                mode=mode,
                actor=actor,
                skip=skip,
                now=now,
            )
            opened = [row["item_id"] for row in found]
            if opened:
                audit(
                    connection,
                    owner_id,
                    actor,
                    "security.analysis.skipped" if skip else "security.analysis.queued",
                    str(owner_id),
                    {"origin": origin, "items": len(opened), **({"reason": skip} if skip else {})},
                    now,
                )
                notify(connection, f"item:{opened[0]}")
        return opened

    def waiting_automatic(self, owner_id: UUID) -> dict[UUID, UUID]:
        """Waiting analyses that nobody asked for: item by finding."""
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                "select a.finding_id, a.item_id from finding_analyses a join work_items w on w.owner_id = a.owner_id and w.id = a.item_id"
                " where a.owner_id = :owner and a.origin <> 'manual' and w.state = 'waiting'",
                owner=owner_id,
            )
        return {row["finding_id"]: row["item_id"] for row in found}

    def completed_since(self, owner_id: UUID, since: timedelta) -> list[UUID]:
        """Findings whose analysis completed within this time, newest first."""
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                "select finding_id from finding_analyses where owner_id = :owner and completed_at >= :since order by completed_at desc",
                owner=owner_id,
                since=self._clock.now() - since,
            )
        return list(dict.fromkeys(row["finding_id"] for row in found))


def latest_of(connection: Connection, owner_id: UUID, finding_ids: Sequence[UUID]) -> dict[UUID, AnalysisRow]:
    """The same in an owner's scope."""
    found = rows(
        connection,
        f"select distinct on (finding_id) {', '.join(AnalysisRow.__dataclass_fields__)} from (select {_COLUMNS}, first_value(a.snapshot)"
        "   over (partition by a.finding_id order by a.completed_at desc, w.id) as newest"
        "   from finding_analyses a join work_items w on w.owner_id = a.owner_id and w.id = a.item_id"
        "   where a.owner_id = :owner and a.finding_id = any(:findings) and a.completed_at is not null and w.state = 'completed') x"
        " order by finding_id, (deep is not null and snapshot = newest) desc nulls last, completed_at desc, item_id",
        owner=owner_id,
        findings=list(finding_ids),
    )
    return {row["finding_id"]: AnalysisRow(**row) for row in found}
