"""Reports every unfinished run failed: `python -m kilo_pipelines.resources.lost_runs WHY`, while nothing of the platform runs."""

from __future__ import annotations

import sys

from dagster import DagsterInstance, RunsFilter
from dagster._core.storage.dagster_run import NOT_FINISHED_STATUSES

# Of one read: a platform that died had a few dozen at work.
BATCH = 200


def main(why: str) -> None:
    """Until there is none."""
    with DagsterInstance.get() as instance:
        while found := instance.get_runs(RunsFilter(statuses=NOT_FINISHED_STATUSES), limit=BATCH):
            for run in found:
                instance.report_run_failed(run, why)


if __name__ == "__main__":
    main(sys.argv[1])
