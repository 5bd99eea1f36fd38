"""Asking for analyses of findings: by a person, and by the settings of an owner."""

from __future__ import annotations

from uuid import UUID

from kilo_pipelines.acts.common import Log
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.work import WorkState
from kilo_pipelines.services.security import eligibility
from kilo_pipelines.services.security.analysis import is_fresh
from kilo_pipelines.services.security.config import SERVICE, SecurityConfig
from kilo_pipelines.store import FindingRow, Store

# Findings of an owner that one sweep brings in line; the next one goes on, the worst first.
SWEPT = 1_000
# Findings with their advisories that are held against what was analysed at once.
PAGE = 200


def queue_analyses(store: Store, owner_id: UUID, config: SecurityConfig, log: Log) -> int:
    """Brings the queue of automatic analyses in line with settings and findings; how many were opened.

    What is due and was never analysed is opened, what came back or isn't what was analysed any more is opened again (at most twice,
    then that is noted), and what waits without being due any more ends. Nothing is lost by a crash between a sync and this: the next
    sweep finds the same findings.
    """
    severities = eligibility.severities(config)
    for finding_id, item_id in store.analyses.waiting_automatic(owner_id).items():
        finding = store.findings.get(owner_id, finding_id)
        refusal = eligibility.automatic(config, finding.status, finding.severity) if finding else Reason.FINDING_NOT_FOUND
        if refusal is not None:
            store.queue.cancel(item_id, reason=refusal, actor="platform")
    if not severities:
        return 0
    since = None if config.auto_analysis_include_existing else config.auto_analysis_enabled_at
    due = store.analyses.candidates(owner_id, severities, since, eligibility.PASSING, limit=SWEPT)
    after = None
    while page := store.analyses.changed_since(owner_id, severities, since, eligibility.PASSING, after, limit=PAGE):
        after = page[-1][0].id
        known = store.analyses.latest(owner_id, [finding.id for finding, _ in page])
        for finding, origin in page:
            analysis = known.get(finding.id)
            if analysis is not None and not is_fresh(analysis.snapshot, finding) and finding.id not in due.get(origin, []):
                due.setdefault(origin, []).append(finding.id)
    looping = due.get("looping", [])
    for finding_id in looping:
        log.warning(f"finding {finding_id}: {Reason.ANALYSIS_LOOP}")
    store.analyses.open(owner_id, looping, origin="reopened", mode="auto", actor="platform", skip=Reason.ANALYSIS_LOOP)
    return sum(
        len(store.analyses.open(owner_id, due.get(origin, []), origin=origin, mode="auto", actor="platform"))
        for origin in ("automatic", "reopened")
    )


def analyse(
    store: Store, finding: FindingRow, *, role: str, actor: str, deep: bool = False, restart: bool = False
) -> UUID | Reason:
    """A person asks for an analysis: the item that does it, or why there is none (contract 10.4)."""
    refusal = eligibility.by_person(role, finding.status)
    if refusal is not None:
        return refusal
    setting = store.owners.config(finding.owner_id, SERVICE)
    if setting is None or not setting.enabled:
        return Reason.SECURITY_DISABLED
    for live in store.analyses.of_finding(finding.owner_id, finding.id):
        # What only waits because nobody asked for it gives way to who asks.
        if live.ended_at is None and (restart or (live.origin != "manual" and live.state == WorkState.WAITING)):
            store.queue.cancel(live.item_id, reason=Reason.SUPERSEDED, actor=actor)
    opened = store.analyses.open(
        finding.owner_id, [finding.id], origin="manual", mode="deep" if deep or restart else "auto", actor=actor
    )
    return opened[0] if opened else Reason.ANALYSIS_ACTIVE
