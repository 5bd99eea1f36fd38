"""People, members and API keys, over the control API."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import click

from kilo_pipelines.cli.client import api
from kilo_pipelines.cli.common import as_json, end, open_store, show
from kilo_pipelines.core.people import KEY_DAYS, KEY_DAYS_MOST, OVERLAP_HOURS, OVERLAP_HOURS_MOST, RANKS, login_of
from kilo_pipelines.ingress.keys import new_operator_key

owner_option = click.option("--owner", type=click.UUID, help="For the operator, where there are several owners.")
_role = click.Choice(list(RANKS))
_days = click.option("--days", type=click.IntRange(1, KEY_DAYS_MOST), default=KEY_DAYS, show_default=True)


@click.group()
def people() -> None:
    """Everybody whom the platform knows."""


@people.command("list")
@as_json
def people_list(plain: bool) -> None:
    """Lists people with their owners and roles."""
    found = api(plain).get("/people")["people"]

    def line(one: dict[str, Any]) -> str:
        return f"{one['id']}  {one['login']:<24} " + (
            ", ".join(f"{each['role']} of {each['owner']}" for each in one["memberships"]) or "of no owner"
        )

    show(plain, found, lambda: "\n".join(map(line, found)) or "nobody is known")


@click.group()
def members() -> None:
    """People of an owner and their roles."""


@members.command("list")
@owner_option
@as_json
def members_list(owner: UUID | None, plain: bool) -> None:
    """Lists members."""
    found = api(plain).get("/members", owner=owner)["members"]
    show(
        plain,
        found,
        lambda: "\n".join(f"{one['person_id']}  {one['role']:<7} {one['login']}" for one in found) or "no members",
    )


@members.command("add")
@click.argument("login")
@click.option("--role", type=_role, required=True)
@owner_option
@as_json
def members_add(login: str, role: str, owner: UUID | None, plain: bool) -> None:
    """Makes a person a member."""
    done = api(plain).post("/members", {"login": login, "role": role}, owner=owner)
    show(plain, done, lambda: str(done["person_id"]))


@members.command("change")
@click.argument("member")
@click.option("--role", type=_role, required=True)
@owner_option
@as_json
def members_change(member: str, role: str, owner: UUID | None, plain: bool) -> None:
    """Gives a member (login or id) another role; the member's keys sink with it at once."""
    show(plain, api(plain).put(f"/members/{_person(member, owner, plain)}", {"role": role}, owner=owner), lambda: role)


@members.command("remove")
@click.argument("member")
@owner_option
@as_json
def members_remove(member: str, owner: UUID | None, plain: bool) -> None:
    """Ends a membership (login or id); the member's keys die with it at once."""
    show(plain, api(plain).delete(f"/members/{_person(member, owner, plain)}", owner=owner), lambda: "removed")


def _person(member: str, owner: UUID | None, plain: bool) -> str:
    """The id of a member who was named by login or id."""
    found: list[dict[str, str]] = api(plain).get("/members", owner=owner)["members"]
    same = [one["person_id"] for one in found if one["person_id"] == member.lower() or one["login"] == login_of(member)]
    return same[0] if same else end(plain, f"{member} is no member of this owner")


@click.group()
def keys() -> None:
    """API keys of an owner."""


@keys.command("list")
@owner_option
@as_json
def keys_list(owner: UUID | None, plain: bool) -> None:
    """Lists keys, the newest first; no value is kept anywhere."""
    found = api(plain).get("/keys", owner=owner)["keys"]

    def line(one: dict[str, Any]) -> str:
        state = one["present_role"] or "DEAD"
        ends = "revoked" if one["revoked_at"] else f"until {one['expires_at'][:10]}"
        used = f"used {one['last_used_at'][:13]}" if one["last_used_at"] else "never used"
        return f"{one['id']}  {one['prefix']}…  {state:<7} {ends:<17} {used:<18} {one['login'] or '-'}  {one['name']}"

    show(plain, found, lambda: "\n".join(map(line, found)) or "no keys")


@keys.command("create")
@click.argument("name")
@click.option("--role", type=_role, required=True)
@click.option(
    "--member", help="Login or id of the member whose it is; it is never more than that member. Default: the owner's own."
)
@_days
@owner_option
@as_json
def keys_create(name: str, role: str, member: str | None, days: int, owner: UUID | None, plain: bool) -> None:
    """Makes a key and prints its value, this once."""
    person = _person(member, owner, plain) if member else None
    wish = {"name": name, "role": role, "days": days, **({"person_id": person} if person else {})}
    made = api(plain).post("/keys", wish, owner=owner)
    show(plain, made, lambda: str(made["key"]))


@keys.command("rotate")
@click.argument("key", type=click.UUID)
@_days
@click.option(
    "--overlap-hours",
    type=click.IntRange(0, OVERLAP_HOURS_MOST),
    default=OVERLAP_HOURS,
    show_default=True,
    help="How long the old one stays valid beside the new one.",
)
@as_json
def keys_rotate(key: UUID, days: int, overlap_hours: int, plain: bool) -> None:
    """Makes a new key in place of a live one and prints its value, this once."""
    made = api(plain).post(f"/keys/{key}/rotate", {"days": days, "overlap_hours": overlap_hours})
    show(plain, made, lambda: str(made["key"]))


@keys.command("revoke")
@click.argument("key", type=click.UUID)
@as_json
def keys_revoke(key: UUID, plain: bool) -> None:
    """Ends a key at once."""
    show(plain, api(plain).post(f"/keys/{key}/revoke", {}), lambda: "revoked")


@click.group("operator-key")
def operator_key() -> None:
    """The operator's API key, in a file of this home."""


@operator_key.command("rotate")
@as_json
def operator_key_rotate(plain: bool) -> None:
    """Makes it anew in its file; every other operator's key ends at once."""
    settings, store = open_store(plain)
    new_operator_key(store, settings.operator_key_file, alone=True)
    show(plain, {"file": str(settings.operator_key_file)}, lambda: f"kept in {settings.operator_key_file}")


COMMANDS = (people, members, keys, operator_key)
