"""The model proxy's own bound: what a request may use, and what is counted when nobody tells the usage."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilo_pipelines.cloud_agent.model_proxy import (
    MAX_TOKENS,
    Answer,
    ModelProxy,
    RefusedError,
    Registration,
    Session,
    estimate,
    rebuild,
)
from kilo_pipelines.core.limits import Price, Usage, cost
from kilo_pipelines.core.reasons import Reason

PRICE = Price(input=Decimal(2), output=Decimal(8))


def _session(tokens: int, micro_usd: int | None = None) -> Session:
    registration = Registration(session_id="s", model="m", turns=1_000, tokens=tokens, micro_usd=micro_usd, price=PRICE)
    return Session(registration, Path("nowhere"), cast(Any, None), cast(Any, None))


def _body(size: int, asked: int | None = None) -> dict[str, Any]:
    return rebuild({"messages": [{"role": "user", "content": "x" * size}], "max_tokens": asked}, "m")


@given(
    tokens=st.integers(1, 300_000),
    micro_usd=st.none() | st.integers(1, 2_000_000),
    requests=st.lists(st.tuples(st.integers(0, 30_000), st.integers(1, 50_000), st.booleans()), max_size=30),
)
def test_requests_side_by_side_never_pass_the_sessions_bound(
    tokens: int, micro_usd: int | None, requests: list[tuple[int, int, bool]]
) -> None:
    """Each uses all that it may; some end before the next begins, some go on beside it."""
    session, under_way = _session(tokens, micro_usd), []
    for size, asked, ends in requests:
        body = _body(size, asked)
        try:
            held = ModelProxy._check_budget(session, body)
        except RefusedError as refusal:
            assert refusal.code == "budget_exceeded" and session.transcript.last_failure == Reason.BUDGET_EXCEEDED
            continue
        assert 0 < body["max_tokens"] <= min(asked, MAX_TOKENS)
        session.held += held
        under_way.append((estimate(body), body["max_tokens"], held))
        while ends and under_way:
            sent, answered, was_held = under_way.pop()
            session.held -= was_held
            session.transcript.tokens_in += sent
            session.transcript.tokens_out += answered
    for sent, answered, _ in under_way:
        session.transcript.tokens_in += sent
        session.transcript.tokens_out += answered
    assert session.usage.tokens <= tokens
    assert micro_usd is None or cost(PRICE, session.usage) <= micro_usd


def test_a_spent_session_is_refused_before_anything_is_sent() -> None:
    session = _session(1_000)
    session.transcript.tokens_in = 1_000
    with pytest.raises(RefusedError) as refused:
        ModelProxy._check_budget(session, _body(1))
    assert refused.value.status == 402


def test_a_cut_answer_and_a_server_that_counts_nothing_are_paid_for_by_size() -> None:
    """Else a cut stream, or a server without usage, would cost nothing."""
    session, body = _session(10**6), _body(3_000)
    ModelProxy._count(session, body, Answer(text="y" * 300))
    assert session.usage == Usage(estimate(body), 100) and estimate(body) >= 1_000
    told = Answer(text="y" * 300)
    told.take({"usage": {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 5}}})
    ModelProxy._count(session, body, told)
    assert session.usage == Usage(estimate(body) + 7, 103, 5)
