"""An OpenID Connect issuer, as its client: discovery, the code for a token, the token's claims checked against the issuer's keys.

Sources: OpenID Connect Core 1.0 (3.1), Discovery 1.0 (4), RFC 6749, 7636 (PKCE), 8725 (tokens). Every address that the issuer names
goes through the outbound guard. Does not belong here: who is an operator (core/operators.py), the browser's side (ingress/oidc.py).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import quote_plus

import anyio
import httpx
from authlib.oauth2.auth import ClientAuth
from authlib.oauth2.rfc6749.parameters import prepare_grant_uri, prepare_token_request
from authlib.oauth2.rfc7636 import create_s256_code_challenge
from authlib.oidc.core import CodeIDToken
from joserfc import jws, jwt
from joserfc.errors import ExpiredTokenError, InvalidClaimError, JoseError
from joserfc.jwk import ECKey, JWKRegistry, RSAKey

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.text import plain_line
from kilo_pipelines.providers.outbound import Answer, OutboundError, exchange, vetted_address

# Machines with NTP agree within a second, one that has just woken up within some; a token lives five minutes and more, so that one
# minute makes no old token young.
LEEWAY = timedelta(seconds=60)
# Signatures that only the issuer's private key can make. No `none`, and no HMAC, whose key could be anything that we know.
ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512"})
# RFC 7518, 3.3.
RSA_BITS = 2048
# A key that the issuer took out of its list is believed this long at most; addresses change less often still.
KNOWN_FOR = timedelta(hours=1)
# An unknown key is looked up at once, the next one after this: forged tokens make us no tool against the issuer.
REFETCH_AFTER = timedelta(seconds=30)
# Who clicks again while the issuer is away waits for no second time-out, and a crowd doesn't queue for one each.
AWAY_FOR = timedelta(seconds=5)
# A whole exchange, and reaching the issuer; a person waits for two of them.
SECONDS = 8.0
CONNECT_SECONDS = 4.0
# Discovery has some KB, key sets with certificates some more, tokens with hundreds of groups too.
ANSWER_BYTES = 262_144
SCOPE = "openid email profile"


class OidcError(Exception):
    """A login that can't go on: the reason, and a detail for the operator's log without anything secret."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Registration:
    """Us as the issuer's client. Without a secret in its file we are a public client, and PKCE alone binds the code to us."""

    issuer: str
    client_id: str
    secret_file: Path
    offline: bool
    private_network: bool

    def secret(self) -> str | None:
        """Read at each use, so that a new one counts at once."""
        try:
            return self.secret_file.read_text().strip() or None
        except FileNotFoundError:
            return None


@dataclass(frozen=True)
class Discovery:
    """What the issuer says of itself; `skew`: its clock minus ours, where it told the time."""

    authorization: str
    token: str
    keys: str
    by_body: bool
    skew: timedelta | None


Key = RSAKey | ECKey


class OidcClient:
    """One issuer. Keeps what it said of itself and its keys for an hour."""

    def __init__(self, registration: Registration, clock: Clock) -> None:
        self.registration = registration
        self._clock = clock
        self._discovery: tuple[datetime, Discovery] | None = None
        self._failed: tuple[datetime, OidcError] | None = None
        self._keys: tuple[datetime, dict[str | None, Key]] | None = None
        self._lock = asyncio.Lock()

    async def authorization_url(self, *, redirect_uri: str, state: str, nonce: str, verifier: str) -> str:
        """Where the browser goes to log in. Raises OidcError."""
        found = await self.discovery()
        address: str = prepare_grant_uri(
            found.authorization,
            client_id=self.registration.client_id,
            response_type="code",
            redirect_uri=redirect_uri,
            scope=SCOPE,
            state=state,
            nonce=nonce,
            code_challenge=create_s256_code_challenge(verifier),
            code_challenge_method="S256",
        )
        return address

    async def claims(self, *, code: str, redirect_uri: str, nonce: str, verifier: str) -> dict[str, Any]:
        """The checked claims of who logged in, for the code that the browser brought. Raises OidcError."""
        found = await self.discovery()
        secret = self.registration.secret()
        way = "none" if secret is None else "client_secret_post" if found.by_body else "client_secret_basic"
        if way == "client_secret_basic":  # RFC 6749, 2.3.1: encoded as in a form first
            auth = ClientAuth(quote_plus(self.registration.client_id), quote_plus(secret or ""), way)
        else:
            auth = ClientAuth(self.registration.client_id, secret, way)
        body = prepare_token_request("authorization_code", code=code, redirect_uri=redirect_uri, code_verifier=verifier)
        headers = {"content-type": "application/x-www-form-urlencoded", "accept": "application/json"}
        address, headers, body = auth.prepare("POST", found.token, headers, body)
        answer = await self._ask("POST", address, headers, body.encode())
        told = _object(answer)
        if answer.status != 200:
            raise OidcError(*_refusal(answer.status, told))
        token = told.get("id_token")
        if not isinstance(token, str):
            raise OidcError(Reason.OIDC_TOKEN_INVALID, "the answer holds no ID token")
        key = await self._key(_key_id(token))
        now = self._clock.now()
        access = told.get("access_token")
        return checked_claims(token, key, self.registration, nonce=nonce, access_token=access, now=now, skew=_skew(answer, now))

    async def discovery(self) -> Discovery:
        """The issuer's own description, checked. Raises OidcError."""
        async with self._lock:
            now = self._clock.now()
            if self._discovery is not None and now - self._discovery[0] <= KNOWN_FOR:
                return self._discovery[1]
            if self._failed is not None and now - self._failed[0] < AWAY_FOR:
                raise OidcError(self._failed[1].reason, self._failed[1].detail)
            url = f"{self.registration.issuer.rstrip('/')}/.well-known/openid-configuration"
            try:
                found = self._described(await self._ask("GET", url, {"accept": "application/json"}))
            except OidcError as failure:
                self._failed = (self._clock.now(), failure)
                raise
            self._discovery = (now, found)
            return found

    def _described(self, answer: Answer) -> Discovery:
        told = _object(answer)
        if answer.status != 200:
            raise OidcError(Reason.OIDC_UNREACHABLE, f"the discovery document answers HTTP {answer.status}")
        if told.get("issuer") != self.registration.issuer:
            named = plain_line(str(told.get("issuer")))
            raise OidcError(Reason.OIDC_DISCOVERY_INVALID, f"the issuer calls itself {named}, not {self.registration.issuer}")
        addresses = [told.get(name) for name in ("authorization_endpoint", "token_endpoint", "jwks_uri")]
        if not all(isinstance(one, str) and self._may_lead_to(one) for one in addresses):
            raise OidcError(Reason.OIDC_DISCOVERY_INVALID, "an address of the discovery document is missing or isn't https")
        challenges = told.get("code_challenge_methods_supported")
        if self.registration.secret() is None and isinstance(challenges, list) and "S256" not in challenges:
            raise OidcError(Reason.OIDC_DISCOVERY_INVALID, "without a client secret the issuer must support PKCE with S256")
        ways = told.get("token_endpoint_auth_methods_supported")
        by_body = isinstance(ways, list) and "client_secret_post" in ways and "client_secret_basic" not in ways
        authorization, token, keys = map(str, addresses)
        return Discovery(authorization, token, keys, by_body, _skew(answer, self._clock.now()))

    def _may_lead_to(self, address: str) -> bool:
        """What a browser or we may be sent to; where a name leads is the guard's question."""
        try:
            parts = httpx.URL(address)
        except httpx.InvalidURL:
            return False
        return bool(parts.host) and (parts.scheme == "https" or (parts.scheme == "http" and self.registration.offline))

    async def usable_keys(self) -> int:
        """How many keys of the issuer could have signed a token. Raises OidcError."""
        found = await self.discovery()
        async with self._lock:
            return len((await self._fetched_keys(found.keys))[1])

    async def _key(self, key_id: str | None) -> Key:
        """The key that a token names, fetched again where it is unknown; a token that names none fits a single key."""
        found = await self.discovery()
        async with self._lock:
            now = self._clock.now()
            held = self._keys
            if held is None or now - held[0] > KNOWN_FOR or (key_id not in held[1] and now - held[0] >= REFETCH_AFTER):
                held = await self._fetched_keys(found.keys)
            keys = held[1]
        if key_id is None and len(keys) == 1:
            return next(iter(keys.values()))
        if key_id is None or key_id not in keys:
            raise OidcError(Reason.OIDC_TOKEN_INVALID, "the token is signed with a key that the issuer doesn't name")
        return keys[key_id]

    async def _fetched_keys(self, address: str) -> tuple[datetime, dict[str | None, Key]]:
        answer = await self._ask("GET", address, {"accept": "application/json"})
        if answer.status != 200:
            raise OidcError(Reason.OIDC_UNREACHABLE, f"the key set answers HTTP {answer.status}")
        self._keys = (self._clock.now(), signing_keys(_object(answer)))
        return self._keys

    async def _ask(self, method: str, url: str, headers: Mapping[str, str], content: bytes = b"") -> Answer:
        held = self.registration
        try:
            address = await anyio.to_thread.run_sync(
                lambda: vetted_address(url, loopback=held.offline, private=held.private_network)
            )
            return await exchange(
                method,
                url,
                address=address,
                headers=headers,
                content=content,
                most=ANSWER_BYTES,
                seconds=SECONDS,
                connect=CONNECT_SECONDS,
            )
        except OutboundError as failure:
            raise OidcError(Reason.OIDC_UNREACHABLE, f"{plain_line(url)}: {failure}") from None


def _object(answer: Answer) -> dict[str, Any]:
    """The answer's JSON object; OidcError when it is none."""
    try:
        told = json.loads(answer.content)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise OidcError(Reason.OIDC_UNREACHABLE, f"HTTP {answer.status} without a JSON object")
    return told


def _refusal(status: int, told: Mapping[str, Any]) -> tuple[Reason, str]:
    """Why no token was given; of the issuer's words only its code (RFC 6749, 5.2), if it looks like one."""
    if status >= 500 or status == 429:
        return Reason.OIDC_UNREACHABLE, f"the token address answers HTTP {status}"
    return Reason.OIDC_REFUSED, f"the token address answers HTTP {status}: {error_code(told.get('error'))}"


def error_code(said: object) -> str:
    """An error code as the standards write them; what doesn't look like one isn't repeated."""
    plain = isinstance(said, str) and 0 < len(said) <= 60 and said.isascii() and said.replace("_", "").isalnum()
    return str(said) if plain else "no readable error code"


def _skew(answer: Answer, now: datetime) -> timedelta | None:
    """The answerer's clock minus ours."""
    try:
        return parsedate_to_datetime(answer.headers["date"]) - now
    except (KeyError, ValueError, TypeError):  # of the last: a date without its zone
        return None


def signing_keys(document: Mapping[str, Any]) -> dict[str | None, Key]:
    """The public keys of a key set that may verify signatures, by their ids; others are passed over, secrets among them."""
    found: dict[str | None, Key] = {}
    listed = document.get("keys")
    for one in listed if isinstance(listed, list) else []:
        if not isinstance(one, dict) or one.get("use", "sig") != "sig" or one.get("alg", "RS256") not in ALGORITHMS:
            continue
        if one.get("kty") not in ("RSA", "EC") or not isinstance(one.get("kid", ""), str):
            continue
        try:
            key = JWKRegistry.import_key(one)
            if _strong(key):
                found[key.kid] = key
        except (JoseError, ValueError, TypeError):
            continue  # one broken key takes no other with it
    return found


def _strong(key: object) -> TypeGuard[Key]:
    if isinstance(key, RSAKey):
        return key.public_key.key_size >= RSA_BITS
    return isinstance(key, ECKey) and key.curve_name in ("P-256", "P-384", "P-521")


def _key_id(token: str) -> str | None:
    """The id of the key that a token says it was signed with. OidcError for what is no signed token."""
    try:
        header = jws.extract_compact(token.encode()).headers()
    except (JoseError, ValueError):
        raise OidcError(Reason.OIDC_TOKEN_INVALID, "not a signed token") from None
    key_id = header.get("kid")
    return key_id if isinstance(key_id, str) else None


def checked_claims(
    token: str,
    key: Key,
    us: Registration,
    *,
    nonce: str,
    access_token: object,
    now: datetime,
    skew: timedelta | None,
) -> dict[str, Any]:
    """The claims of an ID token that is the issuer's, for us, of now and of this very login. Raises OidcError.

    `skew`: the issuer's clock minus ours where it is known, so that a clock that is wrong is called by its name.
    """
    try:
        # Of headers that we don't know only `crit` asks to be refused (RFC 7515, 4.1.11), which the registry does.
        registry = jws.JWSRegistry(algorithms=ALGORITHMS, strict_check_header=False)
        signed = jwt.decode(token, key, algorithms=ALGORITHMS, registry=registry)
        claims = CodeIDToken(
            signed.claims,
            signed.header,
            options={"iss": {"essential": True, "value": us.issuer}, "aud": {"essential": True, "value": us.client_id}},
            params={
                "nonce": nonce,
                "client_id": us.client_id,
                "access_token": access_token if isinstance(access_token, str) else None,
            },
        )
        claims.validate(now=int(now.timestamp()), leeway=int(LEEWAY.total_seconds()))
    except (ExpiredTokenError, InvalidClaimError) as failure:
        named = "exp" if isinstance(failure, ExpiredTokenError) else str(failure.claim)
        if named in ("exp", "iat", "nbf") and skew is not None and abs(skew) > LEEWAY:
            raise OidcError(
                Reason.OIDC_CLOCK_SKEW, f"the issuer's clock is {skew.total_seconds():+.0f} s from this machine's"
            ) from None
        raise OidcError(Reason.OIDC_TOKEN_INVALID, f"claim {named}") from None
    # Of the last three: bytes and claims of types that nobody expects.
    except (JoseError, ValueError, TypeError, RecursionError) as failure:
        raise OidcError(Reason.OIDC_TOKEN_INVALID, type(failure).__name__) from None
    return dict(claims)
