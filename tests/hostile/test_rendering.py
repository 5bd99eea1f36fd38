"""What we post is text: nothing that a model or a stranger wrote acts on GitHub or on a bot that reads along (threats, rule 13)."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kilo_pipelines.core import text
from kilo_pipelines.core.evidence import Evidence, LedgerEntry
from kilo_pipelines.core.markers import Marker
from kilo_pipelines.providers import github_effects
from kilo_pipelines.services.code_review import render
from kilo_pipelines.services.code_review.outcome import Finding, ReviewResult
from tests.hostile.corpus.markdown import TEXTS, dangers
from tests.support.figures import Figures

MARK = Marker(b"k" * 32).make("summary", "subject")
BODY_LIMIT = 65_536

# Files whose change decides who may do what, or what runs without being asked.
PROTECTED = [
    ".github/workflows/ci.yml",
    ".github/CODEOWNERS",
    ".gitlab-ci.yml",
    ".circleci/config.yml",
    "CODEOWNERS",
    "docs/CODEOWNERS",
    "REVIEW.md",
    "AGENTS.md",
    "sub/AGENTS.md",
    "CLAUDE.md",
    "sub/CLAUDE.md",
    ".claude/settings.json",
    ".cursor/rules/x.mdc",
    ".kilocode/mcp.json",
    "sub/.kilocode/rules/x.md",
    "kilo.json",
    "opencode.json",
    ".opencode/plugin/x.js",
    ".mcp.json",
    ".vscode/tasks.json",
    ".devcontainer/devcontainer.json",
    ".gitattributes",
    "sub/.gitattributes",
    ".gitmodules",
    ".pre-commit-config.yaml",
    ".husky/pre-commit",
    ".envrc",
    ".npmrc",
    "package-lock.json",
    "poetry.lock",
    "Jenkinsfile",
]


def posted(content: str) -> dict[str, str]:
    """Everything that is posted with this content wherever a model or a stranger may put it, without our own marker."""
    content = content.replace("\x00", "")  # the schema refuses it
    finding = Finding(path=content[:1024] or "x", line=1, severity="critical", title=content[:200] or "x", body=content[:4_000])
    result = ReviewResult(nonce="n" * 32, summary=content[:8_000] or "x", findings=[finding])
    entry = LedgerEntry(
        entry_id="1",
        path=content[:300],
        status="added",
        old_blob="0",
        new_blob="1",
        old_mode="0",
        new_mode="1",
        binary=True,
        bytes=1,
        excluded="path_excluded",
    )
    evidence = Evidence(
        evidence_class="observed",
        repository_id=1,
        pull_number=1,
        base_ref="main",
        merge_base="a",
        head="b",
        diff_hash="c",
        ledger=[entry, entry.model_copy(update={"excluded": None})],
        agent=content[:50],
        model=content[:80],
    )
    inline = render.inline_comment(finding, MARK)
    summary = render.summary_comment(result.summary, [finding], [finding], 1, "c" * 40, render.evidence_lines(evidence), MARK)
    refused = github_effects.InlineComment(path=content[:300], line=1, side="RIGHT", body=render.inline_comment(finding, ""))
    whole = {"inline": inline, "summary": summary, "refused": github_effects._with_refused("body", [refused])}
    assert inline.endswith(MARK) and summary.endswith(MARK)
    return {name: one.removesuffix(MARK) for name, one in whole.items()}


@pytest.mark.parametrize("name", TEXTS)
def test_no_text_does_anything_where_it_is_posted(name: str, figures: Figures) -> None:
    began = time.perf_counter()
    found = {place: dangers(one) for place, one in posted(TEXTS[name]).items()}
    assert time.perf_counter() - began < 5
    figures(tried=len(found), accepted=sum(1 for one in found.values() if one))
    assert not any(found.values()), found
    assert not dangers(text.harmless(TEXTS[name])) and not dangers(text.one_line(TEXTS[name], 10_000))


def test_no_generated_text_does_anything(full: bool, figures: Figures) -> None:
    """Pieces of the corpus in any mixture, cut anywhere: what one step makes harmless, the next doesn't bring back."""
    pieces = sorted({part for one in TEXTS.values() for part in (one[:40], one[:3], one[-9:])}) + list(
        "<!>@/#&;`~[]()\n\r \t\u2028\u200b"
    )
    count = 0

    @settings(max_examples=5_000 if full else 300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(st.sampled_from(pieces) | st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=12).map(
            "".join
        )
    )
    def check(content: str) -> None:
        nonlocal count
        count += 1
        assert not dangers(text.harmless(content)), content
        assert text.harmless(text.harmless(content)) == text.harmless(content)

    check()
    figures(tried=count, accepted=0)


@pytest.mark.parametrize("name", ["long", "many lines", "many brackets"])
def test_what_is_posted_fits_and_keeps_its_marker(name: str) -> None:
    for one in posted(TEXTS[name]).values():
        assert len(one) + len(MARK) < BODY_LIMIT
    summary = render.summary_comment(TEXTS[name], [], [], 0, "c" * 40, ["x" * 100] * 2_000, MARK)
    assert len(summary) < BODY_LIMIT and summary.endswith(MARK)


@pytest.mark.parametrize("path", PROTECTED)
def test_no_suggestion_is_offered_where_a_commit_changes_who_may_do_what(path: str) -> None:
    fields: dict[str, Any] = {"path": path, "line": 1, "severity": "warning", "title": "t", "suggestion": "evil"}
    for body in ("b", TEXTS["suggestion"], TEXTS["suggestion in a list"]):
        assert "suggestion" not in dangers(render.inline_comment(Finding(body=body, **fields), ""))
    assert "suggestion" in dangers(render.inline_comment(Finding(body="b", **{**fields, "path": "src/a.py"}), "")), "the control"


@pytest.mark.parametrize(
    "code", ["```\nout of the fence @octocat", "`" * 60, "~~~\n/merge", "x\n```suggestion\ny", "a\u202eb\u200b"]
)
def test_a_suggestion_stays_within_its_own_fence(code: str) -> None:
    comment = render.inline_comment(Finding(path="a.py", line=1, severity="warning", title="t", body="b", suggestion=code), "")
    fences = [line for line in comment.split("\n") if line.startswith("`" * 3) and set(line.removesuffix("suggestion")) == {"`"}]
    mark = fences[0].removesuffix("suggestion")
    assert comment.rstrip().endswith(mark) and "suggestion" in fences[0]
    assert not any(set(line) == {"`"} and len(line) >= len(mark) for line in text.clean(code).split("\n"))
    assert "invisible" not in dangers(comment)


def test_code_with_a_marker_in_it_is_not_offered() -> None:
    """A suggestion stands as it is, so one with a copied marker would be a second place that holds it."""
    fields: dict[str, Any] = {"path": "a.py", "line": 1, "severity": "warning", "title": "t", "body": "b"}
    assert MARK not in render.inline_comment(Finding(suggestion=f"x = 1  # {MARK}", **fields), "")


def test_a_marker_is_of_one_key_scope_and_subject() -> None:
    """Nobody makes one without the key, and one of another place doesn't stand for it."""
    ours, theirs = Marker(b"k" * 32), Marker(b"l" * 32)
    made = {
        ours.make("summary", "a"),
        theirs.make("summary", "a"),
        ours.make("review", "a"),
        ours.make("summary", "b"),
        ours.make("summary", "a", ""),
    }
    assert len(made) == 5 and ours.make("summary", "a") == ours.make("summary", "a")
    assert not any(one in body for one in made for body in posted(ours.make("summary", "a")).values()), (
        "a copied marker is broken"
    )
