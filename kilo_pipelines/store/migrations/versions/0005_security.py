"""Security Agent: findings with their history, deadlines and syncs.

Upstream state and local disposition are separate columns; the effective status follows from both in `finding_status` (contract section
"Beyond the reference", 1). A finding is unique per owner, repository id, source and source id. What a repository's sync learnt is
kept beside the findings, so that an unchanged alert writes no finding row.
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"

TABLES = """
create function finding_status(upstream_state text, disposition text) returns text immutable parallel safe language sql as $$
    select case when upstream_state = 'fixed' then 'fixed' when upstream_state <> 'open' or disposition is not null then 'ignored' else 'open' end
$$;

create table findings (
    owner_id uuid not null,
    id uuid not null,
    repository_id bigint not null,
    source text not null,
    source_id text not null,
    severity text not null check (severity in ('critical', 'high', 'medium', 'low')),
    ghsa_id text,
    cve_id text,
    package_name text not null,
    package_ecosystem text not null,
    manifest_path text not null,
    dependency_scope text,
    vulnerable_version_range text,
    patched_version text,
    title text not null,
    description text not null,
    cwe_ids text[] not null,
    cvss_score numeric(3, 1),
    html_url text,
    upstream_state text not null check (upstream_state in ('open', 'fixed', 'dismissed', 'auto_dismissed')),
    upstream_reason text,
    upstream_by text,
    upstream_comment text,
    disposition text check (disposition in ('dismissed', 'superseded')),
    disposition_reason text,
    disposition_by text,
    disposition_actor text,
    disposition_at timestamptz,
    disposition_evidence jsonb,
    canonical_id uuid,
    fingerprint text not null,
    detected_at timestamptz not null,
    source_updated_at timestamptz not null,
    fixed_at timestamptz,
    dismissed_at timestamptz,
    auto_dismissed_at timestamptz,
    first_seen_at timestamptz not null,
    changed_at timestamptz not null,
    primary key (owner_id, id),
    unique (owner_id, repository_id, source, source_id),
    foreign key (owner_id, repository_id) references repositories (owner_id, external_id),
    foreign key (owner_id, canonical_id) references findings (owner_id, id),
    check ((disposition = 'superseded') = (canonical_id is not null)),
    check ((disposition is null) = (disposition_at is null))
);
create index findings_open on findings (owner_id, severity, detected_at) where finding_status(upstream_state, disposition) = 'open';
create index findings_of_package on findings (owner_id, repository_id, package_ecosystem, package_name, manifest_path);

create table finding_events (
    owner_id uuid not null,
    finding_id uuid not null,
    id bigint generated always as identity,
    at timestamptz not null,
    kind text not null check (kind in ('opened', 'severity', 'ignored', 'reopened', 'fixed')),
    severity text,
    reconstructed boolean not null default false,
    event_key text not null,
    recorded_at timestamptz not null,
    primary key (owner_id, id),
    unique (owner_id, event_key),
    foreign key (owner_id, finding_id) references findings (owner_id, id)
);
create index finding_events_of_finding on finding_events (owner_id, finding_id, at, id);

create table sla_policies (
    owner_id uuid not null references owners (id),
    version integer not null,
    policy jsonb not null,
    valid_from timestamptz not null,
    primary key (owner_id, version)
);

create table finding_sla (
    owner_id uuid not null,
    finding_id uuid not null,
    severity text not null,
    started_at timestamptz,
    due_at timestamptz,
    budget_days integer,
    paused_seconds bigint not null default 0,
    paused boolean not null default false,
    period integer not null default 1,
    closed_at timestamptz,
    reconstructed boolean not null default false,
    policy_version integer not null,
    primary key (owner_id, finding_id),
    foreign key (owner_id, finding_id) references findings (owner_id, id)
);
create index finding_sla_due on finding_sla (owner_id, due_at) where closed_at is null;

create table repository_syncs (
    owner_id uuid not null,
    repository_id bigint not null,
    etag text,
    cursor text,
    outcome text,
    detail text,
    alerts integer,
    attempted_at timestamptz,
    succeeded_at timestamptz,
    read_at timestamptz,
    not_before timestamptz,
    syncs bigint not null default 0,
    primary key (owner_id, repository_id),
    foreign key (owner_id, repository_id) references repositories (owner_id, external_id)
);

create table quarantined_alerts (
    owner_id uuid not null,
    repository_id bigint not null,
    source_id text not null,
    reason text not null,
    detail text not null,
    first_seen_at timestamptz not null,
    last_seen_at timestamptz not null,
    taken_at timestamptz,
    primary key (owner_id, repository_id, source_id),
    foreign key (owner_id, repository_id) references repositories (owner_id, external_id)
);

"""

# What the application may do with each: history is append-only, and nothing is deleted.
APP_GRANTS = {
    "findings": "select, insert, update",
    "finding_events": "select, insert",
    "sla_policies": "select, insert",
    "finding_sla": "select, insert, update",
    "repository_syncs": "select, insert, update",
    "quarantined_alerts": "select, insert, update",
}

SCOPE = "nullif(current_setting('kilo.owner_id', true), '')::uuid"


def upgrade() -> None:
    """Adds them, each with its policies; the system login may read (posture, recovery) and writes nothing here."""
    op.execute(TABLES)
    for table, grants in APP_GRANTS.items():
        op.execute(f"alter table {table} enable row level security")
        op.execute(f"alter table {table} force row level security")
        op.execute(
            f"create policy owner_scope on {table} as restrictive to kilo_app using (owner_id = {SCOPE}) with check (owner_id = {SCOPE})"
        )
        op.execute(f"create policy app_access on {table} as permissive to kilo_app using (true) with check (true)")
        op.execute(f"create policy system_access on {table} as permissive to kilo_system using (true) with check (true)")
        op.execute(f"grant {grants} on {table} to kilo_app")
        op.execute(f"grant select on {table} to kilo_system")


def downgrade() -> None:
    """Removes them."""
    for table in reversed(APP_GRANTS):
        op.execute(f"drop table {table}")
    op.execute("drop function finding_status")
