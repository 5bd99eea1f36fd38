"""The control API of the Security Agent over a real database: answers in their documented schemas, and clear ones to bad input."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, timedelta
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import anyio
import httpx
import pytest
from openapi_schema_validator import OAS31Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012
from starlette.applications import Starlette

from kilo_pipelines.acts import security as acts
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.refusal import Refusal
from kilo_pipelines.ingress.application import Ingress, admin_application
from kilo_pipelines.services.security.config import PRESETS
from kilo_pipelines.store import NewItem
from tests.conftest import Database
from tests.store.test_findings import Synced
from tests.support.alerts import alert
from tests.support.ingress import OneSecret
from tests.support.keys import api_key
from tests.support.store import intent

BASE = "/api/v1/security"


@dataclass
class Desk:
    """The admin application, an owner with findings, and a key of each role."""

    application: Starlette
    synced: Synced
    other: Synced
    keys: dict[str, str]

    def ask(self, method: str, path: str, who: str = "owner", **more: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.application, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                headers = {"Authorization": f"Bearer {self.keys[who]}", **more.pop("headers", {})}
                return await client.request(method, path if path.startswith("/") else f"{BASE}/{path}", headers=headers, **more)

        return anyio.run(send)

    def finding(self) -> UUID:
        found: UUID = self.synced.one(1).id
        return found


@pytest.fixture(scope="module")
def desk(database: Database) -> Iterator[Desk]:
    synced, other = Synced(database, 550_001), Synced(database, 550_001)
    for one in (synced, other):
        one.take(*(alert(number) for number in range(1, 9)))
        one.take(
            alert(2, state="fixed", fixed_at="2026-02-01T00:00:00Z"),
            alert(3, state="dismissed", dismissed_at="2026-02-01T00:00:00Z"),
        )
    worked(synced)
    keys = {
        "operator": api_key(database.store, "operator"),
        "owner": api_key(database.store, "owner", synced.owner),
        "viewer": api_key(database.store, "viewer", synced.owner),
        "other": api_key(database.store, "owner", other.owner),
        "stranger": "kilo_" + "x" * 43,
    }
    yield Desk(
        admin_application(Ingress(database.store, OneSecret(None), frozenset({"localhost"}), database.clock)), synced, other, keys
    )


def worked(synced: Synced) -> None:
    """A completed analysis with an effect."""
    finding = synced.one(1).id
    details = {"finding_id": str(finding), "origin": "manual", "requested_by": "x", "mode": "deep"}
    item = synced.store.queue.open(
        synced.owner, NewItem("security_analysis", f"finding:{finding}", synced.repository, 0, details), actor="x"
    )
    assert item is not None
    claim: Any = synced.store.queue.claim(
        item, "security_analysis", run_id="r", pools=lambda _kind, _plan: {"security_analysis": 1}, lease_s=30
    )
    deep = {"exploitable": True, "reasoning": "r", "action": "open_pr", "summary": "s"}
    done = {"deep": deep, "completed_at": synced.world.clock.now().isoformat()}
    assert synced.store.queue.complete(claim, "analyzed", details=done, effects=[intent("k")])


@pytest.fixture(scope="module")
def description(desk: Desk) -> dict[str, Any]:
    found: dict[str, Any] = desk.ask("GET", "/api/v1/openapi.json").json()
    return found


# -- the description -------------------------------------------------------------------------------------------------------


def in_schema(description: dict[str, Any], method: str, path: str, answer: httpx.Response) -> None:
    """The answer's status is documented, and its body is what the document says."""
    responses = description["paths"][path][method.lower()]["responses"]
    assert str(answer.status_code) in responses, (answer.status_code, answer.text)
    content = responses[str(answer.status_code)]["content"]
    kind = answer.headers["content-type"].split(";")[0]
    schema = content[kind].get("schema")
    if schema is not None:
        registry = Registry().with_resource("urn:api", DRAFT202012.create_resource(description))
        OAS31Validator({"$ref": "urn:api" + schema["$ref"]}, registry=registry).validate(answer.json())


def test_the_description_is_well_formed(description: dict[str, Any]) -> None:
    assert description["openapi"].startswith("3.1.")
    schemas = description["components"]["schemas"]
    for name, schema in schemas.items():
        OAS31Validator.check_schema(schema)
        assert schema.get("type") == ("string" if "enum" in schema else "object"), name
    references = set(re.findall(r'"\$ref": "([^"]*)"', json.dumps(description)))
    assert references == {f"#/components/schemas/{name}" for name in schemas}, "each is used and each use is defined"
    operations = {}
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            operations[(method, path)] = operation["operationId"]
            asked = operation.get("parameters", [])
            named = {one["name"] for one in asked if one["in"] == "path"}
            assert named == set(re.findall(r"{([a-z_]+)}", path)) and operation["responses"]
            assert operation["security"] == [{"apiKey": []}] and operation["x-kilo-roles"]
            for one in asked:
                OAS31Validator.check_schema(one["schema"])
                assert one["required"] == (one["in"] == "path")
    assert len(set(operations.values())) == len(operations)


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        (
            "findings",
            ["findings", "findings?limit=1&offset=2&status=closed&sort=sla_due_at_asc", "findings?overdue=true&outcome=all"],
        ),
        ("findings/{finding}", ["findings/{finding}"]),
        ("summary", ["summary", "summary?repository=550001", "summary?repository=1"]),
        ("report", ["report", "report?format=csv", "report?format=vex", "report?from=2026-10-01&to=2026-10-31"]),
        ("settings", ["settings"]),
    ],
)
def test_every_route_answers_in_its_schema(desk: Desk, description: dict[str, Any], path: str, asked: list[str]) -> None:
    for one in asked:
        for who in ("owner", "viewer"):
            answer = desk.ask("GET", one.replace("{finding}", str(desk.finding())), who)
            assert answer.status_code == 200, answer.text
            in_schema(description, "GET", f"{BASE}/{path}", answer)
    in_schema(description, "GET", f"{BASE}/{path}", desk.ask("GET", asked[0].replace("{finding}", "x"), "stranger"))


# -- reading ---------------------------------------------------------------------------------------------------------------


def test_a_list_is_narrowed_and_counted(desk: Desk) -> None:
    told = desk.ask("GET", "findings", params={"limit": 2, "offset": 1, "status": "open", "severity": "low"}).json()
    assert told["total"] == 1 and told["findings"] == []  # 3 is dismissed, 7 is open
    told = desk.ask("GET", "findings", params={"status": "closed"}).json()
    assert {one["source_id"]: one["outcome"] for one in told["findings"]} == {"2": "fixed", "3": "dismissed"}
    told = desk.ask("GET", "findings", params={"outcome": "exploitable"}).json()
    assert [one["id"] for one in told["findings"]] == [str(desk.finding())]


def test_a_finding_is_told_with_all_that_is_known_of_it(desk: Desk) -> None:
    told = desk.ask("GET", f"findings/{desk.finding()}").json()
    assert told["finding"]["source_id"] == "1" and told["sla"]["explained"] and told["history"][0]["kind"] == "opened"
    assert told["analyses"][0]["deep"]["exploitable"] is True
    assert [(one["service"], one["effects"][0]["kind"]) for one in told["work"]] == [("security_analysis", "github.reaction")]
    assert "payload" not in json.dumps(told) and "fingerprint" not in json.dumps(told)


def test_figures_hold_together(desk: Desk) -> None:
    told = desk.ask("GET", "summary").json()
    assert told["by_status"] == {"open": 6, "fixed": 1, "ignored": 1} and told["analysis"]["exploitable"] == 1
    assert told["sla"]["overall"]["total"] == sum(one["total"] for one in told["sla"]["by_severity"].values()) == 6
    preset = desk.ask("GET", "settings").json()["settings"]["sla_preset"]  # another test saves
    assert told["time_to_fix"]["by_severity"]["critical"]["target_days"] == PRESETS[preset][0]


def test_what_is_anothers_and_what_nobody_has_are_answered_alike(desk: Desk) -> None:
    theirs = desk.other.one(1).id
    answers = {desk.ask("GET", f"findings/{one}").content for one in (theirs, uuid4(), "x", "%00", "é")}
    assert answers == {b'{"outcome":"not_found"}'}
    assert desk.ask("GET", f"findings/{theirs}", "operator").status_code == 200


def test_the_operator_names_an_owner(desk: Desk) -> None:
    for path in ("findings", "summary", "report", "settings"):
        refused = desk.ask("GET", path, "operator")
        assert (refused.status_code, refused.json()["reason"]) == (400, Reason.OWNER_NOT_NAMED)
        assert desk.ask("GET", path, "operator", params={"owner": str(desk.synced.owner)}).status_code == 200
        assert desk.ask("GET", path, "operator", params={"owner": str(uuid4())}).status_code == 404


@pytest.mark.parametrize(
    "query",
    [
        "findings?limit=0", "findings?limit=101", "findings?limit=x", "findings?limit=1e9", "findings?offset=-1", "findings?offset=" + "9" * 30,
        "findings?unknown=1", "findings?status=gone", "findings?severity=absurd", "findings?outcome=x", "findings?overdue=perhaps",
        "findings?sort=id;drop", "findings?repository=0", "findings?repository=octo/one", "findings?repository=" + "9" * 40,
        "findings?limit=1&limit=2", "findings?owner_id=1", "findings?repository=%00", "findings?status=open&%00=1",
        "summary?repository=-1", "summary?x=1", "settings?x=1", "report?format=pdf", "report?from=soon", "report?from=2026-02-30",
        "report?from=1700000000", "report?from=0000-00-00", "report?to=2026-1-1", "report?from=-001-01-01", "report?to=%F0%9F%92%A5", "report?x=1",
    ],
)  # fmt: skip
def test_bad_queries_are_answered_with_the_field(desk: Desk, description: dict[str, Any], query: str) -> None:
    answer = desk.ask("GET", query)
    assert (answer.status_code, answer.json()["reason"]) == (400, Reason.QUERY_INVALID) and answer.json()["detail"]
    in_schema(description, "GET", f"{BASE}/{query.partition('?')[0]}", answer)


@pytest.mark.parametrize(
    "query",
    [
        "from=2026-05-02&to=2026-05-01",
        "to=9999-12-31",
        "from=2026-01-01&to=2026-04-01",
        "from=0001-01-01",
        "format=vex&to=2026-01-01",
    ],
)
def test_periods_that_are_none_are_answered_with_a_reason(desk: Desk, query: str) -> None:
    answer = desk.ask("GET", f"report?{query}")
    assert (answer.status_code, answer.json()["reason"]) == (400, Reason.REPORT_PERIOD_INVALID)


def test_reports_are_documents(desk: Desk) -> None:
    today = desk.synced.world.clock.now().astimezone(UTC).date()
    for form, kind in (
        ("csv", "text/csv; charset=utf-8"),
        ("json", "application/json"),
        ("vex", "application/vnd.cyclonedx+json; version=1.6"),
    ):
        answer = desk.ask("GET", "report", "viewer", params={"format": form})
        assert answer.headers["content-type"] == kind
        assert re.fullmatch(r'attachment; filename="security-[a-z]+-[0-9-]+\.(csv|json)"', answer.headers["content-disposition"])
    rows = list(csv.DictReader(io.StringIO(desk.ask("GET", "report", params={"format": "csv"}).text, newline="")))
    assert {row["repository"] for row in rows} == {"octo/demo"} and len(rows) == 10
    told = desk.ask("GET", "report", params={"from": str(today), "to": str(today)}).json()
    assert told["event_count"] == 10 and told["owner"] == str(desk.synced.owner)
    old = desk.ask("GET", "report", params={"to": str(today - timedelta(days=1))}).json()
    assert old["event_count"] == 0 and old["findings"] == []


# -- settings --------------------------------------------------------------------------------------------------------------


def put(desk: Desk, body: Any, who: str = "owner", **more: Any) -> httpx.Response:
    sent = {"content": body, "headers": {"Content-Type": "application/json"}} if isinstance(body, bytes) else {"json": body}
    return desk.ask("PUT", "settings", who, **sent, **more)


def test_a_body_that_does_not_say_that_it_is_json_is_refused(desk: Desk, description: dict[str, Any]) -> None:
    """A form of a page elsewhere can send a body, and can't say this."""
    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
        answer = desk.ask("PUT", "settings", content=b'{"expected_revision": 0, "settings": {}}', headers=headers)
        assert (answer.status_code, answer.json()["reason"]) == (415, Reason.BODY_NOT_JSON)
        in_schema(description, "PUT", f"{BASE}/settings", answer)


def test_settings_are_saved_over_the_revision_that_was_read(desk: Desk, description: dict[str, Any]) -> None:
    read = desk.ask("GET", "settings").json()
    body = {"expected_revision": read["revision"], "settings": {"sla_preset": "strict"}}
    saved = put(desk, body)
    assert (
        saved.status_code == 200 and saved.json()["revision"] == read["revision"] + 1 and saved.json()["deadlines_changed"] == 8
    )
    in_schema(description, "PUT", f"{BASE}/settings", saved)
    stale = put(desk, body)
    assert (stale.status_code, stale.json()["reason"]) == (409, Reason.SETTINGS_STALE)
    in_schema(description, "PUT", f"{BASE}/settings", stale)
    due = {
        one["severity"]: one["budget_days"] for one in desk.ask("GET", "findings", params={"status": "open"}).json()["findings"]
    }
    assert due["critical"] == 7 and desk.ask("GET", "settings", "other").json()["settings"]["sla_preset"] == "default"
    by_operator = put(
        desk, {**body, "expected_revision": saved.json()["revision"]}, "operator", params={"owner": str(desk.synced.owner)}
    )
    assert by_operator.status_code == 200


def test_settings_that_are_wrong_name_their_fields(desk: Desk, description: dict[str, Any]) -> None:
    revision = desk.ask("GET", "settings").json()["revision"]
    wrong = {
        "sla_days": {"critical": 0, "high": 366, "medium": "x", "low": 1},
        "sla_preset": "custom",
        "no_such": 1,
        "triage_model": "\x00",
    }
    answer = put(desk, {"expected_revision": revision, "settings": wrong})
    assert (answer.status_code, answer.json()["reason"]) == (422, Reason.SETTINGS_INVALID)
    assert all(name in answer.json()["detail"] for name in ("sla_days.critical", "sla_days.high", "sla_days.medium", "no_such"))
    in_schema(description, "PUT", f"{BASE}/settings", answer)
    assert put(desk, {"expected_revision": revision, "settings": {"triage_model": "\x00"}}).status_code == 422
    assert desk.ask("GET", "settings").json()["revision"] == revision


def test_addresses_of_recipients_are_for_those_who_may_change_them(desk: Desk, description: dict[str, Any]) -> None:
    """A webhook's address may hold a secret, and a mailbox is a person's."""
    to = [
        {"kind": "email", "address": "canary@acme.test"},
        {"kind": "slack", "channel": "#canary"},
        {"kind": "webhook", "url": "https://hooks.acme.test/canary"},
    ]
    revision = desk.ask("GET", "settings").json()["revision"]
    assert put(desk, {"expected_revision": revision, "settings": {"notice_recipients": to}}).status_code == 200
    for who, more in (("owner", {}), ("operator", {"params": {"owner": str(desk.synced.owner)}})):
        assert desk.ask("GET", "settings", who, **more).json()["settings"]["notice_recipients"] == to
    answer = desk.ask("GET", "settings", "viewer")
    assert answer.json()["settings"]["notice_recipients"] == [{"kind": one["kind"]} for one in to] and "canary" not in answer.text
    in_schema(description, "GET", f"{BASE}/settings", answer)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400), (b"[]", 400), (b"{", 400), (b"\xff", 400), (b"{}", 400), (b'{"expected_revision": "1", "settings": {}}', 400),
        (b'{"expected_revision": -1, "settings": {}}', 400), (b'{"expected_revision": 1.5, "settings": {}}', 400),
        (b'{"expected_revision": 1, "settings": []}', 400), (b'{"expected_revision": 1, "settings": {}, "enabled": true}', 400),
        (b'{"expected_revision": 99999999999, "settings": {}}', 400), (b'{"a":' * 70 + b"1" + b"}" * 70, 400), (b" " * (2**20 + 1), 413),
    ],
)  # fmt: skip
def test_bodies_in_another_shape_are_refused(desk: Desk, description: dict[str, Any], body: bytes, status: int) -> None:
    answer = put(desk, body)
    assert answer.status_code == status and answer.json()["reason"] in set(Reason)
    in_schema(description, "PUT", f"{BASE}/settings", answer)


# -- syncs -----------------------------------------------------------------------------------------------------------------


def test_a_sync_is_a_work_item_that_is_opened_once(desk: Desk, description: dict[str, Any]) -> None:
    asked = desk.ask("POST", "sync", json={})
    assert (asked.status_code, asked.json()["outcome"]) == (202, "accepted")
    in_schema(description, "POST", f"{BASE}/sync", asked)
    item = desk.synced.store.queue.get(UUID(asked.json()["item"]))
    assert item is not None and (item.service, item.owner_id, item.state) == ("security_sync", desk.synced.owner, "waiting")
    again = desk.ask("POST", "sync", json={})
    assert (again.status_code, again.json()) == (202, {"outcome": "waiting", "item": None})
    one = desk.ask("POST", "sync", json={"repository": 550_001})
    assert one.json()["outcome"] == "accepted" and desk.ask("POST", "sync", "other", json={}).json()["outcome"] == "accepted"
    offers = {(offer.kind, offer.service) for offer in desk.synced.store.queue.offers(limit=50)}
    assert ("start", "security_sync") in offers


@pytest.mark.parametrize(
    ("who", "body", "status", "reason"),
    [
        ("viewer", {}, 401, Reason.ROLE_NOT_ALLOWED),
        ("owner", {"repository": 1}, 409, Reason.NO_REPOSITORIES),
        ("owner", {"repository": 0}, 400, Reason.PAYLOAD_SHAPE_MISMATCH),
        ("owner", {"repository": "550001"}, 400, Reason.PAYLOAD_SHAPE_MISMATCH),
        ("owner", {"owner": "x"}, 400, Reason.PAYLOAD_SHAPE_MISMATCH),
        ("owner", [], 400, Reason.BODY_NOT_JSON),
        ("operator", {}, 400, Reason.OWNER_NOT_NAMED),
    ],
)
def test_syncs_that_are_refused_open_nothing(
    desk: Desk, description: dict[str, Any], who: str, body: Any, status: int, reason: Reason
) -> None:
    answer = desk.ask("POST", "sync", who, json=body)
    assert (answer.status_code, answer.json()["reason"]) == (status, reason)
    in_schema(description, "POST", f"{BASE}/sync", answer)


def test_an_owner_whose_agent_is_off_is_not_synced(database: Database) -> None:
    synced = Synced(database, 550_002)
    ask = partial(acts.request_sync, synced.store, synced.owner, None, role="member", actor="x")
    synced.store.owners.enable_service(synced.owner, "security_agent", False, actor="x")
    assert ask() == Refusal(Reason.SECURITY_DISABLED, "it is off")
    synced.store.owners.enable_service(synced.owner, "security_agent", True, actor="x")
    assert isinstance(ask(), UUID)


def test_a_viewer_saves_nothing_and_a_stranger_is_nobody(desk: Desk) -> None:
    body = {"expected_revision": desk.ask("GET", "settings").json()["revision"], "settings": {}}
    refused = put(desk, body, "viewer")
    assert (refused.status_code, refused.json()["reason"]) == (401, Reason.ROLE_NOT_ALLOWED)
    assert put(desk, body, "stranger").status_code == 401


# -- work ------------------------------------------------------------------------------------------------------------------


def opened(desk: Desk, answer: httpx.Response) -> tuple[str, str, dict[str, Any]]:
    """The accepted item: whose service it is, its state and what it is to do."""
    assert answer.status_code == 202, answer.text
    item = desk.synced.store.queue.get(UUID(answer.json()["item"]))
    assert item is not None and item.owner_id == desk.synced.owner
    return item.service, item.state, item.details


def test_an_analysis_is_opened_once_and_started_over_when_asked(desk: Desk, description: dict[str, Any]) -> None:
    finding = desk.synced.one(4).id
    path = f"findings/{finding}/analyze"
    first = desk.ask("POST", path, json={})
    in_schema(description, "POST", f"{BASE}/findings/{{finding}}/analyze", first)
    service, state, details = opened(desk, first)
    assert (service, state, details["mode"], details["requested_by"]) == (
        "security_analysis",
        "waiting",
        "auto",
        f"key:{desk.keys['owner'][:13]}",
    )
    again = desk.ask("POST", path, json={"deep": True})
    assert (again.status_code, again.json()["reason"]) == (409, Reason.ANALYSIS_ACTIVE)
    in_schema(description, "POST", f"{BASE}/findings/{{finding}}/analyze", again)
    _, _, details = opened(desk, desk.ask("POST", path, "operator", json={"restart": True}))
    assert (details["mode"], details["requested_by"]) == ("deep", "operator")


def test_a_dismissal_carries_reason_and_comment(desk: Desk, description: dict[str, Any]) -> None:
    path = f"findings/{desk.synced.one(5).id}/dismiss"
    body = rb'{"reason": "tolerable_risk", "comment": "behind\u0000 the proxy"}'
    asked = desk.ask("POST", path, content=body, headers={"Content-Type": "application/json"})
    in_schema(description, "POST", f"{BASE}/findings/{{finding}}/dismiss", asked)
    service, _, details = opened(desk, asked)
    assert (service, details["reason"], details["comment"]) == ("dismissal", "tolerable_risk", "behind the proxy")
    again = desk.ask("POST", path, json={"reason": "tolerable_risk"})
    assert (again.status_code, again.json()["reason"]) == (409, Reason.DISMISSAL_ACTIVE)


def test_a_remediation_says_why_there_is_none(desk: Desk, description: dict[str, Any]) -> None:
    answer = desk.ask("POST", f"findings/{desk.synced.one(6).id}/remediate", json={})
    assert (answer.status_code, answer.json()["reason"]) == (409, Reason.ANALYSIS_REQUIRED)
    in_schema(description, "POST", f"{BASE}/findings/{{finding}}/remediate", answer)


def test_a_waiting_remediation_is_listed_and_cancelled_once(desk: Desk, description: dict[str, Any]) -> None:
    finding = desk.synced.one(7).id
    details = {
        "finding_id": str(finding), "origin": "manual", "requested_by": "x", "analysis_id": str(desk.synced.store.analyses.of_finding(desk.synced.owner, desk.finding())[0].item_id),
        "fingerprint": "f", "findings": [str(finding)],
    }  # fmt: skip
    new = NewItem("remediation", f"remediation:{finding}", desk.synced.repository, 0, details)
    item = desk.synced.store.remediations.open(desk.synced.owner, new, lambda _item: [], actor="x")
    assert item is not None
    listed = desk.ask("GET", "remediations", "viewer")
    in_schema(description, "GET", f"{BASE}/remediations", listed)
    assert [(one["item_id"], one["state"]) for one in listed.json()["remediations"]] == [(str(item), "waiting")]
    assert desk.ask("GET", "remediations", "other").json() == {"remediations": []}
    path = f"remediations/{item}/cancel"
    foreign = desk.ask("POST", path, "other")
    assert (foreign.status_code, foreign.content) == (404, desk.ask("POST", f"remediations/{uuid4()}/cancel").content)
    assert desk.ask("POST", path, "viewer").status_code == 401
    done = desk.ask("POST", path)
    assert (done.status_code, done.json()) == (200, {"outcome": "cancelled"})
    in_schema(description, "POST", f"{BASE}/remediations/{{item}}/cancel", done)
    assert (desk.ask("POST", path, "operator").status_code, desk.ask("POST", path).json()["reason"]) == (409, Reason.MOVED_ON)


def test_commands_over_all_open_findings_count_each_of_them(desk: Desk, description: dict[str, Any]) -> None:
    before = len(desk.synced.store.queue.items(owner_id=desk.synced.owner, service="dismissal", limit=100))
    counted = desk.ask("POST", "dismiss", json={})
    in_schema(description, "POST", f"{BASE}/dismiss", counted)
    assert counted.json()["applied"] is False and sum(counted.json()["counted"].values()) == 6
    done = desk.ask("POST", "remediate", json={})
    in_schema(description, "POST", f"{BASE}/remediate", done)
    assert (done.json()["scanned"], done.json()["admitted"]) == (6, []) and sum(done.json()["skipped"].values()) == 6
    after = desk.synced.store.queue.items(owner_id=desk.synced.owner, service="dismissal", limit=100)
    assert len(after) == before


def test_repositories_tell_how_their_syncs_ended(desk: Desk, description: dict[str, Any]) -> None:
    store, owner, repository = desk.synced.store, desk.synced.owner, desk.synced.repository
    store.findings.begin_sync(owner, repository)
    store.findings.end_sync(owner, repository, outcome="synced", complete=True, alerts=8)
    answer = desk.ask("GET", "repositories", "viewer")
    in_schema(description, "GET", f"{BASE}/repositories", answer)
    (one,) = answer.json()["repositories"]
    assert (one["repository_id"], one["outcome"], one["alerts"]) == (repository, "synced", 8) and one["succeeded_at"]


def test_notices_and_quarantine_are_listed(desk: Desk, description: dict[str, Any]) -> None:
    desk.synced.store.findings.quarantine(
        desk.synced.owner, desk.synced.repository, [("99", str(Reason.ALERT_MALFORMED), "state: unknown")]
    )
    alerts = desk.ask("GET", "quarantine", "viewer")
    in_schema(description, "GET", f"{BASE}/quarantine", alerts)
    assert [(one["source_id"], one["detail"]) for one in alerts.json()["alerts"]] == [("99", "state: unknown")]
    finding = desk.synced.one(8).id
    new = NewItem(
        "notice", f"{finding}:sla_breach", desk.synced.repository, 0, {"finding_id": str(finding), "kind": "sla_breach"}
    )
    assert desk.synced.store.queue.open(desk.synced.owner, new, actor="platform") is not None
    notices = desk.ask("GET", "notices")
    in_schema(description, "GET", f"{BASE}/notices", notices)
    assert [(one["kind"], one["messages"]) for one in notices.json()["notices"]] == [("sla_breach", [])]
    assert desk.ask("GET", "quarantine", "other").json() == {"alerts": []}
    assert desk.ask("GET", "notices", "other").json() == {"notices": []}


@pytest.mark.parametrize("act", ["analyze", "dismiss", "remediate"])
def test_asked_of_a_finding_that_is_anothers_or_nobodys_the_answer_is_one(desk: Desk, act: str) -> None:
    ids = (desk.other.one(1).id, uuid4(), "x", "%00")
    wish = {"reason": "not_used"} if act == "dismiss" else {}
    answers = {desk.ask("POST", f"findings/{one}/{act}", json=wish).content for one in ids}
    assert answers == {b'{"outcome":"not_found"}'}
    refused = desk.ask("POST", f"findings/{desk.synced.one(1).id}/{act}", "viewer", json={})
    assert (refused.status_code, refused.json()["reason"]) == (401, Reason.ROLE_NOT_ALLOWED)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("analyze", {"deep": "yes"}), ("analyze", {"x": 1}), ("analyze", []), ("dismiss", {}), ("dismiss", {"reason": "bored"}),
        ("dismiss", {"reason": "not_used", "comment": "x" * 4_001}), ("dismiss", {"reason": None}), ("remediate", {"retry": 1}),
        ("remediate", {"owner": "x"}),
    ],
)  # fmt: skip
def test_wishes_in_another_shape_are_refused(desk: Desk, description: dict[str, Any], path: str, body: Any) -> None:
    answer = desk.ask("POST", f"findings/{desk.finding()}/{path}", json=body)
    assert answer.status_code == 400 and answer.json()["reason"] in (Reason.PAYLOAD_SHAPE_MISMATCH, Reason.BODY_NOT_JSON)
    in_schema(description, "POST", f"{BASE}/findings/{{finding}}/{path}", answer)
