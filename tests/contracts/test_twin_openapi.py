"""Every answer of the twin against GitHub's published OpenAPI description (npm `@octokit/openapi`)."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from openapi_schema_validator import OAS30Validator
from referencing import Registry
from referencing.jsonschema import DRAFT4

from tests.support.http import HTTP
from tests.support.sessions import SessionWorld

DESCRIPTION = Path(__file__).parents[2] / ".cache/openapi/node_modules/@octokit/openapi/generated/api.github.com.json"


@pytest.fixture(scope="module")
def description() -> dict[str, Any]:
    assert DESCRIPTION.exists(), "GitHub's description is missing: run `make deps`"
    found: dict[str, Any] = json.loads(DESCRIPTION.read_text())
    _allow_null(found)
    return found


def _allow_null(node: Any) -> None:
    """`nullable` with `enum` means that null is one of the values; the validator wants it listed."""
    if isinstance(node, dict):
        if node.get("nullable") and "enum" in node and None not in node["enum"]:
            node["enum"].append(None)
        for value in node.values():
            _allow_null(value)
    elif isinstance(node, list):
        for value in node:
            _allow_null(value)


@pytest.fixture(scope="module")
def world() -> Iterator[SessionWorld]:
    found = SessionWorld()
    yield found
    found.close()


class Api:
    """Asks the twin and holds each answer against the operation's schema."""

    def __init__(self, world: SessionWorld, description: dict[str, Any]) -> None:
        self.world, self.description = world, description
        self.base = f"http://localhost:{world.port}/api/v3"
        self.paths = {re.compile("^" + re.sub(r"\{[^}]+\}", "[^/]+", path) + "$"): path for path in description["paths"]}
        self.registry: Any = Registry().with_resource("urn:github", DRAFT4.create_resource(description))
        self.checked: set[tuple[str, str, int]] = set()
        at = int(time.time())
        self.app = jwt.encode(
            {"iat": at, "exp": at + 300, "iss": str(world.credentials["app_id"])},
            world.credentials["private_key_pem"],
            algorithm="RS256",
        )
        self.token = ""

    def ask(self, method: str, path: str, *, expected: int, body: Any = None, app: bool = False, token: str | None = None) -> Any:
        bearer = token if token is not None else self.app if app else self.token
        answer = HTTP.request(method, self.base + path, json=body, headers={"authorization": f"Bearer {bearer}"}, timeout=30)
        assert answer.status_code == expected, answer.text
        decoded = answer.json()
        template = self._template(path.split("?")[0])
        pointer = f"#/paths/{template.replace('/', '~1')}/{method.lower()}/responses/{expected}"
        while "$ref" in self._resolve(pointer):
            pointer = self._resolve(pointer)["$ref"]
        if "content" in self._resolve(pointer):
            schema = {"$ref": f"urn:github{pointer}/content/application~1json/schema"}
            problems = list(OAS30Validator(schema, registry=self.registry).iter_errors(decoded))
            shown = [f"{'/'.join(map(str, one.absolute_path))}: {one.message[:200]}" for one in problems[:5]]
            assert not problems, f"{method} {template}: {shown}"
            self.checked.add((method, template, expected))
        return decoded

    def _template(self, path: str) -> str:
        exact = [template for pattern, template in self.paths.items() if pattern.match(path)]
        assert exact, f"GitHub has no {path}"
        return min(exact, key=lambda one: one.count("{"))

    def _resolve(self, reference: str) -> Any:
        node: Any = self.description
        for part in reference.removeprefix("#/").split("/"):
            node = node.get(part.replace("~1", "/"), {})
        return node


def test_every_answer_follows_githubs_description(world: SessionWorld, description: dict[str, Any]) -> None:
    api = Api(world, description)
    pull = world.control("open-pull", kind="planted")
    number, installation = pull["number"], world.credentials["installation_id"]
    repo = f"/repos/{pull['repository']}"
    api.ask("GET", "/app", expected=200, app=True)
    api.ask("GET", "/app/installations", expected=200, app=True)
    api.ask("GET", f"/app/installations/{installation}", expected=200, app=True)
    minted = api.ask("POST", f"/app/installations/{installation}/access_tokens", expected=201, app=True, body={})
    api.token = minted["token"]
    api.ask("GET", "/installation/repositories", expected=200)
    api.ask("GET", repo, expected=200)
    api.ask("GET", f"{repo}/pulls/{number}", expected=200)
    api.ask("GET", f"{repo}/pulls/{number}/files", expected=200)
    review = {
        "commit_id": pull["head_sha"],
        "body": "b",
        "event": "COMMENT",
        "comments": [{"path": "orders/db.py", "line": 20, "body": "x"}],
    }
    api.ask("POST", f"{repo}/pulls/{number}/reviews", expected=200, body=review)
    api.ask("GET", f"{repo}/pulls/{number}/reviews", expected=200)
    api.ask("GET", f"{repo}/pulls/{number}/comments", expected=200)
    comment = api.ask("POST", f"{repo}/issues/{number}/comments", expected=201, body={"body": "hello"})
    api.ask("PATCH", f"{repo}/issues/comments/{comment['id']}", expected=200, body={"body": "again"})
    api.ask("GET", f"{repo}/issues/{number}/comments", expected=200)
    api.ask("POST", f"{repo}/issues/{number}/reactions", expected=201, body={"content": "eyes"})
    api.ask("POST", f"{repo}/issues/{number}/reactions", expected=200, body={"content": "eyes"})
    api.ask("GET", f"{repo}/issues/{number}/reactions", expected=200)
    check = api.ask(
        "POST", f"{repo}/check-runs", expected=201, body={"name": "c", "head_sha": pull["head_sha"], "status": "in_progress"}
    )
    done = {"status": "completed", "conclusion": "success", "output": {"title": "t", "summary": "s"}}
    api.ask("PATCH", f"{repo}/check-runs/{check['id']}", expected=200, body=done)
    api.ask("GET", f"{repo}/check-runs/{check['id']}", expected=200)
    api.ask("GET", f"{repo}/commits/{pull['head_sha']}/check-runs", expected=200)
    api.ask("GET", f"{repo}/commits/{pull['head_sha']}", expected=200)
    api.ask("GET", f"{repo}/compare/main...{pull['head_sha']}", expected=200)
    api.ask("POST", f"{repo}/statuses/{pull['head_sha']}", expected=201, body={"state": "success"})
    api.ask("GET", f"{repo}/commits/{pull['head_sha']}/statuses", expected=200)
    log = api.ask("GET", "/app/hook/deliveries?per_page=2&status=failure", expected=200, app=True)
    assert log, "nobody listens to this twin"
    api.ask("GET", f"/app/hook/deliveries/{log[0]['id']}", expected=200, app=True)
    api.ask("POST", f"/app/hook/deliveries/{log[0]['id']}/attempts", expected=202, app=True)
    assert len(api.checked) >= 26


def test_answers_about_alerts_follow_githubs_description(world: SessionWorld, description: dict[str, Any]) -> None:
    """Alerts of every kind that the seed makes, their dismissal, a pull request; and their refusals."""
    api = Api(world, description)
    path = f"/app/installations/{world.credentials['installation_id']}/access_tokens"
    made = world.control("seed-alerts", count=150, repositories=["warehouse"])["repositories"]
    api.token = api.ask("POST", path, expected=201, app=True, body={"permissions": {"vulnerability_alerts": "write"}})["token"]
    repo = f"/repos/{made[0]['repository']}"
    alerts = api.ask("GET", f"{repo}/dependabot/alerts?per_page=100", expected=200)
    assert len(alerts) == 100 and {one["state"] for one in alerts} == {"open", "fixed", "dismissed", "auto_dismissed"}
    assert {one["security_vulnerability"]["first_patched_version"] is None for one in alerts} == {True, False}
    number = next(one["number"] for one in alerts if one["state"] == "open")
    here = f"{repo}/dependabot/alerts/{number}"
    api.ask("GET", here, expected=200)
    api.ask("PATCH", here, expected=422, body={"state": "dismissed"})
    api.ask(
        "PATCH", here, expected=422, body={"state": "dismissed", "dismissed_reason": "not_used", "dismissed_comment": "x" * 281}
    )
    dismissal = {"state": "dismissed", "dismissed_reason": "not_used", "dismissed_comment": "x" * 280}
    assert api.ask("PATCH", here, expected=200, body=dismissal)["dismissed_reason"] == "not_used"
    assert api.ask("PATCH", here, expected=200, body={"state": "open"})["dismissed_at"] is None
    for wrong in ({"state": "open"}, {"state": "fixed"}, {"assignees": []}, {"state": "dismissed", "dismissed_reason": "no"}, []):
        api.ask("PATCH", here, expected=422, body=wrong)
    api.ask("GET", f"{repo}/dependabot/alerts/9999", expected=404)
    api.ask("GET", f"{repo}/dependabot/alerts?page=1", expected=400)
    api.ask("GET", f"{repo}/dependabot/alerts?severity=urgent", expected=422)
    world.control("set-repository", repository=made[0]["repository"], alerts_enabled=False)
    assert "disabled" in api.ask("GET", f"{repo}/dependabot/alerts", expected=403)["message"]
    assert "disabled" in api.ask("PATCH", here, expected=403, body=dismissal)["message"]
    api.ask("GET", f"{repo}/pulls", expected=200, token=_pulls(api, path))
    shop = "/repos/acme/storefront"
    wanted = {"title": "t", "body": "b", "head": "acme:main", "base": "main"}
    api.ask("POST", f"{shop}/pulls", expected=422, token=_pulls(api, path), body=wanted)
    wanted["head"] = str(_branch(world))
    opened = api.ask("POST", f"{shop}/pulls", expected=201, token=_pulls(api, path), body=wanted)
    here = f"{shop}/pulls/{opened['number']}"
    for state in ("closed", "open"):
        assert api.ask("PATCH", here, expected=200, token=_pulls(api, path), body={"state": state})["state"] == state
    api.ask("PATCH", here, expected=422, token=_pulls(api, path), body={"state": "merged"})
    found = api.ask("GET", f"{shop}/pulls?state=open&head=acme:{wanted['head']}", expected=200, token=_pulls(api, path))
    assert [one["number"] for one in found] == [opened["number"]]
    assert api.ask("GET", f"{shop}/pulls?head=acme:other", expected=200, token=_pulls(api, path)) == []
    world.control("merge", repository="acme/storefront", number=opened["number"])
    assert api.ask("GET", f"{shop}/pulls/{opened['number']}", expected=200, token=_pulls(api, path))["merged"] is True


def _pulls(api: Api, path: str) -> str:
    return str(api.ask("POST", path, expected=201, app=True, body={"permissions": {"pull_requests": "write"}})["token"])


def _branch(world: SessionWorld) -> str:
    """A branch of the storefront with one commit more than its default branch."""
    git = ["git", "-C", str(world.twin_home / "git/acme/storefront.git"), "-c", "user.name=a", "-c", "user.email=a@acme.test"]
    commit = [*git, "commit-tree", "main^{tree}", "-p", "main", "-m", "nothing"]
    head = subprocess.run(commit, capture_output=True, check=True).stdout.decode().strip()
    subprocess.run([*git, "update-ref", "refs/heads/patch-1", head], check=True)
    return "patch-1"


def _told_of_the_repository(api: Api, full_name: str) -> None:
    """The App hears of a new repository before anything happens in it."""
    headers = {"authorization": f"Bearer {api.app}"}
    for one in api.ask("GET", "/app/hook/deliveries?per_page=100", expected=200, app=True):
        if (one["event"], one["action"]) == ("installation_repositories", "added"):
            found = HTTP.get(f"{api.base}/app/hook/deliveries/{one['id']}", headers=headers).json()["request"]["payload"]
            if full_name in [repository["full_name"] for repository in found["repositories_added"]]:
                return
    raise AssertionError("the App was not told")


def test_webhooks_about_alerts_follow_githubs_description(world: SessionWorld, description: dict[str, Any]) -> None:
    """Each move of an alert, as GitHub names it."""
    api = Api(world, description)
    world.control("seed-alerts", count=30, repositories=["depot"])
    _told_of_the_repository(api, "acme/depot")
    repo = "acme/depot"
    path = f"/app/installations/{world.credentials['installation_id']}/access_tokens"
    api.token = api.ask("POST", path, expected=201, app=True, body={})["token"]
    open_alert = api.ask("GET", f"/repos/{repo}/dependabot/alerts?state=open", expected=200)[0]["number"]
    moves = ["dismissed", "reopened", "auto_dismissed", "auto_reopened", "fixed", "reintroduced"]
    for action in moves:
        more = {"by": "grace", "reason": "not_used", "comment": "c"} if action == "dismissed" else {}
        world.control("move-alert", repository=repo, number=open_alert, action=action, **more)
    happened = [one["action"] for one in world.control("change-alerts", repository=repo, count=12)["changes"]]
    expected = [*moves, *(one for one in happened if one != "severity_raised")]
    assert "created" in expected

    def sent() -> list[dict[str, Any]]:
        listed = api.ask("GET", "/app/hook/deliveries?per_page=100", expected=200, app=True)
        return [one for one in reversed(listed) if one["event"] == "dependabot_alert" and one["repository_id"] == depot]

    depot = api.ask("GET", f"/repos/{repo}", expected=200)["id"]
    deadline = time.monotonic() + 10
    while len(sent()) < len(expected):
        assert time.monotonic() < deadline, "not every webhook was sent"
        time.sleep(0.05)
    assert [one["action"] for one in sent()] == expected
    for one in sent():
        found = HTTP.get(f"{api.base}/app/hook/deliveries/{one['id']}", headers={"authorization": f"Bearer {api.app}"}).json()
        schema = {"$ref": f"urn:github#/components/schemas/webhook-dependabot-alert-{one['action'].replace('_', '-')}"}
        problems = list(OAS30Validator(schema, registry=api.registry).iter_errors(found["request"]["payload"]))
        assert not problems, [f"{'/'.join(map(str, each.absolute_path))}: {each.message[:200]}" for each in problems[:5]]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/pulls/999", None, 404),
        ("POST", "/pulls/{n}/reviews", {"event": "COMMENT", "comments": [{"path": "orders/db.py", "line": 1, "body": "x"}]}, 422),
        ("POST", "/pulls/{n}/reviews", {"event": "COMMENT", "comments": [{"path": "nowhere.py", "line": 1, "body": "x"}]}, 422),
        ("POST", "/check-runs", {"name": "c", "head_sha": "f" * 40}, 422),
        ("POST", "/issues/{n}/reactions", {"content": "applause"}, 422),
    ],
)
def test_the_twin_refuses_what_github_refuses(
    world: SessionWorld, description: dict[str, Any], method: str, path: str, body: Any, status: int
) -> None:
    api = Api(world, description)
    pull = world.control("open-pull", kind="clean")
    api.token = api.ask(
        "POST", f"/app/installations/{world.credentials['installation_id']}/access_tokens", expected=201, app=True, body={}
    )["token"]
    answer = HTTP.request(
        method,
        f"{api.base}/repos/{pull['repository']}{path.replace('{n}', str(pull['number']))}",
        json=body,
        headers={"authorization": f"Bearer {api.token}"},
    )
    assert answer.status_code == status and answer.json()["message"]


def test_tokens_are_bound_to_repository_permission_and_time(world: SessionWorld, description: dict[str, Any]) -> None:
    api = Api(world, description)
    pull = world.control("open-pull", kind="clean")
    path = f"/app/installations/{world.credentials['installation_id']}/access_tokens"
    at = int(time.time())
    stale = {"iat": at - 900, "exp": at - 300, "iss": str(world.credentials["app_id"])}
    foreign = {"iat": at, "exp": at + 300, "iss": "1"}
    for claims in (stale, foreign):
        forged = jwt.encode(claims, world.credentials["private_key_pem"], algorithm="RS256")
        assert HTTP.post(api.base + path, headers={"authorization": f"Bearer {forged}"}).status_code == 401
    assert HTTP.post(api.base + path, headers={"authorization": f"Bearer {api.app[:-3]}xyz"}).status_code == 401
    reader = api.ask(
        "POST",
        path,
        expected=201,
        app=True,
        body={"repository_ids": [pull["repository_id"]], "permissions": {"metadata": "read"}},
    )
    headers = {"authorization": f"Bearer {reader['token']}"}
    assert HTTP.get(f"{api.base}/repos/{pull['repository']}", headers=headers).status_code == 200
    assert HTTP.get(f"{api.base}/repos/{pull['repository']}/pulls/{pull['number']}", headers=headers).status_code == 403
    assert (
        HTTP.get(f"http://localhost:{world.port}/git/{pull['repository']}.git/info/refs?service=git-upload-pack").status_code
        == 401
    )


def test_the_scripted_model_finds_planted_classes_after_renames_and_shifts(world: SessionWorld) -> None:
    """It knows no seed: files renamed, lines shifted, names changed; at least four of five classes are found."""
    from kilo_pipelines.cloud_agent.adapters.scripted import ScriptedAdapter
    from kilo_twin import world as seeded

    pull = world.control("open-pull", kind="clean")
    planted = seeded.pull("planted", 1).files
    moved = {
        f"service/{name.split('/')[1].replace('.py', '_x.py')}": "# shifted\n" * 7 + (text or "").replace("customer", "client")
        for name, text in planted.items()
    }
    gone: dict[str, str | None] = dict.fromkeys(planted)
    pull = world.control("push", full_name=pull["repository"], number=pull["number"], files=gone | moved)
    spec = world.spec(pull)
    outcome = world.run(spec, ScriptedAdapter())
    assert outcome.result is not None
    assert len({finding["title"] for finding in outcome.result["findings"]}) >= 4
    assert "scripted model" in outcome.result["summary"]
    assert all(finding["path"].startswith("service/") for finding in outcome.result["findings"])
