"""What a change may hold, what a commit may say, which sessions may write: rules without any git."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kilo_pipelines.cloud_agent.protocol import SessionSpec
from kilo_pipelines.core.changes import MAX_BYTES, MAX_FILES, Change, commit_text, refusal_of
from kilo_pipelines.core.protected import is_protected
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.settings import Settings

MODES = ("000000", "100644", "100755", "100664", "120000", "160000", "104755", "040000")
NAMES = st.sampled_from(["a.py", "src", ".git", ".GIT", "git~1", ".git ", "..", "", "x\\y", "a\u202eb", "a\nb", "a\udcff", "é"])
SHA = "a" * 40


def reason(*changes: Change, allowed: tuple[str, ...] = ()) -> Reason | None:
    found = refusal_of(changes, allowed)
    return None if found is None else found.reason


@given(st.lists(NAMES, min_size=1, max_size=3), st.sampled_from(MODES), st.sampled_from(MODES))
def test_only_plain_files_with_plain_names_pass(names: list[str], old: str, new: str) -> None:
    path = "/".join(names)
    passed = reason(Change(path, old, new, 1)) is None
    plain = set(names) <= {"a.py", "src", "é"}
    removed = new == "000000" and old != "160000"
    assert passed == (removed or (plain and new in ("100644", "100755") and old != "160000"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (Change("a", "000000", "160000"), Reason.CHANGE_GITLINK),
        (Change("a", "160000", "000000"), Reason.CHANGE_GITLINK),
        (Change("a", "100644", "120000"), Reason.CHANGE_SYMLINK),
        (Change("a", "120000", "000000"), None),
        (Change("a", "100644", "104755"), Reason.CHANGE_MODE),
        (Change("a/.git/config", "000000", "100644"), Reason.CHANGE_NESTED_REPOSITORY),
        (Change("a/.git::$INDEX_ALLOCATION/config", "000000", "100644"), Reason.CHANGE_NESTED_REPOSITORY),
        (Change("a/GIT~2 ", "000000", "100644"), Reason.CHANGE_NESTED_REPOSITORY),
        (Change("a/.g\u200cit/config", "000000", "100644"), Reason.CHANGE_PATH),
        (Change("a/.gitignore", "000000", "100644"), None),
        (Change(".github/workflows/ci.yml", "100644", "000000"), Reason.CHANGE_PROTECTED),
        (Change(".GitHub/Workflows/ci.yml", "000000", "100644"), Reason.CHANGE_PROTECTED),
        (Change("package-lock.json", "100644", "100644", MAX_BYTES), None),
        (Change("package-lock.json", "100644", "100644", MAX_BYTES + 1), Reason.CHANGE_TOO_LARGE),
    ],
)
def test_each_kind_of_change_has_its_outcome(change: Change, expected: Reason | None) -> None:
    assert reason(change) is expected


def test_a_change_is_neither_empty_nor_more_than_anybody_reads() -> None:
    files = [Change(f"f{number}", "000000", "100644", 1) for number in range(MAX_FILES + 1)]
    assert (reason(), reason(*files[:-1]), reason(*files)) == (Reason.NO_CHANGES, None, Reason.CHANGE_TOO_LARGE)


def test_an_owner_lets_through_what_it_names_and_nothing_beside() -> None:
    allowed = (".github/workflows/*",)
    assert reason(Change(".github/workflows/x.yml", "000000", "100644"), allowed=allowed) is None
    assert reason(Change(".github/CODEOWNERS", "000000", "100644"), allowed=allowed) is Reason.CHANGE_PROTECTED


@pytest.mark.parametrize(
    "path",
    [".npmrc", "sub/.npmrc", ".yarnrc.yml", ".githooks/pre-push", ".husky/x", "sub/AGENTS.md", ".gitattributes", "lefthook.yml"],
)
def test_what_runs_or_is_obeyed_without_being_asked_is_protected(path: str) -> None:
    assert is_protected(path)


@pytest.mark.parametrize("path", ["package.json", "package-lock.json", "poetry.lock", "requirements.txt", "src/github/x.py"])
def test_what_an_update_of_a_package_changes_is_not(path: str) -> None:
    assert not is_protected(path)


@given(st.text(max_size=300))
def test_a_commits_message_is_never_a_switch_a_mention_or_endless(words: str) -> None:
    for switch in ("[skip ci]", "[ci skip]", "[no ci]", "[skip actions]", "[actions skip]", "skip-checks: true", "@team"):
        told = commit_text(f"{words} {switch}\n\n{words}\n{switch}")
        assert switch not in told and len(told.splitlines()[0]) <= 73 and "\x00" not in told
    assert len(commit_text(words * 100)) <= 4_001


def spec(**changes: Any) -> SessionSpec:
    values: dict[str, Any] = {
        "session_id": UUID(int=1),
        "owner_id": UUID(int=2),
        "service": "remediation",
        "repository": {"provider": "github", "external_id": 1, "full_name": "a/b", "clone_url": "u", "default_branch": "main"},
        "pull_number": None,
        "base_ref": "main",
        "base_sha": SHA,
        "head_sha": SHA,
        "checkout_ref": "refs/heads/main",
        "agent": "scripted",
        "model": "m",
        "writes": True,
        "branch": "kilo/item/1",
    }
    return SessionSpec.model_validate(values | changes)


READS: dict[str, Any] = {"writes": False, "branch": None}


@pytest.mark.parametrize(
    "changes",
    [
        {"service": "code_review"},
        {"service": "security_analysis"},
        {"service": "code_review", **READS},
        {"branch": None},
        {"pull_number": 7},
        {"base_sha": "b" * 40},
        {**READS, "branch": "kilo/item/1"},
        {**READS, "registries": ["npm"]},
        {**READS, "allow_protected": ["*"]},
        *(
            {"branch": name}
            for name in ("main", "kilo/1", "kilo/item/0", "kilo/../1", "kilo/a..b/1", "kilo/-x/1", "Kilo/x/1", "kilo/x/1\n")
        ),
        *(
            {"branch": name}
            for name in (
                "refs/heads/../1",
                "kilo/x.lock/1",
                "/kilo/x/1",
                "kilo//x/1",
                "kilo/x/01",
                "kilo/x y/1",
                "kilo/" + "x" * 150 + "/1",
            )
        ),
    ],
)
def test_which_sessions_may_write_and_where_is_no_matter_of_the_caller(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        spec(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"branch": "kilo/0b2c3d4e-0000-4000-8000-000000000001/12"},
        {"service": "security_analysis", **READS},
        {"service": "code_review", "pull_number": 7, **READS},
    ],
)
def test_sessions_of_each_service_in_their_form(changes: dict[str, Any]) -> None:
    assert SessionSpec.model_validate(spec(**changes).model_dump(mode="json")) == spec(**changes)


def test_registries_come_from_the_homes_file_with_a_closed_base(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KILO_REGISTRIES", raising=False)
    (tmp_path / "config.env").write_text(
        'KILO_REGISTRIES={"npm": "http://localhost:8090/npm", "pypi": "https://python.example/simple/"}\n'
    )
    assert Settings(home=tmp_path).registries == {"npm": "http://localhost:8090/npm/", "pypi": "https://python.example/simple/"}
    assert Settings(home=tmp_path / "other").registries == {}


@pytest.mark.parametrize(
    "base",
    [
        "http://registry.example/",
        "https://u:p@registry.example/",
        "https://registry.example/?x=1",
        "file:///etc/",
        "https:///x",
        "https://r.example/#x",
    ],
)
def test_a_registry_is_reached_by_https_without_credentials(base: str, tmp_path: Any) -> None:
    with pytest.raises(ValidationError):
        Settings(home=tmp_path, registries={"npm": base})
