"""What may be dismissed, by whom and on which grounds; the comment that fits; what a dismissal rests on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.services.security import dismissal as rules
from kilo_pipelines.services.security.analysis import snapshot_of
from kilo_pipelines.services.security.config import SecurityConfig
from kilo_pipelines.services.security.dismissal import Grounds
from tests.unit.test_security_analysis import finding as facts

ON = SecurityConfig(auto_dismiss_enabled=True)
KNOWN = frozenset({"CVE-2026-666"})
LETS_GO = {"needs_deep": False, "reasoning": "Only a tool.", "action": "dismiss", "confidence": "high", "fallback": False}
NOT_USED = {
    "exploitable": False,
    "reasoning": "r",
    "locations": [],
    "search": ["require('demo')"],
    "suggested_fix": "",
    "action": "dismiss",
    "summary": "Nobody imports it.",
}


def finding(**more: Any) -> SimpleNamespace:
    return facts(status="open", **more)


def analysis(of: SimpleNamespace, triage: dict[str, Any] | None = None, deep: dict[str, Any] | None = None) -> SimpleNamespace:
    return SimpleNamespace(snapshot=snapshot_of(of), triage=triage if triage is not None else LETS_GO, deep=deep)


@pytest.mark.parametrize(
    ("change", "triage", "deep", "config", "answer"),
    [
        ({}, LETS_GO, None, ON, "auto-triage"),
        ({}, LETS_GO, NOT_USED, ON, "auto-sandbox"),
        ({}, LETS_GO, None, SecurityConfig(), Reason.AUTO_DISMISS_DISABLED),
        ({"severity": "critical"}, LETS_GO, NOT_USED, ON, Reason.NEVER_DISMISSED),
        ({"cve_id": "CVE-2026-666"}, LETS_GO, NOT_USED, ON, Reason.NEVER_DISMISSED),
        ({"cve_id": "cve-2026-666"}, LETS_GO, NOT_USED, ON, Reason.NEVER_DISMISSED),
        ({"cve_id": None}, LETS_GO, NOT_USED, ON, "auto-sandbox"),
        ({"status": "fixed"}, LETS_GO, NOT_USED, ON, Reason.FINDING_NOT_OPEN),
        ({"source_id": "42junk"}, LETS_GO, NOT_USED, ON, Reason.INVALID_DISMISS_TARGET),
        ({"source_id": "\u0664\u0662"}, LETS_GO, NOT_USED, ON, Reason.INVALID_DISMISS_TARGET),
        ({}, LETS_GO, NOT_USED | {"exploitable": True, "action": "open_pr"}, ON, Reason.ANALYSIS_SPEAKS_AGAINST),
        ({}, LETS_GO, NOT_USED | {"exploitable": "unknown", "action": "manual_review"}, ON, Reason.ANALYSIS_SPEAKS_AGAINST),
        ({}, LETS_GO, NOT_USED | {"action": "monitor"}, ON, Reason.ANALYSIS_SPEAKS_AGAINST),
        ({}, LETS_GO | {"confidence": "low"}, None, ON, Reason.CONFIDENCE_TOO_LOW),
        ({}, LETS_GO | {"confidence": "medium"}, None, ON, Reason.CONFIDENCE_TOO_LOW),
        (
            {},
            LETS_GO | {"confidence": "medium"},
            None,
            ON.model_copy(update={"auto_dismiss_confidence": "medium"}),
            "auto-triage",
        ),
        ({}, LETS_GO | {"confidence": "low"}, None, ON.model_copy(update={"auto_dismiss_confidence": "low"}), "auto-triage"),
        ({}, LETS_GO | {"needs_deep": True, "action": "analyze_codebase"}, None, ON, Reason.ANALYSIS_SPEAKS_AGAINST),
        ({}, LETS_GO | {"action": "manual_review"}, None, ON, Reason.ANALYSIS_SPEAKS_AGAINST),
    ],
)
def test_what_is_dismissed_without_a_person(
    change: dict[str, Any], triage: dict[str, Any], deep: dict[str, Any] | None, config: SecurityConfig, answer: str | Reason
) -> None:
    one = finding(**change) if "status" not in change else facts(**change)
    found = rules.automatic(config, one, analysis(one, triage, deep), KNOWN)
    assert (found.by if isinstance(found, Grounds) else found) == answer


def test_without_a_catalogue_or_an_analysis_of_these_facts_nothing_is() -> None:
    one = finding()
    assert rules.automatic(ON, one, analysis(one, deep=NOT_USED), None) is Reason.CATALOGUE_MISSING
    assert rules.automatic(ON, one, None, KNOWN) is Reason.ANALYSIS_REQUIRED
    assert rules.automatic(ON, finding(patched_version="9"), analysis(one, deep=NOT_USED), KNOWN) is Reason.STALE_ANALYSIS


def test_bulk_leaves_alone_whatever_a_repository_was_read_for() -> None:
    one = finding()
    assert rules.bulk(SecurityConfig(), one, analysis(one), KNOWN) == Grounds("auto-triage-bulk", "Only a tool.")
    assert rules.bulk(SecurityConfig(), one, analysis(one, deep=NOT_USED), KNOWN) is Reason.ANALYSIS_SPEAKS_AGAINST


@given(st.sampled_from(["critical"]), st.booleans(), st.sampled_from(["auto", "bulk"]))
def test_critical_ones_are_a_persons_whatever_else_is_said(severity: str, deep: bool, how: str) -> None:
    one = finding(severity=severity)
    rule = rules.automatic if how == "auto" else rules.bulk
    assert rule(ON, one, analysis(one, deep=NOT_USED if deep else None), KNOWN) is Reason.NEVER_DISMISSED


@pytest.mark.parametrize(
    ("role", "answer"), [("owner", None), ("operator", None), ("member", Reason.ROLE_NOT_ALLOWED), ("", Reason.ROLE_NOT_ALLOWED)]
)
def test_owners_dismiss(role: str, answer: Reason | None) -> None:
    assert rules.by_person(role, finding(severity="critical")) is answer


@given(st.text(max_size=600))
def test_a_comment_fits_is_one_line_and_says_whose_it_is(text: str) -> None:
    comment = rules.comment_of(text)
    assert rules.units(comment) <= 280 and "\n" not in comment and comment.startswith("[kilo-pipelines]")
    comment.encode("utf-8", "surrogatepass")


def test_a_comment_is_cut_at_its_last_whole_letter() -> None:
    comment = rules.comment_of("\U0001f600" * 200)
    assert rules.units(comment) in (279, 280) and comment.endswith("\U0001f600…")


def test_what_a_dismissal_rests_on_changes_with_its_files_and_uses_and_not_with_their_places() -> None:
    before = rules.binding("a" * 40, {"package.json": "1"}, [("a.js", "require('demo')"), ("b.js", "x")], ["require('demo')"])
    same = rules.binding("b" * 40, {"package.json": "1"}, [("b.js", "x"), ("a.js", "require('demo')")], ["require('demo')"])
    assert rules.still_holds(before, same)
    for files, hits in (
        ({"package.json": "2"}, [("a.js", "require('demo')"), ("b.js", "x")]),
        ({"package.json": "1", "package-lock.json": "3"}, [("a.js", "require('demo')"), ("b.js", "x")]),
        ({}, [("a.js", "require('demo')"), ("b.js", "x")]),
        ({"package.json": "1"}, [("a.js", "require('demo')")]),
        ({"package.json": "1"}, [("c.js", "require('demo')"), ("b.js", "x")]),
    ):
        assert not rules.still_holds(before, rules.binding("b" * 40, files, hits, ["require('demo')"]))


@pytest.mark.parametrize(
    ("manifest", "wanted"),
    [
        ("package-lock.json", "package.json"),
        ("services/api/package.json", "services/api/package-lock.json"),
        ("a/odd.txt", "a/odd.txt"),
    ],
)
def test_manifest_and_lock_files_beside_it_are_looked_at(manifest: str, wanted: str) -> None:
    found = rules.paths_of(manifest)
    assert wanted in found and manifest in found and len(found) == len(set(found))
