"""`kilo-pipelines security analyze`: asks for the analysis of a finding."""

from __future__ import annotations

from uuid import UUID

import click

from kilo_pipelines.cli.client import api
from kilo_pipelines.cli.common import as_json, show
from kilo_pipelines.cli.security import security


@security.command("analyze")
@click.argument("finding", type=click.UUID)
@click.option("--deep", is_flag=True, help="Read the repository, whatever the metadata say.")
@click.option("--restart", is_flag=True, help="Cancel what is under way and start over, reading the repository.")
@as_json
def security_analyze(finding: UUID, deep: bool, restart: bool, plain: bool) -> None:
    """Has a finding analysed; the item that does it is watched with `items show`."""
    done = api(plain).post(f"/security/findings/{finding}/analyze", {"deep": deep, "restart": restart})
    show(plain, {"item": done["item"]}, lambda: f"waiting as item {done['item']}")
