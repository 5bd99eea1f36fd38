"""Deadlines as a pure function of history."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kilo_pipelines.services.security.config import PRESETS, SecurityConfig, policy_of, selects
from kilo_pipelines.services.security.sla import (
    HistoryEvent,
    SlaPolicy,
    advance,
    compliance,
    counted,
    evaluate,
    explain,
    simple_due,
)

START = datetime(2026, 3, 4, 9, 30, tzinfo=UTC)  # a Wednesday
POLICY = policy_of(SecurityConfig())
BUSINESS = policy_of(SecurityConfig(sla_business_days=True))
LATER = START + timedelta(days=4_000)
SEVERITIES = ("critical", "high", "medium", "low")
moments = st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
spans = st.timedeltas(timedelta(0), timedelta(days=300))


def opened(severity: str = "high", at: datetime = START) -> HistoryEvent:
    return HistoryEvent(at, "opened", severity)


def day(number: float) -> datetime:
    return START + timedelta(days=number)


@pytest.mark.parametrize(("severity", "days"), zip(SEVERITIES, PRESETS["default"], strict=True))
def test_a_new_finding_has_the_days_of_its_severity(severity: str, days: int) -> None:
    state = evaluate([opened(severity)], POLICY, 1, START)
    assert (state.status, state.due_at, state.budget_days) == ("open_within", day(days), days)


def test_overdue_begins_with_the_due_moment() -> None:
    assert evaluate([opened()], POLICY, 1, day(30) - timedelta(seconds=1)).status == "open_within"
    assert evaluate([opened()], POLICY, 1, day(30)).status == "open_overdue"


@pytest.mark.parametrize(("closed", "status"), [(30, "met"), (30.01, "missed"), (1, "met")])
def test_a_fix_in_time_meets_the_deadline(closed: float, status: str) -> None:
    assert evaluate([opened(), HistoryEvent(day(closed), "fixed")], POLICY, 1, LATER).status == status


def test_ignored_time_does_not_count() -> None:
    history = [opened(), HistoryEvent(day(10), "ignored"), HistoryEvent(day(50), "reopened")]
    assert evaluate(history[:2], POLICY, 1, day(49)).status == "paused"
    state = evaluate(history, POLICY, 1, day(51))
    assert (state.due_at, state.paused_seconds) == (day(70), 40 * 86_400)


def test_without_pauses_ignoring_closes_and_coming_back_changes_no_deadline() -> None:
    policy = policy_of(SecurityConfig(sla_pause_while_ignored=False))
    history = [opened(), HistoryEvent(day(10), "ignored"), HistoryEvent(day(50), "reopened")]
    assert evaluate(history[:2], policy, 1, day(40)).status == "met"
    state = evaluate(history, policy, 1, day(51))
    assert (state.status, state.due_at) == ("open_overdue", day(30))


def test_coming_back_after_a_fix_begins_anew() -> None:
    history = [opened(), HistoryEvent(day(100), "fixed"), HistoryEvent(day(200), "reopened")]
    state = evaluate(history, POLICY, 1, day(201))
    assert (state.status, state.due_at, state.period) == ("open_within", day(230), 2)


def test_a_fix_while_ignored_is_measured_by_the_time_that_counted() -> None:
    history = [opened(), HistoryEvent(day(10), "ignored"), HistoryEvent(day(500), "fixed")]
    state = evaluate(history, POLICY, 1, LATER)
    assert (state.status, state.due_at) == ("met", day(520))


def test_a_raised_severity_takes_the_earlier_deadline() -> None:
    soon = [opened("low"), HistoryEvent(day(10), "severity", "critical")]
    assert evaluate(soon, POLICY, 1, day(11)).due_at == day(25)
    late = [opened("low"), HistoryEvent(day(80), "severity", "critical")]
    assert evaluate(late, POLICY, 1, day(81)).due_at == day(90)


def test_steps_of_one_moment_are_read_as_they_were_recorded() -> None:
    raised = [HistoryEvent(day(1), "severity", "high"), HistoryEvent(day(1), "severity", "critical")]
    assert evaluate([opened("medium"), *raised], POLICY, 1, day(2)).severity == "critical"
    assert evaluate([opened("medium"), *reversed(raised)], POLICY, 1, day(2)).severity == "high"


def test_a_lowered_severity_has_its_days_from_the_start() -> None:
    history = [opened("critical"), HistoryEvent(day(5), "ignored"), HistoryEvent(day(7), "reopened")]
    assert evaluate([*history, HistoryEvent(day(10), "severity", "low")], POLICY, 1, day(11)).due_at == day(92)


def test_a_severity_that_rises_while_ignored_shortens_what_is_left() -> None:
    history = [opened("low"), HistoryEvent(day(10), "ignored"), HistoryEvent(day(20), "severity", "critical")]
    assert evaluate([*history, HistoryEvent(day(30), "reopened")], POLICY, 1, day(31)).due_at == day(45)


def test_a_severity_that_falls_while_ignored_takes_a_miss_back() -> None:
    history = [opened("critical"), HistoryEvent(day(20), "ignored")]
    assert evaluate(history, POLICY, 1, day(21)).due_at == day(15)
    lower = [*history, HistoryEvent(day(22), "severity", "low"), HistoryEvent(day(30), "reopened")]
    assert (evaluate(lower[:3], POLICY, 1, day(23)).due_at, evaluate(lower, POLICY, 1, day(31)).due_at) == (None, day(100))


@pytest.mark.parametrize("history", [[], [HistoryEvent(START, "opened", "unknown")], [HistoryEvent(START, "fixed")]])
def test_what_was_never_seen_open_has_no_deadline(history: list[HistoryEvent]) -> None:
    state = evaluate(history, POLICY, 1, LATER)
    assert state.status == "untracked" and state.due_at is None and explain(state).startswith("No deadline")


def test_a_repository_may_have_days_of_its_own() -> None:
    policy = SlaPolicy(POLICY.days, overrides={7: {**POLICY.days, "high": 3}})
    assert evaluate([opened()], policy, 7, START).due_at == day(3)
    assert evaluate([opened()], policy, 8, START).due_at == day(30)


def test_the_past_is_judged_by_what_was_known_then() -> None:
    history = [opened(), HistoryEvent(day(20), "fixed"), HistoryEvent(day(40), "reopened")]
    assert [evaluate(history, POLICY, 1, day(number)).status for number in (10, 20, 39, 40, 70)] == [
        "open_within",
        "met",
        "met",
        "open_within",
        "open_overdue",
    ]


def test_every_period_counts_where_it_was_due_and_once() -> None:
    late, back = HistoryEvent(day(35), "fixed"), HistoryEvent(day(50), "reopened")
    for history, figures in (
        ([opened(), HistoryEvent(day(31), "ignored")], (0, 1)),  # ignoring what is late doesn't make it good
        ([opened(), HistoryEvent(day(31), "ignored"), HistoryEvent(day(60), "reopened")], (0, 1)),
        ([opened(), HistoryEvent(day(31), "ignored"), HistoryEvent(day(60), "fixed")], (0, 1)),
        ([opened(), HistoryEvent(day(30), "ignored")], (0, 0)),
        ([opened(), late, back], (0, 2)),  # and it is late again
        ([opened(), HistoryEvent(day(3), "fixed"), back, HistoryEvent(day(51), "fixed")], (2, 0)),
        ([opened(), late, back, HistoryEvent(day(51), "fixed")], (1, 1)),
    ):
        found = compliance([evaluate(history, POLICY, 1, day(85))], day(85))
        assert (found["met"], found["missed"]) == figures, history
    ignored = [opened(), HistoryEvent(day(31), "ignored")]
    assert [compliance([evaluate(ignored, POLICY, 1, day(at))], day(at))["missed"] for at in (119, 120)] == [1, 0]


def test_the_explanation_tells_every_step_and_the_policy() -> None:
    history = [
        HistoryEvent(START, "opened", "low", reconstructed=True),
        HistoryEvent(day(10), "severity", "critical"),
        HistoryEvent(day(12), "ignored"),
        HistoryEvent(day(20), "reopened"),
    ]
    told = explain(evaluate(history, POLICY.at_version(4), 1, day(21)))
    assert told == (
        "Opened 2026-03-04 as low: 90 days until 2026-06-02; low became critical 2026-03-14: due 2026-03-29 (the earlier of the two);"
        " ignored 2026-03-16: the clock stands; back 2026-03-24: due 2026-04-06. It is open and is due 2026-04-06 09:30 UTC."
        " Policy version 4. Its dates before the first sync are the provider's."
    )


def test_the_two_figures() -> None:
    at = day(40)
    states = [
        evaluate([opened()], POLICY, 1, at),  # overdue, was due in the period
        evaluate([opened(at=day(39))], POLICY, 1, at),  # within
        evaluate([opened(), HistoryEvent(day(3), "fixed")], POLICY, 1, at),  # met
        evaluate([opened(), HistoryEvent(day(35), "fixed")], POLICY, 1, at),  # missed
        evaluate([opened(), HistoryEvent(day(3), "ignored")], POLICY, 1, at),  # stands
    ]
    found = compliance(states, at)
    assert found == {
        "open_within": 1,
        "open_overdue": 1,
        "met": 1,
        "missed": 2,
        "open_within_percent": 50.0,
        "met_percent": 33.3,
    }
    assert compliance([], at)["open_within_percent"] is None


# -- properties --------------------------------------------------------------------------------------------------------

policies = st.builds(
    SlaPolicy,
    days=st.fixed_dictionaries({name: st.integers(1, 365) for name in SEVERITIES}),
    business_days=st.booleans(),
    pause_while_ignored=st.booleans(),
)


@st.composite
def histories(draw: st.DrawFn) -> list[HistoryEvent]:
    at = draw(moments)
    found = [HistoryEvent(at, "opened", draw(st.sampled_from(SEVERITIES)))]
    for _ in range(draw(st.integers(0, 8))):
        at += draw(spans)
        kind = draw(st.sampled_from(["severity", "ignored", "reopened", "fixed", "opened"]))
        severity = draw(st.sampled_from(SEVERITIES)) if kind in ("severity", "opened") else None
        found.append(HistoryEvent(at, kind, severity))
    return found


@given(histories(), policies, spans)
def test_later_events_change_no_earlier_answer(history: list[HistoryEvent], policy: SlaPolicy, after: timedelta) -> None:
    at = history[len(history) // 2].at
    assert evaluate(history, policy, 1, at) == evaluate([one for one in history if one.at <= at], policy, 1, at)


@given(histories(), policies, st.randoms())
def test_order_and_repetition_don_t_matter(history: list[HistoryEvent], policy: SlaPolicy, chance: object) -> None:
    assume(len({one.at for one in history}) == len(history))
    twice = [*history, *history]
    chance.shuffle(twice)  # type: ignore[attr-defined]
    assert evaluate(twice, policy, 1, LATER) == evaluate(history, policy, 1, LATER)


@given(moments, st.sampled_from(SEVERITIES), policies)
def test_the_table_s_arithmetic_is_the_function_s(at: datetime, severity: str, policy: SlaPolicy) -> None:
    assert evaluate([opened(severity, at)], policy, 1, at).due_at == simple_due(at, severity, policy, 1)


@given(moments, st.timedeltas(timedelta(0), timedelta(days=90)), spans, spans)
def test_a_pause_moves_the_deadline_by_its_length(at: datetime, before: timedelta, pause: timedelta, rest: timedelta) -> None:
    history = [opened("low", at), HistoryEvent(at + before, "ignored"), HistoryEvent(at + before + pause, "reopened")]
    assume(pause > timedelta(0))
    due = evaluate(history, POLICY, 1, at + before + pause + rest).due_at
    assert due == at + timedelta(days=90) + pause


@given(moments, spans, spans, st.sampled_from(["reopened", "fixed"]))
def test_no_pause_moves_a_deadline_that_has_passed(at: datetime, late: timedelta, pause: timedelta, kind: str) -> None:
    assume(late > timedelta(0))
    ignored = at + timedelta(days=90) + late
    history = [opened("low", at), HistoryEvent(ignored, "ignored"), HistoryEvent(ignored + pause, kind)]
    assert evaluate(history, POLICY, 1, ignored + pause).due_at == at + timedelta(days=90)


@given(moments, st.sampled_from(SEVERITIES), st.sampled_from(SEVERITIES), spans, policies)
def test_raising_never_moves_a_deadline_back(at: datetime, low: str, high: str, span: timedelta, policy: SlaPolicy) -> None:
    assume(SEVERITIES.index(high) < SEVERITIES.index(low))
    before = evaluate([opened(low, at)], policy, 1, at + span).due_at
    after = evaluate([opened(low, at), HistoryEvent(at + span, "severity", high)], policy, 1, at + span).due_at
    assert before is not None and after is not None and after <= before


@given(moments, st.integers(1, 400))
def test_working_days_end_on_working_days(at: datetime, days: int) -> None:
    due = advance(at, timedelta(days=days), True)
    assert due.weekday() < 5 or (due.weekday() == 5 and due.time() == datetime.min.time())
    assert counted(at, due, True) == timedelta(days=days)
    assert due >= at + timedelta(days=days)


@given(moments, spans, policies)
def test_more_days_never_give_an_earlier_deadline(at: datetime, span: timedelta, policy: SlaPolicy) -> None:
    longer = SlaPolicy({name: days + 1 for name, days in policy.days.items()}, policy.business_days)
    history = [opened("medium", at), HistoryEvent(at + span, "severity", "high")]
    shorter_due = evaluate(history, policy, 1, LATER).due_at
    longer_due = evaluate(history, longer, 1, LATER).due_at
    assert shorter_due is not None and longer_due is not None and longer_due >= shorter_due


@given(policies)
def test_a_policy_comes_back_as_it_was_kept(policy: SlaPolicy) -> None:
    assert SlaPolicy.of_stored(3, policy.stored()) == policy.at_version(3)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"sla_preset": "custom"},
        {"sla_days": {"critical": 1, "high": 2, "medium": 3, "low": 4}},
        {"sla_preset": "custom", "sla_days": {"critical": 0, "high": 2, "medium": 3, "low": 4}},
        {"sla_preset": "custom", "sla_days": {"critical": 1, "high": 2, "medium": 3, "low": 366}},
        {"sla_repository_overrides": {"1": {"critical": -5, "high": 2, "medium": 3, "low": 4}}},
        {"no_such_setting": 1},
    ],
)
def test_absurd_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        SecurityConfig.model_validate(bad)


def test_an_empty_selection_selects_nothing() -> None:
    assert selects(SecurityConfig(), 7)
    assert not selects(SecurityConfig(repository_selection_mode="selected"), 7)
    assert selects(SecurityConfig(repository_selection_mode="selected", selected_repository_ids=[7]), 7)


def test_business_days_skip_the_weekend() -> None:
    assert evaluate([opened("critical")], BUSINESS, 1, START).due_at == datetime(2026, 3, 25, 9, 30, tzinfo=UTC)
