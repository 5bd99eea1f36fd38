"""Every statement that looks across owners, each with its reason (invariant 8). A test lists them.

They run under the system login, and nothing else does: a test watches that login while the whole store is used. What knows
its owner runs under the owner's scope; sessions are claimed, kept and ended here because the host's capacity, which is
nobody's, changes in the same transaction.
"""

from __future__ import annotations

from typing import NamedTuple

from kilo_pipelines.core.limits import LimitsConfig

# Why an item is where it is. One that waits behind a switch isn't offered at all, so that no claim could write that down.
WHY = (
    "case when w.state = 'waiting' then coalesce((select case x.kind when 'kill' then 'kill_switch' else 'paused' end from switches x"
    " where x.scope in ('all', 'service:' || w.service, 'owner:' || w.owner_id) order by x.kind limit 1), w.reason) else w.reason end"
)


class SystemStatement(NamedTuple):
    """SQL and why it may not be scoped to one owner."""

    sql: str
    reason: str


# A repository (r) that its owner's installation can see: neither it nor the integration (via) is gone or suspended, and GitHub didn't
# say at the last sync (seen) that it left. What can't be read can't be seen to be mended: it accuses nobody.
WITHIN_REACH = (
    "(r.removed_at is null and via.disconnected_at is null and via.suspended_at is null"
    " and seen.outcome is distinct from 'owner_changed')"
)
REACHED_BY = (
    "join integrations via on via.owner_id = r.owner_id and via.id = r.integration_id"
    " left join repository_syncs seen on seen.owner_id = r.owner_id and seen.repository_id = r.external_id"
)
SELECTED = (
    "(c.config ->> 'repository_selection_mode' is distinct from 'selected'"
    " or coalesce(c.config -> 'selected_repository_ids' @> to_jsonb(r.external_id), false))"
)
# A repository that the Security Agent watches under its owner's settings (c). Findings of the others are kept and listed, and count
# against no deadline (contract 17.18).
WATCHED = f"({WITHIN_REACH} and {SELECTED})"
WATCHED_BY = f"left join service_configs c on c.owner_id = r.owner_id and c.service = 'security_agent' {REACHED_BY}"

SCHEMA_REVISION = SystemStatement(
    "select version_num as revision, clock_timestamp() as now from alembic_version", "the schema's revision belongs to no owner"
)

INTEGRATION_BY_INSTALLATION = SystemStatement(
    "select i.owner_id, i.id, i.provider, i.installation_id, i.account, (i.suspended_at is not null) as suspended,"
    " i.created_at as connected_at"
    " from integrations i join owners o on o.id = i.owner_id"
    " where i.provider = :provider and i.installation_id = :installation and i.disconnected_at is null and o.enabled",
    "a webhook names an installation; whose it is is the question",
)

INTEGRATIONS_BY_INSTALLATION = SystemStatement(
    "select i.owner_id, i.id, i.provider, i.installation_id, i.account, (i.suspended_at is not null) as suspended,"
    " i.created_at as connected_at"
    " from integrations i join owners o on o.id = i.owner_id"
    " where i.provider = :provider and i.installation_id = any(:installations) and i.disconnected_at is null and o.enabled",
    "webhooks that arrive together name installations of several owners; whose they are is the question",
)

RECORD_DELIVERIES = SystemStatement(
    """
with stored as (
insert into deliveries (owner_id, id, integration_id, provider_delivery_id, event, action, body, body_sha256, headers, state, reason,
    not_before, received_at, settled_at, trace)
select owner_id, id, integration_id, provider_delivery_id, event, action, body, body_sha256, cast(headers as jsonb),
    case when reason is null then 'received' else 'skipped' end, reason, :now, :now, case when reason is not null then cast(:now as timestamptz) end,
    trace
from unnest(cast(:owner_ids as uuid[]), cast(:ids as uuid[]), cast(:integration_ids as uuid[]), cast(:provider_ids as text[]),
    cast(:events as text[]), cast(:actions as text[]), cast(:bodies as bytea[]), cast(:digests as bytea[]), cast(:headers as text[]),
    cast(:reasons as text[]), cast(:traces as text[])) as new (owner_id, id, integration_id, provider_delivery_id, event, action, body,
    body_sha256, headers, reason, trace)
on conflict do nothing returning id
)
-- one notification wakes all shards, and they look for every delivery
select id, (select pg_notify('kilo_work', 'delivery:' || id) from stored limit 1) from stored
""",
    "deliveries that arrive together are committed together, whoever owns them; the foreign key binds each to its owner's integration",
)

DUE_DELIVERIES = SystemStatement(
    "select owner_id, id from deliveries where state = 'received' and not_before <= :now order by not_before, id limit :limit",
    "deliveries are admitted in the order of their arrival, whoever owns them",
)

OFFER_ITEMS = SystemStatement(
    """
with recursive line as (
    -- who has anything waiting, by jumps over the index: the cost grows with the owners in line, not with their backlogs
    (select owner_id, service from work_items where state = 'waiting' order by owner_id, service limit 1)
    union all
    select n.owner_id, n.service from line l cross join lateral (
        select w.owner_id, w.service from work_items w
        where w.state = 'waiting' and (w.owner_id, w.service) > (l.owner_id, l.service) order by w.owner_id, w.service limit 1) n
), room as (
    -- no slot rows yet: the owner has never claimed, and the claim will make them
    select l.owner_id, l.service, p.last_turn, o.outstanding, least(:limit, coalesce(p.free, :limit) - o.outstanding) as free
    from line l join owners w on w.id = l.owner_id and w.enabled
    cross join lateral (select count(*) as outstanding from work_items i where i.owner_id = l.owner_id and i.service = l.service
        and i.state = 'waiting' and i.offer_until > :now) o
    left join lateral (select count(*) filter (where item_id is null and not retired) as free, max(taken_at) as last_turn from owner_slots
        where owner_id = l.owner_id and pool = l.service having count(*) > 0) p on true
    where not exists (select 1 from switches s where s.scope in ('all', 'service:' || l.service, 'owner:' || l.owner_id))
), turns as (
    select r.owner_id, i.id, r.last_turn, i.created_at,
        r.outstanding + row_number() over (partition by r.owner_id, r.service order by i.priority desc, i.created_at, i.id) as turn
    from room r cross join lateral (
        select id, priority, created_at from work_items w where w.owner_id = r.owner_id and w.service = r.service
          and w.state = 'waiting' and w.not_before <= :now and (w.offer_until is null or w.offer_until <= :now)
        order by w.priority desc, w.created_at, w.id limit greatest(r.free, 0)) i
), places as (
    select owner_id, id, row_number() over (order by turn, last_turn nulls first, created_at, id) as place from turns
), due as (
    select w.owner_id, w.id, t.place from places t join work_items w on w.owner_id = t.owner_id and w.id = t.id
    where w.state = 'waiting' and (w.offer_until is null or w.offer_until <= :now)
    order by t.place limit :limit for update of w skip locked
)
update work_items w set offer_no = w.offer_no + 1, offer_until = :until
from due where w.owner_id = due.owner_id and w.id = due.id
returning due.place, w.owner_id, w.id, w.service, w.subject_key, w.offer_no, w.attempt,
    (select r.full_name from repositories r where r.owner_id = w.owner_id and r.external_id = w.repository_id) as repository
""",
    "waiting items are offered in turn over all owners, each no more than its free slots could take",
)

OUTSTANDING_OFFERS = SystemStatement(
    """
select (select count(*) from work_items where state = 'waiting' and offer_until > :now) as items,
    (select count(*) from work_items where offer_until > :now and ((ended_at is not null and not announced)
        or (state = 'running' and ended_at is null))) as settlements,
    (select count(*) from effects where state = 'pending' and offer_until > :now) as effects
""",
    "the broker's backlog is bounded over all owners",
)

OFFER_SESSIONS = SystemStatement(
    """
with due as (
    select s.owner_id, s.id from sessions s join work_items i on i.owner_id = s.owner_id and i.id = s.item_id
    where s.state = 'queued' and (s.offer_until is null or s.offer_until <= :now)
      and not exists (select 1 from switches x where x.scope in ('all', 'service:' || i.service, 'owner:' || s.owner_id))
      and not exists (select 1 from hosted_sessions h where h.owner_id = s.owner_id and h.session_id = s.id)
    order by s.created_at limit least(:limit, :capacity) for update of s skip locked
)
update sessions s set offer_no = s.offer_no + 1, offer_until = :until
from due, work_items w where s.owner_id = due.owner_id and s.id = due.id and w.owner_id = s.owner_id and w.id = s.item_id
returning s.owner_id, s.id, s.item_id, s.offer_no, s.attempt, w.service, w.subject_key,
    (select r.full_name from repositories r where r.owner_id = w.owner_id and r.external_id = w.repository_id) as repository
""",
    "agent capacity belongs to the host, not to an owner",
)

OFFER_HOSTED = SystemStatement(
    """
with due as (
    select h.owner_id, h.session_id from hosted_sessions h join sessions s on s.owner_id = h.owner_id and s.id = h.session_id
    join work_items i on i.owner_id = s.owner_id and i.id = s.item_id
    where h.state <> 'closed' and (h.offer_until is null or h.offer_until <= :now) and case s.state
        when 'queued' then not exists (
            select 1 from switches x where x.scope in ('all', 'service:' || i.service, 'owner:' || s.owner_id))
        -- without a moment of its next look a step has it
        when 'running' then h.look_at is not null
            and (h.look_at <= :now or s.interrupt_requested is not null or h.hint_at >= h.looked_at)
        else h.look_at is null or h.look_at <= :now end
    order by h.looked_at nulls first, h.created_at limit :limit for update of h skip locked
)
update hosted_sessions h set offer_no = h.offer_no + 1, offer_until = :until
from due, sessions s, work_items w where h.owner_id = due.owner_id and h.session_id = due.session_id
  and s.owner_id = h.owner_id and s.id = h.session_id and w.owner_id = s.owner_id and w.id = s.item_id
returning s.owner_id, s.id, s.item_id, h.offer_no, s.attempt, w.service, w.subject_key,
    (select r.full_name from repositories r where r.owner_id = w.owner_id and r.external_id = w.repository_id) as repository
""",
    "steps of hosted sessions are due over all owners",
)

FREE_CAPACITY = SystemStatement(
    "select (select count(*) from agent_capacity where seen_at > :seen and (session_id is null or lease_until <= :now))"
    " - (select count(*) from sessions where state = 'queued' and offer_until > :now) as free",
    "agent capacity belongs to the host, not to an owner",
)

OFFER_SETTLEMENTS = SystemStatement(
    """
with due as (
    select w.owner_id, w.id from work_items w
    where (w.offer_until is null or w.offer_until <= :now) and (
        (w.ended_at is not null and not w.announced)
        or (w.state = 'running' and w.ended_at is null and exists (
            select 1 from sessions s where s.owner_id = w.owner_id and s.id = w.session_id and s.ended_at is not null)))
    order by w.updated_at limit :limit for update of w skip locked
)
update work_items w set offer_no = w.offer_no + 1, offer_until = :until
from due where w.owner_id = due.owner_id and w.id = due.id
returning w.owner_id, w.id, w.service, w.subject_key, w.offer_no, w.attempt, w.session_id,
    (select r.full_name from repositories r where r.owner_id = w.owner_id and r.external_id = w.repository_id) as repository
""",
    "ended sessions and unannounced endings are settled over all owners",
)

OFFER_EFFECTS = SystemStatement(
    """
with due as (
    select e.owner_id, e.id from effects e
    where e.state = 'pending' and e.not_before <= :now and e.created_at <= :overlooked and (e.offer_until is null or e.offer_until <= :now)
    order by e.not_before limit :limit for update of e skip locked
)
update effects e set offer_no = e.offer_no + 1, offer_until = :until
from due, work_items w where e.owner_id = due.owner_id and e.id = due.id and w.owner_id = e.owner_id and w.id = e.item_id
returning e.owner_id, e.item_id, e.id, e.offer_no, w.service, w.subject_key,
    (select r.full_name from repositories r where r.owner_id = w.owner_id and r.external_id = w.repository_id) as repository
""",
    "effects that a dead run left behind are applied for all owners",
)

# An id that two owners hold is nobody's (invariant 9): keys start with the owner, so the database would take such a row.
ITEM_OWNER = SystemStatement(
    "select min(owner_id::text)::uuid as owner_id from work_items where id = :id having count(*) = 1",
    "a run's configuration names an item; whose it is is the question",
)
SESSION_OWNER = SystemStatement(
    "select min(owner_id::text)::uuid as owner_id from sessions where id = :id having count(*) = 1",
    "a run's configuration or a callback names a session; whose it is is the question",
)

CLAIM_CAPACITY = SystemStatement(
    """
update agent_capacity set session_id = :session, lease_until = :until
where (host, number) = (
    select host, number from agent_capacity where host = :host and (session_id is null or lease_until <= :now)
    order by number limit 1 for update skip locked)
""",
    "agent capacity belongs to the host, not to an owner",
)
KEEP_CAPACITY = SystemStatement(
    "update agent_capacity set lease_until = :until where session_id = :session",
    "agent capacity belongs to the host, not to an owner",
)
FREE_CAPACITY_OF = SystemStatement(
    "update agent_capacity set session_id = null, lease_until = null where session_id = :session",
    "agent capacity belongs to the host, not to an owner",
)

ADD_CAPACITY = SystemStatement(
    "insert into agent_capacity (host, number, seen_at) select :host, n, :now from generate_series(1, :places) n"
    " on conflict (host, number) do update set seen_at = excluded.seen_at",
    "agent capacity belongs to the host, not to an owner",
)
DROP_CAPACITY = SystemStatement(
    "delete from agent_capacity where host = :host and number > :places and session_id is null",
    "agent capacity belongs to the host, not to an owner",
)

LEAVE_CAPACITY = SystemStatement(
    "update agent_capacity set seen_at = '-infinity' where host = :host and number > :places",
    "agent capacity belongs to the host, not to an owner",
)
FORGET_HOSTS = SystemStatement(
    "delete from agent_capacity where seen_at <= :gone and (session_id is null or lease_until <= :now)",
    "agent capacity belongs to the host, not to an owner",
)

LOCK_SESSION = SystemStatement(
    """
select s.*, (select x.kind from switches x where x.scope in ('all', 'service:' || i.service, 'owner:' || s.owner_id) order by x.kind limit 1) as blocked
from sessions s join work_items i on i.owner_id = s.owner_id and i.id = s.item_id
where s.id = :id and (select count(*) from sessions x where x.id = :id) = 1 for update of s
""",
    "a session is taken together with a place on the host",
)
DEFER_SESSION = SystemStatement(
    "update sessions set offer_until = :after where owner_id = :owner and id = :id and state = 'queued'",
    "a session that found no place on the host is offered again later",
)
START_SESSION = SystemStatement(
    "update sessions set state = 'running', fence = fence + 1, launches = launches + 1, run_id = :run, lease_until = :until,"
    " started_at = coalesce(started_at, :now), offer_until = null where owner_id = :owner and id = :id and state = 'queued'",
    "a session is taken together with a place on the host",
)
# Never shorter: a hosted session is left with a long lease by a step whose last heartbeat may come after that.
KEEP_SESSION = SystemStatement(
    "update sessions set lease_until = greatest(lease_until, :until) where owner_id = :owner and id = :id and state = 'running' and fence = :fence"
    " returning interrupt_requested",
    "a session is kept together with its place on the host",
)
END_SESSION = SystemStatement(
    "update sessions set state = :state, reason = :reason, detail = :detail, result = cast(:result as jsonb),"
    " evidence = cast(:evidence as jsonb), ended_at = :now, lease_until = null where owner_id = :owner and id = :id"
    " and state = 'running' and fence = :fence",
    "a session ends together with its hold on the host",
)
# Whoever gives a session back: one that was asked to stop ends, one that was launched too often fails, else it waits again.
_GIVE_BACK = (
    "update sessions set state = case when interrupt_requested is not null then 'interrupted' when launches >= :most then 'failed' else 'queued' end,"
    " reason = case when interrupt_requested is not null then interrupt_requested when launches >= :most then :lost else :reason end,"
    " ended_at = case when interrupt_requested is not null or launches >= :most then cast(:now as timestamptz) end,"
    " lease_until = null, offer_until = null, fence = fence + 1 where owner_id = :owner and id = :id and state = 'running'"
)
GIVE_BACK_SESSION = SystemStatement(
    f"{_GIVE_BACK} and fence = :fence", "a stopping worker gives its session and its place on the host back together"
)
TAKE_BACK_SESSION = SystemStatement(
    f"{_GIVE_BACK} and lease_until <= :now", "recovery takes a dead worker's session and its place on the host back together"
)

RUN_LOST = SystemStatement(
    """
select exists (select 1 from work_items where run_id = :run and state = 'starting' and ended_at is null and lease_until <= :now)
    or exists (select 1 from sessions where run_id = :run and state = 'running' and ended_at is null and lease_until <= :now) as lost
""",
    "Dagster's monitor asks for a run, not for an owner",
)

REAP = {
    "starting_lease": SystemStatement(
        "select owner_id, id from work_items where state = 'starting' and ended_at is null and lease_until <= :now limit :limit",
        "recovery looks at every owner's leases",
    ),
    "running_deadline": SystemStatement(
        "select owner_id, id from work_items where state = 'running' and ended_at is null and deadline <= :now limit :limit",
        "recovery looks at every owner's deadlines",
    ),
    "session_lease": SystemStatement(
        "select owner_id, id from sessions where state = 'running' and ended_at is null and lease_until <= :now limit :limit",
        "recovery looks at every owner's leases",
    ),
    "session_deadline": SystemStatement(
        "select owner_id, id from sessions where state = 'queued' and deadline <= :now limit :limit",
        "recovery looks at every owner's deadlines",
    ),
    "effect_held": SystemStatement(
        "select owner_id, id from effects where state = 'held' and held_until <= :now limit :limit",
        "recovery looks at every owner's suggestions",
    ),
    "effect_lease": SystemStatement(
        "select owner_id, id from effects where state = 'applying' and lease_until <= :now limit :limit",
        "recovery looks at every owner's leases",
    ),
    "gap_deadline": SystemStatement(
        "select owner_id, id from delivery_gaps where ended_at is null and deadline <= :now limit :limit",
        "recovery looks at every owner's deadlines",
    ),
}

DELIVERY_LOG_POSITION = SystemStatement(
    "select revision, compared_until, reading_until, cursor from delivery_log_positions where app_id = :app",
    "the provider's log is one for all installations of the App",
)
KEEP_DELIVERY_LOG_POSITION = SystemStatement(
    "insert into delivery_log_positions (app_id, revision, compared_until, reading_until, cursor, compared_at)"
    " values (:app, cast(:revision as bigint) + 1, :compared_until, :reading_until, :cursor, :compared_at)"
    " on conflict (app_id) do update set revision = excluded.revision, compared_until = excluded.compared_until,"
    " reading_until = excluded.reading_until, cursor = excluded.cursor,"
    " compared_at = coalesce(excluded.compared_at, delivery_log_positions.compared_at) where delivery_log_positions.revision = :revision",
    "the provider's log is one for all installations of the App",
)
DELIVERIES_COMPARED_AT = SystemStatement(
    "select coalesce((select compared_at from delivery_log_positions where app_id = :app),"
    " (select min(created_at) from integrations where provider = 'github' and disconnected_at is null)) as compared_at",
    "the provider's log is one for all installations of the App",
)
STORED_DELIVERIES = SystemStatement(
    "select d.integration_id, d.provider_delivery_id from unnest(cast(:owner_ids as uuid[]), cast(:integration_ids as uuid[]),"
    " cast(:provider_ids as text[])) as w (owner_id, integration_id, guid) join deliveries d on d.owner_id = w.owner_id"
    " and d.integration_id = w.integration_id and d.provider_delivery_id = w.guid",
    "one page of the provider's log names deliveries of many owners",
)
DUE_DELIVERY_GAPS = SystemStatement(
    """
select g.owner_id, g.id, g.integration_id, i.installation_id, g.guid, g.attempt_id, g.event, g.state, g.answered, g.asks, g.pulls, g.not_before,
    g.deadline, (i.disconnected_at is null and o.enabled) as connected, (i.suspended_at is not null) as suspended,
    case when d.id is not null then (d.headers -> 'pulled') is not null end as stored_by_pull
from delivery_gaps g join integrations i on i.owner_id = g.owner_id and i.id = g.integration_id join owners o on o.id = g.owner_id
left join deliveries d on d.owner_id = g.owner_id and d.integration_id = g.integration_id and d.provider_delivery_id = g.guid
where g.ended_at is null and g.not_before <= :now and not exists (
    select 1 from integrations x join owners p on p.id = x.owner_id where x.provider = i.provider and x.installation_id = i.installation_id
      and x.disconnected_at is null and p.enabled and x.owner_id <> i.owner_id and i.disconnected_at is null)
order by g.sent_at, g.id limit :limit
""",
    "one run repairs the gaps of all owners, the oldest first, so that nobody's wait for others' newer ones",
)
DELIVERY_GAPS_BY_OWNER = SystemStatement(
    "select o.name as owner, count(*) filter (where g.state = 'missing') as missing, count(*) filter (where g.state = 'asked') as asked,"
    " count(*) filter (where g.state in ('repaired', 'pulled') and g.ended_at >= :since) as repaired,"
    " count(*) filter (where g.state = 'pulled' and g.ended_at >= :since) as pulled,"
    " count(*) filter (where g.state = 'gave_up' and g.ended_at >= :since) as given_up, min(g.sent_at) filter (where g.ended_at is null) as oldest"
    " from delivery_gaps g join owners o on o.id = g.owner_id group by o.id, o.name order by given_up desc, missing desc, o.name",
    "the operator compares owners",
)
GIVEN_UP_DELIVERIES = SystemStatement(
    "select o.name as owner, g.guid, g.event, g.repository_id, g.reason, g.sent_at, g.ended_at from delivery_gaps g"
    " join owners o on o.id = g.owner_id where g.state = 'gave_up' and g.ended_at >= :since order by g.ended_at desc limit :limit",
    "the operator is told of what any owner lost",
)
BUSY = SystemStatement(
    """
select (select count(*) from work_items where state = 'starting' and ended_at is null and lease_until > :now) as claims,
    (select count(*) from sessions s where state = 'running' and ended_at is null and lease_until > :now and not exists (
        -- left to the hosted service until its next look: it goes on there, whatever runs here
        select 1 from hosted_sessions h where h.owner_id = s.owner_id and h.session_id = s.id and h.look_at is not null)) as sessions,
    (select count(*) from effects where state = 'applying' and lease_until > :now) as effects
""",
    "an upgrade waits for every owner's work",
)
RESTORED_ITEMS = SystemStatement(
    "update work_items set fence = fence + :step, offer_until = null,"
    " lease_until = case when lease_until is not null then cast(:now as timestamptz) end where ended_at is null",
    "a restored database is older than the world for every owner",
)
RESTORED_SESSIONS = SystemStatement(
    "update sessions set fence = fence + :step, offer_until = null,"
    " lease_until = case when lease_until is not null then cast(:now as timestamptz) end where ended_at is null",
    "a restored database is older than the world for every owner",
)
RESTORED_EFFECTS = SystemStatement(
    "update effects set lease_no = lease_no + :step, offer_until = null,"
    " lease_until = case when lease_until is not null then cast(:now as timestamptz) end where state in ('pending', 'applying')",
    "a restored database is older than the world for every owner",
)
RESTORED_ONCE = SystemStatement(
    "update effects set state = 'unknown', reason = :reason, ended_at = :now where state = 'pending' and kind = any(:once)",
    "a restored database is older than the world for every owner",
)
NO_HOSTS = SystemStatement("delete from agent_capacity", "hosts of a lost platform are nobody's")

UNSEALED_EVENTS = SystemStatement(
    "select owner_id, id, at, actor, action, subject, data from audit_events where seal is null order by id limit :limit for update",
    "the audit chain goes over all owners",
)
SEALED_EVENTS = SystemStatement(
    "select owner_id, id, at, actor, action, subject, data from audit_events where seal = :number",
    "the audit chain goes over all owners",
)
STRAY_EVENTS = SystemStatement(
    "select count(*) as n from audit_events where seal > :most", "the audit chain goes over all owners"
)
COUNT_UNSEALED = SystemStatement(
    "select count(*) as n from audit_events where seal is null", "the audit chain goes over all owners"
)
MARK_SEALED = SystemStatement(
    "update audit_events set seal = :number where seal is null and id = any(:ids)", "the audit chain goes over all owners"
)
NEW_SEAL = SystemStatement(
    "insert into audit_seals (number, previous, sealed_at, count, events, head) values (:number, :previous, :sealed_at, :count, :events, :head)",
    "a seal belongs to no owner",
)
LAST_SEAL = SystemStatement("select number, head from audit_seals order by number desc limit 1", "a seal belongs to no owner")
SEALS = SystemStatement("select * from audit_seals where number > :after order by number", "a seal belongs to no owner")
SEALER_LOCK = SystemStatement(
    "select pg_try_advisory_xact_lock(hashtextextended('kilo:audit', 0)) as alone", "one hand seals for all owners"
)
AUDIT_OF_PEOPLE = SystemStatement(
    "select owner_id, id, at, actor, action, subject, data, seal from audit_events"
    " where (cast(:owner as uuid) is null or owner_id = :owner) order by id desc limit :limit",
    "the operator reads the audit of all owners",
)
_DEFAULTS = LimitsConfig()
_SET = "case when jsonb_typeof(c.config -> '{0}') = 'number' then (c.config ->> '{0}')::float else {1} end"
SWEEP = {
    "delivery_bodies": SystemStatement(
        "update deliveries set body = '', headers = '{}' where (owner_id, id) in (select owner_id, id from deliveries"
        " where settled_at is not null and settled_at < :before and body <> '' limit :limit for update skip locked)",
        "retention is the platform's, for every owner",
    ),
    "session_events": SystemStatement(
        "delete from session_events where (owner_id, session_id, id) in (select e.owner_id, e.session_id, e.id from session_events e"
        " join sessions s on s.owner_id = e.owner_id and s.id = e.session_id where e.at < :before and s.ended_at is not null limit :limit)",
        "retention is the platform's, for every owner",
    ),
    "callbacks": SystemStatement(
        "delete from callback_tokens where (owner_id, session_id) in (select c.owner_id, c.session_id from callback_tokens c"
        " join sessions s on s.owner_id = c.owner_id and s.id = c.session_id"
        " where c.expires_at < :before and s.ended_at is not null limit :limit)",
        "retention is the platform's, for every owner",
    ),
    "author_buckets": SystemStatement(
        "delete from author_buckets where (owner_id, repository_id, author) in (select b.owner_id, b.repository_id, b.author"
        " from author_buckets b left join service_configs c on c.owner_id = b.owner_id and c.service = 'limits' where b.refilled_at < :before"
        " and b.tokens + extract(epoch from (cast(:before as timestamptz) - b.refilled_at)) / 3600"
        f" * {_SET.format('author_starts_per_hour', _DEFAULTS.author_starts_per_hour)} >= {_SET.format('author_burst', _DEFAULTS.author_burst)}"
        " limit :limit for update of b skip locked)",
        "retention is the platform's, for every owner",
    ),
    "delivery_gaps": SystemStatement(
        "delete from delivery_gaps where (owner_id, id) in (select owner_id, id from delivery_gaps where ended_at < :before limit :limit)",
        "retention is the platform's, for every owner",
    ),
}
SESSIONS_TO_RESEAL = SystemStatement(
    "select owner_id, id, callback_token from sessions where callback_token is not null and substring(callback_token from 1 for 4) <> :current"
    " order by owner_id, id limit :limit",
    "keys are the platform's; each value is sealed anew under its own owner",
)
KEYS_IN_USE = SystemStatement(
    "select distinct encode(substring(callback_token from 1 for 4), 'hex') as key from sessions where callback_token is not null"
    " union select distinct encode(substring(credentials from 1 for 4), 'hex') from integrations where credentials is not null",
    "keys are the platform's",
)
INVARIANTS = {
    "slots_belong_to_live_items": SystemStatement(
        "select s.owner_id, s.pool, s.number, s.item_id, w.state from owner_slots s"
        " left join work_items w on w.owner_id = s.owner_id and w.id = s.item_id"
        " where s.item_id is not null and (w.id is null or w.state not in ('starting', 'running') or w.fence <> s.fence) limit :limit",
        "a slot that nobody holds is lost to its owner",
    ),
    "live_items_hold_slots": SystemStatement(
        "select w.owner_id, w.id, w.service, w.state from work_items w where w.state in ('starting', 'running') and w.ended_at is null"
        " and not exists (select 1 from owner_slots s where s.owner_id = w.owner_id and s.item_id = w.id and s.pool = w.service) limit :limit",
        "an item without a slot is over its owner's cap",
    ),
    "deadlines_are_kept": SystemStatement(
        "select owner_id, id, 'work item' as what, state, coalesce(lease_until, deadline) as since from work_items where ended_at is null"
        " and ((state = 'starting' and lease_until <= :grace) or (state = 'running' and deadline <= :grace))"
        " union all select owner_id, id, 'session', state, coalesce(lease_until, deadline) from sessions where ended_at is null"
        " and ((state = 'running' and lease_until <= :grace) or (state = 'queued' and deadline <= :grace))"
        " union all select owner_id, id, 'effect', state, lease_until from effects where state = 'applying' and lease_until <= :grace limit :limit",
        "what is over and not reaped means that recovery stands still",
    ),
    "endings_are_announced": SystemStatement(
        "select owner_id, id, service, state, reason, ended_at from work_items where ended_at <= :grace and not announced limit :limit",
        "an ending that nobody was told of leaves its check open",
    ),
    "sessions_are_settled": SystemStatement(
        "select w.owner_id, w.id, s.id as session_id, s.state, s.ended_at from work_items w"
        " join sessions s on s.owner_id = w.owner_id and s.id = w.session_id"
        " where w.ended_at is null and w.state = 'running' and s.ended_at <= :grace limit :limit",
        "an ended session that is not settled holds its owner's slot",
    ),
    "deliveries_are_admitted": SystemStatement(
        "select owner_id, id, event, tries, received_at from deliveries where state = 'received' and not_before <= :grace limit :limit",
        "a delivery that waits means that no sensor works",
    ),
    "effects_are_applied": SystemStatement(
        "select owner_id, id, item_id, kind, state, reason, tries from effects where state in ('dead', 'unknown')"
        " union all select e.owner_id, e.id, e.item_id, e.kind, e.state, e.reason, e.tries from effects e"
        " where e.state = 'pending' and e.not_before <= :grace limit :limit",
        "dead letters wait for a person, overdue ones mean that nobody applies them",
    ),
    "one_live_item_a_subject": SystemStatement(
        "select owner_id, service, subject_key, count(*) as items from work_items where ended_at is null"
        " group by owner_id, service, subject_key having count(*) > 1 limit :limit",
        "two live items of one subject race each other",
    ),
    "capacity_belongs_to_sessions": SystemStatement(
        "select c.host, c.number, c.session_id, s.state from agent_capacity c left join sessions s on s.id = c.session_id"
        " where c.session_id is not null and c.lease_until > :now and (s.id is null or s.state <> 'running') limit :limit",
        "a place on the host that no session holds is lost to all",
    ),
}

OWNERS_WITH_NEWS = SystemStatement(
    "select distinct owner_id from work_items where service = 'code_review' and updated_at >= :since",
    "the outcomes of every owner are refreshed on one clock",
)
# Over all owners, for the operator: what a security lead wants to be told of.
SECURITY_CHECKS = {
    "overdue": SystemStatement(
        "select o.name as owner, f.id as finding, f.severity, f.package_name, r.full_name as repository, s.due_at"
        " from finding_sla s join findings f on f.owner_id = s.owner_id and f.id = s.finding_id join owners o on o.id = f.owner_id"
        f" join repositories r on r.owner_id = f.owner_id and r.external_id = f.repository_id {WATCHED_BY}"
        f" where {WATCHED} and finding_status(f.upstream_state, f.disposition) = 'open' and s.closed_at is null and not s.paused and s.due_at <= :now order by s.due_at limit :limit",
        "open findings past their deadline",
    ),
    "unsynced": SystemStatement(
        "select o.name as owner, r.full_name as repository, seen.outcome, seen.succeeded_at from service_configs c"
        f" join owners o on o.id = c.owner_id and o.enabled join repositories r on r.owner_id = c.owner_id {REACHED_BY}"
        f" where c.service = 'security_agent' and c.enabled and coalesce(seen.outcome, '') <> 'alerts_disabled' and {WATCHED}"
        " and coalesce(seen.succeeded_at, c.updated_at) < :now - interval '24 hours' order by seen.succeeded_at nulls first limit :limit",
        "repositories of owners with the Security Agent that were not read for a day (a sync is due every six hours)",
    ),
    "orphaned": SystemStatement(
        "select o.name as owner, r.full_name as repository, count(*) as findings from findings f join owners o on o.id = f.owner_id"
        f" join repositories r on r.owner_id = f.owner_id and r.external_id = f.repository_id {REACHED_BY}"
        f" where finding_status(f.upstream_state, f.disposition) = 'open' and not {WITHIN_REACH} group by o.name, r.full_name order by findings desc limit :limit",
        "open findings of repositories that their owner's installation can't see",
    ),
    "remediation_unconfirmed": SystemStatement(
        "select o.name as owner, r.full_name as repository, m.item_id as item, m.branch, m.merged_at, m.syncs_since_merge, m.flagged_at"
        " from remediations m join owners o on o.id = m.owner_id join work_items w on w.owner_id = m.owner_id and w.id = m.item_id"
        " join repositories r on r.owner_id = w.owner_id and r.external_id = w.repository_id"
        " where m.flagged_at is not null and m.confirmed_at is null and m.set_aside_at is null and r.removed_at is null order by m.flagged_at limit :limit",
        "merged remediations whose fix has not shown",
    ),
    "unanalysed": SystemStatement(
        "select o.name as owner, f.id as finding, f.severity, f.package_name, f.first_seen_at from service_configs c"
        " join owners o on o.id = c.owner_id and o.enabled join findings f on f.owner_id = c.owner_id"
        " where c.service = 'security_agent' and c.enabled and (c.config ->> 'auto_analysis_enabled')::boolean"
        " and finding_status(f.upstream_state, f.disposition) = 'open'"
        " and array_position(array['critical', 'high', 'medium', 'low'], f.severity) <= coalesce("
        "   array_position(array['critical', 'high', 'medium', 'all'], c.config ->> 'auto_analysis_min_severity'), 2)"
        " and (coalesce((c.config ->> 'auto_analysis_include_existing')::boolean, false)"
        "   or f.first_seen_at >= (c.config ->> 'auto_analysis_enabled_at')::timestamptz)"
        " and greatest(f.first_seen_at, (c.config ->> 'auto_analysis_enabled_at')::timestamptz) < :now - interval '24 hours'"
        " and not exists (select 1 from finding_analyses a where a.owner_id = f.owner_id and a.finding_id = f.id and a.completed_at is not null)"
        " order by array_position(array['critical', 'high', 'medium', 'low'], f.severity), f.first_seen_at limit :limit",
        "open findings that are due to automatic analysis and had none within a day",
    ),
    "stale_running": SystemStatement(
        "select o.name as owner, w.service, w.id as item, w.state, w.reason, w.updated_at from work_items w join owners o on o.id = w.owner_id"
        " where w.service in ('security_analysis', 'dismissal', 'remediation', 'notice') and w.state in ('starting', 'running')"
        " and w.updated_at < :now - interval '2 hours' order by w.updated_at limit :limit",
        "the Security Agent's work that has been under way for more than two hours (contract 8.6)",
    ),
}

SECURITY_OWNERS = SystemStatement(
    "select c.owner_id from service_configs c join owners o on o.id = c.owner_id where c.service = 'security_agent' and c.enabled"
    " and c.action_required is null and o.enabled and coalesce((c.config ->> 'auto_sync_enabled')::boolean, true)"
    " order by (select max(y.succeeded_at) from repository_syncs y where y.owner_id = c.owner_id) nulls first, c.owner_id",
    "one schedule syncs every owner whose Security Agent is on, those first of whom nothing was read for the longest time",
)
CHANGED_SECURITY_OWNERS = SystemStatement(
    "select c.owner_id, c.updated_at from service_configs c join owners o on o.id = c.owner_id where c.service = 'security_agent' and c.enabled"
    f" and c.action_required is null and o.enabled and exists (select 1 from repositories r {REACHED_BY} where r.owner_id = c.owner_id"
    f" and {WATCHED})"
    " and not exists (select 1 from repository_syncs y where y.owner_id = c.owner_id and y.attempted_at >= c.updated_at)"
    " order by c.updated_at limit :limit",
    "one sensor syncs every owner whose Security Agent was switched on or whose settings changed since",
)
ANALYSING_OWNERS = SystemStatement(
    "select c.owner_id from service_configs c join owners o on o.id = c.owner_id where c.service = 'security_agent' and c.enabled"
    " and c.action_required is null and o.enabled and (coalesce((c.config ->> 'auto_analysis_enabled')::boolean, false)"
    " or coalesce((c.config ->> 'auto_dismiss_enabled')::boolean, false)"
    " or coalesce((c.config ->> 'auto_remediation_enabled')::boolean, false) or exists ("
    " select 1 from work_items w where w.owner_id = c.owner_id and w.service = 'security_analysis' and w.state = 'waiting'))"
    " order by c.owner_id",
    "one schedule keeps the analyses of every owner in line, and what follows from them",
)
NOTIFIED_OWNERS = SystemStatement(
    "select c.owner_id from service_configs c join owners o on o.id = c.owner_id where c.service = 'security_agent' and c.enabled"
    " and c.action_required is null and o.enabled and jsonb_array_length(coalesce(c.config -> 'notice_recipients', '[]')) > 0"
    " order by c.owner_id",
    "one schedule tells the people of every owner who named some",
)
FINDING_OWNER = SystemStatement(
    "select min(owner_id::text)::uuid as owner_id from findings where id = :id having count(*) = 1",
    "a command names a finding; whose it is is the question",
)
POSTURE = SystemStatement(
    f"""
with counted as (
    select f.owner_id, count(*) as findings, count(*) filter (where finding_status(f.upstream_state, f.disposition) = 'open') as open,
        count(*) filter (where finding_status(f.upstream_state, f.disposition) = 'open' and f.severity = 'critical') as critical,
        count(*) filter (where finding_status(f.upstream_state, f.disposition) = 'open' and f.severity = 'high') as high,
        count(*) filter (where finding_status(f.upstream_state, f.disposition) = 'open' and f.severity = 'medium') as medium,
        count(*) filter (where finding_status(f.upstream_state, f.disposition) = 'open' and f.severity = 'low') as low,
        count(*) filter (where finding_status(f.upstream_state, f.disposition) = 'open' and s.due_at <= :now and {WATCHED}) as overdue,
        count(*) filter (where finding_status(f.upstream_state, f.disposition) = 'open' and s.due_at > :now and {WATCHED}) as within_due
    from findings f join repositories r on r.owner_id = f.owner_id and r.external_id = f.repository_id
    {WATCHED_BY} left join finding_sla s on s.owner_id = f.owner_id and s.finding_id = f.id group by f.owner_id
), synced as (
    -- a repository that was never read makes the whole never read; one whose alerts are off has none to read
    select r.owner_id, case when bool_and(seen.succeeded_at is not null) then min(seen.succeeded_at) end as since
    from repositories r {WATCHED_BY} where {WATCHED} and coalesce(seen.outcome, '') <> 'alerts_disabled' group by r.owner_id
), aside as (
    select owner_id, count(*) as quarantined from quarantined_alerts where taken_at is null group by owner_id
)
select o.id as owner_id, o.name as owner, coalesce(n.findings, 0) as findings, coalesce(n.open, 0) as open, coalesce(n.critical, 0) as critical,
    coalesce(n.high, 0) as high, coalesce(n.medium, 0) as medium, coalesce(n.low, 0) as low, coalesce(n.overdue, 0) as overdue,
    coalesce(n.within_due, 0) as within_due, coalesce(a.quarantined, 0) as quarantined, y.since as synced_since
from owners o left join counted n on n.owner_id = o.id left join synced y on y.owner_id = o.id left join aside a on a.owner_id = o.id
where n.findings > 0 or exists (select 1 from service_configs c where c.owner_id = o.id and c.service = 'security_agent' and c.enabled)
order by overdue desc, open desc, o.name
""",
    "the operator compares owners",
)
WORK_GAUGES = SystemStatement(
    "select 'items' as what, state, count(*) as n from work_items where ended_at is null group by state"
    " union all select 'effects', state, count(*) from effects where state in ('pending', 'applying') group by state"
    " union all select 'effects', state, count(*) from effects where state in ('dead', 'unknown') group by state"
    " union all select 'effects', state, count(*) from effects where state = 'held' group by state"
    " union all select 'deliveries', state, count(*) from deliveries where state = 'received' group by state"
    " union all select 'delivery_gaps', state, count(*) from delivery_gaps where ended_at is null or (state = 'gave_up' and ended_at > now() - interval '1 hour') group by state",
    "metrics are the operator's, over all owners",
)
COUNTERS = SystemStatement(
    "select name, value from counters where not starts_with(name, 'claim:')", "metrics are the operator's, over all owners"
)
_OPERATORS = "metrics are the operator's, over all owners"
FIGURES_LIMIT = SystemStatement(
    "select set_config('statement_timeout', :limit, true)", "a scrape never stands in the way of the work"
)
BEAT = SystemStatement(
    "insert into heartbeats (name, at) values (:name, :now) on conflict (name) do update set at = excluded.at",
    "what has to run belongs to no owner",
)
ITEM_TRACE = SystemStatement(
    "select min(trace) as trace from work_items where id = :id having count(*) = 1",
    "a run's configuration names an item; its trace goes on in that run",
)
FIGURES = {
    "waiting": SystemStatement(
        f"select w.service, coalesce({WHY}, 'none') as reason, count(*) as n, extract(epoch from :now - min(w.updated_at))::float8 as oldest"
        " from work_items w where w.state = 'waiting' group by 1, 2",
        _OPERATORS,
    ),
    "deliveries": SystemStatement(
        "select count(*) as n, extract(epoch from :now - min(received_at))::float8 as oldest from deliveries where state = 'received'",
        _OPERATORS,
    ),
    "slots": SystemStatement("select pool, count(*) as n from owner_slots where item_id is not null group by pool", _OPERATORS),
    "places": SystemStatement(
        "select host, count(*) as n, count(*) filter (where session_id is not null and lease_until > :now) as used from agent_capacity group by host",
        _OPERATORS,
    ),
    "effects": SystemStatement(
        "select kind, state, count(*) as n, extract(epoch from :now - min(created_at))::float8 as oldest from effects"
        " where state in ('pending', 'applying') group by kind, state union all"
        " select kind, state, count(*), extract(epoch from :now - min(created_at))::float8 from effects"
        " where state in ('dead', 'unknown') group by kind, state",
        _OPERATORS,
    ),
    "budgets": SystemStatement(
        "select kind, min(tokens) filter (where refilled_at >= :used) as least, count(*) filter (where blocked_until > :now) as blocked"
        " from rate_budgets group by kind",
        _OPERATORS,
    ),
    "switches": SystemStatement(
        "select split_part(scope, ':', 1) as scope, kind, count(*) as n, extract(epoch from :now - min(set_at))::float8 as oldest"
        " from switches group by split_part(scope, ':', 1), kind",
        _OPERATORS,
    ),
    "persons": SystemStatement(
        "select service, count(*) as n from (select service from service_configs where action_required is not null"
        " union all select service from service_blocks where action_required is not null) waits group by service",
        _OPERATORS,
    ),
    "heartbeats": SystemStatement("select name, extract(epoch from :now - at)::float8 as age from heartbeats", _OPERATORS),
    "schema": SystemStatement("select version_num as revision from alembic_version", _OPERATORS),
    "claims": SystemStatement(
        "select split_part(name, ':', 2) as service, split_part(name, ':', 3) as outcome, value as n from counters where starts_with(name, 'claim:')",
        _OPERATORS,
    ),
}
_BUCKET = "width_bucket(greatest(0, extract(epoch from {})::float8), cast(:bounds as float8[]))"
_SESSION_TIME, _LAUNCH_TIME = "s.ended_at - coalesce(s.started_at, s.ended_at)", "s.created_at - w.created_at"
_SETTLE_TIME, _EFFECT_TIME = "w.ended_at - s.ended_at", "e.ended_at - e.created_at"
ENDED = {
    "sessions": SystemStatement(
        f"select w.service, s.state, coalesce(s.reason, 'none') as reason, {_BUCKET.format(_SESSION_TIME)} as bucket, count(*) as n,"
        f" sum(extract(epoch from {_SESSION_TIME}))::float8 as seconds,"
        " coalesce(sum((s.evidence ->> 'tokens_in')::bigint), 0)::bigint as tokens_in,"
        " coalesce(sum((s.evidence ->> 'tokens_out')::bigint), 0)::bigint as tokens_out,"
        " coalesce(sum((s.evidence ->> 'turns')::bigint), 0)::bigint as turns"
        " from sessions s join work_items w on w.owner_id = s.owner_id and w.id = s.item_id"
        " where s.ended_at > :after and s.ended_at <= :until group by 1, 2, 3, 4",
        _OPERATORS,
    ),
    "launches": SystemStatement(
        f"select w.service, {_BUCKET.format(_LAUNCH_TIME)} as bucket, count(*) as n, sum(extract(epoch from {_LAUNCH_TIME}))::float8 as seconds"
        " from sessions s join work_items w on w.owner_id = s.owner_id and w.id = s.item_id"
        " where s.ended_at > :after and s.ended_at <= :until and s.attempt = 1 group by 1, 2",
        _OPERATORS,
    ),
    "items": SystemStatement(
        "select service, state, coalesce(reason, 'none') as reason, count(*) as n from work_items"
        " where ended_at > :after and ended_at <= :until group by 1, 2, 3",
        _OPERATORS,
    ),
    "settles": SystemStatement(
        f"select w.service, {_BUCKET.format(_SETTLE_TIME)} as bucket, count(*) as n, sum(extract(epoch from {_SETTLE_TIME}))::float8 as seconds"
        " from work_items w join sessions s on s.owner_id = w.owner_id and s.id = w.session_id and s.ended_at <= w.ended_at"
        " where w.ended_at > :after and w.ended_at <= :until group by 1, 2",
        _OPERATORS,
    ),
    "effects": SystemStatement(
        f"select e.kind, e.state, coalesce(e.reason, 'none') as reason, {_BUCKET.format(_EFFECT_TIME)} as bucket, count(*) as n,"
        f" sum(extract(epoch from {_EFFECT_TIME}))::float8 as seconds from effects e"
        " where e.ended_at > :after and e.ended_at <= :until group by 1, 2, 3, 4",
        _OPERATORS,
    ),
}
SPEND_GAUGES = SystemStatement(
    "select service, model, sum(tokens_in) as tokens_in, sum(tokens_out) as tokens_out, sum(micro_usd) as micro_usd from spend_days"
    " where day = :day group by service, model",
    "metrics are the operator's, over all owners",
)
SPENDING_OWNERS = SystemStatement(
    "select distinct owner_id from spend_days where day >= :since order by owner_id",
    "one schedule shows the spend of every owner that has any",
)
LIMITS_OF_OWNERS = SystemStatement(
    "select o.name as owner, c.service, c.config from service_configs c join owners o on o.id = c.owner_id where c.service in ('limits', 'cap')"
    " order by o.name, o.id, c.service",
    "`doctor` names every owner whose limits let nothing run",
)
# What can't be read stops every claim, and is no number here.
_NUMBER = "case when budget ->> '{0}' ~ '^[0-9]+([.][0-9]+)?$' then (budget ->> '{0}')::numeric end"
OVER_BUDGET = SystemStatement(
    f"""
with stored as (
    select c.owner_id, '' as scope, c.config -> 'daily' as budget, c.updated_at from service_configs c where c.service = 'limits'
    union all select c.owner_id, '', c.config, c.updated_at from service_configs c where c.service = 'cap'
    union all select c.owner_id, b.key, b.value, c.updated_at from service_configs c cross join lateral jsonb_each(
        case when jsonb_typeof(c.config -> 'services') = 'object' then c.config -> 'services' else '{{}}' end) b where c.service = 'limits'
), budgets as (
    select owner_id, scope, min({_NUMBER.format("tokens")}) as tokens, min({_NUMBER.format("usd")}) * 1000000 as micro_usd, max(updated_at) as set_at
    from stored group by owner_id, scope
), spent as (
    select b.owner_id, b.scope, b.tokens, b.micro_usd, b.set_at, sum(d.tokens_in + d.tokens_out) as spent_tokens, sum(d.micro_usd) as spent_micro_usd,
        max(d.last_at) as last_at
    from budgets b join spend_days d on d.owner_id = b.owner_id and d.day = :day and b.scope in ('', d.service)
    group by b.owner_id, b.scope, b.tokens, b.micro_usd, b.set_at
)
select o.name as owner, s.scope, s.tokens, s.spent_tokens, s.micro_usd, s.spent_micro_usd, s.last_at from spent s
join owners o on o.id = s.owner_id
where (s.spent_tokens > s.tokens or s.spent_micro_usd > s.micro_usd) and s.last_at > :since and s.last_at >= s.set_at order by o.name, s.scope limit :limit
""",
    "a budget that is passed and spent from means that a stop doesn't hold",
)
SET_SWITCH = SystemStatement(
    "insert into switches (scope, kind, reason, set_by) values (:scope, :kind, :reason, :actor) on conflict (scope) do update"
    " set kind = excluded.kind, reason = excluded.reason, set_by = excluded.set_by, set_at = now()"
    " where switches.set_by <> 'operator' or excluded.set_by = 'operator'",
    "the switch is the platform's",
)
SWITCHES = SystemStatement(
    "select scope, kind, reason, set_by, set_at from switches order by scope", "the switch is the platform's"
)
LIVE_ITEMS = SystemStatement(
    "select owner_id, id from work_items where ended_at is null and state in ('starting', 'running')"
    " and (:scope = 'all' or :scope = 'service:' || service or :scope = 'owner:' || owner_id)",
    "a kill switch stops the work of everybody in its scope",
)
HINT_RUN_FAILED = SystemStatement(
    """
with items as (
    update work_items set lease_until = :now where run_id = :run and state = 'starting' and ended_at is null and lease_until > :now returning 1
), held as (
    update sessions set lease_until = :now where run_id = :run and state = 'running' and ended_at is null and lease_until > :now returning 1
)
select (select count(*) from items) + (select count(*) from held) as n
""",
    "a failed run is named by Dagster, and what it held is asked for",
)
ITEMS_OF_PEOPLE = SystemStatement(
    f"select w.owner_id, w.id, w.service, w.subject_key, w.state, {WHY} as reason, w.attempt, w.fence, w.tries, w.priority, w.not_before, w.lease_until,"
    " w.deadline, w.session_id, w.run_id, w.announced, w.created_at, w.ended_at from work_items w"
    " where (cast(:owner as uuid) is null or w.owner_id = :owner) and (cast(:service as text) is null or w.service = :service)"
    " and (cast(:state as text) is null or w.state = :state or (:state = 'live' and w.ended_at is null))"
    " order by w.created_at desc, w.id limit :limit",
    "the operator lists work over all owners",
)
EFFECTS_OF_PEOPLE = SystemStatement(
    "select e.owner_id, e.id, e.item_id, e.kind, e.subject_key, e.intent_key, e.state, e.reason, e.tries, e.not_before, e.url, e.created_at, e.ended_at"
    " from effects e where (cast(:owner as uuid) is null or e.owner_id = :owner) and (cast(:state as text) is null or e.state = :state)"
    " and (cast(:item as uuid) is null or e.item_id = :item) order by e.seq desc limit :limit",
    "the operator lists effects over all owners",
)
EFFECT_OWNER = SystemStatement(
    "select owner_id from effects where id = :id", "a command names an effect; whose it is is the question"
)
CLEAR_SWITCH = SystemStatement(
    "delete from switches where scope = :scope and (set_by <> 'operator' or :actor = 'operator')", "the switch is the platform's"
)
PAUSE = SystemStatement("select reason from switches where scope = 'all'", "the switch is the platform's")
OWNERS = SystemStatement("select id, kind, name, plan, enabled from owners order by created_at, id", "the operator lists owners")
NEW_OWNER = SystemStatement(
    "insert into owners (id, kind, name, plan) values (:id, :kind, :name, :plan)", "an owner that doesn't exist yet has no scope"
)
NEW_PERSON = SystemStatement(
    "insert into people (id, login, created_at) values (:id, :login, :now) on conflict (login) do nothing",
    "a person may be a member of several owners and belongs to none",
)
PERSON_BY_LOGIN = SystemStatement("select id, login from people where login = :login", "a person belongs to no owner")
LOGINS = SystemStatement(
    "select id, login from people where id = any(cast(:ids as uuid[]))",
    "an owner's members were read in its scope; their logins stand with people, who belong to no owner",
)
PEOPLE = SystemStatement(
    "select p.id, p.login, coalesce(jsonb_agg(jsonb_build_object('owner_id', m.owner_id, 'owner', o.name, 'role', m.role) order by o.name)"
    " filter (where m.owner_id is not null), '[]') as memberships from people p"
    " left join owner_members m on m.person_id = p.id and m.removed_at is null left join owners o on o.id = m.owner_id"
    " group by p.id, p.login order by p.login",
    "the operator lists people with the owners that they belong to",
)
# A key's person (p) and that person's membership (m) of the period in which the key was made: a former period's keys stay dead.
_KEY_OF = (
    "from api_keys k left join people p on p.id = k.person_id left join owner_members m on m.owner_id = k.owner_id"
    " and m.person_id = k.person_id and m.removed_at is null and m.period = k.member_period"
)
_LIVE = "k.revoked_at is null and (k.expires_at is null or k.expires_at > :now) and (k.person_id is null or m.role is not null)"
_KEY = (
    "select k.id, k.owner_id, k.person_id, p.login, k.role, m.role as present, k.name, k.created_by, k.created_at, k.expires_at,"
    f" k.last_used_at, k.rotated_at, k.revoked_at, ({_LIVE}) as live {_KEY_OF}"
)
NEW_API_KEY = SystemStatement(
    "insert into api_keys (id, owner_id, person_id, member_period, role, name, created_by, key_hash, created_at, expires_at)"
    " select :id, cast(:owner as uuid), cast(:person as uuid), m.period, :role, :name, :actor, :hash, :now, cast(:expires as timestamptz)"
    " from (select 1) self left join owner_members m on m.owner_id = cast(:owner as uuid) and m.person_id = cast(:person as uuid)"
    " and m.removed_at is null where cast(:person as uuid) is null or m.role is not null",
    "an operator's key belongs to no owner",
)
API_KEY = SystemStatement(
    f"with found as (select k.id, k.owner_id, k.person_id, p.login, k.role, m.role as present {_KEY_OF} where k.key_hash = :hash and {_LIVE}),"
    " used as (update api_keys k set last_used_at = :now from found f where k.id = f.id"
    "   and (k.last_used_at is null or k.last_used_at <= :used_before))"
    " select * from found",
    "a key says whose it is",
)
KEYS_OF_OWNER = SystemStatement(
    f"{_KEY} where k.owner_id = :owner order by k.created_at desc, k.id",
    "the application's login sees no keys, not even an owner's own",
)
KEY_BY_ID = SystemStatement(
    f"{_KEY} where k.id = :id and k.owner_id is not null", "a command names a key; whose it is is the question"
)
ROTATED_KEY = SystemStatement(
    "update api_keys o set expires_at = least(o.expires_at, :until), rotated_at = :now where o.id = :id and o.owner_id is not null"
    f" and o.rotated_at is null and exists (select 1 {_KEY_OF} where k.id = o.id and {_LIVE}) returning o.owner_id, o.person_id, o.role, o.name",
    "the application's login changes no keys, not even an owner's own",
)
REVOKE_KEY = SystemStatement(
    "update api_keys set revoked_at = :now where id = :id and revoked_at is null and owner_id is not null returning owner_id",
    "the application's login changes no keys, not even an owner's own",
)
REVOKE_OPERATOR_KEYS = SystemStatement(
    "update api_keys set revoked_at = :now where owner_id is null and id <> :id and revoked_at is null",
    "an operator's key belongs to no owner",
)
AUDIT_KEY = SystemStatement(
    "insert into audit_events (owner_id, at, actor, action, subject, data) values (:owner, :now, :actor, :action, :subject, cast(:data as jsonb))",
    "what was done to an owner's key is told in the transaction that did it",
)

NEW_SETUP_LINK = SystemStatement(
    "insert into setup_links (id, link_sha256, request, created_at, expires_at) values (:id, :link, cast(:request as jsonb), :now, :expires)",
    "a set-up link exists before the owner that comes out of it",
)
FORGET_SETUP_LINKS = SystemStatement(
    "delete from setup_links where expires_at <= :now", "set-up links that are over belong to nobody and are of no use"
)
OPEN_SETUP_LINK = SystemStatement(
    "update setup_links set cookie_sha256 = :cookie where link_sha256 = :link and cookie_sha256 is null and expires_at > :now returning id",
    "whoever opens a set-up link has no owner yet",
)
SETUP_LINK = SystemStatement(
    "select id, request, notes from setup_links where cookie_sha256 = :cookie and expires_at > :now",
    "a browser's cookie says which set-up it goes on with, before any owner",
)
EXPECT_SETUP_STATE = SystemStatement(
    "update setup_links set state_sha256 = :state, state_for = :what, notes = notes || cast(:notes as jsonb) where id = :id",
    "the next answer of the provider is waited for before any owner is known",
)
TAKE_SETUP_STATE = SystemStatement(
    "update setup_links set state_sha256 = null, state_for = null where cookie_sha256 = :cookie and state_sha256 = :state"
    " and state_for = :what and expires_at > :now returning id, request, notes",
    "an answer of the provider is taken once, before any owner is known",
)
NOTE_SETUP_LINK = SystemStatement(
    "update setup_links set notes = notes || cast(:notes as jsonb) where id = :id",
    "what has come of a set-up is kept with its link, which belongs to no owner",
)

NOTIFY = SystemStatement("select pg_notify('kilo_work', :what)", "whoever waits is woken, for whatever owner; ids only")
COUNT = SystemStatement(
    "insert into counters (name, value) values (:name, 1) on conflict (name) do update set value = counters.value + 1",
    "oddities are counted over all owners",
)

STATEMENTS: dict[str, SystemStatement] = {name: value for name, value in globals().items() if isinstance(value, SystemStatement)}
STATEMENTS |= {f"REAP.{name}": value for name, value in REAP.items()}
STATEMENTS |= {f"SWEEP.{name}": value for name, value in SWEEP.items()}
STATEMENTS |= {f"SECURITY_CHECKS.{name}": value for name, value in SECURITY_CHECKS.items()}
STATEMENTS |= {f"INVARIANTS.{name}": value for name, value in INVARIANTS.items()}
STATEMENTS |= {f"FIGURES.{name}": value for name, value in FIGURES.items()}
STATEMENTS |= {f"ENDED.{name}": value for name, value in ENDED.items()}
