"""Attacks of one owner on another's rows, generated over every relation of the catalogue; each runs in a savepoint and is undone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import psycopg
from psycopg import sql

from tests.support.catalogue import SHARED, Relation, foreign_keys, owner_tables, relations, unique_keys

# What a refusal may look like: policy or grant, a statement that row-level security forbids, a scope that is no id.
REFUSALS = frozenset({"42501", "0A000", "22P02"})


@dataclass(frozen=True)
class Verb:
    """One way to reach rows. `counts`: the answer's first value, else the rows that were changed; `made`: any success is a leak."""

    sql: str
    counts: bool = False
    made: bool = False


_A = "{o} = %(a)s"
_RECORD = "select (jsonb_populate_record(null::{t}, %({row})s::jsonb)).*"
VERBS: dict[str, Verb] = {
    "select": Verb(f"select count(*) from {{t}} where {_A}", counts=True),
    "select all": Verb(f"with seen as materialized (select * from {{t}}) select count(*) from seen where {_A}", counts=True),
    "select for update": Verb(
        f"with seen as (select {{o}} from {{t}} for update) select count(*) from seen where {_A}", counts=True
    ),
    "select by sample": Verb(f"select count(*) from {{t}} tablesample system (100) where {_A}", counts=True),
    # A filter that fails on a row tells of the row, if it runs before the policy.
    "select by error": Verb(f"select count(*) from {{t}} where 1 / (case when {_A} then 0 else 1 end) = 2", counts=True),
    "copy": Verb(f"copy (select {{o}} from {{t}} where {_A.replace('%(a)s', '{a}')}) to stdout", made=False),
    "update": Verb(f"update {{t}} set {{o}} = {{o}} where {_A}"),
    "update all": Verb("update {t} set {o} = %(a)s"),
    "update from": Verb(f"update {{t}} x set {{o}} = x.{{o}} from {{t}} y where y.{_A} and x.ctid = y.ctid"),
    "delete": Verb(f"delete from {{t}} where {_A}"),
    "truncate": Verb("truncate {t} cascade", made=True),
    "insert": Verb(f"insert into {{t}} overriding system value {_RECORD.replace('{row}', 'fresh')}", made=True),
    "insert returning": Verb(
        f"insert into {{t}} overriding system value {_RECORD.replace('{row}', 'fresh')} returning 1", made=True
    ),
    "insert on conflict do nothing": Verb(
        f"insert into {{t}} overriding system value {_RECORD.replace('{row}', 'same')} on conflict do nothing", made=True
    ),
    "insert on conflict do update": Verb(
        f"insert into {{t}} overriding system value {_RECORD.replace('{row}', 'same')} on conflict ({{k}}) do update set {{o}} = excluded.{{o}}",
        made=True,
    ),
    "merge update": Verb(f"merge into {{t}} x using (select 1) s on x.{_A} when matched then update set {{o}} = x.{{o}}"),
    "merge delete": Verb(f"merge into {{t}} x using (select 1) s on x.{_A} when matched then delete"),
}


@dataclass
class Attack:
    """What came of one attack."""

    relation: str
    verb: str
    scope: str
    leaked: bool
    word: str

    def __str__(self) -> str:
        return f"{self.verb} on {self.relation} ({self.scope}): {self.word}"


class Raider:
    """Somebody in the application's place who works for owner B and wants A's rows."""

    def __init__(self, admin: psycopg.Connection[Any], a: UUID, b: UUID) -> None:
        self._admin = admin
        self.a, self.b = a, b

    def prey(self, table: Relation) -> dict[str, Any] | None:
        """One of A's rows as JSON, seen by the superuser."""
        look = sql.SQL("select to_jsonb(x) from {t} x where {o} = %s order by to_jsonb(x)::text limit 1")
        row = self._admin.execute(
            look.format(t=sql.Identifier(table.name), o=sql.Identifier(table.owner_column)), (self.a,)
        ).fetchone()
        return dict(row[0]) if row else None

    def raid(
        self, connection: psycopg.Connection[Any], table: Relation, scope: str, verbs: dict[str, Verb] | None = None
    ) -> Iterator[Attack]:
        """Every verb against one table in the transaction that stands."""
        same = self.prey(table)
        assert same is not None, f"{table.name} holds no row of A: put one into tests/support/two.py, else nothing is attacked"
        fresh = refresh(self._admin, table.name, same)
        values = {"a": self.a, "same": json.dumps(same), "fresh": json.dumps(fresh)}
        key = unique_keys(self._admin, table.name)[0]
        for name, verb in (verbs or VERBS).items():
            statement = sql.SQL(verb.sql).format(  # type: ignore[arg-type]  # statements of ours
                t=sql.Identifier(table.name),
                o=sql.Identifier(table.owner_column),
                k=sql.SQL(", ").join(map(sql.Identifier, key)),
                a=sql.Literal(str(self.a)),
            )
            yield attempt(connection, table.name, name, scope, statement, values, verb)


def attempt(
    connection: psycopg.Connection[Any],
    relation: str,
    name: str,
    scope: str,
    statement: sql.Composed,
    values: dict[str, Any],
    verb: Verb,
) -> Attack:
    """One attack in a savepoint; whatever it did is undone."""
    leaked, word = True, ""
    with connection.transaction(force_rollback=True), connection.cursor() as cursor:
        try:
            with connection.transaction():
                if name == "copy":
                    with cursor.copy(statement) as answer:
                        touched = sum(1 for _ in answer.rows())
                else:
                    cursor.execute(statement, values)
                    touched = cursor.fetchone()[0] if verb.counts else cursor.rowcount  # type: ignore[index]  # count(*) answers
            leaked = verb.made or touched > 0
            word = f"{touched} rows"
        except psycopg.Error as refusal:
            leaked = refusal.sqlstate not in REFUSALS
            word = f"{refusal.sqlstate} {str(refusal).splitlines()[0]}"
    return Attack(relation, name, scope, leaked, word)


def refresh(
    admin: psycopg.Connection[Any], table: str, row: dict[str, Any], keep: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """The row with new values in its unique keys (each key's last column; `keep` stays), so that nothing but a policy refuses it."""
    fresh = dict(row)
    types = dict(
        admin.execute(
            "select attname::text, atttypid::regtype::text from pg_attribute where attrelid = %s::regclass and attnum > 0",
            (table,),
        ).fetchall()
    )
    for columns in unique_keys(admin, table):
        changed = next((name for name in reversed(columns) if name not in keep and name != "owner_id"), None)
        if changed is not None:
            fresh[changed] = _new(types[changed])
    return fresh


def _new(kind: str) -> Any:
    made = uuid4()
    if kind == "uuid":
        return str(made)
    if kind == "bytea":
        return "\\x" + made.hex
    return made.int % 2_000_000_000 if kind in ("integer", "bigint") else made.hex


@contextmanager
def scoped(connection: psycopg.Connection[Any], scope: str, a: UUID, b: UUID) -> Iterator[None]:
    """A transaction of the application under one of `SCOPES`."""
    connection.rollback()
    if scope.startswith("after"):
        connection.execute("select set_config('kilo.owner_id', %s, true)", (str(a),))
        assert connection.execute("select count(*) from owners").fetchone() == (1,), "A sees itself: the attack is no idle one"
        connection.commit() if scope == "after commit" else connection.rollback()
    elif scope != "none":
        value = {"other": str(b), "empty": "", "nobody": str(uuid4()), "no id": "kilo"}[scope]
        connection.execute("select set_config('kilo.owner_id', %s, true)", (value,))
    try:
        yield
    finally:
        connection.rollback()


SCOPES = ("other", "none", "empty", "nobody", "no id", "after commit", "after rollback")


def raid_shown(connection: psycopg.Connection[Any], raider: Raider, relation: Relation, scope: str) -> Iterator[Attack]:
    """Views show nothing of A; sequences are not to be read or moved."""
    name = sql.Identifier(relation.name)
    if relation.kind == "S":
        steal = {
            "last_value": sql.SQL("select last_value from {t}").format(t=name),
            "nextval": sql.SQL("select nextval({t})").format(t=sql.Literal(relation.name)),
            "setval": sql.SQL("select setval({t}, 1)").format(t=sql.Literal(relation.name)),
        }
        for verb, statement in steal.items():
            yield attempt(connection, relation.name, verb, scope, statement, {}, Verb("", made=True))
        return
    look = sql.SQL("select count(*) from {t} x where to_jsonb(x)::text like %(mark)s").format(t=name)
    yield attempt(connection, relation.name, "select", scope, look, {"mark": f"%{raider.a}%"}, Verb("", counts=True))


def raid_shared(connection: psycopg.Connection[Any], relation: Relation, scope: str) -> Iterator[Attack]:
    """Tables of nobody that the application has no business with."""
    name = sql.Identifier(relation.name)
    forbidden = {"DELETE", "INSERT", "SELECT", "UPDATE", "TRUNCATE"} - SHARED[relation.name]["kilo_app"]
    steal = {
        "SELECT": sql.SQL("select * from {t}").format(t=name),
        "INSERT": sql.SQL("insert into {t} default values").format(t=name),
        "UPDATE": sql.SQL("update {t} set {c} = {c}").format(t=name, c=sql.Identifier(_column(connection, relation))),
        "DELETE": sql.SQL("delete from {t}").format(t=name),
        "TRUNCATE": sql.SQL("truncate {t}").format(t=name),
    }
    for privilege in sorted(forbidden):
        yield attempt(connection, relation.name, privilege.lower(), scope, steal[privilege], {}, Verb("", made=True))


def _column(connection: psycopg.Connection[Any], relation: Relation) -> str:
    with connection.transaction():
        row = connection.execute(
            "select attname::text from pg_attribute where attrelid = %s and attnum = 1", (relation.oid,)
        ).fetchone()
    assert row is not None
    return str(row[0])


def probe_foreign_keys(admin: psycopg.Connection[Any], connection: psycopg.Connection[Any], raider: Raider) -> Iterator[Attack]:
    """A child of B that points at A's row is refused, and with the same words as one that points at nothing."""
    tables = {one.name: one for one in owner_tables(admin)}
    for key in foreign_keys(admin):
        if key["child"] not in tables or key["parent"] not in tables or key["parent"] == "owners":
            continue
        columns = [one for one in key["columns"] if one != "owner_id"]
        targets = [one for one in key["targets"] if one != "owner_id"]
        prey, child = raider.prey(tables[key["parent"]]), raider.prey(tables[key["child"]])
        assert prey is not None and child is not None
        own = refresh(admin, key["parent"], prey)  # a row that A alone has
        with admin.transaction():
            admin.execute("set local session_replication_role = replica")
            _put(admin, key["parent"], own)
        words = {}
        for what, values in {"at A": [own[one] for one in targets], "at nothing": [_other(own[one]) for one in targets]}.items():
            pointing = dict(zip(columns, values, strict=True))
            row = refresh(admin, key["child"], child | {"owner_id": str(raider.b)} | pointing, frozenset(columns))
            name = sql.Identifier(key["child"])
            made = sql.SQL("insert into {t} overriding system value " + _RECORD.replace("{row}", "row")).format(t=name)
            words[what] = attempt(
                connection, key["child"], "insert", what, made, {"row": json.dumps(row)}, Verb("", made=True)
            ).word
            changes = sql.SQL(", ").join(sql.SQL("{} = {}").format(sql.Identifier(one), sql.Literal(row[one])) for one in columns)
            moved = sql.SQL("update {t} set {c} where ctid = (select min(ctid) from {t})").format(t=name, c=changes)
            words[f"update {what}"] = attempt(connection, key["child"], "update", what, moved, {}, Verb("", made=True)).word
        for what in ("at A", "update at A"):
            nothing = words[what.replace("at A", "at nothing")]
            refused = words[what].split(" ", 1)[0] in {"23503", "42501"} and words[what] == nothing
            yield Attack(key["child"], f"{what} by {key['conname']}", "other", not refused, f"{words[what]} | {nothing}")


def probe_unique_keys(admin: psycopg.Connection[Any], connection: psycopg.Connection[Any], raider: Raider) -> Iterator[Attack]:
    """B may take every key that A has: a refusal would tell what A holds."""
    for table in owner_tables(admin):
        prey = raider.prey(table)
        if prey is None or table.name == "owners":
            continue
        own = refresh(admin, table.name, prey)
        with admin.transaction():
            admin.execute("set local session_replication_role = replica")
            _put(admin, table.name, own)
        made = sql.SQL("insert into {t} overriding system value " + _RECORD.replace("{row}", "row")).format(
            t=sql.Identifier(table.name)
        )
        found = attempt(
            connection,
            table.name,
            "insert with A's keys",
            "other",
            made,
            {"row": json.dumps(own | {"owner_id": str(raider.b)})},
            Verb(""),
        )
        found.leaked = found.word.split(" ", 1)[0] in {"23505", "23P01"}
        yield found


def _put(admin: psycopg.Connection[Any], table: str, row: dict[str, Any]) -> None:
    statement = sql.SQL("insert into {t} overriding system value " + _RECORD.replace("{row}", "row"))
    admin.execute(statement.format(t=sql.Identifier(table)), {"row": json.dumps(row)})


def _other(value: Any) -> Any:
    return value + 1 if isinstance(value, int) else str(uuid4()) if _is_uuid(value) else uuid4().hex


def _is_uuid(value: Any) -> bool:
    try:
        UUID(str(value))
    except ValueError:
        return False
    return True


def everything(
    admin: psycopg.Connection[Any], connection: psycopg.Connection[Any], raider: Raider, scope: str, only: str | None = None
) -> Iterator[Attack]:
    """All of it under one scope, on every relation or on one."""
    for relation in relations(admin):
        if only not in (None, relation.name):
            continue
        if relation.kind in "rp" and relation.name in SHARED:
            yield from raid_shared(connection, relation, scope)
        elif relation.kind in "rp":
            yield from raider.raid(connection, relation, scope)
        else:
            yield from raid_shown(connection, raider, relation, scope)
