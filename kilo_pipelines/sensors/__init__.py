"""Sensors: a family of long-poll shards that admit deliveries and offer work, and the recovery sensor.

Holds: waiting for work and turning offers into run requests. What a sensor commits is right even if no run follows
(invariant 2): admissions, offers, reaped leases. Does not belong here: claims, providers, SQL.
"""

import threading
import time

from dagster import (
    DefaultSensorStatus,
    RunFailureSensorContext,
    RunRequest,
    SensorDefinition,
    SensorEvaluationContext,
    SensorResult,
    SkipReason,
    run_failure_sensor,
    sensor,
)

from kilo_pipelines import tags
from kilo_pipelines.jobs import (
    agent_session,
    code_review,
    dismissal,
    hosted_session,
    notice,
    outbox,
    remediation,
    requested_security_sync,
    security_analysis,
    security_sync,
    settle_code_review,
    settle_quiet_items,
    settle_remediation,
    settle_security_analysis,
)
from kilo_pipelines.ops.admission import admit
from kilo_pipelines.ops.markers import marker_of
from kilo_pipelines.partitions import OWNERS_NAME
from kilo_pipelines.resources.store import StoreResource
from kilo_pipelines.store import Offer, Store

# A shard blocks this long for a NOTIFY; the gRPC call that carries it times out after 60 s.
LONG_POLL_SECONDS = 20.0
# Deliveries admitted in one evaluation, and rows of each kind offered: bounded, so that one shard never holds the whole backlog.
ADMISSIONS = 20
OFFERS = 200
# Steps of hosted sessions in one evaluation: about what the dispatch workers do until the next one.
HOSTED_OFFERS = 30
# Hours of patience between two evaluations would be Dagster's default of 30 s; 1 s means: again in the next loop (5 s).
MINIMUM_INTERVAL_SECONDS = 1
RECOVERY_INTERVAL_SECONDS = 5
# Who switches a service on looks for its findings within the minute; the owners of one tick are as many as a run of the schedule has.
CHANGES_INTERVAL_SECONDS = 15
CHANGED_OWNERS = 50
# The sensor daemon looks at a sensor this often at most (a constant of Dagster).
DAGSTER_LOOP_SECONDS = 5.0

# What the shards may start.
SERVICE_JOBS = [
    code_review,
    settle_code_review,
    security_analysis,
    settle_security_analysis,
    notice,
    dismissal,
    remediation,
    settle_remediation,
    requested_security_sync,
    agent_session,
    settle_quiet_items,
    outbox,
]
_JOB_OF = {
    ("start", "code_review"): code_review.name,
    ("settle", "code_review"): settle_code_review.name,
    ("session", "code_review"): agent_session.name,
    ("start", "security_analysis"): security_analysis.name,
    ("settle", "security_analysis"): settle_security_analysis.name,
    ("session", "security_analysis"): agent_session.name,
    ("start", "remediation"): remediation.name,
    ("settle", "remediation"): settle_remediation.name,
    ("session", "remediation"): agent_session.name,
    ("start", "dismissal"): dismissal.name,
    ("settle", "dismissal"): settle_quiet_items.name,
    ("start", "notice"): notice.name,
    ("settle", "notice"): settle_quiet_items.name,
    ("start", "security_sync"): requested_security_sync.name,
    ("settle", "security_sync"): settle_quiet_items.name,
}
_OP_OF = {
    code_review.name: "launch_reviews",
    settle_code_review.name: "settle_reviews",
    agent_session.name: "run_agent_session",
    security_analysis.name: "launch_analyses",
    settle_security_analysis.name: "settle_analyses",
    dismissal.name: "apply_dismissals",
    notice.name: "send_notices",
    remediation.name: "launch_remediations",
    settle_remediation.name: "settle_remediations",
    settle_quiet_items.name: "settle_quietly",
    requested_security_sync.name: "sync_requested",
    outbox.name: "apply_waiting_effects",
}


def run_request(offer: Offer) -> RunRequest:
    """The run that an offer asks for: ids as configuration, labels as tags."""
    job_name = outbox.name if offer.kind == "effects" else _JOB_OF[(offer.kind, offer.service)]
    op_name = _OP_OF[job_name]
    ids = [str(one) for one in offer.ids]
    return RunRequest(
        run_key=f"{offer.kind}:{ids[0]}:{offer.offer_no}",
        job_name=job_name,
        run_config={"ops": {op_name: {"config": {"ids": ids}}}},
        tags=tags.from_labels({**offer.labels, "owner": offer.owner_id, "service": offer.service}),
    )


def hosted_request(offer: Offer) -> RunRequest:
    """The run that takes one step of a hosted session."""
    ids = [str(one) for one in offer.ids]
    return RunRequest(
        run_key=f"hosted:{ids[0]}:{offer.offer_no}",
        run_config={"ops": {"step_hosted_session": {"config": {"ids": ids}}}},
        tags=tags.from_labels({**offer.labels, "owner": offer.owner_id, "service": offer.service}),
    )


def work_once(store: Store) -> list[RunRequest]:
    """Admits what arrived and offers what waits."""
    marker = marker_of(store)
    store.inbox.admit_next(lambda tx: admit(tx, marker), limit=ADMISSIONS)
    return [run_request(offer) for offer in store.queue.offers(limit=OFFERS)]


class Turns:
    """Spaces the dispatches of a family of shards, which wait in threads of one code server.

    A shard that has dispatched is away for Dagster's loop of 5 s. When all of them run after the first deliveries of a flood, the
    next ones wait for as long; at most so many at once that the other half is still there, and then one every loop / shards
    seconds, and there is always a shard in its wait. A quiet platform never meets the limit.
    """

    def __init__(self, shards: int) -> None:
        self._every = DAGSTER_LOOP_SECONDS / shards
        self._at_once = max(1, shards // 2) * self._every
        self._lock = threading.Lock()
        self._next = 0.0

    def take(self, now: float) -> float:
        """Takes a turn at `now` (monotonic seconds) and answers 0, or the seconds until there may be one."""
        with self._lock:
            start = max(self._next, now)
            wait = start + self._every - self._at_once - now
            if wait > 0:
                return wait
            self._next = start + self._every
            return 0.0

    def give_back(self) -> None:
        """The turn led to nothing: it is another shard's."""
        with self._lock:
            self._next -= self._every


def wait_for_work(store: Store, seconds: float, turns: Turns) -> list[RunRequest]:
    """Run requests as soon as there are any and it is this shard's turn, at the latest after `seconds`; [] on a quiet wait or at a stop."""
    deadline = time.monotonic() + seconds
    with store.listener("kilo_work", "kilo_stop") as wake:
        while (left := deadline - time.monotonic()) > 0:
            wait = turns.take(time.monotonic())
            if not wait:
                requests = work_once(store)
                if requests:
                    return requests
                turns.give_back()
            if wake.wait(min(wait or left, left)) == "kilo_stop":
                return []
    return []


def _shard(number: int, turns: Turns) -> SensorDefinition:
    @sensor(
        name=f"work_{number:02d}",
        jobs=SERVICE_JOBS,
        minimum_interval_seconds=MINIMUM_INTERVAL_SECONDS,
        default_status=DefaultSensorStatus.RUNNING,
        description="Waits for deliveries, callbacks and waiting items; admits and offers them.",
    )
    def work(context: SensorEvaluationContext, store: StoreResource) -> SensorResult | SkipReason:
        del context
        platform = store.get()
        platform.figures.beat("work")
        pause = platform.queue.pause_reason()
        if pause is not None:
            return SkipReason(f"paused: {pause}")
        requests = wait_for_work(platform, LONG_POLL_SECONDS, turns)
        return SensorResult(run_requests=requests) if requests else SkipReason("no work arrived while waiting")

    return work


@sensor(
    name="recovery",
    jobs=[outbox],
    minimum_interval_seconds=RECOVERY_INTERVAL_SECONDS,
    default_status=DefaultSensorStatus.RUNNING,
    description="Reaps expired leases and deadlines: what a dead process held goes back to waiting.",
)
def recovery(context: SensorEvaluationContext, store: StoreResource) -> SkipReason:
    del context
    store.get().figures.beat("recovery")
    counts = {name: count for name, count in store.get().recovery.reap().items() if count}
    return SkipReason(", ".join(f"{name}: {count}" for name, count in sorted(counts.items())) or "nothing to reap")


@sensor(
    name="hosted_sessions",
    job=hosted_session,
    minimum_interval_seconds=RECOVERY_INTERVAL_SECONDS,
    default_status=DefaultSensorStatus.RUNNING,
    description="Offers the next steps of hosted sessions; a pause stops new ones, never an interrupt.",
)
def hosted_sessions(context: SensorEvaluationContext, store: StoreResource) -> SensorResult | SkipReason:
    del context
    requests = [hosted_request(offer) for offer in store.get().hosted.offers(HOSTED_OFFERS)]
    return SensorResult(run_requests=requests) if requests else SkipReason("no hosted session is due")


@run_failure_sensor(
    name="failed_runs",
    default_status=DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=RECOVERY_INTERVAL_SECONDS,
    description="A run that Dagster calls failed is a hint: what it held is over now, and recovery takes it back.",
)
def failed_runs(context: RunFailureSensorContext, store: StoreResource) -> SkipReason:
    freed = store.get().queue.run_failed(context.dagster_run.run_id)
    return SkipReason(f"run {context.dagster_run.run_id} held {freed} leases")


@sensor(
    name="security_changes",
    job=security_sync,
    minimum_interval_seconds=CHANGES_INTERVAL_SECONDS,
    default_status=DefaultSensorStatus.RUNNING,
    description="Syncs owners whose Security Agent was just switched on, or whose settings changed (contract 4).",
)
def security_changes(context: SensorEvaluationContext, store: StoreResource) -> SensorResult | SkipReason:
    changed = store.get().findings.changed_owners(CHANGED_OWNERS)
    if not changed:
        return SkipReason("no owner's Security Agent changed since its last sync")
    context.instance.add_dynamic_partitions(OWNERS_NAME, [str(owner) for owner, _ in changed])
    # One run for each change, whether it succeeds or not: the schedule is what tries again.
    return SensorResult(
        run_requests=[
            RunRequest(
                run_key=f"{owner}:{at.isoformat()}",
                run_config={"ops": {"sync_owners": {"config": {"ids": [str(owner)]}}}},
                tags=tags.from_labels({"owner": owner}),
            )
            for owner, at in changed
        ]
    )


def default_sensors(shards: int) -> list[SensorDefinition]:
    """The work shards, the recovery sensor, the one of hosted sessions, the one that hears of failed runs and the one that hears of changed settings."""
    turns = Turns(shards)
    return [*(_shard(number, turns) for number in range(shards)), recovery, hosted_sessions, failed_runs, security_changes]
