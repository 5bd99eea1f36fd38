"""Where traces go on, heartbeats of what has to run, and the indexes by which a scrape finds what ended since the last one.

`trace` is a place of our own making (W3C traceparent), never what a sender claimed. `heartbeats` belong to no owner.
"""

from __future__ import annotations

from alembic import op

revision = "0019"
down_revision = "0018"

TRACED = ("deliveries", "work_items", "sessions", "effects")
# Rows that ended, by when: a scrape reads the newest few of them, however many there are.
INDEXES = {
    "sessions_ended": "on sessions (ended_at) where ended_at is not null",
    "work_items_ended": "on work_items (ended_at) where ended_at is not null",
    "effects_ended": "on effects (ended_at) where ended_at is not null",
}


def upgrade() -> None:
    """Adds them."""
    for table in TRACED:
        op.execute(f"alter table {table} add column trace text check (trace ~ '^00-[0-9a-f]{{32}}-[0-9a-f]{{16}}-0[01]$')")
    for name, place in INDEXES.items():
        op.execute(f"create index {name} {place}")
    op.execute("create table heartbeats (name text primary key, at timestamptz not null)")
    op.execute("grant select, insert, update on heartbeats to kilo_system")


def downgrade() -> None:
    """Removes them."""
    op.execute("drop table heartbeats")
    for name in INDEXES:
        op.execute(f"drop index {name}")
    for table in TRACED:
        op.execute(f"alter table {table} drop column trace")
