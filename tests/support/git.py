"""Small bare repositories made by hand, hostile ones included."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ENV = {
    "PATH": os.environ["PATH"],
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    **{f"GIT_{who}_{what}": "t" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}


def git(path: Path, *args: str, stdin: bytes | None = None, **env: str) -> str:
    """Output of a git command; the test fails with git's words."""
    done = subprocess.run(["git", "-C", str(path), *args], input=stdin, capture_output=True, env=ENV | env, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(errors="surrogateescape").strip()


class BareRepository:
    """A bare repository that commits are put into without any work tree."""

    def __init__(self, path: Path) -> None:
        """A new one, or one that exists already."""
        self.path = path
        if not path.exists():
            path.mkdir(parents=True)
            git(path, "init", "-q", "--bare", "--initial-branch=main")

    def blob(self, content: bytes) -> str:
        return git(self.path, "hash-object", "-w", "--stdin", stdin=content)

    def commit(self, files: dict[str, bytes | tuple[str, bytes] | None], parent: str | None = None) -> str:
        """A commit with these files changed: bytes, (mode, bytes) or None to delete."""
        index = {"GIT_INDEX_FILE": str(self.path / "test-index")}
        (self.path / "test-index").unlink(missing_ok=True)
        if parent:
            git(self.path, "read-tree", parent, **index)
        for name, content in files.items():
            if content is None:
                git(self.path, "update-index", "--index-info", stdin=f"0 {'0' * 40}\t{name}\n".encode(), **index)
                continue
            mode, data = content if isinstance(content, tuple) else ("100644", content)
            blob = data.decode() if mode == "160000" else self.blob(data)
            git(self.path, "update-index", "--add", "--cacheinfo", f"{mode},{blob},{name}", **index)
        tree = git(self.path, "write-tree", **index)
        return git(self.path, "commit-tree", tree, "-m", "m", *(("-p", parent) if parent else ()))
