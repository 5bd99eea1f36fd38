"""`python -m kilo_twin serve | open-pull | push | import-repo | seed-alerts | change-alerts | scan | merge | read | read-alert | spoil-alert`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import jwt
import uvicorn

from kilo_twin.server import application


def main() -> int:
    """The command line; prints JSON."""
    parser = argparse.ArgumentParser(prog="python -m kilo_twin")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="runs the twin on loopback")
    serve.add_argument("--webhook-url", required=True)
    opened = commands.add_parser("open-pull", help="opens a pull request")
    opened.add_argument("--kind", default="planted")
    pushed = commands.add_parser("push", help="pushes a commit to a pull request")
    imported = commands.add_parser("import-repo", help="makes a pull request of a local repository")
    imported.add_argument("--path", required=True)
    imported.add_argument("--base", required=True)
    imported.add_argument("--head", required=True)
    seeded = commands.add_parser("seed-alerts", help="makes repositories with Dependabot alerts")
    changed = commands.add_parser("change-alerts", help="lets a repository's alerts go on: new ones, fixes, dismissals")
    for command, count in ((seeded, 3_000), (changed, 10)):
        command.add_argument("--count", type=int, default=count)
        command.add_argument("--seed", type=int, default=1)
    scanned = commands.add_parser("scan", help="lets Dependabot look at a repository's lock file")
    merged = commands.add_parser("merge", help="merges a pull request")
    read = commands.add_parser("read", help="reads a pull request back over REST")
    alert = commands.add_parser("read-alert", help="reads a Dependabot alert back over REST")
    spoiled = commands.add_parser("spoil-alert", help="makes one alert's JSON something that nobody expects")
    spoiled.add_argument("--kind", required=True)
    for command in (alert, spoiled):
        command.add_argument("--number", type=int, required=True)
        command.add_argument("--repo", default="acme/storefront")
    for command in (pushed, merged, read):
        command.add_argument("--pull", type=int, required=True)
    for command in (pushed, read):
        command.add_argument("--repo", default="acme/orders")
    for command in (scanned, merged):
        command.add_argument("--repo", default="acme/storefront")
    changed.add_argument("--repo", default="acme/billing")
    for command in (serve, opened, pushed, imported, seeded, changed, scanned, merged, read, alert, spoiled):
        command.add_argument("--home", type=Path, required=True)
        command.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    if arguments.command == "serve":
        twin = application(arguments.home, arguments.port, arguments.webhook_url)
        uvicorn.run(
            twin, host="127.0.0.1", port=arguments.port, log_level="warning", access_log=False, timeout_graceful_shutdown=2
        )
        return 0
    try:
        answer = _client(arguments)
    except httpx.HTTPError as failure:
        print(json.dumps({"error": f"the twin doesn't answer: {type(failure).__name__}"}), file=sys.stderr)
        return 1
    print(json.dumps(answer))
    return 0 if "error" not in answer else 1


def _client(arguments: argparse.Namespace) -> dict[str, Any]:
    credentials = json.loads((arguments.home / "credentials.json").read_text())
    base = f"http://localhost:{arguments.port}"
    if arguments.command == "read":
        return read_back(base, credentials, arguments.repo, arguments.pull)
    if arguments.command == "read-alert":
        return read_alert(base, credentials, arguments.repo, arguments.number)
    repository, number = getattr(arguments, "repo", ""), getattr(arguments, "pull", 0)
    amount = {name: getattr(arguments, name, 0) for name in ("count", "seed")}
    calls: dict[str, tuple[str, dict[str, Any]]] = {
        "open-pull": ("open-pull", {"kind": getattr(arguments, "kind", "")}),
        "push": ("push", {"full_name": repository, "number": number}),
        "seed-alerts": ("seed-alerts", amount),
        "change-alerts": ("change-alerts", {"repository": repository, **amount}),
        "spoil-alert": (
            "spoil-alert",
            {"repository": repository, "number": getattr(arguments, "number", 0), "kind": getattr(arguments, "kind", "")},
        ),
        "scan": ("scan", {"repository": repository}),
        "merge": ("merge", {"repository": repository, "number": number}),
        "import-repo": (
            "import-repository",
            {name: str(getattr(arguments, name, "")) for name in ("path", "base", "head")},
        ),
    }
    call, body = calls[arguments.command]
    return control(base, credentials, call, body)


def control(base: str, credentials: dict[str, Any], call: str, body: dict[str, Any]) -> dict[str, Any]:
    """One call of the control API."""
    headers = {"authorization": f"Bearer {credentials['control_token']}"}
    answer: dict[str, Any] = httpx.post(f"{base}/_twin/{call}", json=body, headers=headers, timeout=60).json()
    return answer


def _reader(base: str, credentials: dict[str, Any], full_name: str) -> Callable[[str], Any]:
    """Reads a repository's resources over the REST API, with a token of its own."""
    at = int(time.time())
    claims = {"iat": at - 30, "exp": at + 300, "iss": str(credentials["app_id"])}
    assertion = jwt.encode(claims, credentials["private_key_pem"], algorithm="RS256")
    api = f"{base}/api/v3"
    token = httpx.post(
        f"{api}/app/installations/{credentials['installation_id']}/access_tokens",
        headers={"authorization": f"Bearer {assertion}"},
    ).json()["token"]
    headers = {"authorization": f"Bearer {token}"}

    def get(path: str) -> Any:
        return httpx.get(f"{api}/repos/{full_name}{path}", headers=headers, params={"per_page": 100}).raise_for_status().json()

    return get


def read_alert(base: str, credentials: dict[str, Any], full_name: str, number: int) -> dict[str, Any]:
    """A Dependabot alert as the REST API tells it."""
    found: dict[str, Any] = _reader(base, credentials, full_name)(f"/dependabot/alerts/{number}")
    return found


def read_back(base: str, credentials: dict[str, Any], full_name: str, number: int) -> dict[str, Any]:
    """A pull request as the REST API tells it."""
    get = _reader(base, credentials, full_name)
    pull = get(f"/pulls/{number}")
    return {
        "number": number,
        "url": pull["html_url"],
        "head_sha": pull["head"]["sha"],
        "reviews": get(f"/pulls/{number}/reviews"),
        "review_comments": get(f"/pulls/{number}/comments"),
        "comments": get(f"/issues/{number}/comments"),
        "reactions": [one["content"] for one in get(f"/issues/{number}/reactions")],
        "check_runs": get(f"/commits/{pull['head']['sha']}/check-runs")["check_runs"],
    }


if __name__ == "__main__":
    sys.exit(main())
