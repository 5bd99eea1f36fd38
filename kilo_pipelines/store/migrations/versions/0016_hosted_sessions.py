"""Hosted sessions: what the platform knows of a session that another service runs, and when it looks at it again."""

from __future__ import annotations

from alembic import op

revision = "0016"
down_revision = "0015"

TABLE = """
create table hosted_sessions (
    owner_id uuid not null,
    session_id uuid not null,
    state text not null default 'new' check (state in ('new', 'prepared', 'initiated', 'closed')),
    plan jsonb,
    cloud_session_id text,
    kilo_session_id text,
    message_id text,
    part integer not null default 0,
    repaired boolean not null default false,
    results jsonb not null default '[]',
    tries integer not null default 0,
    closings integer not null default 0,
    reason text,
    looked_at timestamptz,
    look_at timestamptz,
    hint_at timestamptz,
    offer_no integer not null default 0,
    offer_until timestamptz,
    created_at timestamptz not null,
    initiated_at timestamptz,
    closed_at timestamptz,
    primary key (owner_id, session_id),
    unique (owner_id, cloud_session_id),
    foreign key (owner_id, session_id) references sessions (owner_id, id),
    check (cloud_session_id is not null or state in ('new', 'closed'))
);
create index hosted_sessions_open on hosted_sessions (created_at) where state <> 'closed';
"""


def upgrade() -> None:
    """The table with its owner's scope."""
    op.execute(TABLE)
    scope = "nullif(current_setting('kilo.owner_id', true), '')::uuid"
    op.execute("alter table hosted_sessions enable row level security")
    op.execute("alter table hosted_sessions force row level security")
    op.execute(
        "create policy owner_scope on hosted_sessions as restrictive to kilo_app"
        f" using (owner_id = {scope}) with check (owner_id = {scope})"
    )
    op.execute("create policy app_access on hosted_sessions as permissive to kilo_app using (true) with check (true)")
    op.execute("create policy system_access on hosted_sessions as permissive to kilo_system using (true) with check (true)")
    op.execute("grant select, insert, update on hosted_sessions to kilo_app, kilo_system")


def downgrade() -> None:
    """Forgets them; what runs at the service ends there by its own limits."""
    op.execute("drop table hosted_sessions")
