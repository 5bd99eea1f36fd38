"""What a dismissal rests on, read in the platform's own bare repository: no checkout, no agent (contract 11; threats, rule 1)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

from kilo_pipelines.cloud_agent import git
from kilo_pipelines.cloud_agent.git import GitError
from kilo_pipelines.core.reasons import Reason

# A fetch of a large repository; a session's own fetch is bounded by the session.
FETCH_SECONDS = 300.0

# What is read: files by path and texts to look for, at a commit that is known, or (None) at the branch's head.
Read = tuple[list[str], list[str], str | None]
# The files' ids by path, and the lines that hold a text, as (path, line).
Ground = tuple[dict[str, str], list[tuple[str, str]]]


def read_tree(
    repositories: Path,
    owner_id: UUID,
    repository_id: int,
    clone_url: str,
    branch: str,
    token: str,
    reads: Sequence[Read],
    seconds: float,
) -> tuple[str, list[Ground | GitError]]:
    """The branch's commit and what each read found, within `seconds` in all; each fails by itself.

    Raises GitError when there is no commit to read at. The token is the courier's alone, which ends before anything is read.
    """
    until = time.monotonic() + seconds
    bare = git.bare_path(repositories, owner_id, repository_id)
    errand = {"bare": str(bare), "clone_url": clone_url, "token": token, "refs": {"refs/kilo/evidence": f"refs/heads/{branch}"}}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "kilo_pipelines.cloud_agent.courier"],
            input=json.dumps(errand).encode(),
            capture_output=True,
            timeout=min(FETCH_SECONDS, seconds),
            check=False,
        )
        answer = json.loads(done.stdout or b"{}")
    except (subprocess.TimeoutExpired, ValueError):
        raise GitError(Reason.FETCH_FAILED, "the courier gave no answer") from None
    if "refs" not in answer:
        raise GitError(Reason(answer.get("reason", Reason.FETCH_FAILED)), str(answer.get("detail", ""))[:500])
    commit = str(answer["refs"]["refs/kilo/evidence"])
    return commit, [_read(bare, commit if at is None else at, paths, texts, until) for paths, texts, at in reads]


def _read(bare: Path, commit: str, paths: list[str], texts: list[str], until: float) -> Ground | GitError:
    left = until - time.monotonic()
    if left <= 0:
        return GitError(Reason.FETCH_FAILED, "no time was left to read it")
    try:
        return git.blobs_at(bare, commit, paths), git.lines_with(bare, commit, texts, left)
    except GitError as failure:
        return failure
