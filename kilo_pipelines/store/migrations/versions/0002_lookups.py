"""Indexes of the lookups that know an id or a state and no owner: each run and each second's recovery makes them.

They are plain, not unique: a unique key of an owner's table starts with its owner (threats, rule 17).
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"

INDEXES = {
    "work_items_by_id": "on work_items (id)",
    "sessions_by_id": "on sessions (id)",
    "work_items_fair": "on work_items (owner_id, service, priority desc, created_at) where state = 'waiting'",
    "work_items_news": "on work_items (service, updated_at)",
    "effects_for_people": "on effects (state) where state in ('dead', 'unknown')",
}


def upgrade() -> None:
    """Adds them."""
    for name, place in INDEXES.items():
        op.execute(f"create index {name} {place}")


def downgrade() -> None:
    """Removes them."""
    for name in INDEXES:
        op.execute(f"drop index {name}")
