"""Who is remediated, with which other findings, on which branch, and when a merged fix has to show (contract 13)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID

from kilo_pipelines.core.loops import REMEDIATION_BRANCHES
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.services.permissions import may
from kilo_pipelines.services.security.analysis import is_fresh
from kilo_pipelines.services.security.config import SecurityConfig, reaches, selects

SERVICE = "remediation"
Origin = Literal["manual", "automatic", "bulk"]
# Whoever asked by hand goes first, then what one command asked for, then the rest (contract 13.1; here the higher goes first).
PRIORITY: dict[Origin, int] = {"manual": 50, "bulk": 30, "automatic": 0}
# Ten advisories at 6,000 characters are as much text as one conversation of a review.
MAX_FINDINGS = 10
# Syncs by the clock are six hours apart, others as often as somebody asks: Dependabot looks at a merge within minutes, and whatever
# takes it 18 hours is worth a person's look.
CONFIRMING_SYNCS = 3
CONFIRMING_TIME = timedelta(hours=6) * CONFIRMING_SYNCS
# A closed pull request that nobody opened again within a month was declined.
REOPENED_WITHIN = timedelta(days=30)
# A segment of a branch's name, and the advisory's own (contract 13.1: at most 36 each).
SEGMENT = 36

EarlierState = Literal["active", "pull_open", "pull_done", "blocked", "no_changes_needed", "failed", "cancelled"]
AfterMerge = Literal["confirmed", "unconfirmed", "set_aside"]
# Ends after which a person may ask again for the same analysis.
RETRYABLE: frozenset[EarlierState] = frozenset({"blocked", "no_changes_needed", "failed", "cancelled"})
# Ends after which a command over all findings doesn't try the same analysis again. The platform itself tries each only once.
SETTLED: frozenset[EarlierState] = frozenset({"pull_done", "blocked", "no_changes_needed"})


@dataclass(frozen=True)
class Earlier:
    """A remediation that a finding had or has; the fingerprint is of the first of its findings."""

    state: EarlierState
    fingerprint: str
    opened_at: datetime


@dataclass(frozen=True)
class Case:
    """What admission looks at. `connected`: a working installation sees the repository; `earlier`: newest first."""

    finding: Any | None
    enabled: bool
    config: SecurityConfig
    connected: bool
    analysis: Any | None
    earlier: Sequence[Earlier] = ()


def earlier_state(row: Any) -> EarlierState:
    """What a remediation's row says of it.

    A merged pull request counts as open until its fix has shown, was missed or isn't asked for any more; one that could not be opened has failed.
    """
    if row.state in ("failed", "cancelled"):
        return "failed" if row.state == "failed" else "cancelled"
    if row.state != "completed":
        return "active"
    if row.reason == Reason.REMEDIATION_BLOCKED:
        return "blocked"
    if row.reason == Reason.NO_CHANGES_NEEDED:
        return "no_changes_needed"
    if row.effect_state in ("dropped", "dead"):
        return "failed"
    over = row.pull_state == "closed" or any((row.confirmed_at, row.flagged_at, row.set_aside_at))
    return "pull_done" if over else "pull_open"


def may_act(role: str | None) -> Reason | None:
    """Why somebody may not start, retry or cancel; the platform itself acts without a role."""
    return None if role is None or may(role, "remediate") else Reason.ROLE_NOT_ALLOWED


def refusal(case: Case, origin: Origin, *, retry: bool = False) -> Reason | None:
    """Why a finding isn't remediated: the first of contract 13.1's reasons that holds; None when it is."""
    return _of_any(case) or (_by_hand(case, retry) if origin == "manual" else _by_itself(case, origin))


def _of_any(case: Case) -> Reason | None:
    finding, analysis = case.finding, case.analysis
    if finding is None:
        return Reason.FINDING_NOT_FOUND
    if finding.status != "open":
        return Reason.FINDING_NOT_OPEN
    if not case.enabled:
        return Reason.SECURITY_DISABLED
    if not case.connected or not selects(case.config, finding.repository_id):
        return Reason.REPO_NOT_IN_SCOPE
    if analysis is None or analysis.completed_at is None:
        return Reason.ANALYSIS_REQUIRED
    if analysis.deep is None:
        return Reason.SANDBOX_ANALYSIS_REQUIRED
    if not is_fresh(analysis.snapshot, finding):
        return Reason.STALE_ANALYSIS
    states = {one.state for one in case.earlier}
    if "active" in states:
        return Reason.REMEDIATION_ACTIVE
    return Reason.PR_ALREADY_OPENED if "pull_open" in states else None


def _by_hand(case: Case, retry: bool) -> Reason | None:
    assert case.analysis is not None and case.finding is not None  # noqa: S101  # asked before
    deep = case.analysis.deep
    if deep["action"] == "monitor":
        return Reason.MONITOR_REQUIRED
    if deep["exploitable"] is not False and deep["action"] not in ("open_pr", "manual_review"):
        return Reason.EXPLOITABILITY_UNKNOWN if deep["exploitable"] == "unknown" else Reason.TRIAGE_ONLY
    if not is_concrete(case.finding, deep):
        return Reason.ACTION_NOT_CONCRETE
    again = any(one.state in RETRYABLE for one in case.earlier)
    if retry:
        return None if again else Reason.RETRY_NOT_ALLOWED
    return None if again else _duplicate(case)


def _by_itself(case: Case, origin: Origin) -> Reason | None:
    assert case.analysis is not None and case.finding is not None  # noqa: S101  # asked before
    deep, config = case.analysis.deep, case.config
    since = config.auto_remediation_enabled_at
    ordered = (
        (deep["exploitable"] is False, Reason.NOT_EXPLOITABLE),
        (deep["exploitable"] == "unknown", Reason.EXPLOITABILITY_UNKNOWN),
        (deep["action"] == "manual_review", Reason.MANUAL_REVIEW_REQUIRED),
        (deep["action"] == "monitor", Reason.MONITOR_REQUIRED),
        (deep["action"] != "open_pr", Reason.TRIAGE_ONLY),
        (not is_concrete(case.finding, deep), Reason.ACTION_NOT_CONCRETE),
        (not config.auto_remediation_enabled, Reason.AUTO_REMEDIATION_DISABLED),
        (config.auto_remediation_require_approval, Reason.APPROVAL_REQUIRED),
        (origin == "bulk" and not config.auto_remediation_include_existing, Reason.INCLUDE_EXISTING_DISABLED),
        (not reaches(case.finding.severity, config.auto_remediation_min_severity), Reason.BELOW_THRESHOLD),
        (origin == "automatic" and (since is None or case.analysis.completed_at < since), Reason.BEFORE_ENABLEMENT),
    )
    return next((reason for holds, reason in ordered if holds), None) or _duplicate(case, once=origin == "automatic")


def _duplicate(case: Case, *, once: bool = False) -> Reason | None:
    """`once`: whatever became of it, since a cancel is a person's word, and a failure would be repeated by every sweep."""
    own = fingerprint(case.finding, case.analysis)
    known = any(one.state in SETTLED and one.fingerprint == own for one in case.earlier)
    if once:
        assert case.analysis is not None  # noqa: S101  # asked before
        since = case.analysis.completed_at
        known = any(one.fingerprint == own or one.opened_at >= since for one in case.earlier)
    return Reason.DUPLICATE_ANALYSIS_RESULT if known else None


def is_concrete(finding: Any, deep: dict[str, Any]) -> bool:
    """Whether it is known what to do: a patched version of a named package, or a fix in words."""
    return bool(finding.package_name and finding.patched_version) or bool(deep["suggested_fix"].strip())


def fingerprint(finding: Any, analysis: Any) -> str:
    """What a remediation rests on, as SHA-256 in hex: the same finding, package, fix and analysis."""
    deep = analysis.deep
    told = {
        "finding": str(finding.id),
        "repository": finding.repository_id,
        "package": finding.package_name,
        "ecosystem": finding.package_ecosystem,
        "manifest": finding.manifest_path,
        "patched_version": finding.patched_version,
        "analysis": str(analysis.item_id),
        "completed_at": analysis.completed_at.isoformat(),
        **{name: deep[name] for name in ("exploitable", "action", "suggested_fix", "locations", "summary")},
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# -- several findings of one package --------------------------------------------------------------------------------------


def package_of(finding: Any) -> tuple[int, str, str, str]:
    """What one pull request changes: a package of a manifest of a repository."""
    return finding.repository_id, finding.package_ecosystem, finding.package_name, finding.manifest_path


def subject_of(finding: Any) -> str:
    """The subject of which one remediation is live at a time: names are a stranger's text, so they are hashed."""
    named = json.dumps(package_of(finding)[1:], ensure_ascii=True).encode()
    return f"github:{finding.repository_id}:package:{hashlib.sha256(named).hexdigest()[:32]}"


def joined(first: Any, others: Iterable[Any], analyses: dict[UUID, Any]) -> list[Any]:
    """The findings that one change ends, `first` first: open ones of its package with its patch, or with a fresh call for a change."""

    def joins(other: Any) -> bool:
        if other.id == first.id or other.status != "open" or package_of(other) != package_of(first):
            return False
        if first.patched_version and other.patched_version == first.patched_version:
            return True
        analysis = analyses.get(other.id)
        if analysis is None or analysis.deep is None or not is_fresh(analysis.snapshot, other):
            return False
        return analysis.deep["action"] == "open_pr" and is_concrete(other, analysis.deep)

    return [first, *sorted(filter(joins, others), key=lambda one: str(one.id))[: MAX_FINDINGS - 1]]


def target_version(findings: Sequence[Any]) -> str | None:
    """The highest patched version among them, numbers compared as numbers; None when none has one."""
    known = [one.patched_version for one in findings if one.patched_version]
    return max(known, key=_rank, default=None)


def _rank(version: str) -> tuple[list[tuple[int, int, str]], bool]:
    """Numbers before words, as in most ecosystems; what has a suffix (`-rc.1`) stands before what has none."""
    core, _, suffix = version.partition("-")
    parts = re.findall(r"\d{1,18}|[A-Za-z]+", core)
    return [(1, int(one), "") if one.isdigit() else (0, 0, one) for one in parts], not suffix


def branch_of(item_id: UUID, attempt: int, finding: Any) -> str:
    """The branch of one attempt; conforms to the session protocol whatever the package is called."""
    advisory = finding.ghsa_id or finding.cve_id or finding.source_id
    named = "-".join(filter(None, (_segment(finding.package_name), _segment(advisory)))) or "package"
    return f"{REMEDIATION_BRANCHES}/{named}/{item_id.hex[:10]}/{attempt}"


def _segment(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:SEGMENT].strip("-")


# -- after the merge ------------------------------------------------------------------------------------------------------


def after_merge(statuses: Collection[str], syncs: int, waited: timedelta) -> AfterMerge | None:
    """What a merge has led to after `syncs` more syncs in this time, by the states of its findings; None: wait.

    `set_aside`: none is open, but not because of a fix: somebody dismissed one, or it is gone.
    """
    if "open" in statuses:
        return "unconfirmed" if syncs >= CONFIRMING_SYNCS and waited >= CONFIRMING_TIME else None
    return "confirmed" if set(statuses) == {"fixed"} else "set_aside"
