"""Other people's programs in the platform's log format: `python -m kilo_pipelines.process daemon run …`, `code-server start …`, `celery …`.

Dagster writes coloured lines to stdout and Celery warns before anybody has set up logging; neither takes another formatter from its
command line. Here logging stands before the program begins, and what it configures then sets levels only (`telemetry.logs`). Does not
belong here: what the programs do.
"""

from __future__ import annotations

import sys

from kilo_pipelines.settings import Settings
from kilo_pipelines.telemetry import logs


def main() -> None:
    """Runs the named program with the other arguments; exit status 2 for one that isn't of the platform."""
    program, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if program == "daemon":
        logs.set_up(Settings(), "dagster-daemon")
        from dagster._daemon.cli import cli

        cli(arguments, prog_name="dagster-daemon", obj={})
    elif program == "code-server":
        logs.set_up(Settings(), "dagster-code")
        from dagster._cli.code_server import code_server_cli

        code_server_cli(arguments, prog_name="dagster code-server")
    elif program == "celery":
        logs.set_up(Settings(), "worker")
        from celery.bin.celery import main as celery

        sys.argv = ["celery", *arguments]
        celery()
    else:
        raise SystemExit(2)


if __name__ == "__main__":
    main()
