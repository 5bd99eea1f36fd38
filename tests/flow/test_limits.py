"""Outsiders' pull requests and spent days, with the ops' own functions against the twin and a clock that is moved by hand."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from dagster import OpExecutionContext

from kilo_pipelines.core.limits import SETTINGS, LimitsConfig, Usage
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.ops import code_review as ops
from kilo_pipelines.ops.admission import admit
from kilo_pipelines.ops.markers import marker_of
from kilo_pipelines.resources.cloud_agent import CloudAgentResource
from kilo_pipelines.resources.github import GitHubResource
from kilo_pipelines.store import ItemRow, NewDelivery
from tests.conftest import Database
from tests.support.engine import Engine


class Desk:
    """One engine whose steps are called in this process."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.store = engine, engine.store
        self.revision = 0

    def limits(self, **limits: Any) -> None:
        config = LimitsConfig.model_validate(limits).model_dump(mode="json")
        self.revision = self.store.owners.put_config(
            self.engine.owner, SETTINGS, config, enabled=True, expected_revision=self.revision, actor="test"
        )

    def deliver(self, sent: dict[str, Any], event: str = "pull_request", written: datetime | None = None) -> str | None:
        """The webhook that the twin sent for this, admitted; the reason of its skip. `written`: when its comment was."""
        body = self.engine.payload(sent)
        if written is not None:
            told = json.loads(body)
            told["comment"]["created_at"] = f"{written:%Y-%m-%dT%H:%M:%SZ}"
            body = json.dumps(told).encode()
        new = NewDelivery(self.engine.owner, self.engine.integration, uuid4().hex, event, json.loads(body)["action"], body, {})
        receipt = self.store.inbox.record(new)
        self.store.inbox.admit_next(lambda tx: admit(tx, marker_of(self.store)), 50)
        with self.store.database.owner(self.engine.owner) as connection:
            row = connection.exec_driver_sql("select state, reason from deliveries where id = %s", (receipt.delivery_id,)).one()
        assert row.state != "received"
        return cast("str | None", row.reason)

    def comment(
        self, pull: dict[str, Any], by: str, body: str, action: str = "created", written: datetime | None = None
    ) -> str | None:
        sent = self.engine.control(
            "comment", repository=pull["repository"], number=pull["number"], by=by, body=body, action=action
        )
        # The platform's clock is the test's, the twin's isn't.
        return self.deliver(sent, "issue_comment", written or self.store.clock.now())

    def item(self, pull: dict[str, Any]) -> UUID:
        rows = self.store.reviews.of_owner(self.engine.owner)
        return next(one.item_id for one in rows if one.pull_number == pull["number"])

    def launch(self, pull: dict[str, Any]) -> ItemRow:
        """What a run makes of the newest review of a pull request."""
        context = SimpleNamespace(
            run_id=str(uuid4()),
            run=SimpleNamespace(tags={}, parent_run_id=None),
            log=logging.getLogger("limits"),
            add_output_metadata=lambda _metadata: None,
        )
        item = self.item(pull)
        ops._launch(cast(OpExecutionContext, context), self.store, GitHubResource(), CloudAgentResource(), item)
        found = self.store.queue.get(item)
        assert found is not None
        return found

    def is_due(self, pull: dict[str, Any]) -> bool:
        item = self.item(pull)
        (found,) = [one for one in self.store.queue.items(owner_id=self.engine.owner, limit=500) if one["id"] == item]
        return bool(found["not_before"] <= self.engine.clock.now())

    def receipt(self, row: ItemRow) -> dict[str, Any]:
        assert row.session_id is not None
        session = self.store.sessions.get(row.session_id)
        assert session is not None and session.receipt is not None
        return session.receipt


@pytest.fixture(scope="module")
def engine(database: Database) -> Iterator[Engine]:
    found = Engine(database.logins)
    found.control("set-outsiders", logins=["mallory", "trudy"])
    yield found
    found.close()


@pytest.fixture(scope="module")
def desk(engine: Engine) -> Desk:
    return Desk(engine)


def test_a_first_timers_fork_waits_until_somebody_who_may_write_approves_its_head(desk: Desk) -> None:
    pull = desk.engine.control("open-pull", kind="planted", fork=True, author="mallory", head_ref="fork-1")
    assert desk.deliver(pull) is None
    found = desk.launch(pull)
    assert (found.state, found.reason, found.session_id) == ("waiting", Reason.APPROVAL_NEEDED, None)
    assert not desk.is_due(pull)
    texts = [one for one in desk.store.outbox.of_item(found.id) if "approval_needed" in one["intent_key"]]
    assert len(texts) == 1, "the check tells who may start it"

    # The author, a stranger, an edit, a quotation and another commit approve nothing.
    assert desk.comment(pull, "mallory", "/ok-to-test") == Reason.APPROVAL_NOTED
    assert desk.comment(pull, "trudy", "/ok-to-test") == Reason.APPROVAL_NOTED
    refused = desk.launch(pull)
    assert (refused.state, refused.reason) == ("waiting", Reason.APPROVAL_REFUSED)
    assert desk.comment(pull, "grace", "/ok-to-test", action="edited") == Reason.ACTION_IGNORED
    assert desk.comment(pull, "grace", "> /ok-to-test") == Reason.ACTION_IGNORED
    assert desk.comment(pull, "grace", "/ok-to-test 0000000") == Reason.APPROVAL_STALE
    assert desk.launch(pull).state == "waiting"

    assert desk.comment(pull, "grace", f"Looks harmless.\n/ok-to-test {pull['head_sha'][:12]}") == Reason.APPROVAL_NOTED
    assert desk.is_due(pull), "the approval wakes it"
    started = desk.launch(pull)
    assert started.state == "running"
    receipt = desk.receipt(started)
    assert (receipt["text"], receipt["approved_by"], receipt["holds_secrets"]) == (["outsider", "member"], "github:grace", False)


def test_another_head_than_the_approved_one_asks_again(desk: Desk) -> None:
    pull = desk.engine.control("open-pull", kind="planted", fork=True, author="mallory", head_ref="fork-2")
    desk.deliver(pull)
    desk.launch(pull)
    assert desk.comment(pull, "grace", "/ok-to-test") == Reason.APPROVAL_NOTED
    # Pushed between the approval and the claim; its event comes late.
    pushed = desk.engine.control("push", full_name=pull["repository"], number=pull["number"])
    found = desk.launch(pull)
    assert (found.state, found.reason, found.details["head_sha"]) == ("waiting", Reason.APPROVAL_STALE, pushed["head_sha"])
    sent = desk.engine.control(
        "act", full_name=pull["repository"], number=pull["number"], action="label", label="ok-to-test", by="grace"
    )
    desk.deliver(sent)
    assert desk.launch(pull).state == "running"


def test_a_comment_that_comes_late_approves_no_head_that_its_author_never_saw(desk: Desk) -> None:
    pull = desk.engine.control("open-pull", kind="planted", fork=True, author="mallory", head_ref="fork-late")
    desk.deliver(pull)
    desk.launch(pull)
    assert (
        desk.comment(pull, "grace", "/ok-to-test", written=desk.store.clock.now() - timedelta(minutes=10))
        == Reason.APPROVAL_STALE
    )
    assert desk.launch(pull).state == "waiting"


@pytest.mark.parametrize(("policy", "state"), [("review", "running"), ("skip", "cancelled")])
def test_the_owner_decides_about_outsiders(desk: Desk, policy: str, state: str) -> None:
    desk.limits(outsiders=policy)
    try:
        pull = desk.engine.control("open-pull", kind="planted", author="mallory", head_ref=f"out-{policy}")
        desk.deliver(pull)
        found = desk.launch(pull)
        assert found.state == state and (found.state == "running" or found.reason == Reason.OUTSIDER_SKIPPED)
        if state == "running":
            assert desk.receipt(found)["approved_by"] is None
    finally:
        desk.limits()


def test_our_own_branch_and_a_bots_label_start_nothing(desk: Desk) -> None:
    pull = desk.engine.control("open-pull", kind="planted", head_ref="security-remediation/x/abc/1")
    assert desk.deliver(pull) == Reason.LOOP_GUARDED
    sent = desk.engine.control(
        "act", full_name=pull["repository"], number=pull["number"], action="label", label="kilo", by="grace"
    )
    assert desk.deliver(sent) is None, "a person may have it reviewed"


def test_a_days_budget_stops_and_goes_on_at_midnight(desk: Desk) -> None:
    clock, store = desk.engine.clock, desk.store
    desk.limits(daily={"tokens": 50_000})
    try:
        first = desk.engine.control("open-pull", kind="planted", head_ref="day-1")
        second = desk.engine.control("open-pull", kind="planted", head_ref="day-2")
        desk.deliver(first)
        desk.deliver(second)
        # What the tests before this one left running holds no part of the budget that was set just now.
        for one in store.queue.items(owner_id=desk.engine.owner, state="live"):
            if one["id"] not in (desk.item(first), desk.item(second)):
                store.queue.cancel(one["id"], reason=Reason.USER_CANCELLED, actor="test")
        running = desk.launch(first)
        assert running.state == "running" and desk.receipt(running)["tokens"] == 50_000
        assert desk.launch(second).reason == Reason.BUDGET_RESERVED
        store.spend.record(
            desk.engine.owner,
            "meter",
            item_id=running.id,
            session_id=running.session_id,
            service="code_review",
            model="m",
            usage=Usage(50_000, 0),
            price=None,
        )
        assert desk.launch(second).reason == Reason.BUDGET_EXHAUSTED and not desk.is_due(second)
        midnight = (clock.now() + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
        clock.advance(midnight - timedelta(seconds=1) - clock.now())
        assert not desk.is_due(second)
        clock.advance(timedelta(seconds=1))
        assert desk.is_due(second) and desk.launch(second).state == "running"
    finally:
        desk.limits()
