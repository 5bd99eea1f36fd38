"""Ops of Code Review: launch (claim, re-read, session) and settle (verdict, effects, slot)."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from dagster import Nothing, OpExecutionContext, Out, op

from kilo_pipelines.core import retry
from kilo_pipelines.core.approval import is_outside, refusal
from kilo_pipelines.core.evidence import Evidence
from kilo_pipelines.core.owners import review_pools
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.work import FINAL, WorkState
from kilo_pipelines.ops.effects import TRANSPORT_RETRY
from kilo_pipelines.ops.ids import Ids, each
from kilo_pipelines.ops.items import may_start, provider_failed, reopened_by_person, say
from kilo_pipelines.ops.markers import marker_of
from kilo_pipelines.resources.cloud_agent import CloudAgentResource
from kilo_pipelines.resources.github import GitHubInstallation, GitHubResource, ProviderError, PullState
from kilo_pipelines.resources.store import StoreResource
from kilo_pipelines.services.code_review import launch, outcome
from kilo_pipelines.services.code_review.admission import SERVICE
from kilo_pipelines.services.code_review.config import CodeReviewConfig
from kilo_pipelines.store import Claimed, ItemRow, SessionRow, Store

# What waits for a person is looked at once a day: its pull request may be closed by now. An approval wakes it at once.
APPROVAL_WAIT = timedelta(days=1)


def subject_of(
    item: ItemRow | Claimed, attempt: int, subject_key: str, details_url: str | None, **present: Any
) -> outcome.ReviewSubject:
    """What is reviewed, out of the stored row and what the provider says at present."""
    item_id = item.item_id if isinstance(item, Claimed) else item.id
    details = {**item.details, **present}
    return outcome.ReviewSubject(
        item_id=str(item_id),
        attempt=attempt,
        subject_key=subject_key,
        repository_id=item.repository_id,
        full_name=details["full_name"],
        pull_number=details["pull_number"],
        base_ref=details["base_ref"],
        head_sha=details["head_sha"],
        details_url=details_url,
        settings=CodeReviewConfig.model_validate(details["settings"]),
    )


@op(
    out=Out(Nothing), retry_policy=TRANSPORT_RETRY, description="Claims reviews, re-reads their pull requests, launches sessions."
)
def launch_reviews(
    context: OpExecutionContext, config: Ids, store: StoreResource, github: GitHubResource, cloud_agent: CloudAgentResource
) -> None:
    each(context, config.ids, lambda item_id: _launch(context, store.get(), github, cloud_agent, item_id))


def _launch(
    context: OpExecutionContext, store: Store, github: GitHubResource, cloud_agent: CloudAgentResource, item_id: UUID
) -> None:
    if reopened_by_person(context, store, item_id):
        return
    claim = store.queue.claim(
        item_id,
        SERVICE,
        run_id=context.run_id,
        pools=review_pools,
        lease_s=cloud_agent.lease_seconds(),
        costs=github.launch_costs(),
        ask=cloud_agent.needs(None),
    )
    if not isinstance(claim, Claimed):
        say(context, item_id, claim.outcome)
        return
    hosted = cloud_agent.is_hosted()
    if hosted and (claim.limits.scopes(SERVICE) or claim.limits.session_usd is not None):
        # The service tells nobody what a session used: a budget over it would be a lie.
        store.queue.conclude(claim, WorkState.FAILED, Reason.HOSTED_UNMETERED)
        say(context, item_id, Reason.HOSTED_UNMETERED)
        return
    details = claim.details
    marker = marker_of(store)
    try:
        reader = github.reader(claim.installation_id, claim.repository_id)
        pull = reader.pull(details["full_name"], details["pull_number"])
        summary = reader.summary_comment(details["full_name"], details["pull_number"], marker.make("summary", claim.subject_key))
        guest = _guest(store, reader, claim, pull)
    except ProviderError as failure:
        provider_failed(context, store, claim, failure)
        return
    head = launch.head_of(pull)
    if head["head_sha"] != details["head_sha"]:
        head["head_since"] = datetime.now(UTC)
    stop = launch.stop_reason(pull, claim.repository_id, reviewed=store.reviews.reviewed_elsewhere(claim, head))
    if stop is not None:
        store.queue.conclude(claim, *stop)
        say(context, item_id, stop[1], pull_request=pull.url)
        return
    if hosted and guest is not None:
        # A network without bounds and an outsider's text: no approval makes that safe (threats, rule 7), so none is asked for.
        store.queue.conclude(claim, WorkState.FAILED, Reason.HOSTED_WORK_REFUSED)
        say(context, item_id, Reason.HOSTED_WORK_REFUSED, pull_request=pull.url)
        return
    if guest is not None and guest.refusal is Reason.OUTSIDER_SKIPPED:
        store.queue.conclude(claim, WorkState.CANCELLED, guest.refusal)
        say(context, item_id, guest.refusal, pull_request=pull.url)
        return
    if guest is not None and guest.refusal is not None:
        subject = subject_of(claim, claim.attempt, claim.subject_key, cloud_agent.details_url(context.run_id), **head)
        told = outcome.approval_effects(subject, marker, guest.refusal)
        until = datetime.now(UTC) + APPROVAL_WAIT
        store.queue.hold(claim, until=until, reason=guest.refusal, details=head, effects=told)
        say(context, item_id, guest.refusal, pull_request=pull.url)
        return
    previous = store.reviews.previous_head(claim.owner_id, claim.repository_id, pull.number, pull.head_sha)
    task = launch.task_of(pull, details, previous_summary=summary, previous_head=previous)
    session_id = uuid4()
    subject = subject_of(claim, claim.attempt, claim.subject_key, cloud_agent.details_url(context.run_id), **head)
    spec = cloud_agent.spec(session_id, claim.owner_id, pull, task, claim.granted)
    receipt = cloud_agent.receipt(
        spec,
        text=["outsider", "member"] if guest is not None else ["member"],
        effects=True,
        # A member's own pull request is that member's wish to have it reviewed.
        approved_by=guest.approved_by if guest is not None else f"github:{pull.author}",
    )
    if not may_start(context, store, claim, receipt):
        return
    launched = store.sessions.launch(
        claim,
        session_id=session_id,
        spec=spec,
        receipt=receipt,
        head=head,
        effects=outcome.start_effects(subject, marker, admitted_head=details["head_sha"]),
        cap_s=cloud_agent.cap_seconds(),
    )
    say(context, item_id, "launched" if launched else "late_writer", pull_request=pull.url)
    context.log.info(f"session {session_id}, attempt {claim.attempt}, fence {claim.fence}")


@dataclass(frozen=True)
class _Guest:
    """A pull request of an outsider: why it isn't reviewed now, or who approved its head."""

    refusal: Reason | None
    approved_by: str | None


def _guest(store: Store, reader: GitHubInstallation, claim: Claimed, pull: PullState) -> _Guest | None:
    """Whose pull request it is, by the provider's word of now; None for a member's. Raises ProviderError."""
    is_bot = pull.author_type == "Bot"
    inside = pull.head_repository_id == claim.repository_id
    may_write = inside and not is_bot and reader.may_write(pull.full_name, pull.author)
    if not is_outside(head_repository_id=pull.head_repository_id, repository_id=claim.repository_id, author_may_write=may_write):
        return None
    approvals = []
    for one in store.approvals.of_pull(claim.owner_id, claim.repository_id, pull.number):
        if one.granted is None:
            granted = reader.may_write(pull.full_name, one.login)
            store.approvals.decide(claim.owner_id, one.id, granted=granted, reason=None if granted else Reason.APPROVAL_REFUSED)
            approvals.append(replace(one, granted=granted))
        else:
            approvals.append(one)
    approved = next((one.by for one in approvals if one.granted and one.head_sha == pull.head_sha), None)
    # Bots that come so far are let in by the owner's settings; nobody has to approve each of their heads.
    policy = "review" if is_bot and inside else claim.limits.outsiders
    return _Guest(refusal(policy, pull.head_sha, approvals), approved)


@op(out=Out(Nothing), retry_policy=TRANSPORT_RETRY, description="Turns ended sessions into verdicts, effects and free slots.")
def settle_reviews(
    context: OpExecutionContext, config: Ids, store: StoreResource, github: GitHubResource, cloud_agent: CloudAgentResource
) -> None:
    each(context, config.ids, lambda item_id: _settle(context, store.get(), github, cloud_agent, item_id))


def _settle(
    context: OpExecutionContext, store: Store, github: GitHubResource, cloud_agent: CloudAgentResource, item_id: UUID
) -> None:
    item = store.queue.get(item_id)
    if item is None:
        say(context, item_id, Reason.MOVED_ON)
        return
    # Only a session's end may have findings to post; what ended without one is told of without asking the provider.
    existing = _existing_comments(context, github, item) if WorkState(item.state) is WorkState.RUNNING else []
    marker = marker_of(store)
    with store.settlements.open(item_id) as tx:
        if tx is None:
            return
        session = tx.session()
        subject = subject_of(tx.item, tx.item.attempt, tx.item.subject_key, cloud_agent.details_url(context.run_id))
        siblings = [
            outcome.Sibling(row["pull_number"], row["state"], (row["verdict"] or {}).get("conclusion"))
            for row in tx.siblings()
            if row["reason"] != Reason.PULL_CLOSED
        ]
        if WorkState(tx.item.state) is WorkState.RUNNING and session is not None and session.ended_at is not None:
            if session.reason in retry.BLOCKING:
                until = store.queue.block_service(tx.item.owner_id, SERVICE, "session", session.reason, item_id)
                tx.retry(session.reason, max(timedelta(), until - datetime.now(UTC)) if until else timedelta())
                say(context, item_id, f"{session.reason}: the service waits")
                return
            if session.state == "completed":
                store.queue.unblock_service(tx.item.owner_id, SERVICE, "session")
            again = (
                retry.next_attempt(Reason(session.reason), tx.failures() + 1)
                if session.state == "failed" and session.reason
                else None
            )
            if again is not None:
                tx.retry(str(session.reason), again)
                say(context, item_id, f"{session.reason}: tried again after {again.total_seconds():.0f} s")
                return
            found = outcome.interpret(subject, _end_of(session), existing, siblings, marker)
            evidence = session.evidence
            if retry.disables(found.verdict.reason):
                tx.disable_service(found.verdict.reason)
            tx.conclude(
                state=found.state, reason=found.reason, verdict=found.stored_verdict(), evidence=evidence, effects=found.effects
            )
        elif WorkState(tx.item.state) in FINAL and not tx.item.announced:
            found = outcome.announce(subject, tx.item.state, Reason(tx.item.reason or Reason.USER_CANCELLED), siblings, marker)
            evidence = session.evidence if session else None
            if retry.disables(found.verdict.reason):
                tx.disable_service(found.verdict.reason)
            tx.announce(found.stored_verdict(), evidence, [] if tx.replaced() else found.effects)
        else:
            say(context, item_id, Reason.MOVED_ON)
            return
    ledger = Evidence.model_validate(evidence) if evidence else None
    say(context, item_id, found.reason, pull_request=item.details["url"])
    context.log.info(
        f"verdict {found.verdict.conclusion} ({found.verdict.reason}); findings {found.counts};"
        f" covered {ledger.covered if ledger else 0} of {ledger.changed_blobs if ledger else 0} blobs"
    )


def _existing_comments(context: OpExecutionContext, github: GitHubResource, item: ItemRow) -> list[Any]:
    """Inline comments that stand there already; without them a repeated finding would be posted twice, never lost."""
    try:
        reader = github.reader(item.installation_id, item.repository_id)
        return list(reader.review_comments(item.details["full_name"], item.details["pull_number"]))
    except ProviderError as failure:
        context.log.warning(f"existing comments are not known: {failure.reason}")
        return []


def _end_of(session: SessionRow) -> outcome.SessionEnd:
    evidence = Evidence.model_validate(session.evidence) if session.evidence else None
    return outcome.SessionEnd(str(session.id), session.state, session.reason, session.result, evidence)
