"""Points between two durable steps at which tests kill the process: around every commit and every write to a provider.

Holds: the points' names and the kill. Off unless `KILO_FAILPOINTS` names a directory; a file there with a point's name (for
example `before:queue.Queue.claim`) kills the next process that comes by, once. Does not belong here: which points exist; tests
derive them from the code.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)
# Frames that only carry a transaction or this call.
_CARRIERS = {"failpoints.py", "store/database.py"}

_directory: Path | None = None


def arm(directory: Path | None) -> None:
    """Looks for the points' files in this directory from now on; None: never looks."""
    global _directory  # one switch a process, like a signal handler
    _directory = directory


def reach(moment: str, place: str | None = None) -> None:
    """The process is at `moment` (`before` or `after`) of `place`; without one, of what its caller does."""
    if _directory is not None:
        _die_if_wanted(_directory, f"{moment}:{place or _place()}")


def _die_if_wanted(directory: Path, name: str) -> None:
    if (directory / "record").exists():
        with (directory / "record").open("a") as record:
            record.write(f"{name}\n")
    try:
        (directory / name).unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def _place() -> str:
    """Module and qualified name of the innermost function of ours that isn't a carrier."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE):
            relative = file[len(_PACKAGE) + 1 :]
            if relative not in _CARRIERS:
                return f"{relative.removesuffix('.py').replace('/', '.')}.{frame.f_code.co_qualname}"
        frame = frame.f_back  # type: ignore[assignment]  # None at the bottom ends the loop
    return "outside"
