"""Reviews by the hosted agent: the op's steps against the twin's service over HTTP, with the real store and GitHub client."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from dagster import OpExecutionContext
from sqlalchemy import text

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.retry import HOSTED_TRIES
from kilo_pipelines.ops import code_review as reviews
from kilo_pipelines.ops.effects import apply_effects_of
from kilo_pipelines.ops.hosted_session import take_step
from kilo_pipelines.resources.cloud_agent import CloudAgentResource
from kilo_pipelines.resources.github import GitHubResource
from kilo_pipelines.sensors import work_once
from kilo_pipelines.services.code_review.admission import SERVICE
from kilo_pipelines.settings import Settings, write_secret
from kilo_pipelines.store import Refused, SessionRow
from tests.conftest import Database
from tests.support.engine import Engine, _Context


class Hosted:
    """One platform whose reviews go to the twin's hosted agent; callbacks have nowhere to go, so sessions are polled."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.store, self.clock = engine, engine.store, engine.clock
        settings = Settings()
        write_secret(settings.cloud_agent_token_file, engine.credentials["cloud_agent_token"])
        write_secret(settings.cloud_agent_key_file, engine.credentials["cloud_agent_internal_key"])

    def service(self, **how: Any) -> None:
        """How the twin's service goes from now on."""
        self.engine.control("cloud-agent", **({"seconds": 0.0} | how))

    def told(self) -> dict[str, Any]:
        return self.engine.control("cloud-agent-sessions")

    def accept_reported(self, *, accepted: bool) -> None:
        setting = self.store.owners.config(self.engine.owner, SERVICE)
        assert setting is not None
        config = setting.config | {"accept_reported_evidence": accepted}
        self.store.owners.put_config(
            self.engine.owner, SERVICE, config, enabled=True, expected_revision=setting.revision, actor="test"
        )

    def launched(self, kind: str = "clean") -> tuple[dict[str, Any], UUID, UUID]:
        """A pull request whose session waits: pull request, item, session."""
        pull = self.engine.control("open-pull", kind=kind)
        self.engine.deliver(pull)
        self.runs()
        (item,) = [one for one in self.store.queue.items(state="live") if one["subject_key"].endswith(f":pull:{pull['number']}")]
        assert item["session_id"] is not None
        return pull, item["id"], item["session_id"]

    def runs(self) -> None:
        """A shard's evaluation and its runs, until nothing is offered."""
        while requests := work_once(self.store):
            for request in requests:
                ids = next(iter(request.run_config["ops"].values()))["config"]["ids"]
                work = {"code_review": reviews._launch, "settle_code_review": reviews._settle}[request.job_name]
                context = cast(OpExecutionContext, _Context(str(uuid4())))
                for one in ids:
                    work(context, self.store, GitHubResource(), CloudAgentResource(), UUID(one))
                apply_effects_of(context, self.store, GitHubResource(), ids)

    def step(self, session: UUID) -> SessionRow:
        """The next step of a session, when it is due."""
        context = cast(OpExecutionContext, _Context(str(uuid4())))
        take_step(context, self.store, GitHubResource(), CloudAgentResource(), session)
        row = self.store.sessions.get(session)
        assert row is not None
        return row

    def offered(self, session: UUID) -> bool:
        """Whether the session's next step is offered."""
        return [session] in [one.ids for one in self.store.hosted.offers(50)]

    def until_ended(self, session: UUID, most: int = 20) -> SessionRow:
        """Steps, a poll apart, until the session has ended."""
        for _ in range(most):
            row = self.step(session)
            if row.ended_at is not None:
                return row
            self.clock.advance(timedelta(seconds=31))
            time_for_the_agent()
        raise AssertionError(f"not ended: {self.store.hosted.get(session)}")

    def checks(self, pull: dict[str, Any]) -> list[tuple[str, str | None]]:
        return [(one["status"], one["conclusion"]) for one in self.engine.seen(pull)["check_runs"]]


def time_for_the_agent() -> None:
    """The twin's agent works in another process; its work on a small repository takes milliseconds."""
    time.sleep(0.3)


@pytest.fixture(scope="module")
def platform(database: Database) -> Iterator[Hosted]:
    outer = {name: os.environ.get(name) for name in ("KILO_AGENT", "KILO_CLOUD_AGENT_URL", "KILO_MODEL")}
    engine = Engine(database.logins)
    os.environ |= {
        "KILO_AGENT": "hosted",
        "KILO_CLOUD_AGENT_URL": f"{engine.url}/cloud-agent",
        "KILO_MODEL": "scripted-reviewer",
    }
    try:
        yield Hosted(engine)
    finally:
        engine.close()
        for name, value in outer.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(autouse=True)
def _as_agreed(platform: Hosted) -> None:
    """The service is honest and paid for, and its reports count, unless a test says otherwise."""
    platform.service()
    platform.accept_reported(accepted=True)


def test_a_hosted_review_is_not_green_until_the_owner_accepts_reported_evidence(platform: Hosted) -> None:
    platform.accept_reported(accepted=False)
    pull, item, session = platform.launched()
    ended = platform.until_ended(session)
    assert (ended.state, ended.reason) == ("completed", None) and ended.evidence is not None
    assert ended.evidence["evidence_class"] == "reported" and ended.evidence["turns"] == 1
    platform.runs()
    row = platform.store.reviews.get(item)
    assert row is not None and row.verdict is not None
    assert (row.verdict["conclusion"], row.verdict["reason"]) == ("failure", Reason.EVIDENCE_REPORTED)
    assert ("completed", "failure") in platform.checks(pull)

    platform.accept_reported(accepted=True)
    pull, item, session = platform.launched()
    platform.until_ended(session)
    platform.runs()
    row = platform.store.reviews.get(item)
    assert row is not None and row.verdict is not None
    assert (row.verdict["conclusion"], row.verdict["earned"]) == ("success", True)
    check = platform.engine.seen(pull)["check_runs"][0]
    assert check["conclusion"] == "success" and "reported" in check["output"]["summary"]
    platform.step(session)
    told = platform.told()["sessions"][-1]
    assert told["deleted"] and not told["interrupted"], "the session's workspace is gone at the service"
    held = platform.store.hosted.get(session)
    assert held is not None and held["state"] == "closed"


def test_without_credit_the_owners_service_waits(platform: Hosted) -> None:
    """As after the self-hosted model's 402: the review waits as a whole, no attempt is burnt against an empty account."""
    platform.service(balance=0.5)
    _, item, session = platform.launched()
    ended = platform.step(session)
    assert (ended.state, ended.reason) == ("failed", Reason.INSUFFICIENT_CREDITS)
    platform.runs()
    row = platform.store.queue.get(item)
    assert row is not None and (row.state, row.reason) == ("waiting", Reason.INSUFFICIENT_CREDITS)
    refused = platform.store.queue.claim(item, SERVICE, run_id="r", pools=lambda _kind, _plan: {SERVICE: 5}, lease_s=10)
    assert isinstance(refused, Refused) and refused.outcome == Reason.INSUFFICIENT_CREDITS

    platform.service()
    platform.clock.advance(timedelta(minutes=31))
    platform.runs()
    row = platform.store.queue.get(item)
    assert row is not None and row.session_id not in (None, session)
    platform.until_ended(cast(UUID, row.session_id))
    platform.runs()
    assert platform.store.queue.get(item).state == "completed"  # type: ignore[union-attr]


def test_a_kill_switch_interrupts_at_the_service(platform: Hosted) -> None:
    platform.service(behaviour="silent")
    _, item, session = platform.launched()
    platform.step(session)
    platform.store.queue.switch("all", "kill", "test", actor="test")
    try:
        assert platform.offered(session)
        assert platform.step(session).state == "interrupted"
        platform.clock.advance(timedelta(seconds=21))
        assert platform.offered(session)
        platform.step(session)
    finally:
        platform.store.queue.unswitch("all")
    told = platform.told()["sessions"][-1]
    assert (told["interrupted"], told["deleted"]) == (True, True)
    assert [turn["status"] for turn in told["turns"]] == ["interrupted"]
    platform.runs()
    assert platform.store.queue.get(item).state == "cancelled"  # type: ignore[union-attr]


def test_lost_answers_start_one_session_and_one_turn(platform: Hosted) -> None:
    _, item, session = platform.launched()
    before = len(platform.told()["sessions"])
    lost = [("prepareSession", 2), ("initiate", 1), ("getMessageResult", 1)]
    platform.engine.control(
        "faults",
        faults=[
            {
                "method": "GET" if name.startswith("get") else "POST",
                "path": f"trpc/{name}",
                "left": left,
                "status": 504,
                "lost": True,
            }
            for name, left in lost
        ],
    )
    assert platform.until_ended(session).state == "completed"
    started = [one for one in platform.told()["sessions"][before:] if one["initiated"]]
    assert len(started) == 1 and len(started[0]["turns"]) == 1
    platform.runs()
    assert platform.store.queue.get(item).state == "completed"  # type: ignore[union-attr]


def test_a_service_that_stays_away_ends_the_attempt_and_no_sooner(platform: Hosted) -> None:
    _, item, session = platform.launched()
    fault = {
        "method": "POST",
        "path": "trpc/prepareSession",
        "left": HOSTED_TRIES,
        "status": 503,
        "error": "SANDBOX_CONNECT_FAILED",
    }
    platform.engine.control("faults", faults=[fault])
    tries = 0
    while (row := platform.step(session)).ended_at is None:
        tries += 1
        assert tries < HOSTED_TRIES
        held = platform.store.hosted.get(session)
        assert held is not None and (held["state"], held["reason"]) == ("new", Reason.CLOUD_AGENT_UNAVAILABLE)
        platform.clock.advance(timedelta(minutes=5))
    assert (row.reason, tries) == (Reason.CLOUD_AGENT_UNAVAILABLE, HOSTED_TRIES - 1)
    platform.runs()
    assert platform.store.queue.get(item).reason == Reason.CLOUD_AGENT_UNAVAILABLE  # type: ignore[union-attr]
    platform.store.queue.cancel(item, reason=Reason.USER_CANCELLED, actor="test")
    platform.runs()


def test_one_repair_is_asked_for_and_no_second_one(platform: Hosted) -> None:
    platform.service(behaviour="repaired")
    _, _, session = platform.launched()
    ended = platform.until_ended(session)
    assert ended.state == "completed" and ended.evidence is not None and ended.evidence["turns"] == 1
    platform.service(behaviour="other_nonce")
    _, item, session = platform.launched()
    ended = platform.until_ended(session)
    assert (ended.state, ended.reason) == ("failed", Reason.RESULT_INVALID)
    assert len(platform.told()["sessions"][-1]["turns"]) == 2
    platform.runs()
    row = platform.store.reviews.get(item)
    assert row is not None and row.verdict is not None and row.verdict["conclusion"] == "failure"


def test_a_large_change_is_sent_in_parts_and_each_is_reported(platform: Hosted) -> None:
    pull = platform.engine.control("open-pull", kind="clean")
    files = {f"orders/part_{part}.py": "".join(f"value_{line} = {line}\n" for line in range(2_500)) for part in range(2)}
    pull = platform.engine.control("push", full_name=pull["repository"], number=pull["number"], files=files)
    platform.engine.deliver(pull)
    platform.runs()
    (item,) = [one for one in platform.store.queue.items(state="live") if one["subject_key"].endswith(f":pull:{pull['number']}")]
    ended = platform.until_ended(item["session_id"])
    assert ended.state == "completed" and ended.evidence is not None
    assert ended.evidence["result_turns"] == [1, 2]
    assert {one["sent_turn"] for one in ended.evidence["ledger"]} == {1, 2}
    assert len(platform.told()["sessions"][-1]["turns"]) == 2


def test_a_turn_that_nobody_works_on_ends_before_the_cap_and_one_that_never_ends_at_it(platform: Hosted) -> None:
    platform.service(behaviour="silent")
    _, _, session = platform.launched()
    platform.step(session)
    platform.clock.advance(timedelta(seconds=421))
    ended = platform.step(session)
    assert (ended.state, ended.reason) == ("failed", Reason.SESSION_LOST)
    _, _, session = platform.launched()
    platform.step(session)
    platform.clock.advance(timedelta(seconds=1_801))
    ended = platform.step(session)
    assert (ended.state, ended.reason) == ("failed", Reason.SESSION_TIMEOUT)
    platform.step(session)
    assert platform.told()["sessions"][-1]["interrupted"]


def test_what_a_hosted_agent_may_not_do_is_refused_before_anything_is_sent(platform: Hosted) -> None:
    before = len(platform.told()["calls"])
    _, _, session = platform.launched()
    with platform.store.database.owner(platform.engine.owner) as connection:
        spec = text("update sessions set spec = spec || cast(:more as jsonb) where id = :id")
        connection.execute(spec, {"id": session, "more": json.dumps({"service": "security_analysis"})})
    ended = platform.step(session)
    assert (ended.state, ended.reason) == ("failed", Reason.HOSTED_WORK_REFUSED)
    assert len(platform.told()["calls"]) == before
