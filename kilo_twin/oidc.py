"""An OpenID Connect issuer: discovery, a page on which one chooses who one is, tokens for codes, keys that can be rotated.

`misbehave` makes the next tokens ones that no client may believe. Who logs in is a click: nothing here is a secret but the client's.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import threading
import time
from html import escape
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

# People of the seeded world; `sub` is what an issuer never changes.
PEOPLE: dict[str, dict[str, Any]] = {
    "ada": {"name": "Ada", "email": "ada@acme.test", "email_verified": True, "groups": ["developers", "kilo-operators"]},
    "grace": {"name": "Grace", "email": "grace@acme.test", "email_verified": True, "groups": ["developers"]},
    # Writes somebody else's address into the profile; the issuer hasn't asked for proof.
    "mallory": {"name": "Ada", "email": "ada@acme.test", "email_verified": False, "groups": []},
}
# One with a secret, one that has none and must prove itself by PKCE alone.
CLIENT = "kilo-pipelines"
PUBLIC_CLIENT = "kilo-public"
CALLBACK = "/login/oidc/callback"
MISBEHAVIOUR = (
    "wrong_audience",
    "wrong_issuer",
    "expired",
    "future",
    "wrong_nonce",
    "no_nonce",
    "alg_none",
    "hs256_public_key",
    "foreign_key",
    "unknown_key",
    "foreign_party",
    "no_token",
    "not_json",
    "other_issuer_discovered",
)
CODE_SECONDS = 60
TOKEN_SECONDS = 300


def _key() -> tuple[str, rsa.RSAPrivateKey]:
    return secrets.token_hex(8), rsa.generate_private_key(public_exponent=65537, key_size=2048)


class Issuer:
    """The issuer at `<base_url>/oidc`. Everything but the client's secret is forgotten at a restart."""

    def __init__(self, base_url: str, client_secret: str) -> None:
        self.issuer = f"{base_url}/oidc"
        self._secret = client_secret
        self._lock = threading.Lock()
        self._keys: list[tuple[str, rsa.RSAPrivateKey]] = []
        self._codes: dict[str, dict[str, Any]] = {}
        self._fault: str | None = None

    # -- what a test or an operator does -----------------------------------------------------------------------------------

    def rotate(self) -> dict[str, Any]:
        """Signs with a new key from now on; the old one is gone from the key set."""
        with self._lock:
            self._keys = [_key()]
            return {"kid": self._keys[0][0]}

    def misbehave(self, kind: str | None) -> dict[str, Any]:
        """Goes wrong in one of the ways of MISBEHAVIOUR until told otherwise; None: behaves."""
        if kind is not None and kind not in MISBEHAVIOUR:
            raise ValueError(f"kind must be one of {', '.join(MISBEHAVIOUR)}")
        self._fault = kind
        return {"kind": kind}

    # -- what an issuer does -----------------------------------------------------------------------------------------------

    def routes(self) -> list[Route]:
        """What browsers and clients ask for."""
        return [
            Route("/oidc/.well-known/openid-configuration", self._discovery, methods=["GET"]),
            Route("/oidc/authorize", self._authorize, methods=["GET"]),
            Route("/oidc/authorize", self._chosen, methods=["POST"]),
            Route("/oidc/token", self._token, methods=["POST"]),
            Route("/oidc/jwks", self._key_set, methods=["GET"]),
        ]

    async def _discovery(self, _request: Request) -> Response:
        told = self.issuer if self._fault != "other_issuer_discovered" else "https://elsewhere.test"
        return JSONResponse(
            {
                "issuer": told,
                "authorization_endpoint": f"{self.issuer}/authorize",
                "token_endpoint": f"{self.issuer}/token",
                "jwks_uri": f"{self.issuer}/jwks",
                "response_types_supported": ["code"],
                "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": ["RS256"],
                "code_challenge_methods_supported": ["S256"],
                "token_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post", "none"],
                "authorization_response_iss_parameter_supported": True,
                "scopes_supported": ["openid", "email", "profile"],
            }
        )

    async def _key_set(self, _request: Request) -> Response:
        kid, key = self._current()
        public = json.loads(RSAAlgorithm.to_jwk(key.public_key()))
        return JSONResponse({"keys": [{**public, "kid": kid, "use": "sig", "alg": "RS256"}]})

    def _current(self) -> tuple[str, rsa.RSAPrivateKey]:
        with self._lock:
            if not self._keys:  # made when somebody asks: a start shouldn't wait for it
                self._keys.append(_key())
            return self._keys[0]

    @staticmethod
    def _wrong(asked: dict[str, str]) -> str | None:
        """What is wrong with a request for a login; None when nothing is."""
        back = urlsplit(asked.get("redirect_uri", ""))
        if asked.get("client_id") not in (CLIENT, PUBLIC_CLIENT):
            return "unknown client"
        if back.scheme not in ("http", "https") or back.hostname not in ("localhost", "127.0.0.1") or back.path != CALLBACK:
            return "the redirect address isn't registered"
        if asked.get("response_type") != "code" or "openid" not in asked.get("scope", "").split():
            return "only the code flow of OpenID Connect is served"
        if asked.get("code_challenge_method") != "S256" or len(asked.get("code_challenge", "")) != 43:
            return "PKCE with S256 is required"
        return None

    async def _authorize(self, request: Request) -> Response:
        asked = dict(request.query_params)
        wrong = self._wrong(asked)
        if wrong is not None:
            return HTMLResponse(f"<h1>No</h1><p>{escape(wrong)}</p>", 400)
        kept = "".join(f'<input type="hidden" name="{escape(name)}" value="{escape(value)}">' for name, value in asked.items())
        people = "".join(
            f'<button name="person" value="{login}">{escape(one["name"])} <small>{login} · {escape(one["email"])}'
            f" · {'verified' if one['email_verified'] else 'not verified'} · {escape(', '.join(one['groups']) or 'no group')}</small></button>"
            for login, one in PEOPLE.items()
        )
        return HTMLResponse(
            f'{_PAGE}<h1>Who are you?</h1><p>{escape(asked["client_id"])} would like to know.</p><form method="post" action="/oidc/authorize">'
            f'{kept}{people}<button name="person" value="">Nobody: cancel</button></form>'
        )

    async def _chosen(self, request: Request) -> Response:
        asked = _form(await request.body())
        wrong = self._wrong(asked)
        login = asked.get("person", "")
        if wrong is not None or (login and login not in PEOPLE):
            return HTMLResponse(f"<h1>No</h1><p>{escape(wrong or 'nobody of this name')}</p>", 400)
        back = {"state": asked.get("state", ""), "iss": self.issuer}
        if login:
            code = secrets.token_urlsafe(24)
            with self._lock:
                self._codes[code] = {**asked, "login": login, "until": time.time() + CODE_SECONDS}
            back["code"] = code
        else:
            back["error"] = "access_denied"
        return RedirectResponse(f"{asked['redirect_uri']}?{urlencode(back)}", 303)

    async def _token(self, request: Request) -> Response:
        asked = _form(await request.body())
        client = self._client(request, asked)
        if client is None:
            return JSONResponse({"error": "invalid_client"}, 401)
        with self._lock:
            held = self._codes.pop(asked.get("code", ""), None)  # a code is good for one try
        proof = base64.urlsafe_b64encode(hashlib.sha256(asked.get("code_verifier", "").encode()).digest()).rstrip(b"=").decode()
        if (
            held is None
            or asked.get("grant_type") != "authorization_code"
            or held["until"] < time.time()
            or held["client_id"] != client
            or held["redirect_uri"] != asked.get("redirect_uri")
            or not hmac.compare_digest(held["code_challenge"], proof)
        ):
            return JSONResponse({"error": "invalid_grant"}, 400)
        if self._fault == "not_json":
            return HTMLResponse("<p>maintenance</p>")
        told = {"access_token": secrets.token_urlsafe(24), "token_type": "Bearer", "expires_in": TOKEN_SECONDS}
        if self._fault != "no_token":
            told["id_token"] = self._id_token(held)
        return JSONResponse(told, headers={"cache-control": "no-store"})

    def _client(self, request: Request, asked: dict[str, str]) -> str | None:
        """The client that asks for a token, when it is who it says."""
        name, secret = asked.get("client_id", ""), asked.get("client_secret", "")
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":
            try:
                name, _, secret = base64.b64decode(given).decode().partition(":")
            except ValueError:
                return None
        if name == PUBLIC_CLIENT and not secret:
            return name
        return name if name == CLIENT and hmac.compare_digest(secret, self._secret) else None

    def _id_token(self, held: dict[str, Any]) -> str:
        kid, key = self._current()
        now = int(time.time())
        claims: dict[str, Any] = {
            "iss": self.issuer,
            "sub": f"twin|{held['login']}",
            "aud": held["client_id"],
            "iat": now,
            "exp": now + TOKEN_SECONDS,
            "nonce": held.get("nonce", ""),
            **PEOPLE[held["login"]],
        }
        fault = self._fault
        changed: dict[str, dict[str, Any]] = {
            "wrong_audience": {"aud": "somebody-else"},
            "wrong_issuer": {"iss": "https://elsewhere.test"},
            "expired": {"iat": now - 7_200, "exp": now - 3_600},
            "future": {"iat": now + 3_600, "exp": now + 7_200},
            "wrong_nonce": {"nonce": "of another login"},
            "foreign_party": {"aud": [held["client_id"], "somebody-else"], "azp": "somebody-else"},
        }
        claims |= changed.get(fault or "", {})
        if fault == "no_nonce":
            del claims["nonce"]
        if fault == "alg_none":
            return jwt.encode(claims, "", algorithm="none", headers={"kid": kid})
        if fault == "hs256_public_key":
            pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
            return _hs256({"alg": "HS256", "typ": "JWT", "kid": kid}, claims, pem)
        if fault in ("foreign_key", "unknown_key"):
            other, key = _key()
            kid = other if fault == "unknown_key" else kid
        return jwt.encode(claims, key, algorithm="RS256", headers={"kid": kid})


def _hs256(header: dict[str, Any], claims: dict[str, Any], key: bytes) -> str:
    """By hand: no library signs with a public key in place of a secret."""
    parts = [base64.urlsafe_b64encode(json.dumps(one).encode()).rstrip(b"=") for one in (header, claims)]
    signed = b".".join(parts)
    mark = base64.urlsafe_b64encode(hmac.new(key, signed, hashlib.sha256).digest()).rstrip(b"=")
    return (signed + b"." + mark).decode()


def _form(body: bytes) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(body.decode(), keep_blank_values=True).items()}


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Twin: who are you?</title><style>body{font:16px/1.5 system-ui;max-width:32rem;
margin:4rem auto;padding:0 1rem}button{font:inherit;display:block;width:100%;text-align:left;margin:.5rem 0;padding:.75rem 1rem}small{color:#555}</style>"""
