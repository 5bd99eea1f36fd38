"""`kilo-pipelines security notices`: who was told what, and the secret that webhooks are signed with."""

from __future__ import annotations

from uuid import UUID

import click

from kilo_pipelines.cli.client import api
from kilo_pipelines.cli.common import as_json, show
from kilo_pipelines.cli.security import owner_option, security


@security.group("notices")
def security_notices() -> None:
    """Notices to people."""


@security_notices.command("list")
@owner_option
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 1_000))
@as_json
def security_notices_list(owner: UUID | None, limit: int, plain: bool) -> None:
    """Lists notices with what became of each message."""
    found = api(plain).get("/security/notices", owner=owner, limit=limit)["notices"]

    def text() -> str:
        lines = [
            f"{one['created_at'][:16]} {one['kind']:<12} {one['finding_id']} {one['state']}"
            + "".join(f"  {m['channel']} {m['state']}{' (' + m['reason'] + ')' if m['reason'] else ''}" for m in one["messages"])
            for one in found
        ]
        return "\n".join(lines) or "nobody was told anything"

    show(plain, found, text)


@security_notices.command("webhook-secret")
@owner_option
@as_json
def security_notices_webhook_secret(owner: UUID | None, plain: bool) -> None:
    """Shows the secret that the owner's webhooks are signed with (Standard Webhooks, `whsec_` and base64)."""
    found = api(plain).get("/security/notices/webhook-secret", owner=owner)
    show(plain, found, lambda: str(found["secret"]))
