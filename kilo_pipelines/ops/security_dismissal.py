"""Dismissals: asked for by people, by rules or in bulk; carried out by a run; taken back when their ground changes."""

import secrets
import time
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
from kilo_pipelines.services.security.analysis import snapshot_of
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

# Fetching and searching a repository; a minute of the claim's lease is left for what follows.
READ_SECONDS = 340.0
LEASE_SECONDS = READ_SECONDS + 60


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
    grounds = _rule(store, claim, analysis)(finding)
    if isinstance(grounds, Reason):
        _end(context, store, claim, grounds)
        return
    target = _target(store, claim.owner_id, claim.repository_id)
    bound: dict[str, Any] | None = None
    if analysis is not None:
        try:
            found = _binding(github, target, claim.owner_id, finding, analysis, as_analysed=grounds is not None)
        except ProviderError as failure:
            provider_failed(context, store, claim, failure)
            return
        if not isinstance(found, Reason):
            bound = found
        elif grounds is not None:
            _end(context, store, claim, found)
            return
        else:  # a person decided, whatever of it can be looked at again
            context.log.warning(f"item {item_id}: bound to nothing ({found})")
    say(context, item_id, _commit(store, claim, finding, grounds, bound, target))


def _end(context: OpExecutionContext, store: Store, claim: Claimed, reason: Reason) -> None:
    store.queue.conclude(claim, WorkState.CANCELLED, reason)
    say(context, claim.item_id, reason)


def _rule(store: Store, claim: Claimed, analysis: AnalysisRow | None) -> Callable[[FindingRow], Grounds | Reason | None]:
    """What the rules say of a finding now: grounds of a dismissal without a person, None for a person's, or why it isn't made after all."""
    config, catalogue, origin = enabled_config(store, claim.owner_id), known_exploited(), claim.details["origin"]

    def rule(finding: FindingRow) -> Grounds | Reason | None:
        if config is None:
            return Reason.SECURITY_DISABLED
        if origin == "automatic":
            return rules.automatic(config, finding, analysis, catalogue)
        if origin == "bulk":
            return rules.bulk(config, finding, analysis, catalogue)
        return rules.dismissable(finding)

    return rule


def _commit(
    store: Store, claim: Claimed, finding: FindingRow, grounds: Grounds | None, bound: dict[str, Any] | None, target: SyncTarget
) -> Reason:
    """Here, with history, deadline and audit, and the intent at the source: all or nothing. What became of it.

    Minutes may have passed with the repository: the rules are asked again, of the row that is written.
    """
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
            **({"snapshot": snapshot_of(finding)} if grounds else {}),
        },
    }
    action = "auto_dismissed" if grounds else "dismissed"
    data = {
        "item": str(claim.item_id),
        "reason": claim.details["reason"],
        "origin": claim.details["origin"],
        "by": disposition["by"],
    }
    rule = _rule(store, claim, store.analyses.latest(claim.owner_id, [finding.id]).get(finding.id))
    refusal = Reason.STALE_ANALYSIS

    def still(present: FindingRow) -> bool:
        nonlocal refusal
        said = rule(present)
        refusal = said if isinstance(said, Reason) else refusal
        return said == grounds

    change = _change("ignored", action, policy, now, str(claim.item_id), data, only=still)
    effect = rules.dismiss_effect(claim.item_id, finding, target.full_name, claim.details["reason"], claim.details["comment"])
    verdict = {"conclusion": "dismissed", "reason": str(Reason.DISMISSED)}
    try:
        done = store.queue.complete(
            claim,
            Reason.DISMISSED,
            details={"binding": bound, "verdict": verdict},
            effects=[effect],
            also=store.findings.disposing(claim.owner_id, finding.id, disposition, change, actor=actor),
        )
    except NotDisposedError:
        store.queue.conclude(claim, WorkState.CANCELLED, refusal)
        return refusal
    return Reason.DISMISSED if done else Reason.MOVED_ON


def _change(
    kind: str,
    action: str,
    policy: sla.SlaPolicy,
    now: datetime,
    discriminator: str,
    data: Mapping[str, Any],
    *,
    only: Callable[[FindingRow], bool],
) -> Callable[[FindingRow, list[FindingEventRow]], Change | None]:
    def decide(finding: FindingRow, history: list[FindingEventRow]) -> Change | None:
        if not only(finding):
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
    github: GitHubResource,
    target: SyncTarget,
    owner_id: UUID,
    finding: FindingRow,
    analysis: AnalysisRow,
    *,
    as_analysed: bool,
) -> dict[str, Any] | Reason:
    """What a dismissal rests on at the default branch's head, or why it can't rest on that; ProviderError when it can't be read now.

    `as_analysed`: a deep analysis spoke of another commit, so the ground has to be the same there.
    """
    search, paths = _search(analysis), rules.paths_of(finding.manifest_path)
    at = github.default_branch(target.installation_id, target.repository_id, target.full_name)
    token = github.clone_token(target.installation_id, target.repository_id)
    # A commit that is not to be had any more can't be shown to be the same.
    analysed = [(paths, search, analysis.commit_sha or "")] if as_analysed and analysis.deep is not None else []
    commit, (found, *before) = read_branch(owner_id, at, token, [(paths, search, None), *analysed], READ_SECONDS)
    if isinstance(found, Reason):
        if found is Reason.GROUND_TOO_WIDE:
            return found
        raise ProviderError(found, retryable=True)
    bound = rules.binding(commit, *found, search)
    same = all(not isinstance(one, Reason) and rules.still_holds(rules.binding(commit, *one, search), bound) for one in before)
    return bound if same else Reason.STALE_ANALYSIS


def reexamine(
    store: Store,
    github: GitHubResource,
    owner_id: UUID,
    target: SyncTarget,
    policy: sla.SlaPolicy,
    log: Log,
    until: float,
) -> int:
    """Looks at every dismissal of a repository again, until a moment of the monotonic clock; how many were taken back, on both sides.

    First whether the rules would still let go what they let go, then the ground. A repository or a search that can't be read proves
    nothing: its dismissals stand, and the next sync looks again.
    """
    back, standing, catalogue = 0, [], known_exploited()
    for finding in store.findings.bound(owner_id, target.repository_id):
        over = rules.outlived(finding, catalogue)
        if over is None:
            standing.append(finding)
        else:
            back += _take_back(store, finding, target, policy, over, str(over), log)
    if not standing:
        return back
    if time.monotonic() >= until:
        log.warning(f"{target.full_name}: the ground of {len(standing)} dismissals can't be looked at: {Reason.SYNC_OUT_OF_TIME}")
        return back
    try:
        at = github.default_branch(target.installation_id, target.repository_id, target.full_name)
        stale = [one for one in standing if _bound(one)["commit"] != at.head_sha]
        if not stale:
            return back
        # In no order: where the time is too short for all, each has its turn.
        secrets.SystemRandom().shuffle(stale)
        token = github.clone_token(target.installation_id, target.repository_id)
        reads = [(rules.paths_of(one.manifest_path), list(_bound(one)["search"]), None) for one in stale]
        commit, seen = read_branch(owner_id, at, token, reads, until - time.monotonic())
    except ProviderError as failure:
        log.warning(f"{target.full_name}: the ground of {len(standing)} dismissals can't be looked at: {failure.reason}")
        return back
    for finding, found in zip(stale, seen, strict=True):
        if isinstance(found, Reason) and found is not Reason.GROUND_TOO_WIDE:
            log.warning(f"finding {finding.id}: the ground of its dismissal can't be looked at: {found}")
        # What can't be bound was bound before: it has grown.
        elif isinstance(found, Reason) or not rules.still_holds(
            _bound(finding), rules.binding(commit, *found, _bound(finding)["search"])
        ):
            back += _take_back(store, finding, target, policy, Reason.GROUND_CHANGED, commit, log)
        else:
            store.findings.rebind(owner_id, finding.id, commit)
    return back


def _bound(finding: FindingRow) -> dict[str, Any]:
    assert finding.disposition_evidence is not None  # noqa: S101  # only such ones are read
    found: dict[str, Any] = finding.disposition_evidence["binding"]
    return found


def _take_back(
    store: Store, finding: FindingRow, target: SyncTarget, policy: sla.SlaPolicy, reason: Reason, mark: str, log: Log
) -> bool:
    """Takes a dismissal back here and, through the outbox, at the source; `mark` tells this time from another one."""
    evidence = finding.disposition_evidence
    assert evidence is not None  # noqa: S101  # only such ones are read
    item_id = UUID(evidence["item"])

    def the_same(present: FindingRow) -> bool:
        return present.status == "ignored" and present.disposition == "dismissed" and present.disposition_evidence == evidence

    change = _change(
        "reopened",
        "reopened",
        policy,
        datetime.now(UTC),
        f"{item_id}:{mark}",
        {"reason": str(reason), "item": str(item_id)},
        only=the_same,
    )
    effect = rules.reopen_effect(item_id, finding, target.full_name, mark)
    done = store.findings.undo(finding.owner_id, finding.id, change, item_id=item_id, effects=[effect], actor="platform")
    if done:
        log.info(f"finding {finding.id}: {reason}")
    return done
