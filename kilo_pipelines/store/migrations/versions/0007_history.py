"""Deadlines of earlier periods, and of how many steps of history a deadline was computed.

Deadlines say more than they did, so that every one of them counts as of an older policy until it is computed anew: at the next sync,
or by materializing `finding_sla`.
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Adds them. A changed type is written past row-level security, which holds for a table's owner, too."""
    op.execute(
        "alter table finding_sla add column met_due timestamptz[] not null default '{}',"
        " add column missed_due timestamptz[] not null default '{}', add column events integer not null default 0,"
        " alter column policy_version type integer using 0"
    )


def downgrade() -> None:
    """Removes them."""
    op.execute("alter table finding_sla drop column met_due, drop column missed_due, drop column events")
