"""Missed deliveries by owner: what is missing, what was brought in, what was given up."""

from dagster import (
    AssetCheckExecutionContext,
    AssetCheckResult,
    AssetChecksDefinition,
    AssetCheckSeverity,
    MaterializeResult,
    MetadataValue,
    asset,
    asset_check,
)

from kilo_pipelines import tags
from kilo_pipelines.ops.tables import table
from kilo_pipelines.resources.github import GitHubResource
from kilo_pipelines.resources.store import StoreResource
from kilo_pipelines.store import STALE

NUMBERS = ("missing", "asked", "repaired", "pulled", "given_up")
# Owners in the table; those that lost something first.
SHOWN = 25


@asset(
    group_name="engine",
    kinds={"postgres", "github"},
    op_tags={tags.QUEUE: tags.QUEUE_MAINTENANCE},
    description="Webhooks that GitHub sent and that didn't come, by owner: open ones, and how those of the last week ended.",
)
def delivery_gaps(store: StoreResource) -> MaterializeResult[None]:
    platform = store.get()
    owners, now = platform.delivery_gaps.by_owner(), platform.clock.now()
    ages = [(now - one["oldest"]).total_seconds() / 60 for one in owners if one["oldest"] is not None]
    return MaterializeResult(
        metadata={
            **{name.replace("_", " "): MetadataValue.float(float(sum(one[name] for one in owners))) for name in NUMBERS},
            "oldest, minutes": MetadataValue.float(max(ages, default=0.0)),
            **({"gaps by owner": table(owners[:SHOWN])} if owners else {}),
        }
    )


@asset_check(
    asset=delivery_gaps,
    name="nothing_was_given_up",
    description="No webhook of the last week was given up: its event is lost unless somebody acts.",
)
def nothing_was_given_up(context: AssetCheckExecutionContext, store: StoreResource) -> AssetCheckResult:
    del context
    lost = store.get().delivery_gaps.given_up()
    metadata = {"given up": table(lost)} if lost else {}
    return AssetCheckResult(passed=not lost, severity=AssetCheckSeverity.ERROR, metadata={"count": len(lost), **metadata})


@asset_check(
    asset=delivery_gaps,
    name="log_is_compared",
    description="GitHub's log of deliveries was compared within the last hour; without an App there is none.",
)
def log_is_compared(context: AssetCheckExecutionContext, store: StoreResource, github: GitHubResource) -> AssetCheckResult:
    del context
    app_id = github.app_id()
    if app_id is None:
        return AssetCheckResult(passed=True, metadata={"GitHub App": "none"})
    platform = store.get()
    compared = platform.delivery_gaps.compared_at(app_id)
    return AssetCheckResult(
        passed=compared is None or platform.clock.now() - compared < STALE,
        severity=AssetCheckSeverity.ERROR,
        metadata={"waits since": str(compared) if compared else "nothing is connected"},
    )


def delivery_checks() -> list[AssetChecksDefinition]:
    """What an operator wants to be told of."""
    return [nothing_was_given_up, log_is_compared]
