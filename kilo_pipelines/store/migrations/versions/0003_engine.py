"""Fair offers, rate budgets, what disables a service.

`owner_slots.taken_at` stays when a slot is freed: it is the pool's last turn, by which owners take turns. Surplus slots of
a smaller plan are retired by the claim: they are offered to nobody.
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"

TABLES = """
create table rate_budgets (
    owner_id uuid not null,
    integration_id uuid not null,
    kind text not null,
    tokens double precision not null,
    refilled_at timestamptz not null,
    blocked_until timestamptz,
    primary key (owner_id, integration_id, kind),
    foreign key (owner_id, integration_id) references integrations (owner_id, id)
);
alter table service_configs add column action_required jsonb;
alter table owner_slots add column retired boolean not null default false;
create index work_items_in_line on work_items (owner_id, service, priority desc, created_at, id) where state = 'waiting';
create index work_items_offered on work_items (owner_id, service, offer_until) where state = 'waiting' and offer_until is not null;
drop index work_items_fair;
"""

SCOPE = "nullif(current_setting('kilo.owner_id', true), '')::uuid"


def upgrade() -> None:
    """Adds them."""
    op.execute(TABLES)
    op.execute("alter table rate_budgets enable row level security")
    op.execute("alter table rate_budgets force row level security")
    op.execute(
        f"create policy owner_scope on rate_budgets as restrictive to kilo_app using (owner_id = {SCOPE}) with check (owner_id = {SCOPE})"
    )
    op.execute("create policy app_access on rate_budgets as permissive to kilo_app using (true) with check (true)")
    op.execute("create policy system_access on rate_budgets as permissive to kilo_system using (true) with check (true)")
    op.execute("grant select, insert, update on rate_budgets to kilo_app, kilo_system")


def downgrade() -> None:
    """Removes them."""
    op.execute(
        "create index work_items_fair on work_items (owner_id, service, priority desc, created_at) where state = 'waiting'"
    )
    op.execute("drop index work_items_in_line; drop index work_items_offered")
    op.execute("alter table service_configs drop column action_required; alter table owner_slots drop column retired")
    op.execute("drop table rate_budgets")
