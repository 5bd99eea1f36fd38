"""What an ID token must be before anything in it is believed; keys that may sign one."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.providers.oidc import OidcError, Registration, _key_id, checked_claims, error_code, signing_keys

NOW = datetime(2026, 5, 1, tzinfo=UTC)
US = Registration("https://id.test", "kilo", Path("nowhere"), offline=False, private_network=False)
AT = int(NOW.timestamp())
GOOD = {"iss": "https://id.test", "sub": "1", "aud": "kilo", "iat": AT, "exp": AT + 300, "nonce": "n"}


@cache
def rsa_key(bits: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


def listed(key: Any, **more: Any) -> dict[str, Any]:
    algorithm = RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else ECAlgorithm
    return {**json.loads(algorithm.to_jwk(key.public_key())), "kid": "k", **more}


def read(token: str, skew: timedelta | None = timedelta()) -> dict[str, Any]:
    key = signing_keys({"keys": [listed(rsa_key())]})["k"]
    return checked_claims(token, key, US, nonce="n", access_token=None, now=NOW, skew=skew)


def signed(claims: dict[str, Any], algorithm: str = "RS256", **header: Any) -> str:
    """By its bytes: a library of tokens would refuse to write some of these."""
    return jwt.PyJWS().encode(json.dumps(claims).encode(), rsa_key(), algorithm=algorithm, headers={"kid": "k", **header})


@pytest.mark.parametrize("algorithm", ["RS256", "RS512", "PS256"])
def test_a_good_token_is_believed_with_a_minute_of_grace(algorithm: str) -> None:
    assert read(signed(GOOD, algorithm))["sub"] == "1"
    assert read(signed(GOOD | {"aud": ["kilo", "other"], "azp": "kilo"}))["sub"] == "1"
    assert read(signed(GOOD | {"exp": AT - 59, "nbf": AT + 59, "iat": AT + 59}))["sub"] == "1"
    # Headers that we don't know are nobody's concern (RFC 7515, 4).
    assert read(signed(GOOD, x="1"))["sub"] == "1"


@pytest.mark.parametrize(
    "change",
    [
        {"iss": "https://id.test/"},
        {"iss": ["https://id.test"]},
        {"aud": "other"},
        {"aud": ["other"]},
        {"aud": []},
        {"aud": {"kilo": 1}},
        {"aud": ["kilo", "other"]},
        {"azp": "other"},
        {"exp": AT - 60},
        {"exp": str(AT + 300)},
        {"exp": None},
        {"iat": AT + 61},
        {"nbf": AT + 61},
        {"nonce": "m"},
        {"nonce": None},
        {"nonce": ["n"]},
        {"sub": None},
        {"sub": 1},
    ],
)
def test_a_claim_that_is_missing_wrong_or_of_another_type_refuses_the_token(change: dict[str, Any]) -> None:
    with pytest.raises(OidcError) as refused:
        read(signed(GOOD | change))
    assert refused.value.reason is Reason.OIDC_TOKEN_INVALID
    for name in [name for name in change if name in GOOD]:
        with pytest.raises(OidcError):
            read(signed({key: value for key, value in GOOD.items() if key != name}))


def test_a_claim_of_time_is_called_a_wrong_clock_only_where_the_clocks_differ() -> None:
    late = signed(GOOD | {"exp": AT - 600})
    for skew, reason in (
        (timedelta(minutes=-15), Reason.OIDC_CLOCK_SKEW),
        (timedelta(seconds=5), Reason.OIDC_TOKEN_INVALID),
        (None, Reason.OIDC_TOKEN_INVALID),
    ):
        with pytest.raises(OidcError) as refused:
            read(late, skew)
        assert refused.value.reason is reason
    with pytest.raises(OidcError) as refused:
        read(signed(GOOD | {"aud": "other"}), timedelta(minutes=-15))
    assert refused.value.reason is Reason.OIDC_TOKEN_INVALID


def test_signatures_that_anybody_can_make_and_asked_for_extensions_are_refused() -> None:
    head, body, mark = signed(GOOD).split(".")
    forged = [
        jwt.encode(GOOD, "", algorithm="none", headers={"kid": "k"}),
        jwt.encode(GOOD, "k" * 32, algorithm="HS256", headers={"kid": "k"}),
        jwt.encode(GOOD, rsa_key(2048 + 8), algorithm="RS256", headers={"kid": "k"}),
        signed(GOOD, crit=["x"], x=1),
        f"{head}.{body}.",
        f"{head}.{signed(GOOD | {'sub': '2'}).split('.')[1]}.{mark}",
        f"{head}.{body}",
    ]
    for token in forged:
        with pytest.raises(OidcError) as refused:
            read(token)
        assert refused.value.reason is Reason.OIDC_TOKEN_INVALID


@settings(deadline=None)
@given(st.text(max_size=60) | st.lists(st.text(alphabet="eyJ0.hbGciO_-=", max_size=30), min_size=3, max_size=3).map(".".join))
def test_what_is_no_token_is_refused_as_one(token: str) -> None:
    for look in (_key_id, read):
        with pytest.raises(OidcError):
            look(token)


@pytest.mark.filterwarnings("ignore:Key size")
def test_only_strong_public_keys_for_signatures_are_taken_and_a_broken_one_spoils_no_other() -> None:
    curve = ec.generate_private_key(ec.SECP256R1())
    keys = [
        listed(rsa_key(), kid="rsa"),
        listed(curve, kid="ec"),
        listed(rsa_key(1024), kid="short"),
        listed(rsa_key(), kid="enc", use="enc"),
        listed(rsa_key(), kid="hmac", alg="HS256"),
        listed(ec.generate_private_key(ec.SECP256K1()), kid="k1"),
        {"kty": "oct", "k": "c2VjcmV0", "kid": "oct"},
        {"kty": "RSA", "kid": "broken"},
        {"kty": "RSA", "kid": "odd", "n": 1, "e": []},
        listed(rsa_key(), kid=7),
        "key",
        None,
    ]
    assert set(signing_keys({"keys": keys})) == {"rsa", "ec"}
    for document in ({}, {"keys": None}, {"keys": "x"}):
        assert signing_keys(document) == {}


@pytest.mark.parametrize("said", ["<b>x</b>", "a b", "", "é", None, ["access_denied"], "x" * 61])
def test_an_issuers_words_arent_repeated_unless_they_are_a_code(said: Any) -> None:
    assert error_code(said) == "no readable error code" and error_code("access_denied") == "access_denied"
