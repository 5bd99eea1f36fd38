"""The control API over a real database: settings, services, switches, keys, and what it says to what it doesn't take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import anyio
import httpx
import pytest
from sqlalchemy import create_engine, text

from kilo_pipelines.core.effects import EffectKind
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.ingress.application import Ingress, admin_application
from kilo_pipelines.store import NewItem
from kilo_pipelines.store.migrate import head
from tests.conftest import Database
from tests.support.browser import browser
from tests.support.ingress import OneSecret
from tests.support.keys import api_key
from tests.support.served import served
from tests.support.store import World, intent


@dataclass
class Api:
    """The admin application in this process, an owner's work, and a key of each role."""

    application: Any
    database: Database
    world: World
    keys: dict[str, str]

    def ask(self, method: str, path: str, who: str | None = "owner", **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.keys.get(who, who)}"} if who else {}

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.application, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.request(method, path, headers=headers | more.pop("headers", {}), **more)

        return anyio.run(send)

    def told(self, method: str, path: str, who: str = "owner", *, status: int = 200, **more: Any) -> dict[str, Any]:
        answer = self.ask(method, f"/api/v1/{path}", who, **more)
        assert answer.status_code == status, answer.text
        found: dict[str, Any] = answer.json()
        return found


@pytest.fixture
def api(database: Database) -> Iterator[Api]:
    """A fresh owner and fresh keys: what one test switches, another doesn't meet."""
    world = World(database.store, database.clock)
    World(database.store, database.clock)  # several owners: the operator has to name one
    keys = {role: api_key(database.store, role, world.owner.id) for role in ("owner", "member", "viewer")}
    keys["operator"] = api_key(database.store, "operator")
    ingress = Ingress(database.store, OneSecret(None), frozenset({"localhost"}), database.clock)
    yield Api(admin_application(ingress), database, world, keys)


def test_settings_are_saved_over_their_revision_and_saving_never_enables(api: Api) -> None:
    path = "services/code_review/settings"
    assert api.told("POST", "services/code_review/enable", status=409, json={})["reason"] == Reason.SETTINGS_MISSING
    first = api.told("GET", path, "viewer")
    assert (first["revision"], first["enabled"], first["settings"]["max_parts"]) == (0, False, 6)
    saved = api.told("PUT", path, json={"expected_revision": 0, "settings": {"max_parts": 4}})
    assert (saved["revision"], saved["enabled"], saved["settings"]["max_parts"]) == (1, False, 4)
    stale = api.told("PUT", path, status=409, json={"expected_revision": 0, "settings": {"max_parts": 5}})
    assert stale["reason"] == Reason.SETTINGS_STALE and api.told("GET", path)["settings"]["max_parts"] == 4
    for wrong in ({"max_parts": 99}, {"enabled": True}, {"exclude_paths": ["\x00"]}):
        refused = api.told("PUT", path, status=422, json={"expected_revision": 1, "settings": wrong})
        assert refused["reason"] == Reason.SETTINGS_INVALID and "99" not in refused["detail"]
    api.told("POST", "services/code_review/enable", json={})
    kept = api.told("PUT", path, json={"expected_revision": 2, "settings": {"advisory": True}})
    assert kept["enabled"] and kept["settings"]["max_parts"] == 4, "on stays on, and what isn't named stays"
    assert api.told("GET", "services", "viewer")["services"][0]["enabled"] is True
    api.told("POST", "services/code_review/disable", json={})
    assert api.told("GET", path)["enabled"] is False
    assert api.told("GET", "services/nothing/settings", status=404) == {"outcome": "not_found"}


def test_an_owner_switches_its_own_scope_and_never_lifts_the_operators(api: Api) -> None:
    own = f"owner:{api.world.owner.id}"
    assert api.told("POST", "switches/pause", json={"reason": "freeze"}) == {"scope": own, "kind": "pause", "cancelled": 0}
    assert [one["set_by"][:4] for one in api.told("GET", "switches", "viewer")["switches"]] == ["key:"]
    assert api.told("POST", "switches/resume", json={})["scope"] == own
    assert api.told("POST", "switches/resume", status=409, json={})["reason"] == Reason.SWITCH_NOT_SET
    for scope in ("all", "service:code_review", own):
        refused = api.told("POST", "switches/kill", status=400, json={"reason": "x", "scope": scope})
        assert refused["reason"] == Reason.PAYLOAD_SHAPE_MISMATCH
    assert api.told("POST", "switches/kill", "operator", status=400, json={"reason": "x"})["detail"] == "scope: name one"
    api.told("POST", "switches/kill", "operator", json={"reason": "abuse", "scope": own})
    for act in ("resume", "pause"):
        body = {"reason": "mine"} if act == "pause" else {}
        assert api.told("POST", f"switches/{act}", status=409, json=body)["reason"] == Reason.SWITCH_HELD
    shown = api.told("GET", "switches", "operator")["switches"]
    assert [one["kind"] for one in shown if one["scope"] == own] == ["kill"]
    api.told("POST", "switches/resume", "operator", json={"scope": own})
    events = [one for one in api.told("GET", "audit?limit=1000")["events"] if one["subject"] == own]
    assert [(one["action"], one["actor"][:8]) for one in events[:2]] == [
        ("switch.release", "operator"),
        ("switch.kill", "operator"),
    ]


def test_a_kill_of_an_owner_cancels_its_items_and_says_how_many(api: Api) -> None:
    claim, _ = api.world.launched()
    assert api.told("POST", "switches/kill", json={"reason": "stop"})["cancelled"] >= 1
    assert api.told("GET", f"items/{claim.item_id}")["state"] == "cancelled"
    api.told("POST", "switches/resume", json={})


def test_a_member_repeats_reviews_and_no_dismissals(api: Api) -> None:
    """What only an owner may ask for, only an owner asks for again."""
    review = api.world.item()
    api.told("POST", f"items/{review}/cancel", "member")
    assert api.told("POST", f"items/{review}/retry", "member", json={}) == {"outcome": "done"}
    assert api.told("POST", f"items/{review}/retry", "member", status=409, json={})["reason"] == Reason.MOVED_ON
    with api.database.store.database.owner(api.world.owner.id) as connection:
        connection.execute(text("update work_items set service = 'dismissal' where id = :id"), {"id": review})
    for act in ("cancel", "retry"):
        body = {"json": {}} if act == "retry" else {}
        assert api.told("POST", f"items/{review}/{act}", "member", status=401, **body)["reason"] == Reason.ROLE_NOT_ALLOWED
    api.told("POST", f"items/{review}/cancel")


def test_lists_are_narrowed(api: Api) -> None:
    item = str(api.world.item())
    assert item in {one["id"] for one in api.told("GET", "items?state=waiting&service=code_review", "viewer")["items"]}
    assert api.told("GET", "items?service=other")["items"] == []
    assert len(api.told("GET", "items?limit=1", "operator")["items"]) == 1
    assert api.told("GET", f"effects?item={item}&state=dead")["effects"] == []
    assert api.told("GET", "repositories")["repositories"][0]["within_reach"] is True
    events = api.told("GET", f"audit?owner={api.world.owner.id}&limit=1000", "operator")["events"]
    assert {one["owner_id"] for one in events} == {str(api.world.owner.id)}
    for wrong in ("items?limit=0", "items?limit=1&limit=2", "items?state=odd", "items?colour=red", f"items?owner={UUID(int=1)}"):
        assert api.told("GET", wrong, status=400)["reason"] == Reason.QUERY_INVALID
    assert api.told("GET", "members", "operator", status=400)["reason"] == Reason.OWNER_NOT_NAMED
    assert api.told("GET", f"items?owner={UUID(int=1)}", "operator", status=404) == {"outcome": "not_found"}


def test_a_key_is_shown_once_and_kept_by_nobody_on_the_way(api: Api) -> None:
    answer = api.ask("POST", "/api/v1/keys", json={"role": "viewer", "name": "ci"})
    assert answer.status_code == 201 and answer.headers["cache-control"] == "no-store"
    made = answer.json()
    assert api.told("GET", "me", made["key"])["role"] == "viewer"
    assert made["key"] not in api.ask("GET", "/api/v1/keys").text
    assert api.told("POST", f"keys/{made['id']}/rotate", "owner", status=400, json={"overlap_hours": 169})
    new = api.told("POST", f"keys/{made['id']}/rotate", made["key"], status=201, json={"overlap_hours": 1})
    api.database.clock.advance(timedelta(hours=1))
    assert api.told("GET", "me", made["key"], status=401) == {"outcome": "refused", "reason": Reason.KEY_REFUSED}
    assert api.told("POST", f"keys/{new['id']}/revoke", new["key"], json={}) == {"outcome": "done"}
    assert api.told("GET", "me", new["key"], status=401) == api.told("GET", "me", "kilo_wrong", status=401)
    assert api.told("POST", "owners", "operator", status=409, json={"kind": "user", "name": "x"})["reason"] == "personal_owner"


def test_what_nobody_serves_is_said_in_our_words(api: Api) -> None:
    """No framework's shape, no redirect, no description for who has no key."""
    assert api.ask("GET", "/api/v1/nothing").json() == {"outcome": "not_found"}
    assert api.ask("PATCH", "/api/v1/items").json() == {"outcome": "refused"}
    assert api.ask("GET", "/api/v1/items/").status_code == 404
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert api.ask("GET", path, None).status_code == 404
    told = api.ask("GET", "/api/v1/openapi.json", None)
    assert (told.status_code, told.json()["reason"], told.headers["www-authenticate"]) == (401, "key_refused", "Bearer")
    assert "422" not in api.told("GET", "openapi.json", "viewer")["paths"]["/api/v1/items/{item}/retry"]["post"]["responses"]


def test_the_page_holds_nothing_and_runs_its_own_scripts_only(api: Api) -> None:
    page = api.ask("GET", "/api/docs", None)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe-eval" not in policy
    assert "/api/v1/keys" not in page.text and "<script>" not in page.text
    for name in ("page.js", "swagger-ui-bundle.js", "swagger-ui.css"):
        assert f"/api/docs/{name}" in page.text and api.ask("GET", f"/api/docs/{name}", None).status_code == 200
    for name in ("redoc.standalone.js", "..%2f__init__.py", "x"):
        assert api.ask("GET", f"/api/docs/{name}", None).status_code == 404


def test_a_person_pastes_a_key_and_asks_from_the_page(api: Api) -> None:
    """What a browser lets the page do under its policy: a refused key shows nothing, a live one everything."""
    with served(api.database) as address, browser() as page:
        page.go(f"{address}/api/docs", "typeof SwaggerUIBundle === 'function'")
        for key, until in (
            ("kilo_wrong", "document.getElementById('note').textContent.includes('refused')"),
            (api.keys["viewer"], "document.querySelectorAll('.opblock').length > 50"),
        ):
            page.run(f"document.getElementById('key').value = '{key}'; document.querySelector('form button').click()")
            page.wait(until)
        me = "#operations-me-show_myself"
        for step in (".opblock-summary-control", ".try-out__btn", ".execute"):
            page.wait(f"document.querySelector('{me} {step}') !== null")
            page.run(f"document.querySelector('{me} {step}').click()")
        page.wait(f"(document.querySelector('{me} .live-responses-table')?.innerText || '').includes('viewer')")


def test_health_tells_the_operator_of_a_schema_that_is_not_this_versions(api: Api) -> None:
    told = api.told("GET", "health", "operator")
    assert told["ok"] is True and told["migration"] == {"present": head(), "wanted": head()}
    engine = create_engine(api.database.logins["migrator"])
    with engine.begin() as connection:
        connection.execute(text("update alembic_version set version_num = '0001'"))
    assert api.told("GET", "health", "operator")["ok"] is False
    with engine.begin() as connection:
        connection.execute(text("update alembic_version set version_num = :now"), {"now": head()})
    engine.dispose()


def test_an_item_of_the_queue_is_shown_with_its_attempts(api: Api) -> None:
    claim, session = api.world.launched()
    told = api.told("GET", f"items/{claim.item_id}", "viewer")
    assert told["session"]["id"] == str(session) and told["state"] == "running"
    assert [one["state"] for one in told["attempts"]] == ["open"]
    shown = api.told("GET", f"reviews/{claim.item_id}", "viewer")
    assert shown["effects"] == [] and shown["events"] == []
    other = NewItem("security_sync", "sync", api.world.repository, 0, {"repository_id": None, "requested_by": "x"})
    assert api.database.store.queue.open(api.world.owner.id, other, actor="x") is not None


def _held(world: World, key: str, kind: EffectKind = EffectKind.GITHUB_REACTION, **payload: Any) -> str:
    """An effect of a review that ended in suggest-only mode."""
    claim, held = world.running()
    world.store.sessions.finish(held, status="completed", reason=None, result={})
    effect = intent(key, key).model_copy(update={"kind": kind, "payload": payload})
    with world.store.settlements.open(claim.item_id) as tx:
        assert tx is not None
        tx.conclude(state="completed", reason="reviewed", verdict={}, evidence=None, effects=[effect])
    return str(world.store.outbox.listed(item_id=claim.item_id)[0]["id"])


def test_limits_are_settings_over_a_revision_and_are_never_switched_off(api: Api) -> None:
    path = "services/limits/settings"
    first = api.told("GET", path, "viewer")
    assert (first["revision"], first["settings"]["daily"]) == (0, {"tokens": None, "usd": None})
    wish: dict[str, Any] = {"expected_revision": 0, "settings": {"daily": {"tokens": 1_000, "usd": 2.5}}}
    for who in ("member", "viewer"):
        assert api.told("PUT", path, who, status=401, json=wish)["reason"] == Reason.ROLE_NOT_ALLOWED
    assert api.told("PUT", path, json=wish)["revision"] == 1
    stale = api.told("PUT", path, status=409, json={"expected_revision": 0, "settings": {"daily": {"tokens": 10**9}}})
    assert stale["reason"] == Reason.SETTINGS_STALE and api.told("GET", path)["settings"]["daily"]["tokens"] == 1_000
    for wrong in ({"daily": {"tokens": -1}}, {"outsiders": "everybody"}, {"enabled": False}, {"session_usd": 0}):
        assert api.told("PUT", path, status=422, json={"expected_revision": 1, "settings": wrong})["reason"] == "settings_invalid"
    assert api.told("POST", "services/limits/disable", status=404, json={}) == {"outcome": "not_found"}
    assert "limits" not in {one["service"] for one in api.told("GET", "services")["services"]}
    (today,) = api.told("GET", "spend", "viewer")["budgets"]
    assert (today["owner_id"], today["tokens"], today["micro_usd"]) == (str(api.world.owner.id), 1_000, 2_500_000)
    assert today in api.told("GET", "spend?days=366", "operator")["budgets"]
    assert api.told("GET", "spend?days=367", status=400)["reason"] == Reason.QUERY_INVALID
    # What cannot be read spends nothing, and says where to begin.
    with api.database.store.database.owner(api.world.owner.id) as connection:
        connection.execute(text("update service_configs set config = '{\"daily\": 7, \"odd\": 1}' where service = 'limits'"))
    unreadable = api.told("GET", path, status=409)
    assert unreadable["reason"] == Reason.LIMITS_INVALID and unreadable["detail"].startswith("at revision 1: daily")
    assert api.told("PUT", path, json={"expected_revision": 1, "settings": {"daily": {}}})["settings"]["daily"]["tokens"] is None


def test_a_cap_is_the_operators_and_its_owner_reads_it(api: Api) -> None:
    path, owner = "services/cap/settings", f"?owner={api.world.owner.id}"
    wish: dict[str, Any] = {"expected_revision": 0, "settings": {"tokens": 5_000}}
    for who in ("owner", "member", "viewer"):
        assert api.told("PUT", path, who, status=401, json=wish)["reason"] == Reason.ROLE_NOT_ALLOWED
    assert api.told("PUT", path + owner, "operator", json=wish)["revision"] == 1
    assert api.told("PUT", path + owner, "operator", status=409, json=wish)["reason"] == Reason.SETTINGS_STALE
    shown = api.told("GET", path, "viewer")
    assert (shown["revision"], shown["settings"]) == (1, {"tokens": 5_000, "usd": None})
    above = {"expected_revision": 0, "settings": {"daily": {"tokens": 10**9}}}
    api.told("PUT", "services/limits/settings", json=above)
    (today,) = api.told("GET", "spend", "viewer")["budgets"]
    assert today["tokens"] == 5_000
    assert api.told("POST", "services/cap/disable", status=404, json={}) == {"outcome": "not_found"}


def test_what_is_held_is_let_go_as_it_was_shown_by_who_may(api: Api) -> None:
    own = {"scope": f"owner:{api.world.owner.id}", "on": True}
    assert api.told("POST", "suggest-only", status=400, json={"on": True})["reason"] == Reason.PAYLOAD_SHAPE_MISMATCH
    assert api.told("POST", "suggest-only", json={"on": True, "reason": "at first"}) == own
    (switch,) = api.told("GET", "switches", "viewer")["switches"]
    assert (switch["kind"], switch["scope"]) == ("suggest", own["scope"])
    effect, notice = _held(api.world, "one", content="+1"), _held(api.world, "two", EffectKind.NOTICE_WEBHOOK, url="https://x/y")
    shown = api.told("GET", f"effects/{effect}", "viewer")
    assert (shown["state"], shown["payload"]) == ("held", {"content": "+1"})
    for who in ("viewer", "member"):
        body = {"sha256": shown["sha256"]}
        assert api.told("POST", f"effects/{effect}/approve", who, status=401, json=body)["reason"] == Reason.ROLE_NOT_ALLOWED
        secret = api.told("GET", f"effects/{notice}", who)
        assert (secret["payload"], secret["sha256"]) == ({}, None), "an address may hold a secret"
    assert api.told("GET", f"effects/{notice}")["payload"] == {"url": "https://x/y"}
    other = api.told("POST", f"effects/{effect}/approve", status=409, json={"sha256": "0" * 64})
    assert other["reason"] == Reason.APPROVAL_STALE and api.told("GET", f"effects/{effect}")["state"] == "held"
    assert api.told("POST", f"effects/{effect}/approve", json={"sha256": shown["sha256"]}) == {"state": "pending"}
    assert (
        api.told("POST", f"effects/{effect}/approve", status=409, json={"sha256": shown["sha256"]})["reason"] == "approval_stale"
    )
    stranger = api_key(api.database.store, "owner", World(api.database.store, api.database.clock).owner.id)
    for method, path in (("GET", f"effects/{effect}"), ("POST", f"effects/{effect}/approve")):
        body = {} if method == "GET" else {"json": {"sha256": shown["sha256"]}}
        assert api.told(method, path, stranger, status=404, **body) == {"outcome": "not_found"}
    events = api.told("GET", "audit?limit=1000")["events"]
    assert [one["action"] for one in events if one["subject"] == effect] == ["effect.approve"]


def test_suggest_only_of_the_operator_is_ended_by_the_operator_alone(api: Api) -> None:
    scope = f"owner:{api.world.owner.id}"
    api.told("POST", "suggest-only", "operator", json={"on": True, "reason": "abuse", "scope": scope})
    for on in (True, False):
        wish = {"on": on, "reason": "mine"}
        assert api.told("POST", "suggest-only", status=409, json=wish)["reason"] == Reason.SWITCH_HELD
        assert api.told("POST", "suggest-only", "member", status=401, json=wish)["reason"] == Reason.ROLE_NOT_ALLOWED
        assert api.told("POST", "suggest-only", status=400, json={**wish, "scope": "all"})["reason"] == "payload_shape_mismatch"
    shown = api.told("GET", "health", "operator")["switches"]
    assert [one["set_by"] for one in shown if one["scope"] == scope] == ["operator"]
    api.told("POST", "suggest-only", "operator", json={"on": False, "scope": scope})
    assert api.told("POST", "suggest-only", status=409, json={"on": False})["reason"] == Reason.SWITCH_NOT_SET
    told = [one["action"] for one in api.told("GET", "audit?limit=1000")["events"] if one["subject"] == scope]
    assert told[:2] == ["suggest_only.off", "suggest_only.on"]


def test_an_outsiders_review_is_approved_at_the_head_that_was_looked_at(api: Api) -> None:
    item = api.world.item()
    head_sha = api.told("GET", f"reviews/{item}")["head_sha"]
    assert (
        api.told("POST", f"reviews/{item}/approve", "viewer", status=401, json={"head": head_sha})["reason"] == "role_not_allowed"
    )
    another = "f" * 40 if head_sha[0] != "f" else "e" * 40
    for wrong, reason, status in ((another, Reason.APPROVAL_STALE, 409), (head_sha[:6], Reason.PAYLOAD_SHAPE_MISMATCH, 400)):
        assert api.told("POST", f"reviews/{item}/approve", "member", status=status, json={"head": wrong})["reason"] == reason
    number = api.database.store.reviews.get(item)
    assert number is not None
    pull = (api.world.owner.id, number.repository_id, number.pull_number)
    assert api.database.store.approvals.of_pull(*pull) == []
    made = api.told("POST", f"reviews/{item}/approve", "member", json={"head": head_sha[:12]})
    (approval,) = api.database.store.approvals.of_pull(*pull)
    assert (str(approval.id), approval.head_sha, approval.granted) == (made["approval"], head_sha, True)
    assert approval.by.startswith("key:")
    api.told("POST", f"items/{item}/cancel")
    assert api.told("POST", f"reviews/{item}/approve", status=409, json={"head": head_sha})["reason"] == Reason.MOVED_ON


def test_the_operator_says_which_models_an_owner_may_name(api: Api) -> None:
    path, owner = "models/maker/large-4", f"?owner={api.world.owner.id}"
    assert api.told("PUT", path, status=401, json={"allowed": True})["reason"] == Reason.ROLE_NOT_ALLOWED
    api.told("PUT", path + owner, "operator", json={"allowed": True})
    assert api.told("GET", "models", "viewer") == {"models": ["maker/large-4"]}
    assert api.told("PUT", f"models/a%20b{owner}", "operator", status=404, json={"allowed": True}) == {"outcome": "not_found"}
    api.told("PUT", path + owner, "operator", json={"allowed": False})
    assert api.told("GET", f"models{owner}", "operator") == {"models": []}
