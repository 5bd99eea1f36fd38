"""Hostile repositories on their whole way: fetched by the courier, read for the brief, packed, checked out, reviewed.

0 executions outside the sandbox (a canary file), 0 files outside, and no green without every changed blob in the ledger.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from kilo_pipelines.cloud_agent import git as ours
from kilo_pipelines.cloud_agent.adapters.scripted import ScriptedAdapter
from kilo_pipelines.cloud_agent.protocol import SessionOutcome, SessionSpec
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.session import WorkspaceFacts
from kilo_pipelines.core.verdict import Conclusion
from tests.hostile.corpus.repositories import CASES, Case, Objects, tree_of
from tests.support.figures import Figures
from tests.support.git import git
from tests.support.sessions import SessionWorld

# Reading a hostile repository may take this long, whatever it is made of (a busy machine included).
SECONDS_PER_CASE = 60.0
BARE = {"HEAD", "config", "description", "hooks", "info", "objects", "refs", "branches", "packed-refs", "shallow"}


class Range:
    """The twin's server with the hostile commits in it, a trap beside it, and what is looked at afterwards."""

    def __init__(self, world: SessionWorld, trap: Path) -> None:
        self.world, self.trap = world, trap
        (trap / "victim").write_text("untouched\n")
        pull = world.control("open-pull", kind="clean")
        self.repository_id = pull["repository_id"]
        self.server = world.twin_home / "git" / f"{pull['repository']}.git"
        self.base = git(self.server, "rev-parse", "refs/heads/main")
        self.url = world.spec(pull).repository.clone_url
        self.token = world.app.token(
            world.credentials["installation_id"], [self.repository_id], {"metadata": "read", "contents": "read"}
        )
        self.objects = Objects(self.server)
        self._number = 90_000
        self.heads: dict[str, str] = {}

    def head_of(self, case: Case) -> str:
        """The case's commit on the server."""
        if case.name not in self.heads:
            self.heads[case.name] = case.build(self.objects, self.base, self.trap)
        return self.heads[case.name]

    def serve(self, head: str) -> str:
        """The commit under a pull request's ref."""
        self._number += 1
        ref = f"refs/pull/{self._number}/head"
        self.point(self._number, head)
        return ref

    def point(self, number: int, head: str) -> None:
        """Points a pull request's ref at a commit, past every check of git."""
        path = self.server / f"refs/pull/{number}/head"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(head + "\n")

    def bare(self) -> Path:
        """A fresh place for the platform's own copy."""
        return ours.bare_path(self.world.home / "hostile", uuid4(), self.repository_id)

    def fetch(self, case: Case, bare: Path, *, as_process: bool = False) -> dict[str, str]:
        """The courier's work; in a process of its own as in production, or in this one."""
        refs = {"refs/kilo/head": self.serve(self.head_of(case)), "refs/kilo/base": "refs/heads/main"}
        if not as_process:
            return ours.fetch(bare, self.url, self.token, refs)
        request = {"bare": str(bare), "clone_url": self.url, "token": self.token, "refs": refs}
        done = subprocess.run(
            [sys.executable, "-m", "kilo_pipelines.cloud_agent.courier"], input=json.dumps(request).encode(), capture_output=True
        )
        answer: dict[str, Any] = json.loads(done.stdout)
        assert self.token not in done.stdout.decode() + done.stderr.decode()
        if "refs" not in answer:
            raise ours.GitError(Reason(answer["reason"]), answer["detail"])
        return dict(answer["refs"])

    def read(self, case: Case, *, as_process: bool = False) -> WorkspaceFacts | Reason:
        """What our own reading makes of it, a pack for the checkout included; or why it refuses it."""
        bare = self.bare()
        try:
            commits = self.fetch(case, bare, as_process=as_process)
            facts = ours.read_facts(
                bare, base=commits["refs/kilo/base"], head=commits["refs/kilo/head"], policy_commit=commits["refs/kilo/base"]
            )
            ours.export_pack(bare, [facts.head_sha, facts.merge_base], bare.parent / "objects.pack")
        except ours.GitError as refusal:
            return refusal.reason
        finally:
            self.look(bare)
        return facts

    def look(self, bare: Path | None = None) -> None:
        """Nothing ran, nothing lies outside, our own configuration is as we wrote it."""
        assert sorted(one.name for one in self.trap.iterdir()) == ["victim"], "something was executed or written outside"
        assert (self.trap / "victim").read_text() == "untouched\n"
        for place in (Path("/pwned"), Path("/ran"), Path("ran"), Path("pwned")):
            assert not place.exists(), place
        if bare is not None and bare.exists():
            found = {one.name for one in bare.iterdir()}
            assert found <= BARE, found - BARE
            assert "evil" not in (bare / "config").read_text() and not (bare / "objects/info/alternates").exists()
            assert {one.name for one in bare.parent.iterdir()} <= {bare.name, f"{bare.stem}.lock", "objects.pack"}

    def changed(self, head: str) -> set[tuple[bytes, str]]:
        """(path, new id) of what a commit changes, by a reader of our own; deleted paths with zeroes."""

        def root(commit: str) -> str:
            return git(self.server, "cat-file", "commit", commit).split("\n", 1)[0].removeprefix("tree ")

        old = {path: (mode, sha) for path, mode, sha in tree_of(self.server, root(self.base))}
        new = {path: (mode, sha) for path, mode, sha in tree_of(self.server, root(head))}
        found = {(path, new[path][1]) for path in new if old.get(path) != new[path]}
        return found | {(path, "0" * 40) for path in old if path not in new}


@pytest.fixture(scope="module")
def range_(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Range]:
    world = SessionWorld()
    # Beyond the test's own directory there is nothing that git could look up: no repository, no home of a user.
    found = Range(world, tmp_path_factory.mktemp("trap"))
    yield found
    world.close()


def name_of(path: bytes) -> str:
    """A path as our entries spell it."""
    return path.decode(errors="backslashreplace")


def assert_nothing_is_hidden(range_: Range, case: Case, facts: WorkspaceFacts) -> None:
    """Every changed file is an entry, and the entry's text holds the file's new lines, or says that it doesn't."""
    listed = {(entry.path, entry.new_blob) for entry in facts.entries if entry.status != "deleted"}
    listed |= {(entry.path, "0" * 40) for entry in facts.entries if entry.status == "deleted"}
    listed |= {(entry.old_path, "0" * 40) for entry in facts.entries if entry.status == "renamed" and entry.old_path}
    wanted = {(name_of(path), sha) for path, sha in range_.changed(range_.head_of(case))}
    assert wanted == listed, wanted ^ listed
    assert len({entry.entry_id for entry in facts.entries}) == len(facts.entries)
    for entry in facts.entries:
        if entry.status != "added" or entry.new_mode == "160000" or len(entry.text) > 1_000_000:
            continue  # the last kind is refused by the brief: larger than any part
        content = subprocess.run(
            ["git", "-C", str(range_.server), "cat-file", "blob", entry.new_blob], capture_output=True, check=True
        )
        assert not entry.binary, f"{entry.path}: a text counts as binary"
        for line in content.stdout.split(b"\n"):
            shown = line.replace(b"\0", b"\\x00").decode(errors="backslashreplace")
            assert f"+{shown}" in entry.text, (entry.path, shown[:80])


@pytest.mark.parametrize("name", CASES)
def test_reading_a_hostile_repository_runs_nothing_and_hides_nothing(range_: Range, name: str, figures: Figures) -> None:
    case = CASES[name]
    range_.head_of(case)
    began = time.monotonic()
    found = range_.read(case, as_process=case.sandbox)
    took = time.monotonic() - began
    figures(tried=1, slowest_repository_seconds=round(took, 1))
    assert took < SECONDS_PER_CASE
    if isinstance(found, WorkspaceFacts):
        assert not case.refused, f"was read, though it should be refused with {case.refused}"
        assert_nothing_is_hidden(range_, case, found)
    else:
        assert found in case.refused, f"refused with {found}"


def session_of(range_: Range, case: Case, **settings: Any) -> tuple[SessionSpec, SessionOutcome]:
    """A whole session on the case, with the honest agent in the real sandbox."""
    pull = range_.world.control("open-pull", kind="clean")
    range_.point(pull["number"], range_.head_of(case))
    spec = range_.world.spec(pull, **settings)
    return spec, range_.world.run(spec, ScriptedAdapter())


def is_green_without_coverage(range_: Range, spec: SessionSpec, outcome: SessionOutcome) -> bool:
    """A success whose ledger isn't the whole change, all of it sent."""
    verdict = range_.world.judge(spec, outcome, gate="off").verdict
    if verdict.conclusion is not Conclusion.SUCCESS:
        return False
    assert outcome.evidence is not None
    ledger = outcome.evidence.ledger
    wanted = {name_of(path) for path, _ in range_.changed(spec.head_sha)}
    covered = {entry.path for entry in ledger if entry.sent_turn} | {entry.old_path for entry in ledger if entry.sent_turn}
    return not wanted <= covered or bool(outcome.evidence.gaps)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A session on each repository in the full form, on those that aim at checkout or agent in the bounded one."""
    if "session_case" in metafunc.fixturenames:
        full = metafunc.config.getoption("full")
        metafunc.parametrize("session_case", [name for name, case in CASES.items() if full or case.sandbox])


def test_a_session_on_a_hostile_repository_stays_inside_and_is_green_only_with_full_coverage(
    range_: Range, session_case: str, figures: Figures
) -> None:
    case = CASES[session_case]
    spec, outcome = session_of(range_, case)
    range_.look()
    work = range_.world.home / "work"
    assert not work.exists() or os.listdir(work) == []
    green = is_green_without_coverage(range_, spec, outcome)
    figures(tried=1, green=green)
    assert not green
    if case.refused:
        assert outcome.reason in case.refused, (outcome.reason, outcome.detail)


def test_the_corpus_is_as_large_as_promised() -> None:
    assert len(CASES) >= 40 and sum(1 for case in CASES.values() if not case.refused) >= 40
