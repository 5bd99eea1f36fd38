"""`kilo-pipelines security report|summary|findings|settings` over a real database: documents, figures, refusals and exit codes."""

from __future__ import annotations

import csv
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from click.testing import Result

from kilo_pipelines.services.security.config import SERVICE
from tests.conftest import Database
from tests.store.test_findings import Synced
from tests.support.alerts import alert
from tests.support.keys import api_key
from tests.support.served import alone, invoked, served

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def synced(database: Database) -> Synced:
    made = Synced(database, 440_001)
    made.take(*(alert(number, **{"security_advisory.summary": "=1+1"}) for number in range(1, 9)))
    made.take(alert(2, state="fixed", fixed_at="2026-02-01T00:00:00Z"))
    Synced(database, 440_001).take(alert(1))
    return made


@pytest.fixture(scope="module")
def address(database: Database) -> Iterator[str]:
    """A running control API."""
    with served(database) as found:
        yield found


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Database, synced: Synced, address: str) -> Run:
    """A command of the operator for the owner, from another machine."""
    alone(monkeypatch, tmp_path, api_url=address, api_key=api_key(database.store, "operator"))

    def invoke(*arguments: str, owner: object = synced.owner) -> Result:
        return invoked("security", *arguments, *(["--owner", str(owner)] if owner else []))

    return invoke


def told(done: Result) -> Any:
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_report_goes_to_standard_output_or_to_a_new_file(run: Run, tmp_path: Path) -> None:
    rows = list(csv.reader(io.StringIO(run("report").stdout_bytes.decode(), newline="")))
    assert len(rows) == 10  # a header and nine events
    assert [row for row in rows if "'=1+1" in row] and not [row for row in rows if "=1+1" in row]
    place = tmp_path / "report.json"
    assert told(run("report", "--format", "json", "--output", str(place), "--json"))["bytes"] == place.stat().st_size
    assert json.loads(place.read_bytes())["event_count"] == 9
    again = run("report", "--format", "json", "--output", str(place))
    assert again.exit_code == 1 and "exists" in again.stderr, "nothing is written over"
    wrapped = told(run("report", "--format", "vex", "--json"))
    assert json.loads(wrapped["document"])["specVersion"] == "1.6"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--from", "2026-05-02", "--to", "2026-05-01"],
        ["--to", "9999-01-01"],
        ["--from", "2025-01-01", "--to", "2026-01-01"],
        ["--format", "vex", "--from", "2026-05-02"],
        ["--from", "tomorrow"],
        ["--format", "pdf"],
        ["--repository", "0"],
    ],
)
def test_what_is_no_period_or_format_is_said(run: Run, arguments: list[str]) -> None:
    done = run("report", *arguments)
    assert done.exit_code == 2 and done.stderr and "Traceback" not in done.output and not done.stdout


def test_an_owner_that_nobody_is_or_that_is_not_named_is_said(run: Run) -> None:
    for command in ("report", "summary", "findings"):
        assert run(command, owner=uuid4()).exit_code == 1
        assert run(command, owner=None).exit_code == 2


def test_figures_are_shown_for_people_and_programs(run: Run) -> None:
    figures = told(run("summary", "--json"))
    assert figures["by_status"] == {"open": 7, "fixed": 1, "ignored": 0} and figures["analysis"]["not_analyzed"] == 7
    assert told(run("summary", "--json", "--repository", "1"))["findings"] == 0
    text = run("summary").stdout
    assert "8 findings: 7 open, 1 fixed, 0 ignored" in text and "7 not_analyzed" in text and "octo/demo" in text
    assert run("summary", "--repository", "1").exit_code == 0, "nothing to measure is no error"


def test_findings_are_narrowed_and_sorted(run: Run) -> None:
    assert len(told(run("findings", "--json"))) == 7
    assert [one["source_id"] for one in told(run("findings", "--status", "closed", "--json"))] == ["2"]
    assert told(run("findings", "--outcome", "exploitable", "--json")) == []
    assert told(run("findings", "--repository", "7", "--json")) == []
    ranks = [one["severity"] for one in told(run("findings", "--sort", "severity_asc", "--json"))]
    assert ranks[0] == "low" and ranks[-1] == "critical"
    due = [one["due_at"] for one in told(run("findings", "--sort", "sla_due_at_asc", "--json"))]
    assert due == sorted(due)
    assert run("findings", "--limit", "0").exit_code == 2


def test_settings_are_saved_and_refused(run: Run, synced: Synced) -> None:
    assert told(run("settings", "--set", 'sla_preset="strict"', "--json"))["sla_preset"] == "strict"
    assert {one["budget_days"] for one in synced.all(severity="critical")} == {7}, "deadlines follow at once"
    refused = run("settings", "--set", "sla_preset=7", "--json")
    assert refused.exit_code == 2 and "sla_preset" in json.loads(refused.stdout)["error"]
    assert run("settings", "--set", "sla_preset").exit_code == 2
    assert told(run("settings", "--json"))["sla_preset"] == "strict"


def test_a_sync_is_asked_for_once_and_waited_for(run: Run, synced: Synced) -> None:
    store, owner = synced.store, synced.owner
    if store.owners.config(owner, SERVICE) is None:
        store.owners.put_config(owner, SERVICE, {}, enabled=False, expected_revision=0, actor="test")
    store.owners.enable_service(owner, SERVICE, False, actor="test")
    assert run("sync").exit_code == 1, "the agent is off"
    store.owners.enable_service(owner, SERVICE, True, actor="test")
    asked = told(run("sync", "--json"))
    assert asked["outcome"] == "accepted" and run("sync").exit_code == 1, "one at a time"
    store.queue.cancel(asked["item"], reason="user_cancelled", actor="test")

    def end() -> None:
        while not (live := store.queue.items(owner_id=owner, service="security_sync", state="live")):
            time.sleep(0.05)
        store.queue.cancel(live[0]["id"], reason="user_cancelled", actor="test")

    ending = threading.Thread(target=end, daemon=True)
    ending.start()
    done = run("sync", "--wait", "--json")
    ending.join(10)
    answer = json.loads(done.stdout)
    assert (done.exit_code, answer["state"], answer["reason"]) == (1, "cancelled", "user_cancelled")
    assert [one["full_name"] for one in answer["repositories"]] == ["octo/demo"]
