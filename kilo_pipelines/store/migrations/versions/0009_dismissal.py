"""Blocks for want of credit are those of a service and of a kind of call, and may wait for a person by themselves.

What was blocked before lasts a day at most and is asked once more: blocks of the old shape are dropped, both ways.
"""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0007"


def upgrade() -> None:
    """A block has a kind of call, and what a person has to do."""
    op.execute("truncate service_blocks")
    op.execute("alter table service_blocks drop constraint service_blocks_pkey")
    op.execute("alter table service_blocks add column call text not null")
    op.execute("alter table service_blocks add column action_required jsonb")
    op.execute("alter table service_blocks add primary key (owner_id, service, call)")


def downgrade() -> None:
    """Blocks of whole services."""
    op.execute("truncate service_blocks")
    op.execute("alter table service_blocks drop constraint service_blocks_pkey")
    op.execute("alter table service_blocks drop column call, drop column action_required")
    op.execute("alter table service_blocks add primary key (owner_id, service)")
