"""The Celery application of the warm run workers.

Holds: one task, `kilo.execute_run`, and the worker's settings. It takes a run id and nothing else, and it runs only jobs
of the code location `kilo` (threats, rule 19). Does not belong here: anything that a job does.

Started by the supervisor as `python -m kilo_pipelines.process celery -A kilo_pipelines.worker worker -Q <queue>`.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from functools import cache
from typing import Any

from celery import Celery
from celery.signals import setup_logging, worker_init, worker_ready, worker_shutdown
from dagster import DagsterInstance, DagsterRun
from dagster._cli.api import _execute_run_command_body
from dagster._core.code_pointer import ModuleCodePointer
from dagster._utils.interrupts import capture_interrupts
from kombu import Exchange, Queue

from kilo_pipelines.resources.store import make_store
from kilo_pipelines.settings import current
from kilo_pipelines.store import HOST_SEEN_SECONDS, DatabaseAwayError
from kilo_pipelines.tags import QUEUE_AGENTS, QUEUE_MAINTENANCE, QUEUES
from kilo_pipelines.telemetry import logs, traces

log = logging.getLogger(__name__)

DEFINITIONS_MODULE = "kilo_pipelines.definitions"
EXECUTE_RUN = "kilo.execute_run"

# Longer than any run may last (agent sessions are capped at hours): Redis hands an unacknowledged task out again after it.
VISIBILITY_TIMEOUT_SECONDS = 43_200
BROKER_CONNECT_SECONDS = 5
BROKER_KEEPALIVE = {socket.TCP_KEEPIDLE: 5, socket.TCP_KEEPINTVL: 2, socket.TCP_KEEPCNT: 2, socket.TCP_USER_TIMEOUT: 8_000}
# Also how long an unanswered wait for a task may last, which none of ours does: the broker answers every second.
BROKER_HEALTH_SECONDS = 10
# A child that ran this many runs is replaced, against slow growth of memory.
RUNS_PER_CHILD = 500


def make_app(broker_url: str) -> Celery:
    """The application for workers and the launcher; needs no connection to be made.

    Runs acknowledge early: the claim in the run's first op decides who works, and a late acknowledgement ran every long
    task twice. No results are kept: a run's health comes from our lease.
    """
    app = Celery("kilo_pipelines", broker=broker_url, backend="disabled://")
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_acks_late=False,
        task_ignore_result=True,
        task_default_queue=QUEUE_MAINTENANCE,
        # Own exchanges: queues left to the default one would all get each other's tasks.
        task_queues=[Queue(name, Exchange(name), routing_key=name) for name in QUEUES],
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_max_tasks_per_child=RUNS_PER_CHILD,
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        # A short and bounded retry when the broker is away: the offer expires and is made again.
        broker_transport_options={
            "visibility_timeout": VISIBILITY_TIMEOUT_SECONDS,
            "max_retries": 3,
            "interval_start": 0,
            "interval_step": 0.2,
            "interval_max": 0.5,
            # A network that is gone says nothing: the connection is given up within seconds and made anew when it is back.
            "socket_connect_timeout": BROKER_CONNECT_SECONDS,
            "socket_keepalive": True,
            "socket_keepalive_options": BROKER_KEEPALIVE,
            "health_check_interval": BROKER_HEALTH_SECONDS,
        },
    )
    return app


# Celery's command line looks the application up by this name; it connects to nothing before the worker starts.
app = make_app(os.environ.get("KILO_BROKER_URL", "memory://"))


class ForeignRunError(Exception):
    """A run asks for code that is not this platform's definitions; it is refused."""


@cache
def _instance() -> DagsterInstance:
    """One Dagster instance a worker process: opening it anew costs more than most runs."""
    return DagsterInstance.get()


def _refuse_foreign_code(run: DagsterRun) -> None:
    origin = run.job_code_origin
    pointer = origin.repository_origin.code_pointer if origin else None
    if not isinstance(pointer, ModuleCodePointer) or pointer.module != DEFINITIONS_MODULE:
        raise ForeignRunError(f"run {run.run_id} does not come from {DEFINITIONS_MODULE}")


@app.task(name=EXECUTE_RUN, bind=True, track_started=False)
def execute_run(_task: Any, run_id: str) -> int:
    """Carries out one Dagster run in this warm process; 0 when it succeeded.

    Dagster leaves SIGTERM ignored in a prefork child after its first run, which would make the next run impossible to
    terminate: both handlers are put back.
    """
    term, interrupt = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    settings = current()
    traces.arm(settings, settings.process or "worker")
    instance = _instance()
    run = instance.get_run_by_id(run_id)
    if run is None or run.is_finished:
        return 0  # terminated or deleted while it waited in the broker
    try:
        _refuse_foreign_code(run)
        with capture_interrupts():
            return _execute_run_command_body(
                run_id=run_id, instance=instance, write_stream_fn=lambda _event: None, set_exit_code_on_failure=True
            )
    except ForeignRunError as refusal:
        instance.report_run_failed(run, str(refusal))
        return 1
    finally:
        signal.signal(signal.SIGTERM, term)
        signal.signal(signal.SIGINT, interrupt)


@setup_logging.connect
def _log_in_one_format(**_signal: Any) -> None:
    """Whoever hears this signal sets up logging instead of Celery, however the worker was started."""
    logs.set_up(current(), "worker")


@worker_init.connect
def _load_definitions_before_fork(**_signal: Any) -> None:
    """Children share the parent's imported modules: their first run starts at once and their memory is shared."""
    import kilo_pipelines.definitions  # noqa: F401


@worker_ready.connect
def _host_is_there(sender: Any, **_signal: Any) -> None:
    """A worker of agents says how many sessions its host takes, and goes on saying so: nothing is offered for a silent host.

    In the worker's own loop, so that no child is forked meanwhile, and over connections that end with it.
    """
    if QUEUE_AGENTS in sender.app.amqp.queues.consume_from:
        _say_places(sender.pool.limit)
        sender.timer.call_repeatedly(HOST_SEEN_SECONDS, _say_places, (sender.pool.limit,))


@worker_shutdown.connect
def _host_leaves(sender: Any, **_signal: Any) -> None:
    """Places that a session still holds stay until its lease is over."""
    if QUEUE_AGENTS in sender.app.amqp.queues.consume_from:
        _say_places(0)


def _say_places(places: int) -> None:
    store = make_store(current())
    try:
        store.sessions.ensure_capacity(places)
    except DatabaseAwayError:
        log.warning("the database doesn't hear that this host is there")
    finally:
        store.database.dispose()
