"""Notices: staged by the clock and after each sync, decided again by a run, sent through the outbox."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from dagster import Nothing, OpExecutionContext, Out, op

from kilo_pipelines.acts.common import enabled_config
from kilo_pipelines.acts.notices import holds, wanted
from kilo_pipelines.core.owners import notice_pools
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.work import WorkState
from kilo_pipelines.ops.effects import TRANSPORT_RETRY
from kilo_pipelines.ops.ids import Ids, each
from kilo_pipelines.ops.items import reopened_by_person, say
from kilo_pipelines.resources.cloud_agent import CloudAgentResource
from kilo_pipelines.resources.store import StoreResource
from kilo_pipelines.services.security import notices as rules
from kilo_pipelines.services.security.config import RANKS, reaches
from kilo_pipelines.services.security.notices import SERVICE
from kilo_pipelines.store import Claimed, NewItem, Store

# Notices of an owner and a kind that one sweep opens (contract 12 sends a hundred a tick): who names recipients for an old backlog
# isn't buried, and a backlog of passed deadlines doesn't keep the near ones waiting until they have passed, too.
STAGED = 100


def stage(store: Store, owner_id: UUID) -> int:
    """Opens what one of an owner's people is to be told and wasn't, passed deadlines first; how many."""
    config = enabled_config(store, owner_id)
    if config is None or not config.notice_recipients:
        return 0
    slas = [one for one in RANKS if config.sla_notices and reaches(one, config.sla_notice_min_severity)]
    news = [one for one in RANKS if config.new_finding_notices and reaches(one, config.new_finding_notice_min_severity)]
    warned = timedelta(days=config.sla_notice_warning_days)
    asked: dict[str, dict[str, Any]] = {
        "sla_breach": {"severities": slas, "due_within": (None, timedelta())},
        "sla_warning": {"severities": slas, "due_within": (timedelta(), warned)},
        "new_finding": {"severities": news, "seen_since": config.notices_enabled_at},
    }
    opened = 0
    now = datetime.now(UTC)
    for kind, which in asked.items():
        messages = list(rules.message_keys("*", kind, config))
        for one in store.notices.untold(owner_id, kind, messages=messages, limit=STAGED, **which):
            if holds(config, kind, one, now):
                details = {"finding_id": str(one["id"]), "kind": kind}
                new = NewItem(SERVICE, rules.subject_key(one["id"], kind), one["repository_id"], 0, details)
                opened += store.queue.open(owner_id, new, actor="platform") is not None
    return opened


@op(out=Out(Nothing), retry_policy=TRANSPORT_RETRY, description="Opens the notices that people of the named owners are due.")
def stage_notices(context: OpExecutionContext, config: Ids, store: StoreResource) -> None:
    each(context, config.ids, lambda owner_id: context.log.info(f"owner {owner_id}: {stage(store.get(), owner_id)} notices"))


@op(
    out=Out(Nothing),
    retry_policy=TRANSPORT_RETRY,
    description="Claims notices, decides once more whether they hold, and intends one message for each recipient.",
)
def send_notices(context: OpExecutionContext, config: Ids, store: StoreResource, cloud_agent: CloudAgentResource) -> None:
    each(context, config.ids, lambda item_id: _send(context, store.get(), cloud_agent, item_id))


def _send(context: OpExecutionContext, store: Store, cloud_agent: CloudAgentResource, item_id: UUID) -> None:
    if reopened_by_person(context, store, item_id):
        return
    claim = store.queue.claim(item_id, SERVICE, run_id=context.run_id, pools=notice_pools, lease_s=cloud_agent.lease_seconds())
    if not isinstance(claim, Claimed):
        say(context, item_id, claim.outcome)
        return
    finding_id, kind = UUID(claim.details["finding_id"]), claim.details["kind"]
    found = wanted(store, claim.owner_id, finding_id, kind, datetime.now(UTC))
    if found is None:
        store.queue.conclude(claim, WorkState.CANCELLED, Reason.NOTICE_NOT_WANTED)
        say(context, item_id, Reason.NOTICE_NOT_WANTED)
        return
    config, facts = found
    finding = store.findings.get(claim.owner_id, finding_id)
    effects = rules.effects(item_id, finding, kind, config, facts["repository"], facts["due_at"])
    done = store.queue.complete(
        claim,
        Reason.NOTIFIED,
        details={"verdict": {"conclusion": "notified", "reason": str(Reason.NOTIFIED)}},
        effects=effects,
        also=store.notices.tell_again(claim.owner_id, item_id, effects),
    )
    say(context, item_id, Reason.NOTIFIED if done else Reason.MOVED_ON)
