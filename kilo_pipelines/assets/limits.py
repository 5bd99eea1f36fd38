"""What owners spent, and whether their budgets hold: a table and plots for each owner, a check over all of them."""

from collections import Counter
from uuid import UUID

from dagster import (
    AssetCheckExecutionContext,
    AssetCheckResult,
    AssetCheckSeverity,
    AssetExecutionContext,
    MaterializeResult,
    MetadataValue,
    asset,
    asset_check,
)

from kilo_pipelines import tags
from kilo_pipelines.ops.tables import bars
from kilo_pipelines.ops.tables import table as table_of
from kilo_pipelines.partitions import OWNERS
from kilo_pipelines.resources.store import StoreResource

# What a person looks back on; a longer history is the plot over materializations.
DAYS = 14
MICRO = 1_000_000
# A run's metadata is loaded whole by the UI.
SHOWN = 50


@asset(
    partitions_def=OWNERS,
    group_name="engine",
    kinds={"postgres"},
    op_tags={tags.QUEUE: tags.QUEUE_MAINTENANCE},
    description="What an owner spent on models: today against its budgets, and the last two weeks by day, service and model.",
)
def spend(context: AssetExecutionContext, store: StoreResource) -> MaterializeResult[None]:
    platform, owner_id = store.get(), UUID(context.partition_key)
    days = platform.spend.of_owner(owner_id, DAYS)
    budgets = platform.spend.standing(owner_id)
    newest = days[0]["day"] if days else None
    last = [row for row in days if row["day"] == newest]
    by_day, by_service = Counter[str](), Counter[str]()
    for row in days:
        tokens = row["tokens_in"] + row["tokens_out"]
        by_day[str(row["day"])] += tokens
        by_service[f"{row['service']} {row['model']}"] += tokens
    return MaterializeResult(
        metadata={
            "tokens of the last day": MetadataValue.float(float(sum(row["tokens_in"] + row["tokens_out"] for row in last))),
            "USD of the last day": MetadataValue.float(sum(row["micro_usd"] for row in last) / MICRO),
            "tokens without a price": MetadataValue.float(float(sum(row["unpriced_tokens"] for row in last))),
            "budgets warned of": MetadataValue.float(float(sum("warned" in row["told"] for row in budgets))),
            "budgets exhausted": MetadataValue.float(float(sum("exhausted" in row["told"] for row in budgets))),
            "tokens by day": bars(dict(sorted(by_day.items()))),
            "tokens by service and model": bars(dict(by_service.most_common(10))),
            # A table without rows is none to Dagster.
            **({"budgets": table_of([{**row, "told": ", ".join(row["told"])} for row in budgets])} if budgets else {}),
            **({"days": table_of(days[:SHOWN])} if days else {}),
        }
    )


@asset_check(asset=spend, name="over_budget", description="Owners past a budget of today that still spend.")
def over_budget(context: AssetCheckExecutionContext, store: StoreResource) -> AssetCheckResult:
    del context
    offenders = store.get().spend.over_budget()
    table = {"offenders": table_of(offenders)} if offenders else {}
    return AssetCheckResult(passed=not offenders, severity=AssetCheckSeverity.ERROR, metadata={"count": len(offenders), **table})
