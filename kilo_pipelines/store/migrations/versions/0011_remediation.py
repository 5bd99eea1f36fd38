"""Remediations: when a pull request was seen closed, and merged ones whose findings were dismissed instead of fixed."""

from __future__ import annotations

from alembic import op

revision = "0011"
down_revision = "0009"


def upgrade() -> None:
    """Adds both moments."""
    op.execute("alter table remediations add column closed_at timestamptz, add column set_aside_at timestamptz")


def downgrade() -> None:
    """Removes them."""
    op.execute("alter table remediations drop column set_aside_at, drop column closed_at")
