"""Reading a unified diff: which lines of a file may carry a comment (GitHub: lines inside the diff's hunks)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_HUNK = re.compile(r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


@dataclass(frozen=True)
class DiffLines:
    """Line numbers by side: RIGHT is the new file, LEFT the old; `hunks` keep multi-line ranges inside one hunk."""

    right: frozenset[int] = frozenset()
    left: frozenset[int] = frozenset()
    hunks: tuple[tuple[frozenset[int], frozenset[int]], ...] = field(default=())

    def holds(self, side: str, line: int, start_line: int | None = None) -> bool:
        """Whether a comment on these lines lies inside one hunk."""
        lines = self.right if side == "RIGHT" else self.left
        if line not in lines:
            return False
        if start_line is None or start_line == line:
            return True
        index = 0 if side == "RIGHT" else 1
        return start_line < line and any(start_line in hunk[index] and line in hunk[index] for hunk in self.hunks)


def diff_lines(text: str) -> DiffLines:
    """Lines of one file's unified diff. Text before the first hunk is ignored; lengths in the hunk headers are obeyed."""
    hunks: list[tuple[set[int], set[int]]] = []
    old = new = old_left = new_left = 0
    for line in text.split("\n"):
        if old_left <= 0 and new_left <= 0:
            match = _HUNK.match(line)
            if match:
                old, new = int(match[1]), int(match[3])
                old_left = int(match[2]) if match[2] is not None else 1
                new_left = int(match[4]) if match[4] is not None else 1
                hunks.append((set(), set()))
            continue
        right, left = hunks[-1]
        mark = line[:1]
        if mark == "+":
            right.add(new)
            new, new_left = new + 1, new_left - 1
        elif mark == "-":
            left.add(old)
            old, old_left = old + 1, old_left - 1
        elif mark == "\\":
            continue
        else:
            right.add(new)
            left.add(old)
            old, new, old_left, new_left = old + 1, new + 1, old_left - 1, new_left - 1
    return DiffLines(
        right=frozenset().union(*(hunk[0] for hunk in hunks)),
        left=frozenset().union(*(hunk[1] for hunk in hunks)),
        hunks=tuple((frozenset(right), frozenset(left)) for right, left in hunks),
    )
