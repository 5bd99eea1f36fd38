"""Ops of the analysis of findings: launch (claim, metadata, session where it takes one), settle, and what has to be caught up with."""

import secrets
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from dagster import Nothing, OpExecutionContext, Out, op
from pydantic import ValidationError

from kilo_pipelines.acts import dismissal, remediation
from kilo_pipelines.acts.analysis import queue_analyses
from kilo_pipelines.acts.common import Log, enabled_config
from kilo_pipelines.core import retry
from kilo_pipelines.core.owners import analysis_pools
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.work import FINAL, WorkState
from kilo_pipelines.ops.effects import TRANSPORT_RETRY
from kilo_pipelines.ops.ids import Ids, each
from kilo_pipelines.ops.items import may_start, provider_failed, reopened_by_person, say
from kilo_pipelines.resources.cloud_agent import CloudAgentResource
from kilo_pipelines.resources.github import GitHubResource, ProviderError
from kilo_pipelines.resources.store import StoreResource
from kilo_pipelines.services.security import brief, eligibility, triage, uses
from kilo_pipelines.services.security.analysis import DeepAnalysis, Triage, snapshot_of
from kilo_pipelines.services.security.config import SERVICE as SETTINGS
from kilo_pipelines.services.security.config import SecurityConfig
from kilo_pipelines.services.security.findings import event_key
from kilo_pipelines.store import Claimed, FindingRow, NewFindingEvent, SettleTx, Store, noted

SERVICE = "security_analysis"
# What a run that died left undone is drawn from an analysis later; after a day the settings may mean something else.
FOLLOWED = timedelta(days=1)


class _RefusedError(Exception):
    """The model can't be asked now; the item waits or ends with this reason."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


@op(
    out=Out(Nothing),
    retry_policy=TRANSPORT_RETRY,
    description="Claims analyses, asks about the alert's metadata, launches a session where the repository has to be read.",
)
def launch_analyses(
    context: OpExecutionContext, config: Ids, store: StoreResource, github: GitHubResource, cloud_agent: CloudAgentResource
) -> None:
    each(context, config.ids, lambda item_id: _launch(context, store.get(), github, cloud_agent, item_id))


def _launch(
    context: OpExecutionContext, store: Store, github: GitHubResource, cloud_agent: CloudAgentResource, item_id: UUID
) -> None:
    if reopened_by_person(context, store, item_id):
        return
    item = store.queue.get(item_id)
    automatic = item is not None and item.details["origin"] != "manual"
    wanted = (enabled_config(store, item.owner_id) if item is not None else None) or SecurityConfig()
    claim = store.queue.claim(
        item_id,
        SERVICE,
        run_id=context.run_id,
        pools=lambda _kind, _plan: analysis_pools(automatic=automatic),
        lease_s=cloud_agent.lease_seconds() + triage.SECONDS,
        costs=github.launch_costs(),
        ask=cloud_agent.needs(wanted.analysis_model, wanted.triage_model),
    )
    if not isinstance(claim, Claimed):
        say(context, item_id, claim.outcome)
        return
    finding = store.findings.get(claim.owner_id, UUID(claim.details["finding_id"]))
    assert finding is not None  # noqa: S101  # a foreign key holds it
    setting = store.owners.config(claim.owner_id, SETTINGS)
    stop: Reason | None = Reason.SECURITY_DISABLED
    if setting is not None and setting.enabled:
        config = SecurityConfig.model_validate(setting.config)
        stop = eligibility.automatic(config, finding.status, finding.severity) if automatic else None
        stop = Reason.FINDING_NOT_OPEN if finding.status != "open" else stop
    if stop is not None:
        store.queue.conclude(claim, WorkState.CANCELLED, stop)
        say(context, item_id, stop)
        return
    if cloud_agent.is_hosted() and eligibility.goes_deep(claim.details["mode"], config, needs_deep=False):
        _refuse_hosted(context, store, claim)
        return
    models = store.owners.models(claim.owner_id)
    if not all(cloud_agent.may_use(one, models) for one in (config.triage_model, config.analysis_model)):
        _model_refused(context, store, claim, Reason.MODEL_NOT_ALLOWED)
        return
    try:
        found = _triage(context, store, cloud_agent, claim, finding, config)
    except _RefusedError as refusal:
        _model_refused(context, store, claim, refusal.reason)
        return
    if not eligibility.goes_deep(claim.details["mode"], config, needs_deep=found.needs_deep):
        _complete(context, store, claim, finding, found)
        return
    if cloud_agent.is_hosted():
        _refuse_hosted(context, store, claim)
        return
    try:
        branch = github.default_branch(claim.installation_id, claim.repository_id, _full_name(store, claim))
    except ProviderError as failure:
        provider_failed(context, store, claim, failure)
        return
    session_id = uuid4()
    spec = cloud_agent.branch_spec(
        session_id,
        claim.owner_id,
        SERVICE,
        branch,
        brief.task_of(finding, branch.full_name, found),
        store.spend.left(claim),
        model=config.analysis_model,
    )
    # Nothing is written outside because of an analysis by itself: what follows has rules, and an item, of its own.
    receipt = cloud_agent.receipt(spec, text=["advisory", "member"], effects=False)
    if not may_start(context, store, claim, receipt):
        return
    launched = store.sessions.launch(
        claim,
        session_id=session_id,
        spec=spec,
        receipt=receipt,
        head={"snapshot": snapshot_of(finding), "commit_sha": branch.head_sha},
        effects=[],
        cap_s=cloud_agent.cap_seconds(),
    )
    say(context, item_id, "launched" if launched else Reason.MOVED_ON)


def _refuse_hosted(context: OpExecutionContext, store: Store, claim: Claimed) -> None:
    """The repository would be read where nobody of us watches (docs/cloud-agent.md)."""
    store.queue.conclude(claim, WorkState.FAILED, Reason.HOSTED_WORK_REFUSED)
    say(context, claim.item_id, Reason.HOSTED_WORK_REFUSED)


def _full_name(store: Store, claim: Claimed) -> str:
    """The repository's present name: it may have been renamed since the alert was taken."""
    targets = store.owners.sync_targets(claim.owner_id)
    return next(one.full_name for one in targets if one.repository_id == claim.repository_id)


def _triage(
    context: OpExecutionContext,
    store: Store,
    cloud_agent: CloudAgentResource,
    claim: Claimed,
    finding: FindingRow,
    config: SecurityConfig,
) -> Triage:
    """What the metadata tell: asked once for the finding as it is, whatever becomes of the launch."""
    known = store.analyses.latest(claim.owner_id, [finding.id]).get(finding.id)
    snapshot = snapshot_of(finding)
    for taken, told in (
        (claim.details["snapshot"], claim.details["triage"]),
        (known.snapshot, known.triage) if known and claim.details["mode"] == "deep" else (None, None),
    ):
        if told is not None and taken == snapshot and not told["fallback"]:
            return Triage.model_validate(told)
    answer = cloud_agent.ask(
        triage.question(finding, secrets.token_hex(16)),
        model=config.triage_model,
        seconds=triage.SECONDS,
        max_tokens=triage.MAX_TOKENS,
    )
    if answer.meter is not None:
        store.spend.record(
            claim.owner_id,
            answer.meter,
            item_id=claim.item_id,
            session_id=None,
            service=SERVICE,
            model=cloud_agent.needs(config.triage_model).model,
            usage=answer.usage,
            price=cloud_agent.price(config.triage_model),
        )
    if answer.reason is not None:
        raise _RefusedError(answer.reason)
    found = triage.answer_of(answer.arguments)
    if found is None:
        context.log.warning(f"item {claim.item_id}: {Reason.TRIAGE_UNUSABLE}")
        found = triage.fallback()
    store.queue.unblock_service(claim.owner_id, SERVICE, "question")
    store.queue.keep(claim, {"triage": found.model_dump(mode="json"), "snapshot": snapshot})
    return found


def _model_refused(context: OpExecutionContext, store: Store, claim: Claimed, reason: Reason) -> None:
    """No credit lets all analyses of the owner wait; a model that is away this item, for a while; anything else ends it."""
    now = datetime.now(UTC)
    if reason in retry.BLOCKING:
        until = store.queue.block_service(claim.owner_id, SERVICE, "question", reason, claim.item_id)
        store.queue.release(claim, not_before=until or now, reason=reason)
    elif reason is Reason.MODEL_UNREACHABLE and claim.tries + 1 < retry.MAX_LAUNCH_TRIES:
        wait = retry.launch_wait(reason, claim.tries, None)
        assert wait is not None  # noqa: S101  # only a refused token is given up by that rule
        store.queue.release(claim, not_before=now + wait, reason=reason)
    else:
        store.queue.conclude(claim, WorkState.FAILED, reason)
    say(context, claim.item_id, reason)


def _complete(context: OpExecutionContext, store: Store, claim: Claimed, finding: FindingRow, found: Triage) -> None:
    now = datetime.now(UTC)
    details = {
        "snapshot": snapshot_of(finding),
        "triage": found.model_dump(mode="json"),
        "completed_at": now.isoformat(),
        "verdict": {"conclusion": "analysed", "reason": str(Reason.ANALYSED), "action": found.action},
    }
    step = _step(claim.owner_id, finding.id, claim.item_id, claim.attempt, "analysis_completed", found, None)
    note = noted(claim.owner_id, finding.id, [step], actor="platform", now=now)
    done = store.queue.complete(claim, Reason.ANALYSED, details=details, effects=[], also=note)
    if done:
        follow(store, claim.owner_id, finding.id, context.log)
    say(context, claim.item_id, Reason.ANALYSED if done else Reason.MOVED_ON)


def _step(
    owner_id: UUID,
    finding_id: UUID,
    item_id: UUID,
    attempt: int,
    action: str,
    shallow: Triage | None,
    deep: DeepAnalysis | None,
    reason: str | None = None,
) -> NewFindingEvent:
    """The audit event of an analysis (contract 14): what was concluded, none of the model's words."""
    data: dict[str, Any] = {"item": str(item_id), "attempt": attempt, "mode": "deep" if deep or reason else "shallow"}
    data |= {"action": shallow.action, "confidence": shallow.confidence, "fallback": shallow.fallback} if shallow else {}
    data |= {"exploitable": deep.exploitable, "action": deep.action} if deep else {}
    data |= {"reason": reason} if reason else {}
    return NewFindingEvent(
        at=datetime.now(UTC),
        kind=None,
        severity=None,
        reconstructed=False,
        event_key=event_key(owner_id, finding_id, action, item_id, attempt),
        action=f"security.finding.{action}",
        data=data,
    )


@op(out=Out(Nothing), retry_policy=TRANSPORT_RETRY, description="Turns ended sessions into analyses and frees their slots.")
def settle_analyses(context: OpExecutionContext, config: Ids, store: StoreResource) -> None:
    each(context, config.ids, lambda item_id: _settle(context, store.get(), item_id))


def _settle(context: OpExecutionContext, store: Store, item_id: UUID) -> None:
    analysed: tuple[UUID, UUID] | None = None
    with store.settlements.open(item_id) as tx:
        if tx is None:
            return
        session = tx.session()
        if WorkState(tx.item.state) in FINAL and not tx.item.announced:
            said = _told(tx)
        elif WorkState(tx.item.state) is not WorkState.RUNNING or session is None or session.ended_at is None:
            said = Reason.MOVED_ON
        elif session.state == "completed":
            said = _conclude(tx, session.result or {}, session.evidence)
            analysed = (tx.item.owner_id, UUID(tx.item.details["finding_id"]))
        else:
            said = _failed(store, tx, Reason(session.reason or Reason.AGENT_CRASHED), session.evidence)
    if analysed is not None:
        store.queue.unblock_service(analysed[0], SERVICE, "session")
        follow(store, *analysed, context.log)
    say(context, item_id, said)


def _told(tx: SettleTx) -> str:
    """An end that no settle made; one that failed at the launch is the finding's affair, too (contract 14)."""
    reason, item, now = tx.item.reason or tx.item.state, tx.item, datetime.now(UTC)
    note = None
    if WorkState(item.state) is WorkState.FAILED:
        finding_id = UUID(item.details["finding_id"])
        step = _step(item.owner_id, finding_id, item.id, item.attempt, "analysis_failed", None, None, reason)
        note = noted(item.owner_id, finding_id, [step], actor="platform", now=now)
    tx.announce({"conclusion": item.state, "reason": item.reason}, None, [], also=note)
    return reason


def follow(store: Store, owner_id: UUID, finding_id: UUID, log: Log) -> None:
    """What the owner's rules draw from an analysis: a dismissal or a pull request, or a word why neither.

    Asked again by every sweep for a day, so that a run that died in between loses nothing; what was opened once isn't opened again, whatever
    became of it.
    """
    dismissal.after_analysis(store, owner_id, finding_id, log)
    remediation.after_analysis(store, owner_id, finding_id, log)


def _conclude(tx: SettleTx, result: dict[str, Any], evidence: dict[str, Any] | None) -> str:
    try:
        deep = brief.analysis_of(result)
    except ValidationError:
        return _end(tx, WorkState.FAILED, Reason.RESULT_INVALID, evidence, None)
    believed = uses.believed(deep, evidence)
    reason = Reason.ANALYSED if believed == deep else Reason.ANALYSIS_CONTRADICTED
    return _end(tx, WorkState.COMPLETED, reason, evidence, believed)


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
    return _end(tx, WorkState.CANCELLED if stopped else WorkState.FAILED, reason, evidence, None)


def _end(tx: SettleTx, state: WorkState, reason: Reason, evidence: dict[str, Any] | None, deep: DeepAnalysis | None) -> str:
    """Ends the item with what was found, and with the finding's audit event."""
    item, now = tx.item, datetime.now(UTC)
    finding_id = UUID(item.details["finding_id"])
    shallow = Triage.model_validate(item.details["triage"]) if item.details["triage"] else None
    action = "analysis_completed" if deep is not None else "analysis_failed"
    step = _step(item.owner_id, finding_id, item.id, item.attempt, action, shallow, deep, None if deep else reason)
    found = {"deep": deep.model_dump(mode="json"), "completed_at": now.isoformat()} if deep else {}
    conclusion = "analysed" if deep is not None else "not_analysed"
    tx.conclude(
        state=state,
        reason=reason,
        verdict={"conclusion": conclusion, "reason": str(reason), **({"action": deep.action} if deep else {})},
        evidence=evidence,
        effects=[],
        details=found,
        also=noted(item.owner_id, finding_id, [step], actor="platform", now=now),
    )
    return reason


@op(
    out=Out(Nothing),
    retry_policy=TRANSPORT_RETRY,
    description="Brings the analyses of the named owners in line with their findings and settings.",
)
def sweep_analyses(context: OpExecutionContext, config: Ids, store: StoreResource) -> None:
    platform = store.get()

    def sweep(owner_id: UUID) -> None:
        setting = platform.owners.config(owner_id, SETTINGS)
        if setting is None or not setting.enabled:
            context.log.info(f"owner {owner_id}: {Reason.SECURITY_DISABLED}")
            return
        config = SecurityConfig.model_validate(setting.config)
        opened = queue_analyses(platform, owner_id, config, context.log)
        if config.auto_dismiss_enabled or config.auto_remediation_enabled:
            for finding_id in platform.analyses.completed_since(owner_id, FOLLOWED):
                follow(platform, owner_id, finding_id, context.log)
        context.log.info(f"owner {owner_id}: {opened} analyses opened")

    each(context, config.ids, sweep)
