"""The one hand that applies effects (invariant 5)."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import UUID

from dagster import Backoff, In, Jitter, Nothing, OpExecutionContext, Out, RetryPolicy, op

from kilo_pipelines.acts.notices import wanted
from kilo_pipelines.core.effects import DELIVERY, NOTICES, Delivery, EffectReceipt
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.ops.ids import Ids, ids_of_run
from kilo_pipelines.resources.github import GitHubResource, LostLeaseError, ProviderError
from kilo_pipelines.resources.notices import send
from kilo_pipelines.resources.store import StoreResource
from kilo_pipelines.services.security.notices import message_keys
from kilo_pipelines.store import ClaimedEffect, Store
from kilo_pipelines.telemetry import traces

# Transport faults between the worker and Postgres or the broker; effects themselves back off in the outbox.
TRANSPORT_RETRY = RetryPolicy(max_retries=2, delay=1, backoff=Backoff.EXPONENTIAL, jitter=Jitter.PLUS_MINUS)

# First wait after a failed write; doubles with each try (the outbox bounds the tries). A write whose answer was lost may still
# land: the read-back of the next try must not come before it.
RETRY_BASE_SECONDS = 5.0
LOST_ANSWER_SECONDS = 15.0
RETRY_CAP_SECONDS = 900.0
# A run of 25 items may have some hundred messages for receivers that take ten seconds each: after a minute it gives its worker back,
# and what is left is offered again.
RUN_SECONDS = 60.0


def apply_effects_of(context: OpExecutionContext, store: Store, github: GitHubResource, item_ids: list[str]) -> int:
    """Applies what is due for these items in the order of their subjects; returns how many were applied."""
    applied = 0
    for effect in _due(store, github, item_ids):
        with traces.following(
            effect.trace, "effect", owner=effect.owner_id, effect=effect.id, kind=effect.intent.kind, tries=effect.tries
        ) as span:
            applied += _apply(context, store, github, effect, span)
    return applied


def _apply(context: OpExecutionContext, store: Store, github: GitHubResource, effect: ClaimedEffect, span: traces.Span) -> bool:
    """One of them; False when it was not applied now."""
    try:
        receipt = _applied(store, github, effect)
    except LostLeaseError:
        span.set(outcome="late")
        context.log.warning(f"{effect.intent.kind}: another run has it by now")
        return False
    except ProviderError as failure:
        span.set(outcome=_put_back(context, store, effect, failure), reason=failure.reason)
        return False
    span.set(outcome="applied" if store.outbox.applied(effect, receipt) else "late")
    context.log.info(
        f"{effect.intent.kind} {'written' if receipt.created else 'brought up to date'}: {receipt.url or receipt.external_id}"
    )
    return True


def _applied(store: Store, github: GitHubResource, effect: ClaimedEffect) -> EffectReceipt:
    """At GitHub, or by a channel to people."""
    renew = partial(store.outbox.renew, effect)
    if effect.intent.kind not in NOTICES:
        return github.apply(effect.installation_id, effect.repository_id, effect.intent, renew)
    # Right before it is sent: what was fixed since, or isn't wanted any more, is nobody's worry; nor is it that of who was named then.
    finding_id, kind = UUID(effect.intent.payload["finding"]), effect.intent.payload["notice"]
    found = wanted(store, effect.owner_id, finding_id, kind, datetime.now(UTC))
    if found is None or effect.intent.intent_key not in message_keys(finding_id, kind, found[0]):
        raise ProviderError(Reason.NOTICE_NOT_WANTED, retryable=False)
    return send(effect.intent, store.cipher.derive(f"notice-webhook:{effect.owner_id}"), renew)


def _due(store: Store, github: GitHubResource, item_ids: list[str]) -> Iterator[ClaimedEffect]:
    """Effects of these items one after the other, as long as there are due ones and time."""
    until = time.monotonic() + RUN_SECONDS
    for item_id in item_ids:
        while time.monotonic() < until and (effect := store.outbox.claim_next(UUID(item_id), github.effect_costs())) is not None:
            yield effect


def _put_back(context: OpExecutionContext, store: Store, effect: ClaimedEffect, failure: ProviderError) -> str:
    """What becomes of an effect that was not applied."""
    if failure.reason in (Reason.OWNER_CHANGED, Reason.NOTICE_NOT_WANTED):
        store.outbox.drop(effect, failure.reason)
        context.log.warning(f"{effect.intent.kind} dropped: {failure.reason}")
        return "dropped"
    lost = failure.reason == Reason.PROVIDER_UNAVAILABLE
    if lost and DELIVERY[effect.intent.kind] is Delivery.AT_MOST_ONCE:
        store.outbox.unknown(effect, failure.reason)
        context.log.warning(f"{effect.intent.kind}: the answer was lost, and it may be sent once only: a person looks")
        return "unknown"
    if failure.retry_after_s is not None and failure.reason == Reason.PROVIDER_RATE_LIMITED:
        until = datetime.now(UTC) + timedelta(seconds=failure.retry_after_s)
        store.budgets.block(effect.owner_id, effect.integration_id, until)
    base = LOST_ANSWER_SECONDS if lost else RETRY_BASE_SECONDS
    wait = failure.retry_after_s or min(RETRY_CAP_SECONDS, base * 2**effect.tries)
    state = store.outbox.retry(effect, timedelta(seconds=wait), failure.reason, final=not failure.retryable)
    context.log.warning(f"{effect.intent.kind} not applied ({failure.reason}): {state}")
    return state


@op(
    ins={"start": In(Nothing)},
    out=Out(Nothing),
    retry_policy=TRANSPORT_RETRY,
    description="Applies the effects of this run's items.",
)
def apply_effects(context: OpExecutionContext, store: StoreResource, github: GitHubResource) -> None:
    apply_effects_of(context, store.get(), github, ids_of_run(context))


@op(out=Out(Nothing), retry_policy=TRANSPORT_RETRY, description="Applies effects that are due for the named items.")
def apply_waiting_effects(context: OpExecutionContext, config: Ids, store: StoreResource, github: GitHubResource) -> None:
    apply_effects_of(context, store.get(), github, config.ids)
