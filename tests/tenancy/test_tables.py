"""Owner scope in the database (threats, rule 17): every table x verb x scope out of the catalogue, and the checker that names gaps.

The two owners are equal in everything but their own ids: B's rows are a copy of A's.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import text

from tests.conftest import Database
from tests.support.attacks import SCOPES, Raider, everything, probe_foreign_keys, probe_unique_keys, scoped
from tests.support.catalogue import SHARED, complaints, owner_tables
from tests.support.figures import Figures
from tests.support.two import Corner, connect, digest, mirror


@pytest.fixture(scope="module")
def admin(database: Database, postgres_admin: str) -> Iterator[psycopg.Connection[Any]]:
    with connect(database, postgres_admin) as connection:
        yield connection


@pytest.fixture(scope="module")
def raider(database: Database, admin: psycopg.Connection[Any]) -> Raider:
    """A with rows in every table, B as its copy."""
    a = Corner(database, 77, "canary-a")
    a.fill(admin)
    b = database.store.owners.create("organization", "b")
    mirror(admin, a.owner.id, b.id)
    return Raider(admin, a.owner.id, b.id)


@pytest.fixture(scope="module")
def app(database: Database) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database.logins["app"].replace("+psycopg", "")) as connection:
        yield connection


def test_the_schema_has_no_gap(admin: psycopg.Connection[Any]) -> None:
    """A new table without policies, forced row-level security or the owner in its keys fails here, by name."""
    assert complaints(admin) == set()


def test_every_table_holds_rows_of_both(admin: psycopg.Connection[Any], raider: Raider) -> None:
    """Else an attack on it proves nothing: a new table gets its row in tests/support/two.py."""
    for owner in (raider.a, raider.b):
        assert {name for name, (count, _) in digest(admin, owner).items() if not count} == set()
    assert {one.name for one in owner_tables(admin)} >= {"deliveries", "work_items", "sessions", "effects"}


@pytest.mark.parametrize("scope", SCOPES)
def test_no_verb_reaches_another_owners_rows(
    admin: psycopg.Connection[Any], app: psycopg.Connection[Any], raider: Raider, scope: str, figures: Figures
) -> None:
    before = digest(admin, raider.a)
    with scoped(app, scope, raider.a, raider.b):
        made = list(everything(admin, app, raider, scope))
    leaked = [str(one) for one in made if one.leaked]
    figures(tried=len(made), leaked=len(leaked))
    assert leaked == []
    assert digest(admin, raider.a) == before
    assert {one.relation for one in made} >= {one.name for one in owner_tables(admin)} | set(SHARED)


def test_an_owner_reaches_its_own_rows(admin: psycopg.Connection[Any], app: psycopg.Connection[Any], raider: Raider) -> None:
    """The attacks fail for their scope and not for a slip in them: the same statements under A's own scope find rows."""
    with scoped(app, "other", raider.b, raider.a):
        made = [one for table in owner_tables(admin) for one in raider.raid(app, table, "own")]
    reached = {one.verb for one in made if one.leaked}
    assert reached >= {"select", "select all", "select for update", "select by sample", "select by error", "copy"}
    assert reached >= {"update", "update all", "update from", "merge update", "insert", "insert on conflict do update"}
    assert not reached & {"delete", "truncate", "merge delete"}, "these are granted to nobody"
    assert {one.relation for one in made if one.verb == "select" and not one.leaked} == set()


def test_no_child_points_at_another_owners_row(
    admin: psycopg.Connection[Any], app: psycopg.Connection[Any], raider: Raider, figures: Figures
) -> None:
    with scoped(app, "other", raider.a, raider.b):
        made = list(probe_foreign_keys(admin, app, raider))
    leaked = [str(one) for one in made if one.leaked]
    figures(tried=len(made), leaked=len(leaked))
    assert leaked == [] and len(made) >= 20


def test_no_refusal_tells_which_keys_another_owner_holds(
    admin: psycopg.Connection[Any], app: psycopg.Connection[Any], raider: Raider, figures: Figures
) -> None:
    with scoped(app, "other", raider.a, raider.b):
        made = list(probe_unique_keys(admin, app, raider))
    leaked = [str(one) for one in made if one.leaked]
    figures(tried=len(made), leaked=len(leaked))
    assert leaked == [] and len(made) >= 12


def test_a_pool_shared_by_threads_mixes_no_scopes(
    database: Database, admin: psycopg.Connection[Any], full: bool, figures: Figures
) -> None:
    """Transactions of two owners, some of which fail or name nobody, in turn over the same few connections."""
    owners = [Corner(database, 91, f"canary-{number}").owner.id for number in range(2)]
    tables = [one for one in owner_tables(admin) if one.name != "owners"]
    rounds = 2_500 if full else 60
    leaks: list[str] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(rounds):
            table, owner = chance.choice(tables), chance.choice(owners)
            try:
                with database.store.database.owner(owner) as connection:
                    _look(connection, table.name, {owner})
                    if chance.random() < 0.3:
                        connection.execute(text("select 1 / 0"))
            except Exception as failure:  # noqa: BLE001  # any end of a transaction must end its scope
                if "division" not in str(failure):
                    leaks.append(str(failure))
            with database.store.database._app.begin() as connection:
                _look(connection, table.name, set())

    def _look(connection: Any, table: str, wanted: set[UUID]) -> None:
        seen = set(connection.execute(text(f"select distinct owner_id from {table}")).scalars())
        if not seen <= wanted:
            leaks.append(f"{table}: {seen}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    figures(tried=6 * rounds * 2, leaked=len(leaks))
    assert leaks == []


# A change of the schema, and what the checker must say of it.
GAPS: dict[str, tuple[str, tuple[str, str]]] = {
    "a table without an owner": ("create table gap (id uuid primary key)", ("gap", "no owner column")),
    "an owner that may be missing": ("create table gap (owner_id uuid, id uuid)", ("gap", "no owner column")),
    "a table without row-level security": (
        "{made}; alter table gap disable row level security",
        ("gap", "row-level security is off"),
    ),
    "a table that doesn't force it": (
        "{made}; alter table gap no force row level security",
        ("gap", "row-level security is not forced"),
    ),
    "a table without a policy": ("{made}; drop policy owner_scope on gap", ("gap", "no owner policy")),
    "a policy that only reads": (
        "{made}; drop policy owner_scope on gap; create policy owner_scope on gap as restrictive to kilo_app using (owner_id = {scope})",
        ("gap", "no owner policy"),
    ),
    "a policy for one verb": (
        "{made}; drop policy owner_scope on gap; create policy owner_scope on gap as restrictive for select to kilo_app using (owner_id = {scope})",
        ("gap", "no owner policy"),
    ),
    "a permissive owner policy": (
        "{made}; drop policy owner_scope on gap; create policy owner_scope on gap to kilo_app using (owner_id = {scope}) with check (owner_id = {scope})",
        ("gap", "no owner policy"),
    ),
    "another rule in the policy": ("{made}; alter policy owner_scope on gap using (true)", ("gap", "no owner policy")),
    "a policy for everybody": ("{made}; create policy more on gap using (true)", ("gap", "policy for others")),
    "a table without a key": ("{made}; alter table gap drop constraint gap_pkey", ("gap", "no primary key")),
    "a key that starts elsewhere": (
        "{made}; alter table gap drop constraint gap_pkey, add primary key (id, owner_id)",
        ("gap", "unique key doesn't start with the owner"),
    ),
    "a unique index over all owners": (
        "{made}; create unique index on gap (id)",
        ("gap", "unique key doesn't start with the owner"),
    ),
    "an exclusion over all owners": (
        "{made}; alter table gap add exclude using btree (id with =)",
        ("gap", "unique key doesn't start with the owner"),
    ),
    "a plain foreign key": (
        "{made}; create unique index by_id on gap (id); create table child (owner_id uuid not null, id uuid references gap (id), primary key (owner_id, id))",
        ("child", "plain foreign key"),
    ),
    "a foreign key that swaps the owner": (
        "{made}; create table child (owner_id uuid not null, id uuid, other uuid, primary key (owner_id, id), foreign key (other, id) references gap (owner_id, id))",
        ("child", "plain foreign key"),
    ),
    "a foreign key that deletes": (
        "{made}; alter table gap add foreign key (owner_id) references owners (id) on delete cascade",
        ("gap", "foreign key changes rows by itself"),
    ),
    "a foreign key to a shared table": (
        "{made}; alter table gap add scope text references switches (scope)",
        ("gap", "foreign key to switches, which is nobody's"),
    ),
    "a shared table that points at owners' rows": (
        "alter table switches add o uuid, add i uuid, add foreign key (o, i) references work_items (owner_id, id)",
        ("switches", "foreign key from a shared table"),
    ),
    "a partition without a policy": ("{parts}", ("gap_1", "no owner policy")),
    "a partition that may be asked itself": ("{parts}; grant select on gap_1 to kilo_app", ("gap_1", "kilo_app may select")),
    "a heir that may be asked itself": (
        "{made}; create table heir () inherits (gap); grant select on heir to kilo_app",
        ("heir", "kilo_app may select"),
    ),
    "truncate left granted": ("{made}; grant truncate on gap to kilo_app", ("gap", "kilo_app may truncate")),
    "delete granted to everybody": ("{made}; grant delete on gap to public", ("gap", "kilo_app may delete")),
    "history that may be changed": ("grant update (actor) on audit_events to kilo_app", ("audit_events", "kilo_app may update")),
    "keys that the application reads": ("grant select on api_keys to kilo_app", ("api_keys", "kilo_app may select")),
    "a view with its owner's rights": (
        "create view seen as select * from reviews",
        ("seen", "view runs with its owner's rights"),
    ),
    "a materialized view": (
        "create materialized view kept as select * from reviews",
        ("kept", "materialized view keeps rows without policies"),
    ),
    "a foreign table": (
        "create foreign data wrapper w; create server s foreign data wrapper w; create foreign table afar (owner_id uuid) server s",
        ("afar", "foreign table has no policies"),
    ),
    "a sequence that may be read": (
        "grant select on effects_seq_seq to kilo_app",
        ("effects_seq_seq", "kilo_app may use the sequence"),
    ),
    "a function with its owner's rights": (
        "create function peek() returns bigint language sql security definer as 'select count(*) from reviews'",
        ("peek", "function runs with its owner's rights"),
    ),
    "a table of the application's own": (
        "{made}; alter table gap owner to kilo_app",
        ("gap", "owned by another login than the migrator"),
    ),
    "a login that may make tables": ("grant create on schema public to kilo_app", ("kilo_app", "login may make relations")),
    "grants that come by themselves": (
        "alter default privileges in schema public grant select on tables to kilo_app",
        ("public", "new relations are granted by default"),
    ),
}
_SCOPE = "nullif(current_setting('kilo.owner_id', true), '')::uuid"
_POLICIES = (
    f"alter table {{0}} enable row level security; alter table {{0}} force row level security; alter table {{0}} owner to kilo_migrator;"
    f" create policy owner_scope on {{0}} as restrictive to kilo_app using (owner_id = {_SCOPE}) with check (owner_id = {_SCOPE});"
    " create policy app_access on {0} to kilo_app using (true) with check (true)"
)
# A table as a migration should make it.
_MADE = f"create table gap (owner_id uuid not null, id uuid not null, primary key (owner_id, id)); {_POLICIES.format('gap')}"
_PARTS = (
    "create table gap (owner_id uuid not null, id int not null, primary key (owner_id, id)) partition by list (owner_id);"
    f" {_POLICIES.format('gap')}; create table gap_1 partition of gap default; alter table gap_1 owner to kilo_migrator"
)


@pytest.mark.parametrize("name", GAPS)
def test_the_checker_names_the_gap(admin: psycopg.Connection[Any], name: str) -> None:
    change, wanted = GAPS[name]
    with admin.transaction(force_rollback=True):
        admin.execute(change.format(made=_MADE, parts=_PARTS, scope=_SCOPE).encode())
        assert wanted in complaints(admin)


def test_the_checker_says_nothing_of_a_table_that_is_right(admin: psycopg.Connection[Any]) -> None:
    with admin.transaction(force_rollback=True):
        admin.execute(_MADE.encode())
        assert complaints(admin) == set()
        admin.execute(
            "create view seen with (security_invoker = true) as select * from reviews; alter view seen owner to kilo_migrator"
        )
        assert complaints(admin) == set()
