"""Every answer of the twin against GitHub's published OpenAPI description (npm `@octokit/openapi`)."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from openapi_schema_validator import OAS30Validator
from referencing import Registry
from referencing.jsonschema import DRAFT4

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
        answer = httpx.request(method, self.base + path, json=body, headers={"authorization": f"Bearer {bearer}"}, timeout=30)
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
    api.ask("GET", "/app/hook/deliveries", expected=200, app=True)
    assert len(api.checked) >= 24


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
    answer = httpx.request(
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
        assert httpx.post(api.base + path, headers={"authorization": f"Bearer {forged}"}).status_code == 401
    assert httpx.post(api.base + path, headers={"authorization": f"Bearer {api.app[:-3]}xyz"}).status_code == 401
    reader = api.ask(
        "POST",
        path,
        expected=201,
        app=True,
        body={"repository_ids": [pull["repository_id"]], "permissions": {"metadata": "read"}},
    )
    headers = {"authorization": f"Bearer {reader['token']}"}
    assert httpx.get(f"{api.base}/repos/{pull['repository']}", headers=headers).status_code == 200
    assert httpx.get(f"{api.base}/repos/{pull['repository']}/pulls/{pull['number']}", headers=headers).status_code == 403
    assert (
        httpx.get(f"http://localhost:{world.port}/git/{pull['repository']}.git/info/refs?service=git-upload-pack").status_code
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
