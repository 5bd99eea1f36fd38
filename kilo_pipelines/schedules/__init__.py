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
from kilo_pipelines.jobs import audit_seal, delivery_repair, retention, security_notices, security_sweep, security_sync
from kilo_pipelines.partitions import OWNERS, OWNERS_NAME
from kilo_pipelines.resources.github import GitHubResource
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
    selection=AssetSelection.assets("reconciliation", "delivery_gaps")
    | AssetSelection.checks_for_assets(AssetKey("reconciliation"), AssetKey("delivery_gaps")),
    tags={tags.QUEUE: tags.QUEUE_MAINTENANCE},
    description="Runs every reconciler once, checks every invariant, and shows missed deliveries.",
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


# Contract 7.1.
SYNC_CRON = "0 */6 * * *"
# Owners of one run: enough that a thousand owners are twenty runs, few enough that a usual run ends within the hour; how long one
# may last at most is its job's tag.
LEAST_OWNERS, MOST_OWNERS, RUNS_OF_A_SYNC = 50, 200, 20


def owner_chunks(job_name: str, op_name: str, owners: list[str], moment: str) -> list[RunRequest]:
    """Runs of a job for these owners, in chunks."""
    size = min(MOST_OWNERS, max(LEAST_OWNERS, -(-len(owners) // RUNS_OF_A_SYNC)))
    return [
        RunRequest(
            run_key=f"{job_name}:{moment}:{start}",
            run_config={"ops": {op_name: {"config": {"ids": owners[start : start + size]}}}},
        )
        for start in range(0, len(owners), size)
    ]


@schedule(
    cron_schedule=SYNC_CRON,
    job=security_sync,
    default_status=DefaultScheduleStatus.RUNNING,
    description="Syncs the Dependabot alerts of every owner whose Security Agent is on.",
)
def security_syncs(context: ScheduleEvaluationContext, store: StoreResource) -> list[RunRequest] | SkipReason:
    owners = [str(owner) for owner in store.get().findings.owners()]
    if not owners:
        return SkipReason("no owner has the Security Agent on")
    context.instance.add_dynamic_partitions(OWNERS_NAME, owners)
    return owner_chunks(security_sync.name, "sync_owners", owners, context.scheduled_execution_time.isoformat())


# The design's stale-analysis clean-up.
SWEEP_CRON = "*/15 * * * *"


@schedule(
    cron_schedule=SWEEP_CRON,
    job=security_sweep,
    default_status=DefaultScheduleStatus.RUNNING,
    description="Brings the queue of automatic analyses in line with findings and settings.",
)
def security_sweeps(context: ScheduleEvaluationContext, store: StoreResource) -> list[RunRequest] | SkipReason:
    owners = [str(owner) for owner in store.get().analyses.owners()]
    if not owners:
        return SkipReason("no owner has automatic analysis on, and none waits")
    return owner_chunks(security_sweep.name, "sweep_analyses", owners, context.scheduled_execution_time.isoformat())


# Contract 7.1.
NOTICES_CRON = "15 * * * *"


@schedule(
    cron_schedule=NOTICES_CRON,
    job=security_notices,
    default_status=DefaultScheduleStatus.RUNNING,
    description="Tells the people of every owner of new findings, of near deadlines and of passed ones.",
)
def notices(context: ScheduleEvaluationContext, store: StoreResource) -> list[RunRequest] | SkipReason:
    owners = [str(owner) for owner in store.get().notices.owners()]
    if not owners:
        return SkipReason("no owner named anybody to tell")
    return owner_chunks(security_notices.name, "stage_notices", owners, context.scheduled_execution_time.isoformat())


# For what syncs, webhooks and people changed: two statements and six checks, so that nobody looks at an empty page for an hour.
POSTURE_CRON = "*/15 * * * *"

refresh_posture = define_asset_job(
    "refresh_posture",
    selection=AssetSelection.assets("security_posture")
    | AssetSelection.checks_for_assets(AssetKey("security_findings"), AssetKey("finding_sla")),
    tags={tags.QUEUE: tags.QUEUE_MAINTENANCE, tags.SERVICE: "security_agent"},
    description="All owners beside each other, and the checks that a security lead reads.",
)

posture = ScheduleDefinition(
    name="security_postures",
    job=refresh_posture,
    cron_schedule=POSTURE_CRON,
    default_status=DefaultScheduleStatus.RUNNING,
    description="Compares all owners and runs the security checks.",
)

# Budgets are decided at the claim; this only shows them, soon enough for whoever wonders why nothing starts.
SPEND_CRON = "*/15 * * * *"

refresh_spend = define_asset_job(
    "refresh_spend",
    selection=["spend"],
    partitions_def=OWNERS,
    tags={tags.QUEUE: tags.QUEUE_MAINTENANCE},
    description="What an owner spent, against its budgets.",
)
check_budgets = define_asset_job(
    "check_budgets",
    selection=AssetSelection.checks_for_assets(AssetKey("spend")),
    tags={tags.QUEUE: tags.QUEUE_MAINTENANCE},
    description="Looks for owners past a budget that still spend.",
)


@schedule(
    cron_schedule=SPEND_CRON,
    job=refresh_spend,
    default_status=DefaultScheduleStatus.RUNNING,
    description="Refreshes the spend of owners that spent anything today or yesterday.",
)
def spends(context: ScheduleEvaluationContext, store: StoreResource) -> list[RunRequest] | SkipReason:
    owners = [str(owner) for owner in store.get().spend.owners_today()]
    if not owners:
        return SkipReason("no owner spent anything")
    context.instance.add_dynamic_partitions(OWNERS_NAME, owners)
    moment = context.scheduled_execution_time.isoformat()
    return [RunRequest(run_key=f"spend:{owner}:{moment}", partition_key=owner, tags={tags.OWNER: owner}) for owner in owners]


budget_checks = ScheduleDefinition(
    name="budget_checks",
    job=check_budgets,
    cron_schedule=SPEND_CRON,
    default_status=DefaultScheduleStatus.RUNNING,
    description="Whether a budget is passed and spent from all the same.",
)

recompute_sla = define_asset_job(
    "recompute_sla",
    selection=["finding_sla", "sla_compliance"],
    partitions_def=OWNERS,
    tags={tags.QUEUE: tags.QUEUE_MAINTENANCE, tags.SERVICE: "security_agent"},
    description="Computes an owner's deadlines and compliance anew.",
)


# A review that comes twenty minutes late is still one: what an outage cost is asked for at the first tick and pulled at the second. A
# quiet tick is one request.
REPAIR_CRON = "*/10 * * * *"


@schedule(
    cron_schedule=REPAIR_CRON,
    job=delivery_repair,
    default_status=DefaultScheduleStatus.RUNNING,
    description="Brings in webhooks that GitHub sent and that never came.",
)
def delivery_repairs(context: ScheduleEvaluationContext, github: GitHubResource) -> RunRequest | SkipReason:
    if github.app_id() is None:
        return SkipReason("no GitHub App is connected")
    return RunRequest(run_key=context.scheduled_execution_time.isoformat())


def default_schedules() -> list[ScheduleDefinition]:
    """Every schedule of the platform."""
    return [
        outcomes,
        reconcilers,
        seals,
        sweeps,
        security_syncs,
        security_sweeps,
        notices,
        posture,
        delivery_repairs,
        spends,
        budget_checks,
    ]
