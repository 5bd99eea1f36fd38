"""Security Agent: analyses, dismissals, remediations and notices as work items of the engine.

A service that an owner can't be served with for a while (no credit at the model's provider) is blocked until a moment, longer each time.

Each row hangs on its work item. A finding has as many as were opened for it; what holds at present is the newest that completed.
"""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"

TABLES = """
create table finding_analyses (
    owner_id uuid not null,
    item_id uuid not null,
    finding_id uuid not null,
    origin text not null check (origin in ('automatic', 'manual', 'reopened')),
    requested_by text not null,
    mode text not null check (mode in ('auto', 'shallow', 'deep')),
    snapshot jsonb,
    triage jsonb,
    deep jsonb,
    commit_sha text,
    completed_at timestamptz,
    verdict jsonb,
    evidence jsonb,
    primary key (owner_id, item_id),
    foreign key (owner_id, item_id) references work_items (owner_id, id),
    foreign key (owner_id, finding_id) references findings (owner_id, id)
);
create index finding_analyses_of_finding on finding_analyses (owner_id, finding_id, completed_at);

create table dismissals (
    owner_id uuid not null,
    item_id uuid not null,
    finding_id uuid not null,
    origin text not null check (origin in ('manual', 'automatic', 'bulk')),
    requested_by text not null,
    reason text not null check (reason in ('fix_started', 'no_bandwidth', 'tolerable_risk', 'inaccurate', 'not_used')),
    comment text not null default '',
    analysis_id uuid,
    binding jsonb,
    verdict jsonb,
    evidence jsonb,
    primary key (owner_id, item_id),
    foreign key (owner_id, item_id) references work_items (owner_id, id),
    foreign key (owner_id, finding_id) references findings (owner_id, id),
    foreign key (owner_id, analysis_id) references finding_analyses (owner_id, item_id)
);
create index dismissals_of_finding on dismissals (owner_id, finding_id);

create table remediations (
    owner_id uuid not null,
    item_id uuid not null,
    finding_id uuid not null,
    origin text not null check (origin in ('automatic', 'manual', 'bulk')),
    requested_by text not null,
    analysis_id uuid not null,
    fingerprint text not null,
    findings uuid[] not null,
    branch text,
    commit_sha text,
    base_ref text,
    summary text,
    pull_state text check (pull_state in ('open', 'merged', 'closed')),
    merged_at timestamptz,
    syncs_since_merge integer not null default 0,
    confirmed_at timestamptz,
    flagged_at timestamptz,
    verdict jsonb,
    evidence jsonb,
    primary key (owner_id, item_id),
    foreign key (owner_id, item_id) references work_items (owner_id, id),
    foreign key (owner_id, finding_id) references findings (owner_id, id),
    foreign key (owner_id, analysis_id) references finding_analyses (owner_id, item_id)
);
create index remediations_of_finding on remediations (owner_id, finding_id);
create index remediations_of_findings on remediations using gin (findings);

create table notices (
    owner_id uuid not null,
    item_id uuid not null,
    finding_id uuid not null,
    kind text not null check (kind in ('new_finding', 'sla_warning', 'sla_breach')),
    verdict jsonb,
    evidence jsonb,
    primary key (owner_id, item_id),
    foreign key (owner_id, item_id) references work_items (owner_id, id),
    foreign key (owner_id, finding_id) references findings (owner_id, id)
);
create index notices_of_finding on notices (owner_id, finding_id, kind);

create table service_blocks (
    owner_id uuid not null references owners (id),
    service text not null,
    reason text not null,
    times integer not null check (times >= 0),
    blocked_until timestamptz not null,
    primary key (owner_id, service)
);
create table sync_requests (
    owner_id uuid not null,
    item_id uuid not null,
    repository_id bigint,
    requested_by text not null,
    verdict jsonb,
    evidence jsonb,
    primary key (owner_id, item_id),
    foreign key (owner_id, item_id) references work_items (owner_id, id)
);

-- Reports read a period's events page by page.
create index audit_events_by_time on audit_events (owner_id, at, id);
"""

TABLE_NAMES = ("finding_analyses", "dismissals", "remediations", "notices", "service_blocks", "sync_requests")
SCOPE = "nullif(current_setting('kilo.owner_id', true), '')::uuid"


def upgrade() -> None:
    """Adds them, each with its policies; the system login may read (checks, sweeps) and writes nothing here."""
    op.execute(TABLES)
    for table in TABLE_NAMES:
        op.execute(f"alter table {table} enable row level security")
        op.execute(f"alter table {table} force row level security")
        op.execute(
            f"create policy owner_scope on {table} as restrictive to kilo_app using (owner_id = {SCOPE}) with check (owner_id = {SCOPE})"
        )
        op.execute(f"create policy app_access on {table} as permissive to kilo_app using (true) with check (true)")
        op.execute(f"create policy system_access on {table} as permissive to kilo_system using (true) with check (true)")
        op.execute(f"grant select, insert, update on {table} to kilo_app")
        op.execute(f"grant select on {table} to kilo_system")


def downgrade() -> None:
    """Removes them."""
    op.execute("drop index audit_events_by_time")
    for table in reversed(TABLE_NAMES):
        op.execute(f"drop table {table}")
