"""Every route of both applications x principal, with another owner's ids (threats, rules 20 and 24).

The routes come from the applications themselves: one without an entry in `ROUTES` fails. What is another owner's and what
nobody has are answered alike, byte for byte.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import anyio
import httpx
import psycopg
import pytest
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.routing import Route

from kilo_pipelines.ingress import application
from kilo_pipelines.ingress.application import Ingress, admin_application, public_application
from kilo_pipelines.ingress.control import ACT, ControlRoute
from kilo_pipelines.services.permissions import ALLOWED, Act
from tests.conftest import Database
from tests.support.figures import Figures
from tests.support.ingress import OneSecret, pull_request
from tests.support.keys import api_key
from tests.support.two import Corner, connect, digest, expired

SECRET = "canary-secret-of-the-webhook"
REPOSITORY = 990_077
# A pull request that A has and B doesn't, and one that nobody has.
ONLY_A, NOBODYS = 4, 4_000


@dataclass
class Stage:
    """Both applications in this process over a real database with two owners of one repository."""

    database: Database
    admin: psycopg.Connection[Any]
    a: Corner
    b: Corner
    applications: dict[str, Starlette]
    keys: dict[str, dict[str, str]]

    def ask(self, listener: str, method: str, path: str, who: str, **more: Any) -> httpx.Response:
        headers = self.keys[who] | more.pop("headers", {})

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.applications[listener], raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.request(method, path, headers=headers, **more)

        return anyio.run(send)


@pytest.fixture(scope="module")
def stage(database: Database, postgres_admin: str) -> Iterator[Stage]:
    with connect(database, postgres_admin) as admin:
        a, b = Corner(database, REPOSITORY, "canary-a"), Corner(database, REPOSITORY, "canary-b")
        a.fill(admin)
        b.done, (b.live, b.session), b.waiting = b.finished(1, "success"), b.launched(b.item(2)), b.item(3)
        b.findings()
        ingress = Ingress(database.store, OneSecret(SECRET), frozenset({"localhost"}))
        keys = {
            "operator": api_key(database.store, "operator"),
            "owner a": api_key(database.store, "owner", a.owner.id),
            "viewer a": api_key(database.store, "viewer", a.owner.id),
            "member a": api_key(database.store, "member", a.owner.id),
            "member b": api_key(database.store, "member", b.owner.id),
            "owner b": api_key(database.store, "owner", b.owner.id),
            "viewer b": api_key(database.store, "viewer", b.owner.id),
            "expired key": expired(database, a.owner.id),
            "removed member": api_key(database.store, "owner", a.owner.id),
            "wrong key": "kilo_" + "x" * 43,
        }
        ends = database.clock.now() + timedelta(days=9)
        database.store.api_keys.create("viewer", a.owner.id, expires_at=ends, name="spare", actor="test")
        hashed = hashlib.sha256(keys["removed member"].encode()).digest()
        admin.execute("delete from api_keys where key_hash = %s", (hashed,))
        headers = {who: {"Authorization": f"Bearer {key}"} for who, key in keys.items()}
        headers |= {
            "nobody": {},
            "no scheme": {"Authorization": keys["owner a"]},
            "basic": {"Authorization": f"Basic {keys['owner a']}"},
        }
        headers |= {"empty key": {"Authorization": "Bearer "}, "hash as key": {"Authorization": f"Bearer {hashed.hex()}"}}
        applications = {"public": public_application(ingress), "admin": admin_application(ingress)}
        yield Stage(database, admin, a, b, applications, headers)


STRANGERS = ("nobody", "no scheme", "basic", "empty key", "hash as key", "wrong key", "expired key", "removed member")
FOREIGNERS = ("owner b", "member b", "viewer b")
EVERYBODY = (*STRANGERS, *FOREIGNERS, "owner a", "member a", "viewer a", "operator")
Ask = Callable[[Stage, str], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """Which act the route is, or who is served without one; and how it is asked for A's thing, for nobody's and for what is no id.

    `finer`: the act alone doesn't open A's thing to every role that has it.
    """

    act: Act | None = None
    everybody: bool = False
    refused: int = 401
    asks: dict[str, Ask] = field(default_factory=lambda: {"all": lambda _stage, path: {"path": path}})
    missing: int = 404
    finer: bool = False

    @property
    def served(self) -> tuple[str, ...]:
        """Everybody with a live key of a role that has the act: what the table of permissions says."""
        if self.everybody:
            return EVERYBODY
        roles = ALLOWED[self.act] if self.act else frozenset()
        return tuple(who for who in EVERYBODY if who not in STRANGERS and who.split()[0] in roles)


def _item(found: Callable[[Stage], object]) -> Ask:
    return lambda stage, path: {"path": path.replace("{item}", str(found(stage)))}


_ITEMS = {
    "of A": _item(lambda stage: stage.a.waiting),
    "of nobody": _item(lambda _stage: UUID(int=7)),
    "no id": _item(lambda _stage: "x"),
}

_FINDINGS: dict[str, Ask] = {
    "of A": lambda stage, path: {"path": path.replace("{finding}", str(finding_of(stage.a)))},
    "of nobody": lambda _stage, path: {"path": path.replace("{finding}", str(UUID(int=7)))},
    "no id": lambda _stage, path: {"path": path.replace("{finding}", "x")},
}


def _finding_with(body: dict[str, Any]) -> dict[str, Ask]:
    """The same, with a body."""

    def told(ask: Ask) -> Ask:
        return lambda stage, path: {**ask(stage, path), "json": body}

    return {name: told(ask) for name, ask in _FINDINGS.items()}


def finding_of(corner: Corner) -> UUID:
    """One of an owner's findings."""
    return UUID(str(corner.store.findings.listed(corner.owner.id)[0]["id"]))


def _asking(body: dict[str, Any]) -> dict[str, Ask]:
    return {"all": lambda _stage, path: {"path": path, "json": body}}


def _pull(number: int) -> Ask:
    return lambda _stage, path: {"path": path, "json": {"repository": "octo/demo", "pull_number": number}}


def _of(name: str, found: Callable[[Stage], object], body: dict[str, Any] | None = None) -> dict[str, Ask]:
    """Asks for A's thing, nobody's and no id."""

    def ask(value: Callable[[Stage], object]) -> Ask:
        return lambda stage, path: {
            "path": path.replace(f"{{{name}}}", str(value(stage))),
            **({"json": body} if body is not None else {}),
        }

    return {"of A": ask(found), "of nobody": ask(lambda _stage: UUID(int=7)), "no id": ask(lambda _stage: "x")}


def _key(stage: Stage) -> UUID:
    return next(one.id for one in stage.database.store.api_keys.of_owner(stage.a.owner.id) if one.name == "spare")


def _effect(stage: Stage) -> UUID:
    return UUID(str(stage.database.store.outbox.listed(owner_id=stage.a.owner.id)[0]["id"]))


def _named(name: str, value: str, body: dict[str, Any] | None = None) -> dict[str, Ask]:
    return {
        "all": lambda _stage, path: {
            "path": path.replace(f"{{{name}}}", value),
            **({"json": body} if body is not None else {}),
        }
    }


# Of a revision that nobody has: whoever may save is told so, and nothing changes.
_STALE: dict[str, Any] = {"expected_revision": 4_000, "settings": {}}
ROUTES: dict[tuple[str, str, str], Entry] = {
    # The public listener knows no API key: its own tests below ask with signatures and callback tokens.
    ("public", "GET", "/health"): Entry(everybody=True),
    ("public", "POST", "/webhooks/github"): Entry(),
    ("public", "POST", "/callbacks/sessions/{session}"): Entry(
        asks={"of A": lambda stage, path: {"path": path.replace("{session}", str(stage.a.session)), "json": {}}}
    ),
    ("admin", "GET", "/health"): Entry(everybody=True),
    ("admin", "GET", "/api/docs"): Entry(everybody=True),
    ("admin", "GET", "/api/docs/{name}"): Entry(everybody=True, asks=_named("name", "page.js")),
    ("admin", "GET", "/api/v1/openapi.json"): Entry("read"),
    ("admin", "GET", "/api/v1/health"): Entry("platform"),
    ("admin", "GET", "/api/v1/me"): Entry("read"),
    ("admin", "GET", "/api/v1/owners"): Entry("read"),
    ("admin", "POST", "/api/v1/owners"): Entry("platform", asks=_asking({"kind": "user", "name": "x"})),
    ("admin", "GET", "/api/v1/owners/{owner_id}"): Entry("read", asks=_of("owner_id", lambda stage: stage.a.owner.id)),
    ("admin", "GET", "/api/v1/people"): Entry("platform"),
    ("admin", "GET", "/api/v1/members"): Entry("read"),
    ("admin", "POST", "/api/v1/members"): Entry("members", asks=_asking({"login": "", "role": "viewer"})),
    ("admin", "PUT", "/api/v1/members/{person}"): Entry(
        "members", asks=_of("person", lambda stage: stage.a.person, {"role": "owner"}), finer=True
    ),
    ("admin", "DELETE", "/api/v1/members/{person}"): Entry(
        "members", asks=_of("person", lambda stage: stage.a.person), finer=True
    ),
    ("admin", "GET", "/api/v1/keys"): Entry("own_keys"),
    ("admin", "POST", "/api/v1/keys"): Entry("keys", asks=_asking({"role": "viewer", "name": "x", "days": 0})),
    ("admin", "POST", "/api/v1/keys/{key}/rotate"): Entry("own_keys", asks=_of("key", _key, {}), finer=True),
    ("admin", "POST", "/api/v1/keys/{key}/revoke"): Entry("own_keys", asks=_of("key", _key, {}), finer=True),
    ("admin", "GET", "/api/v1/integrations"): Entry("read"),
    ("admin", "GET", "/api/v1/repositories"): Entry("read"),
    ("admin", "GET", "/api/v1/services"): Entry("read"),
    ("admin", "GET", "/api/v1/services/{service}/settings"): Entry("read", asks=_named("service", "code_review")),
    ("admin", "PUT", "/api/v1/services/{service}/settings"): Entry("settings", asks=_named("service", "code_review", _STALE)),
    ("admin", "POST", "/api/v1/services/{service}/enable"): Entry("settings", asks=_named("service", "code_review", {})),
    ("admin", "POST", "/api/v1/services/{service}/disable"): Entry("settings", asks=_named("service", "nothing", {})),
    ("admin", "GET", "/api/v1/audit"): Entry("audit"),
    ("admin", "GET", "/api/v1/items"): Entry("read"),
    ("admin", "GET", "/api/v1/items/{item}"): Entry("read", asks=_ITEMS),
    ("admin", "POST", "/api/v1/items/{item}/cancel"): Entry("work", asks=_ITEMS),
    ("admin", "POST", "/api/v1/items/{item}/retry"): Entry("work", asks=_of("item", lambda stage: stage.a.waiting, {})),
    ("admin", "GET", "/api/v1/effects"): Entry("read"),
    ("admin", "GET", "/api/v1/effects/{effect}"): Entry("read", asks=_of("effect", _effect)),
    ("admin", "POST", "/api/v1/effects/{effect}/approve"): Entry("effects", asks=_of("effect", _effect, {"sha256": "0" * 64})),
    ("admin", "POST", "/api/v1/effects/{effect}/retry"): Entry("effects", asks=_of("effect", _effect, {})),
    ("admin", "POST", "/api/v1/effects/{effect}/drop"): Entry("effects", asks=_of("effect", _effect, {})),
    ("admin", "GET", "/api/v1/deliveries"): Entry("read"),
    ("admin", "GET", "/api/v1/switches"): Entry("read"),
    # Without a reason: whoever may is told so, and nothing is switched.
    ("admin", "POST", "/api/v1/switches/pause"): Entry("switch", asks=_asking({})),
    ("admin", "POST", "/api/v1/switches/kill"): Entry("switch", asks=_asking({})),
    ("admin", "POST", "/api/v1/switches/resume"): Entry("switch", asks=_asking({})),
    ("admin", "POST", "/api/v1/suggest-only"): Entry("switch", asks=_asking({"on": True})),
    ("admin", "GET", "/api/v1/spend"): Entry("read"),
    ("admin", "GET", "/api/v1/models"): Entry("read"),
    ("admin", "PUT", "/api/v1/models/{model:path}"): Entry("platform", asks=_named("model:path", "x/y", {"allowed": True})),
    ("admin", "GET", "/api/v1/reviews"): Entry("read"),
    ("admin", "GET", "/api/v1/reviews/{item}"): Entry("read", asks=_ITEMS),
    # Of a head that no review has: whoever may is told so, and nothing is approved.
    ("admin", "POST", "/api/v1/reviews/{item}/approve"): Entry(
        "work", asks=_of("item", lambda stage: stage.a.waiting, {"head": "0" * 40})
    ),
    ("admin", "POST", "/api/v1/reviews/{item}/cancel"): Entry("work", asks=_ITEMS),
    ("admin", "POST", "/api/v1/reviews/dispatch"): Entry(
        "work", asks={"of A": _pull(ONLY_A), "of nobody": _pull(NOBODYS), "no id": _pull(-1)}
    ),
    ("admin", "GET", "/api/v1/security/findings"): Entry("read"),
    ("admin", "GET", "/api/v1/security/findings/{finding}"): Entry("read", asks=_FINDINGS),
    ("admin", "GET", "/api/v1/security/findings/{finding}/deadline"): Entry("read", asks=_FINDINGS),
    ("admin", "GET", "/api/v1/security/summary"): Entry("read"),
    ("admin", "GET", "/api/v1/security/report"): Entry("read"),
    ("admin", "GET", "/api/v1/security/settings"): Entry("read"),
    ("admin", "POST", "/api/v1/security/findings/{finding}/analyze"): Entry("analyse", asks=_finding_with({})),
    ("admin", "POST", "/api/v1/security/findings/{finding}/dismiss"): Entry(
        "dismiss", asks=_finding_with({"reason": "inaccurate"})
    ),
    ("admin", "POST", "/api/v1/security/findings/{finding}/remediate"): Entry("remediate", asks=_finding_with({})),
    ("admin", "POST", "/api/v1/security/dismiss"): Entry("dismiss", asks=_asking({"apply": True})),
    ("admin", "POST", "/api/v1/security/remediate"): Entry("remediate", asks=_asking({})),
    ("admin", "GET", "/api/v1/security/remediations"): Entry("read"),
    ("admin", "POST", "/api/v1/security/remediations/{item}/cancel"): Entry(
        "remediate",
        asks={
            "of A": _item(lambda stage: stage.a.opened["remediation"]),
            "of nobody": _item(lambda _stage: UUID(int=7)),
            "no id": _item(lambda _stage: "x"),
            "another service's": _item(lambda stage: stage.a.waiting),
        },
    ),
    ("admin", "GET", "/api/v1/security/repositories"): Entry("read"),
    ("admin", "GET", "/api/v1/security/notices"): Entry("read"),
    ("admin", "GET", "/api/v1/security/notices/webhook-secret"): Entry("settings"),
    ("admin", "GET", "/api/v1/security/quarantine"): Entry("read"),
    ("admin", "POST", "/api/v1/security/sync"): Entry(
        "sync", asks={"both hold it": lambda _stage, path: {"path": path, "json": {"repository": REPOSITORY}}}
    ),
    ("admin", "PUT", "/api/v1/security/settings"): Entry("settings", asks=_asking(_STALE)),
}


def routes(stage: Stage) -> set[tuple[str, str, str]]:
    """What the applications serve; HEAD comes with GET. A mount or a socket would need an entry of a kind of its own."""
    found = set()
    for listener, app in stage.applications.items():
        for route in app.routes:
            assert isinstance(route, Route), f"{listener}: {route} is no plain route, and nothing here knows how to ask it"
            found |= {(listener, method, route.path) for method in (route.methods or set()) - {"HEAD"}}
    return found


def test_every_route_is_in_the_table(stage: Stage) -> None:
    assert routes(stage) == set(ROUTES)
    acts = {
        ("admin", method, route.path): route.openapi_extra[ACT]
        for route in stage.applications["admin"].routes
        if isinstance(route, ControlRoute) and route.openapi_extra
        for method in route.methods or ()
    }
    assert acts == {route: entry.act for route, entry in ROUTES.items() if entry.act}


def test_a_route_that_names_no_act_can_not_be_made() -> None:
    with pytest.raises(ValueError, match="no act"):
        ControlRoute("/api/v1/new", lambda: None)
    with pytest.raises(ValueError, match="no act"):
        ControlRoute("/api/v1/new", lambda: None, openapi_extra={ACT: "everything"})


def foreign_sees(stage: Stage, entry: Entry, route: tuple[str, str, str], who: str) -> list[str]:
    """What is wrong with the answers to somebody who is not A: no word of A, and none that differs for A's things."""
    listener, method, path = route
    answers = {name: stage.ask(listener, method, who=who, **ask(stage, path)) for name, ask in entry.asks.items()}
    wrong = [f"{name}: {answer.status_code}" for name, answer in answers.items() if answer.status_code >= 500]
    for name, answer in answers.items():
        told = [mark for mark in stage.a.marks() if mark in answer.text or mark in str(answer.headers)]
        if told and who != "operator":
            wrong.append(f"{name}: tells {told}")
        refused = answer.status_code == entry.refused
        if refused == (who in entry.served):
            wrong.append(f"{name}: {answer.status_code}")
    if len({(answer.status_code, answer.content, tuple(sorted(answer.headers.items()))) for answer in answers.values()}) > 1:
        wrong.append(f"answers differ: { {name: (answer.status_code, answer.text) for name, answer in answers.items()} }")
    if who in FOREIGNERS and who in entry.served and "of A" in answers and answers["of A"].status_code != entry.missing:
        wrong.append(f"of A: {answers['of A'].status_code}")
    return wrong


@pytest.mark.parametrize("route", ROUTES, ids=" ".join)
@pytest.mark.parametrize("who", [*STRANGERS, *FOREIGNERS])
def test_nobody_learns_or_changes_what_is_anothers(stage: Stage, route: tuple[str, str, str], who: str, figures: Figures) -> None:
    before = digest(stage.admin, stage.a.owner.id)
    wrong = foreign_sees(stage, ROUTES[route], route, who)
    figures(tried=len(ROUTES[route].asks), leaked=len(wrong))
    assert wrong == []
    assert digest(stage.admin, stage.a.owner.id) == before


@pytest.mark.parametrize("route", [one for one in ROUTES if one[0] == "admin"], ids=" ".join)
def test_those_whose_it_is_are_served(stage: Stage, route: tuple[str, str, str]) -> None:
    """Else the refusals above prove nothing. A viewer changes nothing, and learns that before anything is looked up."""
    listener, method, path = route
    entry = ROUTES[route]
    name, ask = next(iter(entry.asks.items()))
    for who in ("viewer a", "member a", "operator", "owner a"):
        answer = stage.ask(listener, method, who=who, **ask(stage, path))
        assert (answer.status_code != entry.refused) == (who in entry.served), (who, answer.status_code)
        assert answer.status_code < 500
        if who in entry.served and name == "of A" and not (entry.finer and who != "owner a"):
            assert answer.status_code != entry.missing
        if who not in entry.served:
            assert len({stage.ask(listener, method, who=who, **one(stage, path)).content for one in entry.asks.values()}) == 1


def test_other_methods_are_refused_alike_for_everybody(stage: Stage) -> None:
    for listener, _method, path in ROUTES:
        served = {method for one, method, other in ROUTES if (one, other) == (listener, path)}
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - served:
            ask = next(iter(ROUTES[(listener, next(iter(served)), path)].asks.values()))
            answers = {
                stage.ask(listener, method, who=who, path=ask(stage, path)["path"]).status_code for who in ("nobody", "owner b")
            }
            assert answers == {405} or answers <= {401, 404}, (method, path, answers)


def test_lists_hold_the_askers_own_and_nothing_else(stage: Stage) -> None:
    for path, name in (("/api/v1/reviews", "reviews"), ("/api/v1/integrations", "integrations"), ("/api/v1/owners", "owners")):
        for corner, who in ((stage.a, "viewer a"), (stage.b, "viewer b")):
            rows = stage.ask("admin", "GET", path, who).json()[name]
            assert {row.get("owner_id", row.get("id")) for row in rows} == {str(corner.owner.id)}


def test_the_owner_comes_from_the_key_and_never_from_the_request(stage: Stage) -> None:
    """Ids of A in the query, in headers or in the body of a request with B's key change nothing (threats, rule 20)."""
    a = str(stage.a.owner.id)
    for path in ("/api/v1/reviews", "/api/v1/owners", "/api/v1/integrations", f"/api/v1/reviews/{stage.a.waiting}"):
        plain = stage.ask("admin", "GET", path, "owner b")
        named = stage.ask("admin", "GET", path, "owner b", params={"owner": a, "owner_id": a})
        assert named.content == plain.content or (named.status_code, named.json()["reason"]) == (400, "query_invalid")
        assert stage.ask("admin", "GET", path, "owner b", headers={"X-Owner": a, "X-Kilo-Owner": a}).content == plain.content
    body = {"repository": "octo/demo", "pull_number": ONLY_A, "owner": a}
    assert stage.ask("admin", "POST", "/api/v1/reviews/dispatch", "owner b", json=body).status_code == 400


def test_lists_reports_and_figures_of_findings_are_the_askers_own(stage: Stage) -> None:
    """Both hold the same alerts of the same repository: nothing but the owner's id tells them apart (contract 17.23)."""
    for corner, other, who in ((stage.a, stage.b, "viewer a"), (stage.b, stage.a, "viewer b")):
        own = {str(one["id"]) for one in corner.store.findings.listed(corner.owner.id, limit=100)}
        listed = stage.ask("admin", "GET", "/api/v1/security/findings", who, params={"limit": 100}).json()
        assert {one["id"] for one in listed["findings"]} == own and listed["total"] == len(own) == 3
        for path in ("report", "report?format=csv", "report?format=vex", "summary", "settings", f"findings/{min(own)}"):
            answer = stage.ask("admin", "GET", f"/api/v1/security/{path}", who)
            assert answer.status_code == 200 and other.canary not in answer.text, path
            assert corner.canary in answer.text or path in ("summary", "settings"), path


def test_an_owners_key_names_no_owner(stage: Stage) -> None:
    """Not even its own: the owner is the key's."""
    for path in ("findings", "summary", "report", "settings"):
        for named in (stage.a, stage.b):
            answer = stage.ask("admin", "GET", f"/api/v1/security/{path}", "owner b", params={"owner": str(named.owner.id)})
            assert (answer.status_code, answer.json()["reason"]) == (400, "query_invalid")


def test_a_dispatch_by_name_finds_the_askers_own_review_of_the_same_pull_request(stage: Stage) -> None:
    """Both owners hold octo/demo#1: B's key repeats B's review."""
    before = digest(stage.admin, stage.a.owner.id)
    body = {"repository": "octo/demo", "pull_number": 1, "force": True}
    answer = stage.ask("admin", "POST", "/api/v1/reviews/dispatch", "owner b", json=body)
    assert (answer.status_code, answer.json()["review"]) == (202, str(stage.b.done))
    assert digest(stage.admin, stage.a.owner.id) == before


def test_a_dispatch_by_the_operator_of_a_name_that_two_owners_hold_is_refused(stage: Stage) -> None:
    """Whose review it should be is not known (invariant 9)."""
    before = {one.canary: digest(stage.admin, one.owner.id) for one in (stage.a, stage.b)}
    body = {"repository": "octo/demo", "pull_number": 2, "force": True}
    answer = stage.ask("admin", "POST", "/api/v1/reviews/dispatch", "operator", json=body)
    assert (answer.status_code, answer.json()["reason"]) == (409, "integration_ambiguous")
    assert {one.canary: digest(stage.admin, one.owner.id) for one in (stage.a, stage.b)} == before


def call_back(stage: Stage, session: UUID, token: str) -> httpx.Response:
    """One callback with a token."""
    return stage.ask(
        "public",
        "POST",
        f"/callbacks/sessions/{session}",
        "nobody",
        json={"status": "completed"},
        headers={"X-Callback-Token": token},
    )


def forged_callbacks(stage: Stage) -> list[str]:
    """B's running session under A's token, A's keys and made-up tokens: whatever is taken."""
    held_a, held_b = (one.running()[1] for one in (stage.a, stage.b))
    wrong = []
    unknown = call_back(stage, uuid4(), held_a.callback_token)
    for session, token in (
        (held_b.session_id, held_a.callback_token),
        (held_a.session_id, held_b.callback_token),
        (held_b.session_id, stage.keys["owner a"]["Authorization"].split()[1]),
        (held_b.session_id, str(held_b.session_id)),
    ):
        answer = call_back(stage, session, token)
        if (answer.status_code, answer.content) != (401, unknown.content):
            wrong.append(f"{answer.status_code} {answer.text}")
    with stage.database.store.database.system() as connection:
        taken = connection.execute(
            text("select count(*) from callback_tokens where received_at is not null and session_id in (:a, :b)"),
            {"a": held_a.session_id, "b": held_b.session_id},
        ).scalar_one()
    return [*wrong, *["stored"] * taken]


def test_one_owners_callback_token_opens_no_other_owners_session(stage: Stage, figures: Figures) -> None:
    wrong = forged_callbacks(stage)
    figures(tried=4, accepted=len(wrong))
    assert wrong == []


def _webhook(stage: Stage, payload: dict[str, Any], secret: str = SECRET) -> httpx.Response:
    body = json.dumps(payload).encode()
    signature = "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    headers = {"X-GitHub-Event": "pull_request", "X-GitHub-Delivery": uuid4().hex, "X-Hub-Signature-256": signature}
    return stage.ask("public", "POST", "/webhooks/github", "nobody", content=body, headers=headers)


def test_a_webhook_reaches_the_owner_of_its_installation_only(stage: Stage, figures: Figures) -> None:
    """The repository is both owners'; the installation decides. An unsigned word about the owner decides nothing."""
    before = digest(stage.admin, stage.a.owner.id)
    named = pull_request(installation={"id": stage.b.installation}, owner={"id": str(stage.a.owner.id)})
    named["repository"]["id"] = REPOSITORY
    assert _webhook(stage, named).status_code == 202
    assert _webhook(stage, named, secret=stage.keys["owner a"]["Authorization"]).status_code == 401
    figures(tried=2, accepted=0)
    assert digest(stage.admin, stage.a.owner.id) == before


def test_an_id_that_two_owners_hold_is_nobodys(stage: Stage) -> None:
    """Ids are random, but a copied or restored row may repeat one: whose it is isn't known, so nothing is done (invariant 9)."""
    a, b = Corner(stage.database, REPOSITORY, "canary-c"), Corner(stage.database, REPOSITORY, "canary-d")
    claim, session = a.launched()
    held = a.store.sessions
    copied = "insert into {0} overriding system value select (jsonb_populate_record(x, jsonb_build_object('owner_id', %s::text))).* from {0} x where {1} = %s"
    for table, column, value in (
        ("work_items", "id", claim.item_id),
        ("reviews", "item_id", claim.item_id),
        ("sessions", "id", session),
        ("callback_tokens", "session_id", session),
    ):
        stage.admin.execute(copied.format(table, column).encode(), (b.owner.id, value))
    before = [digest(stage.admin, one.owner.id) for one in (a, b)]
    assert held.get(session) is None and a.store.queue.get(claim.item_id) is None
    assert a.session_claim(session).outcome == "moved_on"
    assert held.record_callback(session, "any", b"{}") == "refused"
    assert not a.store.queue.cancel(claim.item_id, reason="user_cancelled", actor="test")
    assert [digest(stage.admin, one.owner.id) for one in (a, b)] == before


def test_a_route_without_an_entry_fails(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's own proof."""
    monkeypatch.setitem(
        stage.applications,
        "admin",
        Starlette(routes=[*stage.applications["admin"].routes, Route("/api/v1/new", application.health)]),
    )
    assert routes(stage) != set(ROUTES)
