"""The ingress as its callers see it: its own process, real sockets, a real PostgreSQL."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import text

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.ingress.keys import ensure_operator_key
from kilo_pipelines.ingress.metrics import FRESH
from tests.support.http import HTTP
from tests.support.ingress import INSTALLATION, REPOSITORY, SECRET, IngressWorld, lifecycle, pull_request, sign, world

__all__ = ["world"]


def _metric(world: IngressWorld, line: str) -> float:
    for row in world.scrape(world.admin).text.splitlines():
        if row.startswith(line + " "):
            return float(row.rsplit(" ", 1)[1])
    return 0.0


def test_it_starts_without_dagster() -> None:
    """The public listener must be back soon after a crash, and the orchestrator's imports cost three seconds more."""
    code = (
        "import sys; import kilo_pipelines.ingress.__main__;"
        "print([m for m in ('dagster', 'pandas', 'github', 'celery') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_delivery_is_stored_before_it_is_answered(world: IngressWorld) -> None:
    payload = pull_request()
    body = json.dumps(payload).encode()
    answer = world.webhook(payload)
    assert (answer.status_code, answer.json()["outcome"]) == (202, "stored")
    stored = next(row for row in world.deliveries() if str(row["id"]) == answer.json()["delivery"])
    assert bytes(stored["body"]) == body
    assert (stored["event"], stored["action"], stored["state"]) == ("pull_request", "opened", "received")
    assert SECRET not in json.dumps(stored["headers"]) and sign(body) not in json.dumps(stored["headers"])


def test_a_redelivery_resumes_before_admission_and_is_a_duplicate_after_it(world: IngressWorld) -> None:
    payload, delivery = pull_request(), str(uuid4())
    first = world.webhook(payload, delivery=delivery)
    again = world.webhook(payload, delivery=delivery)
    assert (again.status_code, again.json()) == (202, {"outcome": "resumed", "delivery": first.json()["delivery"]})
    world.store.inbox.admit_next(lambda tx: tx.skip(Reason.ACTION_IGNORED), 1_000)
    after = world.webhook(payload, delivery=delivery)
    assert (after.status_code, after.json()["reason"]) == (200, "duplicate_delivery")


def test_the_same_body_under_a_new_delivery_id_is_no_new_delivery(world: IngressWorld) -> None:
    """The id header is outside the signature: whoever has one signed body must not multiply it."""
    payload = pull_request()
    assert world.webhook(payload).json()["delivery"] == world.webhook(payload).json()["delivery"]


def test_a_delivery_id_with_another_body_is_refused(world: IngressWorld) -> None:
    delivery = str(uuid4())
    assert world.webhook(pull_request(), delivery=delivery).status_code == 202
    answer = world.webhook(pull_request(), delivery=delivery)
    assert (answer.status_code, answer.json()["reason"]) == (409, "delivery_id_reused")


def test_wrong_missing_and_truncated_signatures_are_401(world: IngressWorld) -> None:
    body = json.dumps(pull_request()).encode()
    for signature in (sign(body, "other"), sign(body)[:-1], sign(body + b" "), "", "sha256=", sign(body).upper()):
        answer = world.webhook(None, body=body, **{"X-Hub-Signature-256": signature})
        assert (answer.status_code, answer.json()["reason"]) == (401, "signature_invalid")
    headers = {"X-GitHub-Event": "pull_request", "X-GitHub-Delivery": str(uuid4())}
    assert world.post("/webhooks/github", body, headers).status_code == 401


@pytest.mark.parametrize("missing", ["X-GitHub-Event", "X-GitHub-Delivery"])
def test_a_missing_header_is_400(world: IngressWorld, missing: str) -> None:
    answer = world.webhook(pull_request(), **{missing: ""})
    assert (answer.status_code, answer.json()["reason"]) == (400, "header_missing")


def test_an_event_without_an_installation_id_is_400_and_an_unknown_one_404(world: IngressWorld) -> None:
    for installation in (None, {}, {"id": "4711"}, {"id": True}, {"id": 0}, [INSTALLATION]):
        answer = world.webhook(pull_request(installation=installation))
        assert (answer.status_code, answer.json()["reason"]) == (400, "installation_id_missing")
    answer = world.webhook(pull_request(installation={"id": 1}))
    assert (answer.status_code, answer.json()["reason"]) == (404, "integration_unknown")


def test_an_installation_of_two_owners_serves_neither(world: IngressWorld) -> None:
    for owner in (world.owner, world.other):
        world.store.owners.connect(owner.id, provider="github", installation_id=5150, account="x", repositories=[], actor="test")
    answer = world.webhook(pull_request(installation={"id": 5150}))
    assert answer.status_code in (404, 409) and answer.json()["reason"] == "integration_ambiguous"


def test_ping_is_answered_and_an_unknown_event_is_stored_with_its_reason(world: IngressWorld) -> None:
    assert world.webhook({"zen": "Keep it logically awesome.", "hook_id": 1, "hook": {}}, "ping").status_code == 200
    answer = world.webhook({"action": "opened", "issue": {"number": 1}, "installation": {"id": INSTALLATION}}, "issues")
    assert (answer.status_code, answer.json()["reason"]) == (200, "event_unknown")
    stored = next(row for row in world.deliveries() if str(row["id"]) == answer.json()["delivery"])
    assert (stored["state"], stored["reason"]) == ("skipped", "event_unknown")


def test_a_pull_request_can_not_be_hidden_under_another_event_name(world: IngressWorld) -> None:
    """Stored as an unknown event, it would make GitHub's real delivery a duplicate."""
    payload = pull_request()
    for name in ("issues", "installation", "installation_repositories", "ping"):
        assert world.webhook(payload, name).json()["reason"] == "payload_shape_mismatch"
    assert world.webhook(payload).json()["outcome"] == "stored"


def test_installation_events_keep_the_integration_in_step(world: IngressWorld) -> None:
    assert world.webhook(lifecycle("suspend"), "installation").json()["outcome"] == "applied"
    answer = world.webhook(pull_request())
    assert (answer.status_code, answer.json()["reason"]) == (200, "integration_suspended")
    assert world.webhook(lifecycle("unsuspend"), "installation").json()["outcome"] == "applied"
    assert world.webhook(pull_request()).status_code == 202
    added = {"id": 31_337, "full_name": "octo/second", "name": "second", "private": True}
    for changes in (
        {"repositories_added": [added], "repositories_removed": []},
        {"repositories_added": [], "repositories_removed": [added]},
    ):
        action = "added" if changes["repositories_added"] else "removed"
        assert world.webhook(lifecycle(action, **changes), "installation_repositories").status_code == 200
        listed = world.store.owners.integrations(world.owner.id)[0]["repositories"]
        assert ("octo/second" in listed) == (action == "added")
    again = {"id": REPOSITORY, "full_name": "octo/demo", "private": True}
    world.webhook(lifecycle("added", repositories_added=[again], repositories_removed=[]), "installation_repositories")
    known = world.store.owners.repository(world.owner.id, REPOSITORY)
    assert known is not None and known.default_branch == "main"


def test_a_repository_is_followed_through_its_names_until_it_is_deleted(world: IngressWorld) -> None:
    number = 31_338
    listed = {"id": number, "full_name": "octo/before", "name": "before", "private": True}
    world.webhook(lifecycle("added", repositories_added=[listed], repositories_removed=[]), "installation_repositories")

    def told(action: str, full_name: str, **more: Any) -> tuple[str, list[str]]:
        repository = {"id": number, "full_name": full_name, "private": True}
        body = {"action": action, "repository": repository, "installation": {"id": INSTALLATION}, "sender": {}, **more}
        outcome = world.webhook(body, "repository").json()["outcome"]
        return outcome, [
            name for name in world.store.owners.integrations(world.owner.id)[0]["repositories"] if name != "octo/demo"
        ]

    assert told("renamed", "octo/after", changes={"repository": {"name": {"from": "before"}}}) == ("applied", ["octo/after"])
    assert told("edited", "octo/other") == ("applied", ["octo/after"])
    assert told("transferred", "duck/after", changes={}) == ("applied", ["duck/after"])
    assert told("deleted", "duck/after") == ("applied", [])
    assert told("renamed", "octo/again", changes={}) == ("applied", []), "a name brings nothing back"


def test_a_replayed_suspension_turns_nothing_back(world: IngressWorld) -> None:
    """Whoever recorded a signed event may send it again: its delivery id is outside the signature."""
    suspended = lifecycle("suspend")
    assert world.webhook(suspended, "installation").json()["outcome"] == "applied"
    assert world.webhook(lifecycle("unsuspend"), "installation").json()["outcome"] == "applied"
    assert world.webhook(suspended, "installation").json()["outcome"] == "duplicate"
    assert world.webhook(pull_request()).status_code == 202


def test_a_deleted_installation_is_cut_off_and_a_new_one_is_ignored(world: IngressWorld) -> None:
    world.connect(world.other.id, 6001)
    gone = lifecycle("deleted")
    gone["installation"]["id"] = 6001
    assert world.webhook(gone, "installation").json()["outcome"] == "applied"
    assert world.webhook(pull_request(installation={"id": 6001})).status_code == 404
    new = lifecycle("created", repositories=[])
    new["installation"]["id"] = 6002
    answer = world.webhook(new, "installation")
    assert (answer.status_code, answer.json()["outcome"]) == (200, "ignored")


def _session(world: IngressWorld) -> tuple[str, str]:
    """A session that waits for its callback, and the token."""
    session, item, token = uuid4(), uuid4(), uuid4().hex
    with world.store.database.system() as connection:
        connection.execute(
            text(
                "insert into work_items (owner_id, id, service, subject_key, repository_id, not_before, created_at, updated_at)"
                " values (:owner, :item, 'code_review', :key, :repository, now(), now(), now())"
            ),
            {"owner": world.owner.id, "item": item, "key": str(item), "repository": REPOSITORY},
        )
        connection.execute(
            text(
                "insert into sessions (owner_id, id, item_id, attempt, item_fence, spec, deadline, created_at)"
                " values (:owner, :session, :item, 1, 1, '{}', now(), now())"
            ),
            {"owner": world.owner.id, "session": session, "item": item},
        )
        connection.execute(
            text(
                "insert into callback_tokens (owner_id, session_id, token_hash, expires_at)"
                " values (:owner, :session, :hash, now() + interval '1 hour')"
            ),
            {"owner": world.owner.id, "session": session, "hash": hashlib.sha256(token.encode()).digest()},
        )
    return str(session), token


def _call_back(world: IngressWorld, session: str, token: str | None, body: bytes) -> httpx.Response:
    return world.post(f"/callbacks/sessions/{session}", body, {"X-Callback-Token": token} if token is not None else {})


def test_a_callback_is_taken_once_and_repeated_harmlessly(world: IngressWorld) -> None:
    session, token = _session(world)
    body = json.dumps({"status": "completed", "more": {"unknown": ["fields"]}}).encode()
    assert _call_back(world, session, token, body).status_code in (200, 202)
    again = _call_back(world, session, token, body)
    assert (again.status_code, again.json()["outcome"]) == (200, "duplicate")


def test_a_second_callback_with_another_body_is_409_and_counted(world: IngressWorld) -> None:
    session, token = _session(world)
    before = _metric(world, 'kilo_callbacks_total{outcome="callback_conflict"}')
    assert _call_back(world, session, token, b'{"status": "completed"}').status_code in (200, 202)
    assert _call_back(world, session, token, b'{"status": "failed"}').status_code == 409
    assert _metric(world, 'kilo_callbacks_total{outcome="callback_conflict"}') == before + 1


def test_missing_wrong_and_foreign_tokens_and_unknown_sessions_answer_alike(world: IngressWorld) -> None:
    """Nobody learns which sessions exist."""
    session, token = _session(world)
    _, foreign = _session(world)
    body = b'{"status": "completed"}'
    answers = [
        _call_back(world, session, None, body),
        _call_back(world, session, "", body),
        _call_back(world, session, "wrong", body),
        _call_back(world, session, foreign, body),
        _call_back(world, str(uuid4()), token, body),
        _call_back(world, "not-a-session", token, body),
        _call_back(world, session, None, b"{"),
    ]
    assert {(answer.status_code, answer.text) for answer in answers} == {(401, answers[0].text)}


def test_a_late_callback_is_410(world: IngressWorld) -> None:
    session, token = _session(world)
    with world.store.database.system() as connection:
        connection.execute(
            text("update callback_tokens set expires_at = now() - :by where session_id = :id"),
            {"by": timedelta(seconds=1), "id": session},
        )
    answer = _call_back(world, session, token, b'{"status": "completed"}')
    assert (answer.status_code, answer.json()["reason"]) == (410, "callback_expired")


ROUTES = {
    ("GET", "/api/v1/reviews"): {"operator", "owner", "viewer", "stranger"},
    ("GET", "/api/v1/owners"): {"operator", "owner", "viewer", "stranger"},
    ("GET", "/api/v1/integrations"): {"operator", "owner", "viewer", "stranger"},
    ("GET", "/api/v1/openapi.json"): {"operator", "owner", "viewer", "stranger"},
    ("POST", "/api/v1/reviews/dispatch"): {"operator", "owner", "stranger"},
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("who", ["nobody", "forger", "operator", "owner", "viewer", "stranger"])
def test_each_admin_route_serves_its_principals_and_nobody_else(world: IngressWorld, route: tuple[str, str], who: str) -> None:
    keys = {
        "nobody": None,
        "forger": "kilo_forged",
        "operator": world.operator_key,
        "owner": world.owner_key,
        "viewer": world.viewer_key,
        "stranger": world.stranger_key,
    }
    status = world.api(*route, keys[who], **({"json": {}} if route[0] == "POST" else {})).status_code
    assert (status in (401, 403)) == (who not in ROUTES[route])
    assert status < 500


def test_an_owners_key_sees_its_owner_only(world: IngressWorld) -> None:
    everybody = {one["id"] for one in world.api("GET", "/api/v1/owners", world.operator_key).json()["owners"]}
    mine = [one["id"] for one in world.api("GET", "/api/v1/owners", world.owner_key).json()["owners"]]
    assert mine == [str(world.owner.id)] and everybody > set(mine)
    world.connect(world.other.id, 6003)
    seen = world.api("GET", "/api/v1/integrations", world.stranger_key).json()["integrations"]
    assert {one["owner_id"] for one in seen} == {str(world.other.id)}


def _review(world: IngressWorld) -> str:
    """A waiting review of the owner, admitted from a stored delivery."""
    details = {
        "repository_id": REPOSITORY,
        "full_name": "octo/demo",
        "pull_number": 7,
        "title": "Add a cache",
        "author": "octocat",
        "author_type": "User",
        "url": "http://localhost/octo/demo/pull/7",
        "base_ref": "main",
        "base_sha": "b" * 40,
        "head_ref": "feature",
        "head_sha": uuid4().hex,
        "trigger": "webhook",
    }
    from kilo_pipelines.store import NewItem

    item = world.store.queue.open(world.owner.id, NewItem("code_review", str(uuid4()), REPOSITORY, 0, details), actor="test")
    return str(item)


def test_a_review_is_cancelled_and_dispatched_by_its_owner_only(world: IngressWorld) -> None:
    review = _review(world)
    assert world.api("GET", f"/api/v1/reviews/{review}", world.viewer_key).json()["pull_number"] == 7
    assert world.api("GET", f"/api/v1/reviews/{review}", world.stranger_key).status_code == 404
    assert world.api("POST", f"/api/v1/reviews/{review}/cancel", world.stranger_key).status_code == 404
    assert world.api("POST", f"/api/v1/reviews/{review}/cancel", world.viewer_key).status_code in (401, 403)
    assert world.api("POST", f"/api/v1/reviews/{review}/cancel", world.owner_key).json()["outcome"] == "cancelled"
    assert world.api("POST", f"/api/v1/reviews/{review}/cancel", world.owner_key).status_code == 409
    wanted = {"repository": "octo/demo", "pull_number": 7}
    assert world.api("POST", "/api/v1/reviews/dispatch", world.stranger_key, json=wanted).status_code == 404
    answer = world.api("POST", "/api/v1/reviews/dispatch", world.owner_key, json=wanted)
    assert (answer.status_code, answer.json()) == (202, {"outcome": "dispatched", "review": review})
    assert world.api("POST", "/api/v1/reviews/dispatch", world.owner_key, json=wanted).status_code == 409
    assert world.api("GET", "/api/v1/reviews/none", world.owner_key).status_code == 404


def test_requests_under_a_foreign_name_are_refused_on_both_listeners(world: IngressWorld) -> None:
    """A page in somebody's browser that points its own name at us gets nothing."""
    for port in (world.public, world.admin):
        answer = HTTP.get(f"http://127.0.0.1:{port}/health", headers={"Host": "evil.example"})
        assert 400 <= answer.status_code < 500
        assert HTTP.get(f"http://localhost:{port}/health").status_code == 200


def test_the_public_listener_has_no_admin_route_and_the_other_way_round(world: IngressWorld) -> None:
    for path in ("/metrics", "/api/v1/reviews", "/api/v1/owners"):
        answer = HTTP.get(f"http://127.0.0.1:{world.public}{path}", headers={"Authorization": f"Bearer {world.operator_key}"})
        assert answer.status_code == 404
    assert world.api("POST", "/webhooks/github", world.operator_key).status_code == 404


def test_metrics_are_told_for_the_scrapers_token_alone(world: IngressWorld) -> None:
    for key in (None, "forged", world.operator_key, world.owner_key, world.viewer_key, world.stranger_key):
        answer = world.api("GET", "/metrics", key)
        assert (answer.status_code, answer.json()["reason"]) == (401, "key_refused")
    assert world.api("GET", "/api/v1/health", world.metrics_token).status_code == 401, "it opens nothing else"
    told = world.scrape(world.admin, Host="10.1.2.3:8081")  # by a pod's address
    assert (told.status_code, "kilo_http_responses_total" in told.text, "kilo_schema_info" in told.text) == (200, True, True)


def test_a_public_listener_by_itself_tells_what_it_counts(world: IngressWorld) -> None:
    world.stop_ingress()
    world.start("public")
    try:
        assert world.webhook(pull_request()).status_code == 202
        assert HTTP.get(f"http://127.0.0.1:{world.public}/metrics").status_code == 401
        told = world.scrape(world.public)
        assert 'kilo_deliveries_total{outcome="stored"} 1.0' in told.text and "kilo_schema_info" not in told.text
        with pytest.raises(httpx.ConnectError):
            world.scrape(world.admin)
    finally:
        world.stop_ingress()
        world.start()


def test_metrics_count_what_was_refused(world: IngressWorld) -> None:
    before = _metric(world, 'kilo_deliveries_total{outcome="signature_invalid"}')
    world.webhook(pull_request(), **{"X-Hub-Signature-256": "sha256=" + "0" * 64})
    assert _metric(world, 'kilo_deliveries_total{outcome="signature_invalid"}') == before + 1
    before = _metric(world, 'kilo_deliveries_total{outcome="body_not_json"}')
    world.webhook(None, body=b"{")
    assert _metric(world, 'kilo_deliveries_total{outcome="body_not_json"}') == before + 1


def test_the_operators_key_is_made_once_and_renewed_when_the_database_forgot_it(world: IngressWorld) -> None:
    path = world.home / "secrets" / "operator-api-key"
    key = ensure_operator_key(world.store, path)
    assert ensure_operator_key(world.store, path) == key
    assert path.stat().st_mode & 0o777 == 0o600
    assert world.api("GET", "/api/v1/health", key).status_code == 200
    path.write_text("kilo_of_another_database")
    assert ensure_operator_key(world.store, path) not in ("kilo_of_another_database", key)


def test_without_the_database_a_delivery_is_503_and_taken_when_it_is_back(world: IngressWorld) -> None:
    """GitHub shows the failed delivery; redelivered, it is stored. Nothing was promised in between."""
    payload = pull_request()
    world.stop_database()
    try:
        answer = world.webhook(payload)
        assert (answer.status_code, answer.json()["reason"]) == (503, "store_unavailable")
        assert world.api("GET", "/api/v1/reviews", world.operator_key).status_code == 503
        deadline = time.monotonic() + 4 * FRESH.total_seconds()
        while "kilo_database_up 0.0" not in (told := world.scrape(world.admin).text):
            assert time.monotonic() < deadline, "figures of earlier are told for a few seconds and no longer"
            time.sleep(0.5)
        assert 'kilo_deliveries_total{outcome="store_unavailable"}' in told
        assert "kilo_schema_info" not in told
    finally:
        world.start_database()
    assert world.webhook(payload).status_code == 202


def test_without_a_secret_everything_is_503_and_stopping_is_quick(world: IngressWorld) -> None:
    path = world.home / "secrets" / "github-webhook-secret"
    path.write_text("\n")
    assert world.stop_ingress() < 5
    world.start()
    try:
        answer = world.webhook(pull_request())
        assert (answer.status_code, answer.json()["reason"]) == (503, "webhook_secret_missing")
    finally:
        path.write_text(SECRET)
        world.stop_ingress()
        world.start()
    assert world.webhook(pull_request()).status_code == 202
