"""Lists and figures of an owner's findings, all out of one definition of status, overdue and outcome (contract 15 and 17.23).

Every condition stands in parentheses of its own beside the owner's, so that no filter can widen another.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from kilo_pipelines.store.database import one, rows
from kilo_pipelines.store.system_statements import WATCHED, WATCHED_BY

SEVERITIES = ("critical", "high", "medium", "low")
# Contract 15.
DUE_SOON = timedelta(days=7)
OVERDUE_SHOWN = 10
REPOSITORIES_SHOWN = 10

STATUSES = ("open", "fixed", "ignored", "closed")
OUTCOMES = (
    "not_analyzed",
    "analyzing",
    "failed",
    "exploitable",
    "not_exploitable",
    "safe_to_dismiss",
    "needs_review",
    "triage_complete",
    "fixed",
    "dismissed",
)
# Results of an analysis, and what of them asks a person to act.
ANALYZED = ("exploitable", "not_exploitable", "safe_to_dismiss", "needs_review", "triage_complete")
NEEDS_ACTION = ("not_analyzed", "failed", "exploitable", "needs_review", "triage_complete")

# A finding that is being analysed is `analyzing`, whatever is known of it; else its newest completed analysis speaks, a deep one before
# the shallow one; what a deep analysis can't decide and gives no word for is a person's to look at.
# Laterals: each probes an index by finding, whatever the planner knows of tables that a first sync has just filled.
_FINDINGS = f"""
select f.*, finding_status(f.upstream_state, f.disposition) as status, r.full_name as repository,
    s.due_at, s.budget_days, coalesce(s.paused, false) as paused, s.closed_at,
    {WATCHED} as watched,
    (finding_status(f.upstream_state, f.disposition) = 'open' and not coalesce(s.paused, false) and s.closed_at is null
        and coalesce(s.due_at <= :now, false) and {WATCHED}) as overdue,
    case
        when finding_status(f.upstream_state, f.disposition) = 'fixed' then 'fixed'
        when finding_status(f.upstream_state, f.disposition) = 'ignored' then 'dismissed'
        when n.live then 'analyzing'
        when y.item_id is null then case when n.failed then 'failed' else 'not_analyzed' end
        when y.exploitable = 'true' then 'exploitable'
        when y.exploitable = 'false' then 'not_exploitable'
        when y.action = 'dismiss' then 'safe_to_dismiss'
        when y.action = 'manual_review' then 'needs_review'
        when y.triage_action = 'analyze_codebase' then 'triage_complete'
        else 'needs_review'
    end as outcome
from findings f
join repositories r on r.owner_id = f.owner_id and r.external_id = f.repository_id
{WATCHED_BY}
left join finding_sla s on s.owner_id = f.owner_id and s.finding_id = f.id
left join lateral (
    select bool_or(w.ended_at is null) as live, bool_or(w.state = 'failed') as failed
    from finding_analyses a join work_items w on w.owner_id = a.owner_id and w.id = a.item_id
    where (a.owner_id = :owner) and (a.finding_id = f.id)
) n on true
left join lateral (
    -- the one that counts, as store/analyses.py says: the newest deep one of the newest facts before a later shallow one
    select z.item_id, z.deep ->> 'exploitable' as exploitable,
        coalesce(z.deep ->> 'action', z.triage ->> 'action') as action, z.triage ->> 'action' as triage_action
    from (select a.item_id, a.deep, a.triage, a.completed_at, a.snapshot, first_value(a.snapshot) over (order by a.completed_at desc, w.id) as newest
        from finding_analyses a join work_items w on w.owner_id = a.owner_id and w.id = a.item_id
        where (a.owner_id = :owner) and (a.finding_id = f.id) and (a.completed_at is not null) and (w.state = 'completed')) z
    order by (z.deep is not null and z.snapshot = z.newest) desc nulls last, z.completed_at desc, z.item_id limit 1
) y on true
where (f.owner_id = :owner) and (cast(:repository as bigint) is null or f.repository_id = :repository)
"""
_WANTED = """
(cast(:status as text) is null or x.status = :status or (:status = 'closed' and x.status <> 'open'))
and (cast(:severity as text) is null or x.severity = :severity)
and (cast(:outcome as text) is null or x.outcome = :outcome)
and (not :overdue or x.overdue)
"""
_RANK = "array_position(array['critical', 'high', 'medium', 'low'], x.severity)"
_TIES = "x.due_at nulls last, x.detected_at, x.id"
ORDERS = {
    "severity_desc": f"{_RANK}, {_TIES}",
    "severity_asc": f"{_RANK} desc, {_TIES}",
    "sla_due_at_asc": f"x.due_at nulls last, {_RANK}, x.detected_at, x.id",
}
LISTED = (
    "id, repository_id, repository, source_id, severity, package_name, package_ecosystem, manifest_path, title, cve_id, ghsa_id,"
    " patched_version, status, upstream_state, disposition, disposition_reason, html_url, detected_at, due_at, budget_days, paused,"
    " closed_at, overdue, outcome"
)


@dataclass(frozen=True)
class Wanted:
    """What a list is narrowed to; `status` one of `STATUSES` (closed: fixed or ignored), `outcome` one of `OUTCOMES`."""

    status: str | None = None
    severity: str | None = None
    repository_id: int | None = None
    outcome: str | None = None
    overdue: bool = False


def _values(owner_id: UUID, wanted: Wanted, now: datetime) -> dict[str, Any]:
    return {
        "owner": owner_id,
        "now": now,
        "status": wanted.status,
        "severity": wanted.severity,
        "repository": wanted.repository_id,
        "outcome": wanted.outcome,
        "overdue": wanted.overdue,
    }


def read_page(
    connection: Connection, owner_id: UUID, wanted: Wanted, *, sort: str, limit: int, offset: int, now: datetime
) -> list[dict[str, Any]]:
    """Findings with their deadlines and outcomes."""
    found = rows(
        connection,
        f"select {LISTED} from ({_FINDINGS}) x where {_WANTED} order by {ORDERS[sort]} limit :limit offset :offset",
        **_values(owner_id, wanted, now),
        limit=limit,
        offset=offset,
    )
    return [dict(row) for row in found]


def count_wanted(connection: Connection, owner_id: UUID, wanted: Wanted, now: datetime) -> int:
    """How many findings the filters let through."""
    row = one(connection, f"select count(*) as n from ({_FINDINGS}) x where {_WANTED}", **_values(owner_id, wanted, now))
    assert row is not None  # noqa: S101  # aggregates always answer
    return int(row["n"])


# One pass over the findings; what is counted of them by severity is added up where a whole is wanted.
_BY_SEVERITY = f"""
select x.severity, count(*) as findings,
    count(*) filter (where x.status = 'open') as open,
    count(*) filter (where x.status = 'fixed') as fixed,
    count(*) filter (where x.status = 'ignored') as ignored,
    count(*) filter (where x.overdue) as overdue,
    count(*) filter (where x.status = 'open' and x.due_at is not null and x.watched and not x.overdue) as within_due,
    count(*) filter (where x.status = 'open' and x.due_at is null) as untracked,
    count(*) filter (where x.status = 'open' and x.watched and not x.overdue and x.due_at <= :soon) as due_soon,
    count(*) filter (where x.status = 'open' and x.watched and not x.overdue and x.due_at <= :soon and x.outcome = 'exploitable') as due_soon_exploitable,
    {", ".join(f"count(*) filter (where x.outcome = '{name}') as {name}" for name in OUTCOMES[:8])},
    count(*) filter (where x.status = 'fixed' and x.fixed_at is not null) as fixed_dated,
    avg(extract(epoch from greatest(x.fixed_at - x.detected_at, interval '0')) / 86400)
        filter (where x.status = 'fixed' and x.fixed_at is not null) as mean_days,
    percentile_cont(0.5) within group (order by extract(epoch from greatest(x.fixed_at - x.detected_at, interval '0')) / 86400)
        filter (where x.status = 'fixed' and x.fixed_at is not null) as median_days
from ({_FINDINGS}) x group by grouping sets ((x.severity), ())
"""
_REPOSITORIES = f"""
select x.repository_id, x.repository, count(*) as open,
    {", ".join(f"count(*) filter (where x.severity = '{name}') as {name}" for name in SEVERITIES)},
    count(*) filter (where x.overdue) as overdue,
    count(*) filter (where x.outcome = any(:acting)) as needs_action,
    count(*) over () as repositories
from ({_FINDINGS}) x where (x.status = 'open') group by x.repository_id, x.repository
order by critical desc, overdue desc, needs_action desc, x.repository, x.repository_id limit :shown
"""
_OVERDUE = f"""
select x.id, x.repository_id, x.repository, x.severity, x.package_name, x.title, x.due_at,
    floor(extract(epoch from cast(:now as timestamptz) - x.due_at) / 86400)::integer as days_overdue
from ({_FINDINGS}) x where (x.overdue) order by x.due_at, x.id limit :shown
"""
_COUNTED = ("findings", "open", "fixed", "ignored", "overdue", "within_due", "untracked", "due_soon", "due_soon_exploitable")


def read_summary(connection: Connection, owner_id: UUID, repository_id: int | None, now: datetime) -> dict[str, Any]:
    """Counts by severity and in all (`by_severity`, `overall`), times to fix in days, the oldest overdue findings, the worst repositories."""
    asked = {"owner": owner_id, "repository": repository_id, "now": now}
    counted = {row["severity"]: dict(row) for row in rows(connection, _BY_SEVERITY, **asked, soon=now + DUE_SOON)}
    nothing = dict.fromkeys((*_COUNTED, *OUTCOMES[:8], "fixed_dated"), 0) | {"mean_days": None, "median_days": None}
    repositories = rows(connection, _REPOSITORIES, **asked, acting=list(NEEDS_ACTION), shown=REPOSITORIES_SHOWN)
    return {
        "overall": {**nothing, **counted.get(None, {})},
        "by_severity": {name: {**nothing, **counted.get(name, {})} for name in SEVERITIES},
        "overdue": [dict(row) for row in rows(connection, _OVERDUE, **asked, shown=OVERDUE_SHOWN)],
        "repositories": [{name: value for name, value in row.items() if name != "repositories"} for row in repositories],
        "repositories_open": repositories[0]["repositories"] if repositories else 0,
    }


# A remediation may be of several findings; the other kinds are of one each.
_WORK = """
select w.id, w.service, w.state, w.reason, w.attempt, w.created_at, w.ended_at, coalesce((
    select jsonb_agg(jsonb_build_object('kind', e.kind, 'state', e.state, 'reason', e.reason, 'url', e.url) order by e.seq)
    from effects e where (e.owner_id = w.owner_id) and (e.item_id = w.id)), '[]') as effects
from work_items w where (w.owner_id = :owner) and (w.id in (
    select item_id from finding_analyses where (owner_id = :owner) and (finding_id = :finding)
    union select item_id from dismissals where (owner_id = :owner) and (finding_id = :finding)
    union select item_id from remediations where (owner_id = :owner) and (finding_id = :finding or :finding = any(findings))
    union select item_id from notices where (owner_id = :owner) and (finding_id = :finding)))
order by w.created_at desc, w.id
"""


def read_work(connection: Connection, owner_id: UUID, finding_id: UUID) -> list[dict[str, Any]]:
    """The work items of a finding with their effects."""
    return [dict(row) for row in rows(connection, _WORK, owner=owner_id, finding=finding_id)]
