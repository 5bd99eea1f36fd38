"""Write sessions in the real sandbox: what an agent may leave behind, what of it is pushed, and what is refused with which reason.

The provider's repository is read afterwards: one commit on the recorded head under a new branch, or nothing at all.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from kilo_pipelines.cloud_agent import git as ours
from kilo_pipelines.cloud_agent.adapters.scripted import ScriptedAdapter
from kilo_pipelines.cloud_agent.protocol import PUSHED, SessionOutcome, SessionStatus
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.verdict import EvidenceKey, fault_of
from tests.support.figures import Figures
from tests.support.git import git
from tests.support.http import HTTP
from tests.support.sessions import ChangeTask, Control, Provider, SessionWorld

EDITED = [("100644", "package-lock.json"), ("100644", "package.json")]
# Hostile where nobody looks: the pushed commit is the honest edit and nothing else.
WITHOUT_EFFECT = ("edit", "hooks", "config", "alternates", "history", "setuid")
REFUSED = {
    "staged": Reason.NO_CHANGES,  # in the agent's own index, which isn't read
    "nothing": Reason.NO_CHANGES,  # an own history with an own author, and no other content
    "no_repository": Reason.NO_CHANGES,
    "repository": Reason.CHANGE_NESTED_REPOSITORY,
    "repository_file": Reason.CHANGE_NESTED_REPOSITORY,
    "git_name": Reason.CHANGE_UNREADABLE,  # git itself refuses the name
    "submodule": Reason.CHANGE_GITLINK,
    "link": Reason.CHANGE_SYMLINK,
    "inner_link": Reason.CHANGE_SYMLINK,
    "link_moved": Reason.CHANGE_SYMLINK,
    "link_for_directory": Reason.CHANGE_SYMLINK,
    "workflow": Reason.CHANGE_PROTECTED,
    "owners": Reason.CHANGE_PROTECTED,
    "attributes": Reason.CHANGE_PROTECTED,
    "foreign": Reason.CHANGE_FOREIGN_SOURCE,
    "install_script": Reason.CHANGE_INSTALL_SCRIPT,
    "yarn_release": Reason.CHANGE_PROTECTED,
    "files": Reason.CHANGE_TOO_LARGE,
    "huge": Reason.CHANGE_TOO_LARGE,
    "pipe": Reason.CHANGE_UNREADABLE,
    "unreadable": Reason.CHANGE_UNREADABLE,
    "name": Reason.CHANGE_PATH,
    "claim": Reason.RESULT_INVALID,
}
# One of each kind; the full form runs all.
BOUNDED = ("nothing", "repository", "submodule", "link_moved", "foreign", "install_script", "huge", "pipe", "name", "claim")


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    world = SessionWorld()
    yield Provider(world)
    world.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All attacks in the full form."""
    full = metafunc.config.getoption("full")
    if "refused" in metafunc.fixturenames:
        metafunc.parametrize("refused", REFUSED if full else BOUNDED)
    if "harmless_deed" in metafunc.fixturenames:
        metafunc.parametrize("harmless_deed", WITHOUT_EFFECT if full else ("hooks", "config", "history"))


def test_what_an_agent_does_to_its_own_repository_has_no_say_in_what_is_pushed(
    provider: Provider, harmless_deed: str, figures: Figures
) -> None:
    before = provider.refs()
    control = Control()
    spec, outcome = provider.change(harmless_deed, control)
    figures(tried=1, leaked="ghs_" in json.dumps([control.events, outcome.model_dump(mode="json")]))
    assert "ghs_" not in json.dumps([control.events, outcome.model_dump(mode="json")]), "a token of the push"
    assert outcome.status is SessionStatus.COMPLETED and outcome.result is not None, (outcome.reason, outcome.detail)
    pushed, after = outcome.result[PUSHED], provider.refs()
    assert {name: after[name] for name in after if name not in before} == {f"refs/heads/{spec.branch}": pushed["commit"]}
    assert {name: after[name] for name in before} == before, "a ref that existed was moved"
    wanted = [*EDITED, ("100755", "run.sh")] if harmless_deed == "setuid" else EDITED
    assert provider.changed(pushed["commit"]) == wanted and pushed["files"] == [path for _, path in wanted]
    assert pushed["parent"] == provider.head and pushed["branch"] == spec.branch
    told = git(provider.server.path, "show", "-s", "--format=%P|%an|%ae|%cn|%ce|%B", pushed["commit"])
    who = "kilo-pipelines|agent@kilo-pipelines.invalid"
    assert told == f"{provider.head}|{who}|{who}|Update demo\n\nTo 1.0.1."
    assert os.listdir(provider.world.home / "work") == []
    bare = provider.world.home / "repositories" / str(spec.owner_id) / f"{spec.repository.external_id}.git"
    ours_all = git(bare, "cat-file", "--batch-all-objects", "--batch-check=%(objectname)").split()
    assert provider.head in ours_all and pushed["commit"] not in ours_all, "an agent's object in the platform's repository"


def test_what_no_change_may_hold_is_refused_with_its_reason_and_nothing_is_pushed(
    provider: Provider, refused: str, figures: Figures
) -> None:
    before, objects = provider.refs(), git(provider.server.path, "count-objects", "-v")
    control = Control()
    _, outcome = provider.change(refused, control)
    figures(tried=1, leaked=provider.refs() != before)
    assert (outcome.status, outcome.reason) == (SessionStatus.FAILED, REFUSED[refused]), outcome.detail
    assert provider.refs() == before and git(provider.server.path, "count-objects", "-v") == objects
    assert "pushed" not in [kind for kind, _ in control.events] and PUSHED not in (outcome.result or {})
    assert os.listdir(provider.world.home / "work") == []


def test_a_refused_change_keeps_its_result_and_evidence(provider: Provider) -> None:
    _, outcome = provider.change("workflow")
    assert outcome.result is not None and outcome.result["summary"] and outcome.detail == ".github/workflows/x.yml"
    assert outcome.evidence is not None and outcome.evidence.result_sha256 and outcome.evidence.pull_number is None


def test_the_owner_may_let_a_protected_path_through(provider: Provider) -> None:
    _, outcome = provider.change("workflow", allow_protected=[".github/workflows/*"])
    assert outcome.result is not None and outcome.result[PUSHED]["files"] == [".github/workflows/x.yml"]


def test_a_branch_that_exists_is_neither_moved_nor_taken_over(provider: Provider) -> None:
    git(provider.server.path, "update-ref", "refs/heads/kilo/held/1", provider.head)
    _, outcome = provider.change("edit", branch="kilo/held/1")
    assert outcome.reason == Reason.BRANCH_TAKEN and provider.refs()["refs/heads/kilo/held/1"] == provider.head


def test_a_session_that_is_taken_up_after_its_push_ends_with_what_was_pushed(provider: Provider) -> None:
    control = Control()
    spec, outcome = provider.change("edit", control)
    assert control.kept == outcome and outcome.result is not None
    before, again = provider.refs(), Control()
    assert provider.world.run(spec, ScriptedAdapter("crash"), again, accepted=outcome) == outcome
    assert provider.refs() == before and [kind for kind, _ in again.events] == ["pushed_before"]
    # It died before the push, or somebody else holds the branch: the work is done anew.
    for branch in (f"{spec.branch}1", "kilo/held/2"):
        git(provider.server.path, "update-ref", "refs/heads/kilo/held/2", provider.head)
        anew = spec.model_copy(update={"branch": branch, "session_id": uuid4()})
        assert provider.world.run(anew, ScriptedAdapter("crash"), accepted=outcome).reason == Reason.AGENT_CRASHED


class Overtaken(Control):
    """The session went to somebody else while its change was checked."""

    def accepted(self, outcome: SessionOutcome) -> bool:
        return False


def test_a_session_that_was_taken_over_pushes_nothing(provider: Provider) -> None:
    before = provider.refs()
    _, outcome = provider.change("edit", Overtaken())
    assert outcome.reason == Reason.SESSION_LOST and provider.refs() == before


class Blocked(ChangeTask):
    """A result that asks for no push."""

    def commit_message(self, result: dict[str, Any]) -> str | None:
        return None


def test_a_result_that_asks_for_no_push_pushes_nothing_of_the_tree(provider: Provider) -> None:
    before = provider.refs()
    spec = provider.world.branch_spec(provider.pull, provider.head)
    outcome = provider.world.run(spec, ScriptedAdapter("write_edit"), task=Blocked({}))
    assert outcome.status is SessionStatus.COMPLETED and PUSHED not in (outcome.result or {}) and provider.refs() == before


def test_a_commits_message_is_harmless_whatever_the_result_says(provider: Provider) -> None:
    message = "Update @everyone [skip ci]\n\nFixes #1 <img src=x>\nskip-checks: true\nghp_" + "a" * 36
    _, outcome = provider.change("edit", task={"message": message})
    assert outcome.result is not None
    told = git(provider.server.path, "show", "-s", "--format=%B", outcome.result[PUSHED]["commit"])
    for switch in ("@everyone", "[skip ci]", "Fixes #1", "<img", "skip-checks:", "ghp_a"):
        assert switch not in told, told


def test_a_session_on_a_branchs_head_reads_without_a_pull_request_and_proves_no_review(provider: Provider) -> None:
    # A head that differs from its base: without a pull request nothing is compared all the same.
    head, ref = provider.pull["head_sha"], f"refs/pull/{provider.pull['number']}/head"
    spec = provider.world.branch_spec(provider.pull, head, "security_analysis", checkout_ref=ref)
    outcome = provider.world.run(spec, ScriptedAdapter())
    assert outcome.status is SessionStatus.COMPLETED and outcome.evidence is not None, (outcome.reason, outcome.detail)
    found = outcome.evidence
    assert (found.pull_number, found.ledger, found.merge_base, found.head) == (None, [], head, head)
    key = EvidenceKey(found.repository_id, None, found.base_ref, found.head)
    assert fault_of(found, key, accept_reported=True) is Reason.DIFF_EMPTY
    of_a_review = EvidenceKey(found.repository_id, 7, found.base_ref, found.head)
    assert fault_of(found, of_a_review, accept_reported=True) is Reason.EVIDENCE_MISMATCH


def test_a_session_that_reads_pushes_nothing_whatever_its_agent_changes(provider: Provider) -> None:
    before = provider.refs()
    spec = provider.world.branch_spec(provider.pull, provider.head, "security_analysis")
    outcome = provider.world.run(spec, ScriptedAdapter("write_edit"))
    assert outcome.status is SessionStatus.COMPLETED and PUSHED not in (outcome.result or {}) and provider.refs() == before


def test_a_branch_that_went_on_keeps_nobody_from_working_on_its_recorded_head(provider: Provider) -> None:
    later = provider.server.commit({"docs/later.md": b"later\n"}, provider.head)
    git(provider.server.path, "update-ref", "refs/heads/main", later)
    try:
        _, outcome = provider.change("edit")
    finally:
        git(provider.server.path, "update-ref", "refs/heads/main", provider.head)
    assert outcome.result is not None and outcome.result[PUSHED]["parent"] == provider.head, (outcome.reason, outcome.detail)
    assert provider.changed(outcome.result[PUSHED]["commit"]) == EDITED


def test_a_branch_that_left_the_recorded_head_ends_the_session_before_any_agent_runs(provider: Provider) -> None:
    elsewhere = provider.server.commit({"docs/other.md": b"other\n"}, f"{provider.head}^")
    for head in (elsewhere, "1" * 40):
        outcome = provider.world.run(provider.world.branch_spec(provider.pull, head), ScriptedAdapter("write_edit"))
        assert outcome.reason == Reason.HEAD_MOVED


class Pushing:
    """A commit in quarantine, pushed by the courier's process as often as a test likes."""

    def __init__(self, provider: Provider, path: Path) -> None:
        self.provider, self.spec = provider, provider.world.branch_spec(provider.pull, provider.head)
        self.bare = path / "bare.git"
        git(path, "clone", "-q", "--bare", str(provider.server.path), str(self.bare))
        self.change = ours.Quarantine(self.bare, path / "quarantine")
        (self.change.directory / "pack").mkdir(parents=True)

    def commit(self, size: int = 10) -> str:
        """A commit on the head, in quarantine alone; each its own."""
        at = {"GIT_OBJECT_DIRECTORY": str(self.change.directory), "GIT_ALTERNATE_OBJECT_DIRECTORIES": f"{self.bare}/objects"}
        blob = git(self.bare, "hash-object", "-w", "--stdin", stdin=os.urandom(size), **at)
        tree = git(self.bare, "mktree", stdin=f"100644 blob {blob}\ta\n".encode(), **at)
        return self.change.commit(tree, self.provider.head, "Words\n")

    def push(self, commit: str, branch: str, level: str = "write", port: int | None = None) -> Reason | None:
        token = self.provider.world.token(self.spec.repository.external_id, level)
        request = {
            "bare": str(self.bare),
            "clone_url": re.sub(r":\d+/", f":{port}/" if port else r"\g<0>", self.spec.repository.clone_url),
            "token": token,
            "push": {"objects": str(self.change.directory), "commit": commit, "branch": branch},
        }
        courier = [sys.executable, "-m", "kilo_pipelines.cloud_agent.courier"]
        done = subprocess.run(courier, input=json.dumps(request).encode(), capture_output=True)
        assert token not in done.stdout.decode() + done.stderr.decode()
        answer = json.loads(done.stdout)
        return Reason(answer["reason"]) if "reason" in answer else None

    def held(self, branch: str) -> str | None:
        return self.provider.refs().get(f"refs/heads/{branch}")


@pytest.fixture
def pushing(provider: Provider, tmp_path: Path) -> Pushing:
    return Pushing(provider, tmp_path)


class Cut(BaseHTTPRequestHandler):
    """Hands on to the twin, and hangs up instead of telling how a push ended."""

    twin: int

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        kept = {
            name: value
            for name, value in self.headers.items()
            if name.lower() not in ("host", "content-length", "accept-encoding")
        }
        answer = HTTP.request(self.command, f"http://localhost:{self.twin}{self.path}", headers=kept, content=body)
        if self.path.endswith("/git-receive-pack"):
            return
        self.send_response(answer.status_code)
        self.send_header("content-type", answer.headers["content-type"])
        self.end_headers()
        self.wfile.write(answer.content)

    do_POST = do_GET  # names of http.server

    def log_message(self, *_args: object) -> None:
        """Quiet."""


def test_a_push_whose_answer_is_lost_has_happened(pushing: Pushing) -> None:
    commit = pushing.commit()
    server = ThreadingHTTPServer(("localhost", 0), type("CutHere", (Cut,), {"twin": pushing.provider.world.port}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert pushing.push(commit, "kilo/cut/1", port=server.server_port) is None
    finally:
        server.shutdown()
        server.server_close()
    assert pushing.held("kilo/cut/1") == commit


def test_a_push_is_repeated_without_harm(pushing: Pushing) -> None:
    commit = pushing.commit(3_000_000)  # more than git sends in one piece
    assert [pushing.push(commit, "kilo/again/1") for _ in range(2)] == [None, None]
    assert pushing.held("kilo/again/1") == commit


def test_a_branch_is_created_once_and_never_moved_forced_or_reset(pushing: Pushing) -> None:
    first, second = pushing.commit(), pushing.commit()
    assert (pushing.push(first, "kilo/once/1"), pushing.push(second, "kilo/once/1")) == (None, Reason.BRANCH_TAKEN)
    # Not even forwards: the head's own child over the head.
    git(pushing.provider.server.path, "update-ref", "refs/heads/kilo/ahead/1", pushing.provider.head)
    assert pushing.push(first, "kilo/ahead/1") is Reason.BRANCH_TAKEN
    assert (pushing.held("kilo/once/1"), pushing.held("kilo/ahead/1")) == (first, pushing.provider.head)


def test_a_push_that_the_provider_refuses_says_so(pushing: Pushing) -> None:
    commit = pushing.commit()
    git(pushing.provider.server.path, "update-ref", "refs/heads/kilo/file", pushing.provider.head)
    assert pushing.push(commit, "kilo/reading/1", "read") is Reason.PUSH_FAILED
    assert pushing.push(commit, "kilo/file/1") is Reason.PUSH_FAILED
    assert pushing.held("kilo/reading/1") is None and pushing.held("kilo/file/1") is None
