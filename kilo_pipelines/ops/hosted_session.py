"""The op of hosted sessions: one step of one session, then the run ends. No run waits for a hosted agent.

A step finds the session in one of its states (docs/cloud-agent.md) and does what is next: compose and prepare, initiate, read
the present turn back, send the next message, interrupt, or close what an ended session left at the service. Whatever dies in
between, the next step goes on from what is stored.
"""

import secrets
from datetime import timedelta
from uuid import UUID

from dagster import DagsterExecutionInterruptedError, Nothing, OpExecutionContext, Out, op

from kilo_pipelines import failpoints
from kilo_pipelines.cloud_agent import facts as ground
from kilo_pipelines.cloud_agent import hosted_turns as turns
from kilo_pipelines.cloud_agent.git import GitError
from kilo_pipelines.cloud_agent.hosted import CloudAgentError, HostedClient
from kilo_pipelines.cloud_agent.protocol import Heartbeat, SessionSpec, SessionStatus
from kilo_pipelines.core.evidence import Evidence
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.retry import HOSTED_CLOSINGS, hosted_wait
from kilo_pipelines.core.session import ReportingTask
from kilo_pipelines.ops.agent_session import LeasedControl
from kilo_pipelines.ops.ids import Ids
from kilo_pipelines.resources.cloud_agent import CloudAgentResource
from kilo_pipelines.resources.github import GitHubResource, ProviderError
from kilo_pipelines.resources.store import StoreResource
from kilo_pipelines.services.code_review.brief import CodeReviewTask
from kilo_pipelines.store import HostedClaim, SessionRow, Store
from kilo_pipelines.telemetry import traces

# As of self-hosted sessions (cloud_agent/runner.py).
NONCE_BYTES = 16
DETAIL_CHARS = 2_000


class _LateError(Exception):
    """The session is somebody else's by now: this step has nothing more to say."""


class _StoppedError(Exception):
    """The session was asked to stop while this step worked."""


@op(out=Out(Nothing), description="Does what is next for one hosted session, then leaves it until its next look or callback.")
def step_hosted_session(
    context: OpExecutionContext, config: Ids, store: StoreResource, github: GitHubResource, cloud_agent: CloudAgentResource
) -> None:
    take_step(context, store.get(), github, cloud_agent, UUID(config.ids[0]))


def take_step(
    context: OpExecutionContext, store: Store, github: GitHubResource, cloud_agent: CloudAgentResource, session_id: UUID
) -> None:
    """The step that is next for this session, if it is due and nobody else has it."""
    claim = store.hosted.claim(session_id, run_id=context.run_id, lease_s=cloud_agent.lease_seconds())
    if not isinstance(claim, HostedClaim):
        context.log.info(f"nothing to do: {claim.outcome} (session is {claim.state})")
        return
    if claim.ended:
        _close(context, store, cloud_agent, claim)
        return
    step = _Step(context, store, github, cloud_agent, claim)
    held = claim.session
    try:
        with traces.following(
            held.trace,
            "hosted_step",
            owner=held.owner_id,
            item=held.item_id,
            session=held.session_id,
            fence=held.fence,
            run=context.run_id,
        ):
            step.run()
    finally:
        # After the last heartbeat, which would put its short lease in place of the parked session's.
        if step.parked is not None:
            wait, columns = step.parked
            if not store.hosted.park(claim, wait, **columns):
                context.log.warning("a later claim owns this session: the step's end was not stored")


class _Step:
    """One step of a session that hasn't ended."""

    control: LeasedControl

    def __init__(
        self,
        context: OpExecutionContext,
        store: Store,
        github: GitHubResource,
        cloud_agent: CloudAgentResource,
        claim: HostedClaim,
    ) -> None:
        self._context, self._store, self._github, self._cloud_agent, self._claim = context, store, github, cloud_agent, claim
        self._spec = SessionSpec.model_validate(claim.session.spec)
        self._results = list(claim.results)
        self._plan = turns.Plan.model_validate(claim.plan) if claim.plan is not None else None
        # How the step ends when the session goes on: the wait until the next one, and what it found out.
        self.parked: tuple[timedelta, dict[str, object]] | None = None

    def run(self) -> None:
        """The step under its lease, with every way in which it may end."""
        lease_s, every_s = self._cloud_agent.lease_seconds(), self._cloud_agent.heartbeat_seconds()
        with LeasedControl(
            self._context, self._store, self._claim.session, self._spec, lease_s=lease_s, every_s=every_s
        ) as self.control:
            try:
                self.take()
            except _LateError:
                self._context.log.warning("a later claim owns this session: this step wrote nothing more")
            except _StoppedError:
                self.end(SessionStatus.INTERRUPTED, Reason.INTERRUPTED)
            except (GitError, ProviderError) as failure:
                self.end(SessionStatus.FAILED, failure.reason, str(failure))
            except CloudAgentError as failure:
                self.failed(failure)
            except DagsterExecutionInterruptedError:
                # The next step goes on from what is stored; the session itself runs elsewhere.
                self.parked = (timedelta(), {})
                raise

    def take(self) -> None:
        """What is next, to its end or to the next wait."""
        claim, spec = self._claim, self._spec
        if claim.interrupt_requested is not None:
            raise _StoppedError
        if spec.service != "code_review" or spec.writes:
            self.end(SessionStatus.FAILED, Reason.HOSTED_WORK_REFUSED)
            return
        client = self._cloud_agent.hosted()
        task: ReportingTask = CodeReviewTask(spec.task, part_chars=turns.PART_CHARS)
        if claim.state == "initiated":
            # What is ready counts, however late it is looked at: it was worked for and is paid.
            self._look(client, task)
            return
        planned = self._plan or self._compose(task)
        if planned is None:
            return
        self._plan = planned
        cloud_session = claim.cloud_session_id or self._prepare(client, planned)
        self._look_up()
        ack = client.initiate(cloud_session)
        failpoints.reach("after", "hosted_initiate")
        message = ack.turn if ack is not None else client.session(cloud_session).first_turn
        self._park(
            self._cloud_agent.hosted_poll(),
            state="initiated",
            message_id=message,
            initiated_at=claim.initiated_at or claim.now,
            tries=0,
        )
        self._event("hosted_initiated", {"session": cloud_session, "turn": message})

    # -- before the first turn ---------------------------------------------------------------------------------------------

    def _compose(self, task: ReportingTask) -> turns.Plan | None:
        """Facts by the courier, brief, plan; kept before anything is sent. None when the session ended here."""
        repositories, spec = self._cloud_agent.repositories(), self._spec
        self._event("fetch_started", {"repository": spec.repository.full_name})
        commits = ground.fetch(repositories, spec, self._token, self._look_up)
        facts = ground.read(repositories, spec, commits)
        self._event("diff_made", {"files": len(facts.entries), "diff": facts.diff_hash[:12]})
        nonce = secrets.token_hex(NONCE_BYTES)
        planned = turns.plan(spec, facts, task.compose(facts, nonce, None), nonce)
        if isinstance(planned, Reason):
            self.end(SessionStatus.FAILED, planned)
            return None
        self._kept(self._store.hosted.keep(self._claim, plan=planned.model_dump(mode="json")))
        return planned

    def _token(self) -> str:
        return self._github.clone_token(self._claim.installation_id, self._claim.repository_id)

    def _prepare(self, client: HostedClient, planned: turns.Plan) -> str:
        """Registers the session and stores its id where none is stored; a lost answer costs a session that never starts."""
        self._look_up()
        callback = self._cloud_agent.hosted_callback(self._spec.session_id, self._claim.session.callback_token)
        organization = self._cloud_agent.hosted_organization()
        prepared = client.prepare(turns.prepare_input(self._spec, planned, callback=callback, organization=organization))
        failpoints.reach("after", "hosted_prepare")
        self._kept(self._store.hosted.keep_ids(self._claim, prepared.session_id, prepared.kilo_session_id))
        self._event("hosted_prepared", {"session": prepared.session_id, "parts": len(planned.prompts)})
        return prepared.session_id

    # -- turns -------------------------------------------------------------------------------------------------------------

    def _look(self, client: HostedClient, task: ReportingTask) -> None:
        """Reads the present turn back from the service and goes on from it."""
        claim, planned = self._claim, self._plan
        assert claim.cloud_session_id is not None and planned is not None  # noqa: S101  # an initiated session has both
        message = claim.message_id or client.session(claim.cloud_session_id).first_turn
        if message is None:
            self._park(self._cloud_agent.hosted_poll(), tries=0)
            return
        told = turns.read(client.result(claim.cloud_session_id, message), task, planned.nonce)
        if isinstance(told, turns.Waiting):
            self._wait(client, claim.cloud_session_id, message)
            return
        if isinstance(told, turns.Failed):
            interrupted = told.reason is Reason.INTERRUPTED
            self.end(SessionStatus.INTERRUPTED if interrupted else SessionStatus.FAILED, told.reason, told.detail)
            return
        if told.result is None:
            if claim.repaired:
                self.end(SessionStatus.FAILED, Reason.RESULT_INVALID, "; ".join(told.problems))
                return
            self._event("repair_asked", {"problems": len(told.problems)})
            self._send(client, task.repair_prompt(told.problems, planned.nonce, None), repaired=True)
            return
        self._results.append(told.result)
        self._event("part_reported", {"part": len(self._results), "of": len(planned.prompts)})
        if len(self._results) < len(planned.prompts):
            self._send(
                client,
                planned.prompts[len(self._results)],
                part=len(self._results),
                results=self._results,
                repaired=False,
            )
            return
        self.end(SessionStatus.COMPLETED, None, result=task.merge(self._results))

    def _send(self, client: HostedClient, prompt: str, **columns: object) -> None:
        """The next message. An answer that is lost is asked for again: the service may then have it twice, which costs a turn."""
        assert self._claim.cloud_session_id is not None  # noqa: S101  # an initiated session has one
        if self._over():
            self.end(SessionStatus.FAILED, Reason.SESSION_TIMEOUT)
            return
        self._look_up()
        ack = client.send_message(self._claim.cloud_session_id, prompt, mode=turns.MODE, model=self._spec.model)
        self._park(self._cloud_agent.hosted_poll(), message_id=ack.turn, tries=0, **columns)

    def _wait(self, client: HostedClient, cloud_session: str, message: str) -> None:
        """The turn is under way; one that nobody works on any more ends here instead of at the hard cap."""
        if self._over():
            self.end(SessionStatus.FAILED, Reason.SESSION_TIMEOUT)
            return
        silence = timedelta(seconds=self._spec.limits.silence_s)
        if self._claim.initiated_at is not None and self._claim.now - self._claim.initiated_at > silence:
            health = client.session_health(cloud_session)
            if health.execution == "stale" or health.sandbox == "destroyed":
                self.end(SessionStatus.FAILED, Reason.SESSION_LOST, f"sandbox {health.sandbox}, turn {health.execution}")
                return
        self._park(self._cloud_agent.hosted_poll(), message_id=message, tries=0)

    def _over(self) -> bool:
        cap = timedelta(seconds=self._spec.limits.hard_cap_s)
        return self._claim.initiated_at is not None and self._claim.now - self._claim.initiated_at > cap

    # -- ends --------------------------------------------------------------------------------------------------------------

    def failed(self, failure: CloudAgentError) -> None:
        """A call that may be made again waits, a bounded number of times; else the session ends with the reason."""
        tries = self._claim.tries + 1
        wait = hosted_wait(tries) if failure.retry else None
        if wait is None or self._over():
            self.end(SessionStatus.FAILED, Reason.SESSION_TIMEOUT if self._over() else failure.reason, failure.detail)
            return
        self._event("hosted_waits", {"reason": str(failure.reason), "tries": tries})
        self._park(wait, tries=tries, reason=str(failure.reason))

    def end(
        self, status: SessionStatus, reason: Reason | None, detail: str | None = None, result: dict[str, object] | None = None
    ) -> None:
        """Stores how the session ended, under its fence; what is left at the service is closed by a step of its own."""
        evidence: Evidence | None = turns.evidence(self._plan, self._results) if self._plan is not None else None
        stored = self._store.sessions.finish(
            self._claim.session,
            status=status,
            reason=reason,
            detail=detail[:DETAIL_CHARS] if detail else None,
            result=result,
            evidence=evidence.model_dump(mode="json") if evidence else None,
        )
        ended = f"session {status}{f' ({reason})' if reason else ''}"
        self._context.log.info(ended if stored else "a later claim owns this session: the outcome was not stored")

    def _look_up(self) -> None:
        """Heartbeat between two steps of the work; raises when it is to end."""
        beat = self.control.beat()
        if beat is Heartbeat.CANCEL:
            raise _StoppedError
        if beat is Heartbeat.LOST:
            raise _LateError

    def _event(self, kind: str, data: dict[str, object]) -> None:
        self.control.event(kind, data)

    def _park(self, wait: timedelta, **columns: object) -> None:
        self.parked = (wait, columns)

    @staticmethod
    def _kept(done: bool) -> None:
        if not done:
            raise _LateError


def _close(context: OpExecutionContext, store: Store, cloud_agent: CloudAgentResource, claim: HostedClaim) -> None:
    """Interrupts what may still run there and removes the session; tried again a bounded number of times, then said."""
    row: SessionRow | None = store.sessions.get(claim.session.session_id)
    try:
        if claim.cloud_session_id is not None:
            client = cloud_agent.hosted()
            if row is not None and row.state != "completed":
                client.interrupt(claim.cloud_session_id)
            client.delete(claim.cloud_session_id)
    except CloudAgentError as failure:
        wait = hosted_wait(claim.closings + 1, HOSTED_CLOSINGS) if failure.retry else None
        if wait is not None:
            store.hosted.put_off(claim, wait)
            context.log.warning(
                f"the hosted session isn't closed yet ({failure.reason}); again after {wait.total_seconds():.0f} s"
            )
            return
        store.hosted.close(claim, str(failure.reason))
        context.log.error(f"the hosted session {claim.cloud_session_id} could not be closed: {failure.reason}")
        return
    store.hosted.close(claim)
    context.log.info("nothing is left at the hosted service")
