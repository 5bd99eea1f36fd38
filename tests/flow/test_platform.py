"""The whole platform: real Dagster, Celery, Postgres, twin; a pull request's way from its webhook to its check."""

from __future__ import annotations

import time
from collections.abc import Iterator
from uuid import UUID

import pytest

from tests.support.platform import RunningPlatform

TERMINATE = "mutation($id: String!) { terminateRun(runId: $id) { __typename } }"
STATUS = "query($id: ID!) { runOrError(runId: $id) { ... on Run { status tags { key value } } } }"
REEXECUTE = """mutation($p: ReexecutionParams!) { launchRunReexecution(reexecutionParams: $p) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""


@pytest.fixture(scope="module")
def platform() -> Iterator[RunningPlatform]:
    found = RunningPlatform("slow")
    yield found
    found.close()


def _check(platform: RunningPlatform, pull: dict[str, object]) -> list[tuple[str, str | None]]:
    return [(run["status"], run["conclusion"]) for run in platform.read(pull)["check_runs"]]  # type: ignore[arg-type]


def test_a_planted_pull_request_gets_one_review_one_summary_and_a_failing_check(platform: RunningPlatform) -> None:
    pull = platform.control("open-pull", kind="planted")
    row = platform.settled(pull)
    seen = platform.read(pull)
    assert (row.state, row.reason) == ("completed", "reviewed")
    assert len(seen["reviews"]) == 1 and len(seen["review_comments"]) == 5 and len(seen["comments"]) == 1
    assert _check(platform, pull) == [("completed", "failure")]
    assert set(seen["reactions"]) == {"eyes", "hooray"}
    assert "5 of 5 changed blobs" in seen["check_runs"][0]["output"]["summary"]


def test_a_redelivered_webhook_does_nothing_twice(platform: RunningPlatform) -> None:
    pull = platform.control("open-pull", kind="clean")
    platform.settled(pull)
    again = platform.control("redeliver", delivery_id=pull["delivery"]["id"])
    assert again["status_code"] == 200 and "duplicate" in again["answer"]
    rows = [one for one in platform.store.reviews.of_owner(platform.owner) if one.pull_number == pull["number"]]
    assert len(rows) == 1 and _check(platform, pull) == [("completed", "success")]


def test_a_newer_push_supersedes_and_interrupts_the_running_session(platform: RunningPlatform) -> None:
    pull = platform.control("open-pull", kind="clean")
    old = platform.at_work(pull)
    newer = platform.control("push", full_name=pull["repository"], number=pull["number"])
    assert old.session_id is not None
    session = old.session_id
    started = time.monotonic()
    platform.wait(lambda: getattr(platform.store.sessions.get(session), "state", "") == "interrupted", 15)
    assert time.monotonic() - started < 10
    platform.settled(newer)
    ended = platform.settled(pull)
    assert (ended.state, ended.reason, (ended.verdict or {})["conclusion"]) == ("cancelled", "superseded", "cancelled")
    assert len(platform.read(newer)["comments"]) == 1


def test_terminate_in_the_ui_cancels_the_item_and_re_execute_opens_a_new_attempt(platform: RunningPlatform) -> None:
    pull = platform.control("open-pull", kind="clean")
    assert platform.browser, "logged in before anything is at work"
    row = platform.at_work(pull)
    platform.graphql(TERMINATE, id=row.session_run_id)
    # The item is over and its slot free with the click; the effects follow at the provider's pace.
    assert platform.when(pull, lambda one: one.ended_at is not None, 10).state == "cancelled"
    platform.wait(lambda: platform.graphql(STATUS, id=row.session_run_id)["runOrError"]["status"] == "CANCELED", 15)
    ended = platform.settled(pull)
    assert (ended.state, ended.reason) == ("cancelled", "user_cancelled")
    assert _check(platform, pull) == [("completed", "cancelled")]
    answer = platform.graphql(REEXECUTE, p={"parentRunId": ended.run_id, "strategy": "ALL_STEPS"})["launchRunReexecution"]
    assert answer["__typename"] == "LaunchRunSuccess", answer
    again = platform.when(pull, lambda one: one.attempt == 2 and one.state == "completed")
    assert again.item_id == row.item_id
    platform.wait(lambda: _check(platform, pull) == [("completed", "success")], 30)


def test_re_execute_of_a_finished_review_says_so_and_changes_nothing(platform: RunningPlatform) -> None:
    pull = platform.control("open-pull", kind="clean")
    row = platform.settled(pull)
    answer = platform.graphql(REEXECUTE, p={"parentRunId": row.run_id, "strategy": "ALL_STEPS"})["launchRunReexecution"]
    run_id = answer["run"]["runId"]
    platform.wait(lambda: platform.graphql(STATUS, id=run_id)["runOrError"]["status"] == "SUCCESS", 30)
    tags = {one["key"]: one["value"] for one in platform.graphql(STATUS, id=run_id)["runOrError"]["tags"]}
    assert tags["kilo/outcome"] == "moved_on"
    after = platform.review(pull)
    assert after is not None and (after.attempt, after.state) == (1, "completed")


def test_the_command_line_shows_cancels_and_dispatches(platform: RunningPlatform) -> None:
    pull = platform.control("open-pull", kind="clean")
    row = platform.at_work(pull)
    assert platform.cli("reviews", "cancel", str(row.item_id))[0] == 0
    assert platform.cli("reviews", "cancel", str(row.item_id))[0] == 1
    platform.settled(pull)
    code, made = platform.cli(
        "reviews", "dispatch", "--owner", str(platform.owner), "--repository", pull["repository"], "--pull", str(pull["number"])
    )
    assert code == 0, made
    platform.wait(lambda: getattr(platform.store.reviews.get(UUID(made["review"])), "state", "") == "completed", 60)
    code, shown = platform.cli("reviews", "show", made["review"])
    assert code == 0 and all(entry["sent_turn"] for entry in shown["evidence"]["ledger"])
    assert platform.cli("status")[0] == 0 and platform.cli("owners", "list")[0] == 0
    assert platform.cli("reviews", "show", str(platform.owner))[0] == 1


def test_a_provider_outage_stops_no_verdict_and_its_effects_come_later(platform: RunningPlatform) -> None:
    pull = platform.control("open-pull", kind="planted")
    platform.at_work(pull)
    platform.control("faults", faults=[{"method": "POST", "path": "/reviews", "kind": "lost", "left": 1}])
    platform.control("faults", faults=[{"method": "POST", "path": "/comments", "kind": "error", "status": 503, "left": 1}])
    platform.settled(pull, 120)
    seen = platform.read(pull)
    assert len(seen["reviews"]) == 1 and len(seen["comments"]) == 1, "a lost answer must not post twice"


def test_what_opens_the_api_and_the_metrics_is_readable_for_the_operator_alone(platform: RunningPlatform) -> None:
    files = (platform.settings.operator_key_file, platform.settings.metrics_token_file)
    assert all(one.stat().st_mode & 0o077 == 0 for one in files)
    assert len({one.read_text() for one in files}) == 2


def test_a_second_platform_on_the_same_home_is_refused(platform: RunningPlatform) -> None:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "kilo_pipelines.cli.main", "up"],
        env=platform.env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1 and "running already" in done.stderr
    assert platform.process.poll() is None and platform.cli("status")[0] == 0
