"""The text of a remediation's pull request, from structured fields (threats, rule 13)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kilo_pipelines.core.redact import redact
from kilo_pipelines.core.text import cut, fence, harmless, one_line
from kilo_pipelines.services.security.remediation import target_version
from kilo_pipelines.services.security.remediation_brief import RemediationResult

# GitHub's limit for bodies is 65,536 characters; some room is left for what GitHub counts differently.
BODY_LIMIT = 60_000
# A title that a list of pull requests still shows whole.
TITLE_LIMIT = 120


def title_of(findings: Sequence[Any]) -> str:
    """One harmless line."""
    target = target_version(findings)
    name = findings[0].package_name
    return one_line(f"Update {name} to {target}" if target else f"Mend a vulnerability of {name}", TITLE_LIMIT)


def is_draft(result: RemediationResult) -> bool:
    """A change that nothing was run against is a draft, whatever its author thinks of it (contract 13.2)."""
    return result.draft or not result.validation


def body_of(findings: Sequence[Any], result: RemediationResult, item_id: str, details_url: str | None) -> str:
    """What is ended, what the agent says of its change, and what made it.

    The agent's words stand in fences: no link, mention or command of theirs is one.
    """
    lines = ["## Security update", "", "Ends these alerts once it is merged:", ""]
    lines += [f"- {_alert(one)}" for one in findings]
    lines += ["", "### What was changed", "", *_quoted(result.summary), "", "### What was checked", ""]
    lines += _quoted("\n".join(result.validation)) if result.validation else ["Nothing was run."]
    if result.risk_notes.strip():
        lines += ["", "### What to look at", "", *_quoted(result.risk_notes)]
    made = f"Made by kilo-pipelines as item `{item_id}`" + (f" ([the run]({details_url}))" if details_url else "")
    lines += ["", f"{made}. An agent wrote the change; nobody has reviewed it yet."]
    return cut(redact("\n".join(lines)), BODY_LIMIT)


def _alert(finding: Any) -> str:
    ids = ", ".join(_code(one) for one in (finding.ghsa_id, finding.cve_id) if one) or "an advisory without an id"
    place = f"{_code(finding.package_name)} in {_code(finding.manifest_path)}"
    return f"{finding.severity}: {ids} of {place}" + (
        f", mended in {_code(finding.patched_version)}" if finding.patched_version else ""
    )


def _code(text: str) -> str:
    """A name from outside as code on one line, which nothing in it can leave."""
    return f"`{one_line(text, 200).replace('`', '')}`"


def _quoted(text: str) -> list[str]:
    safe = harmless(text)
    mark = fence(safe)
    return [f"{mark}text", safe, mark]
