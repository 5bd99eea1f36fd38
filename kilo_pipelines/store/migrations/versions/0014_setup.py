"""Set-up links, and the models that an owner may use.

A link is printed by the operator's command and opened once in a browser, whose cookie it then is; at any moment one answer of the
provider is waited for. Links belong to nobody yet: an owner comes out of them.
"""

from __future__ import annotations

from alembic import op

revision = "0014"
down_revision = "0013"

TABLES = """
create table setup_links (
    id uuid primary key,
    link_sha256 bytea not null unique,
    cookie_sha256 bytea unique,
    request jsonb not null,
    state_sha256 bytea,
    state_for text check (state_for in ('manifest', 'installation', 'authorization')),
    notes jsonb not null default '{}',
    created_at timestamptz not null,
    expires_at timestamptz not null,
    check ((state_sha256 is null) = (state_for is null))
);

create table owner_models (
    owner_id uuid not null references owners (id),
    model text not null check (length(model) between 1 and 200),
    allowed boolean not null,
    updated_at timestamptz not null,
    primary key (owner_id, model)
);
"""

SCOPE = "nullif(current_setting('kilo.owner_id', true), '')::uuid"


def upgrade() -> None:
    """Adds them; links are the system login's alone."""
    op.execute(TABLES)
    op.execute("grant select, insert, update, delete on setup_links to kilo_system")
    op.execute("alter table owner_models enable row level security")
    op.execute("alter table owner_models force row level security")
    op.execute(
        f"create policy owner_scope on owner_models as restrictive to kilo_app using (owner_id = {SCOPE}) with check (owner_id = {SCOPE})"
    )
    op.execute("create policy app_access on owner_models as permissive to kilo_app using (true) with check (true)")
    op.execute("create policy system_access on owner_models as permissive to kilo_system using (true) with check (true)")
    op.execute("grant select, insert, update on owner_models to kilo_app, kilo_system")


def downgrade() -> None:
    """Removes them."""
    op.execute("drop table owner_models")
    op.execute("drop table setup_links")
