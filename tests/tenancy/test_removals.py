"""Each protection by itself: taken away, a named case of this folder fails (goals, section 4).

What PostgreSQL protects is removed and attacked in one transaction of the superuser in the application's role, then undone.
What the code protects is taken out of the statement or the function that holds it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import event, text

from kilo_pipelines.ingress import work
from kilo_pipelines.ingress.control import NotFoundError
from kilo_pipelines.store import Principal, ReviewRow, Store
from kilo_pipelines.store.system_statements import STATEMENTS
from tests.conftest import Database, made_database
from tests.support.attacks import Raider, everything, probe_foreign_keys, probe_unique_keys, scoped
from tests.support.catalogue import complaints
from tests.support.figures import Figures
from tests.support.two import Corner, connect, digest, mirror
from tests.tenancy import test_routes

stage = test_routes.stage


@dataclass
class Template:
    """A filled database that clones are made of; A and B are copies of each other in it."""

    url: str
    app: str
    name: str
    a: UUID
    b: UUID

    @contextmanager
    def clone(self) -> Iterator[tuple[psycopg.Connection[Any], psycopg.Connection[Any]]]:
        """A superuser's and the application's connection to a database of their own."""
        name = f"clone_{secrets.token_hex(4)}"
        with psycopg.connect(self.url, autocommit=True) as server:
            server.execute(f'create database "{name}" template "{self.name}"'.encode())
            server.execute(
                f'revoke all on database "{name}" from public; grant connect on database "{name}" to kilo_app'.encode()
            )
            try:
                with (
                    psycopg.connect(self.url, dbname=name, autocommit=True) as admin,
                    psycopg.connect(self.app, dbname=name) as app,
                ):
                    yield admin, app
            finally:
                server.execute(f'drop database "{name}" with (force)'.encode())


@pytest.fixture(scope="module")
def template(postgres_admin: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Template]:
    with made_database(postgres_admin, tmp_path_factory) as database:
        with connect(database, postgres_admin) as admin:
            a = Corner(database, 78, "canary-a")
            a.fill(admin)
            a.running()
            b = database.store.owners.create("organization", "b")
            mirror(admin, a.owner.id, b.id)
        database.store.database.dispose()  # a database that somebody uses can't be a template
        app = database.logins["app"].replace("+psycopg", "")
        name = app.rsplit("/", 1)[1].split("?")[0]
        yield Template(postgres_admin.replace("+psycopg", ""), app, name, a.owner.id, b.id)


_SCOPE = "nullif(current_setting('kilo.owner_id', true), '')::uuid"
# What is removed -> (the change, the attack that then succeeds, what the checker says).
REMOVED: dict[str, tuple[str, str, tuple[str, str]]] = {
    "the owner policy": ("drop policy owner_scope on reviews", "select on reviews", ("reviews", "no owner policy")),
    "row-level security": (
        "alter table effects disable row level security",
        "update on effects",
        ("effects", "row-level security is off"),
    ),
    "what the policy shows": (
        "alter policy owner_scope on sessions using (true)",
        "select on sessions",
        ("sessions", "no owner policy"),
    ),
    "what the policy takes": (
        "alter policy owner_scope on service_configs with check (true)",
        "insert on service_configs",
        ("service_configs", "no owner policy"),
    ),
    "the policy's restriction": (
        f"drop policy owner_scope on deliveries; create policy owner_scope on deliveries to kilo_app using (owner_id = {_SCOPE})",
        "select on deliveries",
        ("deliveries", "no owner policy"),
    ),
    "a login without bypass": (
        "alter role kilo_app bypassrls",
        "select on work_items",
        ("kilo_app", "login is stronger than its work"),
    ),
    "the missing right to truncate": (
        "grant truncate on owner_slots to kilo_app",
        "truncate on owner_slots",
        ("owner_slots", "kilo_app may truncate"),
    ),
    "the missing right to the keys": (
        "grant select on api_keys to kilo_app",
        "select on api_keys",
        ("api_keys", "kilo_app may select"),
    ),
    "the caller's rights in a view": (
        "create view seen as select * from reviews; grant select on seen to kilo_app",
        "select on seen",
        ("seen", "view runs with its owner's rights"),
    ),
    "the sequences' privacy": (
        "grant select on sequence audit_events_id_seq to kilo_app",
        "last_value on audit_events_id_seq",
        ("audit_events_id_seq", "kilo_app may use the sequence"),
    ),
    "the owner in a foreign key": (
        "create table parent (owner_id uuid not null, id uuid not null unique, primary key (owner_id, id));"
        "create table child (owner_id uuid not null, id uuid not null, up uuid not null references parent (id), primary key (owner_id, id));"
        + "".join(
            f"alter table {one} enable row level security; alter table {one} force row level security; alter table {one} owner to kilo_migrator;"
            f"create policy owner_scope on {one} as restrictive to kilo_app using (owner_id = {_SCOPE}) with check (owner_id = {_SCOPE});"
            f"create policy app_access on {one} to kilo_app using (true) with check (true); grant select, insert, update on {one} to kilo_app;"
            for one in ("parent", "child")
        )
        + "insert into parent select id, id from owners;"
        "insert into child select id, id, id from owners",
        "at A by child_up_fkey on child",
        ("child", "plain foreign key"),
    ),
    "the owner in a unique key": (
        "create unique index gap on reviews (title) where title not like 'canary%'",
        "insert with A's keys on reviews",
        ("reviews", "unique key doesn't start with the owner"),
    ),
}


@pytest.mark.parametrize("name", REMOVED)
def test_without_it_in_the_database_an_attack_succeeds_and_the_checker_names_it(
    template: Template, name: str, figures: Figures
) -> None:
    change, attack, complaint = REMOVED[name]
    with template.clone() as (admin, app):
        raider = Raider(admin, template.a, template.b)
        only = attack.rsplit(" on ", 1)[1]
        try:
            admin.execute(change.encode())
            with scoped(app, "other", template.a, template.b):
                made = [*everything(admin, app, raider, "other", only)]
                made += [*probe_unique_keys(admin, app, raider), *probe_foreign_keys(admin, app, raider)]
            found = complaints(admin)
        finally:
            admin.execute("alter role kilo_app nobypassrls")
    figures(tried=1)
    assert attack in {f"{one.verb} on {one.relation}" for one in made if one.leaked}
    assert complaint in found


# Of statements that change something: the operator's lists may name an owner and need not, and an owner's keys are read by none other.
OWNED = sorted(
    name for name, one in STATEMENTS.items() if "owner_id = :owner" in one.sql and not one.sql.lstrip().startswith("select")
)


def touched(template: Template, name: str, sql: str) -> bool:
    """Whether a system statement for B's copy of A's rows changes A's."""
    with template.clone() as (admin, _):
        row = admin.execute("select id, fence from sessions where owner_id = %s and state = 'running'", (template.b,)).fetchone()
        if row is None or name in ("START_SESSION", "DEFER_SESSION"):
            row = admin.execute(
                "select id, fence from sessions where owner_id = %s and state = 'queued'", (template.b,)
            ).fetchone()
        assert row is not None
        far = datetime.now(UTC) + timedelta(days=900)
        values: dict[str, Any] = dict.fromkeys(("now", "until", "after"), far) | dict.fromkeys(
            ("run", "reason", "lost", "detail"), "x"
        )
        values |= {
            "owner": template.b,
            "id": row[0],
            "fence": row[1],
            "most": 9,
            "state": "failed",
            "result": None,
            "evidence": None,
        }
        before = [digest(admin, one) for one in (template.a, template.b)]
        admin.execute(re.sub(r"(?<!:):([a-z]+)", r"%(\1)s", sql).encode(), values)
        after = [digest(admin, one) for one in (template.a, template.b)]
        assert before[1] != after[1], "the statement did its work"
        return before[0] != after[0]


@pytest.mark.parametrize("name", OWNED)
def test_without_its_owner_a_system_statement_reaches_both(template: Template, name: str, figures: Figures) -> None:
    """No policy holds the system login: the filter in the statement does."""
    sql = STATEMENTS[name].sql
    assert not touched(template, name, sql)
    assert touched(template, name, sql.replace("owner_id = :owner and ", ""))
    figures(tried=1)


def test_without_the_owner_of_a_review_its_route_tells(stage: test_routes.Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    route = ("admin", "GET", "/api/v1/reviews/{item}")
    assert test_routes.foreign_sees(stage, test_routes.ROUTES[route], route, "owner b") == []

    def any_review(store: Store, _who: Principal, item: UUID) -> ReviewRow:
        found = store.reviews.get(item)
        if found is None:
            raise NotFoundError
        return found

    monkeypatch.setattr(work, "review_of", any_review)
    assert test_routes.foreign_sees(stage, test_routes.ROUTES[route], route, "owner b") != []


def test_without_the_tokens_comparison_a_forged_callback_is_taken(
    stage: test_routes.Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "compare_digest", lambda _one, _other: True)
    assert test_routes.forged_callbacks(stage) != []


def test_without_the_transactions_end_a_scope_survives(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """`set_config(…, true)` ends with the transaction; a scope of the connection is seen by its next user."""
    owner = Corner(database, 79, "canary-c").owner.id

    def left() -> int:
        with database.store.database.owner(owner):
            pass
        with database.store.database._app.begin() as connection:
            return int(connection.execute(text("select count(*) from owners")).scalar_one())

    assert left() == 0

    def loose(_c: object, _cursor: object, statement: str, values: object, _context: object, _many: bool) -> tuple[str, object]:
        return statement.replace(", true)", ", false)"), values

    event.listen(database.store.database._app, "before_cursor_execute", loose, retval=True)
    try:
        assert left() == 1
    finally:
        event.remove(database.store.database._app, "before_cursor_execute", loose)
        database.store.database.dispose()
