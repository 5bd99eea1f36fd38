"""Asking for remediations, cancelling them, and what their admission looks at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from kilo_pipelines.acts.common import Log
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.services.security import remediation as rules
from kilo_pipelines.services.security.config import SERVICE as SETTINGS
from kilo_pipelines.services.security.config import SecurityConfig
from kilo_pipelines.services.security.findings import event_key
from kilo_pipelines.services.security.remediation import SERVICE, Origin
from kilo_pipelines.store import AnalysisRow, FindingRow, NewFindingEvent, NewItem, RemediationRow, Store, SyncTarget

# Findings that are looked at together: a page of one statement each for their analyses and earlier remediations.
PAGE = 200


@dataclass(frozen=True)
class _Owner:
    """An owner's settings and the repositories that its working installations see."""

    enabled: bool
    config: SecurityConfig
    repositories: dict[int, SyncTarget]


def _owner(store: Store, owner_id: UUID) -> _Owner:
    setting = store.owners.config(owner_id, SETTINGS)
    config = SecurityConfig.model_validate(setting.config if setting else {})
    return _Owner(
        setting is not None and setting.enabled,
        config,
        {one.repository_id: one for one in store.owners.sync_targets(owner_id)},
    )


def _earlier(found: Sequence[RemediationRow], finding_id: UUID, apart_from: UUID | None) -> list[rules.Earlier]:
    return [
        rules.Earlier(rules.earlier_state(one), one.fingerprint, one.created_at)
        for one in found
        if finding_id in one.findings and one.item_id != apart_from
    ]


def cases(
    store: Store, owner_id: UUID, findings: Sequence[FindingRow], *, apart_from: UUID | None = None
) -> list[tuple[FindingRow, rules.Case]]:
    """What admission looks at, for findings of one owner; `apart_from`: an item that is no earlier one of itself."""
    owner = _owner(store, owner_id)
    ids = [one.id for one in findings]
    analyses, found = store.analyses.latest(owner_id, ids), store.remediations.of_findings(owner_id, ids)
    return [
        (
            one,
            rules.Case(
                finding=one,
                enabled=owner.enabled,
                config=owner.config,
                connected=one.repository_id in owner.repositories,
                analysis=analyses.get(one.id),
                earlier=_earlier(found, one.id, apart_from),
            ),
        )
        for one in findings
    ]


def group_of(store: Store, first: FindingRow) -> tuple[list[FindingRow], dict[UUID, AnalysisRow]]:
    """The findings that one change ends, with their analyses."""
    others = store.findings.open_of_package(
        first.owner_id, first.repository_id, first.package_ecosystem, first.package_name, first.manifest_path
    )
    analyses = store.analyses.latest(first.owner_id, [first.id, *(one.id for one in others)])
    return rules.joined(first, others, analyses), analyses


def event_of(owner_id: UUID, finding_id: UUID, action: str, item_id: UUID, discriminator: object, **data: Any) -> NewFindingEvent:
    """An audit event of a remediation (contract 14): what was done, none of the agent's words."""
    return NewFindingEvent(
        at=datetime.now(UTC),
        kind=None,
        severity=None,
        reconstructed=False,
        event_key=event_key(owner_id, finding_id, action, item_id, discriminator),
        action=f"security.remediation.{action}",
        data={"item": str(item_id), **data},
    )


def _open(store: Store, finding: FindingRow, analysis: AnalysisRow, origin: Origin, actor: str, *, again: bool) -> UUID | Reason:
    group, _ = group_of(store, finding)
    new = NewItem(
        service=SERVICE,
        subject_key=rules.subject_of(finding),
        repository_id=finding.repository_id,
        priority=rules.PRIORITY[origin],
        details={
            "finding_id": str(finding.id),
            "origin": origin,
            "requested_by": actor,
            "analysis_id": str(analysis.item_id),
            "fingerprint": rules.fingerprint(finding, analysis),
            "findings": [str(one.id) for one in group],
        },
    )

    def events(item_id: UUID) -> Sequence[tuple[UUID, NewFindingEvent]]:
        action = "retried" if again else "queued"
        return [(one.id, event_of(finding.owner_id, one.id, action, item_id, 0, origin=origin)) for one in group]

    opened = store.remediations.open(finding.owner_id, new, events, actor=actor)
    return opened or Reason.REMEDIATION_ACTIVE


def admit(
    store: Store,
    owner_id: UUID,
    finding_id: UUID,
    *,
    origin: Origin,
    actor: str,
    role: str | None,
    retry: bool = False,
) -> UUID | Reason:
    """Opens a remediation of a finding: its item, or why there is none (contract 13.1). `role` None: the platform itself."""
    refused = rules.may_act(role)
    if refused is not None:
        return refused
    finding = store.findings.get(owner_id, finding_id)
    if finding is None:
        return Reason.FINDING_NOT_FOUND
    ((_, case),) = cases(store, owner_id, [finding])
    refused = rules.refusal(case, origin, retry=retry)
    if refused is not None:
        return refused
    assert case.analysis is not None  # noqa: S101  # without one it was refused
    return _open(store, finding, case.analysis, origin, actor, again=retry)


def after_analysis(store: Store, owner_id: UUID, finding_id: UUID, log: Log) -> None:
    """What a completed analysis starts by itself, where its owner wants that."""
    answer = admit(store, owner_id, finding_id, origin="automatic", actor="platform", role=None)
    log.info(
        f"finding {finding_id}: " + (f"no remediation ({answer})" if isinstance(answer, Reason) else f"remediation {answer}")
    )


def cancel(store: Store, owner_id: UUID, item_id: UUID, *, actor: str, role: str) -> Reason | None:
    """Ends a remediation that waits or runs, its session with it (contract 13.4); None when done, else why not.

    Another owner's is answered like one that is over: who asks learns nothing of it.
    """
    refused = rules.may_act(role)
    if refused is not None:
        return refused
    item = store.queue.get(item_id)
    if item is None or item.owner_id != owner_id or item.service != SERVICE:
        return Reason.MOVED_ON
    return None if store.queue.cancel(item_id, reason=Reason.USER_CANCELLED, actor=actor) else Reason.MOVED_ON


@dataclass
class Bulk:
    """What one command over all open findings did; `skipped` by reason."""

    scanned: int = 0
    admitted: list[UUID] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def remediate_all(store: Store, owner_id: UUID, *, actor: str, role: str) -> Bulk | Reason:
    """Every open finding of an owner, page by page to the last one (contract 13.4, weakness 24)."""
    refused = rules.may_act(role)
    if refused is not None:
        return refused
    done, after = Bulk(), None
    while page := store.findings.open_after(owner_id, after, limit=PAGE):
        for finding, case in cases(store, owner_id, page):
            answer: UUID | Reason | None = rules.refusal(case, "bulk")
            if answer is None:
                assert case.analysis is not None  # noqa: S101  # without one it was refused
                answer = _open(store, finding, case.analysis, "bulk", actor, again=False)
            done.scanned += 1
            if isinstance(answer, Reason):
                done.skipped[str(answer)] += 1
            else:
                done.admitted.append(answer)
        after = page[-1].id
    return done
