"""The Security Agent's tables: findings, their deadlines and compliance by owner, and the posture over all owners."""

import io
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import numpy as np
import pandas as pd
from dagster import (
    AssetCheckExecutionContext,
    AssetCheckResult,
    AssetChecksDefinition,
    AssetCheckSeverity,
    AssetExecutionContext,
    AssetsDefinition,
    Failure,
    MaterializeResult,
    MetadataValue,
    asset,
    asset_check,
)

from kilo_pipelines import tags
from kilo_pipelines.ops.findings import deadline, policy_for
from kilo_pipelines.ops.security_sync import (
    SEVERITIES,
    SHOWN,
    Trigger,
    compliance_metadata,
    deadline_metadata,
    findings_metadata,
    sync_owner,
    worst,
)
from kilo_pipelines.ops.tables import bars
from kilo_pipelines.ops.tables import table as table_of
from kilo_pipelines.partitions import OWNERS
from kilo_pipelines.resources.github import GitHubResource
from kilo_pipelines.resources.store import StoreResource
from kilo_pipelines.services.security import sla
from kilo_pipelines.services.security.config import SERVICE, SecurityConfig
from kilo_pipelines.store import DEADLINE_COLUMNS, SlaRow, Store

# Rows of one write: one statement of some megabytes.
WRITE_ROWS = 10_000
TOLERANCE = 1e-3  # seconds
GROUP = "security"
POSTURE_NUMBERS = ("findings", "open", *SEVERITIES, "overdue", "within_due", "quarantined")
# The slow queue: a backfill over owners never stands before reviews.
SLOW = {tags.QUEUE: tags.QUEUE_MAINTENANCE, tags.SERVICE: SERVICE}


@asset(
    partitions_def=OWNERS,
    group_name=GROUP,
    kinds={"postgres", "github"},
    op_tags=SLOW,
    description="An owner's security alerts, copied from Dependabot. Materializing it reads every alert of the owner now.",
)
def security_findings(context: AssetExecutionContext, store: StoreResource, github: GitHubResource) -> MaterializeResult[None]:
    platform = store.get()
    owner_id = UUID(context.partition_key)
    done = sync_owner(platform, github, owner_id, context.log, whole=True, trigger=Trigger("backfill", "dagster-ui"))
    if not done.complete:
        raise Failure(
            f"not everything was read: {done.outcome}",
            metadata={
                "repositories": table_of([{"repository": name, "outcome": how} for name, how in done.repositories.items()])
            },
        )
    return MaterializeResult(
        metadata=findings_metadata(platform.findings.numbers(owner_id), worst(platform, owner_id), done.repositories)
    )


@asset(
    partitions_def=OWNERS,
    deps=[security_findings],
    group_name=GROUP,
    kinds={"postgres", "pandas"},
    op_tags=SLOW,
    description="Every finding's deadline, computed anew from its history and the owner's policy.",
)
def finding_sla(context: AssetExecutionContext, store: StoreResource) -> MaterializeResult[None]:
    platform = store.get()
    owner_id = UUID(context.partition_key)
    setting = platform.owners.config(owner_id, SERVICE)
    config = SecurityConfig.model_validate(setting.config if setting else {})
    policy = policy_for(platform, owner_id, config, actor="platform")
    looked, written = recompute(platform, owner_id, policy, datetime.now(UTC))
    return MaterializeResult(
        metadata={
            **deadline_metadata(platform, owner_id, platform.findings.numbers(owner_id), policy),
            "deadlines changed": MetadataValue.float(float(written)),
            "looked at": MetadataValue.float(float(looked)),
        }
    )


def chunks(store: Store, owner_id: UUID) -> Iterator[pd.DataFrame]:
    """An owner's findings and deadlines as tables of some ten thousand rows each."""
    for block in store.findings.deadlines_csv(owner_id):
        yield pd.read_csv(
            io.BytesIO(block),
            names=list(DEADLINE_COLUMNS),
            dtype={
                "id": "string",
                "repository_id": "int64",
                "severity": "category",
                "status": "category",
                "steps": "int32",
                "opened_as": "category",
                "met_due": "object",
                "missed_due": "object",
            },
        )


def recompute(store: Store, owner_id: UUID, policy: sla.SlaPolicy, now: datetime) -> tuple[int, int]:
    """Brings all deadlines of an owner to what history and policy say; (findings looked at, rows written).

    Most findings were opened and at most fixed since: their deadlines are one column of arithmetic. The others go through
    `sla.evaluate` one by one. All of it is read before it is written: what happened to a finding meanwhile wins (`write_sla`).
    """
    looked = written = 0
    for table in chunks(store, owner_id):
        looked += len(table)
        straight = table["straight"] == 1
        plain_ones = table[straight]
        due = due_column(plain_ones, policy)
        # Moments are compared to the millisecond: as floating point a microsecond may get lost.
        stale = (
            ~((plain_ones["due"] - due).abs() < TOLERANCE)
            | (plain_ones["version"] != policy.version)
            | ~((plain_ones["closed"].fillna(-1.0) - plain_ones["fixed"].fillna(-1.0)).abs() < TOLERANCE)
            | plain_ones["met_due"].notna()
            | plain_ones["missed_due"].notna()
        )
        changes = [
            (UUID(str(row.id)), _straight_row(row, moment, policy))
            for row, moment in zip(plain_ones[stale].itertuples(), due[stale], strict=True)
        ]
        rest = table[~straight]
        histories = store.findings.history(owner_id, [UUID(str(one)) for one in rest["id"]]) if len(rest) else {}
        for row in rest.itertuples():
            finding_id = UUID(str(row.id))
            found = deadline(histories.get(finding_id, []), [], policy, int(row.repository_id), now)
            same = (
                _same(row.due, found.due_at)
                and _same(row.closed, found.closed_at)
                and (row.version, bool(row.paused)) == (found.policy_version, found.paused)
                and _all_same(row.met_due, found.met_due)
                and _all_same(row.missed_due, found.missed_due)
            )
            if not same:
                changes.append((finding_id, found))
        for start in range(0, len(changes), WRITE_ROWS):
            written += store.findings.write_sla(owner_id, changes[start : start + WRITE_ROWS])
    return looked, written


def due_column(table: pd.DataFrame, policy: sla.SlaPolicy) -> pd.Series:
    """Due moments (seconds since 1970) of findings that were opened once: what `sla.simple_due` says, for a column."""
    days = budgets(table, policy)
    if not policy.business_days:
        return table["opened"] + days * 86_400.0
    starts = pd.to_datetime(table["opened"], unit="s", utc=True)
    moments = [
        sla.simple_due(start.to_pydatetime(), severity, policy, int(repository)).timestamp()
        for start, severity, repository in zip(starts, table["opened_as"], table["repository_id"], strict=True)
    ]
    return pd.Series(moments, index=table.index, dtype="float64")


def budgets(table: pd.DataFrame, policy: sla.SlaPolicy) -> pd.Series:
    """Days that each finding may stay open."""
    days = table["opened_as"].astype("object").map(policy.days).astype("float64")
    for repository_id, own in policy.overrides.items():
        here = table["repository_id"] == repository_id
        if here.any():
            days = days.mask(here, table["opened_as"].astype("object").map(own).astype("float64"))
    return days


def _straight_row(row: Any, due: float, policy: sla.SlaPolicy) -> SlaRow:
    started = datetime.fromtimestamp(row.opened, UTC)
    own = policy.overrides.get(int(row.repository_id), policy.days)
    return SlaRow(
        severity=str(row.opened_as),
        started_at=started,
        due_at=datetime.fromtimestamp(due, UTC),
        budget_days=int(own[str(row.opened_as)]),
        paused_seconds=0,
        paused=False,
        period=1,
        closed_at=None if np.isnan(row.fixed) else datetime.fromtimestamp(row.fixed, UTC),
        reconstructed=bool(row.reconstructed),
        policy_version=policy.version,
        met_due=(),
        missed_due=(),
        events=int(row.steps),
    )


def _same(stored: float, moment: datetime | None) -> bool:
    return bool(np.isnan(stored)) if moment is None else abs(stored - moment.timestamp()) < TOLERANCE


def _moments(stored: object) -> list[float]:
    return [float(one) for one in stored.split()] if isinstance(stored, str) else []


def _all_same(stored: object, moments: Sequence[datetime]) -> bool:
    found = _moments(stored)
    return len(found) == len(moments) and all(map(_same, found, moments))


@asset(
    partitions_def=OWNERS,
    deps=[finding_sla],
    group_name=GROUP,
    kinds={"pandas"},
    op_tags=SLOW,
    description="How much of an owner's open findings is within its deadline, and how much of what was due in the last 90 days was met.",
)
def sla_compliance(context: AssetExecutionContext, store: StoreResource) -> MaterializeResult[None]:
    platform = store.get()
    table = compliance_table(platform, UUID(context.partition_key), datetime.now(UTC))
    total = table.sum(numeric_only=True)
    return MaterializeResult(
        metadata={
            **compliance_metadata({str(name).replace(" ", "_"): int(value) for name, value in total.items()}),
            "by severity": table_of([{"severity": name, **row} for name, row in table.to_dict(orient="index").items()]),
        }
    )


def compliance_table(store: Store, owner_id: UUID, now: datetime) -> pd.DataFrame:
    """Counts by severity: open, within due, overdue, and of what was due in the period met and missed."""
    moment, since = now.timestamp(), (now - sla.PERIOD).timestamp()
    parts = []
    for table in chunks(store, owner_id):
        # What nobody watches any more counts against no deadline (contract 17.18).
        opened = (table["status"] == "open") & (table["watched"] == 1)
        due_lately = (table["due"] > since) & (table["due"] <= moment) & (table["watched"] == 1)
        met = due_lately & (table["closed"] <= table["due"])

        def earlier(column: str, table: pd.DataFrame = table) -> pd.Series:
            """Deadlines of the period that findings had before the present one: few have any."""
            had = table.loc[table[column].notna() & (table["watched"] == 1), column]
            counted = had.map(lambda stored: sum(since < due <= moment for due in _moments(stored)))
            return counted.astype("int64").reindex(table.index, fill_value=0)

        parts.append(
            pd.DataFrame(
                {
                    "severity": table["severity"].astype("object"),
                    "open": opened,
                    "within due": opened & (table["due"] > moment),
                    "overdue": opened & (table["due"] <= moment),
                    "met": met + earlier("met_due"),
                    "missed": (due_lately & ~met) + earlier("missed_due"),
                }
            )
            .groupby("severity")
            .sum()
        )
    empty = pd.DataFrame(
        0, index=pd.Index(SEVERITIES, name="severity"), columns=["open", "within due", "overdue", "met", "missed"]
    )
    return pd.concat([empty, *parts]).groupby(level=0).sum().reindex(list(SEVERITIES)).astype("int64")


@asset(
    deps=[sla_compliance],
    group_name=GROUP,
    kinds={"postgres", "pandas"},
    op_tags=SLOW,
    description="All owners beside each other: what is open, overdue and stale.",
)
def security_posture(store: StoreResource) -> MaterializeResult[None]:
    table = pd.DataFrame(
        store.get().findings.posture(),
        columns=["owner_id", "owner", *POSTURE_NUMBERS, "synced_since"],
    )
    numbers = table[list(POSTURE_NUMBERS)].sum()
    tracked = int(numbers["overdue"] + numbers["within_due"])
    within = sla.percent(int(numbers["within_due"]), tracked)
    return MaterializeResult(
        metadata={
            "owners": MetadataValue.float(float(len(table))),
            **{name.replace("_", " "): MetadataValue.float(float(value)) for name, value in numbers.items()},
            **({"open within due %": MetadataValue.float(within)} if within is not None else {}),
            "open by severity": bars({one: int(numbers[one]) for one in SEVERITIES}),
            "overdue by owner": bars({str(one.owner): int(one.overdue) for one in table.head(SHOWN).itertuples()}),
            "owners by overdue": table_of(table.drop(columns="owner_id").head(SHOWN).to_dict(orient="records")),
        }
    )


def _check(asset_def: AssetsDefinition, name: str, description: str) -> AssetChecksDefinition:
    @asset_check(asset=asset_def, name=name, description=description)
    def check(context: AssetCheckExecutionContext, store: StoreResource) -> AssetCheckResult:
        del context
        offenders = store.get().findings.offenders(name)
        table = {"offenders": table_of(offenders)} if offenders else {}
        return AssetCheckResult(
            passed=not offenders, severity=AssetCheckSeverity.WARN, metadata={"count": len(offenders), **table}
        )

    return check


def security_checks() -> list[AssetChecksDefinition]:
    """What a security lead wants to be told of, over all owners."""
    return [
        _check(finding_sla, "overdue", "Open findings past their deadline."),
        _check(security_findings, "unsynced", "Repositories of owners with the Security Agent that were not read for a day."),
        _check(security_findings, "orphaned", "Open findings of repositories that left their owner's installation."),
        _check(security_findings, "unanalysed", "Findings that are due to automatic analysis and had none within a day."),
        _check(security_findings, "stale_running", "Analyses, dismissals and remediations under way for more than two hours."),
        _check(security_findings, "remediation_unconfirmed", "Merged pull requests of ours whose alerts are still open."),
    ]
