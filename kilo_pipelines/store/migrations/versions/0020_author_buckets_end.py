"""Buckets of authors that were not seen for long are swept (docs/retention.md)."""

from __future__ import annotations

from alembic import op

revision = "0020"
down_revision = "0019"


def upgrade() -> None:
    """Lets the platform delete them."""
    op.execute("grant delete on author_buckets to kilo_system")


def downgrade() -> None:
    """Takes that back."""
    op.execute("revoke delete on author_buckets from kilo_system")
