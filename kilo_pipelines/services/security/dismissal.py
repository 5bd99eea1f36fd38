"""Dismissals: who may, what may be dismissed without a person, and what a dismissal rests on (contract 11).

The local decision and the source's state are separate columns; the write to the source is an effect. A dismissal is bound to the
files and the uses that it was decided on, and is over when they change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args
from uuid import UUID

from kilo_pipelines.core.effects import EffectIntent, EffectKind
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.text import harmless
from kilo_pipelines.services.permissions import may
from kilo_pipelines.services.security.analysis import Triage, is_fresh
from kilo_pipelines.services.security.config import SecurityConfig

SERVICE = "dismissal"
Origin = Literal["manual", "automatic", "bulk"]
DismissalReason = Literal["fix_started", "no_bandwidth", "tolerable_risk", "inaccurate", "not_used"]
REASONS: tuple[str, ...] = get_args(DismissalReason)
# GitHub refuses longer comments (contract 11.3); it counts as the web does, in UTF-16 units.
COMMENT_UNITS = 280
CONFIDENCES = {"high": 0, "medium": 1, "low": 2}
# Whatever package managers lock with. Project files of .NET have names of their own: an alert names the one that it is about.
LOCK_FILES = (
    "package-lock.json",
    "npm-shrinkwrap.json",
    "yarn.lock",
    "pnpm-lock.yaml",
    "bun.lock",
    "bun.lockb",
    "poetry.lock",
    "Pipfile.lock",
    "pdm.lock",
    "uv.lock",
    "requirements.txt",
    "Cargo.lock",
    "go.sum",
    "Gemfile.lock",
    "composer.lock",
    "gradle.lockfile",
    "packages.lock.json",
    "pubspec.lock",
    "mix.lock",
)
MANIFESTS = (
    "package.json",
    "pnpm-workspace.yaml",
    "pyproject.toml",
    "Pipfile",
    "Cargo.toml",
    "go.mod",
    "Gemfile",
    "composer.json",
    "pom.xml",
    "build.gradle",
    "build.gradle.kts",
    "Directory.Packages.props",
    "pubspec.yaml",
    "mix.exs",
)
# Of a deeper manifest the nearest ones and the root: a path has room for five hundred directories, a command line hasn't.
MAX_DIRECTORIES = 20


@dataclass(frozen=True)
class Grounds:
    """What speaks for a dismissal: whose word (`disposition_by`) and why, in one sentence of the analysis."""

    by: Literal["auto-triage", "auto-sandbox", "auto-triage-bulk"]
    reasoning: str


def by_person(role: str, finding: Any) -> Reason | None:
    """Why a person's dismissal isn't made; None when it is. Owners only (contract 2); the severity doesn't matter."""
    if not may(role, "dismiss"):
        return Reason.ROLE_NOT_ALLOWED
    return dismissable(finding)


def dismissable(finding: Any) -> Reason | None:
    """Why a finding can't be dismissed at all."""
    if finding.status != "open":
        return Reason.FINDING_NOT_OPEN
    if (finding.source == "dependabot" and not finding.source_id.isascii()) or not finding.source_id.isdecimal():
        return Reason.INVALID_DISMISS_TARGET
    return None


def automatic(config: SecurityConfig, finding: Any, analysis: Any, known_exploited: Collection[str] | None) -> Grounds | Reason:
    """Grounds on which a finding is dismissed without a person, or why it isn't (contract 11.2).

    `known_exploited`: CVE ids of the operator's catalogue; None when there is none, and then nothing is dismissed automatically.
    """
    if not config.auto_dismiss_enabled:
        return Reason.AUTO_DISMISS_DISABLED
    refusal = _protected(finding, analysis, known_exploited)
    if refusal is not None:
        return refusal
    if analysis.deep is not None:
        deep = analysis.deep
        if deep["exploitable"] is False and deep["action"] == "dismiss" and deep["search"]:
            return Grounds("auto-sandbox", deep["summary"])
        return Reason.ANALYSIS_SPEAKS_AGAINST
    return _by_triage(config, analysis, "auto-triage")


def bulk(config: SecurityConfig, finding: Any, analysis: Any, known_exploited: Collection[str] | None) -> Grounds | Reason:
    """The same for a person's one command over many: what the metadata alone say, where no repository was read (contract 11.3)."""
    refusal = _protected(finding, analysis, known_exploited)
    if refusal is not None:
        return refusal
    if analysis.deep is not None:
        return Reason.ANALYSIS_SPEAKS_AGAINST
    return _by_triage(config, analysis, "auto-triage-bulk")


def _protected(finding: Any, analysis: Any, known_exploited: Collection[str] | None) -> Reason | None:
    refusal = dismissable(finding)
    if refusal is not None:
        return refusal
    if _is_a_persons(finding, known_exploited or ()):
        return Reason.NEVER_DISMISSED
    if known_exploited is None:
        return Reason.CATALOGUE_MISSING
    if analysis is None:
        return Reason.ANALYSIS_REQUIRED
    return None if is_fresh(analysis.snapshot, finding) else Reason.STALE_ANALYSIS


def _is_a_persons(finding: Any, known_exploited: Collection[str]) -> bool:
    """Whether people alone dismiss it: it is critical, or known to be exploited."""
    return finding.severity == "critical" or (finding.cve_id is not None and finding.cve_id.upper() in known_exploited)


def outlived(finding: Any, known_exploited: Collection[str] | None) -> Reason | None:
    """Why a dismissal is over whatever became of its ground: the rules wouldn't make it of the finding as it is now.

    Never of a single one by a person. Without a catalogue what was dismissed under one stands: a lost file says nothing of findings.
    """
    if finding.disposition_by == "manual":
        return None
    if _is_a_persons(finding, known_exploited or ()):
        return Reason.NEVER_DISMISSED
    return None if is_fresh(finding.disposition_evidence.get("snapshot"), finding) else Reason.STALE_ANALYSIS


def _by_triage(config: SecurityConfig, analysis: Any, by: Literal["auto-triage", "auto-triage-bulk"]) -> Grounds | Reason:
    if analysis.triage is None:
        return Reason.ANALYSIS_REQUIRED
    told = Triage.model_validate(analysis.triage)
    if told.fallback or told.needs_deep or told.action != "dismiss":
        return Reason.ANALYSIS_SPEAKS_AGAINST
    if CONFIDENCES[told.confidence] > CONFIDENCES[config.auto_dismiss_confidence]:
        return Reason.CONFIDENCE_TOO_LOW
    return Grounds(by, told.reasoning)


def units(text: str) -> int:
    """Length as the web counts it."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def comment_of(text: str) -> str:
    """The comment that stands at the source: one harmless line, ours by its beginning, at most what GitHub takes."""
    whole = f"[kilo-pipelines] {' '.join(harmless(text).split())}".rstrip()
    if units(whole) <= COMMENT_UNITS:
        return whole
    kept = ""
    for letter in whole:
        if units(kept + letter) > COMMENT_UNITS - 1:
            break
        kept += letter
    return kept + "…"


# -- what it rests on -----------------------------------------------------------------------------------------------------


def paths_of(manifest_path: str) -> list[str]:
    """Files whose content a dismissal rests on: the manifest, and whatever may lie beside it, or above as in workspaces, to declare or lock.

    The path is a stranger's text; what it names lies in the tree, or nowhere.
    """
    parts = [one for one in manifest_path.split("/") if one not in ("", ".", "..")]
    above = ["".join(f"{one}/" for one in parts[:depth]) for depth in range(len(parts) - 1, -1, -1)]
    known = [directory + name for directory in (*above[:MAX_DIRECTORIES], "") for name in (*MANIFESTS, *LOCK_FILES)]
    return list(dict.fromkeys(["/".join(parts), *known] if parts else known))


def binding(commit: str, files: Mapping[str, str], hits: Iterable[tuple[str, str]], search: list[str]) -> dict[str, Any]:
    """What is kept of a tree: the ids of its files, and one hash over every line that the search hits; where a line stands doesn't matter."""
    lines = sorted(f"{path}\0{line}" for path, line in hits)
    return {
        "commit": commit,
        "files": dict(sorted(files.items())),
        "search": search,
        "hits": len(lines),
        "hits_sha256": hashlib.sha256(json.dumps(lines).encode()).hexdigest(),
    }


def still_holds(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a dismissal's ground is the same, at whatever commit."""
    return all(before[name] == now[name] for name in ("files", "search", "hits_sha256"))


# -- what is written to the source ----------------------------------------------------------------------------------------


def _subject(finding: Any) -> str:
    return f"github:{finding.repository_id}:alert:{finding.source_id}"


def dismiss_effect(item_id: UUID, finding: Any, full_name: str, reason: str, comment: str) -> EffectIntent:
    """The alert is dismissed at GitHub with our comment."""
    return EffectIntent(
        kind=EffectKind.GITHUB_DISMISS_ALERT,
        intent_key=f"dismissal:{item_id}:dismiss",
        subject_key=_subject(finding),
        payload={"full_name": full_name, "number": int(finding.source_id), "reason": reason, "comment": comment_of(comment)},
    )


def reopen_effect(item_id: UUID, finding: Any, full_name: str, mark: str) -> EffectIntent:
    """The alert is opened at GitHub again; `mark` tells this time from another one."""
    return EffectIntent(
        kind=EffectKind.GITHUB_REOPEN_ALERT,
        intent_key=f"dismissal:{item_id}:reopen:{mark}",
        subject_key=_subject(finding),
        payload={"full_name": full_name, "number": int(finding.source_id)},
    )
