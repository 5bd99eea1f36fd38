"""The courier: a short-lived process that holds a token, fetches into a bare repository or pushes from one, and ends.

`python -m kilo_pipelines.cloud_agent.courier` reads one JSON request on stdin: {bare, clone_url, token} with `refs` to fetch,
`look` (full names to look up without fetching) or `push` {objects, commit, branch}. It prints one JSON answer {refs} or {reason, detail}. The process that runs the agent
never holds a repository token (threats, rule 1).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kilo_pipelines.cloud_agent.git import GitError, Quarantine, fetch, remote_refs


def main() -> int:
    """One request, one answer."""
    request = json.load(sys.stdin)
    bare, clone_url, token = Path(request["bare"]), request["clone_url"], request["token"]
    refs = {}
    try:
        if "push" in request:
            change = request["push"]
            Quarantine(bare, Path(change["objects"])).push(clone_url, token, change["commit"], change["branch"])
        elif "look" in request:
            refs = remote_refs(bare, clone_url, token, request["look"])
        else:
            refs = fetch(bare, clone_url, token, request["refs"])
    except GitError as failure:
        print(json.dumps({"reason": str(failure.reason), "detail": failure.detail}))  # noqa: T201
        return 1
    print(json.dumps({"refs": refs}))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
