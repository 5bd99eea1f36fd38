"""\"Not exploitable\" is believed only as far as the platform finds the same."""

from __future__ import annotations

from typing import Any

import pytest

from kilo_pipelines.services.security.analysis import DeepAnalysis
from kilo_pipelines.services.security.uses import believed


def said(**more: Any) -> DeepAnalysis:
    told = {"exploitable": False, "reasoning": "r", "search": ["require('x'"], "action": "dismiss", "summary": "s"}
    return DeepAnalysis.model_validate(told | more)


@pytest.mark.parametrize(
    ("found", "holds"),
    [
        ([], True),
        (["package.json", "web/package-lock.json", "README.md", "docs/guide.rst"], True),
        (["src/a.js"], False),
        (["README.md", "src/a.js"], False),
        (None, False),
    ],
)
def test_uses_that_it_doesnt_name_contradict_it(found: list[str] | None, holds: bool) -> None:
    for evidence in ({"found": found}, {"found": found, "turns": 3}):
        told = believed(said(), evidence)
        assert (told.exploitable, told.action) == ((False, "dismiss") if holds else ("unknown", "manual_review"))
    assert believed(said(), None).exploitable == "unknown", "without evidence nothing is believed"


@pytest.mark.parametrize("path", ["src/a.js", "./src/a.js", "/work/repo/src/a.js"])
def test_a_use_that_it_names_was_judged(path: str) -> None:
    told = said(locations=[{"path": path, "line": 3}])
    assert believed(told, {"found": ["src/a.js"]}) == told
    assert believed(told, {"found": ["src/a.js", "src/b.js"]}).exploitable == "unknown"


def test_what_it_says_against_closing_is_believed_in_any_case() -> None:
    for told in (said(exploitable=True, action="open_pr"), said(exploitable="unknown", action="manual_review")):
        assert believed(told, None) == told
