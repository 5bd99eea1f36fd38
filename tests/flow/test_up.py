"""`up`, `down` and `demo` as a user runs them: from nothing, again, stopped in a hurry, killed, and to their own end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from kilo_pipelines.cli import supervisor
from tests.support.platform import RunningPlatform

# All of the platform's processes; `up` prints them, `status` shows them.
NAMES = {
    "postgres",
    "redis",
    "twin",
    "ingress",
    "model-proxy",
    "dagster-code",
    "dagster-ui",
    "dagster-daemon",
    "worker-dispatch",
    "worker-maintenance",
    "worker-agents",
}


@pytest.fixture(scope="module")
def platform() -> Iterator[RunningPlatform]:
    """One that runs before and after each test."""
    found = RunningPlatform()
    yield found
    found.close()


def _first_review_ended(platform: RunningPlatform) -> None:
    platform.wait(lambda: "Ctrl-C stops everything." in platform.log.read_text(), 150)


def _left(platform: RunningPlatform) -> list[str]:
    """What still runs of this home: recognised by its paths, or by its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            own = process.environ().get("KILO_HOME") == str(platform.home)
        except psutil.Error:
            continue
        if own or any(str(platform.home) in word for word in words):
            found.append(" ".join(words))
    return found


@pytest.mark.timeout(300)
def test_up_shows_a_review_stops_in_time_and_goes_on_with_a_new_commit(platform: RunningPlatform) -> None:
    _first_review_ended(platform)
    known = platform.store.reviews.of_owner(platform.owner)
    first = min(known, key=lambda one: one.created_at)
    text = platform.log.read_text()
    wanted = [*NAMES, "answered 202", f"{platform.settings.dagster_url}/runs/{first.run_id}", str(first.session_id), "failure"]
    assert [one for one in wanted if one not in text] == []

    code, status = platform.cli("status")
    assert code == 0 and {one["name"] for one in status["processes"]} == NAMES
    settings = platform.settings
    ports = {settings.public_port, settings.admin_port, settings.twin_port}
    assert platform.listening() == {("127.0.0.1", port) for port in ports}, (
        "nothing listens beyond loopback, nothing else listens at all"
    )

    assert platform.stop() < 10
    assert platform.process.returncode == 0 and _left(platform) == []
    assert platform.cli("status")[0] == 1 and platform.cli("reviews", "list")[0] == 1 and platform.cli("down")[0] == 1

    argv = [sys.executable, "-m", "kilo_pipelines.cli.main", "up"]
    env = {**platform.env, "KILO_OFFLINE": "false"}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "another KILO_HOME" in done.stderr, "the twin's home never serves a real App"
    assert _left(platform) == [] and supervisor.read_state(platform.settings) == {}

    before = platform.log.stat().st_size
    platform.start()
    platform.wait(lambda: b"Ctrl-C stops everything." in platform.log.read_bytes()[before:], 120)
    (second,) = [
        one for one in platform.store.reviews.of_owner(platform.owner) if one.item_id not in {old.item_id for old in known}
    ]
    assert second.pull_number == first.pull_number and second.head_sha != first.head_sha
    assert second.state == "completed"


def test_the_merged_log_follows_every_process_and_names_no_secret(platform: RunningPlatform) -> None:
    _first_review_ended(platform)
    text = (platform.settings.logs_dir / "platform.log").read_text()
    assert {line.split()[1] for line in text.splitlines()} >= {"postgres", "dagster-daemon", "worker-dispatch"}
    secrets = [
        path
        for path in platform.settings.secrets_dir.iterdir()
        if path.name not in ("database.json", "origin") and path.stat().st_size  # a lock is empty
    ]
    logins = json.loads((platform.settings.secrets_dir / "database.json").read_text()).values()
    passwords = [url.split("://")[1].split(":")[1].split("@")[0] for url in logins]
    logs = [path.read_text() for path in platform.settings.logs_dir.iterdir()]
    for canary in [*(path.read_text().strip() for path in secrets), *passwords]:
        assert not any(canary in log for log in [*logs, platform.log.read_text()])


def test_a_second_up_is_refused_and_leaves_the_first_as_it_was(platform: RunningPlatform) -> None:
    _first_review_ended(platform)
    config = (platform.home / "config.env").read_text()
    argv = [sys.executable, "-m", "kilo_pipelines.cli.main", "up", "--agent", "kilo"]
    done = subprocess.run(argv, env=platform.env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "running already" in done.stderr
    code, status = platform.cli("status")
    assert code == 0 and {one["name"] for one in status["processes"]} == NAMES
    assert (platform.home / "config.env").read_text() == config


def test_doctor_finds_a_running_platform_well(platform: RunningPlatform) -> None:
    code, report = platform.cli("doctor")
    assert code == 0 and report["ok"], report
    missing = {one["code"] for one in report["checks"] if not one["ok"]}
    assert missing <= {"memory_short", "disk_short"}


def test_doctor_names_a_refused_key_and_owners_for_whom_nothing_may_run(platform: RunningPlatform) -> None:
    code, shown = platform.cli("budgets", "show", "--owner", str(platform.owner))
    set_budget = ("budgets", "set", "--owner", str(platform.owner), "--revision")
    assert code == 0 and platform.cli(*set_budget, str(shown["revision"]), '{"daily": {"tokens": 0}}')[0] == 0
    code, report = platform.cli("doctor", KILO_API_KEY="kilo_00000000_nobodys")
    assert platform.cli(*set_budget, str(shown["revision"] + 1), '{"daily": {"tokens": null}}')[0] == 0
    bad = {one["name"]: one for one in report["checks"] if not one["ok"] and one["code"] not in ("memory_short", "disk_short")}
    assert {name: (one["code"], one["required"]) for name, one in bad.items()} == {
        "api key": ("key_refused", True),
        "limits of acme": ("budget_zero", False),
    }
    assert code == 1 and "nobodys" not in json.dumps(report) and all(one["remedy"] for one in bad.values())


def test_doctor_names_everything_that_a_real_app_still_lacks(tmp_path: Any, platform: RunningPlatform) -> None:
    env = {**platform.env, "KILO_HOME": str(tmp_path), "KILO_OFFLINE": "false"}
    argv = [sys.executable, "-m", "kilo_pipelines.cli.main", "doctor", "--json"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    bad = {one["code"]: one["remedy"] for one in json.loads(done.stdout)["checks"] if one["required"] and not one["ok"]}
    assert done.returncode == 1
    assert set(bad) >= {"webhook_secret_missing", "github_app_missing", "model_missing", "model_key_missing", "port_taken"}
    assert all(bad.values()), "each missing thing has its remedy"


@pytest.mark.timeout(300)
def test_a_second_ctrl_c_kills_and_the_next_start_recovers(platform: RunningPlatform) -> None:
    _first_review_ended(platform)
    # A stopped child can't end at its signal: the stop would wait for it.
    platform.child("worker-agents").suspend()
    platform.store.database.dispose()
    platform.process.send_signal(signal.SIGINT)
    platform.wait(lambda: b"stopping" in platform.log.read_bytes()[-200:], 5)
    platform.process.send_signal(signal.SIGINT)
    assert platform.process.wait(2) == 130
    platform.wait(lambda: _left(platform) == [], 5)
    platform.start()
    pull = platform.control("open-pull", kind="clean")
    assert platform.settled(pull).reason == "reviewed"


@pytest.mark.timeout(300)
def test_demo_ends_by_itself_and_its_last_line_is_the_promised_object() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("KILO_")}
    argv = [sys.executable, "-m", "kilo_pipelines.cli.main", "demo", "--agent", "scripted"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert list(answer) == ["delivery", "runs", "session", "review", "check", "clean", "evidence", "seconds", "agent"]
    assert (answer["check"], answer["clean"]) == ({"conclusion": "failure"}, {"conclusion": "success"})
    assert answer["review"]["inline"] >= 4 and answer["review"]["summary_url"].startswith("http://localhost:")
    assert answer["evidence"]["covered"] == answer["evidence"]["changed_blobs"] > 0 and answer["evidence"]["turns"] >= 3
    seconds = answer["seconds"]
    assert 0 < seconds["answered"] < seconds["launched"] < seconds["reviewed"] and len(answer["runs"]) >= 2
    assert answer["agent"] == "scripted" and answer["delivery"] and answer["session"]
