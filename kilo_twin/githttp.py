"""git over HTTP: `git http-backend` behind installation tokens."""

from __future__ import annotations

import base64
import os
import subprocess

import anyio
from starlette.requests import Request
from starlette.responses import Response

from kilo_twin.rest import Rest


def _token(request: Request) -> str | None:
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value
    if scheme.lower() != "basic":
        return None
    try:
        user, _, password = base64.b64decode(value).decode().partition(":")
    except ValueError:
        return None
    return password if user == "x-access-token" else None


async def serve_git(rest: Rest, request: Request) -> Response:
    """One request of git's smart protocol; reading needs contents:read, pushing contents:write."""
    owner, name, tail = (request.path_params[key] for key in ("owner", "name", "tail"))
    full_name = f"{owner}/{name.removesuffix('.git')}"
    push = tail == "git-receive-pack" or request.query_params.get("service") == "git-receive-pack"
    token = _token(request)
    grant = rest.grant(token) if token else None
    if grant is None:
        return Response("Authentication required", 401, headers={"www-authenticate": 'Basic realm="GitHub"'})
    repository = rest.twin.repository(full_name)
    level = grant["permissions"].get("contents")
    if repository is None or repository["id"] not in grant["repositories"] or level is None:
        return Response("Not Found", 404)
    if push and level != "write":
        return Response("Write access to repository not granted.", 403)
    env = {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "GIT_PROJECT_ROOT": str(rest.twin.home / "git"),
        "GIT_HTTP_EXPORT_ALL": "1",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "safe.directory",
        "GIT_CONFIG_VALUE_0": "*",
        "PATH_INFO": f"/{full_name}.git/{tail}",
        "REQUEST_METHOD": request.method,
        "QUERY_STRING": request.url.query,
        "CONTENT_TYPE": request.headers.get("content-type", ""),
        "REMOTE_USER": "x-access-token",
    }
    if "git-protocol" in request.headers:
        env["GIT_PROTOCOL"] = request.headers["git-protocol"]
    if request.headers.get("content-encoding") == "gzip":
        env["HTTP_CONTENT_ENCODING"] = "gzip"
    body = await request.body()
    env["CONTENT_LENGTH"] = str(len(body))
    done = await anyio.to_thread.run_sync(
        lambda: subprocess.run(["git", "http-backend"], input=body, capture_output=True, env=env, check=False)
    )
    if tail == "git-receive-pack":  # a pull request shows what was pushed to its branch
        with rest.twin.lock:
            for pull in repository["pulls"].values():
                if pull["state"] == "open":
                    rest.twin.follow_head(full_name, pull)
    head, _, content = done.stdout.partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if ": " in line)
    status = int(headers.pop("Status", "200").split()[0])
    return Response(content, status, headers=headers)
