"""The configuration of every service run: ids, nothing else (no op loads anything that run config names)."""

from collections.abc import Callable
from typing import Any
from uuid import UUID

from dagster import Config, Failure, OpExecutionContext
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


def each(context: OpExecutionContext, ids: list[str], work: Callable[[UUID], None]) -> None:
    """Does one thing for every item; one that raises is logged and stops no other, and the run fails with it in the end.

    Each item has its own transaction in `work`, so what the others did stands; the run's retry finds them moved on.
    """
    failed = []
    for item_id in ids:
        try:
            work(UUID(item_id))
        except Exception:  # whatever one item raises: it is shown, kept and raised below
            context.log.exception(f"item {item_id} failed")
            failed.append(item_id)
    if failed:
        raise Failure(f"{len(failed)} of {len(ids)} items failed: {', '.join(failed)}", allow_retries=True)
