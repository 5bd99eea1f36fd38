"""The checks of `doctor` on how operators log in: the issuer, its keys, the redirect address, the clocks."""

from __future__ import annotations

import asyncio
import stat
from datetime import timedelta

from kilo_pipelines.core.checks import Check
from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.operators import OperatorRule
from kilo_pipelines.core.reasons import MEANING, Reason
from kilo_pipelines.ingress.oidc import CALLBACK, registration_of
from kilo_pipelines.providers.oidc import LEEWAY, Discovery, OidcClient, OidcError
from kilo_pipelines.settings import Settings


def login_checks(settings: Settings, clock: Clock) -> list[Check]:
    """All of them. The issuer is asked; nobody is logged in."""
    registration = registration_of(settings)
    ways = [name for name, on in (("password", settings.password_login), ("issuer", registration is not None)) if on]
    login = Check(
        "login",
        "login_impossible",
        bool(ways),
        f"by {' or '.join(ways)}" if ways else "the password is switched off and no issuer is configured",
        "set KILO_OIDC_ISSUER and KILO_OIDC_CLIENT_ID, or KILO_PASSWORD_LOGIN=true",
    )
    if registration is None:
        half = bool(settings.oidc_issuer or settings.oidc_client_id or settings.oidc_operators or settings.oidc_operator_group)
        code, remedy = str(Reason.OIDC_NOT_CONFIGURED), MEANING[Reason.OIDC_NOT_CONFIGURED][1]
        return [login, Check("oidc", code, False, "issuer or client id is missing", remedy)] if half else [login]
    client = OidcClient(registration, clock)
    return [login, _operators(settings), _secret(settings), _redirect(settings), *asyncio.run(_issuer(client))]


async def _issuer(client: OidcClient) -> list[Check]:
    """Reachable, the same as ours, with keys, with our time; what needs the check before it is left out where that one failed."""
    issuer = client.registration.issuer
    try:
        found = await client.discovery()
    except OidcError as failure:
        return [_failed("oidc issuer", failure, client.registration.offline)]
    checks = [Check("oidc issuer", str(Reason.OIDC_DISCOVERY_INVALID), True, f"{issuer} describes itself", ""), _clock(found)]
    try:
        count = await client.usable_keys()
    except OidcError as failure:
        return [*checks, _failed("oidc keys", failure, client.registration.offline)]
    remedy = "the issuer must sign with RSA (2,048 bits) or an elliptic curve: RS256 is what all support"
    return [*checks, Check("oidc keys", str(Reason.OIDC_TOKEN_INVALID), count > 0, f"{count} that may sign tokens", remedy)]


def _failed(name: str, failure: OidcError, offline: bool) -> Check:
    remedy = MEANING[failure.reason][1].partition("`kilo-pipelines doctor`")[0].rstrip("; ")
    if failure.reason is Reason.OIDC_UNREACHABLE:
        remedy = "check KILO_OIDC_ISSUER and the network; KILO_OIDC_PRIVATE_NETWORK=true for an issuer in a private one"
    # The twin's issuer is there once `up` has started it.
    return Check(name, str(failure.reason), False, failure.detail, remedy, required=not offline)


def _clock(found: Discovery) -> Check:
    name, code = "oidc clock", str(Reason.OIDC_CLOCK_SKEW)
    if found.skew is None:
        return Check(name, code, True, "the issuer doesn't tell its time", "")
    # The header has whole seconds and was written when the answer began.
    near = abs(found.skew) <= LEEWAY - timedelta(seconds=1)
    return Check(
        name, code, near, f"the issuer's is {found.skew.total_seconds():+.0f} s from ours", "set this machine's clock (NTP)"
    )


def _operators(settings: Settings) -> Check:
    count = len(OperatorRule(frozenset(settings.oidc_operators), settings.oidc_operator_group).configured)
    return Check(
        "oidc operators",
        "oidc_operators_missing",
        count > 0,
        f"{count} e-mail addresses, subs or groups" if count else "none: nobody comes in through the issuer",
        "set KILO_OIDC_OPERATORS or KILO_OIDC_OPERATOR_GROUP",
    )


def _secret(settings: Settings) -> Check:
    file, code = settings.oidc_client_secret_file, "oidc_secret_readable"
    if not file.exists():
        return Check("oidc secret", code, True, "none: a public client, bound by PKCE", "")
    private = not stat.S_IMODE(file.stat().st_mode) & 0o077
    return Check("oidc secret", code, private, "stored" if private else f"{file} can be read by others", f"chmod 600 {file}")


def _redirect(settings: Settings) -> Check:
    origin = settings.admin_origin or settings.admin_url
    found = f"register {origin}{CALLBACK} at the issuer"
    safe = origin.startswith("https://") or settings.offline
    remedy = "serve the admin port through a TLS proxy and set KILO_ADMIN_ORIGIN to its https address"
    return Check("oidc redirect", "oidc_redirect_plain", safe, found, remedy, required=False)
