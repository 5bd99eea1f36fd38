"""The twin's application: GitHub's API, git, web pages, the model, the hosted Cloud Agent and a control API."""

from __future__ import annotations

import secrets
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from kilo_twin import cloud_agent, model, npm, world, world_alerts
from kilo_twin.dependabot import LOCK_FILE, AlertError, Dependabot
from kilo_twin.githttp import serve_git
from kilo_twin.oidc import Issuer
from kilo_twin.rest import Rest
from kilo_twin.shapes import account
from kilo_twin.state import ACCOUNT, Twin, git, new_private_key, now
from kilo_twin.webhooks import Webhooks

REPOSITORY = "orders"
STOREFRONT = "storefront"
# Where seeded alerts lie; each has half of what those before it left.
ALERT_REPOSITORIES = ("billing", "catalog", "delivery", "insights", "accounts", "website")


class Control:
    """What a person does at GitHub, by one call each."""

    def __init__(self, twin: Twin, webhooks: Webhooks, dependabot: Dependabot) -> None:
        self.twin = twin
        self.webhooks = webhooks
        self.dependabot = dependabot

    def seed(self) -> dict[str, Any]:
        """The seeded repository, made at the first call."""
        full_name = f"{ACCOUNT}/{REPOSITORY}"
        return self.twin.repository(full_name) or self._with_history(REPOSITORY, world.seed_history())

    def _with_history(self, name: str, history: list[tuple[str, dict[str, str | None]]]) -> dict[str, Any]:
        """A new repository whose default branch has these commits."""
        repository = self.twin.create_repository(name)
        parent = None
        for message, files in history:
            parent = self.twin.commit(repository["full_name"], parent, files, message)
        assert parent is not None  # noqa: S101
        self.twin.set_ref(repository["full_name"], "refs/heads/main", parent)
        return repository

    # -- Dependabot -------------------------------------------------------------------------------------------------

    def seed_alerts(self, count: int = 3_000, seed: int = 1, repositories: list[str] | None = None) -> dict[str, Any]:
        """Repositories with alerts behind them, and the storefront whose lock file names the registry's packages.

        `count` alerts in all, most in the first repository. ValueError where one has alerts already. The App hears of new
        repositories, not of their alerts, which were there before it listened.
        """
        names = repositories or list(ALERT_REPOSITORIES)
        until = datetime.now(UTC)
        with self.twin.lock:
            made, new = [], []
            for place, name in enumerate(names):
                repository = self.twin.repository(f"{ACCOUNT}/{name}")
                if repository is None:
                    # A commit at least: without one there is no default branch that an analysis could read.
                    repository = self._with_history(name, [("Start", {"README.md": f"# {name}\n"})])
                    new.append(repository)
                if self.dependabot.alerts(repository):
                    raise ValueError(f"{repository['full_name']} has alerts already")
                # Half of what is left, as few repositories have most of the alerts; the last one gets the rest.
                share = count if place == len(names) - 1 else (count + 1) // 2
                count -= share
                self.dependabot.add(repository, world_alerts.alerts(repository["full_name"], share, seed, until))
                made.append(repository)
            storefront = self.twin.repository(f"{ACCOUNT}/{STOREFRONT}")
            if storefront is None:
                storefront = self._with_history(STOREFRONT, world_alerts.storefront_history())
                self.dependabot.add(storefront, world_alerts.storefront_alerts(LOCK_FILE, until))
                made.append(storefront)
                new.append(storefront)
            self.dependabot.save()
        if new:
            self._listed("added", *new)
        return {"repositories": [self._counted(one) for one in made]}

    def _counted(self, repository: dict[str, Any]) -> dict[str, Any]:
        return {
            "repository": repository["full_name"],
            "repository_id": repository["id"],
            "alerts": len(self.dependabot.alerts(repository)),
        }

    def change_alerts(self, repository: str, count: int, seed: int = 1) -> dict[str, Any]:
        """The world goes on: new alerts, fixes, dismissals by people, severities raised; with their webhooks."""
        with self.twin.lock:
            return {"changes": self.dependabot.change(self._repository(repository), count, seed)}

    def move_alert(self, repository: str, number: int, action: str, **dismissal: Any) -> dict[str, Any]:
        """One of the webhook's actions on one alert; a dismissal has `by`, `reason` and `comment`."""
        with self.twin.lock:
            found = self._repository(repository)
            if action == "severity_raised":
                self.dependabot.raise_severity(found, number)
            else:
                self.dependabot.move(found, number, action, **dismissal)
            self.dependabot.save()
            return {"number": number, "action": action}

    def spoil_alert(self, repository: str, number: int, kind: str | None) -> dict[str, Any]:
        """Makes an alert a broken or hostile one (`world_alerts.SPOILED`), or sound again with None."""
        if kind is not None and kind not in world_alerts.SPOILED:
            raise ValueError(f"kind must be one of {', '.join(world_alerts.SPOILED)}")
        with self.twin.lock:
            self.dependabot.alert(self._repository(repository), number)["spoiled"] = kind
            self.dependabot.save()
            return {"number": number, "kind": kind}

    def scan(self, repository: str) -> dict[str, Any]:
        """Dependabot's look at the default branch's lock file."""
        with self.twin.lock:
            return {"changes": self.dependabot.scan(self._repository(repository))}

    def merge(self, repository: str, number: int) -> dict[str, Any]:
        """Merges a pull request and sends `closed`; RuntimeError on a conflict."""
        known, pull = self._known(repository, number)
        if pull["state"] != "open":
            raise ValueError(f"{repository}#{number} is {pull['state']}")
        with self.twin.lock:
            self.twin.merge(repository, pull)
        return self._sent(known, pull, "closed")

    def set_repository(
        self, repository: str, *, alerts_enabled: bool = True, archived: bool = False, drafts: bool = True
    ) -> dict[str, Any]:
        """What an administrator sets: Dependabot alerts on or off, the repository archived or not; and whether its plan has drafts."""
        self._repository(repository).update(alerts_enabled=alerts_enabled, archived=archived, drafts=drafts)
        self.twin.save()
        return {"alerts_enabled": alerts_enabled, "archived": archived, "drafts": drafts}

    def withhold(self, permissions: list[str]) -> dict[str, Any]:
        """The installation grants everything but these; tokens that are out keep what they have."""
        self.twin.data["withheld"] = permissions
        self.twin.save()
        return {"granted": self.webhooks.shapes.granted()}

    def set_installation(self, *, suspended: bool = False, installed: bool = True) -> dict[str, Any]:
        """The account's administrator suspends the installation, or uninstalls the App; with its event."""
        known, number = self.twin.installations(), self.twin.credentials["installation_id"]
        before = (number in known and known[number]["suspended_at"] is not None, number in known)
        known.pop(number, None)
        if installed:
            known[number] = {"account": ACCOUNT, "suspended_at": now() if suspended else None}
        self.twin.keep_installations(known)
        if before == (suspended, installed):
            return {}
        action = "deleted" if not installed else "suspend" if suspended else "unsuspend"
        shown = {"action": action, "installation": self.webhooks.shapes.installation(), "sender": account("grace")}
        sent = self.webhooks.send("installation", action, shown)
        return {"delivery": {name: sent[name] for name in ("id", "guid", "status_code")}}

    def rename(self, repository: str, to: str) -> dict[str, Any]:
        """Another name for a repository (`to`: the bare name); the old one redirects."""
        before = self._repository(repository)["name"]
        found = self.twin.rename(repository, f"{ACCOUNT}/{to}")
        self._about(found, "renamed", changes={"repository": {"name": {"from": before}}})
        return {"repository": found["full_name"], "repository_id": found["id"]}

    def transfer(self, repository: str, to: str) -> dict[str, Any]:
        """Gives a repository to another account (`to`), where the App isn't installed: GitHub tells `transferred` there only."""
        self._repository(repository)
        found = self.twin.rename(repository, f"{to}/{repository.partition('/')[2]}")
        found["installed"] = False
        self.twin.save()
        self._listed("removed", found)
        return {"repository": found["full_name"], "repository_id": found["id"]}

    def remove(self, repository: str) -> dict[str, Any]:
        """Deletes a repository."""
        found = self._repository(repository)
        found["installed"] = False
        self._about(found, "deleted")
        self._listed("removed", found)
        with self.twin.lock:
            del self.twin.data["repositories"][repository]
            self.twin.save()
        return {"repository_id": found["id"]}

    def _repository(self, full_name: str) -> dict[str, Any]:
        found = self.twin.repository(full_name)
        if found is None:
            raise ValueError(f"no repository {full_name}")
        return found

    def _about(self, repository: dict[str, Any], action: str, **told: Any) -> None:
        payload = self.webhooks.in_repository(repository, account("grace"), action=action, **told)
        self.webhooks.send("repository", action, payload, repository["id"])

    def _listed(self, action: str, *repositories: dict[str, Any]) -> None:
        """Tells the App that repositories came to its installation or left it."""
        listed = [
            {"id": one["id"], "node_id": "Ug==", "name": one["name"], "full_name": one["full_name"], "private": False}
            for one in repositories
        ]
        self.webhooks.send(
            "installation_repositories",
            action,
            {
                "action": action,
                "installation": self.webhooks.shapes.installation(),
                "repository_selection": "all",
                "repositories_added": listed if action == "added" else [],
                "repositories_removed": listed if action == "removed" else [],
                "requester": None,
                "sender": account(ACCOUNT, "Organization"),
            },
        )

    # -- pull requests ----------------------------------------------------------------------------------------------

    def set_outsiders(self, logins: list[str]) -> dict[str, Any]:
        """Who may only read; everybody else writes."""
        self.twin.data["outsiders"] = logins
        self.twin.save()
        return {"outsiders": logins}

    def comment(self, repository: str, number: int, by: str, body: str, action: str = "created") -> dict[str, Any]:
        """Somebody comments on a pull request, or edits a comment: sends `issue_comment`."""
        known, pull = self._known(repository, number)
        comment = {"id": self.twin.new_id(), "user": account(by), "body": body, "created_at": now(), "updated_at": now()}
        with self.twin.lock:
            pull["comments"].append(comment)
            self.twin.save()
        shapes = self.webhooks.shapes
        whole = shapes.pull(known, pull)
        told = ("id", "node_id", "number", "title", "user", "labels", "state", "created_at", "updated_at", "closed_at", "body")
        issue = {name: whole[name] for name in told} | {"pull_request": {"url": whole["url"], "html_url": whole["html_url"]}}
        payload = self.webhooks.in_repository(
            known, account(by), action=action, issue=issue, comment=shapes.comment(known, number, comment)
        )
        delivery = self.webhooks.send("issue_comment", action, payload, known["id"])
        return {"comment": comment["id"], "delivery": {name: delivery[name] for name in ("id", "guid", "status_code")}}

    def open_pull(self, kind: str, fork: bool = False, **changes: Any) -> dict[str, Any]:
        """Opens a pull request of a kind, with other texts, branch, author or files where `changes` names them; sends `opened`.

        With `fork` its head lies in its author's fork, as far as anybody is told.
        """
        repository = self.seed()
        full_name = repository["full_name"]
        seed = replace(world.pull(kind, repository["next_number"]), **changes)
        base = self.twin.resolve(full_name, repository["default_branch"])
        # The branch's name in the message: commits of one second would otherwise be one commit.
        head = self.twin.commit(full_name, base, seed.files, f"{seed.title}\n\nBranch: {seed.head_ref}")
        self.twin.set_ref(full_name, f"refs/heads/{seed.head_ref}", head)
        pull = self.twin.open_pull(
            full_name,
            title=seed.title,
            body=seed.body,
            author=seed.author,
            author_type=seed.author_type,
            head_ref=seed.head_ref,
            base_ref=repository["default_branch"],
        )
        pull["fork"] = fork
        self.twin.save()
        return self._sent(repository, pull, "opened")

    def push(self, full_name: str, number: int, files: dict[str, str | None] | None = None) -> dict[str, Any]:
        """Pushes a commit to a pull request and sends `synchronize`."""
        repository, pull = self._known(full_name, number)
        before = self.twin.head_sha(full_name, pull)
        pull["pushes"] = pull.get("pushes", 0) + 1
        head = self.twin.commit(
            full_name, before, files if files is not None else world.next_push(pull["pushes"]), f"Push {pull['pushes']}"
        )
        self.twin.set_ref(full_name, f"refs/heads/{pull['head_ref']}", head)
        self.twin.follow_head(full_name, pull)
        pull["updated_at"] = now()
        return self._sent(repository, pull, "synchronize", before=before, after=head)

    def import_repository(self, path: str, base: str, head: str) -> dict[str, Any]:
        """Any local repository with two of its revisions as a pull request."""
        name = "".join(one if one.isalnum() or one in "-_." else "-" for one in Path(path).resolve().name) or "imported"
        full_name = f"{ACCOUNT}/{name}"
        while self.twin.repository(full_name):
            name += "-again"
            full_name = f"{ACCOUNT}/{name}"
        repository = self.twin.create_repository(name)
        target = self.twin.path(full_name)
        for revision, branch in ((base, "main"), (head, "proposed")):
            sha = (
                git(
                    Path(path),
                    "rev-parse",
                    "--verify",
                    "--end-of-options",
                    f"{revision}^{{commit}}",
                    env={"HOME": str(self.twin.home)},
                )
                .decode()
                .strip()
            )
            subprocess.run(
                ["git", "push", "-q", str(target), f"{sha}:refs/heads/{branch}"],
                cwd=path,
                check=True,
                capture_output=True,
            )
        # The App is installed on all repositories: GitHub tells about a new one before anything happens in it.
        self._listed("added", repository)
        title = git(target, "log", "-1", "--format=%s", "refs/heads/proposed").decode(errors="replace").strip()
        pull = self.twin.open_pull(
            full_name,
            title=title,
            body=f"{base}..{head}",
            author="grace",
            author_type="User",
            head_ref="proposed",
            base_ref="main",
        )
        return self._sent(repository, pull, "opened")

    def act(self, full_name: str, number: int, action: str, **change: Any) -> dict[str, Any]:
        """close, reopen, draft, ready, label, edit-base, same-head: changes the pull request and sends its event."""
        repository, pull = self._known(full_name, number)
        more: dict[str, Any] = {}
        if action in ("close", "reopen"):
            pull["state"] = "closed" if action == "close" else "open"
            event = "closed" if action == "close" else "reopened"
        elif action in ("draft", "ready"):
            pull["draft"] = action == "draft"
            event = "converted_to_draft" if action == "draft" else "ready_for_review"
        elif action == "label":
            pull["labels"].append(change["label"])
            event, more = "labeled", {"label": {"name": change["label"]}, "sender": account(change.get("by", "grace"))}
        elif action == "edit-base":
            before, pull["base_ref"] = pull["base_ref"], change["base"]
            if self.twin.resolve(full_name, change["base"]) is None:
                tip = git(self.twin.path(full_name), "rev-parse", f"refs/heads/{before}~1").decode().strip()
                self.twin.set_ref(full_name, f"refs/heads/{change['base']}", tip)
            event, more = "edited", {"changes": {"base": {"ref": {"from": before}, "sha": {"from": ""}}}}
        elif action == "same-head":
            pull = self.twin.open_pull(
                full_name,
                title="The same again",
                body="",
                author="mallory",
                author_type="User",
                head_ref=pull["head_ref"],
                base_ref=pull["base_ref"],
            )
            event = "opened"
        else:
            raise ValueError(f"unknown action {action}")
        return self._sent(repository, pull, event, **more)

    def _known(self, full_name: str, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
        repository = self.twin.repository(full_name)
        if repository is None or str(number) not in repository["pulls"]:
            raise ValueError(f"no pull request {full_name}#{number}")
        return repository, repository["pulls"][str(number)]

    def _sent(self, repository: dict[str, Any], pull: dict[str, Any], action: str, **more: Any) -> dict[str, Any]:
        delivery = self.webhooks.pull_request(repository, pull, action, **more)
        full_name = repository["full_name"]
        return {
            "repository": full_name,
            "repository_id": repository["id"],
            "number": pull["number"],
            "head_sha": self.twin.head_sha(full_name, pull),
            "url": f"{self.twin.base_url}/{full_name}/pull/{pull['number']}",
            "delivery": {name: delivery[name] for name in ("id", "guid", "status_code", "duration", "answer")},
        }


def application(home: Path, port: int, webhook_url: str) -> Starlette:
    """The whole twin."""
    if shutil.which("git") is None:
        raise RuntimeError("git is not installed")
    twin = Twin(home, f"http://localhost:{port}")
    webhooks = Webhooks(twin, webhook_url)
    dependabot = Dependabot(twin, webhooks.shapes, webhooks)
    rest = Rest(twin, webhooks, dependabot)
    control = Control(twin, webhooks, dependabot)
    agents = cloud_agent.CloudAgents(twin)
    control.seed()
    issuer = Issuer(twin.base_url, twin.credentials["oidc_client_secret"])

    async def git_http(request: Request) -> Response:
        return await serve_git(rest, request)

    async def act(request: Request) -> Response:
        if not secrets.compare_digest(request.headers.get("authorization", ""), f"Bearer {twin.credentials['control_token']}"):
            return JSONResponse({"error": "control token missing or wrong"}, 401)
        body = await request.json() if await request.body() else {}
        calls: dict[str, Callable[..., dict[str, Any]]] = {
            "open-pull": control.open_pull,
            "push": control.push,
            "import-repository": control.import_repository,
            "act": control.act,
            "comment": control.comment,
            "set-outsiders": control.set_outsiders,
            "redeliver": control.webhooks.redeliver,
            "outage": control.webhooks.outage,
            "set-installation": control.set_installation,
            "faults": lambda faults: _add_faults(twin, faults),
            "send": control.webhooks.send,
            "uninstall": lambda repository: _uninstall(twin, repository),
            "seed-alerts": control.seed_alerts,
            "change-alerts": control.change_alerts,
            "move-alert": control.move_alert,
            "spoil-alert": control.spoil_alert,
            "scan": control.scan,
            "merge": control.merge,
            "set-repository": control.set_repository,
            "withhold": control.withhold,
            "rename": control.rename,
            "transfer": control.transfer,
            "remove": control.remove,
            "oidc-rotate": issuer.rotate,
            "oidc-misbehave": issuer.misbehave,
            "cloud-agent": agents.configure,
            "cloud-agent-sessions": agents.told,
            "install": rest.accounts.install,
            "suspend": rest.accounts.suspend,
            "set-app": lambda **changes: _set_app(twin, changes),
        }
        try:
            answer = await anyio.to_thread.run_sync(lambda: calls[request.path_params["call"]](**body))
        except (KeyError, TypeError, ValueError, RuntimeError, AlertError, subprocess.CalledProcessError) as failure:
            return JSONResponse({"error": f"{type(failure).__name__}: {failure}"}, 400)
        return JSONResponse(answer)

    async def page(request: Request) -> Response:
        return _pull_page(
            twin, f"{request.path_params['owner']}/{request.path_params['repo']}", str(request.path_params["number"])
        )

    async def listing(request: Request) -> Response:
        return _list_page(twin, f"{request.path_params['owner']}/{request.path_params['repo']}")

    async def health(_request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/_twin/{call}", act, methods=["POST"]),
            *rest.routes(),
            *rest.accounts.routes(),
            *model.routes(twin.credentials["model_api_key"], twin.fault_of),
            *npm.routes(twin.base_url),
            *issuer.routes(),
            *cloud_agent.routes(agents, twin.fault_of),
            Route("/git/{owner}/{name}/{tail:path}", git_http, methods=["GET", "POST"]),
            Route("/{owner}/{repo}/pull/{number:int}", page),
            Route("/{owner}/{repo}", listing),
        ]
    )


def _add_faults(twin: Twin, faults: list[dict[str, Any]]) -> dict[str, Any]:
    twin.faults.extend(faults)
    return {"faults": len(twin.faults)}


def _set_app(twin: Twin, changes: dict[str, Any]) -> dict[str, Any]:
    """What the App's owner changes at its page: `permissions`, `events`; or another key, as if ours had been deleted there."""
    if changes.pop("new_key", False):
        changes["private_key_pem"] = new_private_key()
    twin.credentials |= changes
    twin.save_credentials()
    return {"app_id": twin.credentials["app_id"]}


def _uninstall(twin: Twin, repository: str) -> dict[str, Any]:
    found = twin.repository(repository)
    if found is None:
        raise ValueError(f"no repository {repository}")
    found["installed"] = False
    twin.save()
    return {"installed": False}


_STYLE = """<style>body{font:15px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
article{border:1px solid #ccc;border-radius:6px;margin:1rem 0;padding:.5rem 1rem}pre{white-space:pre-wrap;font:13px/1.45 ui-monospace,monospace;background:#f6f6f6;
padding:.6rem;border-radius:4px}.success{color:#087f23}.failure,.timed_out,.action_required{color:#b00020}h1{font-size:1.5rem}small{color:#666}</style>"""


def _pull_page(twin: Twin, full_name: str, number: str) -> Response:
    """A pull request as a person sees it; everything is escaped."""
    repository = twin.repository(full_name)
    pull = repository["pulls"].get(number) if repository else None
    if repository is None or pull is None:
        return HTMLResponse("<p>not found</p>", 404)
    head = twin.head_sha(full_name, pull)
    parts = [f"<title>#{number} {escape(pull['title'])}</title>{_STYLE}<h1>{escape(pull['title'])} <small>#{number}</small></h1>"]
    parts.append(
        f"<p>{escape(pull['author'])} wants to merge <code>{escape(pull['head_ref'])}</code> into <code>{escape(pull['base_ref'])}</code>"
        f" · head <code>{head[:12]}</code> · {escape(pull['state'])} · {' '.join(escape(one['content']) for one in pull['reactions'])}</p>"
    )
    parts.append(f"<pre>{escape(pull['body'])}</pre><h2>Checks of the head</h2>")
    for run in repository["check_runs"]:
        if run["head_sha"] == head:
            word = run["conclusion"] or run["status"]
            parts.append(
                f"<article><b class={escape(word)}>{escape(run['name'])}: {escape(word)}</b> {escape(run['title'] or '')}"
                f"<pre>{escape(run['summary'] or '')}</pre></article>"
            )
    parts.append("<h2>Review comments</h2>")
    for comment in pull["review_comments"]:
        parts.append(
            f"<article><code>{escape(comment['path'])}:{comment['line']}</code> <small>{escape(comment['user']['login'])} at {comment['commit_id'][:12]}</small>"
            f"<pre>{escape(comment['body'])}</pre></article>"
        )
    parts.append("<h2>Conversation</h2>")
    for comment in pull["comments"]:
        parts.append(f"<article><small>{escape(comment['user']['login'])}</small><pre>{escape(comment['body'])}</pre></article>")
    return HTMLResponse("\n".join(parts))


def _list_page(twin: Twin, full_name: str) -> Response:
    repository = twin.repository(full_name)
    if repository is None:
        return HTMLResponse("<p>not found</p>", 404)
    items = "".join(
        f"<li><a href='/{escape(full_name)}/pull/{pull['number']}'>#{pull['number']} {escape(pull['title'])}</a> {escape(pull['state'])}</li>"
        for pull in repository["pulls"].values()
    )
    return HTMLResponse(f"<title>{escape(full_name)}</title>{_STYLE}<h1>{escape(full_name)}</h1><ul>{items}</ul>")
