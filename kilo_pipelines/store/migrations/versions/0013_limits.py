"""Limits: spend, what running work holds of a budget, approvals, authors' buckets, held effects, capability receipts.

`spend_entries` makes each meter count once; `spend_days` is what claims and people read. A held effect has a deadline of its own.
"""

from __future__ import annotations

from alembic import op

revision = "0013"
down_revision = "0012"

TABLES = """
create table spend_entries (
    owner_id uuid not null,
    meter text not null,
    item_id uuid not null,
    session_id uuid,
    service text not null,
    model text not null,
    tokens_in bigint not null default 0,
    tokens_out bigint not null default 0,
    tokens_cached bigint not null default 0,
    micro_usd bigint not null default 0,
    first_at timestamptz not null,
    last_at timestamptz not null,
    primary key (owner_id, meter),
    foreign key (owner_id, item_id) references work_items (owner_id, id),
    foreign key (owner_id, session_id) references sessions (owner_id, id)
);
create index spend_entries_of_item on spend_entries (owner_id, item_id);

create table spend_days (
    owner_id uuid not null references owners (id),
    day date not null,
    service text not null,
    model text not null,
    tokens_in bigint not null default 0,
    tokens_out bigint not null default 0,
    tokens_cached bigint not null default 0,
    micro_usd bigint not null default 0,
    unpriced_tokens bigint not null default 0,
    last_at timestamptz not null,
    primary key (owner_id, day, service, model)
);
create index spend_days_of_day on spend_days (day);

create table budget_marks (
    owner_id uuid not null references owners (id),
    day date not null,
    scope text not null,
    level text not null,
    at timestamptz not null,
    primary key (owner_id, day, scope, level)
);

create table approvals (
    owner_id uuid not null,
    id uuid not null,
    repository_id bigint not null,
    pull_number integer not null,
    head_sha text not null,
    login text not null,
    how text not null check (how in ('comment', 'label', 'platform')),
    granted boolean,
    reason text,
    asked_at timestamptz not null,
    decided_at timestamptz,
    primary key (owner_id, id),
    foreign key (owner_id, repository_id) references repositories (owner_id, external_id),
    check ((granted is null) = (decided_at is null))
);
create index approvals_of_pull on approvals (owner_id, repository_id, pull_number, asked_at);

create table author_buckets (
    owner_id uuid not null,
    repository_id bigint not null,
    author text not null,
    tokens double precision not null,
    refilled_at timestamptz not null,
    primary key (owner_id, repository_id, author),
    foreign key (owner_id, repository_id) references repositories (owner_id, external_id)
);

alter table work_items add column by_person boolean not null default false,
    add column reserved_tokens bigint not null default 0 check (reserved_tokens >= 0),
    add column reserved_micro_usd bigint not null default 0 check (reserved_micro_usd >= 0);
create index work_items_at_work on work_items (owner_id) where state in ('starting', 'running');
create index sessions_at_work on sessions (owner_id, item_id) where ended_at is null;
alter table sessions add column receipt jsonb;
alter table reviews add column head_since timestamptz not null default now();
alter table effects add column held_until timestamptz;
alter table effects drop constraint effects_state_check;
alter table effects add constraint effects_state_check
    check (state in ('pending', 'held', 'applying', 'applied', 'dropped', 'unknown', 'dead'));
alter table effects add constraint effects_held_check check (state <> 'held' or held_until is not null);
create index effects_held on effects (held_until) where state = 'held';
alter table switches drop constraint switches_kind_check;
alter table switches add constraint switches_kind_check check (kind in ('pause', 'kill', 'suggest'));
"""

OWNER_TABLES = ("spend_entries", "spend_days", "budget_marks", "approvals", "author_buckets")
SCOPE = "nullif(current_setting('kilo.owner_id', true), '')::uuid"


def upgrade() -> None:
    """Adds them."""
    op.execute(TABLES)
    for table in OWNER_TABLES:
        op.execute(f"alter table {table} enable row level security")
        op.execute(f"alter table {table} force row level security")
        op.execute(
            f"create policy owner_scope on {table} as restrictive to kilo_app using (owner_id = {SCOPE}) with check (owner_id = {SCOPE})"
        )
        op.execute(f"create policy app_access on {table} as permissive to kilo_app using (true) with check (true)")
        op.execute(f"create policy system_access on {table} as permissive to kilo_system using (true) with check (true)")
        op.execute(f"grant select, insert, update on {table} to kilo_app, kilo_system")


def downgrade() -> None:
    """Removes them; what was held is dropped, as nobody could release it any more."""
    op.execute("update effects set state = 'dropped', reason = 'suggest_only', ended_at = now() where state = 'held'")
    op.execute("drop index effects_held")
    op.execute(
        "alter table effects drop constraint effects_held_check, drop constraint effects_state_check, drop column held_until"
    )
    op.execute(
        "alter table effects add constraint effects_state_check"
        " check (state in ('pending', 'applying', 'applied', 'dropped', 'unknown', 'dead'))"
    )
    op.execute("delete from switches where kind = 'suggest'")
    op.execute("alter table switches drop constraint switches_kind_check")
    op.execute("alter table switches add constraint switches_kind_check check (kind in ('pause', 'kill'))")
    op.execute("alter table reviews drop column head_since")
    op.execute("alter table sessions drop column receipt")
    op.execute("drop index work_items_at_work; drop index sessions_at_work")
    op.execute("alter table work_items drop column by_person, drop column reserved_tokens, drop column reserved_micro_usd")
    for table in reversed(OWNER_TABLES):
        op.execute(f"drop table {table}")
