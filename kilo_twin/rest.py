"""GitHub's REST API, as far as the platform uses it: App and installation tokens, pulls, reviews, comments, checks."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import secrets
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kilo_twin.accounts import Accounts
from kilo_twin.dependabot import AlertError, Dependabot
from kilo_twin.shapes import Shapes, account, bot
from kilo_twin.state import Twin, git, now
from kilo_twin.webhooks import Webhooks

TOKEN_SECONDS = 3600  # GitHub's lifetime of an installation token
JWT_SECONDS = 600  # GitHub refuses longer ones
_HUNK = re.compile(r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")

Handler = Callable[[Request, dict[str, Any]], Response]


class ApiError(Exception):
    """An error answer in GitHub's form."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None, **more: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.headers, self.more = status, message, headers, more


def _error(failure: ApiError) -> JSONResponse:
    body = {"message": failure.message, "documentation_url": "https://docs.github.com/rest", "status": str(failure.status)}
    return JSONResponse(body | failure.more, failure.status, headers=failure.headers)


def _invalid(field: str, code: str = "invalid", **more: Any) -> ApiError:
    """GitHub's answer to a pull request that can't be."""
    return ApiError(422, "Validation Failed", errors=[{"resource": "PullRequest", "field": field, "code": code, **more}])


class _Cut(Response):
    """An answer whose connection ends in its middle."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        # Less than the announced length: the server closes the connection.
        await send({"type": "http.response.body", "body": self.body[: len(self.body) // 2]})


class Rest:
    """Handlers over one twin."""

    def __init__(self, twin: Twin, webhooks: Webhooks, dependabot: Dependabot) -> None:
        self.twin = twin
        self.webhooks = webhooks
        self.dependabot = dependabot
        self.shapes = Shapes(twin)
        self.accounts = Accounts(twin, webhooks)
        self._public_keys: dict[bytes, RSAPublicKey] = {}

    # -- who asks -------------------------------------------------------------------------------------------------

    def _bearer(self, request: Request) -> str:
        scheme, _, value = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() not in ("bearer", "token") or not value:
            raise ApiError(401, "Requires authentication")
        return value

    def _public_key(self) -> RSAPublicKey:
        """Of the App as it is now: another one may have taken its place."""
        pem = self.twin.credentials["private_key_pem"].encode()
        if pem not in self._public_keys:
            key = serialization.load_pem_private_key(pem, password=None)
            assert isinstance(key, RSAPrivateKey)  # noqa: S101  # made by ourselves
            self._public_keys = {pem: key.public_key()}
        return self._public_keys[pem]

    def _as_app(self, request: Request) -> None:
        try:
            claims = jwt.decode(
                self._bearer(request), self._public_key(), algorithms=["RS256"], options={"require": ["iat", "exp", "iss"]}
            )
        except jwt.ExpiredSignatureError:
            raise ApiError(401, "'Expiration time' claim ('exp') must be a numeric value representing the future time") from None
        except jwt.PyJWTError:
            raise ApiError(401, "A JSON web token could not be decoded") from None
        if str(claims["iss"]) != str(self.twin.credentials["app_id"]):
            raise ApiError(401, "Integration not found")
        if claims["exp"] - time.time() > JWT_SECONDS + 5:
            raise ApiError(401, "'Expiration time' claim ('exp') is too far in the future")

    def grant(self, token: str) -> dict[str, Any] | None:
        """What a live installation token may do."""
        found = self.twin.tokens.get(hashlib.sha256(token.encode()).hexdigest())
        return found if found and found["expires"] > time.time() else None

    def _as_installation(self, request: Request, permission: str, level: str = "read") -> dict[str, Any]:
        grant = self.grant(self._bearer(request))
        if grant is None:
            raise ApiError(401, "Bad credentials")
        held = grant["permissions"].get(permission)
        if held is None or (level == "write" and held != "write"):
            raise ApiError(403, "Resource not accessible by integration")
        return grant

    def _repository(self, request: Request, permission: str, level: str = "read") -> dict[str, Any]:
        grant = self._as_installation(request, permission, level)
        if "id" in request.path_params:
            repository = self.twin.by_id(int(request.path_params["id"]))
        else:
            full_name = f"{request.path_params['owner']}/{request.path_params['repo']}"
            repository = self.twin.repository(full_name)
            if repository is None:
                self._redirect(request, full_name)
        if repository is None or repository["id"] not in grant["repositories"] or not repository["installed"]:
            raise ApiError(404, "Not Found")
        return repository

    def _redirect(self, request: Request, full_name: str) -> None:
        """Raises GitHub's redirect, which leads by id, where a repository had this name."""
        repository = self.twin.by_id(self.twin.data.get("moved", {}).get(full_name, 0))
        if repository is not None and repository["installed"]:
            tail = str(request.url).partition(f"/repos/{full_name}")[2]
            address = f"{self.shapes.api}/repositories/{repository['id']}{tail}"
            status = 301 if request.method == "GET" else 307
            raise ApiError(status, "Moved Permanently", {"location": address}, url=address)

    def _pull(
        self, request: Request, permission: str = "pull_requests", level: str = "read"
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        repository = self._repository(request, permission, level)
        pull = repository["pulls"].get(str(request.path_params["number"]))
        if pull is None:
            raise ApiError(404, "Not Found")
        return repository, pull

    # -- routes ---------------------------------------------------------------------------------------------------

    def routes(self) -> list[Route]:
        """All routes below /api/v3."""
        repo = "/repos/{owner}/{repo}"
        table: list[tuple[str, str, Handler]] = [
            ("GET", "/app", self.get_app),
            ("GET", "/app/installations", self.list_installations),
            ("GET", "/app/installations/{installation:int}", self.get_installation),
            ("POST", "/app/installations/{installation:int}/access_tokens", self.create_token),
            ("GET", "/installation/repositories", self.installation_repositories),
            ("GET", repo, self.get_repository),
            ("GET", repo + "/collaborators/{login}/permission", self.get_permission),
            ("GET", repo + "/pulls", self.list_pulls),
            ("POST", repo + "/pulls", self.create_pull),
            ("GET", repo + "/pulls/{number:int}", self.get_pull),
            ("PATCH", repo + "/pulls/{number:int}", self.update_pull),
            ("GET", repo + "/pulls/{number:int}/files", self.list_files),
            ("GET", repo + "/pulls/{number:int}/reviews", self.list_reviews),
            ("POST", repo + "/pulls/{number:int}/reviews", self.create_review),
            ("GET", repo + "/pulls/{number:int}/comments", self.list_review_comments),
            ("GET", repo + "/issues/{number:int}", self.get_issue),
            ("GET", repo + "/issues/{number:int}/comments", self.list_comments),
            ("POST", repo + "/issues/{number:int}/comments", self.create_comment),
            ("PATCH", repo + "/issues/comments/{comment:int}", self.update_comment),
            ("GET", repo + "/issues/{number:int}/reactions", self.list_reactions),
            ("POST", repo + "/issues/{number:int}/reactions", self.create_reaction),
            ("GET", repo + "/commits/heads/{ref:path}", self.get_commit),
            ("GET", repo + "/commits/{ref}", self.get_commit),
            ("GET", repo + "/commits/{ref}/check-runs", self.list_check_runs),
            ("POST", repo + "/check-runs", self.create_check_run),
            ("GET", repo + "/check-runs/{run:int}", self.get_check_run),
            ("PATCH", repo + "/check-runs/{run:int}", self.update_check_run),
            ("GET", repo + "/compare/{spec:path}", self.compare),
            ("GET", repo + "/commits/{ref}/statuses", self.list_statuses),
            ("POST", repo + "/statuses/{ref}", self.create_status),
            ("GET", repo + "/dependabot/alerts", self.list_alerts),
            ("GET", repo + "/dependabot/alerts/{number:int}", self.get_alert),
            ("PATCH", repo + "/dependabot/alerts/{number:int}", self.update_alert),
            ("POST", "/app-manifests/{code}/conversions", self.convert_manifest),
            ("GET", "/user", self.get_user),
            ("GET", "/user/installations", self.list_user_installations),
            ("GET", "/user/memberships/orgs/{org}", self.get_membership),
            ("DELETE", "/applications/{client}/token", self.revoke_user_token),
            ("GET", "/app/hook/config", self.get_hook),
            ("PATCH", "/app/hook/config", self.update_hook),
            ("GET", "/app/hook/deliveries", self.list_deliveries),
            ("GET", "/app/hook/deliveries/{delivery:int}", self.get_delivery),
            ("POST", "/app/hook/deliveries/{delivery:int}/attempts", self.redeliver),
        ]
        # Every repository also answers under its id, which is where the redirects of a renamed one lead.
        table += [
            (method, path.replace(repo, "/repositories/{id:int}"), do) for method, path, do in table if path.startswith(repo)
        ]
        return [Route("/api/v3" + path, self._endpoint(handler), methods=[method]) for method, path, handler in table]

    def _endpoint(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            body: dict[str, Any] = {}
            raw = await request.body()
            if raw:
                try:
                    body = json.loads(raw)
                except ValueError:
                    return _error(ApiError(400, "Problems parsing JSON"))
            fault = self.twin.fault_of(request.method, request.url.path)
            if fault and fault["kind"] == "error":
                return _error(ApiError(fault["status"], fault.get("message", "twin: fault"), fault.get("headers")))
            if fault and fault["kind"] == "raw":  # any body
                return Response(fault["text"], fault.get("status", 200), fault.get("headers"), "application/json")
            if fault and fault["kind"] == "slow":
                await asyncio.sleep(fault["seconds"])
            if fault and fault["kind"] == "late":  # the answer is lost, and the write lands only afterwards
                threading.Timer(fault["seconds"], self._later, (handler, request, body)).start()
                return _error(ApiError(502, "twin: answer lost"))
            try:
                with self.twin.lock:
                    answer = handler(request, body)
            except ApiError as failure:
                return _error(failure)
            except AlertError as refused:
                return _error(ApiError(refused.status, refused.message))
            if fault and fault["kind"] == "lost":  # carried out, but the answer never arrives
                return _error(ApiError(502, "twin: answer lost"))
            answer.headers["x-ratelimit-limit"] = "5000"
            answer.headers["x-ratelimit-remaining"] = "4999"
            answer.headers["x-ratelimit-reset"] = str(int(time.time()) + 3600)
            if fault and fault["kind"] == "headers":  # the answer as it is, with other headers
                answer.headers.update(fault["headers"])
            if fault and fault["kind"] == "cut":
                return _Cut(answer.body, answer.status_code, dict(answer.headers))
            return answer

        return endpoint

    def _later(self, handler: Callable[[Request, dict[str, Any]], Response], request: Request, body: dict[str, Any]) -> None:
        with suppress(ApiError), self.twin.lock:
            handler(request, body)

    def _page(self, request: Request, found: list[Any], wrap: str | None = None) -> JSONResponse:
        size = min(100, int(request.query_params.get("per_page", "30")))
        page = max(1, int(request.query_params.get("page", "1")))
        part = found[(page - 1) * size : page * size]
        headers = {}
        if page * size < len(found):
            base = str(request.url.include_query_params(per_page=size, page=page + 1))
            headers["link"] = f'<{base}>; rel="next"'
        return JSONResponse({"total_count": len(found), wrap: part} if wrap else part, headers=headers)

    def get_app(self, request: Request, _body: dict[str, Any]) -> Response:
        self._as_app(request)
        return JSONResponse(self.shapes.app())

    def list_installations(self, request: Request, _body: dict[str, Any]) -> Response:
        self._as_app(request)
        return self._page(request, [self.shapes.installation(number) for number in self.twin.installations()])

    def get_installation(self, request: Request, _body: dict[str, Any]) -> Response:
        self._as_app(request)
        self._known_installation(request)
        return JSONResponse(self.shapes.installation(request.path_params["installation"]))

    def _known_installation(self, request: Request) -> None:
        if request.path_params["installation"] not in self.twin.installations():
            raise ApiError(404, "Not Found")

    def create_token(self, request: Request, body: dict[str, Any]) -> Response:
        self._as_app(request)
        self._known_installation(request)
        held = self.twin.installations()[request.path_params["installation"]]
        if held["suspended_at"]:
            raise ApiError(403, "This installation has been suspended")
        # Repositories are the seeded account's; other accounts have none.
        all_repositories = self.twin.data["repositories"].values() if held["account"] == self.twin.credentials["account"] else []
        installed = [one["id"] for one in all_repositories if one["installed"]]
        wanted = body.get("repository_ids") or installed
        if not set(wanted) <= set(installed):
            raise ApiError(
                422, "There is at least one repository that does not exist or is not accessible to the parent installation."
            )
        allowed = self.shapes.granted()
        permissions = body.get("permissions") or allowed
        for name, level in permissions.items():
            if name not in allowed or (level == "write" and allowed[name] != "write"):
                raise ApiError(422, "The permissions requested are not granted to this installation.")
        token = f"ghs_{secrets.token_hex(20)}"
        expires = time.time() + TOKEN_SECONDS
        self.twin.tokens[hashlib.sha256(token.encode()).hexdigest()] = {
            "repositories": set(wanted),
            "permissions": permissions,
            "expires": expires,
        }
        answer = {
            "token": token,
            "expires_at": datetime.fromtimestamp(expires, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "permissions": permissions,
            "repository_selection": "selected" if body.get("repository_ids") else "all",
        }
        return JSONResponse(answer, 201)

    def installation_repositories(self, request: Request, _body: dict[str, Any]) -> Response:
        grant = self._as_installation(request, "metadata")
        found = [
            self.shapes.repository(one) for one in self.twin.data["repositories"].values() if one["id"] in grant["repositories"]
        ]
        return self._page(request, found, "repositories")

    def get_repository(self, request: Request, _body: dict[str, Any]) -> Response:
        return JSONResponse(self.shapes.repository(self._repository(request, "metadata")))

    def list_pulls(self, request: Request, _body: dict[str, Any]) -> Response:
        repository = self._repository(request, "pull_requests")
        state = request.query_params.get("state", "open")
        owner = repository["full_name"].partition("/")[0]
        head = request.query_params.get("head", "")
        found = [
            self.shapes.pull(repository, one)
            for one in repository["pulls"].values()
            # GitHub's filter is `owner:branch`; what isn't of that form filters nothing.
            if state in ("all", one["state"]) and (":" not in head or head == f"{owner}:{one['head_ref']}")
        ]
        return self._page(request, found)

    def create_pull(self, request: Request, body: dict[str, Any]) -> Response:
        """A pull request between two branches of this repository, by the App; one open one for each pair."""
        repository = self._repository(request, "pull_requests", "write")
        full_name = repository["full_name"]
        owner = full_name.partition("/")[0]
        title, base = body.get("title"), body.get("base")
        head = str(body.get("head", "")).removeprefix(f"{owner}:")
        if not isinstance(title, str) or not title.strip():
            raise _invalid("title", "missing_field")
        for field, name in (("base", base), ("head", head)):
            if not isinstance(name, str) or self.twin.branch(full_name, name) is None:
                raise _invalid(field)
        if self.twin.branch(full_name, head) == self.twin.branch(full_name, str(base)):
            raise _invalid("head", "custom", message=f"No commits between {base} and {head}")
        for pull in repository["pulls"].values():
            if (pull["state"], pull["head_ref"], pull["base_ref"]) == ("open", head, base):
                raise _invalid("head", "custom", message=f"A pull request already exists for {owner}:{head}.")
        if body.get("draft") and not repository.get("drafts", True):
            raise ApiError(422, "Draft pull requests are not supported in this repository.")
        us = bot()
        pull = self.twin.open_pull(
            full_name,
            title=title,
            body=str(body.get("body") or ""),
            author=us["login"],
            author_type=us["type"],
            head_ref=head,
            base_ref=str(base),
        )
        pull.update(author_id=us["id"], draft=bool(body.get("draft", False)))
        self.twin.save()
        self.webhooks.later("pull_request", "opened", self.webhooks.pull_payload(repository, pull, "opened"), repository["id"])
        return JSONResponse(self.shapes.pull(repository, pull), 201)

    def update_pull(self, request: Request, body: dict[str, Any]) -> Response:
        """Closes or opens; what else could be changed, nobody here changes."""
        repository, pull = self._pull(request, level="write")
        if set(body) != {"state"} or body["state"] not in ("open", "closed"):
            raise _invalid("state")
        pull["state"] = body["state"]
        self.twin.save()
        action = "closed" if body["state"] == "closed" else "reopened"
        self.webhooks.later("pull_request", action, self.webhooks.pull_payload(repository, pull, action), repository["id"])
        return JSONResponse(self.shapes.pull(repository, pull))

    def list_alerts(self, request: Request, _body: dict[str, Any]) -> Response:
        """A page of alerts under a tag of its content; the same content asked for again is a 304."""
        repository = self._repository(request, "vulnerability_alerts")
        found, links = self.dependabot.page(repository, request.query_params)
        answer = JSONResponse(found)
        tag = f'W/"{hashlib.sha256(answer.body).hexdigest()}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"etag": tag})
        answer.headers["etag"] = tag
        base = f"{self.shapes.api}/repos/{repository['full_name']}/dependabot/alerts"
        if links:
            answer.headers["link"] = ", ".join(f'<{base}?{urlencode(query)}>; rel="{name}"' for name, query in links.items())
        return answer

    def get_alert(self, request: Request, _body: dict[str, Any]) -> Response:
        repository = self._repository(request, "vulnerability_alerts")
        self.dependabot.check(repository)
        return JSONResponse(self.dependabot.shape(repository, self.dependabot.alert(repository, request.path_params["number"])))

    def update_alert(self, request: Request, body: dict[str, Any]) -> Response:
        repository = self._repository(request, "vulnerability_alerts", "write")
        alert = self.dependabot.update(repository, request.path_params["number"], body, bot()["login"])
        return JSONResponse(self.dependabot.shape(repository, alert))

    def get_pull(self, request: Request, _body: dict[str, Any]) -> Response:
        return JSONResponse(self.shapes.pull(*self._pull(request)))

    def get_issue(self, request: Request, _body: dict[str, Any]) -> Response:
        repository, pull = self._pull(request)
        whole = self.shapes.pull(repository, pull)
        return JSONResponse(
            {**whole, "url": whole["issue_url"], "pull_request": {"url": whole["url"], "html_url": whole["html_url"]}}
        )

    def _changes(self, repository: dict[str, Any], pull: dict[str, Any]) -> list[dict[str, Any]]:
        path = self.twin.path(repository["full_name"])
        head, base = self.twin.head_sha(repository["full_name"], pull), self.twin.base_sha(repository["full_name"], pull)
        merge_base = git(path, "merge-base", base, head).decode().strip()
        return _changed_files(path, merge_base, head)

    def list_files(self, request: Request, _body: dict[str, Any]) -> Response:
        repository, pull = self._pull(request)
        html = f"{self.twin.base_url}/{repository['full_name']}"
        found = [
            {
                "sha": one["sha"],
                "filename": one["path"],
                "status": one["status"],
                "additions": len(one["right"]),
                "deletions": len(one["left"]),
                "changes": len(one["right"]) + len(one["left"]),
                "blob_url": f"{html}/blob/{one['sha']}/{one['path']}",
                "raw_url": f"{html}/raw/{one['sha']}/{one['path']}",
                "contents_url": f"{self.shapes.api}/repos/{repository['full_name']}/contents/{one['path']}",
                "patch": one["patch"],
            }
            for one in self._changes(repository, pull)
        ]
        return self._page(request, found)

    def list_reviews(self, request: Request, _body: dict[str, Any]) -> Response:
        repository, pull = self._pull(request)
        return self._page(request, [self.shapes.review(repository, pull["number"], one) for one in pull["reviews"]])

    def create_review(self, request: Request, body: dict[str, Any]) -> Response:
        """A review with its comments; one place outside the diff refuses the whole, as GitHub does."""
        repository, pull = self._pull(request, "pull_requests", "write")
        changes = {one["path"]: one for one in self._changes(repository, pull)}
        comments = body.get("comments") or []
        for comment in comments:
            change = changes.get(comment.get("path"))
            if change is None:
                raise ApiError(422, "Unprocessable Entity: Path could not be resolved")
            for line, side in (
                (comment.get("line"), comment.get("side", "RIGHT")),
                (comment.get("start_line"), comment.get("start_side", comment.get("side", "RIGHT"))),
            ):
                if line is not None and line not in change["seen_" + side.lower()]:
                    raise ApiError(422, "Unprocessable Entity: Line could not be resolved")
        review = {
            "id": self.twin.new_id(),
            "user": bot(),
            "body": body.get("body") or "",
            "submitted_at": now(),
            "commit_id": body.get("commit_id") or self.twin.head_sha(repository["full_name"], pull),
        }
        pull["reviews"].append(review)
        for comment in comments:
            pull["review_comments"].append(
                {
                    "id": self.twin.new_id(),
                    "review_id": review["id"],
                    "user": bot(),
                    "body": comment["body"],
                    "path": comment["path"],
                    "line": comment["line"],
                    "side": comment.get("side", "RIGHT"),
                    "start_line": comment.get("start_line"),
                    "start_side": comment.get("start_side"),
                    "commit_id": review["commit_id"],
                    "created_at": now(),
                    "diff_hunk": changes[comment["path"]]["patch"][:300],
                }
            )
        self.twin.save()
        return JSONResponse(self.shapes.review(repository, pull["number"], review))

    def list_review_comments(self, request: Request, _body: dict[str, Any]) -> Response:
        repository, pull = self._pull(request)
        return self._page(
            request, [self.shapes.review_comment(repository, pull["number"], one) for one in pull["review_comments"]]
        )

    def get_permission(self, request: Request, _body: dict[str, Any]) -> Response:
        """What a person may do: everybody writes, but for bots and those whom the twin was told of (`set-outsiders`)."""
        self._repository(request, "metadata")
        login = request.path_params["login"]
        outside = login.endswith("[bot]") or login in self.twin.data.get("outsiders", [])
        level = "read" if outside else "write"
        user = account(login) | {"role_name": level}
        return JSONResponse({"permission": level, "role_name": level, "user": user})

    def list_comments(self, request: Request, _body: dict[str, Any]) -> Response:
        repository, pull = self._pull(request, "pull_requests")
        return self._page(request, [self.shapes.comment(repository, pull["number"], one) for one in pull["comments"]])

    def create_comment(self, request: Request, body: dict[str, Any]) -> Response:
        repository, pull = self._pull(request, "issues", "write")
        comment = {"id": self.twin.new_id(), "user": bot(), "body": body["body"], "created_at": now(), "updated_at": now()}
        pull["comments"].append(comment)
        self.twin.save()
        return JSONResponse(self.shapes.comment(repository, pull["number"], comment), 201)

    def update_comment(self, request: Request, body: dict[str, Any]) -> Response:
        repository = self._repository(request, "issues", "write")
        for pull in repository["pulls"].values():
            for comment in pull["comments"]:
                if comment["id"] == request.path_params["comment"]:
                    if comment["user"]["login"] != bot()["login"]:
                        raise ApiError(403, "Resource not accessible by integration")
                    comment.update(body=body["body"], updated_at=now())
                    self.twin.save()
                    return JSONResponse(self.shapes.comment(repository, pull["number"], comment))
        raise ApiError(404, "Not Found")

    def list_reactions(self, request: Request, _body: dict[str, Any]) -> Response:
        _, pull = self._pull(request)
        return self._page(request, pull["reactions"])

    def create_reaction(self, request: Request, body: dict[str, Any]) -> Response:
        _, pull = self._pull(request, "issues", "write")
        if body.get("content") not in ("+1", "-1", "laugh", "confused", "heart", "hooray", "rocket", "eyes"):
            raise ApiError(422, "Invalid request. content is not a reaction")
        for reaction in pull["reactions"]:
            if reaction["content"] == body["content"]:
                return JSONResponse(reaction, 200)
        reaction = {"id": self.twin.new_id(), "node_id": "UmVh", "user": bot(), "content": body["content"], "created_at": now()}
        pull["reactions"].append(reaction)
        self.twin.save()
        return JSONResponse(reaction, 201)

    def _commit_of(self, request: Request, permission: str, level: str = "read") -> tuple[dict[str, Any], str]:
        repository = self._repository(request, permission, level)
        sha = self.twin.resolve(repository["full_name"], request.path_params["ref"])
        if sha is None:
            raise ApiError(422, f"No commit found for SHA: {request.path_params['ref']}")
        return repository, sha

    def get_commit(self, request: Request, _body: dict[str, Any]) -> Response:
        repository, sha = self._commit_of(request, "metadata")
        return JSONResponse(self.shapes.commit(repository["full_name"], sha))

    def list_check_runs(self, request: Request, _body: dict[str, Any]) -> Response:
        repository, sha = self._commit_of(request, "checks")
        name = request.query_params.get("check_name")
        found = [one for one in repository["check_runs"] if one["head_sha"] == sha and name in (None, one["name"])]
        return self._page(request, [self.shapes.check_run(repository, one) for one in reversed(found)], "check_runs")

    def create_check_run(self, request: Request, body: dict[str, Any]) -> Response:
        repository = self._repository(request, "checks", "write")
        if not body.get("name") or self.twin.resolve(repository["full_name"], body.get("head_sha", "")) is None:
            raise ApiError(422, "Invalid request. No commit found for SHA")
        run = {"id": self.twin.new_id(), "name": body["name"], "head_sha": body["head_sha"], "started_at": now()}
        run |= {
            "status": "queued",
            "conclusion": None,
            "completed_at": None,
            "external_id": "",
            "details_url": None,
            "title": None,
            "summary": None,
        }
        self._write_run(run, body)
        repository["check_runs"].append(run)
        self.twin.save()
        return JSONResponse(self.shapes.check_run(repository, run), 201)

    def _write_run(self, run: dict[str, Any], body: dict[str, Any]) -> None:
        for name in ("status", "external_id", "details_url"):
            if name in body:
                run[name] = body[name]
        if "conclusion" in body:
            run.update(conclusion=body["conclusion"], status="completed", completed_at=now())
        if run["status"] == "completed" and run["conclusion"] is None:
            raise ApiError(422, "Invalid request. conclusion is required for a completed check run")
        if run["status"] != "completed":
            run.update(conclusion=None, completed_at=None)
        output = body.get("output") or {}
        run["title"], run["summary"] = output.get("title", run["title"]), output.get("summary", run["summary"])

    def _run(self, request: Request, level: str) -> tuple[dict[str, Any], dict[str, Any]]:
        repository = self._repository(request, "checks", level)
        for run in repository["check_runs"]:
            if run["id"] == request.path_params["run"]:
                return repository, run
        raise ApiError(404, "Not Found")

    def get_check_run(self, request: Request, _body: dict[str, Any]) -> Response:
        return JSONResponse(self.shapes.check_run(*self._run(request, "read")))

    def update_check_run(self, request: Request, body: dict[str, Any]) -> Response:
        repository, run = self._run(request, "write")
        self._write_run(run, body)
        self.twin.save()
        return JSONResponse(self.shapes.check_run(repository, run))

    def compare(self, request: Request, _body: dict[str, Any]) -> Response:
        repository = self._repository(request, "contents")
        full_name = repository["full_name"]
        base_name, _, head_name = request.path_params["spec"].partition("...")
        base, head = self.twin.resolve(full_name, base_name), self.twin.resolve(full_name, head_name)
        if base is None or head is None:
            raise ApiError(404, "Not Found")
        path = self.twin.path(full_name)
        merge_base = git(path, "merge-base", base, head).decode().strip()
        ahead = git(path, "rev-list", f"{base}..{head}").decode().split()
        behind = git(path, "rev-list", f"{head}..{base}").decode().split()
        url = f"{self.shapes.api}/repos/{full_name}/compare/{base}...{head}"
        html = f"{self.twin.base_url}/{full_name}/compare/{base}...{head}"
        status = "diverged" if ahead and behind else "ahead" if ahead else "behind" if behind else "identical"
        answer = {
            "url": url,
            "html_url": html,
            "permalink_url": html,
            "diff_url": html + ".diff",
            "patch_url": html + ".patch",
            "base_commit": self.shapes.commit(full_name, base),
            "merge_base_commit": self.shapes.commit(full_name, merge_base),
            "status": status,
            "ahead_by": len(ahead),
            "behind_by": len(behind),
            "total_commits": len(ahead),
            "commits": [self.shapes.commit(full_name, one) for one in reversed(ahead)],
        }
        return JSONResponse(answer)

    def list_statuses(self, request: Request, _body: dict[str, Any]) -> Response:
        repository, sha = self._commit_of(request, "checks")
        return self._page(request, [one["shape"] for one in repository["statuses"] if one["sha"] == sha])

    def create_status(self, request: Request, body: dict[str, Any]) -> Response:
        repository, sha = self._commit_of(request, "checks", "write")
        number = self.twin.new_id()
        shape = {
            "id": number,
            "url": f"{self.shapes.api}/repos/{repository['full_name']}/statuses/{sha}",
            "avatar_url": bot()["avatar_url"],
            "node_id": "U0M=",
            "state": body.get("state"),
            "description": body.get("description"),
            "target_url": body.get("target_url"),
            "context": body.get("context", "default"),
            "created_at": now(),
            "updated_at": now(),
            "creator": bot(),
        }
        repository["statuses"].append({"sha": sha, "shape": shape})
        self.twin.save()
        return JSONResponse(shape, 201)

    # -- setting the App up ---------------------------------------------------------------------------------------

    def convert_manifest(self, request: Request, _body: dict[str, Any]) -> Response:
        found = self.accounts.conversion(request.path_params["code"])
        if found is None:
            raise ApiError(404, "Not Found")
        return JSONResponse(found, 201)

    def _as_person(self, request: Request) -> str:
        person = self.accounts.person(self._bearer(request))
        if person is None:
            raise ApiError(401, "Bad credentials")
        return person

    def get_user(self, request: Request, _body: dict[str, Any]) -> Response:
        return JSONResponse(self.shapes.public_user(self._as_person(request)))

    def list_user_installations(self, request: Request, _body: dict[str, Any]) -> Response:
        return self._page(request, self.accounts.installations_of(self._as_person(request)), "installations")

    def get_membership(self, request: Request, _body: dict[str, Any]) -> Response:
        person, org = self._as_person(request), request.path_params["org"]
        granted = [held["account"] for held in self.twin.installations().values()]
        if org not in granted or "members" not in self.shapes.granted():
            raise ApiError(403, "Resource not accessible by integration")
        found = self.accounts.membership(person, org)
        if found is None:
            raise ApiError(404, "Not Found")
        return JSONResponse(found)

    def revoke_user_token(self, request: Request, body: dict[str, Any]) -> Response:
        if not self.accounts.revoke(request.headers.get("authorization", ""), str(body.get("access_token", ""))):
            raise ApiError(404, "Not Found")
        return Response(status_code=204)

    def get_hook(self, request: Request, _body: dict[str, Any]) -> Response:
        self._as_app(request)
        return JSONResponse(self.webhooks.hook() | {"secret": "********"})

    def update_hook(self, request: Request, body: dict[str, Any]) -> Response:
        self._as_app(request)
        changes = {name: str(body[name]) for name in ("url", "content_type", "insecure_ssl") if name in body}
        self.twin.credentials["hook"] = self.webhooks.hook() | changes
        if "secret" in body:
            self.twin.credentials["webhook_secret"] = str(body["secret"])
        self.twin.save_credentials()
        return JSONResponse(self.webhooks.hook() | {"secret": "********"})

    def list_deliveries(self, request: Request, _body: dict[str, Any]) -> Response:
        self._as_app(request)
        asked = request.query_params
        newest_first = [one for one in reversed(self.twin.data["deliveries"]) if _of_class(one, asked.get("status"))]
        cursor = asked.get("cursor")
        if cursor is not None:
            if not re.fullmatch(r"v1_[0-9]{1,18}", cursor):
                raise ApiError(422, "Validation Failed")
            newest_first = [one for one in newest_first if one["id"] <= int(cursor.removeprefix("v1_"))]
        size = min(100, int(asked.get("per_page", "30")))
        headers = {}
        if len(newest_first) > size:
            following = request.url.include_query_params(per_page=size, cursor=f"v1_{newest_first[size]['id']}")
            headers["link"] = f'<{following}>; rel="next"'
        return JSONResponse([_delivery(one) for one in newest_first[:size]], headers=headers)

    def _logged(self, request: Request) -> dict[str, Any]:
        self._as_app(request)
        try:
            return self.webhooks.logged(request.path_params["delivery"])
        except ValueError:
            raise ApiError(404, "Not Found") from None

    def get_delivery(self, request: Request, _body: dict[str, Any]) -> Response:
        found = self._logged(request)
        headers = {name.title().replace("Github", "GitHub"): value for name, value in self.webhooks.headers(found).items()}
        sent = {"headers": headers, "payload": json.loads(found["body"])}
        return JSONResponse(
            _delivery(found)
            | {"url": self.webhooks.url, "request": sent, "response": {"headers": {}, "payload": found["answer"]}}
        )

    def redeliver(self, request: Request, _body: dict[str, Any]) -> Response:
        self.webhooks.redeliver_later(self._logged(request)["id"])
        return JSONResponse({}, 202)


def _of_class(one: dict[str, Any], status: str | None) -> bool:
    """Whether an attempt is of the class that a list asks for."""
    return status is None or (status == "success") == (200 <= one["status_code"] < 400)


def _delivery(one: dict[str, Any]) -> dict[str, Any]:
    """A delivery in a list: what became of it, without its body."""
    names = (
        "id",
        "guid",
        "delivered_at",
        "redelivery",
        "duration",
        "status",
        "status_code",
        "event",
        "action",
        "installation_id",
    )
    return {name: one[name] for name in (*names, "repository_id")}


def _changed_files(path: Any, base: str, head: str) -> list[dict[str, Any]]:
    """Changed files with the lines that GitHub lets a comment stand on."""
    listing = git(path, "diff-tree", "-r", "-z", "--no-renames", base, head).decode(errors="surrogateescape").split("\x00")
    found = []
    for meta, name in zip(listing[::2], listing[1::2], strict=False):
        _, _, _, new, letter = meta.split()
        text = git(path, "diff", "--text", "--no-ext-diff", "--no-textconv", "--no-renames", base, head, "--", name).decode(
            errors="replace"
        )
        patch = text[text.find("\n@@") + 1 :] if "\n@@" in text else ""
        lines = _lines(patch)
        status = {"A": "added", "D": "removed"}.get(letter, "modified")
        found.append({"path": name, "sha": new, "status": status, "patch": patch, **lines})
    return found


def _lines(patch: str) -> dict[str, list[int]]:
    right, left, seen_right, seen_left = [], [], [], []
    old = new = 0
    for line in patch.splitlines():
        match = _HUNK.match(line)
        if match:
            old, new = int(match[1]), int(match[3])
        elif line.startswith("+"):
            right.append(new)
            seen_right.append(new)
            new += 1
        elif line.startswith("-"):
            left.append(old)
            seen_left.append(old)
            old += 1
        elif not line.startswith("\\"):
            seen_right.append(new)
            seen_left.append(old)
            old, new = old + 1, new + 1
    return {"right": right, "left": left, "seen_right": seen_right, "seen_left": seen_left}
