"""Missed deliveries: gaps of each owner, and how far the provider's log, which is one for all installations, was compared."""

from __future__ import annotations

from alembic import op

revision = "0015"
down_revision = "0014"

TABLES = """
create table delivery_gaps (
    owner_id uuid not null,
    id uuid not null,
    integration_id uuid not null,
    guid text not null,
    event text not null,
    action text,
    repository_id bigint,
    attempt_id bigint not null,
    attempted_at timestamptz not null,
    answered boolean not null,
    sent_at timestamptz not null,
    missing_since timestamptz not null,
    state text not null default 'missing' check (state in ('missing', 'asked', 'repaired', 'pulled', 'gave_up')),
    reason text,
    asks integer not null default 0,
    pulls integer not null default 0,
    asked_at timestamptz,
    not_before timestamptz not null,
    deadline timestamptz not null,
    ended_at timestamptz,
    primary key (owner_id, id),
    unique (owner_id, integration_id, guid),
    foreign key (owner_id, integration_id) references integrations (owner_id, id),
    check ((state in ('missing', 'asked')) = (ended_at is null)),
    check ((ended_at is null) = (reason is null))
);
create index delivery_gaps_open on delivery_gaps (not_before) where ended_at is null;

create table delivery_log_positions (
    app_id bigint primary key,
    revision bigint not null,
    compared_until timestamptz,
    compared_at timestamptz,
    reading_until timestamptz,
    cursor text,
    check ((reading_until is null) = (cursor is null))
);
"""

SCOPE = "nullif(current_setting('kilo.owner_id', true), '')::uuid"


def upgrade() -> None:
    """Adds them. The system login removes old gaps (retention) and keeps the positions, which are no owner's."""
    op.execute(TABLES)
    op.execute("alter table delivery_gaps enable row level security")
    op.execute("alter table delivery_gaps force row level security")
    op.execute(
        f"create policy owner_scope on delivery_gaps as restrictive to kilo_app using (owner_id = {SCOPE}) with check (owner_id = {SCOPE})"
    )
    op.execute("create policy app_access on delivery_gaps as permissive to kilo_app using (true) with check (true)")
    op.execute("create policy system_access on delivery_gaps as permissive to kilo_system using (true) with check (true)")
    op.execute("grant select, insert, update on delivery_gaps to kilo_app")
    op.execute("grant select, delete on delivery_gaps to kilo_system")
    op.execute("grant select, insert, update on delivery_log_positions to kilo_system")


def downgrade() -> None:
    """Removes them."""
    op.execute("drop table delivery_gaps; drop table delivery_log_positions")
