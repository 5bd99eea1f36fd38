"""GitHub's side of setting an App up: the manifest's page, installing, authorizing, and what a person's token may ask.

Holds: people, who administers which account, pages with real forms, codes that work once. There is one App at a time: creating one
from a manifest takes the place of the one before, under the same slug. Does not belong here: what an App may do with repositories.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable
from html import escape
from typing import Any
from urllib.parse import parse_qs, urlencode

import anyio
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from kilo_twin.shapes import ORGANIZATIONS, account, organization
from kilo_twin.state import ACCOUNT, APP_SLUG, Twin, new_private_key
from kilo_twin.webhooks import Webhooks

# Who administers what, and who is only a member there; everybody administers the account of their own name.
ADMINISTRATORS = {"grace": [ACCOUNT], "mallory": ["umbrella"], "linus": []}
MEMBERS = {"linus": [ACCOUNT]}
CODE_SECONDS = 600  # GitHub's life of a user's code
MANIFEST_SECONDS = 3600  # and of a manifest's


class Refused(Exception):
    """A page that GitHub doesn't show."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status, self.words = status, words


class Accounts:
    """People's pages over one twin."""

    def __init__(self, twin: Twin, webhooks: Webhooks) -> None:
        self.twin, self.webhooks = twin, webhooks
        # Codes and tokens live as long as the process; a code is gone with its first use.
        self.manifest_codes: dict[str, float] = {}
        self.user_codes: dict[str, tuple[str, str, float]] = {}
        self.user_tokens: dict[str, str] = {}

    def routes(self) -> list[Route]:
        """Pages for people, and the one address that isn't REST."""
        page = self._page
        return [
            Route("/settings/apps/new", page(self._manifest_page), methods=["POST"]),
            Route("/organizations/{org}/settings/apps/new", page(self._manifest_page), methods=["POST"]),
            Route("/settings/apps", page(self._create), methods=["POST"]),
            Route("/apps/{slug}", page(self._app_page), methods=["GET"]),
            Route("/apps/{slug}/installations/new", page(self._install_page), methods=["GET"]),
            Route("/apps/{slug}/installations", page(self._install), methods=["POST"]),
            Route("/login/oauth/authorize", page(self._authorize_page), methods=["GET"]),
            Route("/login/oauth/authorize", page(self._authorize), methods=["POST"]),
            Route("/login/oauth/access_token", page(self._access_token), methods=["POST"]),
        ]

    @staticmethod
    def _page(handler: Callable[[Request, dict[str, str]], Response]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            raw = (await request.body()).decode()
            if "json" in request.headers.get("content-type", ""):
                form = {name: str(value) for name, value in json.loads(raw).items()}
            else:
                form = {name: values[0] for name, values in parse_qs(raw, keep_blank_values=True).items()}
            try:
                return await anyio.to_thread.run_sync(handler, request, form)
            except Refused as refusal:
                return HTMLResponse(_frame("Not found", f"<p>{escape(refusal.words)}</p>"), refusal.status)

        return endpoint

    # -- an App out of a manifest ------------------------------------------------------------------------------------------

    def _manifest_page(self, request: Request, form: dict[str, str]) -> Response:
        try:
            manifest = json.loads(form.get("manifest", ""))
            _check_manifest(manifest)
        except (ValueError, KeyError, TypeError, AttributeError) as failure:
            raise Refused(422, f"Invalid GitHub App configuration: {failure}") from None
        org = str(request.path_params.get("org", ""))
        granted = "".join(
            f"<li>{escape(name)}: <b>{escape(level)}</b></li>" for name, level in sorted(manifest["default_permissions"].items())
        )
        hidden = _hidden(manifest=form["manifest"], state=request.query_params.get("state", ""), org=org)
        where = f"the organization <b>{escape(org)}</b>" if org else "your account"
        return HTMLResponse(
            _frame(
                f"Create GitHub App for {org or 'you'}",
                f"<p>This App will belong to {where} and send its events to <code>{escape(manifest['hook_attributes']['url'])}</code>.</p>"
                f"<form method='post' action='/settings/apps'>{hidden}{_people()}"
                f"<label>GitHub App name <input name='name' value='{escape(manifest['name'], quote=True)}' maxlength='34' required></label>"
                f"<h2>Permissions</h2><ul>{granted}</ul><h2>Events</h2><p>{escape(', '.join(manifest['default_events']))}</p>"
                "<button id='create'>Create GitHub App</button></form>",
            )
        )

    def _create(self, _request: Request, form: dict[str, str]) -> Response:
        manifest = json.loads(form["manifest"])
        org, person = form.get("org", ""), form.get("person", "")
        if org and org not in administered(person):
            raise Refused(404, f"{person} doesn't administer {org}.")
        with self.twin.lock:
            self.twin.credentials |= {
                "app_id": self.twin.new_id(),
                "app_name": form["name"],
                "client_id": f"Iv23{secrets.token_hex(8)}",
                "client_secret": secrets.token_hex(20),
                "private_key_pem": new_private_key(),
                "webhook_secret": secrets.token_hex(20),
                "app_owner": org or person,
                "permissions": {"metadata": "read", **manifest["default_permissions"]},
                "events": manifest["default_events"],
                "redirects": manifest["callback_urls"],
                "setup_url": manifest.get("setup_url", ""),
                "hook": {"url": manifest["hook_attributes"]["url"], "content_type": "json", "insecure_ssl": "0"},
            }
            self.twin.data["installations"] = {}
            self.twin.save_credentials()
            self.twin.save()
        # As GitHub does: at once, when nobody has the secret yet.
        self.webhooks.ping()
        code = secrets.token_hex(20)
        self.manifest_codes[code] = time.time() + MANIFEST_SECONDS
        return _back(manifest["redirect_url"], code=code, state=form.get("state", ""))

    def conversion(self, code: str) -> dict[str, Any] | None:
        """The App's credentials for a code, once; None for any other."""
        if self.manifest_codes.pop(code, 0) < time.time():
            return None
        names = ("client_id", "client_secret", "webhook_secret")
        return (
            self.webhooks.shapes.app()
            | {name: self.twin.credentials[name] for name in names}
            | {"pem": self.twin.credentials["private_key_pem"]}
        )

    def _app_page(self, _request: Request, _form: dict[str, str]) -> Response:
        name = escape(self.webhooks.shapes.app()["name"])
        return HTMLResponse(_frame(name, f"<p><a href='/apps/{APP_SLUG}/installations/new'>Install</a></p>"))

    # -- installing --------------------------------------------------------------------------------------------------------

    def _install_page(self, request: Request, _form: dict[str, str]) -> Response:
        options = "".join(f"<option>{escape(one)}</option>" for one in [*sorted(ORGANIZATIONS), *ADMINISTRATORS])
        name = escape(self.webhooks.shapes.app()["name"])
        return HTMLResponse(
            _frame(
                f"Install {name}",
                f"<form method='post' action='/apps/{APP_SLUG}/installations'>{_hidden(state=request.query_params.get('state', ''))}"
                f"{_people()}<label>Account <select name='account'>{options}</select></label>"
                "<p>All repositories of the account.</p><button id='install'>Install</button></form>",
            )
        )

    def _install(self, _request: Request, form: dict[str, str]) -> Response:
        where, person = form["account"], form["person"]
        told = {"state": form["state"]} if form.get("state") else {}
        setup = self.twin.credentials.get("setup_url", "")  # the seeded App was made without one
        if where not in administered(person):
            if where not in MEMBERS.get(person, []):
                raise Refused(404, f"{person} doesn't belong to {where}.")
            return _back(setup, setup_action="request", **told)
        number = self.install(where)["installation_id"]
        if not setup:
            return HTMLResponse(_frame("Installed", f"<p>Installation {number} of {escape(where)}.</p>"))
        return _back(setup, installation_id=str(number), setup_action="install", **told)

    def install(self, where: str) -> dict[str, Any]:
        """Installs the App on an account, as its administrator does; the same one again when it is there already."""
        with self.twin.lock:
            known = self.twin.installations()
            number = next((one for one, held in known.items() if held["account"] == where), None)
            if number is None:
                number = self.twin.new_id()
                known[number] = {"account": where, "suspended_at": None}
                self.twin.keep_installations(known)
                if where == ACCOUNT:
                    self.twin.credentials["installation_id"] = number
                    self.twin.save_credentials()
        told = {"action": "created", "installation": self.webhooks.shapes.installation(number), "repositories": []}
        self.webhooks.later("installation", "created", told | {"sender": account("grace")}, None)
        return {"installation_id": number}

    def suspend(self, installation: int, suspended: bool) -> dict[str, Any]:
        """Suspends an installation or lets it work again, without telling by webhook: as if that one was lost."""
        with self.twin.lock:
            known = self.twin.installations()
            known[installation]["suspended_at"] = "2026-01-02T00:00:00Z" if suspended else None
            self.twin.keep_installations(known)
        return {"suspended": suspended}

    # -- authorizing -------------------------------------------------------------------------------------------------------

    def _authorize_page(self, request: Request, _form: dict[str, str]) -> Response:
        asked = request.query_params
        if asked.get("client_id") != self.twin.credentials["client_id"]:
            raise Refused(404, "There is no such App.")
        if asked.get("redirect_uri") not in self.twin.credentials.get("redirects", []):
            raise Refused(400, "The redirect_uri is not associated with this application.")
        name = escape(self.webhooks.shapes.app()["name"])
        return HTMLResponse(
            _frame(
                f"Authorize {name}",
                f"<p>{name} asks to verify your identity and to know which resources you can access.</p>"
                f"<form method='post' action='/login/oauth/authorize'>"
                f"{_hidden(state=asked.get('state', ''), redirect_uri=asked['redirect_uri'])}{_people()}"
                "<button id='authorize'>Authorize</button></form>",
            )
        )

    def _authorize(self, _request: Request, form: dict[str, str]) -> Response:
        if form["redirect_uri"] not in self.twin.credentials.get("redirects", []) or form["person"] not in ADMINISTRATORS:
            raise Refused(400, "The redirect_uri is not associated with this application.")
        code = secrets.token_hex(10)
        self.user_codes[code] = (form["person"], form["redirect_uri"], time.time() + CODE_SECONDS)
        return _back(form["redirect_uri"], code=code, state=form["state"])

    def _access_token(self, _request: Request, form: dict[str, str]) -> Response:
        held = self.twin.credentials
        # An attempt with a code uses it up, whether the rest was right or not.
        person, redirect, until = self.user_codes.pop(form.get("code", ""), ("", "", 0.0))
        if form.get("client_id") != held["client_id"] or not hmac.compare_digest(
            form.get("client_secret", ""), held["client_secret"]
        ):
            return _json(
                {"error": "incorrect_client_credentials", "error_description": "The client_id and/or client_secret are wrong."}
            )
        if until < time.time() or redirect != form.get("redirect_uri"):
            return _json({"error": "bad_verification_code", "error_description": "The code passed is incorrect or expired."})
        token = f"ghu_{secrets.token_hex(18)}"
        self.user_tokens[hashlib.sha256(token.encode()).hexdigest()] = person
        return _json({"access_token": token, "token_type": "bearer", "scope": ""})

    def person(self, token: str) -> str | None:
        """Whose token this is."""
        return self.user_tokens.get(hashlib.sha256(token.encode()).hexdigest())

    def revoke(self, client: str, token: str) -> bool:
        """Takes a token back, asked by the App with its secret (`Basic` credentials)."""
        expected = base64.b64encode(
            f"{self.twin.credentials['client_id']}:{self.twin.credentials['client_secret']}".encode()
        ).decode()
        if not hmac.compare_digest(client, f"Basic {expected}"):
            return False
        return self.user_tokens.pop(hashlib.sha256(token.encode()).hexdigest(), None) is not None

    # -- what a person's token may ask -------------------------------------------------------------------------------------

    def installations_of(self, person: str) -> list[dict[str, Any]]:
        """Installations that a person sees: of accounts that they administer or belong to."""
        within = [*administered(person), *MEMBERS.get(person, [])]
        return [
            self.webhooks.shapes.installation(number)
            for number, held in self.twin.installations().items()
            if held["account"] in within
        ]

    def membership(self, person: str, org: str) -> dict[str, Any] | None:
        """A person's place in an organization; None when there is none."""
        if org not in ORGANIZATIONS or org not in [*administered(person), *MEMBERS.get(person, [])]:
            return None
        base = self.webhooks.shapes.api
        url = f"{base}/orgs/{org}"
        small = {name: value for name, value in organization(org).items() if name in _SIMPLE_ORGANIZATION}
        return {
            "url": f"{url}/memberships/{person}",
            "state": "active",
            "role": "admin" if org in administered(person) else "member",
            "organization_url": url,
            "organization": small,
            "user": account(person),
        }


_SIMPLE_ORGANIZATION = frozenset(
    {
        "login",
        "id",
        "node_id",
        "url",
        "repos_url",
        "events_url",
        "hooks_url",
        "issues_url",
        "members_url",
        "public_members_url",
        "avatar_url",
        "description",
    }
)


def administered(person: str) -> list[str]:
    """The accounts whose Apps a person may install."""
    return [person, *ADMINISTRATORS[person]] if person in ADMINISTRATORS else []


def _check_manifest(manifest: dict[str, Any]) -> None:
    for name in ("name", "url", "redirect_url"):
        if not str(manifest[name]):
            raise ValueError(f"{name} is missing")
    if not str(manifest["hook_attributes"]["url"]).startswith("http"):
        raise ValueError("hook_attributes.url is no URL")
    if any(level not in ("read", "write", "admin") for level in manifest["default_permissions"].values()):
        raise ValueError("default_permissions has an unknown level")


def _json(value: dict[str, Any]) -> Response:
    return Response(json.dumps(value), media_type="application/json")


def _back(address: str, **told: str) -> Response:
    joint = "&" if "?" in address else "?"
    return RedirectResponse(f"{address}{joint}{urlencode(told)}", 302)


def _hidden(**values: str) -> str:
    return "".join(f"<input type='hidden' name='{name}' value='{escape(value, quote=True)}'>" for name, value in values.items())


def _people() -> str:
    """The person switcher: who is logged in at this GitHub."""
    words = {"grace": "grace, owner of acme", "linus": "linus, member of acme", "mallory": "mallory, somebody else"}
    options = "".join(f"<option value='{name}'>{escape(word)}</option>" for name, word in words.items())
    return f"<label>Signed in as <select name='person' id='person'>{options}</select></label>"


def _frame(title: str, body: str) -> str:
    return f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)} · offline GitHub</title>{_STYLE}<h1>{escape(title)}</h1>{body}"


_STYLE = """<style>body{font:15px/1.5 system-ui;max-width:42rem;margin:2rem auto;padding:0 1rem;color:#1f2328}
label{display:block;margin:.8rem 0}select,input{font:inherit;padding:.35rem;border:1px solid #888;border-radius:6px}
button{font:inherit;margin-top:1rem;padding:.45rem 1rem;border:0;border-radius:6px;background:#1f883d;color:#fff}
h1{font-size:1.4rem;border-bottom:1px solid #d1d9e0;padding-bottom:.4rem}h2{font-size:1rem}code{background:#f0f0f0;padding:.1rem .3rem}</style>"""
