"""Admission: from a stored delivery to a work item or a stored reason; the database only, decided by the services."""

from datetime import timedelta

from pydantic import ValidationError

from kilo_pipelines.core.markers import Marker
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.text import clean, storable
from kilo_pipelines.core.work import FINAL, WorkState
from kilo_pipelines.ops.security_sync import SOURCE, AlertTaker, settle_duplicates
from kilo_pipelines.services.code_review import admission as code_review
from kilo_pipelines.services.code_review import outcome
from kilo_pipelines.services.code_review.config import CodeReviewConfig
from kilo_pipelines.services.code_review.events import IssueCommentEvent, PullRequestEvent
from kilo_pipelines.services.security import admission as security
from kilo_pipelines.services.security.alerts import BadAlert
from kilo_pipelines.services.security.config import SERVICE as SECURITY
from kilo_pipelines.services.security.sla import SlaPolicy
from kilo_pipelines.store import AdmissionTx, NewItem

SERVICE = "code_review"
# GitHub tells the time of a comment in whole seconds.
CUT = timedelta(seconds=1)


def admit(tx: AdmissionTx, marker: Marker) -> None:
    """Decides one delivery inside its transaction: skip with a reason, or take what it brings."""
    if tx.delivery.event == "pull_request":
        _pull_request(tx, marker)
    elif tx.delivery.event == "issue_comment":
        _comment(tx)
    elif tx.delivery.event == "dependabot_alert":
        _alert(tx)
    else:
        tx.skip(Reason.EVENT_UNKNOWN)


def _alert(tx: AdmissionTx) -> None:
    """The alert's new state, when it is one; what can't be taken waits for the sync, which quarantines it."""
    repository_id = int(tx.delivery.payload["repository"]["id"])
    policy = tx.sla_policy()
    skip = security.refusal(
        tx.config(SECURITY),
        repository_id,
        repository_known=tx.repository(repository_id) is not None,
        synced=policy is not None,
    )
    if skip is not None or policy is None:
        tx.skip(skip or Reason.NOT_SYNCED_YET)
        return
    facts = security.alert_of(tx.delivery.payload)
    if isinstance(facts, BadAlert):
        tx.skip(Reason.ALERT_MALFORMED)
    elif security.is_outdated(facts, tx.alert_known_at(repository_id, SOURCE, facts.source_id)):
        tx.skip(Reason.ALERT_OUTDATED)
    else:
        owner_id, in_force = tx.delivery.owner_id, SlaPolicy.of_stored(*policy)
        taker = AlertTaker(owner_id, repository_id, in_force, first_sync=False)
        good, _ = taker.sort([tx.delivery.payload["alert"]])
        tx.take_alerts(repository_id, SOURCE, good, taker.decide)
        if facts.ghsa_id is not None:
            settle_duplicates(tx.duplicates(repository_id, facts.ghsa_id), tx.dispose, owner_id, repository_id, in_force)


def _comment(tx: AdmissionTx) -> None:
    """`/ok-to-test`: approves the head that the last signed event of the pull request told, for what is live of it."""
    try:
        event = IssueCommentEvent.model_validate(tx.delivery.payload)
    except ValidationError:
        tx.skip(Reason.PAYLOAD_SHAPE_MISMATCH)
        return
    named = code_review.command(event)
    if isinstance(named, Reason):
        tx.skip(named)
        return
    subject = code_review.subject(event.repository.id, event.issue.number)
    live = next((one for one in tx.items(SERVICE, subject) if WorkState(one.state) not in FINAL), None)
    if live is None or tx.repository(event.repository.id) is None:
        tx.skip(Reason.ACTION_IGNORED)
    elif not live.head_sha.startswith(named) or event.comment.created_at + CUT < live.head_since:
        # A comment that comes late was written before this head was there: whoever wrote it saw another one (threats, rule 8).
        tx.skip(Reason.APPROVAL_STALE, item_id=live.id)
    else:
        login = storable(clean(event.comment.user.login))
        tx.approve(
            event.repository.id, event.issue.number, head_sha=live.head_sha, login=login, how="comment", subject_key=subject
        )
        tx.skip(Reason.APPROVAL_NOTED, item_id=live.id)


def _pull_request(tx: AdmissionTx, marker: Marker) -> None:
    """Opens a review and supersedes older ones, or says why not."""
    try:
        event = PullRequestEvent.model_validate(tx.delivery.payload)
    except ValidationError:
        tx.skip(Reason.PAYLOAD_SHAPE_MISMATCH)
        return
    subject = code_review.subject_key(event)
    approver = code_review.approval_of(event)
    if approver is not None and tx.repository(event.repository.id) is not None:
        tx.approve(
            event.repository.id,
            event.pull_request.number,
            head_sha=event.pull_request.head.sha,
            login=approver,
            how="label",
            subject_key=subject,
        )
    decision = code_review.decide(
        event,
        setting=tx.config(SERVICE),
        repository_known=tx.repository(event.repository.id) is not None,
        items=tx.items(SERVICE, subject),
        limits=tx.limits(),
    )
    for item_id in decision.supersede:
        tx.cancel(item_id, Reason.SUPERSEDED)
    for item_id in decision.reexamine:
        tx.reexamine(item_id, decision.skip or Reason.SUPERSEDED)
    if decision.skip is not None:
        tx.skip(decision.skip, item_id=decision.existing_item)
        return
    item_id = tx.open(
        NewItem(
            service=SERVICE,
            subject_key=subject,
            repository_id=event.repository.id,
            priority=0,
            details=decision.details | {"head_since": tx.now},
            wait_s=decision.wait_s,
        )
    )
    review = outcome.ReviewSubject(
        item_id=str(item_id),
        attempt=0,
        subject_key=subject,
        repository_id=event.repository.id,
        full_name=decision.details["full_name"],
        pull_number=decision.details["pull_number"],
        base_ref=decision.details["base_ref"],
        head_sha=decision.details["head_sha"],
        details_url=None,
        settings=CodeReviewConfig.model_validate(decision.details["settings"]),
    )
    tx.intend(item_id, outcome.queued_effects(review, marker))
