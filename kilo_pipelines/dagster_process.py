"""Dagster's own programs in the platform's log format: `python -m kilo_pipelines.dagster_process daemon run …`, `… code-server start …`.

Dagster writes coloured lines to stdout and takes no other formatter. Here logging stands before its program begins, and what it
configures then sets levels only (`telemetry.logs`). Does not belong here: what the programs do.
"""

from __future__ import annotations

import sys

from kilo_pipelines.settings import Settings
from kilo_pipelines.telemetry import logs


def main() -> None:
    """Runs the named program with the other arguments; exit status 2 for one that isn't of the platform."""
    program, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if program == "daemon":
        from dagster._daemon.cli import cli

        logs.set_up(Settings(), "dagster-daemon")
        cli(arguments, prog_name="dagster-daemon", obj={})
    elif program == "code-server":
        from dagster._cli.code_server import code_server_cli

        logs.set_up(Settings(), "dagster-code")
        code_server_cli(arguments, prog_name="dagster code-server")
    else:
        raise SystemExit(2)


if __name__ == "__main__":
    main()
