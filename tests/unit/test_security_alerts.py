"""Alerts of the source one by one, and what a change of them means."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.services.security.alerts import DESCRIPTION_LIMIT, AlertFacts, BadAlert, parse_alert, snapshot
from kilo_pipelines.services.security.findings import Step, effective_status, supersessions, transitions
from kilo_pipelines.services.security.sla import HistoryEvent
from tests.support.alerts import alert

OWNER, FINDING = uuid4(), uuid4()
SEEN = datetime(2026, 6, 1, tzinfo=UTC)


def facts(**more: Any) -> AlertFacts:
    found = parse_alert(alert(5, **more))
    assert isinstance(found, AlertFacts), found
    return found


@pytest.mark.parametrize("state", ["open", "fixed", "dismissed", "auto_dismissed"])
def test_every_state_of_the_source_is_taken(state: str) -> None:
    assert facts(state=state).upstream_state == state


def test_what_an_alert_may_lack_is_none() -> None:
    found = facts(
        **{
            "security_advisory.cve_id": None,
            "security_vulnerability.first_patched_version": None,
            "security_advisory.cvss": None,
            "security_advisory.cwes": [],
            "dependency.scope": None,
        }
    )
    assert (found.cve_id, found.patched_version, found.cvss_score, found.cwe_ids, found.dependency_scope) == (
        None,
        None,
        None,
        (),
        None,
    )


def test_several_weaknesses_keep_their_order() -> None:
    cwes = [{"cwe_id": "CWE-79", "name": "x"}, {"cwe_id": "CWE-22", "name": "y"}]
    assert facts(**{"security_advisory.cwes": cwes}).cwe_ids == ("CWE-79", "CWE-22")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("number", 0),
        ("number", True),
        ("number", "5"),
        ("number", 2**40),
        ("state", "vanished"),
        ("security_advisory.severity", "moderate"),
        ("security_advisory.severity", None),
        ("security_advisory", []),
        ("dependency.package", None),
        ("dependency.package.name", 7),
        ("created_at", "yesterday"),
        ("created_at", 0),
        ("created_at", "2026-01-01T00:00:00"),
        ("created_at", "0001-01-01T00:00:00+14:00"),
        ("fixed_at", "9999-12-31T23:59:59-14:00"),
        ("updated_at", "9999-12-31T00:00:00Z"),
        ("dependency.manifest_path", "路" * 900),
        ("dependency.package.name", "名" * 200),
        ("security_advisory.cvss", {"score": 11}),
        ("security_advisory.cvss", {"score": float("nan")}),
        ("dismissed_by", "somebody"),
    ],
)
def test_a_bad_field_sets_one_alert_aside_and_names_the_field(path: str, value: object) -> None:
    found = parse_alert(alert(5, **{path: value}))
    assert isinstance(found, BadAlert) and found.reason is Reason.ALERT_MALFORMED
    assert path.split(".")[-1] in found.detail and "yesterday" not in found.detail and "vanished" not in found.detail
    assert found == parse_alert(alert(5, **{path: value})), "the same alert has the same name"
    assert found.source_id.startswith("?") if path == "number" else found.source_id == "5"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text() | st.floats(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_nothing_that_arrives_raises(raw: object) -> None:
    assert isinstance(parse_alert(raw), BadAlert)


@given(st.sampled_from(["title", "description"]), st.text())
def test_any_text_is_taken_and_fits_the_database(field: str, text: str) -> None:
    path = {"title": "security_advisory.summary", "description": "security_advisory.description"}[field]
    found = facts(**{path: text})
    assert "\x00" not in getattr(found, field)
    assert getattr(found, field).encode() is not None
    json.dumps(snapshot(found))


def test_a_description_of_a_megabyte_is_shortened_and_says_so() -> None:
    found = facts(**{"security_advisory.description": "x" * 2**20})
    assert len(found.description) <= DESCRIPTION_LIMIT and found.description.endswith("(shortened)")


def test_invisible_characters_leave_the_texts() -> None:
    assert facts(**{"security_advisory.summary": "a\u202eb\x07c\U000e0041d"}).title == "abcd"


@pytest.mark.parametrize(
    "address", ["javascript:alert(1)", "not an address", 7, None, "https://x y", "https://x/\ud800", "file:///etc/passwd"]
)
def test_an_address_that_is_none_is_dropped(address: object) -> None:
    assert facts(html_url=address).html_url is None


def test_the_audit_snapshot_holds_no_person_and_no_description() -> None:
    found = facts(
        **{"security_advisory.summary": "Reported by jane.doe@example.org", "security_advisory.description": "secret words"}
    )
    kept = json.dumps(snapshot(found))
    assert "jane" not in kept and "[redacted-email]" in kept and "secret words" not in kept


def test_the_fingerprint_moves_with_every_fact() -> None:
    found = facts()
    assert found.fingerprint() == facts().fingerprint()
    for name, value in vars(found).items():
        other = replace(found, **{name: "other" if not isinstance(value, str) else value + "x"})
        assert other.fingerprint() != found.fingerprint(), name


# -- transitions -------------------------------------------------------------------------------------------------------


def stored(found: AlertFacts, disposition: str | None = None, **more: Any) -> Any:
    fields = {
        "id": FINDING,
        "source_id": found.source_id,
        "severity": found.severity,
        "status": effective_status(found.upstream_state, disposition),
        "upstream_state": found.upstream_state,
        "disposition": disposition,
        "canonical_id": None,
        "ghsa_id": found.ghsa_id,
        "package_name": found.package_name,
        "manifest_path": found.manifest_path,
        "fixed_at": found.fixed_at,
    }
    return SimpleNamespace(**fields | more)


def steps(before: Any, after: AlertFacts, *history: Any, seen: datetime = SEEN) -> list[Step]:
    return transitions(before, after, owner_id=OWNER, finding_id=FINDING, first_sync=False, history=history, seen=seen)


def kinds(before: Any, after: AlertFacts) -> list[str | None]:
    return [one.kind for one in steps(before, after)]


FIXED = {"state": "fixed", "fixed_at": "2026-02-01T00:00:00Z", "updated_at": "2026-02-01T00:00:00Z"}
DISMISSED = {"state": "dismissed", "dismissed_at": "2026-02-02T00:00:00Z", "updated_at": "2026-02-02T00:00:00Z"}


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        (None, {}, ["opened"]),
        (None, FIXED, ["opened", "fixed"]),
        (None, DISMISSED, ["opened", "ignored"]),
        ({}, {}, []),
        ({}, FIXED, ["fixed"]),
        ({}, DISMISSED, ["ignored"]),
        (DISMISSED, {"updated_at": "2026-03-01T00:00:00Z"}, ["reopened"]),
        (FIXED, {"updated_at": "2026-03-01T00:00:00Z"}, ["reopened"]),
        (DISMISSED, FIXED, ["fixed"]),
        ({}, {"security_advisory.severity": "critical"}, ["severity"]),
        ({}, FIXED | {"security_advisory.severity": "critical"}, ["severity", "fixed"]),
        ({}, {"security_advisory.description": "Other words."}, []),
    ],
)
def test_what_changed_at_the_source_becomes_history(before: Any, after: dict[str, Any], wanted: list[str]) -> None:
    assert kinds(None if before is None else stored(facts(**before)), facts(**after)) == wanted


def test_a_dismissal_of_ours_that_reached_the_source_is_no_news() -> None:
    assert kinds(stored(facts(), "dismissed"), facts(**DISMISSED)) == []


def test_what_a_person_opened_again_at_the_source_is_open() -> None:
    assert kinds(stored(facts(**DISMISSED), "dismissed"), facts(updated_at="2026-03-01T00:00:00Z")) == ["reopened"]
    assert kinds(stored(facts(), "dismissed"), facts(updated_at="2026-03-01T00:00:00Z")) == [], "the write-back is under way"


def test_the_same_change_twice_has_the_same_keys() -> None:
    before, after = stored(facts()), facts(**FIXED)
    one, two = (steps(before, after) for _ in range(2))
    assert [step.event_key for step in one] == [step.event_key for step in two]
    assert str(OWNER) in one[0].event_key and one[0].at.isoformat() == "2026-02-01T00:00:00+00:00"


def test_a_quiet_severity_counts_from_when_it_was_seen() -> None:
    medium, high = facts(**{"security_advisory.severity": "medium"}), facts(**{"security_advisory.severity": "high"})
    assert medium.updated_at == high.updated_at
    (raised,) = steps(stored(medium), high)
    (later,) = steps(stored(high), medium, raised, seen=SEEN + timedelta(days=1))
    (again,) = steps(stored(medium), high, raised, later, seen=SEEN + timedelta(days=2))
    assert [one.at for one in (raised, later, again)] == [SEEN + timedelta(days=days) for days in range(3)]
    assert len({one.event_key for one in (raised, later, again)}) == 3
    ahead = HistoryEvent(SEEN + timedelta(hours=1), "reopened")
    assert steps(stored(medium), high, ahead)[0].at == ahead.at, "never before what is known"


def test_a_second_fix_that_nobody_saw_begin_is_a_period_of_its_own() -> None:
    anew = FIXED | {"fixed_at": "2026-02-20T00:00:00Z"}
    reopened, fixed = steps(stored(facts(**FIXED)), facts(**anew))
    assert (reopened.kind, fixed.kind) == ("reopened", "fixed") and reopened.at == fixed.at == facts(**anew).fixed_at
    assert kinds(stored(facts(**anew)), facts(**FIXED)) == [], "a date that is put right isn't a second fix"


def test_odd_dates_close_what_they_close() -> None:
    back = HistoryEvent(SEEN, "reopened")
    (fixed,) = steps(stored(facts()), facts(**FIXED), back)
    assert (fixed.kind, fixed.at) == ("fixed", SEEN)
    opened, early = steps(None, facts(**FIXED | {"fixed_at": "2025-01-01T00:00:00Z"}))
    assert early.kind == "fixed" and early.at == opened.at


# -- duplicates --------------------------------------------------------------------------------------------------------


def duplicate(number: int, **more: Any) -> Any:
    return stored(facts(), id=UUID(int=number), source_id=str(number), **more)


def test_the_newest_open_alert_speaks_for_its_duplicates() -> None:
    old, back = supersessions(
        [duplicate(9), duplicate(10), duplicate(3), duplicate(4, ghsa_id=None), duplicate(5, manifest_path="b")]
    )
    assert old == {UUID(int=9): UUID(int=10), UUID(int=3): UUID(int=10)} and back == set()


def test_nothing_moves_twice() -> None:
    settled = [duplicate(3, disposition="superseded", canonical_id=UUID(int=10), status="ignored"), duplicate(10)]
    assert supersessions(settled) == ({}, set())


@pytest.mark.parametrize("gone", [{"upstream_state": "fixed"}, {"upstream_state": "dismissed"}, {"disposition": "dismissed"}])
def test_when_the_canonical_one_is_done_the_next_one_is_open_again(gone: dict[str, Any]) -> None:
    held = {"disposition": "superseded", "canonical_id": UUID(int=10), "status": "ignored"}
    old, back = supersessions([duplicate(3, **held), duplicate(7, **held), duplicate(10, **gone)])
    assert back == {UUID(int=7)} and old == {UUID(int=3): UUID(int=7)}
