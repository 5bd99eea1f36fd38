"""The log of runs on the worker's side: one line a message in the platform's format, beside the event log in Dagster's database."""

from __future__ import annotations

import logging

from dagster import InitLoggerContext, logger


@logger(None, "Writes a run's messages to its worker's log.")
def run_log(_context: InitLoggerContext) -> logging.Logger:
    """Dagster's own console logger has a handler of its own, past the format and the scrubbing."""
    return logging.getLogger("kilo_pipelines.runs")
