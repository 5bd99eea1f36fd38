"""Every statement that looks across owners, each with its reason (invariant 8). A test lists them.

They run under the system login. Everything that knows its owner runs under the owner's scope instead.
"""

from __future__ import annotations

from typing import NamedTuple


class SystemStatement(NamedTuple):
    """SQL and why it may not be scoped to one owner."""

    sql: str
    reason: str


INTEGRATION_BY_INSTALLATION = SystemStatement(
    "select i.owner_id, i.id, i.provider, i.installation_id, i.account, (i.suspended_at is not null) as suspended"
    " from integrations i join owners o on o.id = i.owner_id"
    " where i.provider = :provider and i.installation_id = :installation and i.disconnected_at is null and o.enabled",
    "a webhook names an installation; whose it is is the question",
)

NEXT_DELIVERY = SystemStatement(
    "select owner_id, id, integration_id, event, action, body, received_at, tries from deliveries"
    " where state = 'received' and not_before <= :now order by not_before, id limit 1 for update skip locked",
    "deliveries are admitted in the order of their arrival, whoever owns them",
)

OFFER_ITEMS = SystemStatement(
    """
with due as (
    select w.owner_id, w.id from work_items w join owners o on o.id = w.owner_id
    where w.state = 'waiting' and w.not_before <= :now and (w.offer_until is null or w.offer_until <= :now) and o.enabled
      and not exists (select 1 from switches s where s.scope in ('all', 'service:' || w.service, 'owner:' || w.owner_id))
    order by w.priority desc, w.created_at limit :limit for update of w skip locked
)
update work_items w set offer_no = w.offer_no + 1, offer_until = :until
from due where w.owner_id = due.owner_id and w.id = due.id
returning w.owner_id, w.id, w.service, w.subject_key, w.offer_no, w.attempt,
    (select r.full_name from repositories r where r.owner_id = w.owner_id and r.external_id = w.repository_id) as repository
""",
    "waiting items are offered fairly over all owners",
)

OFFER_SESSIONS = SystemStatement(
    """
with due as (
    select s.owner_id, s.id from sessions s
    where s.state = 'queued' and (s.offer_until is null or s.offer_until <= :now)
    order by s.created_at limit least(:limit, :capacity) for update of s skip locked
)
update sessions s set offer_no = s.offer_no + 1, offer_until = :until
from due, work_items w where s.owner_id = due.owner_id and s.id = due.id and w.owner_id = s.owner_id and w.id = s.item_id
returning s.owner_id, s.id, s.item_id, s.offer_no, s.attempt, w.service, w.subject_key,
    (select r.full_name from repositories r where r.owner_id = w.owner_id and r.external_id = w.repository_id) as repository
""",
    "agent capacity belongs to the host, not to an owner",
)

FREE_CAPACITY = SystemStatement(
    "select (select count(*) from agent_capacity where session_id is null or lease_until <= :now)"
    " - (select count(*) from sessions where state = 'queued' and offer_until > :now) as free",
    "agent capacity belongs to the host, not to an owner",
)

OFFER_SETTLEMENTS = SystemStatement(
    """
with due as (
    select w.owner_id, w.id from work_items w
    where (w.offer_until is null or w.offer_until <= :now) and (
        (w.ended_at is not null and not w.announced)
        or (w.state = 'running' and exists (
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
    where ((e.state = 'pending' and e.not_before <= :now) or (e.state = 'applying' and e.lease_until <= :now))
      and e.created_at <= :overlooked and (e.offer_until is null or e.offer_until <= :now)
    order by e.not_before limit :limit for update of e skip locked
)
update effects e set offer_no = e.offer_no + 1, offer_until = :until
from due, work_items w where e.owner_id = due.owner_id and e.id = due.id and w.owner_id = e.owner_id and w.id = e.item_id
returning e.owner_id, e.item_id, e.id, e.offer_no, w.service, w.subject_key,
    (select r.full_name from repositories r where r.owner_id = w.owner_id and r.external_id = w.repository_id) as repository
""",
    "effects that a dead run left behind are applied for all owners",
)

ITEM_OWNER = SystemStatement(
    "select owner_id from work_items where id = :id", "a run's configuration names an item; whose it is is the question"
)
SESSION_OWNER = SystemStatement(
    "select owner_id from sessions where id = :id",
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

RUN_LOST = SystemStatement(
    """
select exists (select 1 from work_items where run_id = :run and state = 'starting' and lease_until <= :now)
    or exists (select 1 from sessions where run_id = :run and state = 'running' and lease_until <= :now) as lost
""",
    "Dagster's monitor asks for a run, not for an owner",
)

REAP = {
    "starting_lease": SystemStatement(
        "select owner_id, id from work_items where state = 'starting' and lease_until <= :now limit :limit for update skip locked",
        "recovery looks at every owner's leases",
    ),
    "running_deadline": SystemStatement(
        "select owner_id, id from work_items where state = 'running' and deadline <= :now limit :limit for update skip locked",
        "recovery looks at every owner's deadlines",
    ),
    "session_lease": SystemStatement(
        "select owner_id, id, launches, item_id, interrupt_requested from sessions where state = 'running' and lease_until <= :now"
        " limit :limit for update skip locked",
        "recovery looks at every owner's leases",
    ),
    "session_deadline": SystemStatement(
        "select owner_id, id, item_id from sessions where state = 'queued' and deadline <= :now limit :limit for update skip locked",
        "recovery looks at every owner's deadlines",
    ),
}

OWNERS_WITH_NEWS = SystemStatement(
    "select distinct owner_id from work_items where service = 'code_review' and updated_at >= :since",
    "the outcomes of every owner are refreshed on one clock",
)
WORK_GAUGES = SystemStatement(
    "select 'items' as what, state, count(*) as n from work_items where ended_at is null group by state"
    " union all select 'effects', state, count(*) from effects where state in ('pending', 'applying', 'dead', 'unknown') group by state"
    " union all select 'deliveries', state, count(*) from deliveries where state = 'received' group by state",
    "metrics are the operator's, over all owners",
)
PAUSE = SystemStatement("select reason from switches where scope = 'all'", "the switch is the platform's")
OWNERS = SystemStatement("select id, kind, name, plan, enabled from owners order by created_at, id", "the operator lists owners")
API_KEY = SystemStatement(
    "select owner_id, role from api_keys where key_hash = :hash and (expires_at is null or expires_at > :now)",
    "a key says whose it is",
)

STATEMENTS: dict[str, SystemStatement] = {
    name: value for name, value in globals().items() if isinstance(value, SystemStatement)
} | {f"REAP.{name}": value for name, value in REAP.items()}
