"""Dismissals: asked for by people, by rules or in bulk; carried out by a run; taken back when their ground changes."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from dagster import Nothing, OpExecutionContext, Out, op

from kilo_pipelines.acts.common import Log, enabled_config
from kilo_pipelines.acts.known_exploited import known_exploited
from kilo_pipelines.core.owners import dismissal_pools
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.work import WorkState
from kilo_pipelines.ops.effects import TRANSPORT_RETRY
from kilo_pipelines.ops.findings import as_events, deadline, policy_for
from kilo_pipelines.ops.ids import Ids, each
from kilo_pipelines.ops.items import provider_failed, reopened_by_person, say
from kilo_pipelines.resources.cloud_agent import read_branch
from kilo_pipelines.resources.github import GitHubResource, ProviderError
from kilo_pipelines.resources.store import StoreResource
from kilo_pipelines.services.security import dismissal as rules
from kilo_pipelines.services.security import findings as lifecycle
from kilo_pipelines.services.security import sla
from kilo_pipelines.services.security.config import SecurityConfig
from kilo_pipelines.services.security.dismissal import SERVICE, Grounds
from kilo_pipelines.store import (
    AnalysisRow,
    Change,
    Claimed,
    FindingEventRow,
    FindingRow,
    NotDisposedError,
    Store,
    SyncTarget,
)

# Fetching and searching a repository before the claim's lease is over.
LEASE_SECONDS = 400.0


# -- carrying it out ------------------------------------------------------------------------------------------------------


@op(
    out=Out(Nothing),
    retry_policy=TRANSPORT_RETRY,
    description="Claims dismissals, notes what they rest on, and dismisses here and, through the outbox, at the source.",
)
def apply_dismissals(context: OpExecutionContext, config: Ids, store: StoreResource, github: GitHubResource) -> None:
    each(context, config.ids, lambda item_id: _apply(context, store.get(), github, item_id))


def _apply(context: OpExecutionContext, store: Store, github: GitHubResource, item_id: UUID) -> None:
    if reopened_by_person(context, store, item_id):
        return
    claim = store.queue.claim(
        item_id, SERVICE, run_id=context.run_id, pools=dismissal_pools, lease_s=LEASE_SECONDS, costs=github.launch_costs()
    )
    if not isinstance(claim, Claimed):
        say(context, item_id, claim.outcome)
        return
    finding = store.findings.get(claim.owner_id, UUID(claim.details["finding_id"]))
    assert finding is not None  # noqa: S101  # a foreign key holds it
    analysis = store.analyses.latest(claim.owner_id, [finding.id]).get(finding.id)
    grounds = _grounds(store, claim, finding, analysis)
    if isinstance(grounds, Reason):
        store.queue.conclude(claim, WorkState.CANCELLED, grounds)
        say(context, item_id, grounds)
        return
    target = _target(store, claim.owner_id, claim.repository_id)
    try:
        bound = _binding(github, target, claim.owner_id, finding, _search(analysis)) if analysis is not None else None
    except ProviderError as failure:
        provider_failed(context, store, claim, failure)
        return
    done = _commit(store, claim, finding, grounds, bound, target)
    say(context, item_id, Reason.DISMISSED if done else Reason.MOVED_ON)


def _grounds(store: Store, claim: Claimed, finding: FindingRow, analysis: AnalysisRow | None) -> Grounds | Reason | None:
    """Under the facts as they are now: grounds of an automatic one, None for a person's, or why it isn't made after all."""
    config = enabled_config(store, claim.owner_id)
    if config is None:
        return Reason.SECURITY_DISABLED
    origin = claim.details["origin"]
    if origin == "automatic":
        return rules.automatic(config, finding, analysis, known_exploited())
    if origin == "bulk":
        return rules.bulk(config, finding, analysis, known_exploited())
    return rules.dismissable(finding)


def _commit(
    store: Store, claim: Claimed, finding: FindingRow, grounds: Grounds | None, bound: dict[str, Any] | None, target: SyncTarget
) -> bool:
    """Here, with history, deadline and audit, and the intent at the source: all or nothing. False when it moved on meanwhile."""
    now = datetime.now(UTC)
    actor = claim.details["requested_by"]
    policy = policy_for(store, claim.owner_id, enabled_config(store, claim.owner_id) or SecurityConfig(), actor="platform")
    disposition = {
        "disposition": "dismissed",
        "reason": claim.details["reason"],
        "by": grounds.by if grounds else "manual",
        "actor": actor,
        "evidence": {
            "item": str(claim.item_id),
            "analysis": claim.details["analysis_id"],
            **({"binding": bound} if bound else {}),
        },
    }
    action = "auto_dismissed" if grounds else "dismissed"
    data = {
        "item": str(claim.item_id),
        "reason": claim.details["reason"],
        "origin": claim.details["origin"],
        "by": disposition["by"],
    }
    change = _change("ignored", action, policy, now, str(claim.item_id), data, only_from="open")
    effect = rules.dismiss_effect(claim.item_id, finding, target.full_name, claim.details["reason"], claim.details["comment"])
    verdict = {"conclusion": "dismissed", "reason": str(Reason.DISMISSED)}
    try:
        return store.queue.complete(
            claim,
            Reason.DISMISSED,
            details={"binding": bound, "verdict": verdict},
            effects=[effect],
            also=store.findings.disposing(claim.owner_id, finding.id, disposition, change, actor=actor),
        )
    except NotDisposedError:
        store.queue.conclude(claim, WorkState.CANCELLED, Reason.FINDING_NOT_OPEN)
        return False


def _change(
    kind: str, action: str, policy: sla.SlaPolicy, now: datetime, discriminator: str, data: Mapping[str, Any], *, only_from: str
) -> Callable[[FindingRow, list[FindingEventRow]], Change | None]:
    def decide(finding: FindingRow, history: list[FindingEventRow]) -> Change | None:
        if finding.status != only_from or (only_from == "ignored" and finding.disposition != "dismissed"):
            return None
        step = lifecycle.decided(
            finding, kind, action, owner_id=finding.owner_id, at=now, discriminator=discriminator, data=dict(data)
        )
        return Change(as_events([step]), deadline(history, [step], policy, finding.repository_id, now))

    return decide


def _target(store: Store, owner_id: UUID, repository_id: int) -> SyncTarget:
    return next(one for one in store.owners.sync_targets(owner_id) if one.repository_id == repository_id)


# -- what it rests on -----------------------------------------------------------------------------------------------------


def _search(analysis: AnalysisRow | None) -> list[str]:
    return list(analysis.deep["search"]) if analysis is not None and analysis.deep is not None else []


def _binding(
    github: GitHubResource, target: SyncTarget, owner_id: UUID, finding: FindingRow, search: list[str]
) -> dict[str, Any]:
    at = github.default_branch(target.installation_id, target.repository_id, target.full_name)
    token = github.clone_token(target.installation_id, target.repository_id)
    commit, ((files, hits),) = read_branch(owner_id, at, token, [(rules.paths_of(finding.manifest_path), search)])
    return rules.binding(commit, files, hits, search)


def reexamine(store: Store, github: GitHubResource, owner_id: UUID, target: SyncTarget, policy: sla.SlaPolicy, log: Log) -> int:
    """Looks at the ground of every dismissal of a repository again; how many were taken back, here and at the source.

    A repository that can't be read proves nothing: its dismissals stand, and the next sync looks again.
    """
    found = store.findings.bound(owner_id, target.repository_id)
    if not found:
        return 0
    try:
        at = github.default_branch(target.installation_id, target.repository_id, target.full_name)
        stale = [one for one in found if _bound(one)["commit"] != at.head_sha]
        if not stale:
            return 0
        token = github.clone_token(target.installation_id, target.repository_id)
        reads = [(rules.paths_of(one.manifest_path), _bound(one)["search"]) for one in stale]
        commit, seen = read_branch(owner_id, at, token, reads)
    except ProviderError as failure:
        log.warning(f"{target.full_name}: the ground of {len(found)} dismissals can't be looked at: {failure.reason}")
        return 0
    back = 0
    for finding, (files, hits) in zip(stale, seen, strict=True):
        now = rules.binding(commit, files, hits, _bound(finding)["search"])
        if rules.still_holds(_bound(finding), now):
            store.findings.rebind(owner_id, finding.id, commit)
            continue
        back += _take_back(store, finding, target, policy, commit)
        log.info(f"finding {finding.id}: {Reason.GROUND_CHANGED}")
    return back


def _bound(finding: FindingRow) -> dict[str, Any]:
    assert finding.disposition_evidence is not None  # noqa: S101  # only such ones are read
    found: dict[str, Any] = finding.disposition_evidence["binding"]
    return found


def _take_back(store: Store, finding: FindingRow, target: SyncTarget, policy: sla.SlaPolicy, commit: str) -> bool:
    assert finding.disposition_evidence is not None  # noqa: S101  # only such ones are read
    item_id = UUID(finding.disposition_evidence["item"])
    # Upstream it stays dismissed until the effect is applied and the next sync has seen it: then it is open on both sides.
    change = _change(
        "reopened",
        "reopened",
        policy,
        datetime.now(UTC),
        f"{item_id}:{commit}",
        {"reason": str(Reason.GROUND_CHANGED), "item": str(item_id)},
        only_from="ignored",
    )
    effect = rules.reopen_effect(item_id, finding, target.full_name, commit)
    return store.findings.undo(finding.owner_id, finding.id, change, item_id=item_id, effects=[effect], actor="platform")
