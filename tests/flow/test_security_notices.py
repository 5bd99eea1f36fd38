"""Notices end to end: staged by a sync and by the clock, sent once by mail, Slack and webhook, and not when they are stale."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from dagster import DagsterInstance
from sqlalchemy import text

from kilo_pipelines.acts.notices import wanted
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.work import WorkState
from kilo_pipelines.ops import effects
from kilo_pipelines.ops.security_notices import stage
from kilo_pipelines.providers.notices import signature
from kilo_pipelines.settings import Settings, write_secret
from kilo_pipelines.store.outbox import MAX_TRIES
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
def desk(database: Database) -> Iterator[Dispatcher]:
    with DagsterInstance.ephemeral() as instance:
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
    # Of sixty alerts some nine are high, open and overdue; now and then none is critical.
    owner.configure(notice_recipients=[to[kind] for kind in kinds], sla_notice_min_severity="high", **more)


def messages(owner: Owner) -> list[tuple[str, str | None]]:
    return [(one["state"], one["reason"]) for item in owner.items("notice") for one in owner.store.outbox.of_item(item.id)]


def due(owner: Owner, after: timedelta, id: UUID | None = None) -> None:
    """Moves the deadline of a finding, or of all. Ops ask the real clock and the store its own: half an hour is between them at most."""
    with owner.store.database.owner(owner.id) as connection:
        connection.execute(
            text(f"update finding_sla set due_at = :at {'where finding_id = :id' if id else ''}"),
            {"at": datetime.now(UTC) + after} | ({"id": id} if id else {}),
        )


def near(owner: Owner, count: int) -> list[UUID]:
    """Only these open findings have a deadline that is near, and none has one that has passed."""
    due(owner, timedelta(days=30))
    found = [one.id for one in owner.findings(status="open")][:count]
    with owner.store.database.owner(owner.id) as connection:
        connection.execute(text("update findings set severity = 'critical' where id = any(:ids)"), {"ids": found})
    for one in found:
        due(owner, timedelta(days=2), id=one)
    return found


def marked(owner: Owner, finding: UUID, state: str) -> None:
    with owner.store.database.owner(owner.id) as connection:
        connection.execute(text("update findings set upstream_state = :state where id = :id"), {"state": state, "id": finding})


def told_of(told: Channels) -> Counter[str]:
    return Counter(json.loads(body)["type"] for path, _, body in told.posts if path == "/hook")


def overdue(owner: Owner) -> int:
    found = owner.store.findings.listed(owner.id, status="open", overdue=True, limit=500)
    return sum(one["severity"] in ("critical", "high") for one in found)


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
    assert re.search(r"Subject: Deadline has passed: (critical|high) in ", mail) and "To: ada@acme.test" in mail
    assert "\n" not in mail.replace("\r\n", ""), "a line ends with CR LF and nothing else"
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
        assert stage(owner.store, owner.id) == 0
    assert len(told.mails) == late and set(messages(owner)) == {("unknown", Reason.PROVIDER_UNAVAILABLE)}


@pytest.mark.parametrize(
    ("fault", "state", "reason"),
    [
        ("refuse", "dead", Reason.CHANNEL_REFUSED),
        ("reject", "dead", Reason.CHANNEL_REFUSED),
        ("busy", "pending", Reason.CHANNEL_UNAVAILABLE),
        ("grey", "pending", Reason.CHANNEL_UNAVAILABLE),
        ("slow", "pending", Reason.CHANNEL_UNAVAILABLE),
        ("torn", "unknown", Reason.PROVIDER_UNAVAILABLE),
    ],
)
def test_a_channel_that_refuses_is_a_persons_and_one_that_is_busy_is_asked_again(
    database: Database, twin: Twin, told: Channels, desk: Dispatcher, fault: str, state: str, reason: Reason
) -> None:
    owner = Owner(database, twin, 1, 60)
    owner.sync()
    if fault in ("slow", "torn"):
        named(owner, told, "slack")
        told.slack_error = {"slow": "ratelimited", "torn": "fatal_error"}[fault]
    else:
        named(owner, told, "email")
        told.smtp_fault = fault
    stage(owner.store, owner.id)
    desk.once(owner.id)
    assert (state, reason) in messages(owner)
    assert stage(owner.store, owner.id) == 0, "what was refused is a person's, what waits is under way"


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


def test_a_near_deadline_is_told_once_and_its_passing_by_a_notice_of_its_own(
    database: Database, twin: Twin, told: Channels, desk: Dispatcher
) -> None:
    owner = Owner(database, twin, 1, 60)
    owner.sync()
    named(owner, told, "webhook")
    (finding,) = near(owner, 1)
    due(owner, timedelta(days=3, minutes=30), id=finding)
    assert stage(owner.store, owner.id) == 0, "three days are not yet reached"
    for after, expected in (
        (timedelta(days=3, minutes=-30), {"security.sla_warning": 1}),
        (timedelta(hours=1), {"security.sla_warning": 1}),
        (timedelta(minutes=-30), {"security.sla_warning": 1, "security.sla_breach": 1}),
        (timedelta(days=-9), {"security.sla_warning": 1, "security.sla_breach": 1}),
    ):
        due(owner, after, id=finding)
        stage(owner.store, owner.id)
        desk.work(owner.id)
        assert told_of(told) == expected


def test_a_backlog_of_passed_deadlines_keeps_no_near_one_waiting(
    database: Database, twin: Twin, told: Channels, desk: Dispatcher
) -> None:
    owner = Owner(database, twin, 1, 320)
    owner.sync()
    named(owner, told, "webhook")
    owner.configure(sla_notice_min_severity="all")
    (finding,) = near(owner, 1)
    with owner.store.database.owner(owner.id) as connection:
        connection.execute(
            text("update finding_sla set due_at = :at where finding_id <> :id"),
            {"at": datetime.now(UTC) - timedelta(days=9), "id": finding},
        )
    late = len(owner.store.findings.listed(owner.id, status="open", overdue=True, limit=1_000))
    assert late > 100
    for opened, breaches in ((101, 100), (late - 100, late), (0, late)):
        assert stage(owner.store, owner.id) == opened
        kinds = Counter(item.details["kind"] for item in owner.items("notice"))
        assert kinds == {"sla_warning": 1, "sla_breach": breaches}


def test_what_was_dropped_or_cancelled_is_told_when_it_holds_again(
    database: Database, twin: Twin, told: Channels, desk: Dispatcher
) -> None:
    owner = Owner(database, twin, 1, 60)
    owner.sync()
    named(owner, told, "email", "webhook")
    first, second = near(owner, 2)
    due(owner, timedelta(days=30), id=second)
    assert stage(owner.store, owner.id) == 1
    told.http_fault = 503
    desk.once(owner.id)
    due(owner, timedelta(days=2), id=second)
    assert stage(owner.store, owner.id) == 1
    for one in (first, second):  # one with a message that waits, one whose item does
        marked(owner, one, "fixed")
    database.clock.advance(timedelta(minutes=5))
    desk.work(owner.id)
    assert sorted(messages(owner)) == [("applied", None), ("dropped", Reason.NOTICE_NOT_WANTED)] and len(told.mails) == 1
    assert {item.state for item in owner.items("notice")} == {WorkState.COMPLETED, WorkState.CANCELLED}
    assert stage(owner.store, owner.id) == 0, "both are fixed"
    for one in (first, second):
        marked(owner, one, "open")
    sent = len(told.posts)
    assert stage(owner.store, owner.id) == 2
    desk.work(owner.id)
    assert len(told.mails) == 2 and len(told.posts) == sent + 2, "the mail of the first was sent before and isn't sent again"
    assert sorted(messages(owner)) == [("applied", None)] * 4 and stage(owner.store, owner.id) == 0


def test_who_is_named_later_is_told_and_nobody_else_twice(
    database: Database, twin: Twin, told: Channels, desk: Dispatcher
) -> None:
    owner = Owner(database, twin, 1, 60)
    owner.sync()
    named(owner, told, "email")
    near(owner, 1)
    stage(owner.store, owner.id)
    desk.work(owner.id)
    named(owner, told, "email", "webhook")
    for expected in (1, 0):
        assert stage(owner.store, owner.id) == expected
        desk.work(owner.id)
        assert len(told.mails) == 1 and told_of(told) == {"security.sla_warning": 1}


def test_a_receiver_that_was_away_for_long_is_told_when_it_is_back_unless_a_person_gave_it_up(
    database: Database, twin: Twin, told: Channels, desk: Dispatcher
) -> None:
    owner = Owner(database, twin, 1, 60)
    owner.sync()
    named(owner, told, "email")
    near(owner, 2)
    stage(owner.store, owner.id)
    told.smtp_fault = "grey"
    desk.once(owner.id)
    assert messages(owner) == [("pending", Reason.CHANNEL_UNAVAILABLE)] * 2
    with owner.store.database.owner(owner.id) as connection:
        connection.execute(text("update effects set tries = :most"), {"most": MAX_TRIES - 1})
    database.clock.advance(timedelta(minutes=20))
    desk.work(owner.id)
    assert messages(owner) == [("dead", Reason.CHANNEL_UNAVAILABLE)] * 2
    with owner.store.database.owner(owner.id) as connection:
        dead = connection.execute(text("select id from effects where state = 'dead' order by seq")).scalars().all()
    assert owner.store.outbox.abandon(dead[0], actor="test") == "dropped"
    told.smtp_fault, tried = None, len(told.mails)
    assert stage(owner.store, owner.id) == 1
    desk.work(owner.id)
    assert len(told.mails) == tried + 1
    assert sorted(messages(owner)) == [("applied", None), ("dropped", Reason.USER_CANCELLED)]


@pytest.mark.parametrize("change", ["another recipient", "notices off"])
def test_right_before_it_is_sent_it_is_asked_whether_it_still_holds(
    database: Database, twin: Twin, told: Channels, desk: Dispatcher, change: str
) -> None:
    owner = Owner(database, twin, 1, 60)
    owner.sync()
    named(owner, told, "webhook")
    near(owner, 1)
    assert stage(owner.store, owner.id) == 1
    told.http_fault = 503
    desk.once(owner.id)
    assert messages(owner) == [("pending", Reason.CHANNEL_UNAVAILABLE)]
    if change == "another recipient":
        named(owner, told, "slack")
    else:
        owner.configure(sla_notices=False)
    database.clock.advance(timedelta(minutes=5))
    desk.work(owner.id)
    assert messages(owner) == [("dropped", Reason.NOTICE_NOT_WANTED)] and len(told.posts) == 1


def test_a_notice_holds_as_long_as_settings_finding_and_deadline_say_so(database: Database, twin: Twin, told: Channels) -> None:
    owner = Owner(database, twin, 1, 60)
    owner.sync()
    named(owner, told, "webhook")
    (finding,) = near(owner, 1)

    def holds() -> bool:
        return wanted(owner.store, owner.id, finding, "sla_warning", datetime.now(UTC)) is not None

    def write(sql: str) -> None:
        with owner.store.database.owner(owner.id) as connection:
            connection.execute(text(sql))

    def switch(on: bool) -> None:
        owner.store.owners.enable_service(owner.id, "security_agent", on, actor="test")

    for change, back in (
        (lambda: switch(False), lambda: switch(True)),
        (lambda: owner.configure(sla_notices=False), lambda: owner.configure(sla_notices=True)),
        (lambda: owner.configure(notice_recipients=[]), lambda: named(owner, told, "webhook")),
        (
            lambda: owner.configure(repository_selection_mode="selected"),
            lambda: owner.configure(repository_selection_mode="all"),
        ),
        (lambda: due(owner, timedelta(days=4), id=finding), lambda: due(owner, timedelta(days=2), id=finding)),
        (lambda: due(owner, timedelta(days=-1), id=finding), lambda: due(owner, timedelta(days=2), id=finding)),
        (lambda: write("update finding_sla set paused = true"), lambda: write("update finding_sla set paused = false")),
        (
            lambda: write("update integrations set suspended_at = now()"),
            lambda: write("update integrations set suspended_at = null"),
        ),
        (lambda: marked(owner, finding, "dismissed"), lambda: marked(owner, finding, "open")),
        (lambda: write("update findings set severity = 'low'"), lambda: write("update findings set severity = 'critical'")),
    ):
        assert holds()
        change()
        assert not holds()
        back()


def test_slow_receivers_hold_a_run_for_so_long_and_the_next_one_goes_on(
    database: Database, twin: Twin, told: Channels, desk: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = Owner(database, twin, 1, 60)
    owner.sync()
    named(owner, told, "webhook")
    near(owner, 1)
    stage(owner.store, owner.id)
    with monkeypatch.context() as patch:
        patch.setattr(effects, "RUN_SECONDS", 0.0)
        desk.once(owner.id)
    assert messages(owner) == [("pending", None)] and told.posts == []
    database.clock.advance(timedelta(seconds=30))
    desk.work(owner.id)
    assert messages(owner) == [("applied", None)] and len(told.posts) == 1


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
