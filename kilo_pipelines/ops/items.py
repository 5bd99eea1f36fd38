"""What the launch and settle ops of every service do alike: say what became of an item, reopen it, give it back."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

from dagster import MetadataValue, Nothing, OpExecutionContext, Out, op

from kilo_pipelines import tags
from kilo_pipelines.core import retry
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.receipt import Receipt, violation
from kilo_pipelines.core.work import FINAL, WorkState
from kilo_pipelines.ops.effects import TRANSPORT_RETRY
from kilo_pipelines.ops.ids import Ids, each
from kilo_pipelines.resources.github import ProviderError
from kilo_pipelines.resources.store import StoreResource
from kilo_pipelines.store import Claimed, Store


def say(context: OpExecutionContext, item_id: UUID, word: str, **links: str | None) -> None:
    """One log line an item, the outcome tag (of a run for one item) and links in the op's metadata."""
    context.log.info(f"item {item_id}: {word}")
    if tags.ITEM in context.run.tags:
        context.instance.add_run_tags(context.run_id, {tags.OUTCOME: str(word)})
    context.add_output_metadata({"outcome": str(word), **{name: MetadataValue.url(url) for name, url in links.items() if url}})


def reopened_by_person(context: OpExecutionContext, store: Store, item_id: UUID) -> bool:
    """Re-execute in the UI: a failed or cancelled item gets a new attempt; anything else is said and left alone.

    True when this run has nothing more to do.
    """
    if context.run.parent_run_id is None:
        return False
    item = store.queue.get(item_id)
    force = context.run.tags.get("force") == "true"
    if item is not None and WorkState(item.state) in FINAL and store.queue.reopen(item_id, actor="dagster-ui", force=force):
        return False
    if item is not None and item.state == WorkState.WAITING:
        return False
    say(context, item_id, Reason.MOVED_ON)
    return True


def provider_failed(context: OpExecutionContext, store: Store, claim: Claimed, failure: ProviderError) -> None:
    """The item waits and is tried again, or ends with the provider's reason: nothing is kept half-way."""
    asked = timedelta(seconds=failure.retry_after_s) if failure.retry_after_s is not None else None
    if asked is not None and failure.reason == Reason.PROVIDER_RATE_LIMITED:
        store.budgets.block(claim.owner_id, claim.integration_id, datetime.now(UTC) + asked)
    wait = retry.launch_wait(failure.reason, claim.tries, asked) if failure.retryable else None
    if wait is not None:
        store.queue.release(claim, not_before=datetime.now(UTC) + wait, reason=failure.reason)
    else:
        store.queue.conclude(claim, WorkState.FAILED, failure.reason)
    say(context, claim.item_id, failure.reason)


def may_start(context: OpExecutionContext, store: Store, claim: Claimed, receipt: Receipt) -> bool:
    """Whether a session may have these capabilities (threats, rule 7); else the item has ended with the reason."""
    broken = violation(receipt)
    if broken is None:
        return True
    store.queue.conclude(claim, WorkState.FAILED, broken)
    say(context, claim.item_id, broken)
    return False


@op(out=Out(Nothing), retry_policy=TRANSPORT_RETRY, description="Notes the ends of items that nobody outside has to be told of.")
def settle_quietly(context: OpExecutionContext, config: Ids, store: StoreResource) -> None:
    def settle(item_id: UUID) -> None:
        with store.get().settlements.open(item_id) as tx:
            if tx is None or WorkState(tx.item.state) not in FINAL or tx.item.announced:
                say(context, item_id, Reason.MOVED_ON)
                return
            tx.announce({"conclusion": tx.item.state, "reason": tx.item.reason}, None, [])
        say(context, item_id, tx.item.reason or tx.item.state)

    each(context, config.ids, settle)
