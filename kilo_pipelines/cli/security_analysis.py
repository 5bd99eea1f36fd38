"""`kilo-pipelines security analyze`: asks for the analysis of a finding."""

from __future__ import annotations

from uuid import UUID

import click

from kilo_pipelines.acts.analysis import analyse
from kilo_pipelines.cli.common import OPERATOR, as_json, end, open_store, show
from kilo_pipelines.cli.security import finding_of, security
from kilo_pipelines.core.reasons import MEANING, Reason


@security.command("analyze")
@click.argument("finding", type=click.UUID)
@click.option("--deep", is_flag=True, help="Read the repository, whatever the metadata say.")
@click.option("--restart", is_flag=True, help="Cancel what is under way and start over, reading the repository.")
@as_json
def security_analyze(finding: UUID, deep: bool, restart: bool, plain: bool) -> None:
    """Has a finding analysed; the item that does it is watched with `items show`."""
    _, store = open_store(plain)
    answer = analyse(store, finding_of(store, finding, plain), role="owner", actor=OPERATOR, deep=deep, restart=restart)
    if isinstance(answer, Reason):
        meaning, remedy = MEANING[answer]
        end(plain, f"not analysed: {meaning} {remedy} ({answer})")
    show(plain, {"item": answer}, lambda: f"waiting as item {answer}")
