"""The audit report as pure rules: periods, verdicts, what is told of an event, and cells that no spreadsheet computes."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.refusal import Refusal
from kilo_pipelines.services.permissions import may
from kilo_pipelines.services.security import report
from kilo_pipelines.services.security.report import AuditReport, Period, period_of, verdict
from kilo_pipelines.services.security.sla import HistoryEvent, SlaPolicy

OWNER = UUID(int=1)
NOW = datetime(2026, 6, 15, 12, 30, tzinfo=UTC)
START = datetime(2026, 3, 4, tzinfo=UTC)
POLICY = SlaPolicy({"critical": 1, "high": 2, "medium": 3, "low": 4}, version=3)
HOSTILE = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
days = st.dates(date(2026, 1, 1), date(2026, 12, 31))


@dataclass(frozen=True)
class Finding:
    """A finding with as much as a report asks of it."""

    id: UUID
    title: str = "A defect"
    repository_id: int = 7
    source_id: str = "12"
    severity: str = "high"
    package_name: str = "left"
    package_ecosystem: str = "npm"
    manifest_path: str = "package-lock.json"
    cve_id: str | None = None
    ghsa_id: str | None = "GHSA-aaaa-bbbb-cccc"
    html_url: str | None = None


@dataclass(frozen=True)
class Event:
    """An audit event."""

    finding_id: UUID
    at: datetime
    action: str = "security.finding.status_change"
    actor: str = "dependabot"
    data: dict[str, Any] = field(default_factory=dict)


def built(events: list[Event], histories: dict[UUID, list[HistoryEvent]] | None = None, title: str = "A defect") -> AuditReport:
    """A report of the quarter before `NOW` of these events."""
    known = {one.finding_id: Finding(one.finding_id, title) for one in events}
    period = Period(date(2026, 3, 18), date(2026, 6, 15))
    return report.build(OWNER, period, events, known, {7: "octo/demo"}, lambda one: (histories or {}).get(one, []), POLICY, NOW)


def test_the_default_is_the_last_ninety_days() -> None:
    assert period_of(None, None, NOW) == Period(date(2026, 3, 18), date(2026, 6, 15))
    assert period_of(None, date(2026, 5, 1), NOW) == Period(date(2026, 2, 1), date(2026, 5, 1))


@given(st.none() | days, st.none() | days)
def test_a_period_is_at_most_ninety_days_that_have_begun(first: date | None, last: date | None) -> None:
    found = period_of(first, last, NOW)
    end = last or NOW.date()
    wrong = end > NOW.date() or (first is not None and (first > end or (end - first).days >= 90))
    assert isinstance(found, Refusal) == wrong
    if isinstance(found, Period):
        assert found.last == end and 0 <= (found.last - found.first).days < 90
        assert found.start < found.end and found.as_of(NOW) <= NOW and found.as_of(NOW) < found.end
    else:
        assert found.reason == Reason.REPORT_PERIOD_INVALID and found.detail


@pytest.mark.parametrize("last", [date.min, date(1, 1, 2), date.max])
def test_days_at_the_end_of_the_calendar_are_answered(last: date) -> None:
    assert isinstance(period_of(None, last, NOW), Period) == (last < NOW.date())
    assert isinstance(period_of(date.min, last, NOW), Refusal) == (last == date.max)


# -- verdicts --------------------------------------------------------------------------------------------------------------

kinds = st.lists(st.tuples(st.sampled_from(["ignored", "reopened", "fixed"]), st.integers(1, 90)), max_size=6)


def slow_verdict(steps: list[tuple[str, int]], severity: str, policy: SlaPolicy, begin: datetime, until: datetime) -> str:
    """Hour by hour with a countdown: the state, what is left of the budget, and when it was used up."""
    moments = dict[datetime, str]()
    at = begin
    for kind, gap in steps:
        at += timedelta(hours=gap)
        moments[at] = kind
    state, left, due = "open", policy.days[severity] * 24, None
    ended = ""  # how the last stretch of openness ended
    clock = begin
    while True:
        kind = moments.get(clock)
        if kind == "ignored" and state == "open":
            state, ended = "ignored", "terminal_missed" if due is not None and clock > due else "terminal_met"
        elif kind == "reopened" and state == "ignored":
            state = "open"
        elif kind == "reopened" and state == "fixed":
            state, left, due = "open", policy.days[severity] * 24, None
        elif kind == "fixed" and state != "fixed":
            if state == "open":
                ended = "terminal_missed" if due is not None and clock > due else "terminal_met"
            state = "fixed"
        if clock >= until:
            break
        running = state == "open" or (state == "ignored" and not policy.pause_while_ignored)
        if running and (not policy.business_days or clock.weekday() < 5):
            left -= 1
        clock += timedelta(hours=1)
        if left == 0 and due is None:
            due = clock
    if state == "open":
        return "open_past_deadline" if due is not None else "open_within_deadline"
    return ended


@settings(max_examples=400)
@example([("ignored", 25)], "critical", False, True, 0, 30)
@example([("ignored", 73)], "medium", True, True, 0, 73)
@example([("ignored", 72), ("fixed", 1)], "medium", True, True, 0, 73)
@example([("ignored", 24)], "critical", False, True, 0, 30)
@example([("ignored", 20), ("reopened", 90), ("ignored", 5)], "critical", False, True, 0, 200)
@given(
    kinds,
    st.sampled_from(["critical", "high", "medium", "low"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 167),
    st.integers(0, 300),
)
def test_the_verdict_is_that_of_a_countdown_by_the_hour(
    steps: list[tuple[str, int]], severity: str, business: bool, pause: bool, shift: int, later: int
) -> None:
    policy = SlaPolicy(POLICY.days, business_days=business, pause_while_ignored=pause)
    begin = START + timedelta(hours=shift)
    history, at = [HistoryEvent(begin, "opened", severity)], begin
    for kind, gap in steps:
        at += timedelta(hours=gap)
        history.append(HistoryEvent(at, kind))
    until = begin + timedelta(hours=later)
    assert verdict(history, policy, 7, until) == slow_verdict(steps, severity, policy, begin, until)


def test_what_happens_later_changes_no_verdict() -> None:
    history = [HistoryEvent(START, "opened", "high"), HistoryEvent(START + timedelta(days=10), "fixed")]
    assert verdict(history, POLICY, 7, START + timedelta(days=1)) == "open_within_deadline"
    assert verdict(history, POLICY, 7, START + timedelta(days=5)) == "open_past_deadline"
    assert verdict(history, POLICY, 7, START + timedelta(days=10)) == "terminal_missed"
    assert verdict([], POLICY, 7, START) == "unknown"


# -- events ----------------------------------------------------------------------------------------------------------------

happenings = st.lists(
    st.tuples(st.integers(1, 4), st.integers(0, 80 * 24), st.sampled_from(["opened", "ignored", "reopened", "fixed"])),
    max_size=25,
)


@given(happenings)
def test_a_report_is_the_fold_of_its_events(made: list[tuple[int, int, str]]) -> None:
    first = datetime(2026, 3, 18, tzinfo=UTC)
    events, histories = [], dict[UUID, list[HistoryEvent]]()
    for number, hours, kind in sorted(made, key=lambda one: one[1]):
        at, finding_id = first + timedelta(hours=hours), UUID(int=number)
        events.append(Event(finding_id, at, data={"before": "open", "after": kind}))
        histories.setdefault(finding_id, []).append(HistoryEvent(at, kind, "high" if kind == "opened" else None))
    found = built(events, histories)
    assert found.event_count == len(events) == sum(len(one.events) for one in found.findings)
    assert sum(found.verdicts.values()) == len(found.findings) == len(histories)
    for one in found.findings:
        own = [event for event in events if event.finding_id == one.id]
        assert [(told.at, told.evidence) for told in one.events] == [(event.at, event.data) for event in own]
        assert one.sla == verdict(histories[one.id], POLICY, 7, found.as_of)
        last = histories[one.id][-1]  # of one moment the last that was recorded
        assert one.status == {"opened": "open", "reopened": "open"}.get(last.kind, last.kind)
    table = list(csv.reader(io.StringIO(report.as_csv(found).decode(), newline="")))
    assert table[0] == list(report.COLUMNS) and len(table) == 1 + len(events)
    assert json.loads(report.as_json(found))["event_count"] == len(events)


def test_an_event_tells_what_its_allow_list_names_and_nothing_else() -> None:
    token = "ghp_" + "a" * 36
    data = {
        "before": "open",
        "after": f"ignored by grace@example.org with {token}",
        "reason": "not_used",
        "comment": "canary-comment",
        "actor": "canary-person",
        "prompt": "canary-prompt",
        "evidence": {"canary": "canary-nested"},
        "origin": {"canary": "canary-object"},
        "finding": {"title": "canary-title", "severity": "low", "reason": "canary-other"},
        "source_occurred_at": "2026-06-01T00:00:00+02:00",
    }
    events = [
        Event(UUID(int=9), NOW, action=action, actor="owner:canary-key", data=data)
        for action in (*report.EVIDENCE, "security.finding.unheard_of")
    ]
    found = built(events)
    for form in (report.as_csv(found).decode(), report.as_json(found).decode()):
        assert "canary" not in form and "grace@" not in form and token not in form
        assert "[redacted-email]" in form and "[redacted]" in form and "not_used" in form
    assert found.findings[0].events[0].occurred_at == datetime(2026, 5, 31, 22, tzinfo=UTC)
    assert found.findings[0].events[-1].evidence == {}


@pytest.mark.parametrize(
    ("actor", "kind"),
    [("platform", "system"), ("dependabot", "system"), ("operator", "operator"), ("owner:x", "owner"), ("grace", "person")],
)
def test_of_an_actor_only_the_kind_is_told(actor: str, kind: str) -> None:
    assert report.kind_of(actor) == kind


def test_a_moment_that_is_none_is_left_out() -> None:
    for said in ("soon", 7, None, "2026-06-01T00:00:00", "9999-99-99"):
        (event,) = built([Event(UUID(int=9), NOW, data={"source_occurred_at": said})]).findings[0].events
        assert event.occurred_at is None


# -- CSV -------------------------------------------------------------------------------------------------------------------


@given(st.text() | st.integers() | st.floats() | st.none() | st.sampled_from(HOSTILE).flatmap(lambda one: st.just(one + "1")))
def test_no_cell_begins_a_formula(value: object) -> None:
    cell = report.csv_cell(value)
    assert not cell.startswith(HOSTILE)
    assert cell.removeprefix("'") == ("" if value is None else str(value)).removeprefix("'")


@given(st.text(st.characters(codec="utf-8"), max_size=40), st.sampled_from(["", *HOSTILE, '"', '",=', "\r\n=", " =", "';"]))
def test_hostile_titles_stay_one_harmless_cell(text: str, lead: str) -> None:
    table = report.as_csv(built([Event(UUID(int=9), NOW)], title=lead + text))
    rows = list(csv.reader(io.StringIO(table.decode(), newline=""), strict=True))
    assert [len(row) for row in rows] == [len(report.COLUMNS)] * 2
    assert not [cell for row in rows for cell in row if cell.startswith(HOSTILE)]
    assert table.count(b"\r\n") == 2 and table.endswith(b"\r\n") and table.count(b"\n") == 2


def test_the_json_form_has_its_published_schema() -> None:
    schema = AuditReport.model_json_schema(mode="serialization")
    Draft202012Validator.check_schema(schema)
    told = json.loads(report.as_json(built([Event(UUID(int=9), NOW, data={"after": "open", "before": "fixed"})])))
    Draft202012Validator(schema).validate(told)
    assert (told["from"], told["to"], told["policy_version"]) == ("2026-03-18", "2026-06-15", 3)


# -- roles -----------------------------------------------------------------------------------------------------------------


def test_viewers_read_members_sync_and_owners_save() -> None:
    allowed = {
        act: {role for role in ("operator", "owner", "member", "viewer", "", "x") if may(role, act)}
        for act in ("read", "sync", "settings")
    }
    assert allowed == {
        "read": {"operator", "owner", "member", "viewer"},
        "sync": {"operator", "owner", "member"},
        "settings": {"operator", "owner"},
    }
