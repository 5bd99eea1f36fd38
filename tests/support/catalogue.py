"""What PostgreSQL's own catalogue must say for threats, rule 17: each departure is named by its relation and its rule.

Nothing here lists the tables that exist: a new one is looked at as an owner's table until it is entered in `SHARED`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.rows import dict_row

APP, SYSTEM, MIGRATOR = "kilo_app", "kilo_system", "kilo_migrator"
LOGINS = (APP, SYSTEM)
WRITE = frozenset({"SELECT", "INSERT", "UPDATE"})
ADD = frozenset({"SELECT", "INSERT"})
PRIVILEGES = ("SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER")
# Tables of nobody, with what each login may do to them. Everything else is an owner's.
SHARED: dict[str, dict[str, frozenset[str]]] = {
    "alembic_version": {APP: frozenset(), SYSTEM: frozenset({"SELECT"})},
    "heartbeats": {APP: frozenset(), SYSTEM: WRITE},
    "api_keys": {APP: frozenset(), SYSTEM: WRITE | {"DELETE"}},
    "people": {APP: frozenset(), SYSTEM: ADD},
    "agent_capacity": {APP: frozenset(), SYSTEM: WRITE | {"DELETE"}},
    "counters": {APP: WRITE, SYSTEM: WRITE | {"DELETE"}},
    "switches": {APP: frozenset({"SELECT"}), SYSTEM: WRITE | {"DELETE"}},
    "audit_seals": {APP: frozenset(), SYSTEM: ADD},
    "delivery_log_positions": {APP: frozenset(), SYSTEM: WRITE},
    "setup_links": {APP: frozenset(), SYSTEM: WRITE | {"DELETE"}},
}
# Owner tables whose logins may do something else than `WRITE`: what is history is added to and never changed; the system login
# writes which seal holds an event, and removes what retention says.
LESS: dict[str, dict[str, frozenset[str]]] = {
    "owners": {APP: frozenset({"SELECT"})},
    "audit_events": {APP: ADD, SYSTEM: ADD | {"UPDATE"}},
    "session_events": {APP: ADD, SYSTEM: ADD | {"DELETE"}},
    "callback_tokens": {SYSTEM: WRITE | {"DELETE"}},
    "owner_members": {SYSTEM: frozenset({"SELECT"})},
    # The system login compares owners' findings and writes none of them.
    "findings": {SYSTEM: frozenset({"SELECT"})},
    "finding_events": {APP: ADD, SYSTEM: frozenset({"SELECT"})},
    "finding_sla": {SYSTEM: frozenset({"SELECT"})},
    "sla_policies": {APP: ADD, SYSTEM: frozenset({"SELECT"})},
    "repository_syncs": {SYSTEM: frozenset({"SELECT"})},
    "quarantined_alerts": {SYSTEM: frozenset({"SELECT"})},
    "delivery_gaps": {SYSTEM: frozenset({"SELECT", "DELETE"})},
    "author_buckets": {SYSTEM: WRITE | {"DELETE"}},
}
SCOPE = "(NULLIF(current_setting('kilo.owner_id'::text, true), ''::text))::uuid"


@dataclass(frozen=True)
class Relation:
    """One relation of the schema `public`."""

    oid: int
    name: str
    kind: str  # pg_class.relkind
    part: bool
    secured: bool
    forced: bool
    options: list[str]

    @property
    def owner_column(self) -> str:
        return "id" if self.name == "owners" else "owner_id"


def relations(admin: psycopg.Connection[Any]) -> list[Relation]:
    """Every relation that holds or shows rows, and every sequence."""
    found = admin.execute(
        "select c.oid, c.relname, c.relkind::text, c.relispartition or exists (select 1 from pg_inherits i where i.inhrelid = c.oid),"
        " c.relrowsecurity, c.relforcerowsecurity, coalesce(c.reloptions, '{}') from pg_class c"
        " where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p', 'v', 'm', 'f', 'S') order by c.relname"
    )
    return [Relation(*row) for row in found]


def owner_tables(admin: psycopg.Connection[Any]) -> list[Relation]:
    """Tables with owners' rows: all but the shared ones."""
    return [one for one in relations(admin) if one.kind in "rp" and one.name not in SHARED]


def complaints(admin: psycopg.Connection[Any]) -> set[tuple[str, str]]:
    """(relation, rule) of everything that isn't as threats, rule 17 wants it; `admin` is a superuser's connection."""
    found: set[tuple[str, str]] = set()
    owned = {one.oid: one for one in owner_tables(admin)}
    for one in relations(admin):
        if one.oid in owned:
            found |= {(one.name, rule) for rule in _table(admin, one)}
        elif one.kind == "v" and not {"security_invoker=true", "security_invoker=on", "security_invoker=1"} & set(one.options):
            found.add((one.name, "view runs with its owner's rights"))
        elif one.kind == "m":
            found.add((one.name, "materialized view keeps rows without policies"))
        elif one.kind == "f":
            found.add((one.name, "foreign table has no policies"))
        found |= {(one.name, rule) for rule in _grants(admin, one)}
    return found | _keys(admin, owned) | _schema(admin)


def _rows(admin: psycopg.Connection[Any], sql: str, *values: Any) -> list[dict[str, Any]]:
    with admin.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(sql.encode(), values).fetchall()


def _table(admin: psycopg.Connection[Any], table: Relation) -> list[str]:
    rules = []
    if not table.secured:
        rules.append("row-level security is off")
    if not table.forced:
        rules.append("row-level security is not forced")
    column = _rows(
        admin,
        "select format_type(atttypid, atttypmod) as type, attnotnull from pg_attribute where attrelid = %s and attname = %s and not attisdropped",
        table.oid,
        table.owner_column,
    )
    if [(one["type"], one["attnotnull"]) for one in column] != [("uuid", True)]:
        rules.append("no owner column")
    policies = _rows(
        admin,
        "select p.polname, p.polpermissive, p.polcmd::text, array(select rolname::text from pg_roles where oid = any(p.polroles)) as roles,"
        " 0 = any(p.polroles) as everybody, pg_get_expr(p.polqual, p.polrelid) as seen, pg_get_expr(p.polwithcheck, p.polrelid) as written"
        " from pg_policy p where p.polrelid = %s",
        table.oid,
    )
    wanted = f"({table.owner_column} = {SCOPE})"
    if not any(
        not one["polpermissive"]
        and one["polcmd"] == "*"
        and APP in one["roles"]
        and (one["seen"], one["written"]) == (wanted, wanted)
        for one in policies
    ):
        rules.append("no owner policy")
    for one in policies:
        if one["everybody"] or (one["polpermissive"] and set(one["roles"]) - set(LOGINS)):
            rules.append("policy for others")
    unique = _rows(
        admin,
        "select i.indisprimary, (select attname from pg_attribute a where a.attrelid = i.indrelid and a.attnum = i.indkey[0]) as first"
        " from pg_index i where i.indrelid = %s and (i.indisunique or i.indisexclusion)",
        table.oid,
    )
    if not any(one["indisprimary"] for one in unique):
        rules.append("no primary key")
    if any(one["first"] != table.owner_column for one in unique):
        rules.append("unique key doesn't start with the owner")
    return rules


def allowed(table: Relation, login: str) -> frozenset[str]:
    """What a login may do to a relation."""
    if table.kind not in "rp" or table.part:
        # Views read through the caller's own rights; partitions are reached through their parent; sequences by identity alone.
        return frozenset({"SELECT"}) if table.kind == "v" else frozenset()
    return SHARED[table.name][login] if table.name in SHARED else LESS.get(table.name, {}).get(login, WRITE)


def _grants(admin: psycopg.Connection[Any], table: Relation) -> list[str]:
    rules = []
    for login in LOGINS:
        if table.kind == "S":
            held = _rows(
                admin, "select has_sequence_privilege(%s::name, %s::oid, 'SELECT, UPDATE, USAGE') as held", login, table.oid
            )
            if held[0]["held"]:
                rules.append(f"{login} may use the sequence")
            continue
        for privilege in PRIVILEGES:
            look = (
                "has_any_column_privilege" if privilege in ("SELECT", "INSERT", "UPDATE", "REFERENCES") else "has_table_privilege"
            )
            held = _rows(admin, f"select {look}(%s::name, %s::oid, %s) as held", login, table.oid, privilege)
            if held[0]["held"] and privilege not in allowed(table, login):
                rules.append(f"{login} may {privilege.lower()}")
    owner = _rows(admin, "select pg_get_userbyid(relowner) as owner from pg_class where oid = %s", table.oid)[0]["owner"]
    if owner != MIGRATOR:
        rules.append("owned by another login than the migrator")
    return rules


def _keys(admin: psycopg.Connection[Any], owned: dict[int, Relation]) -> set[tuple[str, str]]:
    """Foreign keys run with the table owner's rights and look past policies: each pair of owner tables is tied by the owner too."""
    found = set()
    for key in foreign_keys(admin):
        child, parent = owned.get(key["child_oid"]), owned.get(key["parent_oid"])
        if parent is None:
            if child is not None:
                found.add((key["child"], f"foreign key to {key['parent']}, which is nobody's"))
            continue
        if child is None and parent.name != "owners":
            found.add((key["child"], "foreign key from a shared table"))
        elif child is not None and (child.owner_column, parent.owner_column) not in zip(
            key["columns"], key["targets"], strict=True
        ):
            found.add((key["child"], "plain foreign key"))
        if key["actions"] != "aa":
            found.add((key["child"], "foreign key changes rows by itself"))
    return found


def foreign_keys(admin: psycopg.Connection[Any]) -> list[dict[str, Any]]:
    """Every foreign key of the schema with its columns and actions."""
    names = "array(select a.attname::text from unnest({0}) with ordinality k(n, i) join pg_attribute a on a.attrelid = {1} and a.attnum = k.n order by k.i)"
    return _rows(
        admin,
        "select c.conname, c.conrelid as child_oid, c.confrelid as parent_oid, c.conrelid::regclass::text as child,"
        " c.confrelid::regclass::text as parent, c.confupdtype::text || c.confdeltype::text as actions,"
        f" {names.format('c.conkey', 'c.conrelid')} as columns, {names.format('c.confkey', 'c.confrelid')} as targets"
        " from pg_constraint c where c.contype = 'f' and c.connamespace = 'public'::regnamespace order by 1",
    )


def unique_keys(admin: psycopg.Connection[Any], table: str) -> list[list[str]]:
    """Columns of each unique index."""
    found = _rows(
        admin,
        "select array(select a.attname::text from unnest(i.indkey) with ordinality k(n, o)"
        " join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.n order by k.o) as columns"
        " from pg_index i where i.indisunique and i.indrelid = %s::regclass order by not i.indisprimary, i.indexrelid",
        table,
    )
    return [one["columns"] for one in found]


def _schema(admin: psycopg.Connection[Any]) -> set[tuple[str, str]]:
    found = set()
    for login in LOGINS:
        role = _rows(
            admin,
            "select rolsuper or rolbypassrls or rolcreaterole or rolcreatedb as strong from pg_roles where rolname = %s",
            login,
        )
        if role[0]["strong"]:
            found.add((login, "login is stronger than its work"))
        if _rows(admin, "select 1 from pg_auth_members where member = %s::regrole", login):
            found.add((login, "login is a member of another role"))
        may = _rows(
            admin,
            "select has_schema_privilege(%s::name, 'public', 'CREATE') as made, has_database_privilege(%s::name, current_database(), 'TEMP, CREATE') as held",
            login,
            login,
        )[0]
        if may["made"] or may["held"]:
            found.add((login, "login may make relations"))
    for one in _rows(admin, "select p.proname from pg_proc p where p.pronamespace = 'public'::regnamespace and p.prosecdef"):
        found.add((one["proname"], "function runs with its owner's rights"))
    if _rows(admin, "select 1 from pg_default_acl"):
        found.add(("public", "new relations are granted by default"))
    return found
