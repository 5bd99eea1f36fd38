"""Admission: from a stored delivery to a work item or a stored reason; the database only, decided by the services."""

from pydantic import ValidationError

from kilo_pipelines.core.markers import Marker
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.services.code_review import admission as code_review
from kilo_pipelines.services.code_review import outcome
from kilo_pipelines.services.code_review.config import CodeReviewConfig
from kilo_pipelines.services.code_review.events import PullRequestEvent
from kilo_pipelines.store import AdmissionTx, NewItem

SERVICE = "code_review"


def admit(tx: AdmissionTx, marker: Marker) -> None:
    """Decides one delivery inside its transaction: skip with a reason, or open an item and supersede older ones."""
    if tx.delivery.event != "pull_request":
        tx.skip(Reason.EVENT_UNKNOWN)
        return
    try:
        event = PullRequestEvent.model_validate(tx.delivery.payload)
    except ValidationError:
        tx.skip(Reason.PAYLOAD_SHAPE_MISMATCH)
        return
    subject = code_review.subject_key(event)
    decision = code_review.decide(
        event,
        setting=tx.config(SERVICE),
        repository_known=tx.repository(event.repository.id) is not None,
        items=tx.items(SERVICE, subject),
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
            details=decision.details,
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
