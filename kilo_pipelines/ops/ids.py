"""The configuration of every service run: ids, nothing else (no op loads anything that run config names)."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

from dagster import Config, Failure, OpExecutionContext
from pydantic import field_validator

from kilo_pipelines.telemetry import traces

# Items of one run in work at once: as many as the store's pool has connections for, with room for the log's.
AT_ONCE = 4


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
    """Does one thing for every item, each below its own trace; one that raises is logged and stops no other, and the run fails with it in the end.

    Each item has its own transaction in `work`, so what the others did stands; the run's retry finds them moved on. Items go side
    by side: most of the time goes into waiting for the provider.
    """

    def one(item_id: str) -> bool:
        # Asked for only where traces are made. Runs over owners (syncs, notices) begin traces of their own.
        parent = context.resources.store.get().queue.trace_of(UUID(item_id)) if traces.armed() else None
        try:
            with traces.following(parent, context.op.name, run=context.run_id):
                work(UUID(item_id))
        except Exception:  # whatever one item raises: it is shown, kept and raised below
            context.log.exception(f"item {item_id} failed")
            return False
        return True

    if len(ids) == 1:
        done = [one(ids[0])]
    else:
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="item") as pool:
            done = list(pool.map(one, ids))
    failed = [item_id for item_id, well in zip(ids, done, strict=True) if not well]
    if failed:
        raise Failure(f"{len(failed)} of {len(ids)} items failed: {', '.join(failed)}", allow_retries=True)
