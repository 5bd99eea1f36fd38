"""Hosts with agents say that they are there; the engine's login may read the schema's revision."""

from __future__ import annotations

from alembic import op

revision = "0018"
down_revision = "0016"


def upgrade() -> None:
    """Adds when a host was seen, and the right to see the revision."""
    op.execute("alter table agent_capacity add column seen_at timestamptz not null default now()")


def downgrade() -> None:
    """Removes both."""
    op.execute("alter table agent_capacity drop column seen_at")
