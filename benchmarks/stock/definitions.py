"""A code location as one writes it first: poll a table every second, ask for a run per row, note when its op began."""

import os
import time
from collections.abc import Iterator

import psycopg
from dagster import (
    Config,
    DefaultSensorStatus,
    Definitions,
    OpExecutionContext,
    RunRequest,
    SensorEvaluationContext,
    job,
    op,
    sensor,
)


class Row(Config):
    """Which row a run is for."""

    id: int


@op
def work(context: OpExecutionContext, config: Row) -> None:
    began = time.time()  # the first statement
    del context
    with psycopg.connect(os.environ["BENCH_DATABASE_URL"], autocommit=True) as connection:
        connection.execute("update bench_rows set op_at = to_timestamp(%s) where id = %s", (began, config.id))


@job
def row_job() -> None:
    work()


@sensor(job=row_job, minimum_interval_seconds=1, default_status=DefaultSensorStatus.RUNNING)
def poll(context: SensorEvaluationContext) -> Iterator[RunRequest]:
    last = int(context.cursor or "0")
    with psycopg.connect(os.environ["BENCH_DATABASE_URL"], autocommit=True) as connection:
        fresh = [row[0] for row in connection.execute("select id from bench_rows where id > %s order by id", (last,))]
    for number in fresh:
        yield RunRequest(run_key=str(number), run_config={"ops": {"work": {"config": {"id": number}}}})
    if fresh:
        context.update_cursor(str(fresh[-1]))


defs = Definitions(jobs=[row_job], sensors=[poll])
