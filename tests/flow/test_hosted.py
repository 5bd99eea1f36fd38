"""Reviews by the hosted agent: the op's steps against the twin's service over HTTP, with the real store and GitHub client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import cast
from uuid import UUID

import pytest
from sqlalchemy import text

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.retry import HOSTED_TRIES
from kilo_pipelines.services.code_review.admission import SERVICE
from kilo_pipelines.store import Refused
from tests.conftest import Database
from tests.support.hosted import Hosted, hosted_platform


@pytest.fixture(scope="module")
def platform(database: Database) -> Iterator[Hosted]:
    with hosted_platform(database.logins) as made:
        yield made


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


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("truncated", Reason.RESULT_INVALID),
        ("contradicts", Reason.RESULT_INVALID),
        ("paused", Reason.CLOUD_AGENT_PROTOCOL),
        ("fail:workspace_setup_failed:git_authentication_failed", Reason.CLOUD_AGENT_REFUSED),
    ],
)
def test_a_hosted_agent_that_lies_or_fails_is_never_green(platform: Hosted, behaviour: str, reason: Reason) -> None:
    platform.service(behaviour=behaviour)
    _, item, session = platform.launched()
    ended = platform.until_ended(session)
    assert (ended.state, ended.reason) == ("failed", reason)
    platform.runs()
    platform.store.queue.cancel(item, reason=Reason.USER_CANCELLED, actor="test")  # where the policy tries it again
    platform.runs()
    row = platform.store.reviews.get(item)
    assert row is not None and row.verdict is not None and not row.verdict["earned"]


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
