"""What a change that an agent made may be before it is pushed (threats, rules 1 and 14): files, modes, names, sizes.

Pure: the caller reads modes, names and sizes in a bare repository of the platform, never in the agent's tree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kilo_pipelines.core.protected import is_protected
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.redact import redact
from kilo_pipelines.core.text import clean, cut, harmless, one_line

# GitHub shows the diffs of 300 files of a pull request: what lies beyond is merged unread.
MAX_FILES = 300
# New contents together: two of the largest lock files there are, and far below what GitHub refuses (100 MB a file).
MAX_BYTES = 20 * 2**20
SUBJECT_CHARS = 72  # git's own tools cut a longer first line
BODY_CHARS = 4_000

ABSENT, GITLINK, SYMLINK = "000000", "160000", "120000"
PLAIN = ("100644", "100755")
# NTFS reads these as `.git`, too (CVE-2019-1352 and its kin); HFS ignores invisible characters, which `clean` refuses before.
_GIT_NAME = re.compile(r"(?:\.git|git~\d+)[ .]*(?::.*)?", re.IGNORECASE)
# Any of these in a commit's message keeps GitHub's checks from running (GitHub Docs: "Skipping workflow runs").
_SKIP = re.compile(r"\[(?=(?:skip|no)[ -](?:ci|actions)\]|(?:ci|actions)[ -]skip\])|(?<=skip)-(?=checks\s*:)", re.IGNORECASE)


@dataclass(frozen=True)
class Change:
    """One path that differs between the recorded head and the agent's tree; six-digit modes, `size` of the new content in bytes."""

    path: str
    old_mode: str
    new_mode: str
    size: int = 0


@dataclass(frozen=True)
class Refusal:
    """Why a change isn't pushed; the detail names one path."""

    reason: Reason
    detail: str


def is_git_name(name: str) -> bool:
    """Whether git on some file system takes this directory entry for a repository's own directory."""
    return _GIT_NAME.fullmatch(name) is not None


def _fault(change: Change, allowed: Sequence[str]) -> Reason | None:
    modes = (change.old_mode, change.new_mode)
    if GITLINK in modes:
        return Reason.CHANGE_GITLINK
    if change.new_mode == SYMLINK:
        return Reason.CHANGE_SYMLINK
    if change.new_mode not in (*PLAIN, ABSENT):
        return Reason.CHANGE_MODE
    if change.new_mode != ABSENT:
        names = change.path.split("/")
        if any(is_git_name(name) for name in names):
            return Reason.CHANGE_NESTED_REPOSITORY
        odd = (
            any(name in ("", ".", "..") for name in names)
            or "\\" in change.path
            or re.search(r"[\ud800-\udfff\n\t]", change.path)
        )
        if odd or clean(change.path) != change.path:
            return Reason.CHANGE_PATH
    return Reason.CHANGE_PROTECTED if is_protected(change.path, allowed) else None


def refusal_of(changes: Iterable[Change], allowed: Sequence[str] = ()) -> Refusal | None:
    """The first reason why these changes aren't pushed, None when they may be.

    A link is refused wherever it points: through a second link a target inside the tree leads outside. `allowed` are patterns
    of protected paths that the owner lets through.
    """
    files = size = 0
    for change in changes:
        files, size = files + 1, size + change.size
        if files > MAX_FILES or size > MAX_BYTES:
            return Refusal(Reason.CHANGE_TOO_LARGE, f"more than {MAX_FILES} files or {MAX_BYTES} bytes")
        fault = _fault(change, allowed)
        if fault is not None:
            return Refusal(fault, one_line(change.path.encode(errors="backslashreplace").decode(), 200))
    return None if files else Refusal(Reason.NO_CHANGES, "the tree is the recorded head's")


def commit_text(message: str) -> str:
    """A commit's message out of an agent's words: a subject of one line, a body, harmless as a posted text and without switches."""
    subject, _, body = redact(message).strip().partition("\n")
    # The joiner that `harmless` uses: readable, and no switch any more.
    said = [
        _SKIP.sub(lambda found: f"{found[0]}\u2060", part) for part in (one_line(subject, SUBJECT_CHARS), harmless(body).strip())
    ]
    return cut("\n\n".join(part for part in said if part), BODY_CHARS) + "\n"
