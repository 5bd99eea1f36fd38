"""People, members of owners, and keys that end; who set a switch, so that an owner doesn't lift the operator's.

A person may be a member of several owners and belongs to none, so `people` has no owner; `owner_members` is its owner's. No foreign key
leads from an owner's table to one that is nobody's: it would answer past the policies whether a row is there. People are never deleted,
and memberships are ended, not deleted.

The role `reader` is called `viewer`. Keys of owners that had no end get one, 90 days from now.
"""

from __future__ import annotations

from alembic import op
from sqlalchemy import text

revision = "0012"
down_revision = "0011"

SCOPE = "nullif(current_setting('kilo.owner_id', true), '')::uuid"


def _own(table: str) -> None:
    """Policies and grants of a table of one owner each (migration 0001)."""
    op.execute(f"alter table {table} enable row level security")
    op.execute(f"alter table {table} force row level security")
    op.execute(
        f"create policy owner_scope on {table} as restrictive to kilo_app using (owner_id = {SCOPE}) with check (owner_id = {SCOPE})"
    )
    op.execute(f"create policy app_access on {table} as permissive to kilo_app using (true) with check (true)")
    op.execute(f"create policy system_access on {table} as permissive to kilo_system using (true) with check (true)")
    op.execute(f"grant select, insert, update on {table} to kilo_app")


def _moved(table: str, source: str) -> None:
    """Every membership arrived: forced policies hide rows from a migrator that forgot them."""
    connection = op.get_bind()
    counts = [connection.execute(text(f"select count(*) from {one}")).scalar_one() for one in (table, source)]
    if counts[0] != counts[1]:
        raise RuntimeError(f"{counts[1]} rows of {source} became {counts[0]} of {table}")


def upgrade() -> None:
    """Splits people from their memberships; keys get their person, name, end and marks of use."""
    op.execute("alter table people no force row level security")
    op.execute("alter table people rename to people_of_owners")
    op.execute("alter table people_of_owners rename constraint people_pkey to people_of_owners_pkey")
    op.execute(
        "create table people (id uuid primary key, login text not null unique check (login = lower(login)), created_at timestamptz not null)"
    )
    op.execute("grant select, insert on people to kilo_system")
    op.execute(
        """
        create table owner_members (
            owner_id uuid not null references owners (id),
            person_id uuid not null,
            role text not null check (role in ('owner', 'member', 'viewer')),
            period integer not null default 1,
            added_at timestamptz not null,
            removed_at timestamptz,
            primary key (owner_id, person_id)
        )
        """
    )
    op.execute("create index owner_members_of_person on owner_members (person_id)")
    op.execute(
        "insert into people (id, login, created_at) select distinct on (lower(login)) id, lower(login), created_at from people_of_owners"
        " order by lower(login), created_at, id"
    )
    op.execute(
        "insert into owner_members (owner_id, person_id, role, added_at) select o.owner_id, p.id,"
        " case o.role when 'reader' then 'viewer' else o.role end, o.created_at from people_of_owners o join people p on p.login = lower(o.login)"
    )
    _moved("owner_members", "people_of_owners")
    _own("owner_members")
    op.execute("grant select on owner_members to kilo_system")
    op.execute("drop table people_of_owners")

    op.execute("alter table api_keys drop constraint api_keys_role_check")
    op.execute("update api_keys set role = 'viewer' where role = 'reader'")
    op.execute("update api_keys set expires_at = now() + interval '90 days' where expires_at is null and role <> 'operator'")
    op.execute(
        "alter table api_keys add constraint api_keys_role_check check (role in ('operator', 'owner', 'member', 'viewer'))"
    )
    op.execute("alter table api_keys add constraint api_keys_end_check check (role = 'operator' or expires_at is not null)")
    op.execute(
        "alter table api_keys add column person_id uuid references people (id), add column member_period integer,"
        " add column name text not null default '', add column created_by text not null default 'platform',"
        " add column last_used_at timestamptz, add column rotated_at timestamptz, add column revoked_at timestamptz,"
        " add constraint api_keys_person_check check ((person_id is null) = (member_period is null))"
    )
    op.execute("create index api_keys_of_owner on api_keys (owner_id)")

    op.execute("alter table switches add column set_by text not null default 'operator'")
    # The control API tells the operator which revision the database is at.
    op.execute("grant select on alembic_version to kilo_system")


def downgrade() -> None:
    """People are rows of owners again; a key that can't be what it was (revoked, of a person) is gone, a member's reads only."""
    op.execute("revoke select on alembic_version from kilo_system")
    op.execute("alter table switches drop column set_by")
    op.execute("delete from api_keys where revoked_at is not null or person_id is not null")
    op.execute("drop index api_keys_of_owner")
    op.execute("alter table api_keys drop constraint api_keys_role_check, drop constraint api_keys_end_check")
    op.execute(
        "alter table api_keys drop column person_id, drop column member_period, drop column name, drop column created_by,"
        " drop column last_used_at, drop column rotated_at, drop column revoked_at"
    )
    op.execute("update api_keys set role = 'reader' where role in ('member', 'viewer')")
    op.execute("alter table api_keys add constraint api_keys_role_check check (role in ('operator', 'owner', 'reader'))")

    op.execute("alter table owner_members no force row level security")
    op.execute("alter table people rename to persons")
    op.execute("alter table persons rename constraint people_pkey to persons_pkey")
    op.execute(
        """
        create table people (
            owner_id uuid not null references owners (id),
            id uuid not null,
            login text not null,
            role text not null check (role in ('owner', 'member', 'reader')),
            created_at timestamptz not null default now(),
            primary key (owner_id, id),
            unique (owner_id, login)
        )
        """
    )
    op.execute("delete from owner_members where removed_at is not null")
    op.execute(
        "insert into people (owner_id, id, login, role, created_at) select m.owner_id, p.id, p.login,"
        " case m.role when 'viewer' then 'reader' else m.role end, m.added_at from owner_members m join persons p on p.id = m.person_id"
    )
    _moved("people", "owner_members")
    _own("people")
    op.execute("grant select, insert, update on people to kilo_system")
    op.execute("drop table owner_members")
    op.execute("drop table persons")
