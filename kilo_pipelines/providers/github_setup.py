"""GitHub as the set-up speaks to it: a manifest's code, a person's authorization, the App's own webhook and installations.

Holds: the calls and what each answer means, every refusal with its reason. One plain HTTP client that follows no redirect (threats,
rule 22); codes, tokens and keys are in no message. Does not belong here: what is stored, pages, who the owner is. Imports no
PyGithub, so that the ingress starts fast.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import httpx
import jwt
from pydantic import BaseModel, ConfigDict, ValidationError

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.providers import outbound
from kilo_pipelines.settings import LOOPBACK

TIMEOUT_SECONDS = 10.0
# GitHub's own advice for its App tokens: back-date by a minute; at most ten minutes long.
_BACKDATE = timedelta(seconds=60)
_JWT_LIFE = timedelta(minutes=5)
# A minute is what the back-dating forgives.
SKEW_SECONDS = 60.0
# Of 100 each: more installations than a person or an App of one platform has, and a bound for a server that never ends.
PAGES = 20
REPOSITORY_PAGES = 200
ANSWER_BYTES = 8 * 2**20
# Between two looks at GitHub's log of deliveries.
POLL_SECONDS = 1.0


class SetupError(Exception):
    """A step of the set-up can't be done: a reason code, and where it helps a detail without any secret."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason, self.detail = reason, detail


class _Shape(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


S = TypeVar("S", bound=_Shape)


class Account(_Shape):
    """A person or an organization."""

    id: int
    login: str
    type: str = "User"


class NewApp(_Shape):
    """What GitHub hands over once for a manifest's code."""

    id: int
    slug: str
    name: str
    html_url: str
    client_id: str
    client_secret: str
    webhook_secret: str
    pem: str

    def __repr__(self) -> str:
        return f"NewApp({self.slug})"


class AppFacts(_Shape):
    """The App as GitHub knows it."""

    id: int
    slug: str
    name: str
    html_url: str
    client_id: str | None = None
    owner: Account
    permissions: dict[str, str]
    events: list[str]


class InstallationFacts(_Shape):
    """One installation of the App."""

    id: int
    app_id: int
    account: Account
    target_type: str
    permissions: dict[str, str]
    events: list[str]
    html_url: str
    suspended_at: datetime | None = None


class HookConfig(_Shape):
    """The App's webhook."""

    url: str = ""
    content_type: str = ""
    insecure_ssl: str | float = ""


class HookDelivery(_Shape):
    """One delivery in GitHub's log."""

    id: int
    event: str
    status: str
    status_code: int
    delivered_at: datetime
    duration: float = 0.0


class RepositoryFacts(_Shape):
    """One repository of an installation."""

    id: int
    full_name: str
    default_branch: str = "HEAD"
    private: bool = True


class _Membership(_Shape):
    state: str
    role: str
    organization: Account


@dataclass(frozen=True)
class Proof:
    """The provider's word that this person administers this installation."""

    person: str
    installation: InstallationFacts


class GitHubSetup:
    """One GitHub, spoken to without an App, as a person once, or as the App."""

    def __init__(self, api_url: str, web_url: str, clock: Clock) -> None:
        for address in (api_url, web_url):
            parts = urlsplit(address)
            if parts.scheme != "https" and parts.hostname not in LOOPBACK:
                raise SetupError(Reason.ADDRESS_REFUSED, "GitHub is asked over https only")
        self._api, self._web, self._clock = api_url.rstrip("/"), web_url.rstrip("/"), clock
        self._http = httpx.Client(timeout=TIMEOUT_SECONDS, follow_redirects=False, trust_env=False, verify=outbound.trusted())
        # Seconds that our clock is ahead of GitHub's, by the last answer.
        self.skew: float | None = None

    def __enter__(self) -> GitHubSetup:
        return self

    def __exit__(self, *_failure: object) -> None:
        self._http.close()

    # -- addresses for the browser --------------------------------------------------------------------------------------------

    def manifest_address(self, organization: str | None, state: str) -> str:
        """Where the manifest is posted to."""
        below = f"/organizations/{quote(organization, safe='')}" if organization else ""
        return f"{self._web}{below}/settings/apps/new?{urlencode({'state': state})}"

    def app_page(self, app: AppFacts) -> str:
        """Where the App's owner changes it."""
        below = f"/organizations/{quote(app.owner.login, safe='')}" if app.owner.type == "Organization" else ""
        return f"{self._web}{below}/settings/apps/{quote(app.slug, safe='')}"

    def install_address(self, app: AppFacts, state: str) -> str:
        """Where a person chooses account and repositories."""
        return f"{app.html_url}/installations/new?{urlencode({'state': state})}"

    def authorize_address(self, client_id: str, redirect: str, state: str) -> str:
        """Where a person lets us ask once who they are."""
        asked = {"client_id": client_id, "redirect_uri": redirect, "state": state, "allow_signup": "false"}
        return f"{self._web}/login/oauth/authorize?{urlencode(asked)}"

    # -- before there is an App -----------------------------------------------------------------------------------------------

    def convert(self, code: str) -> NewApp:
        """The new App for a manifest's code. GitHub answers once; `manifest_code_refused` for a used, old or unknown code."""
        answer = self._send("POST", f"{self._api}/app-manifests/{quote(code, safe='')}/conversions")
        if answer.status_code in (404, 422):
            raise SetupError(Reason.MANIFEST_CODE_REFUSED, f"HTTP {answer.status_code}")
        return _read(NewApp, answer, 201)

    # -- as a person, once ----------------------------------------------------------------------------------------------------

    def prove(self, client_id: str, client_secret: str, code: str, redirect: str, app_id: int, installation_id: int) -> Proof:
        """Exchanges a person's code and asks whether they administer the installation; their token is revoked before this returns.

        An organization's installation: the person sees it and is an active owner of that organization. A person's: it is their own
        account. Anything else is `installation_not_yours`.
        """
        asked = {"client_id": client_id, "client_secret": client_secret, "code": code, "redirect_uri": redirect}
        answer = self._send("POST", f"{self._web}/login/oauth/access_token", json=asked)
        given = _object(answer)
        token = given.get("access_token")
        if answer.status_code != 200 or not isinstance(token, str):
            raise SetupError(Reason.USER_CODE_REFUSED, str(given.get("error", f"HTTP {answer.status_code}"))[:60])
        try:
            return self._prove(token, app_id, installation_id)
        finally:
            # It dies by itself within hours where this fails; nothing keeps it.
            with suppress(SetupError):
                self._send(
                    "DELETE",
                    f"{self._api}/applications/{quote(client_id, safe='')}/token",
                    auth=(client_id, client_secret),
                    json={"access_token": token},
                )

    def _prove(self, token: str, app_id: int, installation_id: int) -> Proof:
        person = _read(Account, self._send("GET", f"{self._api}/user", token=token))
        seen = self._pages("/user/installations", "installations", InstallationFacts, token, PAGES)
        found = next((one for one in seen if one.id == installation_id and one.app_id == app_id), None)
        if found is None:
            raise SetupError(Reason.INSTALLATION_NOT_YOURS, f"{person.login} doesn't see installation {installation_id}")
        if found.target_type == "User" and found.account.id == person.id:
            return Proof(person.login, found)
        if found.target_type == "Organization" and self._administers(token, found.account):
            return Proof(person.login, found)
        raise SetupError(Reason.INSTALLATION_NOT_YOURS, f"{person.login} doesn't administer {found.account.login}")

    def _administers(self, token: str, organization: Account) -> bool:
        answer = self._send("GET", f"{self._api}/user/memberships/orgs/{quote(organization.login, safe='')}", token=token)
        if answer.status_code in (403, 404):
            return False
        held = _read(_Membership, answer)
        return (held.state, held.role, held.organization.id) == ("active", "admin", organization.id)

    # -- as the App -----------------------------------------------------------------------------------------------------------

    def as_app(self, app_id: int, private_key: str) -> GitHubAppView:
        """The same GitHub, asked as the App; SetupError `app_key_refused` for what is no key."""
        claims = {"iss": str(app_id)}

        def bearer() -> str:
            now = self._clock.now()
            timed = claims | {"iat": int((now - _BACKDATE).timestamp()), "exp": int((now + _JWT_LIFE).timestamp())}
            return jwt.encode(timed, private_key, algorithm="RS256")

        try:
            bearer()
        except (ValueError, TypeError, jwt.PyJWTError):
            raise SetupError(Reason.APP_KEY_REFUSED, "what is stored is no RSA key") from None
        return GitHubAppView(self, bearer)

    # -- the wire -------------------------------------------------------------------------------------------------------------

    def _send(self, method: str, url: str, *, token: str | None = None, **more: Any) -> httpx.Response:
        headers = {"accept": "application/json", "user-agent": "kilo-pipelines", "x-github-api-version": "2022-11-28"}
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        try:
            with self._http.stream(method, url, headers=headers, **more) as answer:
                self._note_clock(answer.headers.get("date", ""))
                content = bytearray()
                for part in answer.iter_bytes():
                    content += part
                    if len(content) > ANSWER_BYTES:
                        raise SetupError(Reason.PROVIDER_UNAVAILABLE, "the answer is longer than any of GitHub's")
        except httpx.HTTPError as failure:
            raise SetupError(Reason.PROVIDER_UNAVAILABLE, type(failure).__name__) from None
        return httpx.Response(answer.status_code, headers=answer.headers, content=bytes(content), request=answer.request)

    def _note_clock(self, date: str) -> None:
        with suppress(ValueError):
            self.skew = (self._clock.now() - parsedate_to_datetime(date).astimezone(UTC)).total_seconds()

    def _pages(self, path: str, wrap: str | None, shape: type[S], token: str, most: int) -> Iterator[S]:
        """All objects of a list, page by page; the pages are counted by us and no link of an answer is followed."""
        for page in range(1, most + 1):
            answer = self._send("GET", f"{self._api}{path}?per_page=100&page={page}", token=token)
            _expect(answer, 200)
            try:
                decoded = answer.json()
                some = decoded[wrap] if wrap else decoded
                yield from (shape.model_validate(one) for one in some)
            except (ValueError, KeyError, TypeError, ValidationError):
                raise SetupError(Reason.PROVIDER_UNAVAILABLE, f"{path} has another form than GitHub's") from None
            if len(some) < 100:
                return


class GitHubAppView:
    """What an App may ask about itself."""

    def __init__(self, github: GitHubSetup, bearer: Callable[[], str]) -> None:
        self._github, self._bearer = github, bearer

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """A refused App is one with a wrong clock, which is looked at first, or with a wrong key."""
        try:
            yield
        except _RefusedError:
            skew = self._github.skew
            if skew is not None and abs(skew) > SKEW_SECONDS:
                raise SetupError(Reason.CLOCK_SKEW, f"this machine's clock is {skew:+.0f} s from GitHub's") from None
            raise SetupError(Reason.APP_KEY_REFUSED, "GitHub answers 401") from None

    def _ask(self, shape: type[S], method: str, path: str, status: int = 200, **more: Any) -> S:
        with self._refusals():
            return _read(shape, self._github._send(method, self._github._api + path, token=self._bearer(), **more), status)

    def _list(self, shape: type[S], path: str, pages: int) -> list[S]:
        with self._refusals():
            return list(self._github._pages(path, None, shape, self._bearer(), pages))

    def app(self) -> AppFacts:
        """The App itself."""
        return self._ask(AppFacts, "GET", "/app")

    def hook(self) -> HookConfig:
        """The App's webhook."""
        return self._ask(HookConfig, "GET", "/app/hook/config")

    def set_hook(self, **changes: str) -> HookConfig:
        """Changes the App's webhook: `url`, `secret`, `content_type`, `insecure_ssl`."""
        return self._ask(HookConfig, "PATCH", "/app/hook/config", json=changes)

    def deliveries(self) -> list[HookDelivery]:
        """The newest deliveries, the newest first."""
        with self._refusals():
            answer = self._github._send("GET", f"{self._github._api}/app/hook/deliveries?per_page=30", token=self._bearer())
            _expect(answer, 200)
        try:
            return [HookDelivery.model_validate(one) for one in answer.json()]
        except (ValueError, TypeError):
            raise SetupError(Reason.PROVIDER_UNAVAILABLE, "the list of deliveries has another form than GitHub's") from None

    def redeliver(self, delivery: HookDelivery) -> None:
        """Asks GitHub to send a delivery again, signed with the present secret."""
        with self._refusals():
            path = f"/app/hook/deliveries/{delivery.id}/attempts"
            _expect(self._github._send("POST", self._github._api + path, token=self._bearer()), 202)

    def installations(self) -> list[InstallationFacts]:
        """Every installation of the App."""
        return self._list(InstallationFacts, "/app/installations", PAGES)

    def repositories(self, installation_id: int) -> list[RepositoryFacts]:
        """Every repository of an installation, read with a token that may read nothing but names."""
        with self._refusals():
            path = f"/app/installations/{installation_id}/access_tokens"
            answer = self._github._send(
                "POST", self._github._api + path, token=self._bearer(), json={"permissions": {"metadata": "read"}}
            )
            _expect(answer, 201)
        token = str(_object(answer).get("token", ""))
        listed = self._github._pages("/installation/repositories", "repositories", RepositoryFacts, token, REPOSITORY_PAGES)
        return list(listed)

    def reached(self, *, again: bool, seconds: float = 0.0, pause: Callable[[float], None] = time.sleep) -> str:
        """What the newest delivery says of the way from GitHub to our ingress, in words; SetupError when it says nothing good.

        `again` asks GitHub to send a failed one once more and waits up to `seconds`: the ping of a new App comes before we have its
        secret, so that it can't have been taken. `webhook_not_seen_yet`: GitHub has sent nothing. `webhook_unreached`: what it sent
        arrived nowhere or not at us. `signature_invalid`: it arrived, and was signed with another secret than ours.
        """
        waited = 0.0
        while True:
            newest = max(self.deliveries(), key=lambda one: one.delivered_at, default=None)
            failure = SetupError(Reason.WEBHOOK_NOT_SEEN_YET) if newest is None else self._failure(newest)
            if newest is not None and failure is None:
                return f"{newest.event} arrived {newest.delivered_at:%Y-%m-%d %H:%M} UTC, answered {newest.status_code}"
            if newest is not None and again:
                self.redeliver(newest)
                again = False
            if waited >= seconds:
                assert failure is not None  # noqa: S101  # a delivery that didn't fail was returned
                raise failure
            pause(POLL_SECONDS)
            waited += POLL_SECONDS

    def _failure(self, delivery: HookDelivery) -> SetupError | None:
        """Why a delivery doesn't show that GitHub reaches us; None when it does. Our own refusals came from us."""
        if 200 <= delivery.status_code < 300:
            return None
        said = f"{delivery.event}: {delivery.status} ({delivery.status_code})"
        with self._refusals():
            path = f"/app/hook/deliveries/{delivery.id}"
            answer = self._github._send("GET", self._github._api + path, token=self._bearer())
            _expect(answer, 200)
        response = _object(answer).get("response")
        payload = response.get("payload") if isinstance(response, dict) else None
        try:
            ours = json.loads(payload) if isinstance(payload, str) else {}
        except ValueError:
            ours = {}
        if not isinstance(ours, dict) or "outcome" not in ours:
            return SetupError(Reason.WEBHOOK_UNREACHED, said)
        reason = ours.get("reason")
        if reason in (Reason.SIGNATURE_INVALID, Reason.WEBHOOK_SECRET_MISSING, Reason.SECRET_UNREADABLE):
            return SetupError(Reason(reason), said)
        return None


class _RefusedError(SetupError):
    """GitHub answers 401."""


def _expect(answer: httpx.Response, status: int) -> None:
    if answer.status_code == status:
        return
    if answer.status_code == 401:
        raise _RefusedError(Reason.PROVIDER_AUTH, "HTTP 401")
    by_status = {403: Reason.PROVIDER_REFUSED, 404: Reason.PROVIDER_NOT_FOUND, 429: Reason.PROVIDER_RATE_LIMITED}
    reason = by_status.get(
        answer.status_code, Reason.PROVIDER_UNAVAILABLE if answer.status_code >= 500 else Reason.PROVIDER_INVALID
    )
    raise SetupError(reason, f"HTTP {answer.status_code}")


def _object(answer: httpx.Response) -> dict[str, Any]:
    try:
        found = answer.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _read(shape: type[S], answer: httpx.Response, status: int = 200) -> S:
    _expect(answer, status)
    try:
        return shape.model_validate(_object(answer))
    except ValidationError:
        raise SetupError(Reason.PROVIDER_UNAVAILABLE, "the answer has another form than GitHub's") from None
