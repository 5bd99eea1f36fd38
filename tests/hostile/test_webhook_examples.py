"""Every webhook that GitHub publishes as an example (npm `@octokit/webhooks-examples`), signed and posted to the real ladder.

The package's examples don't all follow their own schemas, so nothing is asked of them but what the ladder promises: an answer
with a stable reason, never a 5xx, and work for pull requests only.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kilo_pipelines.core.reasons import Reason
from tests.conftest import Database
from tests.support.asgi import InProcess, signed
from tests.support.figures import Figures

EXAMPLES = Path(__file__).parents[2] / ".cache/openapi/node_modules/@octokit/webhooks-examples/api.github.com/index.json"
LIFECYCLE = ("installation", "installation_repositories", "repository")


@pytest.fixture(scope="module")
def examples() -> list[tuple[str, dict[str, Any]]]:
    assert EXAMPLES.exists(), "GitHub's webhook examples are missing: run `make deps`"
    events = json.loads(EXAMPLES.read_text())
    return [(event["name"], example) for event in events for example in event["examples"]]


def test_as_published_none_is_a_5xx_and_none_is_work(
    database: Database, examples: list[tuple[str, dict[str, Any]]], figures: Figures
) -> None:
    """No owner has connected the examples' installations; most examples name none at all."""
    ingress = InProcess(database.store)
    answers = ingress.post_all(signed(json.dumps(body).encode(), event) for event, body in examples)
    found = Counter((answer.status, answer.reason) for answer in answers)
    figures(tried=len(examples), accepted=found[(202, "stored")])
    assert len(examples) == 329 and sum(found.values()) == 329
    assert set(found) == {
        (400, Reason.INSTALLATION_ID_MISSING),
        (404, Reason.INTEGRATION_UNKNOWN),
        (200, Reason.INTEGRATION_UNKNOWN),
        (200, "pong"),
    }, found
    for (event, body), answer in zip(examples, answers, strict=True):
        if answer.status == 400:
            assert "installation" not in body, event
    assert ingress.deliveries() == []


def test_for_a_connected_owner_each_has_one_reason_and_only_admitted_pull_requests_are_work(
    database: Database, examples: list[tuple[str, dict[str, Any]]], figures: Figures
) -> None:
    """Lifecycle examples get an owner each: some of them disconnect it."""
    shared = InProcess(database.store)
    found: dict[str, set[tuple[int, str]]] = {}
    seen: set[bytes] = set()
    for event, body in examples:
        ingress = InProcess(database.store) if event in LIFECYCLE else shared
        sent = json.dumps(ingress.ours(body)).encode()
        answer = ingress.post(signed(sent, event))
        if sent in seen:  # the package holds some bodies more than once
            assert (answer.status, answer.reason) == (200, Reason.DUPLICATE_DELIVERY)
        else:
            found.setdefault(event, set()).add((answer.status, answer.reason))
        seen.add(sent)
    shared.admit()
    expected: dict[str, set[tuple[int, str]]] = {event: {(200, Reason.EVENT_UNKNOWN)} for event, _ in examples}
    expected |= {event: {(200, Reason.LIFECYCLE_APPLIED)} for event in LIFECYCLE}
    stored = ("pull_request", "issue_comment", "dependabot_alert")
    expected |= {event: {(202, "stored")} for event in stored} | {"ping": {(200, "pong")}}
    assert found == expected
    items = shared.items()
    figures(tried=len(examples), accepted=sum(1 for one in items if one["event"] != "pull_request"))
    assert items and {one["event"] for one in items} == {"pull_request"}
    assert {one["action"] for one in items} <= {"opened", "synchronize", "reopened", "ready_for_review", "labeled", "edited"}
    assert not [one for one in shared.deliveries() if one["state"] == "received" or one["reason"] == Reason.ADMISSION_ERROR]
