"""Assets: what operators plot and compare, one partition an owner, numbers and small tables in the metadata.

Holds: shaping of rows into tables. Does not belong here: SQL, providers, rules.
"""

import pandas as pd
from dagster import (
    AssetExecutionContext,
    AssetsDefinition,
    MaterializeResult,
    MetadataValue,
    TableColumn,
    TableRecord,
    TableSchema,
    asset,
)

from kilo_pipelines import tags
from kilo_pipelines.assets.deliveries import delivery_gaps
from kilo_pipelines.assets.engine import reconciliation
from kilo_pipelines.assets.limits import spend
from kilo_pipelines.assets.security import finding_sla, security_findings, security_posture, sla_compliance
from kilo_pipelines.partitions import OWNERS
from kilo_pipelines.resources.store import StoreResource

# A run's metadata is loaded whole by the UI: the newest reviews are enough to look at.
TABLE_ROWS = 25
# Outcomes are a window, not history: thirty days is what the plot over materializations then extends.
WINDOW_DAYS = 30

_COLUMNS = {
    "repository": "string",
    "pull": "int",
    "head": "string",
    "outcome": "string",
    "reason": "string",
    "check": "string",
    "findings": "int",
    "covered": "string",
    "seconds": "float",
}


def outcome_table(rows: list[dict[str, object]]) -> pd.DataFrame:
    """The newest reviews as a table; an empty list gives an empty table with the same columns."""
    return pd.DataFrame(rows, columns=list(_COLUMNS))


def outcome_numbers(table: pd.DataFrame) -> dict[str, float]:
    """What Dagster plots over the materializations of a partition."""
    concluded = table[table["outcome"] != "active"]
    return {
        "reviews": float(len(table)),
        "completed": float((table["outcome"] == "completed").sum()),
        "failed": float((table["outcome"] == "failed").sum()),
        "cancelled": float((table["outcome"] == "cancelled").sum()),
        "green checks": float((table["check"] == "success").sum()),
        "findings": float(table["findings"].fillna(0).sum()),
        "median seconds": float(concluded["seconds"].median()) if concluded["seconds"].notna().any() else 0.0,
    }


@asset(
    partitions_def=OWNERS,
    group_name="code_review",
    kinds={"postgres", "pandas"},
    op_tags={tags.QUEUE: tags.QUEUE_MAINTENANCE},
    description="Outcomes of an owner's code reviews over the last thirty days.",
)
def review_outcomes(context: AssetExecutionContext, store: StoreResource) -> MaterializeResult[None]:
    rows = store.get().reviews.outcomes(context.partition_key, days=WINDOW_DAYS)
    table = outcome_table(rows)
    shown = table.head(TABLE_ROWS).astype(object).where(lambda cells: cells.notna(), None)
    return MaterializeResult(
        metadata={
            **{name: MetadataValue.float(value) for name, value in outcome_numbers(table).items()},
            "newest reviews": MetadataValue.table(
                records=[TableRecord(record) for record in shown.to_dict(orient="records")],
                schema=TableSchema(columns=[TableColumn(name, kind) for name, kind in _COLUMNS.items()]),
            ),
        }
    )


def default_assets() -> list[AssetsDefinition]:
    """Every asset of the platform."""
    return [
        reconciliation,
        review_outcomes,
        security_findings,
        finding_sla,
        sla_compliance,
        security_posture,
        delivery_gaps,
        spend,
    ]
