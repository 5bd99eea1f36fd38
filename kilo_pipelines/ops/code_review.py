"""Ops of Code Review: launch (claim, re-read, session) and settle (verdict, effects, slot)."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

from dagster import MetadataValue, Nothing, OpExecutionContext, Out, op

from kilo_pipelines import tags
from kilo_pipelines.core.owners import review_slots
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.ops.effects import TRANSPORT_RETRY
from kilo_pipelines.ops.ids import Ids
from kilo_pipelines.resources.cloud_agent import CloudAgentResource
from kilo_pipelines.resources.github import GitHubResource, ProviderError
from kilo_pipelines.resources.store import StoreResource
from kilo_pipelines.services.code_review import launch, outcome
from kilo_pipelines.store import Claimed, Store

SERVICE = "code_review"

# A provider that refused or was away is asked again after this long; the item waits meanwhile without a slot.
PROVIDER_RETRY = timedelta(seconds=30)


def _say(context: OpExecutionContext, item_id: str, word: str, **links: str | None) -> None:
    """One log line per item, the outcome tag (of a run for one item) and links in the op's metadata."""
    context.log.info(f"item {item_id}: {word}")
    if tags.ITEM in context.run.tags:
        context.instance.add_run_tags(context.run_id, {tags.OUTCOME: word})
    urls = {name: MetadataValue.url(url) for name, url in links.items() if url}
    context.add_output_metadata({"outcome": word, **urls})


@op(out=Out(Nothing), retry_policy=TRANSPORT_RETRY, description="Claims reviews, re-reads their pull requests, launches sessions.")
def launch_reviews(
    context: OpExecutionContext, config: Ids, store: StoreResource, github: GitHubResource, cloud_agent: CloudAgentResource
) -> None:
    for item_id in config.ids:
        _launch(context, store.get(), github, cloud_agent, UUID(item_id))


def _launch(context: OpExecutionContext, store: Store, github: GitHubResource, cloud_agent: CloudAgentResource, item_id: UUID) -> None:
    claim = store.queue.claim(item_id, SERVICE, run_id=context.run_id, slots=review_slots, lease_s=cloud_agent.lease_seconds())
    if not isinstance(claim, Claimed):
        _say(context, str(item_id), claim.outcome)
        return
    try:
        pull = github.reader(claim.installation_id, claim.repository_id).pull(claim.details["full_name"], claim.details["pull_number"])
    except ProviderError as failure:
        _provider_failed(context, store, claim, failure)
        return
    stop = launch.reason_not_to_start(pull, claim.details)
    if stop is not None:
        store.queue.conclude(claim, stop)
        _say(context, str(item_id), stop, pull_request=pull.url)
        return
    session_id = store.sessions.launch(
        claim,
        spec=launch.session_spec(pull, claim.details, cloud_agent.defaults()).model_dump(mode="json"),
        head=launch.head_of(pull),
        effects=outcome.start_effects(claim.item_id, pull),
    )
    _say(context, str(item_id), "launched", pull_request=pull.url)
    context.log.info(f"session {session_id}")


def _provider_failed(context: OpExecutionContext, store: Store, claim: Claimed, failure: ProviderError) -> None:
    """The item waits and is tried again, or ends with the provider's reason: nothing is kept half-way."""
    if failure.retryable:
        store.queue.release(claim.item_id, claim.fence, not_before=failure.retry_after_s or PROVIDER_RETRY)
    else:
        store.queue.fail(claim.item_id, claim.fence, Reason(failure.reason))
    _say(context, str(claim.item_id), failure.reason)
