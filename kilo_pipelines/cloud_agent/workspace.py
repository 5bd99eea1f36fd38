"""A session's directories, and reading what an agent left there as what it is: hostile (threats, rule 4)."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path
from uuid import UUID

# Runs inside the sandbox, as the session's uid: no credential, no network, and whatever hooks or filters the
# tree brings have nothing to reach. The pack holds two commits without their history, hence the shallow file.
CHECKOUT_SCRIPT = """
set -eu
cd /work/repo
git init -q .
git index-pack --stdin < /work/in/objects.pack > /dev/null
printf '%s\\n%s\\n' "$KILO_HEAD" "$KILO_BASE" > .git/shallow
git -c advice.detachedHead=false checkout -q --detach "$KILO_HEAD"
rm -f /work/out/*
"""


PACK_NAME = "change.pack"


class ResultFileError(Exception):
    """What a sandbox left is no file that may be read; the message says why."""


class Workspace:
    """Directories of one session below the platform's work directory."""

    def __init__(self, work_dir: Path, session_id: UUID) -> None:
        self.root = work_dir / str(session_id)
        self.repo = self.root / "repo"
        self.out = self.root / "out"
        self.home = self.root / "home"
        self.inbox = self.root / "in"
        self.final = self.root / "final"
        self.quarantine = self.root / "quarantine"

    def create(self, uid: int | None) -> None:
        """Fresh directories; with a uid they belong to it, except the inbox."""
        self.remove()
        self.root.mkdir(mode=0o700, parents=True)
        for directory in (self.repo, self.out, self.home):
            _private(directory, uid)
        self.inbox.mkdir(mode=0o755)

    def create_final(self, uid: int | None) -> None:
        """The place of the finalisation's repository and pack: made when the agent is dead, so that it holds nothing of it."""
        _private(self.final, uid)

    def read_result(self, limit: int) -> bytes | None:
        """The result file: None when there is none, ResultFileError when it is anything but a small regular file."""
        return _read(self.out, "result.json", limit)

    def read_pack(self, limit: int) -> bytes | None:
        """The finalisation's pack, under the same rules as the result file."""
        return _read(self.final, PACK_NAME, limit)

    def clear_result(self) -> None:
        """Removes a refused result before the repair turn."""
        path = self.out / "result.json"
        if path.is_dir() and not path.is_symlink():
            _remove(path)
        else:
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes everything; no link is followed."""
        _remove(self.root)


def sweep(work_dir: Path, live: set[str]) -> int:
    """Removes workspaces of sessions that no longer live; how many."""
    removed = 0
    if work_dir.is_dir():
        for path in work_dir.iterdir():
            if path.name not in live:
                _remove(path)
                removed += 1
    return removed


def _private(directory: Path, uid: int | None) -> None:
    directory.mkdir(mode=0o700)
    if uid is not None:
        os.chown(directory, uid, uid)


def _read(place: Path, name: str, limit: int) -> bytes | None:
    """Nothing is followed: the directory is opened first, the name within it, links refused; one link only; at most `limit` bytes."""
    directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
        except FileNotFoundError:
            return None
        except OSError as failure:
            raise ResultFileError(f"{name} can't be opened: {failure.strerror}") from None
    finally:
        os.close(directory)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise ResultFileError(f"{name} is not a regular file with one link")
        if found.st_size > limit:
            raise ResultFileError(f"{name} has {found.st_size} bytes, {limit} are allowed")
        return os.read(descriptor, limit)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Removes a tree that an agent made: `rm` goes any depth, where Python's rmtree recurses and falls at a thousand."""
    subprocess.run(["rm", "-rf", "--", str(path)], stdin=subprocess.DEVNULL, capture_output=True, check=False)
