"""Seals of the audit events, and what retention may delete.

Events and seals stay append-only: the only column of an event that anybody may write again says which seal holds it, and changing
that breaks the seal's digest.
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"

TABLES = """
alter table audit_events add column seal integer;
create index audit_events_unsealed on audit_events (id) where seal is null;
create index audit_events_by_seal on audit_events (seal, owner_id, id);
create table audit_seals (
    number integer primary key,
    previous text not null,
    sealed_at timestamptz not null,
    count integer not null,
    events text not null,
    head text not null
);
create index deliveries_by_age on deliveries (settled_at) where settled_at is not null and body <> '';
create index session_events_by_age on session_events (at);
create index callback_tokens_by_age on callback_tokens (expires_at);
"""


def upgrade() -> None:
    """Adds them."""
    op.execute(TABLES)
    op.execute("grant update (seal) on audit_events to kilo_system")
    op.execute("grant select, insert on audit_seals to kilo_system")
    op.execute("grant delete on session_events, callback_tokens to kilo_system")


def downgrade() -> None:
    """Removes them."""
    op.execute("revoke delete on session_events, callback_tokens from kilo_system")
    op.execute("drop index deliveries_by_age; drop index session_events_by_age; drop index callback_tokens_by_age")
    op.execute("drop table audit_seals")
    op.execute("alter table audit_events drop column seal")
