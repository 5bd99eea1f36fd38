"""The engine's own state: what recovery moved, what waits, and a check for every invariant with a table of offenders."""

from dagster import (
    AssetCheckExecutionContext,
    AssetCheckResult,
    AssetChecksDefinition,
    AssetCheckSeverity,
    AssetExecutionContext,
    MaterializeResult,
    MetadataValue,
    TableRecord,
    asset,
    asset_check,
)

from kilo_pipelines import tags
from kilo_pipelines.ops.tables import plain
from kilo_pipelines.resources.store import StoreResource
from kilo_pipelines.store import INVARIANTS, RECONCILERS


@asset(
    group_name="engine",
    kinds={"postgres"},
    op_tags={tags.QUEUE: tags.QUEUE_MAINTENANCE},
    description="Runs every reconciler once and tells what each one moved, what waits and which switches are set.",
)
def reconciliation(context: AssetExecutionContext, store: StoreResource) -> MaterializeResult[None]:
    platform = store.get()
    moved = platform.recovery.reap()
    for name, count in sorted(moved.items()):
        context.log.info(f"{name}: {count} moved")
    gauges = {f"{what} {state}": float(count) for (what, state), count in sorted(platform.queue.gauges().items())}
    looked_after = [TableRecord({"state": state, "reconciler": name}) for state, name in sorted(RECONCILERS.items())]
    switches = [TableRecord(plain(row)) for row in platform.queue.switches()]
    return MaterializeResult(
        metadata={
            **{f"moved by {name}": MetadataValue.float(float(count)) for name, count in moved.items()},
            **{name: MetadataValue.float(count) for name, count in gauges.items()},
            "late writes": MetadataValue.float(float(sum(platform.queue.counters().values()))),
            "who looks after which state": MetadataValue.table(records=looked_after),
            **({"switches": MetadataValue.table(records=switches)} if switches else {}),
        }
    )


def _check(name: str, reason: str) -> AssetChecksDefinition:
    @asset_check(asset=reconciliation, name=name, description=f"{reason[0].upper()}{reason[1:]}.")
    def check(context: AssetCheckExecutionContext, store: StoreResource) -> AssetCheckResult:
        del context
        offenders = store.get().invariants.offenders(name)
        table = {"offenders": MetadataValue.table(records=[TableRecord(plain(row)) for row in offenders])} if offenders else {}
        return AssetCheckResult(
            passed=not offenders, severity=AssetCheckSeverity.ERROR, metadata={"count": len(offenders), **table}
        )

    return check


def invariant_checks() -> list[AssetChecksDefinition]:
    """One check an invariant, each saying why it must hold."""
    return [_check(name, statement.reason) for name, statement in INVARIANTS.items()]
