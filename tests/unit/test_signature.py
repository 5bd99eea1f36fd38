"""Webhook signatures and shapes: what verifies, and everything next to it that doesn't."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilo_pipelines.providers.github_webhooks import event_of_shape, installation_id, shape_matches, verify_signature


def _sign(secret: str, body: bytes) -> str:
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def test_the_published_example_of_github_verifies() -> None:
    """Secret, body and signature of GitHub's page "Validating webhook deliveries"."""
    signature = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    assert verify_signature("It's a Secret to Everybody", b"Hello, World!", signature)


@given(body=st.binary(max_size=200), secret=st.text(st.characters(codec="utf-8"), min_size=1, max_size=20))
def test_the_right_signature_verifies_and_no_other_body_does(body: bytes, secret: str) -> None:
    signature = _sign(secret, body)
    assert verify_signature(secret, body, signature)
    assert not verify_signature(secret, body + b" ", signature)
    assert not verify_signature(secret + "x", body, signature)


@given(header=st.text(max_size=90))
def test_no_arbitrary_header_verifies(header: str) -> None:
    """Nor does one raise: text beyond ASCII is refused, not compared."""
    assert not verify_signature("secret", b"body", header)


@pytest.mark.parametrize("position", range(71))
def test_one_changed_character_anywhere_is_refused(position: int) -> None:
    signature = _sign("secret", b"body")
    changed = "0" if signature[position] != "0" else "1"
    assert not verify_signature("secret", b"body", signature[:position] + changed + signature[position + 1 :])


@pytest.mark.parametrize("cut", range(71))
def test_a_truncated_signature_is_refused(cut: int) -> None:
    assert not verify_signature("secret", b"body", _sign("secret", b"body")[:cut])


def test_missing_header_upper_case_and_other_algorithms_are_refused() -> None:
    right = _sign("secret", b"body")
    digest = hmac.new(b"secret", b"body", "sha1").hexdigest()
    for header in (None, "", right.upper(), right + "\n", " " + right, right.removeprefix("sha256="), f"sha1={digest}"):
        assert not verify_signature("secret", b"body", header)


def test_an_empty_secret_verifies_nothing() -> None:
    """An empty key is a usable HMAC key for whoever guesses it."""
    assert not verify_signature("", b"body", _sign("", b"body"))


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [], {}, 0, -1, 2**63])
def test_only_a_positive_whole_number_is_an_installation_id(value: object) -> None:
    assert installation_id({"installation": {"id": value}}) is None
    assert installation_id({"installation": value}) is None


def test_installation_id_is_found() -> None:
    assert installation_id({"installation": {"id": 2**63 - 1}}) == 2**63 - 1
    assert installation_id({}) is None


PULL = {"action": "opened", "number": 1, "pull_request": {}, "installation": {"id": 1}}


def test_a_body_of_ours_is_refused_under_any_other_event_name() -> None:
    """The event header is outside the signature (threats, rule 15)."""
    assert event_of_shape(PULL) == "pull_request"
    for name in ("issues", "push", "installation", "installation_repositories", "ping", "pull_request_review"):
        assert not shape_matches(name, PULL)


def test_events_about_pull_requests_are_not_pull_request_events() -> None:
    for beside in ("review", "comment", "thread"):
        assert event_of_shape(PULL | {beside: {}}) is None
        assert shape_matches(f"pull_request_{beside}", PULL | {beside: {}})
        assert not shape_matches("pull_request", PULL | {beside: {}})
