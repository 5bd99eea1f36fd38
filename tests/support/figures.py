"""What a suite counts: how often something was tried and what went wrong, over all its tests and workers.

A test says `figures(tried=5, lost=0)`; with `--suite NAME` the run ends with one JSON line of the sums. `--full` asks for the
suite's full form instead of the bounded one that `make test` runs.
"""

from __future__ import annotations

import json
import time
from typing import Protocol

import pytest

COUNTED = ("tried", "lost", "duplicated", "leaked", "accepted", "green")
_PREFIX = "figure:"


class Figures(Protocol):
    """Adds counts of one test; names outside `COUNTED` are maxima (seconds until work went on again, and the like)."""

    def __call__(self, **counts: float) -> None: ...


def recorder(request: pytest.FixtureRequest) -> Figures:
    """The `figures` fixture of one test."""

    def add(**counts: float) -> None:
        request.node.user_properties.extend((_PREFIX + name, value) for name, value in counts.items())

    return add


class Summary:
    """The plugin of the main process: sums what the tests counted."""

    def __init__(self, suite: str) -> None:
        self._suite = suite
        self._counts: dict[str, float] = dict.fromkeys(COUNTED, 0)
        self._tests = {"passed": 0, "failed": 0, "skipped": 0}
        self._started = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Takes one test's counts; a test that fails in its set-up or end has failed too."""
        if report.when == "call" or report.outcome != "passed":
            self._tests[report.outcome] += 1
        if report.when != "teardown":
            return
        for name, value in report.user_properties:
            if not name.startswith(_PREFIX):
                continue
            key = name.removeprefix(_PREFIX)
            known = self._counts.get(key, 0)
            self._counts[key] = known + value if key in COUNTED else max(known, value)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The last line."""
        line = {"suite": self._suite, **self._counts, "tests": self._tests, "seconds": round(time.monotonic() - self._started, 1)}
        terminalreporter.config.add_cleanup(lambda: print(json.dumps(line)))
