"""Asking for dismissals: by a person, by a completed analysis where the owner wants that, and in bulk."""

from __future__ import annotations

from collections import Counter
from uuid import UUID

from kilo_pipelines.acts.common import Log, enabled_config
from kilo_pipelines.acts.known_exploited import known_exploited
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.text import storable
from kilo_pipelines.services.permissions import may
from kilo_pipelines.services.security import dismissal as rules
from kilo_pipelines.services.security.dismissal import SERVICE, Origin
from kilo_pipelines.store import AnalysisRow, FindingRow, NewItem, Store

# Findings that are looked at together.
PAGE = 200


def dismiss(store: Store, finding: FindingRow, *, role: str, actor: str, reason: str, comment: str) -> UUID | Reason:
    """A person dismisses a finding: the item that does it, or why there is none (contract 11.1)."""
    refusal = rules.by_person(role, finding)
    if refusal is not None:
        return refusal
    analysis = store.analyses.latest(finding.owner_id, [finding.id]).get(finding.id)
    return _open(store, finding, "manual", actor, reason, comment, analysis) or Reason.DISMISSAL_ACTIVE


def after_analysis(store: Store, owner_id: UUID, finding_id: UUID, log: Log) -> None:
    """What a completed analysis dismisses by itself, where its owner wants that; each analysis at most once."""
    answer = _automatic(store, owner_id, finding_id)
    log.info(f"finding {finding_id}: " + (f"no dismissal ({answer})" if isinstance(answer, Reason) else f"dismissal {answer}"))


def _automatic(store: Store, owner_id: UUID, finding_id: UUID) -> UUID | Reason:
    finding = store.findings.get(owner_id, finding_id)
    config = enabled_config(store, owner_id)
    if finding is None or config is None:
        return Reason.FINDING_NOT_FOUND if finding is None else Reason.SECURITY_DISABLED
    analysis = store.analyses.latest(owner_id, [finding_id]).get(finding_id)
    grounds = rules.automatic(config, finding, analysis, known_exploited())
    if isinstance(grounds, Reason):
        return grounds
    assert analysis is not None  # noqa: S101  # without one there are no grounds
    # Whoever opened it again has the last word on this analysis.
    if store.findings.dismissed_on(owner_id, analysis.item_id):
        return Reason.DUPLICATE_ANALYSIS_RESULT
    opened = _open(store, finding, "automatic", "platform", "not_used", grounds.reasoning, analysis)
    return opened or Reason.DISMISSAL_ACTIVE


def dismiss_many(store: Store, owner_id: UUID, *, role: str, actor: str, apply: bool) -> Counter[str] | Reason:
    """What a bulk dismissal finds among all open findings, by confidence or by the reason why not; with `apply` they are asked for."""
    config = enabled_config(store, owner_id)
    if config is None:
        return Reason.SECURITY_DISABLED
    if not may(role, "dismiss"):
        return Reason.ROLE_NOT_ALLOWED
    counted: Counter[str] = Counter()
    catalogue = known_exploited()
    after = None
    while page := store.findings.open_after(owner_id, after, limit=PAGE):
        after = page[-1].id
        analyses = store.analyses.latest(owner_id, [one.id for one in page])
        for finding in page:
            analysis = analyses.get(finding.id)
            grounds = rules.bulk(config, finding, analysis, catalogue)
            if isinstance(grounds, Reason):
                counted[str(grounds)] += 1
            elif apply and _open(store, finding, "bulk", actor, "not_used", grounds.reasoning, analysis) is None:
                counted[str(Reason.DISMISSAL_ACTIVE)] += 1
            else:
                assert analysis is not None and analysis.triage is not None  # noqa: S101  # the grounds are out of it
                counted[f"confidence {analysis.triage['confidence']}"] += 1
    return counted


def _open(
    store: Store, finding: FindingRow, origin: Origin, actor: str, reason: str, comment: str, analysis: AnalysisRow | None
) -> UUID | None:
    details = {
        "finding_id": str(finding.id),
        "origin": origin,
        "requested_by": actor,
        "reason": reason,
        "comment": storable(comment),
        "analysis_id": str(analysis.item_id) if analysis else None,
    }
    # A person waits for it; what nobody asked for doesn't stand before him.
    priority = 100 if origin == "manual" else 0
    new = NewItem(SERVICE, f"finding:{finding.id}", finding.repository_id, priority, details)
    return store.queue.open(finding.owner_id, new, actor=actor)
