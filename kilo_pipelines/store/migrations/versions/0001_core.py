"""Core tables, roles' grants and row-level security.

Every owner table: RLS forced, one RESTRICTIVE owner policy for the application, one permissive policy, composite foreign
keys with `owner_id`, unique keys that start with `owner_id` (threats, rule 17). Every non-final state has a deadline or a
lease column that a reconciler reads (invariant 4).
"""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None

TABLES = """
create table owners (
    id uuid primary key,
    kind text not null check (kind in ('user', 'organization')),
    name text not null,
    plan text not null default 'default',
    enabled boolean not null default true,
    created_at timestamptz not null default now()
);

create table people (
    owner_id uuid not null references owners (id),
    id uuid not null,
    login text not null,
    role text not null check (role in ('owner', 'member', 'reader')),
    created_at timestamptz not null default now(),
    primary key (owner_id, id),
    unique (owner_id, login)
);

create table api_keys (
    id uuid primary key,
    owner_id uuid references owners (id),
    role text not null check (role in ('operator', 'owner', 'reader')),
    key_hash bytea not null unique,
    created_at timestamptz not null default now(),
    expires_at timestamptz,
    check ((role = 'operator') = (owner_id is null))
);

create table integrations (
    owner_id uuid not null references owners (id),
    id uuid not null,
    provider text not null check (provider in ('github')),
    installation_id bigint not null,
    account text not null,
    credentials bytea,
    suspended_at timestamptz,
    disconnected_at timestamptz,
    created_at timestamptz not null default now(),
    primary key (owner_id, id),
    unique (owner_id, provider, installation_id)
);
create index integrations_by_installation on integrations (provider, installation_id);

create table repositories (
    owner_id uuid not null,
    integration_id uuid not null,
    external_id bigint not null,
    full_name text not null,
    default_branch text not null,
    private boolean not null default true,
    removed_at timestamptz,
    primary key (owner_id, external_id),
    foreign key (owner_id, integration_id) references integrations (owner_id, id)
);

create table service_configs (
    owner_id uuid not null references owners (id),
    service text not null,
    config jsonb not null default '{}',
    enabled boolean not null default true,
    revision integer not null default 1,
    updated_at timestamptz not null default now(),
    primary key (owner_id, service)
);

create table deliveries (
    owner_id uuid not null,
    id uuid not null,
    integration_id uuid not null,
    provider_delivery_id text not null,
    event text not null,
    action text,
    body bytea not null,
    body_sha256 bytea not null,
    headers jsonb not null default '{}',
    state text not null default 'received' check (state in ('received', 'admitted', 'skipped')),
    reason text,
    item_id uuid,
    tries integer not null default 0,
    not_before timestamptz not null,
    received_at timestamptz not null,
    settled_at timestamptz,
    primary key (owner_id, id),
    unique (owner_id, integration_id, provider_delivery_id),
    unique (owner_id, integration_id, body_sha256),
    foreign key (owner_id, integration_id) references integrations (owner_id, id),
    check ((state = 'received') = (settled_at is null)),
    check (state <> 'skipped' or reason is not null)
);
create index deliveries_waiting on deliveries (not_before) where state = 'received';

create table work_items (
    owner_id uuid not null references owners (id),
    id uuid not null,
    service text not null,
    subject_key text not null,
    repository_id bigint not null,
    state text not null default 'waiting'
        check (state in ('waiting', 'starting', 'running', 'completed', 'failed', 'cancelled')),
    reason text,
    priority integer not null default 0,
    fence integer not null default 0,
    attempt integer not null default 0,
    tries integer not null default 0,
    session_id uuid,
    run_id text,
    offer_no integer not null default 0,
    offer_until timestamptz,
    not_before timestamptz not null,
    lease_until timestamptz,
    deadline timestamptz,
    announced boolean not null default false,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    ended_at timestamptz,
    primary key (owner_id, id),
    foreign key (owner_id, repository_id) references repositories (owner_id, external_id),
    check ((state in ('completed', 'failed', 'cancelled')) = (ended_at is not null)),
    check (state <> 'starting' or lease_until is not null),
    check (state <> 'running' or (session_id is not null and deadline is not null))
);
create index work_items_waiting on work_items (not_before) where state = 'waiting';
create index work_items_unannounced on work_items (ended_at) where ended_at is not null and not announced;
create index work_items_live on work_items (state) where ended_at is null;
create index work_items_of_subject on work_items (owner_id, service, subject_key, created_at desc);
create index work_items_by_run on work_items (run_id) where ended_at is null;

create table attempts (
    owner_id uuid not null,
    item_id uuid not null,
    number integer not null,
    state text not null default 'open' check (state in ('open', 'completed', 'failed', 'cancelled')),
    reason text,
    session_id uuid,
    started_at timestamptz not null,
    ended_at timestamptz,
    primary key (owner_id, item_id, number),
    foreign key (owner_id, item_id) references work_items (owner_id, id)
);

create table owner_slots (
    owner_id uuid not null references owners (id),
    pool text not null,
    number integer not null,
    item_id uuid,
    fence integer,
    taken_at timestamptz,
    primary key (owner_id, pool, number),
    foreign key (owner_id, item_id) references work_items (owner_id, id)
);
create unique index owner_slots_one_each on owner_slots (owner_id, pool, item_id) where item_id is not null;

create table sessions (
    owner_id uuid not null,
    id uuid not null,
    item_id uuid not null,
    attempt integer not null,
    item_fence integer not null,
    state text not null default 'queued' check (state in ('queued', 'running', 'completed', 'failed', 'interrupted')),
    reason text,
    detail text,
    spec jsonb not null,
    callback_token bytea,
    fence integer not null default 0,
    launches integer not null default 0,
    run_id text,
    interrupt_requested text,
    offer_no integer not null default 0,
    offer_until timestamptz,
    lease_until timestamptz,
    deadline timestamptz not null,
    result jsonb,
    evidence jsonb,
    created_at timestamptz not null,
    started_at timestamptz,
    ended_at timestamptz,
    primary key (owner_id, id),
    foreign key (owner_id, item_id) references work_items (owner_id, id),
    check ((state in ('completed', 'failed', 'interrupted')) = (ended_at is not null)),
    check (state <> 'running' or lease_until is not null)
);
create index sessions_queued on sessions (created_at) where state = 'queued';
create index sessions_live on sessions (state) where ended_at is null;
create index sessions_of_item on sessions (owner_id, item_id);
create index sessions_by_run on sessions (run_id) where ended_at is null;

create table session_events (
    owner_id uuid not null,
    session_id uuid not null,
    id bigint generated always as identity,
    kind text not null,
    data jsonb not null default '{}',
    at timestamptz not null,
    primary key (owner_id, session_id, id),
    foreign key (owner_id, session_id) references sessions (owner_id, id)
);

create table agent_capacity (
    host text not null,
    number integer not null,
    session_id uuid,
    lease_until timestamptz,
    primary key (host, number)
);

create table callback_tokens (
    owner_id uuid not null,
    session_id uuid not null,
    token_hash bytea not null,
    expires_at timestamptz not null,
    body_sha256 bytea,
    body bytea,
    received_at timestamptz,
    refused integer not null default 0,
    primary key (owner_id, session_id),
    foreign key (owner_id, session_id) references sessions (owner_id, id)
);

create table effects (
    owner_id uuid not null,
    id uuid not null,
    item_id uuid not null,
    seq bigint generated always as identity,
    kind text not null,
    intent_key text not null,
    subject_key text not null,
    payload jsonb not null,
    state text not null default 'pending'
        check (state in ('pending', 'applying', 'applied', 'dropped', 'unknown', 'dead')),
    reason text,
    tries integer not null default 0,
    lease_no integer not null default 0,
    lease_until timestamptz,
    not_before timestamptz not null,
    offer_no integer not null default 0,
    offer_until timestamptz,
    external_id text,
    url text,
    created_at timestamptz not null,
    ended_at timestamptz,
    primary key (owner_id, id),
    unique (owner_id, intent_key),
    foreign key (owner_id, item_id) references work_items (owner_id, id),
    check (state <> 'applying' or lease_until is not null)
);
create index effects_due on effects (not_before) where state in ('pending', 'applying');
create index effects_of_subject on effects (owner_id, subject_key, seq) where state in ('pending', 'applying');
create index effects_of_item on effects (owner_id, item_id);

create table reviews (
    owner_id uuid not null,
    item_id uuid not null,
    repository_id bigint not null,
    full_name text not null,
    pull_number integer not null,
    title text not null,
    author text not null,
    author_type text not null default 'User',
    url text not null,
    base_ref text not null,
    base_sha text not null,
    head_ref text not null,
    head_sha text not null,
    trigger text not null default 'webhook',
    settings jsonb not null default '{}',
    verdict jsonb,
    evidence jsonb,
    primary key (owner_id, item_id),
    foreign key (owner_id, item_id) references work_items (owner_id, id)
);
create index reviews_of_head on reviews (owner_id, repository_id, head_sha);
create index reviews_of_pull on reviews (owner_id, repository_id, pull_number);

create table audit_events (
    owner_id uuid not null references owners (id),
    id bigint generated always as identity,
    at timestamptz not null,
    actor text not null,
    action text not null,
    subject text not null,
    data jsonb not null default '{}',
    primary key (owner_id, id)
);

create table counters (
    name text primary key,
    value bigint not null default 0
);

create table switches (
    scope text primary key,
    kind text not null check (kind in ('pause', 'kill')),
    reason text not null,
    set_at timestamptz not null default now()
);
"""

# Tables of one owner each; `owners` itself is scoped by its own id.
OWNER_TABLES = (
    "people",
    "integrations",
    "repositories",
    "service_configs",
    "deliveries",
    "work_items",
    "attempts",
    "owner_slots",
    "sessions",
    "session_events",
    "callback_tokens",
    "effects",
    "reviews",
    "audit_events",
)
# What the application never changes: audit events are append-only, owners and keys are made by the system login.
APP_GRANTS = dict.fromkeys(OWNER_TABLES, "select, insert, update") | {
    "audit_events": "select, insert",
    "session_events": "select, insert",
}
SHARED_TABLES = ("api_keys", "agent_capacity", "counters", "switches")


def upgrade() -> None:
    """Creates everything; the roles exist already (`store.provision`)."""
    op.execute(TABLES)
    scope = "nullif(current_setting('kilo.owner_id', true), '')::uuid"
    for table in ("owners", *OWNER_TABLES):
        column = "id" if table == "owners" else "owner_id"
        op.execute(f"alter table {table} enable row level security")
        op.execute(f"alter table {table} force row level security")
        op.execute(
            f"create policy owner_scope on {table} as restrictive to kilo_app "
            f"using ({column} = {scope}) with check ({column} = {scope})"
        )
        op.execute(f"create policy app_access on {table} as permissive to kilo_app using (true) with check (true)")
        op.execute(f"create policy system_access on {table} as permissive to kilo_system using (true) with check (true)")
        op.execute(f"grant {'select' if table == 'owners' else APP_GRANTS[table]} on {table} to kilo_app")
        op.execute(f"grant select, insert, update on {table} to kilo_system")
    op.execute("revoke update on audit_events, session_events from kilo_system")
    for table in SHARED_TABLES:
        op.execute(f"grant select, insert, update, delete on {table} to kilo_system")
    op.execute("grant select, insert, update on counters to kilo_app")
    op.execute("grant select on switches to kilo_app")


def downgrade() -> None:
    """Drops everything: the first migration has nothing to go back to."""
    for table in ("switches", "counters", "audit_events", "reviews", "effects", "callback_tokens", "agent_capacity"):
        op.execute(f"drop table {table}")
    for table in ("session_events", "sessions", "owner_slots", "attempts", "work_items", "deliveries", "service_configs"):
        op.execute(f"drop table {table}")
    for table in ("repositories", "integrations", "api_keys", "people", "owners"):
        op.execute(f"drop table {table}")
