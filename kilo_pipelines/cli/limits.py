"""`kilo-pipelines spend`, `budgets`, `suggest-only`, `effects show|approve`, `reviews approve`: what is spent and what is let go.

Over the control API: the operator's for every owner, an owner's key for its own.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from uuid import UUID

import click

from kilo_pipelines.cli.client import api
from kilo_pipelines.cli.common import as_json, end, show
from kilo_pipelines.cli.people import owner_option
from kilo_pipelines.cli.work import effects, scope_of, scoped
from kilo_pipelines.core.limits import CAP, MICRO, SETTINGS


def _usd(micro: int | None) -> str:
    return "-" if micro is None else f"{micro / MICRO:.4f}"


@click.command()
@click.option("--owner", type=click.UUID, help="Only this owner; all of them without.")
@click.option("--days", type=click.IntRange(1, 366), default=1, show_default=True, help="UTC days, today among them.")
@as_json
def spend(owner: UUID | None, days: int, plain: bool) -> None:
    """Shows what models cost, by day, service and model; exit status 1 when an owner is over its budget."""
    found = api(plain).get("/spend", owner=owner, days=days)

    def text() -> str:
        lines = [
            f"{row['day']}  {row['owner']:<16} {row['service']:<18} {row['model']:<20} {row['tokens_in']:>10} in {row['tokens_out']:>9} out"
            f"  {_usd(row['micro_usd']):>10} USD{'' if not row['unpriced_tokens'] else '  some of it without a price'}"
            for row in found["days"]
        ]
        lines += [
            f"today  {row['owner']:<16} budget {row['scope']:<12} {row['spent_tokens']} of {row['tokens'] if row['tokens'] is not None else '-'} tokens,"
            f" {_usd(row['spent_micro_usd'])} of {_usd(row['micro_usd'])} USD; running work holds {row['reserved_tokens']} tokens"
            f"{', ' + ' and '.join(row['told']) if row['told'] else ''}"
            for row in found["budgets"]
        ]
        return "\n".join(lines) or "nothing was spent"

    show(plain, found, text)
    sys.exit(1 if any(_is_over(row) for row in found["budgets"]) else 0)


def _is_over(row: dict[str, Any]) -> bool:
    pairs = ((row["tokens"], row["spent_tokens"]), (row["micro_usd"], row["spent_micro_usd"]))
    return any(bound is not None and used > bound for bound, used in pairs)


@click.group()
def budgets() -> None:
    """Limits of an owner: daily budgets, outsiders, authors, suggest-only."""


@budgets.command("show")
@owner_option
@as_json
def budgets_show(owner: UUID | None, plain: bool) -> None:
    """Shows an owner's limits with their revision, and how today stands."""
    asked = api(plain)
    kept, cap = (asked.get(f"/services/{name}/settings", owner=owner) for name in (SETTINGS, CAP))
    today = asked.get("/spend", owner=owner)["budgets"]
    value = {"revision": kept["revision"], "limits": kept["settings"], "cap_revision": cap["revision"], "cap": cap["settings"]}
    value["today"] = today
    show(plain, value, lambda: json.dumps(value, indent=2))


@budgets.command("set")
@owner_option
@click.option("--revision", type=int, required=True, help="The one that `budgets show` told; 0 while none are set.")
@click.argument("changes")
@as_json
def budgets_set(owner: UUID | None, revision: int, changes: str, plain: bool) -> None:
    """Lays CHANGES (JSON, such as '{"daily": {"tokens": 5000000}}') over an owner's limits; what isn't named stays."""
    _save(SETTINGS, owner, revision, changes, plain)


@budgets.command("cap")
@owner_option
@click.option("--revision", type=int, required=True, help="The `cap_revision` that `budgets show` told; 0 while there is no cap.")
@click.argument("changes")
@as_json
def budgets_cap(owner: UUID | None, revision: int, changes: str, plain: bool) -> None:
    """Lays CHANGES (JSON: '{"tokens": 20000000, "usd": null}') over what the operator lets an owner spend in a day, whatever its own limits say."""
    _save(CAP, owner, revision, changes, plain)


def _save(name: str, owner: UUID | None, revision: int, changes: str, plain: bool) -> None:
    try:
        wanted = json.loads(changes)
    except ValueError:
        wanted = None
    if not isinstance(wanted, dict):
        end(plain, "CHANGES is one JSON object", 2)
    body = {"expected_revision": revision, "settings": wanted}
    kept = api(plain).put(f"/services/{name}/settings", body, owner=owner)
    show(plain, {"revision": kept["revision"]}, lambda: f"revision {kept['revision']}")


@click.group("suggest-only")
def suggest() -> None:
    """Suggest-only mode: work is done, and what it would write outside is held for a person."""


def _set(owner: UUID | None, service: str | None, on: bool, reason: str | None, plain: bool) -> None:
    wish = {"on": on, **({"reason": reason} if reason is not None else {}), **scope_of(owner, service, plain)}
    done = api(plain).post("/suggest-only", wish)
    show(plain, done, lambda: f"suggest-only {'on' if done['on'] else 'off'}: {done['scope']}")


@suggest.command("on")
@scoped
@click.option("--reason", default="nothing is written unasked", show_default=True)
@as_json
def suggest_on(owner: UUID | None, service: str | None, reason: str, plain: bool) -> None:
    """Holds what work in the scope (everything, an owner, a service) would write outside from now on."""
    _set(owner, service, True, reason, plain)


@suggest.command("off")
@scoped
@as_json
def suggest_off(owner: UUID | None, service: str | None, plain: bool) -> None:
    """Ends the mode; what is held stays held until it is approved, dropped or expires."""
    _set(owner, service, False, None, plain)


@effects.command("show")
@click.argument("effect", type=click.UUID)
@as_json
def effects_show(effect: UUID, plain: bool) -> None:
    """Shows what an effect writes, and the hash that `effects approve` names."""
    found = api(plain).get(f"/effects/{effect}")
    show(plain, found, lambda: json.dumps(found, indent=2))


@effects.command("approve")
@click.argument("effect", type=click.UUID)
@click.option("--sha256", required=True, help="Of what `effects show` told: nothing else is released.")
@as_json
def effects_approve(effect: UUID, sha256: str, plain: bool) -> None:
    """Releases a held effect; one that newer work has overtaken is dropped instead."""
    done = api(plain).post(f"/effects/{effect}/approve", {"sha256": sha256})
    show(plain, done, lambda: str(done["state"]))


@click.command("approve")
@click.argument("review", type=click.UUID)
@click.option("--head", required=True, help="The commit that was looked at (its first seven digits at least).")
@as_json
def reviews_approve(review: UUID, head: str, plain: bool) -> None:
    """Lets the pull request of an outsider be reviewed at exactly this head."""
    done = api(plain).post(f"/reviews/{review}/approve", {"head": head})
    show(plain, done, lambda: f"approved at {head}")


COMMANDS = (spend, budgets, suggest)
