"""Audit and keys from the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import click

from kilo_pipelines.cli.client import api
from kilo_pipelines.cli.common import as_json, end, open_store, show
from kilo_pipelines.core.reasons import MEANING
from kilo_pipelines.resources.upkeep import export_heads, read_heads
from kilo_pipelines.settings import write_secret
from kilo_pipelines.store import Cipher, app_secrets


@click.group()
def audit() -> None:
    """Who did what; sealed into a chain whose heads lie outside the database."""


@audit.command("list")
@click.option("--owner", type=click.UUID)
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 1_000))
@as_json
def audit_list(owner: UUID | None, limit: int, plain: bool) -> None:
    """Lists audit events, newest first."""
    found = api(plain).get("/audit", owner=owner, limit=limit)["events"]
    show(
        plain,
        found,
        lambda: (
            "\n".join(
                f"{one['at'][:19]}  {one['actor']:<14} {one['action']:<24} {one['subject']}  seal {one['seal'] or '-'}"
                for one in found
            )
            or "no events"
        ),
    )


@audit.command("seal")
@as_json
def audit_seal(plain: bool) -> None:
    """Seals now what isn't sealed yet, and exports the head."""
    settings, store = open_store(plain)
    seal = store.audit.seal()
    export_heads(store, settings.audit_heads_file)
    show(
        plain,
        seal.exported() if seal else {"count": 0},
        lambda: f"seal {seal.number}: {seal.count} events, head {seal.head}" if seal else "nothing to seal",
    )


@audit.command("verify")
@click.option(
    "--heads", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Exported heads. Default: the home's own file."
)
@as_json
def audit_verify(heads: Path | None, plain: bool) -> None:
    """Recomputes the chain from the events and holds it against the exported heads; exit status 1 when it doesn't hold."""
    settings, store = open_store(plain)
    try:
        known = read_heads(heads or settings.audit_heads_file)
    except (ValueError, KeyError) as failure:
        end(plain, f"the file of heads can't be read: {type(failure).__name__}")
    broken = store.audit.verify(known)
    seals = len(store.audit.seals())
    value: dict[str, Any] = {"ok": broken is None, "seals": seals, "heads": len(known), "unsealed": store.audit.unsealed()}
    if broken is not None:
        value |= {"seal": broken.seal, "reason": broken.reason}

    def text() -> str:
        if broken is None:
            return (
                f"{seals} seals hold, {len(known)} of them against exported heads; {value['unsealed']} events wait for the next"
            )
        meaning, remedy = MEANING[broken.reason]
        return f"BROKEN at seal {broken.seal}: {broken.reason}: {meaning} {remedy}"

    show(plain, value, text)
    sys.exit(0 if broken is None else 1)


@click.group("encryption-keys")
def encryption_keys() -> None:
    """The key that encrypts secrets in the database."""


@encryption_keys.command("list")
@as_json
def encryption_keys_list(plain: bool) -> None:
    """Lists keys by id: which one seals, which ones are in use."""
    settings, store = open_store(plain)
    current, ids = Cipher.key_ids(settings.encryption_key_file.read_text())
    used = store.keys.in_use()
    found = [
        {"id": one, "current": one == current, "in_use": one in used, "derives": number == 0} for number, one in enumerate(ids)
    ]
    show(
        plain,
        found,
        lambda: "\n".join(
            f"{one['id']}  {', '.join(word for word in ('current', 'in_use', 'derives') if one[word])}" for one in found
        ),
    )


@encryption_keys.command("rotate")
@as_json
def encryption_keys_rotate(plain: bool) -> None:
    """Makes a new key and seals everything under it; running processes read it when they meet it. Interrupted: run it again."""
    settings, store = open_store(plain)
    file = settings.encryption_key_file
    write_secret(file, Cipher.rotated(file.read_text()))
    _, fresh = open_store(plain)
    done = fresh.keys.reseal()
    app_secrets.adopt(settings)
    store.database.dispose()
    show(
        plain,
        {"resealed": done},
        lambda: f"{done} values sealed under the new key; `kilo-pipelines encryption-keys prune` forgets unused ones",
    )


@encryption_keys.command("prune")
@as_json
def encryption_keys_prune(plain: bool) -> None:
    """Forgets keys that seal nothing any more. The first key stays: markers on the provider's pages are derived from it."""
    settings, store = open_store(plain)
    store.keys.reseal()
    app_secrets.adopt(settings)
    file = settings.encryption_key_file
    before = Cipher.key_ids(file.read_text())[1]
    write_secret(file, Cipher.pruned(file.read_text(), store.keys.in_use()))
    gone = [one for one in before if one not in Cipher.key_ids(file.read_text())[1]]
    show(plain, {"forgotten": gone}, lambda: f"forgotten: {', '.join(gone) or 'none'}")


COMMANDS = (audit, encryption_keys)
