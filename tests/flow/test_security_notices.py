"""Notices end to end: staged by a sync and by the clock, sent once by mail, Slack and webhook, and not when they are stale."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from dagster import DagsterInstance
from sqlalchemy import text

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.ops.security_notices import stage
from kilo_pipelines.providers.notices import signature
from kilo_pipelines.settings import Settings, write_secret
from tests.conftest import Database
from tests.support.channels import Channels, channels
from tests.support.security import Dispatcher, Owner, syncing
from tests.support.twin import Twin


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twin]:
    with syncing(tmp_path_factory.mktemp("n")) as running:
        yield running


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, twin: Twin) -> Iterator[Channels]:
    with channels() as found:
        monkeypatch.setenv("KILO_SMTP_URL", found.smtp)
        monkeypatch.setenv("KILO_SMTP_FROM", "kilo@acme.test")
        monkeypatch.setenv("KILO_SLACK_API_URL", f"{found.http}/slack")
        write_secret(Settings().slack_token_file, "xoxb-test")
        yield found


@pytest.fixture
def desk(database: Database, tmp_path: Path) -> Iterator[Dispatcher]:
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield Dispatcher(database, instance)


@pytest.fixture(autouse=True)
def alone(database: Database) -> None:
    """The twin has one installation, and nothing is written for an owner whose installation another one holds, too."""
    for one in database.store.owners.all():
        with database.store.database.owner(one.id) as connection:
            connection.execute(text("update integrations set disconnected_at = now() where disconnected_at is null"))


def named(owner: Owner, told: Channels, *kinds: str, **more: Any) -> None:
    to = {
        "email": {"kind": "email", "address": "ada@acme.test"},
        "slack": {"kind": "slack", "channel": "#security"},
        "webhook": {"kind": "webhook", "url": f"{told.http}/hook"},
    }
    owner.configure(notice_recipients=[to[kind] for kind in kinds], sla_notice_min_severity="critical", **more)


def messages(owner: Owner) -> list[tuple[str, str | None]]:
    return [(one["state"], one["reason"]) for item in owner.items("notice") for one in owner.store.outbox.of_item(item.id)]


def overdue(owner: Owner) -> int:
    return len(owner.store.findings.listed(owner.id, status="open", severity="critical", overdue=True, limit=500))


def test_passed_deadlines_are_told_once_by_every_channel_however_often_the_clock_strikes(
    database: Database, twin: Twin, told: Channels, desk: Dispatcher
) -> None:
    owner = Owner(database, twin, 1, 60)
    owner.sync()
    named(owner, told, "email", "slack", "webhook")
    late = overdue(owner)
    assert late > 0
    for _ in range(3):
        owner.sync()
        stage(owner.store, owner.id)
        desk.work(owner.id)
        database.clock.advance(timedelta(seconds=31))
        desk.work(owner.id)
    assert len(told.mails) == late and len(told.posts) == 2 * late
    assert set(messages(owner)) == {("applied", None)}
    mail = told.mails[0]
    assert "Subject: Deadline has passed: critical in " in mail and "To: ada@acme.test" in mail
    path, headers, body = next(one for one in told.posts if one[0] == "/hook")
    secret = owner.store.cipher.derive(f"notice-webhook:{owner.id}")
    lower = {name.lower(): value for name, value in headers.items()}
    assert lower["webhook-signature"] == signature(secret, lower["webhook-id"], int(lower["webhook-timestamp"]), body)
    assert json.loads(body)["type"] == "security.sla_breach" and path == "/hook"
    slack = next(one for one in told.posts if one[0] == "/slack/chat.postMessage")
    assert json.loads(slack[2])["channel"] == "#security" and "xoxb-test" in str(slack[1])
    assert base64.b64encode(secret).decode() not in str(told.posts)


def test_what_is_fixed_before_the_message_goes_out_is_not_told(
    database: Database, twin: Twin, told: Channels, desk: Dispatcher
) -> None:
    owner = Owner(database, twin, 1, 60)
    owner.sync()
    named(owner, told, "webhook")
    assert stage(owner.store, owner.id) > 0
    told.http_fault = 503
    desk.once(owner.id)
    waiting = [one for one in messages(owner) if one[0] == "pending"]
    assert waiting == [("pending", Reason.CHANNEL_UNAVAILABLE)]
    sent = len(told.posts)
    with owner.store.database.owner(owner.id) as connection:
        connection.execute(text("update findings set upstream_state = 'fixed'"))
    database.clock.advance(timedelta(minutes=5))
    desk.work(owner.id)
    assert len(told.posts) == sent and ("dropped", Reason.NOTICE_NOT_WANTED) in messages(owner)


def test_a_mail_whose_answer_is_lost_is_never_sent_again_by_itself(
    database: Database, twin: Twin, told: Channels, desk: Dispatcher
) -> None:
    owner = Owner(database, twin, 1, 60)
    owner.sync()
    named(owner, told, "email")
    told.smtp_fault = "drop"
    late = stage(owner.store, owner.id)
    for _ in range(4):
        desk.work(owner.id)
        database.clock.advance(timedelta(minutes=20))
    assert len(told.mails) == late and set(messages(owner)) == {("unknown", Reason.PROVIDER_UNAVAILABLE)}


@pytest.mark.parametrize(
    ("fault", "state", "reason"),
    [("refuse", "dead", Reason.CHANNEL_REFUSED), ("slow", "pending", Reason.CHANNEL_UNAVAILABLE)],
)
def test_a_channel_that_refuses_is_a_persons_and_one_that_is_busy_is_asked_again(
    database: Database, twin: Twin, told: Channels, desk: Dispatcher, fault: str, state: str, reason: Reason
) -> None:
    owner = Owner(database, twin, 1, 60)
    owner.sync()
    if fault == "refuse":
        named(owner, told, "email")
        told.smtp_fault = "refuse"
    else:
        named(owner, told, "slack")
        told.slack_error = "ratelimited"
    stage(owner.store, owner.id)
    desk.once(owner.id)
    assert (state, reason) in messages(owner)


def test_new_findings_are_told_from_the_moment_that_there_is_somebody(
    database: Database, twin: Twin, told: Channels, desk: Dispatcher
) -> None:
    owner = Owner(database, twin, 1, 30)
    owner.sync()
    database.clock.advance(timedelta(seconds=5))
    named(owner, told, "webhook", sla_notices=False, new_finding_notices=True, new_finding_notice_min_severity="all")
    assert stage(owner.store, owner.id) == 0
    twin.control("change-alerts", repository=owner.names[0], count=25)
    done = owner.sync()
    assert done.inserted > 0 and 0 < len(owner.items("notice")) <= done.inserted
    desk.work(owner.id)
    assert {json.loads(body)["type"] for _, _, body in told.posts} == {"security.new_finding"}


def test_two_owners_of_one_repository_are_told_each_their_own(
    database: Database, twin: Twin, told: Channels, desk: Dispatcher
) -> None:
    mine, theirs = Owner(database, twin, 1, 60), Owner(database, twin, 1, 1)
    mine.sync()
    theirs.connect(int(mine.repositories[0]["repository_id"]), mine.names[0])
    theirs.sync()
    named(mine, told, "webhook")
    assert stage(mine.store, mine.id) > 0 and stage(theirs.store, theirs.id) == 0
    assert theirs.items("notice") == []
