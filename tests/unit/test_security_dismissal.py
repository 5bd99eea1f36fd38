"""What may be dismissed, by whom and on which grounds; the comment that fits; what a dismissal rests on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilo_pipelines.acts.known_exploited import MAX_BYTES, known_exploited
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
        ({}, LETS_GO, NOT_USED | {"search": []}, ON, Reason.ANALYSIS_SPEAKS_AGAINST),
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


@pytest.mark.parametrize(
    "text",
    ["@ada look at this", "fixes #7", "closes acme/other#1", "<img src=x>", "![x](http://evil.test/x)", "/merge", "&#64;ada"],
)
def test_a_comment_mentions_closes_and_renders_nothing(text: str) -> None:
    comment = rules.comment_of(text)
    assert not re.search(r"@ada|fixes #7|closes acme/|<img|!\[|&#64;|^/merge", comment)


@pytest.mark.parametrize(
    ("by", "change", "catalogue", "answer"),
    [
        ("auto-triage", {}, KNOWN, None),
        ("auto-triage", {}, None, None),
        ("auto-triage", {"severity": "critical"}, KNOWN, Reason.NEVER_DISMISSED),
        ("auto-sandbox", {"severity": "critical"}, None, Reason.NEVER_DISMISSED),
        ("auto-triage-bulk", {}, frozenset({"CVE-2026-1"}), Reason.NEVER_DISMISSED),
        ("auto-sandbox", {"patched_version": None}, KNOWN, Reason.STALE_ANALYSIS),
        ("auto-triage-bulk", {"severity": "low"}, KNOWN, Reason.STALE_ANALYSIS),
        ("manual", {"severity": "critical", "patched_version": None}, frozenset({"CVE-2026-1"}), None),
    ],
)
def test_what_the_rules_let_go_is_let_go_only_as_long_as_they_would(
    by: str, change: dict[str, Any], catalogue: frozenset[str] | None, answer: Reason | None
) -> None:
    evidence = {"snapshot": snapshot_of(finding())} if by != "manual" else {}
    dismissed = finding(disposition_by=by, disposition_evidence=evidence, **change)
    assert rules.outlived(dismissed, catalogue) is answer


def test_what_was_dismissed_of_facts_that_nobody_kept_isnt_taken_for_the_same() -> None:
    assert rules.outlived(finding(disposition_by="auto-triage", disposition_evidence={}), KNOWN) is Reason.STALE_ANALYSIS


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
        ("packages/a/package.json", "pnpm-lock.yaml"),
        ("packages/a/package.json", "packages/pnpm-workspace.yaml"),
        ("app/build.gradle.kts", "app/gradle.lockfile"),
        ("src/Web/Web.csproj", "Directory.Packages.props"),
        ("src/Web/Web.csproj", "src/Web/packages.lock.json"),
        ("pubspec.yaml", "pubspec.lock"),
        ("apps/x/mix.exs", "mix.lock"),
        ("module/pom.xml", "pom.xml"),
        ("package.json", "bun.lockb"),
        ("pyproject.toml", "pdm.lock"),
    ],
)
def test_manifest_and_lock_files_beside_it_are_looked_at(manifest: str, wanted: str) -> None:
    found = rules.paths_of(manifest)
    assert wanted in found and manifest in found and len(found) == len(set(found))


@pytest.mark.parametrize("manifest", ["../../etc/passwd", "/etc/passwd", "..", "/", "a//../b/package.json", "./x"])
def test_a_path_that_leads_out_of_the_tree_names_something_in_it(manifest: str) -> None:
    assert all(one and not one.startswith("/") and ".." not in one.split("/") for one in rules.paths_of(manifest))


def test_a_path_of_many_directories_fits_a_command_line() -> None:
    found = rules.paths_of("a/" * 499 + "package.json")
    assert "a/" * 499 + "package-lock.json" in found and "package-lock.json" in found
    assert sum(map(len, found)) < 1_000_000


def catalogue(*ids: object) -> str:
    return json.dumps({"vulnerabilities": [{"cveID": one} for one in ids]})


@pytest.mark.parametrize(
    ("content", "known"),
    [
        (catalogue("CVE-2026-1", "cve-2026-2"), {"CVE-2026-1", "CVE-2026-2"}),
        (None, None),
        ("", None),
        ("{", None),
        ("[" * 100_000, None),
        ("\xff", None),
        (json.dumps({"vulnerabilities": []}), None),
        (json.dumps({"vulnerabilities": [{"id": "CVE-2026-1"}]}), None),
        (json.dumps({"others": []}), None),
        (json.dumps([]), None),
        (catalogue("CVE-2026-1", 7), None),
        (catalogue("CVE-2026-1") + " " * MAX_BYTES, None),
    ],
)
def test_a_catalogue_is_whole_or_there_is_none(
    content: str | None, known: set[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "known.json"
    monkeypatch.setenv("KILO_HOME", str(tmp_path))
    monkeypatch.setenv("KILO_KNOWN_EXPLOITED_FILE", str(file))
    if content is not None:
        file.write_text(content, encoding="latin-1")
    assert known_exploited() == known


def test_a_new_catalogue_is_read_at_once_and_none_is_named_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILO_HOME", str(tmp_path))
    assert known_exploited() is None
    file = tmp_path / "known.json"
    monkeypatch.setenv("KILO_KNOWN_EXPLOITED_FILE", str(file))
    for ids in (["CVE-2026-1"], ["CVE-2026-1", "CVE-2026-2"]):
        file.write_text(catalogue(*ids))
        assert known_exploited() == set(ids)
