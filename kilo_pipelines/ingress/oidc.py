"""The browser's way through a login at the OpenID Connect issuer: begun by a page of ours, finished once, in the same browser.

What binds the two ends (state, nonce, PKCE's verifier, where to go on) travels in a sealed cookie of ten minutes. Does not belong
here: the issuer's side (providers/oidc.py), sessions (ingress/operators.py).
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from urllib.parse import urlsplit

import anyio
from cryptography.fernet import Fernet, InvalidToken
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.operators import person_of
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.text import plain_line
from kilo_pipelines.ingress import metrics
from kilo_pipelines.ingress.login_pages import HEADERS, onward_page, refusal_page
from kilo_pipelines.ingress.operators import OIDC, OIDC_SESSION, Operators, TooManyGuessesError, set_session
from kilo_pipelines.providers.oidc import OidcClient, OidcError, Registration, error_code
from kilo_pipelines.settings import Settings

log = logging.getLogger(__name__)

CALLBACK = "/login/oidc/callback"
# A person types a password and finds a second factor; codes themselves live no longer (RFC 6749, 4.1.2).
FLOW_LIFE = timedelta(minutes=10)
# Codes have some hundred characters; what is longer came from elsewhere.
CODE_LENGTH = 4_096
# A name shown on a page and in a line of the log.
NAME_LENGTH = 120
_STATUS = {
    Reason.OIDC_NOT_CONFIGURED: 404,
    Reason.OIDC_STATE_INVALID: 400,
    Reason.LOGIN_TOO_OFTEN: 429,
    Reason.OIDC_UNREACHABLE: 502,
    Reason.OIDC_DISCOVERY_INVALID: 502,
    Reason.OIDC_CLOCK_SKEW: 502,
    Reason.OIDC_TOKEN_INVALID: 403,
    Reason.OIDC_REFUSED: 403,
    Reason.OIDC_EMAIL_UNVERIFIED: 403,
    Reason.OIDC_NOT_OPERATOR: 403,
}
# Who is told their own name, as the issuer gave it.
_KNOWN_PERSON = (Reason.OIDC_NOT_OPERATOR, Reason.OIDC_EMAIL_UNVERIFIED)


@dataclass(frozen=True)
class Flow:
    """One login on its way."""

    state: str
    nonce: str
    verifier: str
    redirect_uri: str
    landing: str


# Logins that came back within the life of their cookies: more than operators ever make, and a bound for whoever makes them up.
MOST_USED = 1_000


class OidcLogin:
    """Logins at one issuer. The key of the cookies is this process's: what a restart interrupts is begun again."""

    def __init__(self, client: OidcClient, operators: Operators, clock: Clock) -> None:
        self._client = client
        self._operators = operators
        self._clock = clock
        self._box = Fernet(Fernet.generate_key())
        # States that came back, until their cookies are void anyway; the rate of callbacks bounds them.
        self._used: dict[str, datetime] = {}

    @property
    def host(self) -> str:
        """The issuer as people know it."""
        return urlsplit(self._client.registration.issuer).netloc

    async def begin(self, origin: str, landing: str) -> Response:
        """Sends the browser to the issuer; `origin` is the address of ours under which it came, and where it comes back."""
        state, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(3))
        flow = Flow(state, nonce, verifier, f"{origin}{CALLBACK}", landing)
        try:
            address = await self._client.authorization_url(
                redirect_uri=flow.redirect_uri, state=state, nonce=nonce, verifier=verifier
            )
        except OidcError as failure:
            log.warning("no login at the issuer: %s", failure)
            return refused(failure.reason)
        answer = RedirectResponse(address, 303, headers=HEADERS)
        sealed = self._box.encrypt_at_time(json.dumps(asdict(flow)).encode(), self._seconds()).decode()
        secure = origin.startswith("https://")
        # Lax: it comes back from the issuer's site, with a navigation.
        answer.set_cookie(
            _cookie(secure), sealed, max_age=int(FLOW_LIFE.total_seconds()), httponly=True, samesite="lax", secure=secure
        )
        return answer

    async def finish(self, request: Request) -> Response:
        """The issuer's answer through the browser: a session and on to where the login was to lead, or a page that says why not."""
        flow = self._opened(request)
        if flow is None or not self._first_time(request, flow):
            return self._done(refused(Reason.OIDC_STATE_INVALID))
        try:
            token = await self._logged_in(request, flow)
        except TooManyGuessesError:
            return self._done(refused(Reason.LOGIN_TOO_OFTEN))
        except OidcError as failure:
            log.warning("login at the issuer refused: %s", failure)
            shown = failure.detail if failure.reason in (Reason.OIDC_CLOCK_SKEW, *_KNOWN_PERSON) else ""
            return self._done(refused(failure.reason, shown))
        metrics.logins.labels(OIDC, "logged_in").inc()
        answer = onward_page(flow.landing)
        set_session(answer, token, OIDC_SESSION, secure=flow.redirect_uri.startswith("https://"))
        return self._done(answer)

    async def _logged_in(self, request: Request, flow: Flow) -> str:
        """A new session's token. Raises OidcError."""
        said = request.query_params
        if "error" in said:
            raise OidcError(Reason.OIDC_REFUSED, f"the issuer answers {error_code(said['error'])}")
        code = said.get("code", "")
        if not 0 < len(code) <= CODE_LENGTH:
            raise OidcError(Reason.OIDC_STATE_INVALID, "the answer holds no code")
        # Counted from here on, for everybody together: only this asks the issuer. Whoever reaches this listener can use the tries up.
        self._operators.guess(OIDC)
        claims = await self._client.claims(code=code, redirect_uri=flow.redirect_uri, nonce=flow.nonce, verifier=flow.verifier)
        rule = self._operators.ways.rule
        grounds = rule.grounds(claims)
        who = plain_line(person_of(claims, grounds))[:NAME_LENGTH]
        if not grounds:
            unverified = rule.lacks_verification(claims)
            reason = Reason.OIDC_EMAIL_UNVERIFIED if unverified else Reason.OIDC_NOT_OPERATOR
            raise OidcError(reason, f"logged in as {who}")
        token = await anyio.to_thread.run_sync(self._operators.admit, who, grounds)
        log.info("operator %s logged in at %s as %s", who, self.host, ", ".join(sorted(grounds)))
        return token

    def _opened(self, request: Request) -> Flow | None:
        """The login that this browser began, not too long ago."""
        for secure in (True, False):
            sealed = request.cookies.get(_cookie(secure), "")
            try:
                opened = self._box.decrypt_at_time(sealed, int(FLOW_LIFE.total_seconds()), self._seconds())
            except InvalidToken:
                continue
            flow = Flow(**json.loads(opened))
            # A page of a neighbouring host can set the plain name over https, not the one with the prefix.
            return flow if flow.redirect_uri.startswith("https://") == secure else None
        return None

    def _first_time(self, request: Request, flow: Flow) -> bool:
        """Whether the answer is to this login and comes for the first time."""
        said = request.query_params
        if any(len(said.getlist(name)) > 1 for name in ("state", "code", "error", "iss")):
            return False
        if not hmac.compare_digest(said.get("state", "").encode(), flow.state.encode()):
            return False
        # Which issuer answers, where it says so (RFC 9207).
        if said.get("iss", self._client.registration.issuer) != self._client.registration.issuer:
            return False
        now = self._clock.now()
        self._used = {state: until for state, until in self._used.items() if until > now}
        if flow.state in self._used or len(self._used) >= MOST_USED:
            return False
        self._used[flow.state] = now + FLOW_LIFE + timedelta(seconds=1)  # cookies count whole seconds
        return True

    def _seconds(self) -> int:
        return int(self._clock.now().timestamp())

    @staticmethod
    def _done(answer: Response) -> Response:
        """Whatever came of it, this login isn't finished a second time."""
        for secure in (True, False):
            answer.delete_cookie(_cookie(secure), httponly=True, samesite="lax", secure=secure)
        return answer


def _cookie(secure: bool) -> str:
    """With the prefix browsers take it from this very host over https alone (RFC 6265bis, 4.1.3)."""
    return "__Host-kilo_login" if secure else "kilo_login"


def refused(reason: Reason, detail: str = "") -> Response:
    """The page of a login that came to nothing, counted."""
    metrics.logins.labels(OIDC, str(reason)).inc()
    return refusal_page(reason, _STATUS[reason], detail)


def registration_of(settings: Settings) -> Registration | None:
    """Us as the issuer's client, as the settings say; None where no issuer is configured."""
    if not settings.oidc_configured:
        return None
    return Registration(
        issuer=str(settings.oidc_issuer),
        client_id=str(settings.oidc_client_id),
        secret_file=settings.oidc_client_secret_file,
        offline=settings.offline,
        private_network=settings.oidc_private_network,
    )
