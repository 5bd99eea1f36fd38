"""What a dismissal rests on, read in the platform's own bare repository: no checkout, no agent (contract 11; threats, rule 1)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from uuid import UUID

from kilo_pipelines.cloud_agent import git
from kilo_pipelines.cloud_agent.git import GitError
from kilo_pipelines.core.reasons import Reason

# A fetch of a large repository; a session's own fetch is bounded by the session.
FETCH_SECONDS = 300.0


def read_tree(
    repositories: Path,
    owner_id: UUID,
    repository_id: int,
    clone_url: str,
    branch: str,
    token: str,
    reads: list[tuple[list[str], list[str]]],
) -> tuple[str, list[tuple[dict[str, str], list[tuple[str, str]]]]]:
    """The branch's commit and, for each of (paths, texts), the files' ids by path and the lines that hold a text, as (path, line).

    Raises GitError. The token is the courier's alone, which ends before anything is read.
    """
    bare = git.bare_path(repositories, owner_id, repository_id)
    errand = {"bare": str(bare), "clone_url": clone_url, "token": token, "refs": {"refs/kilo/evidence": f"refs/heads/{branch}"}}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "kilo_pipelines.cloud_agent.courier"],
            input=json.dumps(errand).encode(),
            capture_output=True,
            timeout=FETCH_SECONDS,
            check=False,
        )
        answer = json.loads(done.stdout or b"{}")
    except (subprocess.TimeoutExpired, ValueError):
        raise GitError(Reason.FETCH_FAILED, "the courier gave no answer") from None
    if "refs" not in answer:
        raise GitError(Reason(answer.get("reason", Reason.FETCH_FAILED)), str(answer.get("detail", ""))[:500])
    commit = str(answer["refs"]["refs/kilo/evidence"])
    return commit, [(git.blobs_at(bare, commit, paths), git.lines_with(bare, commit, texts)) for paths, texts in reads]
