"""`kilo-pipelines security dismiss`: dismisses findings, here and at their source."""

from __future__ import annotations

from uuid import UUID

import click

from kilo_pipelines.acts.dismissal import dismiss, dismiss_many
from kilo_pipelines.cli.common import OPERATOR, as_json, end, open_store, show
from kilo_pipelines.cli.security import finding_of, owner_of, owner_option, security
from kilo_pipelines.core.reasons import MEANING, Reason
from kilo_pipelines.services.security.dismissal import REASONS
from kilo_pipelines.store import Store


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
    _, store = open_store(plain)
    if finding is not None and reason is not None:
        _one(store, finding, reason, comment, plain)
    else:
        _many(store, owner_of(store, owner, plain), apply, plain)


def _one(store: Store, finding: UUID, reason: str, comment: str, plain: bool) -> None:
    answer = dismiss(store, finding_of(store, finding, plain), role="owner", actor=OPERATOR, reason=reason, comment=comment)
    if isinstance(answer, Reason):
        _refused(answer, plain)
    show(plain, {"item": answer}, lambda: f"waiting as item {answer}")


def _many(store: Store, owner: UUID, apply: bool, plain: bool) -> None:
    counted = dismiss_many(store, owner, role="owner", actor=OPERATOR, apply=apply)
    if isinstance(counted, Reason):
        _refused(counted, plain)
    else:
        show(
            plain,
            dict(counted),
            lambda: "\n".join(f"{number:>6}  {what}" for what, number in counted.most_common()) or "nothing is open",
        )


def _refused(reason: Reason, plain: bool) -> None:
    meaning, remedy = MEANING[reason]
    end(plain, f"not dismissed: {meaning} {remedy} ({reason})")
