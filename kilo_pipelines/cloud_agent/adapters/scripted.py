"""The scripted agent: a small agent loop in plain Python that asks the same model through the same proxy.

Deterministic and quick, for tests and the offline twin. `behaviour` makes it dishonest on purpose, for tests only; it is
given by whoever builds the runner, never by a repository or a brief.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kilo_pipelines.cloud_agent.adapters import BASE_URL, HOME
from kilo_pipelines.cloud_agent.sandbox import python_inside

BEHAVIOURS = (
    "honest",
    "no_turns",
    "wrong_commit",
    "invalid_result",
    "background_result",
    "empty_without_diff",
    "obey_attacker",
    "obedient",
    "crash",
    "hang",
    "slow",
    "blind",
    "no_result",
    "symlink_result",
    "explore",
    # Of write sessions; what each does is told in `inside/scripted_agent.py`.
    "write_edit",
    "write_hooks",
    "write_config",
    "write_alternates",
    "write_history",
    "write_setuid",
    "write_staged",
    "write_nothing",
    "write_no_repository",
    "write_repository",
    "write_repository_file",
    "write_submodule",
    "write_link",
    "write_inner_link",
    "write_link_moved",
    "write_link_for_directory",
    "write_workflow",
    "write_owners",
    "write_attributes",
    "write_foreign",
    "write_install_script",
    "write_yarn_release",
    "write_files",
    "write_huge",
    "write_pipe",
    "write_unreadable",
    "write_name",
    "write_git_name",
    "write_claim",
    "write_fetch",
)


class ScriptedAdapter:
    """Starts `scripted_agent.py` inside the sandbox."""

    name = "scripted"
    version = "1"

    def __init__(self, behaviour: str = "honest") -> None:
        if behaviour not in BEHAVIOURS:
            raise ValueError(f"behaviour must be one of {', '.join(BEHAVIOURS)}")
        self._behaviour = behaviour

    def argv(self) -> list[str]:
        return [python_inside(), "-I", "/opt/agent/scripted_agent.py", self._behaviour]

    def env(self, model: str, *, writes: bool) -> dict[str, str]:
        del writes  # nothing but the sandbox holds it back, which is what tests are about
        return {"HOME": HOME, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "AGENT_BASE_URL": BASE_URL, "AGENT_MODEL": model}

    def readonly(self) -> dict[Path, str]:
        return {Path(__file__).parent / "inside": "/opt/agent"}

    def failed(self, exit_status: int, events: Iterable[dict[str, object]]) -> bool:
        return exit_status != 0 or any(event.get("type") == "error" for event in events)
