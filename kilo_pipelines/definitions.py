"""The code location `kilo`: the only place where the kinds meet; it assembles and does nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dagster import Definitions, in_process_executor
from dagster import definitions as lazy_definitions

from kilo_pipelines.assets import default_assets
from kilo_pipelines.assets.deliveries import delivery_checks
from kilo_pipelines.assets.engine import invariant_checks
from kilo_pipelines.assets.limits import over_budget
from kilo_pipelines.assets.security import security_checks
from kilo_pipelines.jobs import default_jobs
from kilo_pipelines.resources.cloud_agent import CloudAgentResource
from kilo_pipelines.resources.github import GitHubResource
from kilo_pipelines.resources.store import StoreResource
from kilo_pipelines.schedules import (
    check_budgets,
    default_schedules,
    recompute_sla,
    reconcile,
    refresh_outcomes,
    refresh_posture,
    refresh_spend,
)
from kilo_pipelines.sensors import default_sensors
from kilo_pipelines.settings import Settings
from kilo_pipelines.telemetry import logs


def build_definitions(shards: int, overrides: Mapping[str, Any] | None = None) -> Definitions:
    """Fresh definitions with this many work shards; `overrides` replaces resources by name, for tests."""
    return Definitions(
        assets=default_assets(),
        asset_checks=[*invariant_checks(), *delivery_checks(), *security_checks(), over_budget],
        jobs=[*default_jobs(), refresh_outcomes, reconcile, refresh_posture, recompute_sla, refresh_spend, check_budgets],
        sensors=default_sensors(shards),
        schedules=default_schedules(),
        # A warm worker's child may have no children of its own, and one process a run is what it is for.
        executor=in_process_executor,
        resources={
            "store": StoreResource(),
            "github": GitHubResource(),
            "cloud_agent": CloudAgentResource(),
            **(overrides or {}),
        },
    )


@lazy_definitions
def defs() -> Definitions:
    """Loaded by Dagster when the code location is, not when this module is imported."""
    settings = Settings()
    logs.set_up_child(settings)  # the code server starts this process itself
    return build_definitions(settings.sensor_shards)
