"""The configuration of every service run: ids, nothing else (no op loads anything that run config names)."""

from typing import Any
from uuid import UUID

from dagster import Config, OpExecutionContext
from pydantic import field_validator


class Ids(Config):
    """Ids of the work items (or of the session) that a run carries along."""

    ids: list[str]

    @field_validator("ids")
    @classmethod
    def _are_uuids(cls, ids: list[str]) -> list[str]:
        return [str(UUID(one)) for one in ids]


def ids_of_run(context: OpExecutionContext) -> list[str]:
    """The ids that this run's first op was given."""
    configured: dict[str, Any] = dict(context.run.run_config).get("ops", {})  # type: ignore[assignment]
    return [str(UUID(one)) for op in configured.values() for one in op.get("config", {}).get("ids", [])]
