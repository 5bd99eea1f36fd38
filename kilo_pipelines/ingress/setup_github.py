"""The set-up of the GitHub App in a browser: `kilo-pipelines setup github` prints the link that opens it.

Holds: the routes, who may use them, and the order of the steps. A link works once and for one browser (its cookie then); every answer
of GitHub brings a state that works once, too. Loopback counts for nothing here (threats, rule 19). Does not belong here: what the App
asks for (`providers.github_permissions`), GitHub's calls (`providers.github_setup`), how the pages look (`ingress.setup_pages`).
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from datetime import UTC
from typing import Any
from uuid import UUID

import anyio
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from kilo_pipelines.acts.installations import claim_installation, services_by_installation
from kilo_pipelines.core.checks import Check
from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.ingress import setup_pages as pages
from kilo_pipelines.providers.github_checks import Holder, look
from kilo_pipelines.providers.github_permissions import manifest
from kilo_pipelines.providers.github_setup import GitHubSetup, NewApp, SetupError
from kilo_pipelines.settings import Settings, in_environment, write_config
from kilo_pipelines.store import Repository, SetupLink, Store, app_secrets
from kilo_pipelines.store.app_secrets import AppSecrets, WebhookSecret
from kilo_pipelines.store.crypto import CipherError

log = logging.getLogger(__name__)

PATH = "/setup/github"
COOKIE = "kilo_setup"
COOKIE_SECONDS = 3600  # as long as the link itself, `store.setup_links.LINK_LIFE`
# GitHub's longest name of an App.
NAME_CHARACTERS = 34
# A redelivered ping is here within a second or two, or not at all.
PING_SECONDS = 8.0
DECIDED = ("github_app_id", "github_api_url")


class SetupDesk:
    """The pages over one platform. `settings` is asked anew each time: the set-up itself changes them."""

    def __init__(self, store: Store, settings: Callable[[], Settings], clock: Clock) -> None:
        self._store, self._settings, self._clock = store, settings, clock

    def routes(self) -> list[BaseRoute]:
        """What the admin listener serves for the set-up."""
        table = {
            "": self._open,
            "/created": self._created,
            "/install": self._install,
            "/installed": self._installed,
            "/authorize": self._authorize,
            "/authorized": self._authorized,
        }
        return [Route(PATH + tail, self._endpoint(step), methods=["GET"]) for tail, step in table.items()]

    def _endpoint(self, step: Callable[[Request], Response]) -> Any:
        async def endpoint(request: Request) -> Response:
            try:
                if self._settings().secrets_from is not None:
                    raise SetupError(Reason.SETUP_ELSEWHERE)
                answer = await anyio.to_thread.run_sync(step, request)
            except SetupError as failure:
                log.warning("a set-up stopped: %s", failure)
                answer = HTMLResponse(pages.stopped(failure.reason, failure.detail), 400)
            except CipherError as failure:
                answer = HTMLResponse(pages.stopped(Reason.SECRET_UNREADABLE, str(failure)), 503)
            for name, value in pages.headers(self._settings().github_web_url).items():
                answer.headers.setdefault(name, value)
            return answer

        return endpoint

    # -- who it is -----------------------------------------------------------------------------------------------------------

    def _link(self, request: Request) -> SetupLink | None:
        return self._store.setup_links.of(request.cookies.get(COOKIE, ""))

    def _known(self, request: Request) -> SetupLink:
        link = self._link(request)
        if link is None:
            raise SetupError(Reason.SETUP_LINK_INVALID)
        return link

    def _took(self, request: Request, what: Any) -> SetupLink:
        """The link that waited for this answer, whose state is used up by it."""
        cookie, state = request.cookies.get(COOKIE, ""), request.query_params.get("state", "")
        link = self._store.setup_links.take(cookie, state, what)
        if link is None:
            raise SetupError(Reason.SETUP_STATE_INVALID if self._link(request) else Reason.SETUP_LINK_INVALID)
        return link

    def _open(self, request: Request) -> Response:
        token = request.query_params.get("link")
        if token is None:
            return self._page(self._known(request))
        cookie = self._store.setup_links.open(token)
        if cookie is None:
            if self._link(request) is not None:  # this browser opened it before
                return self._on()
            raise SetupError(Reason.SETUP_LINK_INVALID)
        answer = self._on()
        secure = self._settings().admin_address.startswith("https://")
        # Lax: GitHub leads back here from its own pages, and the browser has to bring the cookie along.
        answer.set_cookie(COOKIE, cookie, max_age=COOKIE_SECONDS, path=PATH, httponly=True, samesite="lax", secure=secure)
        return answer

    def _on(self) -> Response:
        return RedirectResponse(PATH, 303)

    # -- the page ------------------------------------------------------------------------------------------------------------

    def _page(self, link: SetupLink) -> Response:
        settings = self._settings()
        held = app_secrets.read(settings)
        wanted = link.request
        has_app = settings.github_app_id is not None and held.private_key is not None
        if not has_app or (wanted["new_app"] and "created" not in link.notes):
            # Its form leads to the GitHub that was asked for, which isn't the settings' yet.
            return HTMLResponse(self._create_page(link, settings), headers=pages.headers(wanted["web_url"]))
        with_app = self._checks(settings, held, link)
        connected = link.notes.get("connected")
        refused = link.notes.get("refused")
        return HTMLResponse(pages.app_page(with_app, wanted, connected, refused, settings))

    def _create_page(self, link: SetupLink, settings: Settings) -> str:
        fixed = in_environment(*DECIDED)
        if fixed:
            return pages.stopped(
                Reason.SETTINGS_INVALID, f"The environment sets {', '.join(fixed)}: unset it, the set-up decides it."
            )
        wanted = link.request
        state = self._store.setup_links.expect(link, "manifest")
        with self._github(wanted["api_url"], wanted["web_url"]) as github:
            action = github.manifest_address(wanted["organization"], state)
        base = f"{settings.admin_address}{PATH}"
        made = manifest(
            name=f"Kilo Pipelines {wanted['organization'] or secrets.token_hex(2)}"[:NAME_CHARACTERS],
            home=settings.admin_address,
            webhook=settings.webhook_url,
            created=f"{base}/created",
            authorized=f"{base}/authorized",
            installed=f"{base}/installed",
        )
        return pages.create_page(made, action, wanted, link.notes.get("refused"))

    def _checks(self, settings: Settings, held: AppSecrets, link: SetupLink) -> list[Check]:
        """The same as `doctor`'s; the first look after the App was made also asks for its ping once more."""
        holders = {number: Holder(*found) for number, found in services_by_installation(self._store).items()}
        first = "created" in link.notes and "pinged" not in link.notes
        if first:
            self._store.setup_links.note(link, {"pinged": True})
        with self._github(settings.github_api_url, settings.github_web_url) as github:
            assert settings.github_app_id is not None and held.private_key is not None  # noqa: S101  # asked before
            return look(
                github,
                settings.github_app_id,
                held.private_key,
                settings.webhook_url,
                holders,
                again=PING_SECONDS if first else 0.0,
                only=link.request.get("installation"),
            )

    def _github(self, api_url: str, web_url: str) -> GitHubSetup:
        return GitHubSetup(api_url, web_url, self._clock)

    def _present(self) -> tuple[Settings, AppSecrets, int]:
        """Settings, secrets and id of the App that is there."""
        settings = self._settings()
        held = app_secrets.read(settings)
        if settings.github_app_id is None or held.private_key is None or held.client_id is None or held.client_secret is None:
            raise SetupError(Reason.GITHUB_APP_MISSING, "a person's authorization needs an App that this set-up made")
        return settings, held, settings.github_app_id

    # -- the App -------------------------------------------------------------------------------------------------------------

    def _created(self, request: Request) -> Response:
        """GitHub's redirect after the App was made: its code is exchanged once."""
        link = self._took(request, "manifest")
        wanted = link.request
        if self._has_app() and not wanted["new_app"]:
            # Another link was quicker: what works stays, and the App that was made just now has to be deleted at GitHub.
            return self._refused(link, SetupError(Reason.APP_EXISTS))
        with self._github(wanted["api_url"], wanted["web_url"]) as github:
            try:
                app = github.convert(request.query_params.get("code", ""))
            except SetupError as failure:
                return self._refused(link, failure)
        settings = self._settings()
        app_secrets.update(settings, lambda _before: self._secrets(app))
        write_config(settings, {"github_app_id": app.id, "github_api_url": wanted["api_url"]})
        self._store.setup_links.note(link, {"created": app.id, "refused": None})
        log.info("GitHub App %s (%s) was made and its secrets stored", app.id, app.slug)
        return self._on()

    def _has_app(self) -> bool:
        settings = self._settings()
        return settings.github_app_id is not None and app_secrets.read(settings).private_key is not None

    def _secrets(self, app: NewApp) -> AppSecrets:
        first = WebhookSecret(id=app_secrets.new_id(), value=app.webhook_secret, made_at=self._clock.now().astimezone(UTC))
        return AppSecrets(client_id=app.client_id, client_secret=app.client_secret, private_key=app.pem, webhook_secrets=(first,))

    def _refused(self, link: SetupLink, failure: SetupError) -> Response:
        self._store.setup_links.note(link, {"refused": [failure.reason, failure.detail]})
        log.warning("a set-up step was refused: %s", failure)
        return self._on()

    # -- an installation -----------------------------------------------------------------------------------------------------

    def _install(self, request: Request) -> Response:
        """Leads to GitHub, where account and repositories are chosen."""
        link = self._known(request)
        settings, held, app_id = self._present()
        with self._github(settings.github_api_url, settings.github_web_url) as github:
            app = github.as_app(app_id, held.private_key or "").app()
            state = self._store.setup_links.expect(link, "installation", {"refused": None})
            return RedirectResponse(github.install_address(app, state), 303)

    def _installed(self, request: Request) -> Response:
        """GitHub's redirect after an installation. Its number is anybody's word: the person is asked next, at GitHub."""
        number = request.query_params.get("installation_id", "")
        if self._link(request) is None:
            # Installed from GitHub's own pages, by whomever: the way on is a link.
            hint = f"Then: `kilo-pipelines setup github --installation {number}`." if _is_number(number) else ""
            return HTMLResponse(
                pages.stopped(Reason.SETUP_LINK_INVALID, f"The App is installed, and no owner has it yet. {hint}"), 400
            )
        link = self._took(request, "installation")
        if request.query_params.get("setup_action") == "request" or not _is_number(number):
            return self._refused(link, SetupError(Reason.INSTALLATION_REQUESTED))
        return self._ask_person(link, int(number))

    def _authorize(self, request: Request) -> Response:
        """The same for an installation that is there already, as the operator's command named it."""
        link = self._known(request)
        number = link.request.get("installation") or link.notes.get("installation")
        if number is None:
            raise SetupError(Reason.SETUP_STATE_INVALID)
        return self._ask_person(link, number)

    def _ask_person(self, link: SetupLink, number: int) -> Response:
        if link.request.get("installation") not in (None, number):
            # A link for one installation connects that one.
            raise SetupError(Reason.SETUP_STATE_INVALID)
        settings, held, _ = self._present()
        state = self._store.setup_links.expect(link, "authorization", {"installation": number, "refused": None})
        with self._github(settings.github_api_url, settings.github_web_url) as github:
            redirect = f"{settings.admin_address}{PATH}/authorized"
            return RedirectResponse(github.authorize_address(held.client_id or "", redirect, state), 303)

    def _authorized(self, request: Request) -> Response:
        """GitHub's redirect with the person's code: only what GitHub says of this person connects the installation."""
        link = self._took(request, "authorization")
        settings, held, app_id = self._present()
        number = int(link.notes["installation"])
        with self._github(settings.github_api_url, settings.github_web_url) as github:
            try:
                proof = github.prove(
                    held.client_id or "",
                    held.client_secret or "",
                    request.query_params.get("code", ""),
                    f"{settings.admin_address}{PATH}/authorized",
                    app_id,
                    number,
                )
                listed = github.as_app(app_id, held.private_key or "").repositories(number)
            except SetupError as failure:
                return self._refused(link, failure)
        owner = link.request.get("owner")
        done = claim_installation(
            self._store,
            owner_id=UUID(owner) if owner else None,
            installation_id=number,
            account=proof.installation.account.login,
            organization=proof.installation.target_type == "Organization",
            repositories=[Repository(one.id, one.full_name, one.default_branch, one.private) for one in listed],
            actor=f"github:{proof.person}",
        )
        if isinstance(done, Reason):
            return self._refused(link, SetupError(done))
        told = {
            "owner": str(done.owner_id),
            "name": done.owner_name,
            "made": done.created,
            "repositories": done.repositories,
            "person": proof.person,
            "account": proof.installation.account.login,
        }
        self._store.setup_links.note(link, {"connected": told, "refused": None})
        return self._on()


def _is_number(value: str) -> bool:
    """Whether it can be an installation's number (a bigint of the database)."""
    return value.isascii() and value.isdecimal() and 0 < len(value) < 19
