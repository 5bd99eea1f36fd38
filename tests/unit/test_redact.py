"""What looks like a credential leaves no process in a log, a stored detail or a comment."""

from __future__ import annotations

import io
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilo_pipelines.core.redact import BLACK, RedactingFilter, redact

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
tails = st.text(LETTERS, min_size=40, max_size=60)
SHAPES = {
    "installation token": "ghs_{}",
    "personal token": "ghp_{}",
    "fine-grained token": "github_pat_{}",
    "our key": "kilo_{}",
    "model key": "sk-{}",
    "bearer": "Authorization: Bearer {}",
    "in an address": "https://x-access-token:{}@github.com/o/r.git",
    "callback token": "X-Callback-Token: {}",
    "private key": "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----",
    "cut private key": "-----BEGIN PRIVATE KEY-----\n{}",
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@given(
    tail=tails, before=st.sampled_from(["", "see ", '{"a": "', "(", "\n"]), after=st.sampled_from(["", ' and "more"', ")", "\n"])
)
def test_a_credential_of_every_shape_is_blacked_out(shape: str, tail: str, before: str, after: str) -> None:
    shown = redact(before + shape.format(tail) + after)
    assert tail not in shown and BLACK in shown
    assert redact(shown) == shown, "a second pass finds nothing"


@given(st.text(max_size=300))
def test_other_texts_stay_and_nothing_raises(text: str) -> None:
    if not any(
        word in text.lower() for word in ("gh", "sk-", "kilo_", "bearer", "://", "begin", "xox", "akia", "authorization", "token")
    ):
        assert redact(text) == text


def test_ordinary_words_of_a_review_stay() -> None:
    for text in (
        "the kilo_pipelines package",
        "ghost_writer",
        "risk-free",
        "http://localhost:8080/acme/orders@main",
        "Bearer of bad news",
    ):
        assert redact(text) == text


def test_a_log_line_and_its_traceback_are_redacted() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(RedactingFilter())
    logger = logging.getLogger("test-redact")
    logger.addHandler(handler)
    logger.propagate = False
    secret = "ghs_" + "a1" * 20
    try:
        raise ValueError(f"fetch of https://x-access-token:{secret}@github.com failed")
    except ValueError:
        logger.exception("token %s", secret)
    assert secret not in stream.getvalue() and stream.getvalue().count(BLACK) == 3
