"""`kilo-pipelines security dismiss`: dismisses findings, here and at their source."""

from __future__ import annotations

from uuid import UUID

import click

from kilo_pipelines.cli.client import api
from kilo_pipelines.cli.common import as_json, end, show
from kilo_pipelines.cli.security import owner_option, security
from kilo_pipelines.services.security.dismissal import REASONS


@security.command("dismiss")
@click.argument("finding", type=click.UUID, required=False)
@click.option("--reason", type=click.Choice(REASONS), help="What the source is told.")
@click.option("--comment", default="", help="A sentence for it; what is longer than the source takes is cut.")
@click.option("--bulk", is_flag=True, help="All open findings of the owner of which the metadata say so.")
@click.option("--apply", is_flag=True, help="With --bulk: dismiss them; without it they are only counted.")
@owner_option
@as_json
def security_dismiss(
    finding: UUID | None, reason: str | None, comment: str, bulk: bool, apply: bool, owner: UUID | None, plain: bool
) -> None:
    """Dismisses a finding, or with --bulk shows (and with --apply dismisses) what the analyses of metadata let go."""
    if bulk == (finding is not None) or (reason is None) != bulk or (apply and not bulk):
        end(plain, "name a finding with --reason, or say --bulk, and --apply to do it", 2)
    asked = api(plain)
    if finding is not None:
        done = asked.post(f"/security/findings/{finding}/dismiss", {"reason": reason, "comment": comment})
        show(plain, {"item": done["item"]}, lambda: f"waiting as item {done['item']}")
        return
    counted: dict[str, int] = asked.post("/security/dismiss", {"apply": apply}, owner=owner)["counted"]
    most = sorted(counted.items(), key=lambda one: -one[1])
    show(plain, counted, lambda: "\n".join(f"{number:>6}  {what}" for what, number in most) or "nothing is open")
