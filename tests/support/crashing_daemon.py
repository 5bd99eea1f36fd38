"""A second sensor daemon that kills itself at one of Dagster's own crash points: `python -m tests.support.crashing_daemon POINT`.

Run beside a platform whose own daemon stands still, with the environment of its Dagster processes.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dagster import DagsterInstance
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import WorkspaceFileTarget
from dagster._daemon.sensor import execute_sensor_iteration

WORKSPACE = Path(__file__).resolve().parents[2] / "workspace.yaml"
SECONDS = 40.0


def main(point: str) -> int:
    """Evaluates the sensors until one comes by the point, which kills this process; 3 when none did."""
    with DagsterInstance.get() as instance, WorkspaceProcessContext(instance, WorkspaceFileTarget([str(WORKSPACE)])) as context:
        flags: Any = {f"work_{number:02d}": {point: signal.SIGKILL} for number in range(32)}
        deadline = time.monotonic() + SECONDS
        with ThreadPoolExecutor(8) as pool:
            futures: dict[str, Any] = {}
            while time.monotonic() < deadline:
                list(execute_sensor_iteration(context, logging.getLogger("daemon"), pool, None, futures, debug_crash_flags=flags))
                time.sleep(0.5)
    return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
