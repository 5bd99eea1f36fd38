"""Reading a unified diff: which lines of a file may carry a comment (GitHub: lines inside the diff's hunks)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_HUNK = re.compile(r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


class Hunk(NamedTuple):
    """Line ranges of one hunk: the old file's (LEFT) and the new file's (RIGHT), each as first line and number of lines."""

    old_start: int
    old_lines: int
    new_start: int
    new_lines: int

    def holds(self, side: str, line: int) -> bool:
        """Whether a line of a side lies in this hunk."""
        start, count = (self.new_start, self.new_lines) if side == "RIGHT" else (self.old_start, self.old_lines)
        return start <= line < start + count


def hunks_of(text: str) -> list[Hunk]:
    """Hunks of one file's unified diff; what looks like a hunk header inside a hunk's own lines is content."""
    hunks: list[Hunk] = []
    old_left = new_left = 0
    for line in text.split("\n"):
        if old_left <= 0 and new_left <= 0:
            match = _HUNK.match(line)
            if match:
                hunk = Hunk(int(match[1]), int(match[2] or 1), int(match[3]), int(match[4] or 1))
                hunks.append(hunk)
                old_left, new_left = hunk.old_lines, hunk.new_lines
        elif line.startswith("+"):
            new_left -= 1
        elif line.startswith("-"):
            old_left -= 1
        elif not line.startswith("\\"):
            old_left, new_left = old_left - 1, new_left - 1
    return hunks


def commentable(hunks: Sequence[Hunk], side: str, line: int, start_line: int | None = None) -> bool:
    """Whether a comment on these lines lies inside one hunk."""
    first = line if start_line is None else start_line
    return first <= line and any(hunk.holds(side, first) and hunk.holds(side, line) for hunk in hunks)
