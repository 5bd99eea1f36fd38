"""Adapters: how one agent program is started headless and how its end is read.

Holds: argv, environment, configuration and exit codes of each program. Does not belong here: the sandbox, the proxy, verdicts.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

# Fixed inside the sandbox's own network: nobody else is there.
RELAY_PORT = 8100
RELAY_URL = f"http://127.0.0.1:{RELAY_PORT}"
BASE_URL = f"{RELAY_URL}/v1"
REPO, OUT, HOME = "/work/repo", "/work/out", "/work/home"
RESULT_PATH = f"{OUT}/result.json"


class AgentAdapter(Protocol):
    """One agent program."""

    name: str
    version: str

    def argv(self) -> list[str]:
        """The program inside the sandbox; its prompt comes on stdin, its events go to stdout, one JSON object a line."""
        ...

    def env(self, model: str, *, writes: bool) -> dict[str, str]:
        """Its environment: no secret but a placeholder key (the proxy knows the session by its socket).

        `writes`: it may change the checkout and run programs there.
        """
        ...

    def readonly(self) -> dict[Path, str]:
        """Its files: where they lie and where they appear inside."""
        ...

    def failed(self, exit_status: int, events: Iterable[dict[str, object]]) -> bool:
        """Whether the run ended as an error."""
        ...
