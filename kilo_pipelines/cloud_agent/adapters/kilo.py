"""The Kilo CLI, headless (contract: cloud agent, part D, verified for exactly this version)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kilo_pipelines.cloud_agent.adapters import BASE_URL, HOME, OUT

VERSION = "7.7.9"

# Reviewing reads; it writes one file, its result, outside the checkout. Tools that outlive the run are denied.
_PERMISSION: dict[str, Any] = {
    "*": "deny",
    "read": "allow",
    "grep": "allow",
    "glob": "allow",
    "list": "allow",
    "write": {"*": "deny", f"{OUT}/**": "allow", "**/out/result.json": "allow"},
    "edit": {"*": "deny", f"{OUT}/**": "allow", "**/out/result.json": "allow"},
    "external_directory": {"*": "deny", f"{OUT}/*": "allow", f"{OUT}/**": "allow"},
    "bash": {"*": "deny", "git diff *": "allow", "git log *": "allow", "git show *": "allow", "git status*": "allow"},
}


# A write session edits the checkout and runs its tools, package managers among them; what it may not do the sandbox refuses.
_WRITE_PERMISSION: dict[str, Any] = {**_PERMISSION, **dict.fromkeys(("write", "edit", "bash"), "allow")}


class KiloAdapter:
    """Starts `kilo run` on the prompt from stdin."""

    name = "kilo"
    version = VERSION

    def __init__(self, package: Path) -> None:
        self._package = package

    def argv(self) -> list[str]:
        return ["/opt/agent/bin/kilo", "run", "--format", "json", "--auto", "--pure"]

    def env(self, model: str, *, writes: bool) -> dict[str, str]:
        provider = {
            "npm": "@ai-sdk/openai-compatible",
            "name": "proxy",
            "options": {"baseURL": BASE_URL, "apiKey": "session"},
            "models": {model: {"name": model, "limit": {"context": 200_000, "output": 32_000}}},
        }
        config = {
            "provider": {"proxy": provider},
            "model": f"proxy/{model}",
            "small_model": f"proxy/{model}",
            "share": "disabled",
            "autoupdate": False,
            "snapshot": False,
            "lsp": False,
            "formatter": False,
            "permission": _WRITE_PERMISSION if writes else _PERMISSION,
        }
        switched_off = (
            "KILO_DISABLE_PROJECT_CONFIG",
            "KILO_NO_DAEMON",
            "KILO_DISABLE_SESSION_INGEST",
            "KILO_DISABLE_AUTOUPDATE",
            "KILO_DISABLE_MODELS_FETCH",
            "KILO_DISABLE_LSP_DOWNLOAD",
            "KILO_DISABLE_DEFAULT_PLUGINS",
            "KILO_DISABLE_EXTERNAL_SKILLS",
            "KILO_DISABLE_CLAUDE_CODE",
            "KILO_DISABLE_SHARE",
            "KILO_PURE",
        )
        return {
            "HOME": HOME,
            # Its search tools start `rg` from there.
            "PATH": "/opt/agent/bin:/usr/local/bin:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "TERM": "dumb",
            "KILO_CONFIG_CONTENT": json.dumps(config),
            "KILO_TELEMETRY_LEVEL": "off",
            "KILO_SESSION_RETRY_LIMIT": "2",
            **dict.fromkeys(switched_off, "1"),
        }

    def readonly(self) -> dict[Path, str]:
        return {self._package: "/opt/agent"}

    def failed(self, exit_status: int, events: Iterable[dict[str, object]]) -> bool:
        """Any error event is a failure, whatever the exit status says (contract D5)."""
        return exit_status != 0 or any(event.get("type") == "error" for event in events)
