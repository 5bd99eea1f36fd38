"""The op of a self-hosted session: claim, run under a lease, store the outcome, call back."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Self, TypeVar
from uuid import UUID

from dagster import DagsterExecutionInterruptedError, Nothing, OpExecutionContext, Out, op

from kilo_pipelines.cloud_agent.protocol import Heartbeat, SessionOutcome, SessionSpec, SessionStatus
from kilo_pipelines.core.limits import Amount, Usage
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.session import SessionTask
from kilo_pipelines.ops.ids import Ids
from kilo_pipelines.resources.cloud_agent import CloudAgentResource
from kilo_pipelines.resources.github import GitHubResource, ProviderError
from kilo_pipelines.resources.store import StoreResource
from kilo_pipelines.services.code_review.brief import CodeReviewTask
from kilo_pipelines.services.security.brief import AnalysisTask
from kilo_pipelines.services.security.remediation_brief import RemediationTask
from kilo_pipelines.store import DatabaseAwayError, SessionClaim, Store
from kilo_pipelines.telemetry import traces

T = TypeVar("T")

# How often the interrupt column is read: an interrupt must be obeyed within 5 s, and the read is one indexed row.
INTERRUPT_POLL_SECONDS = 1.0

# Each service's half of a session, made of the session's stored task.
TASKS: dict[str, Callable[[dict[str, Any]], SessionTask]] = {
    "code_review": CodeReviewTask,
    "security_analysis": AnalysisTask,
    "remediation": RemediationTask,
}


class LeasedControl:
    """The engine's half of a running session: lease, interrupt column, events.

    A thread of its own speaks to the database, because a call over a network that is gone comes back late: the runner hears what is
    known, and that the lease is over as soon as the clock says so. A database that doesn't answer ends nothing before.
    """

    def __init__(
        self,
        context: OpExecutionContext,
        store: Store,
        claim: SessionClaim,
        spec: SessionSpec,
        *,
        lease_s: float,
        every_s: float,
    ) -> None:
        self._spec = spec
        self._lease_s = lease_s
        self._every_s = every_s
        self._context = context
        self._store = store
        self._claim = claim
        self._kept_at = time.monotonic()
        self._next_beat = 0.0
        self._last = Heartbeat.OK
        self._wanted = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._keep, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_failure: object) -> None:
        """A beat that still waits for its answer holds nobody up: it can't extend what has ended."""
        self._ended = True
        self._wanted.set()

    def _keep(self) -> None:
        while not self._ended:
            asked = time.monotonic()
            self._next_beat = asked + INTERRUPT_POLL_SECONDS
            answer = self._store.sessions.beat(self._claim, self._lease_s)
            if answer != "unreachable":
                self._kept_at = asked
                self._last = Heartbeat(answer)
            self._wanted.wait(self._every_s)
            self._wanted.clear()

    def beat(self) -> Heartbeat:
        """What is known of lease and interrupt column, at once; asks for a look where the last one is `INTERRUPT_POLL_SECONDS` old."""
        if time.monotonic() >= self._next_beat:
            self._wanted.set()
        return Heartbeat.LOST if self.over() else self._last

    def over(self) -> bool:
        """Whether the lease has ended by this host's clock."""
        return time.monotonic() - self._kept_at > self._lease_s

    def insist(self, call: Callable[[], T]) -> T:
        """The call's answer, asked again while the database is away and the lease still ours; DatabaseAwayError afterwards."""
        while True:
            try:
                return call()
            except DatabaseAwayError:
                if self.over():
                    raise
                time.sleep(INTERRUPT_POLL_SECONDS)

    def event(self, kind: str, data: dict[str, Any]) -> None:
        """Keeps the step and shows it in the run's log."""
        self.insist(partial(self._store.sessions.event, self._claim, kind, data))
        # A line of the log isn't worth a session: the step is kept.
        with suppress(DatabaseAwayError):
            self._context.log.info(f"{kind}: " + ", ".join(f"{name} {value}" for name, value in data.items()) if data else kind)

    def spent(self, meter: str, usage: Usage) -> bool:
        """Keeps it in the ledger; a database that doesn't answer is told with the next look: a meter only grows."""
        try:
            self._store.spend.record(
                self._claim.owner_id,
                meter,
                item_id=self._claim.item_id,
                session_id=self._claim.session_id,
                service=self._spec.service,
                model=self._spec.model,
                usage=usage,
                price=self._spec.limits.price,
            )
        except DatabaseAwayError:
            return False
        return True

    def accepted(self, outcome: SessionOutcome) -> bool:
        """Keeps it with the session, under its fence."""
        told = outcome.model_dump(mode="json")
        return self.insist(partial(self._store.sessions.accept, self._claim, result=told["result"], evidence=told["evidence"]))


@op(out=Out(Nothing), description="Runs one agent session in the sandbox and reports how it ended.")
def run_agent_session(
    context: OpExecutionContext, config: Ids, store: StoreResource, github: GitHubResource, cloud_agent: CloudAgentResource
) -> None:
    platform = store.get()
    session_id = UUID(config.ids[0])
    claim = platform.sessions.claim(session_id, run_id=context.run_id, lease_s=cloud_agent.lease_seconds())
    if not isinstance(claim, SessionClaim):
        context.log.info(f"nothing to run: {claim.outcome} (session is {claim.state})")
        return
    with traces.following(
        claim.trace,
        "session",
        owner=claim.owner_id,
        item=claim.item_id,
        session=session_id,
        fence=claim.fence,
        run=context.run_id,
    ) as span:
        _carry_out(context, platform, github, cloud_agent, claim, span)


def _carry_out(
    context: OpExecutionContext,
    platform: Store,
    github: GitHubResource,
    cloud_agent: CloudAgentResource,
    claim: SessionClaim,
    span: traces.Span,
) -> None:
    """The claimed session from its start to its report."""
    lease_s = cloud_agent.lease_seconds()
    accepted = SessionOutcome.model_validate(claim.accepted) if claim.accepted is not None else None
    spec = SessionSpec.model_validate(claim.spec)
    if not cloud_agent.agent_ready(spec.agent):
        unavailable = SessionOutcome(status=SessionStatus.FAILED, reason=Reason.AGENT_UNAVAILABLE)
        _announce(context, cloud_agent, claim, unavailable, _store_outcome(platform, claim, unavailable))
        return

    def token(mint: Callable[[int, int], str]) -> str:
        item = platform.queue.get(claim.item_id)
        if item is None:
            raise ProviderError(Reason.OWNER_CHANGED, retryable=False)
        return mint(item.installation_id, item.repository_id)

    spec = _bounded(spec, platform.spend.of_session(claim.owner_id, claim.session_id))
    with LeasedControl(context, platform, claim, spec, lease_s=lease_s, every_s=cloud_agent.heartbeat_seconds()) as control:
        try:
            outcome = cloud_agent.runner(spec.agent).run(
                spec,
                TASKS[spec.service](spec.task),
                control,
                partial(token, github.clone_token),
                partial(token, github.push_token),
                accepted,
            )
        except ProviderError as failure:
            outcome = SessionOutcome(status=SessionStatus.FAILED, reason=failure.reason)
        except DagsterExecutionInterruptedError:
            _after_interrupt(context, platform, claim, lease_s)
            raise
        span.set(service=spec.service, repository=spec.repository.external_id, outcome=outcome.status, reason=outcome.reason)
        if outcome.evidence is not None:
            seen = outcome.evidence
            span.set(
                turns=seen.turns,
                files=seen.changed_blobs,
                covered=seen.covered,
                tokens_in=seen.tokens_in,
                tokens_out=seen.tokens_out,
            )
        if control.beat() is Heartbeat.LOST:
            context.log.warning("the lease went to somebody else: this outcome is not reported")
            return
        outcome = _by_budget(spec, outcome)
        # A cut that ends within the lease costs no session.
        stored = control.insist(partial(_store_outcome, platform, claim, outcome))
    _announce(context, cloud_agent, claim, outcome, stored)


def _bounded(spec: SessionSpec, spent: Amount) -> SessionSpec:
    """A launch that follows another one of the same session has what that one left of the grant."""
    limits = spec.limits
    money = None if limits.micro_usd is None else limits.micro_usd - spent.micro_usd
    return spec.model_copy(
        update={"limits": limits.model_copy(update={"tokens": limits.tokens - spent.tokens, "micro_usd": money})}
    )


def _by_budget(spec: SessionSpec, outcome: SessionOutcome) -> SessionOutcome:
    """A session that ended for want of tokens or money which only this day lacked is tried again on the next."""
    turns = outcome.evidence.turns if outcome.evidence is not None else 0
    if outcome.reason != Reason.BUDGET_EXCEEDED or not spec.limits.cut or turns >= spec.limits.turns:
        return outcome
    return outcome.model_copy(update={"reason": Reason.BUDGET_EXHAUSTED})


def _after_interrupt(context: OpExecutionContext, store: Store, claim: SessionClaim, lease_s: float) -> None:
    """Terminated in the UI (the interrupt column says so) or the worker stops: then the engine tries again."""
    if store.sessions.beat(claim, lease_s) == Heartbeat.CANCEL:
        store.sessions.finish(claim, status=SessionStatus.INTERRUPTED, reason=Reason.INTERRUPTED)
        context.log.info("interrupted: the sandbox is gone and the session is closed")
    else:
        store.sessions.requeue(claim, Reason.WORKER_STOPPING)
        context.log.info("the worker stops: the session waits for another one")


def _store_outcome(store: Store, claim: SessionClaim, outcome: SessionOutcome) -> bool:
    """Stores the outcome, guarded by the fence: False when a later claim owns the session."""
    return store.sessions.finish(
        claim,
        status=outcome.status,
        reason=outcome.reason,
        detail=outcome.detail,
        result=outcome.result,
        evidence=outcome.evidence.model_dump(mode="json") if outcome.evidence else None,
    )


def _announce(
    context: OpExecutionContext, cloud_agent: CloudAgentResource, claim: SessionClaim, outcome: SessionOutcome, stored: bool
) -> None:
    """Calls back; the stored row is the truth, the callback the news."""
    if not stored:
        context.log.warning("a later claim owns this session: the outcome was not stored")
        return
    answer = cloud_agent.call_back(claim.session_id, claim.callback_token, outcome)
    context.log.info(f"session {outcome.status}{f' ({outcome.reason})' if outcome.reason else ''}; callback answered {answer}")
