"""The operator's hands over the control API: pause, kill and resume, work items, effects, services of owners.

An owner's key does the same for its own owner.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from uuid import UUID

import click

from kilo_pipelines.acts.security import check_readable
from kilo_pipelines.cli.client import api, refuse
from kilo_pipelines.cli.common import as_json, end, open_store, show
from kilo_pipelines.core.effects import EffectState
from kilo_pipelines.core.reasons import MEANING, Reason
from kilo_pipelines.core.work import WorkState
from kilo_pipelines.services.security.config import SERVICE as SECURITY
from kilo_pipelines.store import SyncTarget

_scope_options = [
    click.option("--owner", type=click.UUID, help="Only this owner's work."),
    click.option("--service", help="Only this service, for every owner."),
]


def scoped(command: Any) -> Any:
    for option in _scope_options:
        command = option(command)
    return command


def scope_of(owner: UUID | None, service: str | None, plain: bool) -> dict[str, str]:
    """The scope for the operator's key, everything where none is named; an owner's key has its own, and names none."""
    if owner is not None and service is not None:
        end(plain, "give --owner or --service, not both", 2)
    if owner is not None or service is not None:
        return {"scope": f"owner:{owner}" if owner else f"service:{service}"}
    return {"scope": "all"} if api(plain).get("/me")["owner_id"] is None else {}


@click.command()
@scoped
@click.option("--reason", default="paused by the operator", show_default=True)
@as_json
def pause(owner: UUID | None, service: str | None, reason: str, plain: bool) -> None:
    """Starts nothing new in the scope (everything, an owner, a service); what runs goes on to its end."""
    done = api(plain).post("/switches/pause", {"reason": reason, **scope_of(owner, service, plain)})
    show(plain, done, lambda: f"paused: {done['scope']}; `kilo-pipelines resume` goes on")


@click.command()
@scoped
@click.option("--reason", default="stopped by the operator", show_default=True)
@as_json
def kill(owner: UUID | None, service: str | None, reason: str, plain: bool) -> None:
    """The kill switch: cancels what runs in the scope and starts nothing until it is released."""
    done = api(plain).post("/switches/kill", {"reason": reason, **scope_of(owner, service, plain)})
    show(
        plain,
        done,
        lambda: f"kill switch set: {done['scope']}; {done['cancelled']} items cancelled; `kilo-pipelines resume` releases it",
    )


@click.command()
@scoped
@as_json
def resume(owner: UUID | None, service: str | None, plain: bool) -> None:
    """Releases a pause or kill switch of the same scope."""
    done = api(plain).post("/switches/resume", scope_of(owner, service, plain))
    show(plain, done, lambda: f"released: {done['scope']}")


def why(reason: str | None) -> list[str]:
    """What a reason means, as a line where there is one."""
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
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 1_000))
@as_json
def items_list(owner: UUID | None, service: str | None, state: str | None, limit: int, plain: bool) -> None:
    """Lists work items, newest first."""
    found = api(plain).get("/items", owner=owner, service=service, state=state, limit=limit)["items"]
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
    found = api(plain).get(f"/items/{item}")

    def text() -> str:
        lines = [
            f"{found['service']} {found['subject_key']}",
            f"owner {found['owner_id']}",
            f"state {found['state']}, attempt {found['attempt']}, fence {found['fence']}",
            *why(found["reason"]),
        ]
        lines += [
            f"attempt {one['number']}: {one['state']:<10} {one['reason'] or '':<20} session {one['session_id'] or '-'}"
            for one in found["attempts"]
        ]
        session = found["session"]
        if session is not None:
            lines += _told(session["receipt"])
            lines.append(
                f"session {session['id']}: {session['state']} {session['reason'] or ''}, launches {session['launches']}, run {session['run'] or '-'}"
            )
        spent = found["spend"]
        tokens, micro = sum(one["tokens_in"] + one["tokens_out"] for one in spent), sum(one["micro_usd"] for one in spent)
        lines += [f"spent {tokens} tokens, {micro / 1_000_000:.4f} USD"] if spent else []
        return "\n".join([*lines, *map(effect_line, found["effects"])])

    show(plain, found, text)


def effect_line(one: dict[str, Any]) -> str:
    """One effect of an item."""
    return f"effect {one['kind']:<24} {one['state']:<8} {one['url'] or one['reason'] or ''}"


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
    """Cancels an item whatever its state; its session stops and its slots are free."""
    api(plain).post(f"/items/{item}/cancel")
    show(plain, {"cancelled": True}, lambda: "cancelled")


@items.command("retry")
@click.argument("item", type=click.UUID)
@click.option("--force", is_flag=True, help="A completed item too.")
@as_json
def items_retry(item: UUID, force: bool, plain: bool) -> None:
    """Opens a new attempt of an item that failed or was cancelled; refused while its subject has another live item."""
    api(plain).post(f"/items/{item}/retry", {"force": force})
    show(plain, {"reopened": True}, lambda: "waiting again")


@click.group()
def effects() -> None:
    """Intended writes to the outside, and dead letters among them."""


@effects.command("list")
@click.option("--owner", type=click.UUID)
@click.option("--state", type=click.Choice([str(state) for state in EffectState]))
@click.option("--item", type=click.UUID)
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 1_000))
@as_json
def effects_list(owner: UUID | None, state: str | None, item: UUID | None, limit: int, plain: bool) -> None:
    """Lists effects, newest first; exit status 1 when dead or unknown ones wait for a person."""
    found = api(plain).get("/effects", owner=owner, state=state, item=item, limit=limit)["effects"]
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
    done = api(plain).post(f"/effects/{effect}/retry", {})
    show(plain, done, lambda: str(done["state"]))


@effects.command("drop")
@click.argument("effect", type=click.UUID)
@as_json
def effects_drop(effect: UUID, plain: bool) -> None:
    """Gives an effect up that isn't being applied."""
    done = api(plain).post(f"/effects/{effect}/drop", {})
    show(plain, done, lambda: str(done["state"]))


@click.group()
def services() -> None:
    """Services of an owner: on, off, or waiting for a person; their settings."""


@services.command("list")
@click.option("--owner", type=click.UUID)
@as_json
def services_list(owner: UUID | None, plain: bool) -> None:
    """Lists services; exit status 1 when one waits for a person."""
    asked = api(plain)
    names = {one["id"]: one["name"] for one in asked.get("/owners")["owners"]}
    found = [
        {"owner": one["owner_id"], "name": names.get(one["owner_id"], ""), **one}
        for one in asked.get("/services", owner=owner)["services"]
    ]

    def line(one: dict[str, Any]) -> str:
        needed = one["action_required"]
        state = (
            f"ACTION REQUIRED ({needed['reason']} since {needed['detected_at']})" if needed else "on" if one["enabled"] else "off"
        )
        return "\n".join(
            [f"{one['owner']}  {one['name']:<16} {one['service']:<12} {state}", *(why(needed["reason"]) if needed else [])]
        )

    show(plain, found, lambda: "\n".join(line(one) for one in found) or "no services")
    sys.exit(1 if any(one["action_required"] for one in found) else 0)


@services.command("settings")
@click.argument("service")
@click.option("--owner", type=click.UUID)
@click.option("--set", "changes", multiple=True, metavar="NAME=JSON", help="For example --set max_parts=4; again for more.")
@as_json
def services_settings(service: str, owner: UUID | None, changes: tuple[str, ...], plain: bool) -> None:
    """Shows the settings of a service, or changes some. Saving never switches it on or off."""
    shown = settings_of(service, owner, changes, plain)
    show(plain, shown, lambda: "\n".join(f"{name}: {json.dumps(value)}" for name, value in shown.items()))


def settings_of(service: str, owner: UUID | None, changes: tuple[str, ...], plain: bool) -> dict[str, Any]:
    """A service's settings after the changes, over the revision that is there now."""
    try:
        wanted = {name: json.loads(value) for name, _, value in (one.partition("=") for one in changes)}
    except ValueError:
        end(plain, f"not NAME=JSON: {', '.join(changes)}", 2)
    asked = api(plain)
    found = asked.get(f"/services/{service}/settings", owner=owner)
    if wanted:
        body = {"expected_revision": found["revision"], "settings": wanted}
        found = asked.put(f"/services/{service}/settings", body, owner=owner)
    shown: dict[str, Any] = found["settings"]
    return shown


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
@click.option("--owner", type=click.UUID, help="Default: the only owner.")
@as_json
def services_enable(service: str, owner: UUID | None, plain: bool) -> None:
    """Switches a service on; what it waited for counts as mended.

    On the platform's machine GitHub is asked first whether the Security Agent may read; elsewhere its first sync tells.
    """
    asked = api(plain)
    if service == SECURITY and asked.local:
        _, store = open_store(plain)
        known = [UUID(one["id"]) for one in asked.get("/owners")["owners"]]
        if owner is None and len(known) != 1:
            refuse(plain, Reason.OWNER_NOT_NAMED, f"{len(known)} owners", 2)
        refusal = check_readable(store, owner or known[0], _unreadable)
        if refusal is not None:
            refuse(plain, refusal.reason, refusal.detail)
    asked.post(f"/services/{service}/enable", {}, owner=owner)
    show(plain, {"enabled": True}, lambda: "on")


@services.command("disable")
@click.argument("service")
@click.option("--owner", type=click.UUID, help="Default: the only owner.")
@as_json
def services_disable(service: str, owner: UUID | None, plain: bool) -> None:
    """Switches a service off for an owner: its events are skipped with `reviewer_not_enabled`."""
    api(plain).post(f"/services/{service}/disable", {}, owner=owner)
    show(plain, {"enabled": False}, lambda: "off")


COMMANDS = (pause, kill, resume, items, effects, services)
