"""Remediations: admission, launch (claim, facts re-read, write session), settle (pull request intended), and what follows a merge."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from dagster import Nothing, OpExecutionContext, Out, op
from pydantic import ValidationError

from kilo_pipelines.acts.common import Log, enabled_config
from kilo_pipelines.acts.remediation import cases, event_of, group_of
from kilo_pipelines.cloud_agent.protocol import PUSHED
from kilo_pipelines.core import retry
from kilo_pipelines.core.effects import EffectIntent, EffectKind
from kilo_pipelines.core.owners import remediation_pools
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.text import clean
from kilo_pipelines.core.work import FINAL, WorkState
from kilo_pipelines.ops.effects import TRANSPORT_RETRY
from kilo_pipelines.ops.ids import Ids, each
from kilo_pipelines.ops.items import may_start, provider_failed, reopened_by_person, say
from kilo_pipelines.resources.cloud_agent import CloudAgentResource
from kilo_pipelines.resources.github import GitHubResource, ProviderError
from kilo_pipelines.resources.store import StoreResource
from kilo_pipelines.services.security import remediation as rules
from kilo_pipelines.services.security import remediation_brief as brief
from kilo_pipelines.services.security import remediation_text as texts
from kilo_pipelines.services.security.remediation import SERVICE, Origin
from kilo_pipelines.store import (
    Claimed,
    FindingRow,
    NewFindingEvent,
    RemediationRow,
    SettleTx,
    Store,
    note_all,
)

# -- launch ---------------------------------------------------------------------------------------------------------------


@op(
    out=Out(Nothing),
    retry_policy=TRANSPORT_RETRY,
    description="Claims remediations, looks at the present facts again, launches a session that may write.",
)
def launch_remediations(
    context: OpExecutionContext, config: Ids, store: StoreResource, github: GitHubResource, cloud_agent: CloudAgentResource
) -> None:
    each(context, config.ids, lambda item_id: _launch(context, store.get(), github, cloud_agent, item_id))


def _launch(
    context: OpExecutionContext, store: Store, github: GitHubResource, cloud_agent: CloudAgentResource, item_id: UUID
) -> None:
    if reopened_by_person(context, store, item_id):
        return
    item = store.queue.get(item_id)
    repository_id = item.repository_id if item is not None else 0  # an unknown item is refused before any pool is asked for
    claim = store.queue.claim(
        item_id,
        SERVICE,
        run_id=context.run_id,
        pools=lambda _kind, _plan: remediation_pools(repository_id),
        lease_s=cloud_agent.lease_seconds(),
        costs=github.launch_costs(),
        ask=cloud_agent.needs(_model(store, item.owner_id) if item is not None else None),
    )
    if not isinstance(claim, Claimed):
        say(context, item_id, claim.outcome)
        return
    if cloud_agent.is_hosted():  # a change made where nobody of us watches
        store.queue.conclude(claim, WorkState.FAILED, Reason.HOSTED_WORK_REFUSED)
        say(context, item_id, Reason.HOSTED_WORK_REFUSED)
        return
    finding = store.findings.get(claim.owner_id, UUID(claim.details["finding_id"]))
    assert finding is not None  # noqa: S101  # a foreign key holds it
    ((_, case),) = cases(store, claim.owner_id, [finding], apart_from=item_id)
    origin: Origin = claim.details["origin"]
    stop = rules.refusal(case, origin)
    if stop is not None:
        _stop(context, store, claim, stop)
        return
    if not cloud_agent.may_use(case.config.remediation_model, store.owners.models(claim.owner_id)):
        _stop(context, store, claim, Reason.MODEL_NOT_ALLOWED)
        return
    assert case.analysis is not None  # noqa: S101  # without one it was refused
    group, analyses = group_of(store, finding)
    target = next(one for one in store.owners.sync_targets(claim.owner_id) if one.repository_id == claim.repository_id)
    try:
        covered = _covering(store, github, claim, target.full_name)
        at = github.default_branch(claim.installation_id, claim.repository_id, target.full_name)
    except ProviderError as failure:
        provider_failed(context, store, claim, failure)
        return
    if covered is not None:
        _stop(context, store, claim, Reason.COVERED_BY_OPEN_PULL, pull_request=covered.pull_url)
        return
    session_id = uuid4()
    branch = rules.branch_of(item_id, claim.attempt, finding)
    fixes = {key: one.deep["suggested_fix"] for key, one in analyses.items() if one.deep is not None}
    spec = cloud_agent.branch_spec(
        session_id,
        claim.owner_id,
        SERVICE,
        at,
        brief.task_of(group, fixes, at.full_name, case.config.remediation_registries),
        claim.granted,
        model=case.config.remediation_model,
        writes=True,
        branch=branch,
        allow_protected=case.config.remediation_allow_protected,
        registries=case.config.remediation_registries,
    )
    asked_by = claim.details["requested_by"] if claim.by_person else None
    receipt = cloud_agent.receipt(spec, text=["advisory", "member"], effects=True, approved_by=asked_by)
    if not may_start(context, store, claim, receipt):
        return
    launched = store.sessions.launch(
        claim,
        session_id=session_id,
        spec=spec,
        receipt=receipt,
        head={
            "analysis_id": str(case.analysis.item_id),
            "fingerprint": rules.fingerprint(finding, case.analysis),
            "findings": [str(one.id) for one in group],
            "branch": branch,
            "base_ref": at.default_branch,
        },
        effects=[],
        cap_s=cloud_agent.cap_seconds(),
    )
    say(context, item_id, "launched" if launched else Reason.MOVED_ON)
    context.log.info(f"session {session_id}, attempt {claim.attempt}, fence {claim.fence}: {len(group)} findings on {branch}")


def _model(store: Store, owner_id: UUID) -> str | None:
    """The model that the owner wants; what it costs is asked for at the claim."""
    config = enabled_config(store, owner_id)
    return config.remediation_model if config is not None else None


def _stop(context: OpExecutionContext, store: Store, claim: Claimed, reason: Reason, **links: str | None) -> None:
    store.queue.conclude(claim, WorkState.CANCELLED, reason)
    say(context, claim.item_id, reason, **links)


def _covering(store: Store, github: GitHubResource, claim: Claimed, full_name: str) -> RemediationRow | None:
    """Another remediation of the same package whose pull request is about to be opened, or is open now, as GitHub says."""
    for one in store.remediations.of_subject(claim.owner_id, claim.subject_key):
        if one.item_id == claim.item_id or rules.earlier_state(one) != "pull_open" or one.pull_state == "merged":
            continue
        if one.pull_number is None:
            return one
        if github.reader(claim.installation_id, claim.repository_id).pull(full_name, one.pull_number).state == "open":
            return one
    return None


# -- settle ---------------------------------------------------------------------------------------------------------------


@op(out=Out(Nothing), retry_policy=TRANSPORT_RETRY, description="Turns pushed changes into pull requests and frees their slots.")
def settle_remediations(context: OpExecutionContext, config: Ids, store: StoreResource, cloud_agent: CloudAgentResource) -> None:
    each(context, config.ids, lambda item_id: _settle(context, store.get(), cloud_agent, item_id))


def _settle(context: OpExecutionContext, store: Store, cloud_agent: CloudAgentResource, item_id: UUID) -> None:
    item = store.queue.get(item_id)
    if item is None:
        say(context, item_id, Reason.MOVED_ON)
        return
    # Advisory ids and versions for the text; the list itself was fixed when the session was launched.
    wanted = [store.findings.get(item.owner_id, UUID(one)) for one in item.details["findings"]]
    findings = [one for one in wanted if one is not None]
    with store.settlements.open(item_id) as tx:
        if tx is None:
            return
        session = tx.session()
        if WorkState(tx.item.state) in FINAL and not tx.item.announced:
            said = _told(tx)
        elif WorkState(tx.item.state) is not WorkState.RUNNING or session is None or session.ended_at is None:
            said = Reason.MOVED_ON
        elif session.state == "completed":
            said = _conclude(
                tx, findings, session.spec, session.result or {}, session.evidence, cloud_agent.details_url(context.run_id)
            )
            store.queue.unblock_service(tx.item.owner_id, SERVICE, "session")
        else:
            said = _failed(store, tx, Reason(session.reason or Reason.AGENT_CRASHED), session.evidence)
    say(context, item_id, said)


def _told(tx: SettleTx) -> str:
    """The audit event of an end that no settle made: cancelled, refused at the claim, given up by recovery."""
    reason = tx.item.reason or tx.item.state
    action = "cancelled" if tx.item.state == WorkState.CANCELLED else "failed"
    note = note_all(tx.item.owner_id, _notes(tx, action, reason=reason), actor="platform", now=datetime.now(UTC))
    tx.announce({"conclusion": tx.item.state, "reason": reason}, None, [], also=note)
    return reason


def _notes(tx: SettleTx, action: str, **data: Any) -> list[tuple[UUID, NewFindingEvent]]:
    item = tx.item
    return [
        (one, event_of(item.owner_id, one, action, item.id, item.attempt, attempt=item.attempt, **data))
        for one in map(UUID, item.details["findings"])
    ]


def _conclude(
    tx: SettleTx,
    findings: Sequence[FindingRow],
    spec: dict[str, Any],
    result: dict[str, Any],
    evidence: dict[str, Any] | None,
    details_url: str | None,
) -> str:
    pushed = result.get(PUSHED)
    try:
        found = brief.RemediationResult.model_validate({name: value for name, value in result.items() if name != PUSHED})
    except ValidationError:
        return _end(tx, WorkState.FAILED, Reason.RESULT_INVALID, evidence)
    if found.status != "changed":
        reason = Reason.NO_CHANGES_NEEDED if found.status == "no_changes_needed" else Reason.REMEDIATION_BLOCKED
        return _end(tx, WorkState.COMPLETED, reason, evidence, found)
    # The runner pushes what it says changed; a result without that is another protocol's.
    if pushed is None or pushed["branch"] != tx.item.details["branch"] or pushed["parent"] != spec["base_sha"]:
        return _end(tx, WorkState.FAILED, Reason.RESULT_INVALID, evidence)
    intent = EffectIntent(
        kind=EffectKind.GITHUB_PULL_REQUEST,
        intent_key=f"{SERVICE}:{tx.item.id}:{tx.item.attempt}:pull_request",
        subject_key=f"github:{tx.item.repository_id}:branch:{pushed['branch']}",
        payload={
            "full_name": spec["repository"]["full_name"],
            "head_ref": pushed["branch"],
            "head_sha": pushed["commit"],
            "base_ref": tx.item.details["base_ref"],
            "title": texts.title_of(findings),
            "body": texts.body_of(findings, found, str(tx.item.id), details_url),
            "draft": texts.is_draft(found),
        },
    )
    return _end(tx, WorkState.COMPLETED, Reason.REMEDIATED, evidence, found, commit=pushed["commit"], effects=[intent])


def _failed(store: Store, tx: SettleTx, reason: Reason, evidence: dict[str, Any] | None) -> str:
    if reason in retry.BLOCKING:
        until = store.queue.block_service(tx.item.owner_id, SERVICE, "session", reason, tx.item.id)
        tx.retry(reason, max(timedelta(), until - datetime.now(UTC)) if until else timedelta())
        return reason
    again = retry.next_attempt(reason, tx.failures() + 1)
    if again is not None:
        tx.retry(reason, again)
        return reason
    if retry.disables(reason):
        tx.disable_service(reason)
    stopped = retry.CLASS_OF.get(reason) is retry.FailureClass.STOPPED
    return _end(tx, WorkState.CANCELLED if stopped else WorkState.FAILED, reason, evidence)


_UNSEEN = {
    **dict.fromkeys(("pull_state", "merged_at", "closed_at", "confirmed_at", "set_aside_at", "flagged_at")),
    "syncs_since_merge": 0,
}
# What an end is called in the audit log (contract 14); a pushed change is `pr_opened` once its pull request was seen.
_ACTION = {
    Reason.REMEDIATED: "pushed",
    Reason.NO_CHANGES_NEEDED: "no_changes_needed",
    Reason.REMEDIATION_BLOCKED: "blocked",
}


def _end(
    tx: SettleTx,
    state: WorkState,
    reason: Reason,
    evidence: dict[str, Any] | None,
    found: brief.RemediationResult | None = None,
    *,
    commit: str | None = None,
    effects: Sequence[EffectIntent] = (),
) -> str:
    """Ends the item with what the agent said of it, and with its findings' audit events."""
    action = _ACTION.get(reason, "cancelled" if state is WorkState.CANCELLED else "failed")
    told = {"branch": tx.item.details["branch"], "commit": commit} if commit else {}
    tx.conclude(
        state=state,
        reason=reason,
        verdict={"conclusion": action, "reason": str(reason), **(found.model_dump(exclude={"nonce"}) if found else {})},
        evidence=evidence,
        effects=list(effects),
        # Of an item that is done over, the former pull request is another one's business.
        details={**_UNSEEN, "commit_sha": commit, "summary": clean(found.summary) if found else None},
        also=note_all(tx.item.owner_id, _notes(tx, action, reason=str(reason), **told), actor="platform", now=datetime.now(UTC)),
    )
    return reason


# -- after the pull request -----------------------------------------------------------------------------------------------


def follow_up(store: Store, github: GitHubResource, owner_id: UUID, repository_id: int, log: Log) -> None:
    """After a repository's alerts were read whole: what became of our pull requests, and whether merged ones did what they were for.

    A provider that doesn't answer counts nothing: the next sync looks again.
    """
    followed = store.remediations.followed(owner_id, repository_id, reopened_within=rules.REOPENED_WITHIN)
    if not followed:
        return
    target = next((one for one in store.owners.sync_targets(owner_id) if one.repository_id == repository_id), None)
    if target is None:
        return
    for row in followed:
        assert row.pull_number is not None  # noqa: S101  # what is followed has one
        state = row.pull_state
        if state != "merged":
            try:
                pull = github.reader(target.installation_id, repository_id).pull(target.full_name, row.pull_number)
            except ProviderError as failure:
                log.warning(f"pull request {row.pull_url}: {failure.reason}")
                continue
            state = "merged" if pull.merged else pull.state
            if state == row.pull_state:
                continue
        _follow(store, owner_id, row, state, log)


def _follow(store: Store, owner_id: UUID, row: RemediationRow, state: str, log: Log) -> None:
    outcome = None
    syncs = row.syncs_since_merge + (row.pull_state == "merged")
    if state == "merged":
        waited = datetime.now(UTC) - row.merged_at if row.merged_at else timedelta()
        outcome = rules.after_merge([_status(store, owner_id, one) for one in row.findings], syncs, waited)
    actions = ["pr_opened"] if row.pull_state is None else []
    actions += [f"pr_{state}"] if state != row.pull_state and state != "open" else []
    actions += ["pr_reopened"] if (row.pull_state, state) == ("closed", "open") else []
    actions += [outcome] if outcome and not (outcome == "unconfirmed" and row.flagged_at) else []
    # It may be closed and opened again more than once.
    step = f"{row.attempt}:{row.closed_at.isoformat()}" if row.closed_at else row.attempt
    events = [
        (one, event_of(owner_id, one, action, row.item_id, step, pull_request=row.pull_url, number=row.pull_number))
        for action in actions
        for one in row.findings
    ]
    if store.remediations.follow(owner_id, row, pull_state=state, outcome=outcome, events=events) and actions:
        log.info(f"pull request {row.pull_url}: {', '.join(actions)}")


def _status(store: Store, owner_id: UUID, finding_id: UUID) -> str:
    """A finding's state; of a superseded one, that of the finding which speaks for it."""
    seen: set[UUID] = set()
    finding = store.findings.get(owner_id, finding_id)
    while finding and finding.status != "fixed" and finding.canonical_id and finding.id not in seen:
        seen.add(finding.id)
        finding = store.findings.get(owner_id, finding.canonical_id)
    return finding.status if finding else "gone"
