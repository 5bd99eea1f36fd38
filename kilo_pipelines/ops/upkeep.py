"""Upkeep: sealing the audit events and removing what is old."""

from datetime import UTC, datetime, timedelta

from dagster import DagsterRunStatus, MetadataValue, Nothing, OpExecutionContext, Out, RunsFilter, op

from kilo_pipelines import tags
from kilo_pipelines.ops.effects import TRANSPORT_RETRY
from kilo_pipelines.resources.store import StoreResource
from kilo_pipelines.resources.upkeep import export_heads
from kilo_pipelines.settings import current
from kilo_pipelines.store import Ages

FINISHED = [DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED]
# Runs of one batch; deleting one takes some milliseconds and holds no lock that anybody waits for.
RUNS = 200
# Batches of one sweep: 20,000 runs a day are removed, the rest the day after.
BATCHES = 100


@op(
    out=Out(Nothing), retry_policy=TRANSPORT_RETRY, description="Seals the audit events since the last seal and exports the head."
)
def seal_audit(context: OpExecutionContext, store: StoreResource) -> None:
    platform = store.get()
    seal = platform.audit.seal()
    exported = export_heads(platform, current().audit_heads_file)
    for one in exported:
        context.log.info(f"audit seal {one.number}: {one.count} events, head {one.head}")
    context.add_output_metadata(
        {
            "events": MetadataValue.int(seal.count if seal else 0),
            "waiting": MetadataValue.int(platform.audit.unsealed()),
            "heads exported": MetadataValue.int(len(exported)),
        }
    )


@op(out=Out(Nothing), retry_policy=TRANSPORT_RETRY, description="Removes old bodies, events, callbacks and runs.")
def remove_old(context: OpExecutionContext, store: StoreResource) -> None:
    settings = current()
    ages = Ages(settings.keep_delivery_bodies_days, settings.keep_session_events_days, settings.keep_callbacks_days)
    removed = store.get().retention.sweep(ages)
    removed["service_runs"] = _remove_runs(context, settings.keep_service_runs_days, services=True)
    removed["asset_runs"] = _remove_runs(context, settings.keep_asset_runs_days, services=False)
    for name, count in removed.items():
        context.log.info(f"{name}: {count} removed")
    context.add_output_metadata({name: MetadataValue.int(count) for name, count in removed.items()})


def _remove_runs(context: OpExecutionContext, days: float, *, services: bool) -> int:
    """Finished runs that are older; with a materialization they are an asset's, and its plot would go with them."""
    before = datetime.now(UTC) - timedelta(days=days)
    removed = 0
    for _ in range(BATCHES):
        found = context.instance.get_run_records(RunsFilter(statuses=FINISHED, created_before=before), limit=RUNS, ascending=True)
        wanted = [one for one in found if (tags.ITEM in one.dagster_run.tags or not one.dagster_run.asset_selection) == services]
        for one in wanted:
            context.instance.delete_run(one.dagster_run.run_id)
        removed += len(wanted)
        if len(found) < RUNS or not wanted:
            break
    return removed
