"""`kilo-pipelines deliveries`: webhooks that came, webhooks that didn't, and bringing those in now."""

from __future__ import annotations

import logging
from datetime import datetime
from typing import Any
from uuid import UUID

import click

from kilo_pipelines.cli.client import api
from kilo_pipelines.cli.common import as_json, end, open_store, show
from kilo_pipelines.cli.people import owner_option
from kilo_pipelines.core.reasons import MEANING
from kilo_pipelines.core.text import one_line


@click.group()
def deliveries() -> None:
    """Webhooks that came, and repair of those that didn't."""


@deliveries.command("list")
@owner_option
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 1_000), help="Of each list.")
@as_json
def deliveries_list(owner: UUID | None, limit: int, plain: bool) -> None:
    """Lists an owner's missed deliveries and the newest ones that came."""
    found = api(plain).get("/deliveries", owner=owner, limit=limit)

    def text() -> str:
        missed = [_line(one, one["sent_at"], one["repository"] or "") for one in found["gaps"]]
        received = [_line(one, one["received_at"], "pulled" if one["pulled"] else "") for one in found["received"]]
        return "\n".join(["missed", *(missed or ["none"]), "", "received", *(received or ["none"])])

    show(plain, found, text)


def _line(one: dict[str, Any], sent: str, more: str) -> str:
    """One delivery; its id and event are as the sender wrote them."""
    at = datetime.fromisoformat(sent)
    guid, event = one_line(one["guid"], 36), one_line(one["event"], 26)
    return f"{at:%Y-%m-%d %H:%M}  {guid:<36}  {event:<26} {one['state']:<9} {one['reason'] or '-':<22} {more}".rstrip()


@deliveries.command("repair")
@as_json
def deliveries_repair(plain: bool) -> None:
    """Compares GitHub's log of deliveries with ours now and takes the next step of every gap, over all owners."""
    # The orchestrator's library takes seconds to load, and only this command needs it.
    from kilo_pipelines.ops.delivery_repair import Repair
    from kilo_pipelines.resources.github import GitHubResource, ProviderError

    _, store = open_store(plain)
    repair = Repair(store, GitHubResource(), logging.getLogger(__name__))
    try:
        repair.run()
    except ProviderError as failure:
        meaning, remedy = MEANING[failure.reason]
        end(plain, f"{failure.reason}: {meaning} {remedy}")
    counts = {str(name): count for name, count in sorted(repair.counts.items()) if count}
    show(plain, counts, lambda: "\n".join(f"{count:>6}  {name}" for name, count in counts.items()) or "nothing in GitHub's log")


COMMANDS = (deliveries,)
