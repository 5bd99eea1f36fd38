"""Dagster's UI on a unix socket of ours: `python -m kilo_pipelines.webserver`.

Dagster's own command can only listen on a port, where everybody on the machine (and, through GET mutations and foreign origins,
any page in somebody's browser) would be an operator. Here it listens in the 0700 directory, and the login of the admin listener
stands before it (threats, rule 19). Does not belong here: who may come in.
"""

from __future__ import annotations

from pathlib import Path

import uvicorn
from dagster import DagsterInstance
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import WorkspaceFileTarget
from dagster_webserver.app import create_app_from_workspace_process_context

from kilo_pipelines import __version__
from kilo_pipelines.settings import Settings
from kilo_pipelines.telemetry import logs

WORKSPACE = Path(__file__).resolve().parents[1] / "workspace.yaml"


def main() -> None:
    """Serves until SIGTERM or SIGINT."""
    settings = Settings()
    logs.set_up(settings, "dagster-ui")
    path = settings.dagster_socket
    path.unlink(missing_ok=True)
    with (
        DagsterInstance.get() as instance,
        WorkspaceProcessContext(instance, WorkspaceFileTarget([str(WORKSPACE)]), version=__version__) as context,
    ):
        application = create_app_from_workspace_process_context(context, path_prefix=settings.dagster_prefix)
        uvicorn.run(application, uds=str(path), log_config=None, access_log=False)


if __name__ == "__main__":
    main()
