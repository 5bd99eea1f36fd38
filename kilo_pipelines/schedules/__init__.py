"""Schedules: what happens by the clock.

Holds: cron expressions and which runs they ask for. Does not belong here: the work itself, SQL, rules.
"""

from dagster import (
    AssetKey,
    AssetSelection,
    DefaultScheduleStatus,
    RunRequest,
    ScheduleDefinition,
    ScheduleEvaluationContext,
    SkipReason,
    define_asset_job,
    schedule,
)

from kilo_pipelines import tags
from kilo_pipelines.jobs import audit_seal, retention
from kilo_pipelines.partitions import OWNERS, OWNERS_NAME
from kilo_pipelines.resources.store import StoreResource

# Outcomes are for people: five minutes is soon enough, and a quiet owner costs no run at all.
OUTCOMES_CRON = "*/5 * * * *"
OUTCOMES_MINUTES = 5

refresh_outcomes = define_asset_job(
    "refresh_outcomes",
    selection=["review_outcomes"],
    partitions_def=OWNERS,
    tags={tags.QUEUE: tags.QUEUE_MAINTENANCE, tags.SERVICE: "code_review"},
)


@schedule(
    cron_schedule=OUTCOMES_CRON,
    job=refresh_outcomes,
    default_status=DefaultScheduleStatus.RUNNING,
    description="Refreshes the outcomes of owners whose reviews moved since the last tick.",
)
def outcomes(context: ScheduleEvaluationContext, store: StoreResource) -> list[RunRequest] | SkipReason:
    owners = [str(owner) for owner in store.get().reviews.owners_with_news(minutes=OUTCOMES_MINUTES)]
    if not owners:
        return SkipReason("no review moved since the last tick")
    context.instance.add_dynamic_partitions(OWNERS_NAME, owners)
    moment = context.scheduled_execution_time.isoformat()
    return [RunRequest(run_key=f"{owner}:{moment}", partition_key=owner, tags={tags.OWNER: owner}) for owner in owners]


# The recovery sensor reaps every few seconds; this shows its results and holds the invariants, soon enough for a person.
RECONCILE_CRON = "*/5 * * * *"

reconcile = define_asset_job(
    "reconcile",
    selection=AssetSelection.assets("reconciliation") | AssetSelection.checks_for_assets(AssetKey("reconciliation")),
    tags={tags.QUEUE: tags.QUEUE_MAINTENANCE},
    description="Runs every reconciler once and checks every invariant.",
)

reconcilers = ScheduleDefinition(
    name="reconcilers",
    job=reconcile,
    cron_schedule=RECONCILE_CRON,
    default_status=DefaultScheduleStatus.RUNNING,
    description="Every reconciler with its results, and every invariant with its offenders: the asset `reconciliation`.",
)


# An hour is what an attacker would have to rewrite history unseen.
SEAL_CRON = "7 * * * *"
# When fewest people work in most places.
RETENTION_CRON = "23 3 * * *"

seals = ScheduleDefinition(
    name="audit_seals",
    job=audit_seal,
    cron_schedule=SEAL_CRON,
    default_status=DefaultScheduleStatus.RUNNING,
    description="Seals the audit events of the hour and exports the chain's head.",
)
sweeps = ScheduleDefinition(
    name="retention_sweeps",
    job=retention,
    cron_schedule=RETENTION_CRON,
    default_status=DefaultScheduleStatus.RUNNING,
    description="Removes old bodies, events, callbacks and runs once a day.",
)


def default_schedules() -> list[ScheduleDefinition]:
    """Every schedule of the platform."""
    return [outcomes, reconcilers, seals, sweeps]
