"""`kilo-pipelines spend`, `budgets`, `suggest-only`, `effects show|approve`, `reviews approve`: what is spent and what is let go."""

from __future__ import annotations

import json
import sys
from typing import Any, NoReturn
from uuid import UUID

import click

from kilo_pipelines.acts import limits as acts
from kilo_pipelines.cli.common import OPERATOR, as_json, end, open_store, show
from kilo_pipelines.cli.work import effects, scoped
from kilo_pipelines.core.limits import MICRO
from kilo_pipelines.core.reasons import MEANING
from kilo_pipelines.core.refusal import Refusal

owner_option = click.option("--owner", type=click.UUID, required=True)


def _refused(refusal: Refusal, plain: bool) -> NoReturn:
    meaning, remedy = MEANING[refusal.reason]
    end(plain, f"{meaning} {remedy} ({refusal.reason}: {refusal.detail})")


def _usd(micro: int | None) -> str:
    return "-" if micro is None else f"{micro / MICRO:.4f}"


@click.command()
@click.option("--owner", type=click.UUID, help="Only this owner; all of them without.")
@click.option("--days", type=click.IntRange(1, 366), default=1, show_default=True, help="UTC days, today among them.")
@as_json
def spend(owner: UUID | None, days: int, plain: bool) -> None:
    """Shows what models cost, by day, service and model; exit status 1 when an owner is over its budget."""
    _, store = open_store(plain)
    owners = [one for one in store.owners.all() if owner in (None, one.id)]
    if not owners:
        end(plain, f"no owner {owner}")
    found = [{"owner": str(one.id), "name": one.name, **row} for one in owners for row in store.spend.of_owner(one.id, days)]
    budgets = [{"owner": str(one.id), "name": one.name, **row} for one in owners for row in store.spend.standing(one.id)]

    def text() -> str:
        lines = [
            f"{row['day']}  {row['name']:<16} {row['service']:<18} {row['model']:<20} {row['tokens_in']:>10} in {row['tokens_out']:>9} out"
            f"  {_usd(row['micro_usd']):>10} USD{'' if not row['unpriced_tokens'] else '  some of it without a price'}"
            for row in found
        ]
        lines += [
            f"today  {row['name']:<16} budget {row['scope']:<12} {row['spent_tokens']} of {row['tokens'] if row['tokens'] is not None else '-'} tokens,"
            f" {_usd(row['spent_micro_usd'])} of {_usd(row['micro_usd'])} USD; running work holds {row['reserved_tokens']} tokens"
            f"{', ' + ' and '.join(row['told']) if row['told'] else ''}"
            for row in budgets
        ]
        return "\n".join(lines) or "nothing was spent"

    show(plain, {"days": found, "budgets": budgets}, text)
    sys.exit(1 if any(_is_over(row) for row in budgets) else 0)


def _is_over(row: dict[str, Any]) -> bool:
    pairs = ((row["tokens"], row["spent_tokens"]), (row["micro_usd"], row["spent_micro_usd"]))
    return any(bound is not None and used > bound for bound, used in pairs)


@click.group()
def budgets() -> None:
    """Limits of an owner: daily budgets, outsiders, authors, suggest-only."""


@budgets.command("show")
@owner_option
@as_json
def budgets_show(owner: UUID, plain: bool) -> None:
    """Shows an owner's limits with their revision, and how today stands."""
    _, store = open_store(plain)
    kept = acts.limits_of(store, owner, role=OPERATOR)
    if isinstance(kept, Refusal):
        _refused(kept, plain)
    value = {"revision": kept.revision, "limits": kept.config.model_dump(mode="json"), "today": store.spend.standing(owner)}
    show(plain, value, lambda: json.dumps(value, indent=2, default=str))


@budgets.command("set")
@owner_option
@click.option("--revision", type=int, required=True, help="The one that `budgets show` told; 0 while none are set.")
@click.argument("changes")
@as_json
def budgets_set(owner: UUID, revision: int, changes: str, plain: bool) -> None:
    """Lays CHANGES (JSON, such as '{"daily": {"tokens": 5000000}}') over an owner's limits; what isn't named stays."""
    _, store = open_store(plain)
    try:
        wanted = json.loads(changes)
    except ValueError:
        wanted = None
    if not isinstance(wanted, dict):
        end(plain, "CHANGES is one JSON object", 2)
    kept = acts.set_limits(store, owner, wanted, expected_revision=revision, role=OPERATOR, actor=OPERATOR)
    if isinstance(kept, Refusal):
        _refused(kept, plain)
    show(plain, {"revision": kept.revision}, lambda: f"revision {kept.revision}")


@click.group("suggest-only")
def suggest() -> None:
    """Suggest-only mode: work is done, and what it would write outside is held for a person."""


def _set(owner: UUID | None, service: str | None, on: bool, reason: str, plain: bool) -> None:
    _, store = open_store(plain)
    if owner is not None and service is not None:
        end(plain, "give --owner or --service, not both", 2)
    scope = f"owner:{owner}" if owner else f"service:{service}" if service else "all"
    done = acts.suggest_only(store, scope, on, reason, role=OPERATOR, actor=OPERATOR)
    if isinstance(done, Refusal):
        _refused(done, plain)
    if not done:
        end(plain, f"suggest-only mode isn't on for {scope}")
    show(plain, {"scope": scope, "on": on}, lambda: f"suggest-only {'on' if on else 'off'}: {scope}")


@suggest.command("on")
@scoped
@click.option("--reason", default="set by the operator", show_default=True)
@as_json
def suggest_on(owner: UUID | None, service: str | None, reason: str, plain: bool) -> None:
    """Holds what work in the scope (everything, an owner, a service) would write outside from now on."""
    _set(owner, service, True, reason, plain)


@suggest.command("off")
@scoped
@as_json
def suggest_off(owner: UUID | None, service: str | None, plain: bool) -> None:
    """Ends the mode; what is held stays held until it is approved, dropped or expires."""
    _set(owner, service, False, "", plain)


@effects.command("show")
@click.argument("effect", type=click.UUID)
@as_json
def effects_show(effect: UUID, plain: bool) -> None:
    """Shows what an effect writes, and the hash that `effects approve` names."""
    _, store = open_store(plain)
    found = store.outbox.get(effect)
    if found is None:
        end(plain, f"no effect {effect}")
    show(plain, found, lambda: json.dumps(found, indent=2, default=str))


@effects.command("approve")
@click.argument("effect", type=click.UUID)
@click.option("--sha256", required=True, help="Of what `effects show` told: nothing else is released.")
@as_json
def effects_approve(effect: UUID, sha256: str, plain: bool) -> None:
    """Releases a held effect; one that newer work has overtaken is dropped instead."""
    _, store = open_store(plain)
    state = acts.approve_effect(store, effect, sha256, role=OPERATOR, actor=OPERATOR)
    if isinstance(state, Refusal):
        _refused(state, plain)
    show(plain, {"state": state}, lambda: state)


@click.command("approve")
@click.argument("review", type=click.UUID)
@click.option("--head", required=True, help="The commit that was looked at (its first seven digits at least).")
@as_json
def reviews_approve(review: UUID, head: str, plain: bool) -> None:
    """Lets the pull request of an outsider be reviewed at exactly this head."""
    _, store = open_store(plain)
    made = acts.approve_review(store, review, head, role=OPERATOR, actor=OPERATOR)
    if isinstance(made, Refusal):
        _refused(made, plain)
    show(plain, {"approval": made}, lambda: f"approved at {head}")


COMMANDS = (spend, budgets, suggest)
