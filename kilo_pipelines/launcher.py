"""The run launcher: dagster-celery's, with our task, our truth of health and an honest termination.

Why a subclass (each seen on Dagster 1.13.27): the stock `terminate` doesn't say that the run is being canceled, so the run
fails and is started again; the stock health check reads Celery's result backend, which knows nothing of a killed worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self

from dagster import DagsterRun, Field, StringSource
from dagster._core.launcher import CheckRunHealthResult, LaunchRunContext, WorkerStatus
from dagster._serdes import ConfigurableClassData
from dagster_celery.launcher import CeleryRunLauncher

from kilo_pipelines import tags
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.resources.store import open_store
from kilo_pipelines.settings import current
from kilo_pipelines.store import Store
from kilo_pipelines.worker import EXECUTE_RUN, make_app


def _items_of(run: DagsterRun) -> list[str]:
    """The work items of a service's run: its tag's when it was started for one, else those of its configuration."""
    if tags.ITEM in run.tags:
        return [run.tags[tags.ITEM]]
    if tags.SERVICE not in run.tags:
        return []
    configured: dict[str, Any] = dict(run.run_config).get("ops", {})  # type: ignore[assignment]
    return [str(one) for op in configured.values() for one in op.get("config", {}).get("ids", [])]


class KiloRunLauncher(CeleryRunLauncher):
    """Starts runs as tasks of `kilo_pipelines.worker`."""

    def __init__(self, broker: str, inst_data: ConfigurableClassData | None = None) -> None:
        super().__init__(default_queue=tags.QUEUE_MAINTENANCE, broker=broker, inst_data=inst_data)
        self.celery = make_app(broker)

    @classmethod
    def config_type(cls) -> dict[str, Field]:
        return {"broker": Field(StringSource, description="URL of the Celery broker, password included.")}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]) -> Self:
        return cls(inst_data=inst_data, **config_value)

    @cached_property
    def _store(self) -> Store:
        return open_store(current())

    def launch_run(self, context: LaunchRunContext) -> None:
        """Hands the run's id to the queue that its tags name; the queue alone decides the route."""
        run = context.dagster_run
        queue = run.tags.get(tags.QUEUE, tags.QUEUE_MAINTENANCE)
        result = self.celery.send_task(EXECUTE_RUN, args=(run.run_id,), queue=queue)
        self._instance.add_run_tags(run.run_id, {tags.TASK: result.task_id})

    def terminate(self, run_id: str) -> bool:
        """Cancels the run and the work items that it stands for.

        The order matters: the item is cancelled in the database first (that also asks its session to stop and keeps a
        queued one from ever starting), then Dagster is told, then the worker's process is interrupted.
        """
        run = self._instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            return False
        for item in _items_of(run):
            self._store.queue.cancel(item, reason=Reason.USER_CANCELLED, actor="dagster-ui")
        self._instance.report_run_canceling(run)
        task_id = run.tags.get(tags.TASK)
        if task_id is not None:
            self.celery.control.revoke(task_id, terminate=True, signal="SIGTERM")
        if not self._has_started(run_id):
            self._instance.report_run_canceled(run)
        return True

    def _has_started(self, run_id: str) -> bool:
        record = self._instance.get_run_record_by_id(run_id)
        return record is not None and record.start_time is not None

    @property
    def supports_resume_run(self) -> bool:
        """Attempts are the engine's; Dagster never resumes."""
        return False

    def check_run_worker_health(self, run: Any) -> CheckRunHealthResult:
        """Health from the leases that the run took: expired means that its worker is gone."""
        if self._store.queue.run_lost(run.run_id):
            return CheckRunHealthResult(WorkerStatus.FAILED, "The lease of this run's work is over: its worker is gone.")
        return CheckRunHealthResult(WorkerStatus.RUNNING)
