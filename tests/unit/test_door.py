"""What the door tells the log of operators, and what its pages make of text from outside."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

import pytest

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.ingress.door import _tell_changes
from kilo_pipelines.ingress.login_pages import login_page, onward_page, refusal_page, session_page
from kilo_pipelines.ingress.operators import Session

ADA = Session("Ada (ada@acme.test)", "oidc", datetime(2026, 5, 1, tzinfo=UTC))
LAUNCH = {"operationName": "LaunchRun", "query": "mutation LaunchRun { launchRun { id } }"}
HOSTILE = "<script>alert(1)</script>\"'>"


@pytest.mark.parametrize(
    "told",
    [
        LAUNCH,
        [{"query": "{ version }"}, LAUNCH],
        {"type": "start", "payload": LAUNCH},
        {**LAUNCH, "query": "fragment x on Y { id } mutation LaunchRun { a }"},
    ],
)
def test_who_changes_something_in_the_ui_is_named(caplog: pytest.LogCaptureFixture, told: Any) -> None:
    caplog.set_level(logging.INFO)
    # Escapes of JSON hide nothing.
    _tell_changes(ADA, json.dumps(told).replace("mutation", "\\u006dutation"))
    (line,) = caplog.messages
    assert line == "operator Ada (ada@acme.test) changes in the UI: LaunchRun"


@pytest.mark.parametrize("told", [{"query": "{ version }", "operationName": "x"}, {"query": None}, [], "x", None, {"payload": 1}])
def test_who_only_looks_leaves_no_line_and_odd_bodies_no_error(caplog: pytest.LogCaptureFixture, told: Any) -> None:
    caplog.set_level(logging.INFO)
    _tell_changes(ADA, json.dumps(told))
    _tell_changes(ADA, b"\xff{")
    assert caplog.messages == []


def test_an_operations_name_makes_no_second_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    _tell_changes(ADA, json.dumps({**LAUNCH, "operationName": "x\n2026-05-01 INFO operator Grace logged in"}))
    assert "\n" not in caplog.messages[0]


def test_pages_show_text_from_outside_as_text_and_run_nothing() -> None:
    for page in (
        login_page(issuer=HOSTILE, password=True, landing=HOSTILE, reason=Reason.PASSWORD_WRONG, detail=HOSTILE),
        refusal_page(Reason.OIDC_NOT_OPERATOR, 403, HOSTILE),
        onward_page(HOSTILE),
        session_page(HOSTILE, HOSTILE, HOSTILE),
    ):
        body = bytes(page.body).decode()
        assert "<script" not in body and "\"'>" not in body and "alert(1)" in body
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src" not in policy and "frame-ancestors 'none'" in policy
        assert page.headers["cache-control"] == "no-store" and page.headers["x-frame-options"] == "DENY"
