"""The operator's hands: pause, kill and resume, work items, effects, services of owners."""

from __future__ import annotations

import sys
from typing import Any
from uuid import UUID

import click

from kilo_pipelines.acts import security
from kilo_pipelines.cli.common import OPERATOR, as_json, end, open_store, show
from kilo_pipelines.core.effects import EffectState
from kilo_pipelines.core.reasons import MEANING, Reason
from kilo_pipelines.core.work import WorkState
from kilo_pipelines.services.security.config import SERVICE as SECURITY
from kilo_pipelines.services.security.report import Refusal
from kilo_pipelines.store import SyncTarget

_scope_options = [
    click.option("--owner", type=click.UUID, help="Only this owner's work."),
    click.option("--service", help="Only this service, for every owner."),
]


def scoped(command: Any) -> Any:
    for option in _scope_options:
        command = option(command)
    return command


def scope_of(owner: UUID | None, service: str | None, plain: bool) -> str:
    if owner is not None and service is not None:
        end(plain, "give --owner or --service, not both", 2)
    return f"owner:{owner}" if owner else f"service:{service}" if service else "all"


@click.command()
@scoped
@click.option("--reason", default="paused by the operator", show_default=True)
@as_json
def pause(owner: UUID | None, service: str | None, reason: str, plain: bool) -> None:
    """Starts nothing new in the scope (everything, an owner, a service); what runs goes on to its end."""
    _, store = open_store(plain)
    scope = scope_of(owner, service, plain)
    store.queue.switch(scope, "pause", reason, actor=OPERATOR)
    show(plain, {"scope": scope, "kind": "pause"}, lambda: f"paused: {scope}; `kilo-pipelines resume` goes on")


@click.command()
@scoped
@click.option("--reason", default="stopped by the operator", show_default=True)
@as_json
def kill(owner: UUID | None, service: str | None, reason: str, plain: bool) -> None:
    """The kill switch: cancels what runs in the scope and starts nothing until it is released."""
    _, store = open_store(plain)
    scope = scope_of(owner, service, plain)
    stopped = store.queue.switch(scope, "kill", reason, actor=OPERATOR)
    show(
        plain,
        {"scope": scope, "kind": "kill", "cancelled": stopped},
        lambda: f"kill switch set: {scope}; {stopped} items cancelled; `kilo-pipelines resume` releases it",
    )


@click.command()
@scoped
@as_json
def resume(owner: UUID | None, service: str | None, plain: bool) -> None:
    """Releases a pause or kill switch of the same scope."""
    _, store = open_store(plain)
    scope = scope_of(owner, service, plain)
    if not store.queue.unswitch(scope):
        set_now = ", ".join(one["scope"] for one in store.queue.switches())
        end(plain, f"nothing is paused for {scope}" + (f"; switches that are set: {set_now}" if set_now else ""))
    show(plain, {"scope": scope, "released": True}, lambda: f"released: {scope}")


def _why(reason: str | None) -> list[str]:
    if not reason:
        return []
    meaning, remedy = MEANING[Reason(reason)]
    return [f"reason {reason}: {meaning} {remedy}"]


@click.group()
def items() -> None:
    """Work items of every service."""


@items.command("list")
@click.option("--owner", type=click.UUID)
@click.option("--service")
@click.option("--state", type=click.Choice(["live", *(str(state) for state in WorkState)]))
@click.option("--limit", default=50, show_default=True)
@as_json
def items_list(owner: UUID | None, service: str | None, state: str | None, limit: int, plain: bool) -> None:
    """Lists work items, newest first."""
    _, store = open_store(plain)
    found = store.queue.items(owner_id=owner, service=service, state=state, limit=limit)
    show(
        plain,
        found,
        lambda: (
            "\n".join(
                f"{one['id']}  {one['service']:<12} {one['state']:<10} {one['reason'] or '':<20} attempt {one['attempt']}  {one['subject_key']}"
                for one in found
            )
            or "no items"
        ),
    )


@items.command("show")
@click.argument("item", type=click.UUID)
@as_json
def items_show(item: UUID, plain: bool) -> None:
    """Shows one item: its attempts, its session, its effects and why it is where it is."""
    _, store = open_store(plain)
    row = store.queue.get(item)
    if row is None:
        end(plain, f"no item {item}")
    attempts = store.queue.attempts(item)
    effects = store.outbox.of_item(item)
    session = store.sessions.get(row.session_id) if row.session_id else None
    spent = store.spend.of_item(row.owner_id, item)

    def text() -> str:
        lines = [
            f"{row.service} {row.subject_key}",
            f"owner {row.owner_id}",
            f"state {row.state}, attempt {row.attempt}, fence {row.fence}",
            *_why(row.reason),
        ]
        lines += [
            f"attempt {one['number']}: {one['state']:<10} {one['reason'] or '':<20} session {one['session_id'] or '-'}"
            for one in attempts
        ]
        if session is not None:
            lines += _told(session.receipt)
            lines.append(
                f"session {session.id}: {session.state} {session.reason or ''}, launches {session.launches}, run {session.run_id or '-'}"
            )
        tokens, micro = sum(one["tokens_in"] + one["tokens_out"] for one in spent), sum(one["micro_usd"] for one in spent)
        lines += [f"spent {tokens} tokens, {micro / 1_000_000:.4f} USD"] if spent else []
        lines += [f"effect {one['kind']:<24} {one['state']:<8} {one['url'] or one['reason'] or ''}" for one in effects]
        return "\n".join(lines)

    value = {
        **{
            name: getattr(row, name)
            for name in ("id", "owner_id", "service", "subject_key", "state", "reason", "attempt", "fence")
        },
        "attempts": attempts,
        "session": {
            "id": session.id,
            "state": session.state,
            "reason": session.reason,
            "run": session.run_id,
            "receipt": session.receipt,
        }
        if session
        else None,
        "spend": spent,
        "effects": effects,
    }
    show(plain, value, text)


def _told(receipt: dict[str, Any] | None) -> list[str]:
    """A capability receipt for people."""
    if receipt is None:
        return []
    does = [
        word
        for word, holds in (("secrets", receipt["holds_secrets"]), ("pushes", receipt["writes"]), ("effects", receipt["effects"]))
        if holds
    ]
    money = "" if receipt["micro_usd"] is None else f", {receipt['micro_usd'] / 1_000_000:.2f} USD"
    return [
        f"receipt: text of {', '.join(receipt['text'])}; {', '.join(does) or 'no secrets, no effects'};"
        f" approved by {receipt['approved_by'] or 'nobody'}; network {receipt['network']}; sandbox {receipt['sandbox']}",
        f"         model {receipt['model']}, {receipt['turns']} turns, {receipt['tokens']} tokens{money}, {receipt['seconds']:.0f} s,"
        f" evidence {receipt['evidence']}",
    ]


@items.command("cancel")
@click.argument("item", type=click.UUID)
@as_json
def items_cancel(item: UUID, plain: bool) -> None:
    """Cancels a live item; its session stops and its slots are free."""
    _, store = open_store(plain)
    if not store.queue.cancel(item, reason=Reason.USER_CANCELLED, actor=OPERATOR):
        end(plain, "this item is over already, or unknown")
    show(plain, {"cancelled": True}, lambda: "cancelled")


@items.command("retry")
@click.argument("item", type=click.UUID)
@click.option("--force", is_flag=True, help="A completed item too.")
@as_json
def items_retry(item: UUID, force: bool, plain: bool) -> None:
    """Opens a new attempt of an item that failed or was cancelled."""
    _, store = open_store(plain)
    if not store.queue.reopen(item, actor=OPERATOR, force=force):
        end(plain, "this item is active, completed (then --force), unknown, or its subject has another live item")
    show(plain, {"reopened": True}, lambda: "waiting again")


@click.group()
def effects() -> None:
    """Intended writes to the outside, and dead letters among them."""


@effects.command("list")
@click.option("--state", type=click.Choice([str(state) for state in EffectState]))
@click.option("--item", type=click.UUID)
@click.option("--limit", default=50, show_default=True)
@as_json
def effects_list(state: str | None, item: UUID | None, limit: int, plain: bool) -> None:
    """Lists effects, newest first; exit status 1 when dead or unknown ones wait for a person."""
    _, store = open_store(plain)
    found = store.outbox.listed(state=state, item_id=item, limit=limit)
    show(
        plain,
        found,
        lambda: (
            "\n".join(
                f"{one['id']}  {one['kind']:<24} {one['state']:<8} tries {one['tries']}  {one['reason'] or one['url'] or ''}"
                for one in found
            )
            or "no effects"
        ),
    )
    sys.exit(1 if any(one["state"] in (EffectState.DEAD, EffectState.UNKNOWN) for one in found) else 0)


@effects.command("retry")
@click.argument("effect", type=click.UUID)
@as_json
def effects_retry(effect: UUID, plain: bool) -> None:
    """Tries a dead or unknown effect again; it is dropped when a newer one of its kind stands already."""
    _, store = open_store(plain)
    state = store.outbox.revive(effect, actor=OPERATOR)
    if state is None:
        end(plain, "this effect is neither dead nor unknown")
    show(plain, {"state": state}, lambda: state)


@effects.command("drop")
@click.argument("effect", type=click.UUID)
@as_json
def effects_drop(effect: UUID, plain: bool) -> None:
    """Gives an effect up that isn't being applied."""
    _, store = open_store(plain)
    if store.outbox.abandon(effect, actor=OPERATOR) is None:
        end(plain, "this effect is over, being applied, or unknown")
    show(plain, {"state": "dropped"}, lambda: "dropped")


@click.group()
def services() -> None:
    """Services of an owner: on, off, or waiting for a person."""


@services.command("list")
@as_json
def services_list(plain: bool) -> None:
    """Lists every owner's services; exit status 1 when one waits for a person."""
    _, store = open_store(plain)
    found = [
        {"owner": str(owner.id), "name": owner.name, **one}
        for owner in store.owners.all()
        for one in store.owners.services(owner.id)
    ]

    def line(one: dict[str, Any]) -> str:
        needed = one["action_required"]
        state = (
            f"ACTION REQUIRED ({needed['reason']} since {needed['detected_at']})" if needed else "on" if one["enabled"] else "off"
        )
        return "\n".join(
            [f"{one['owner']}  {one['name']:<16} {one['service']:<12} {state}", *(_why(needed["reason"]) if needed else [])]
        )

    show(plain, found, lambda: "\n".join(line(one) for one in found) or "no services")
    sys.exit(1 if any(one["action_required"] for one in found) else 0)


def _switch(owner: UUID, service: str, enabled: bool, plain: bool) -> None:
    _, store = open_store(plain)
    if enabled and service == SECURITY:
        done = security.enable(store, owner, _unreadable, role=OPERATOR, actor=OPERATOR)
    else:
        done = store.owners.enable_service(owner, service, enabled, actor=OPERATOR)
    if isinstance(done, Refusal):
        meaning, remedy = MEANING[done.reason]
        end(plain, f"{meaning} {remedy} ({done.reason}: {done.detail})")
    if not done:
        end(plain, f"owner {owner} has no service {service}")
    show(plain, {"enabled": enabled}, lambda: "on" if enabled else "off")


def _unreadable(target: SyncTarget) -> Reason | None:
    # The orchestrator's library takes seconds to load, and no other command here needs it.
    from kilo_pipelines.resources.github import GitHubResource, ProviderError

    try:
        GitHubResource().may_read_alerts(target.installation_id, target.repository_id)
    except ProviderError as failure:
        return failure.reason
    return None


@services.command("enable")
@click.argument("service")
@click.option("--owner", type=click.UUID, required=True)
@as_json
def services_enable(service: str, owner: UUID, plain: bool) -> None:
    """Switches a service on; what it waited for counts as mended."""
    _switch(owner, service, True, plain)


@services.command("disable")
@click.argument("service")
@click.option("--owner", type=click.UUID, required=True)
@as_json
def services_disable(service: str, owner: UUID, plain: bool) -> None:
    """Switches a service off for an owner: its events are skipped with `reviewer_not_enabled`."""
    _switch(owner, service, False, plain)


COMMANDS = (pause, kill, resume, items, effects, services)
