"""Everything that is posted is rendered here, from structured fields (threats, rule 13)."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol

from kilo_pipelines.core.evidence import Evidence
from kilo_pipelines.core.protected import is_protected
from kilo_pipelines.core.reasons import MEANING
from kilo_pipelines.core.redact import redact
from kilo_pipelines.core.text import clean, cut, fence, harmless, one_line
from kilo_pipelines.core.verdict import SEVERITIES, Verdict

if TYPE_CHECKING:
    from kilo_pipelines.services.code_review.outcome import Finding, Sibling

# GitHub's limit for bodies is 65,536 characters; some room is left for what GitHub counts differently.
BODY_LIMIT = 60_000
LISTED_ENTRIES = 100

# A suggestion is one click away from being committed: besides what is protected anyway, none on what a package manager writes.
LOCKS = ("*.lock", "package-lock.json")

_SIGN = {"critical": "🔴", "warning": "🟠", "suggestion": "🔵"}


class _Place(Protocol):
    @property
    def path(self) -> str: ...


def withheld(path: str) -> bool:
    """Whether suggestions are withheld on this path."""
    return is_protected(path) or any(fnmatchcase(path, pattern) for pattern in LOCKS)


def inline_comment(finding: Finding, marker: str) -> str:
    """One review comment."""
    lines = [
        f"{_SIGN[finding.severity]} **{finding.severity.capitalize()}: {one_line(finding.title, 200)}**",
        "",
        harmless(finding.body),
    ]
    code = clean(finding.suggestion or "").rstrip("\n")
    # Code stands as it is, so code with a marker in it isn't offered: what holds one is ours.
    offered = finding.suggestion is not None and finding.side == "RIGHT" and "<!-- kilo-pipelines:" not in code
    if offered and not withheld(finding.path):
        mark = fence(code)
        lines += ["", f"{mark}suggestion", code, mark]
    return cut(redact("\n".join(lines)), BODY_LIMIT) + f"\n\n{marker}"


def review_body(count: int, marker: str) -> str:
    """The body above the inline comments."""
    return f"{count} finding{'s' if count != 1 else ''} on this change; the summary is in the conversation.\n\n{marker}"


def summary_comment(
    summary: str,
    findings: Sequence[Finding],
    elsewhere: Sequence[Finding],
    repeated: int,
    head: str,
    evidence: list[str],
    marker: str,
) -> str:
    """The one summary comment, updated in place."""
    counts = ", ".join(
        f"{_SIGN[severity]} {sum(1 for one in findings if one.severity == severity)} {severity}" for severity in SEVERITIES
    )
    lines = ["## Code review", "", f"Reviewed commit `{head[:12]}`: {counts}.", "", harmless(summary)]
    if elsewhere:
        lines += ["", "### Findings outside the diff's lines", ""]
        for finding in elsewhere:
            place = f"`{one_line(finding.path, 200).replace('`', '')}:{finding.line}`"
            lines.append(f"- {_SIGN[finding.severity]} {place} **{one_line(finding.title, 200)}**: {one_line(finding.body, 500)}")
    if repeated:
        lines += ["", f"{repeated} finding{'s stand' if repeated != 1 else ' stands'} in earlier comments already."]
    lines += ["", "### What was reviewed", "", *evidence]
    return cut(redact("\n".join(lines)), BODY_LIMIT) + f"\n\n{marker}"


def evidence_lines(evidence: Evidence | None) -> list[str]:
    """The evidence record for people."""
    if evidence is None:
        return ["- no evidence: nothing was reviewed"]
    lines = [
        f"- evidence: {evidence.evidence_class}; {evidence.covered} of {evidence.changed_blobs} changed blobs reached the model in"
        f" {evidence.turns} completed turn{'s' if evidence.turns != 1 else ''}",
        f"- base `{evidence.merge_base[:12]}`, head `{evidence.head[:12]}`, diff `{evidence.diff_hash[:12]}`",
        f"- agent {one_line(evidence.agent, 50)} {one_line(evidence.agent_version, 30)}, model {one_line(evidence.model, 80)},"
        f" {evidence.tokens_in} tokens in, {evidence.tokens_out} out",
    ]
    if evidence.policy_commit:
        lines.append(
            f"- REVIEW.md of `{evidence.policy_commit[:12]}`{', cut at its size limit' if evidence.policy_truncated else ''}"
        )
    excluded = [entry for entry in evidence.ledger if entry.excluded]
    if excluded:
        lines.append(f"- excluded by the owner's settings: {_paths(excluded)}")
    binary = [entry for entry in evidence.ledger if entry.binary]
    if binary:
        lines.append(f"- binary content, named to the model and not shown to it: {_paths(binary)}")
    if evidence.gaps:
        lines.append(f"- **never reached the model**: {_paths(evidence.gaps)}")
    return lines


def _paths(entries: Sequence[_Place]) -> str:
    shown = ", ".join(f"`{one_line(entry.path, 120).replace('`', '')}`" for entry in entries[:LISTED_ENTRIES])
    return shown + (f" and {len(entries) - LISTED_ENTRIES} more" if len(entries) > LISTED_ENTRIES else "")


def check_texts(
    verdict: Verdict,
    counts: dict[str, int],
    evidence: Evidence | None,
    session_id: str,
    pull_number: int,
    siblings: Sequence[Sibling],
) -> tuple[str, str]:
    """Title and summary of the check run."""
    meaning, remedy = MEANING[verdict.reason]
    total = sum(counts.values())
    if verdict.earned:
        title = f"{total} finding{'s' if total != 1 else ''}" + (f", {counts['critical']} critical" if counts["critical"] else "")
    else:
        title = f"Not reviewed: {verdict.reason}"
    lines = [f"{meaning} ({verdict.reason})", "", f"Pull request #{pull_number}."]
    if verdict.reason != "reviewed":
        lines += ["", f"What to do: {remedy}"]
    lines += ["", *evidence_lines(evidence)]
    if session_id:
        lines.append(f"- session `{session_id}`")
    for sibling in siblings:
        lines.append(f"- shares this head with #{sibling.pull_number}: {sibling.conclusion or sibling.state}")
    return title, cut(redact("\n".join(lines)), BODY_LIMIT)
