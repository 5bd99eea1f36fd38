"""Which capabilities a session may have together, and what approves an outsider's pull request."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest

from kilo_pipelines.core.approval import command_of, is_outside, refusal
from kilo_pipelines.core.loops import is_marked, is_our_branch
from kilo_pipelines.core.markers import Marker
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.receipt import Receipt, violation
from tests.support.store import RECEIPT

OUTSIDER: dict[str, Any] = {"text": ["outsider", "member"], "approved_by": None, "effects": False}


def _with(**more: Any) -> Receipt:
    return RECEIPT.model_copy(update=more)


@pytest.mark.parametrize(
    ("capabilities", "reason"),
    [
        (OUTSIDER | {"holds_secrets": True, "effects": True}, Reason.RULE_OF_TWO),
        (OUTSIDER | {"holds_secrets": True, "writes": True}, Reason.RULE_OF_TWO),
        (OUTSIDER | {"holds_secrets": True}, Reason.SECRETS_MEET_OUTSIDERS),
        (OUTSIDER | {"holds_secrets": True, "effects": True, "approved_by": "grace"}, Reason.SECRETS_MEET_OUTSIDERS),
        ({"text": ["advisory"], "holds_secrets": True}, Reason.SECRETS_MEET_OUTSIDERS),
        (OUTSIDER | {"writes": True}, Reason.WRITE_UNAPPROVED),
        (OUTSIDER | {"network": "open"}, Reason.RULE_OF_TWO),
        ({"holds_secrets": True, "network": "open"}, Reason.RULE_OF_TWO),
        # Two of the three may be.
        (OUTSIDER | {"effects": True}, None),
        (OUTSIDER | {"writes": True, "approved_by": "grace"}, None),
        ({"text": ["advisory", "member"], "writes": True, "approved_by": None}, None),
        ({"holds_secrets": True, "effects": True, "approved_by": None}, None),
        ({"network": "open"}, None),
        ({}, None),
    ],
)
def test_every_violated_combination_is_refused_with_its_reason(capabilities: dict[str, Any], reason: Reason | None) -> None:
    assert violation(_with(**capabilities)) is reason


def test_all_three_at_once_are_never_allowed() -> None:
    """Whatever else a session may do."""
    for text, writes, network, approved in itertools.product(
        (["outsider"], ["advisory"], ["outsider", "platform"]), (False, True), ("none", "model", "registries", "open"), (None,)
    ):
        every = _with(text=text, holds_secrets=True, effects=True, writes=writes, network=network, approved_by=approved)
        assert violation(every) is Reason.RULE_OF_TWO


@dataclass(frozen=True)
class Given:
    head_sha: str
    granted: bool | None


@pytest.mark.parametrize(
    ("policy", "approvals", "reason"),
    [
        ("review", [], None),
        ("skip", [Given("a", True)], Reason.OUTSIDER_SKIPPED),
        ("approve", [], Reason.APPROVAL_NEEDED),
        ("approve", [Given("a", None)], Reason.APPROVAL_NEEDED),
        ("approve", [Given("a", False)], Reason.APPROVAL_REFUSED),
        ("approve", [Given("b", False)], Reason.APPROVAL_NEEDED),
        ("approve", [Given("b", True)], Reason.APPROVAL_STALE),
        ("approve", [Given("a", False), Given("a", True)], None),
        ("approve", [Given("a", True)], None),
    ],
)
def test_an_approval_is_of_one_head_and_by_whom_may_write(policy: Any, approvals: list[Given], reason: Reason | None) -> None:
    assert refusal(policy, "a", approvals) is reason


def test_a_fork_and_a_lost_fork_are_outside_whoever_opened_them() -> None:
    assert is_outside(head_repository_id=2, repository_id=1, author_may_write=True)
    assert is_outside(head_repository_id=None, repository_id=1, author_may_write=True)
    assert is_outside(head_repository_id=1, repository_id=1, author_may_write=False)
    assert not is_outside(head_repository_id=1, repository_id=1, author_may_write=True)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("/ok-to-test", ""),
        ("Thanks!\r\n/ok-to-test\r\nlooks good", ""),
        ("/ok-to-test 0123abc", "0123abc"),
        ("/ok-to-test 0123", None),
        ("> /ok-to-test", None),
        ("`/ok-to-test`", None),
        ("please /ok-to-test", None),
        ("/ok-to-test please", None),
        ("/ok-to-testing", None),
        ("", None),
    ],
)
def test_the_command_stands_on_a_line_of_its_own(body: str, named: str | None) -> None:
    assert command_of(body) == named


def test_our_own_writing_is_known() -> None:
    assert is_our_branch("security-remediation/x/1/1", same_repository=True)
    assert not is_our_branch("security-remediation/x/1/1", same_repository=False)
    assert not is_our_branch("feature/security-remediation/", same_repository=True)
    assert is_marked(f"text {Marker(b'k' * 32).make('summary', 1)}") and not is_marked("<!-- kilo -->")
