"""Who is an operator by an issuer's claims, and where a login may lead."""

from __future__ import annotations

from typing import Any
from urllib.parse import urljoin, urlsplit

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kilo_pipelines.core.operators import NOBODY, OperatorRule, landing, person_of

RULE = OperatorRule(frozenset({"Ada@Acme.test", "00u1"}), "ops")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
# On a busy machine the first draw takes longer than hypothesis likes.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
CLAIMS = st.fixed_dictionaries(
    {}, optional={name: JSON | st.just("ops") | st.just("00u1") for name in ("sub", "email", "email_verified", "groups", "name")}
)


@pytest.mark.parametrize(
    ("claims", "grounds"),
    [
        ({"sub": "1", "email": "ada@acme.test", "email_verified": True}, {"email:ada@acme.test"}),
        ({"sub": "1", "email": "ADA@ACME.TEST", "email_verified": True}, {"email:ada@acme.test"}),
        ({"sub": "1", "email": "ada@acme.test"}, set()),
        ({"sub": "1", "email": "ada@acme.test", "email_verified": False}, set()),
        # Only what the standard says is yes; an issuer that writes a string may write "false", too.
        ({"sub": "1", "email": "ada@acme.test", "email_verified": "true"}, set()),
        ({"sub": "1", "email": "ada@acme.test", "email_verified": 1}, set()),
        # The Kelvin sign folds to a k, the long s to an s: other letters, other people.
        ({"sub": "1", "email": "ada@acme.te\u017ft", "email_verified": True}, set()),
        ({"sub": "00u1"}, {"sub:00u1"}),
        ({"sub": "00U1"}, set()),
        ({"sub": "1", "groups": ["dev", "ops"]}, {"group:ops"}),
        ({"sub": "1", "groups": "ops"}, {"group:ops"}),
        ({"sub": "1", "groups": ["ops2", "/ops", ["ops"]]}, set()),
        # One kind of claim never stands for another.
        ({"sub": "ada@acme.test", "email": "00u1", "email_verified": True, "groups": ["ada@acme.test", "00u1"]}, set()),
        ({"sub": "ops", "email": "ops", "email_verified": True}, set()),
    ],
)
def test_a_person_is_an_operator_on_configured_grounds_alone(claims: dict[str, Any], grounds: set[str]) -> None:
    assert RULE.grounds(claims) == grounds
    assert NOBODY.grounds(claims) == set()


def test_an_address_that_only_lacks_its_proof_is_told_apart() -> None:
    assert RULE.lacks_verification({"sub": "1", "email": "ada@acme.test"})
    assert not RULE.lacks_verification({"sub": "00u1", "email": "ada@acme.test"}), "is an operator by the sub"
    assert not RULE.lacks_verification({"sub": "1", "email": "grace@acme.test"})


@patient
@given(CLAIMS)
def test_no_claims_of_any_shape_break_the_rule_or_pass_without_their_value(claims: dict[str, Any]) -> None:
    grounds = RULE.grounds(claims)
    assert grounds <= RULE.configured
    assert ("sub:00u1" in grounds) == (claims.get("sub") == "00u1")
    assert "group:ops" not in grounds or "ops" in claims["groups"]
    assert RULE.lacks_verification(claims) in (True, False)


@patient
@given(CLAIMS)
def test_everybody_has_a_name(claims: dict[str, Any]) -> None:
    assert person_of({**claims, "sub": "s"}, RULE.grounds({**claims, "sub": "s"}))


@pytest.mark.parametrize("wanted", ["/dagster/", "/dagster/runs?q=a%20b", "/dagster/assets/a/b-c_d"])
def test_a_login_leads_back_to_the_page_that_was_wanted(wanted: str) -> None:
    assert landing(wanted, "/dagster") == wanted


@patient
@given(st.text(alphabet=st.sampled_from("/\\.:@%?#2ef5cdagsterx\t\n "), max_size=40) | st.text(max_size=40))
@example("//evil.example/dagster/")
@example("https://evil.example/dagster/")
@example("/dagster/../../evil")
@example("/dagster/%2e%2e/login")
@example("/dagster/%2f%2fevil.example")
@example("/dagster/\\evil.example")
@example("/dagster/x\r\nset-cookie: a=b")
def test_no_wanted_page_leads_away(wanted: str) -> None:
    for asked in (wanted, f"/dagster/{wanted}"):
        led = landing(asked, "/dagster")
        there = urlsplit(urljoin("https://kilo.example/login", led))
        assert (there.scheme, there.netloc) == ("https", "kilo.example") and there.path.startswith("/dagster/")
        assert led.isprintable() and "\\" not in led
