"""What the platform reads of a repository before an agent runs, whichever agent it will be: by the courier, in a bare repository."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kilo_pipelines.cloud_agent import git
from kilo_pipelines.cloud_agent.git import GitError
from kilo_pipelines.cloud_agent.protocol import SessionSpec
from kilo_pipelines.core.diff import hunks_of
from kilo_pipelines.core.evidence import LedgerEntry
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.session import WorkspaceFacts

LOOK_SECONDS = 0.05  # between two looks at the courier and the caller's heartbeat


def bare_of(repositories: Path, spec: SessionSpec) -> Path:
    """The platform's bare repository of a session's owner and repository."""
    return git.bare_path(repositories, spec.owner_id, spec.repository.external_id)


def errand(
    bare: Path, clone_url: str, token: str, wanted: dict[str, Any], lost: Reason, look: Callable[[], None]
) -> dict[str, str]:
    """One errand in a process that holds a token (`courier`): the refs that it answers.

    `look` is called all the while and may raise. GitError with the courier's reason, or `lost` when there is no answer.
    """
    request = {"bare": str(bare), "clone_url": clone_url, "token": token, **wanted}
    courier = subprocess.Popen(
        [sys.executable, "-m", "kilo_pipelines.cloud_agent.courier"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert courier.stdin is not None and courier.stdout is not None  # noqa: S101  # asked for above
    try:
        courier.stdin.write(json.dumps(request).encode())
        courier.stdin.close()
        while courier.poll() is None:
            look()
            time.sleep(LOOK_SECONDS)
        answer: dict[str, Any] = json.loads(courier.stdout.read() or b"{}")
    finally:
        courier.stdout.close()
        if courier.poll() is None:
            courier.kill()
            courier.wait()
    if "refs" not in answer:
        raise GitError(Reason(answer.get("reason", lost)), str(answer.get("detail") or ""))
    refs: dict[str, str] = answer["refs"]
    return refs


def fetch(repositories: Path, spec: SessionSpec, token: Callable[[], str], look: Callable[[], None]) -> dict[str, str]:
    """Head, base and default branch in the bare repository, which must hold the head that was asked for: commits by ref.

    A branch may have gone on meanwhile: the session's work is on the recorded head all the same. GitError.
    """
    bare = bare_of(repositories, spec)
    refs = {
        "refs/kilo/head": spec.checkout_ref,
        "refs/kilo/base": f"refs/heads/{spec.base_ref}",
        "refs/kilo/default": f"refs/heads/{spec.repository.default_branch}",
    }
    found = errand(bare, spec.repository.clone_url, token(), {"refs": refs}, Reason.FETCH_FAILED, look)
    tip = found["refs/kilo/head"]
    if tip != spec.head_sha and not (spec.pull_number is None and git.contains(bare, tip, spec.head_sha)):
        raise GitError(Reason.HEAD_MOVED, "the head is another commit by now")
    return found


def read(repositories: Path, spec: SessionSpec, commits: Mapping[str, str]) -> WorkspaceFacts:
    """Diff and policy out of what `fetch` brought."""
    return git.read_facts(
        bare_of(repositories, spec),
        # Without a pull request the work is on the head as it is: there is no change to show.
        base=commits["refs/kilo/base"] if spec.pull_number is not None else spec.head_sha,
        head=spec.head_sha,
        policy_commit=commits["refs/kilo/default"],
    )


def ledger_of(facts: WorkspaceFacts, sent: Mapping[str, int], excluded: Mapping[str, str]) -> list[LedgerEntry]:
    """The coverage ledger: per changed blob pair the turn in which it was sent, or why it wasn't meant to be."""
    return [
        LedgerEntry(
            **entry.model_dump(exclude={"text"}),
            bytes=len(entry.text.encode()),
            sent_turn=sent.get(entry.entry_id),
            excluded=excluded.get(entry.entry_id),
            hunks=hunks_of(entry.text),
        )
        for entry in facts.entries
    ]
