"""The control API of owners: who they are, their people and keys, what they are connected to, their services' settings, their audit."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import Field

from kilo_pipelines.acts import people as acts
from kilo_pipelines.acts import services
from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.people import KEY_DAYS, KEY_DAYS_MOST, OVERLAP_HOURS, OVERLAP_HOURS_MOST, Role
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.refusal import Refusal
from kilo_pipelines.core.text import storable
from kilo_pipelines.ingress.control import (
    ABOUT_ONE,
    CHANGES,
    REFUSALS,
    Asked,
    Done,
    NotFoundError,
    Nothing,
    Refused,
    RefusedError,
    Strict,
    StrictBody,
    Who,
    act,
    actor_of,
    by_owner_of,
    by_query,
    given,
    one_or_all,
    owners_of,
)
from kilo_pipelines.store import ApiKey, NewKey, Principal, Store, prefix_of

# Events of one answer: some 300 KB.
MOST_EVENTS = 1_000


class Owner(Strict):
    """A person or an organization that work is done for."""

    id: UUID
    kind: Literal["user", "organization"]
    name: str
    plan: str
    enabled: bool


class OwnerList(Strict):
    """Owners, the oldest first."""

    owners: list[Owner]


class NewOwner(StrictBody):
    """`login`: the first person, who becomes its owner; an owner of kind `user` needs one."""

    kind: Literal["user", "organization"]
    name: str = Field(min_length=1, max_length=100)
    plan: Literal["default", "funded"] = "default"
    login: str | None = Field(default=None, max_length=100)


class Membership(Strict):
    """A person's role in an owner."""

    owner_id: UUID
    owner: str
    role: str


class PersonOfOwners(Strict):
    """A person with every owner that they belong to."""

    id: UUID
    login: str
    memberships: list[Membership]


class PersonList(Strict):
    """People, by login."""

    people: list[PersonOfOwners]


class Member(Strict):
    """A person of an owner."""

    person_id: UUID
    login: str
    role: str
    added_at: datetime


class MemberList(Strict):
    """Members, by login."""

    members: list[Member]


class NewMember(StrictBody):
    """Who joins, as what."""

    login: str = Field(max_length=100)
    role: Role


class RoleChange(StrictBody):
    """The role from now on; the person's keys sink with it."""

    role: Role


class MemberAdded(Strict):
    """Who joined."""

    outcome: Literal["added"] = "added"
    person_id: UUID


class Key(Strict):
    """A key without its value. `role`: as it was made; `present_role`: what it may now, nothing when it is not live."""

    id: UUID
    prefix: str
    name: str
    role: str
    present_role: str | None
    person_id: UUID | None
    login: str | None
    created_by: str
    created_at: datetime
    expires_at: datetime
    last_used_at: datetime | None = Field(description="To the hour.")
    rotated_at: datetime | None
    revoked_at: datetime | None
    live: bool


class KeyList(Strict):
    """Keys, the newest first."""

    keys: list[Key]


class KeyWish(StrictBody):
    """`person_id`: whose it is; it is then never more than that person is. None: the owner's own, for a program."""

    role: Role
    name: str = Field(min_length=1, max_length=100)
    # JSON has no ids: the text is taken for one.
    person_id: Annotated[UUID, Field(strict=False)] | None = None
    days: int = Field(default=KEY_DAYS, ge=1, le=KEY_DAYS_MOST)


class Rotation(StrictBody):
    """How long the new key lives, and how long the old one still does beside it."""

    days: int = Field(default=KEY_DAYS, ge=1, le=KEY_DAYS_MOST)
    overlap_hours: int = Field(default=OVERLAP_HOURS, ge=0, le=OVERLAP_HOURS_MOST)


class KeyShown(Strict):
    """The new key; `key` is its value, shown here and nowhere else."""

    id: UUID
    key: str
    expires_at: datetime


class Myself(Strict):
    """What this key is at this moment."""

    key_id: UUID
    prefix: str
    owner_id: UUID | None
    role: str
    person_id: UUID | None
    login: str | None


class IntegrationShown(Strict):
    """A connection of an owner; `repositories` by name."""

    owner_id: UUID
    id: UUID
    provider: str
    installation_id: int
    account: str
    suspended: bool
    disconnected: bool
    repositories: list[str]


class IntegrationList(Strict):
    """Integrations, the oldest first."""

    integrations: list[IntegrationShown]


class RepositoryShown(Strict):
    """A repository; `within_reach`: it is in a working installation."""

    repository_id: int
    full_name: str
    default_branch: str
    private: bool
    provider: str
    integration_id: UUID
    installation_id: int
    within_reach: bool


class Repositories(Strict):
    """Repositories, by name."""

    repositories: list[RepositoryShown]


class ServiceShown(Strict):
    """A service of an owner: on, off, or waiting for a person."""

    owner_id: UUID
    service: str
    enabled: bool
    revision: int
    action_required: dict[str, Any] | None


class ServiceList(Strict):
    """Services of an owner, by name."""

    services: list[ServiceShown]


class ServiceSettings(Strict):
    """Settings of a service with defaults for what isn't stored; `revision` 0: none saved yet."""

    settings: dict[str, Any]
    enabled: bool
    revision: int


class SettingsWish(StrictBody):
    """Settings to change, over the revision that was read; what isn't named stays, and on or off does."""

    expected_revision: int = Field(ge=0, le=2**31 - 1)
    settings: dict[str, Any]


class EventQuery(Asked):
    """How many, the newest first."""

    limit: int = Field(default=50, ge=1, le=MOST_EVENTS)


class AuditEvent(Strict):
    """Something that was done; `seal`: the link of the audit chain that holds it."""

    owner_id: UUID
    id: int
    at: datetime
    actor: str
    action: str
    subject: str
    data: dict[str, Any]
    seal: int | None


class AuditList(Strict):
    """Audit events, the newest first."""

    events: list[AuditEvent]


def owner_routes(router: APIRouter, store: Store, clock: Clock) -> None:
    """Adds the routes."""

    @router.get("/api/v1/owners", responses=REFUSALS, **act("read"))
    def list_owners(who: Who) -> OwnerList:
        """Owners: the key's own, or all for the operator."""
        found = [one for one in store.owners.all() if who.owner_id in (None, one.id)]
        return OwnerList(owners=[Owner(**vars(one)) for one in found])

    @router.post("/api/v1/owners", status_code=201, responses=CHANGES, **act("platform"))
    def create_owner(who: Who, wish: NewOwner) -> Owner:
        """Makes an owner with Code Review at its defaults, and with its first person."""
        name = _text(wish.name, "name")
        made = acts.create_owner(store, wish.kind, name, wish.plan, wish.login, role=who.role, actor=actor_of(who))
        return Owner(**vars(given(made)))

    @router.get("/api/v1/owners/{owner_id}", responses=ABOUT_ONE, **act("read"))
    def show_owner(who: Who, owner_id: UUID) -> Owner:
        """One owner."""
        found = next((one for one in store.owners.all() if one.id == owner_id and who.owner_id in (None, one.id)), None)
        if found is None:
            raise NotFoundError
        return Owner(**vars(found))

    @router.get("/api/v1/me", responses=REFUSALS, **act("read"))
    def show_myself(who: Who) -> Myself:
        """Whose key this is, and what it may."""
        return Myself(prefix=prefix_of(who.key_id), **vars(who))

    @router.get("/api/v1/people", responses=REFUSALS, **act("platform"))
    def list_people(who: Who) -> PersonList:
        """Everybody whom the platform knows, with owners and roles."""
        return PersonList.model_validate({"people": store.people.listed()})

    @router.get("/api/v1/members", responses=ABOUT_ONE, **act("read"))
    def list_members(who: Who, asked: Annotated[Asked, Query()]) -> MemberList:
        """The owner's people and their roles."""
        found = store.people.members(by_query(store, who, asked).owner_id)
        return MemberList(
            members=[Member(person_id=one.person_id, login=one.login, role=one.role, added_at=one.added_at) for one in found]
        )

    @router.post("/api/v1/members", status_code=201, responses=CHANGES, **act("members"))
    def add_member(who: Who, asked: Annotated[Asked, Query()], wish: NewMember) -> MemberAdded:
        """Makes a person a member of the owner."""
        person = given(acts.add_member(store, wish.login, wish.role, by=by_query(store, who, asked)))
        return MemberAdded(person_id=person.id)

    @router.put("/api/v1/members/{person}", responses=CHANGES, **act("members"))
    def change_member(who: Who, person: UUID, asked: Annotated[Asked, Query()], wish: RoleChange) -> Done:
        """Gives a member another role."""
        given(acts.change_member(store, person, wish.role, by=by_query(store, who, asked)))
        return Done()

    @router.delete("/api/v1/members/{person}", responses=CHANGES, **act("members"))
    def remove_member(who: Who, person: UUID, asked: Annotated[Asked, Query()]) -> Done:
        """Ends a membership; the person's keys of this owner die with it."""
        given(acts.change_member(store, person, None, by=by_query(store, who, asked)))
        return Done()

    @router.get("/api/v1/keys", responses=ABOUT_ONE, **act("own_keys"))
    def list_keys(who: Who, asked: Annotated[Asked, Query()]) -> KeyList:
        """The owner's keys; for who may make none, those of the same person."""
        return KeyList(keys=[_key(one) for one in acts.keys_of(store, by=by_query(store, who, asked))])

    @router.post("/api/v1/keys", status_code=201, responses=CHANGES, **act("keys"))
    def create_key(who: Who, asked: Annotated[Asked, Query()], wish: KeyWish) -> KeyShown:
        """Makes a key; its value is in this answer and nowhere else."""
        by, name = by_query(store, who, asked), _text(wish.name, "name")
        return _shown(given(acts.create_key(store, wish.role, name, wish.person_id, wish.days, by=by, now=clock.now())))

    @router.post("/api/v1/keys/{key}/rotate", status_code=201, responses=CHANGES, **act("own_keys"))
    def rotate_key(who: Who, key: UUID, wish: Rotation) -> KeyShown:
        """Makes a new key in place of a live one, which stays valid for the overlap; any key rotates itself."""
        made = acts.rotate_key(store, key, wish.days, wish.overlap_hours, by=_by_key(store, who, key), now=clock.now())
        return _shown(given(made))

    @router.post("/api/v1/keys/{key}/revoke", responses=CHANGES, **act("own_keys"))
    def revoke_key(who: Who, key: UUID, wish: Nothing) -> Done:
        """Ends a key at once."""
        given(acts.revoke_key(store, key, by=_by_key(store, who, key)))
        return Done()

    @router.get("/api/v1/integrations", responses=ABOUT_ONE, **act("read"))
    def list_integrations(who: Who, asked: Annotated[Asked, Query()]) -> IntegrationList:
        """Connections to providers with their repositories."""
        return IntegrationList(
            integrations=[
                IntegrationShown(owner_id=owner, **one)
                for owner in owners_of(store, one_or_all(store, who, asked))
                for one in store.owners.integrations(owner)
            ]
        )

    @router.get("/api/v1/repositories", responses=ABOUT_ONE, **act("read"))
    def list_known_repositories(who: Who, asked: Annotated[Asked, Query()]) -> Repositories:
        """The owner's repositories, and which of them are within reach."""
        found = store.owners.repositories(by_query(store, who, asked).owner_id)
        return Repositories(repositories=[RepositoryShown(**one) for one in found])

    @router.get("/api/v1/services", responses=ABOUT_ONE, **act("read"))
    def list_services(who: Who, asked: Annotated[Asked, Query()]) -> ServiceList:
        """Services: on, off, or waiting for a person."""
        return ServiceList(
            services=[
                ServiceShown(owner_id=owner, **one)
                for owner in owners_of(store, one_or_all(store, who, asked))
                for one in store.owners.services(owner)
            ]
        )

    @router.get("/api/v1/services/{service}/settings", responses=ABOUT_ONE, **act("read"))
    def show_service_settings(who: Who, service: str, asked: Annotated[Asked, Query()]) -> ServiceSettings:
        """Settings of a service, the owner's `limits`, or the operator's `cap` on them."""
        return _settings(given(services.settings_of(store, _setting(service), by=by_query(store, who, asked))))

    @router.put("/api/v1/services/{service}/settings", responses=CHANGES | {422: {"model": Refused}}, **act("settings"))
    def save_service_settings(who: Who, service: str, asked: Annotated[Asked, Query()], wish: SettingsWish) -> ServiceSettings:
        """Changes settings of a service, the owner's `limits`, or (the operator) the `cap` on them; never switches anything on or off."""
        by = by_query(store, who, asked)
        saved = services.save(
            store, _setting(service), wish.settings, expected_revision=wish.expected_revision, by=by, now=clock.now()
        )
        return _settings(given(saved))

    @router.post("/api/v1/services/{service}/enable", responses=CHANGES, **act("settings"))
    def enable_service(who: Who, service: str, asked: Annotated[Asked, Query()], wish: Nothing) -> Done:
        """Switches a service on; what it waited for counts as mended."""
        given(services.switch(store, _service(service), enabled=True, by=by_query(store, who, asked)))
        return Done()

    @router.post("/api/v1/services/{service}/disable", responses=CHANGES, **act("settings"))
    def disable_service(who: Who, service: str, asked: Annotated[Asked, Query()], wish: Nothing) -> Done:
        """Switches a service off."""
        given(services.switch(store, _service(service), enabled=False, by=by_query(store, who, asked)))
        return Done()

    @router.get("/api/v1/audit", responses=ABOUT_ONE, **act("audit"))
    def list_audit(who: Who, asked: Annotated[EventQuery, Query()]) -> AuditList:
        """Who did what."""
        found = store.audit.listed(owner_id=one_or_all(store, who, asked), limit=asked.limit)
        return AuditList(events=[AuditEvent(**one) for one in found])


def _by_key(store: Store, who: Principal, key: UUID) -> acts.By:
    found = store.api_keys.get(key)
    return by_owner_of(who, found.owner_id if found else None)


def _service(name: str) -> str:
    if name not in services.SERVICES:
        raise NotFoundError
    return name


def _setting(name: str) -> str:
    if name not in services.CONFIGS:
        raise NotFoundError
    return name


def _text(value: str, name: str) -> str:
    if storable(value) != value or not value.strip():
        raise RefusedError(Refusal(Reason.PAYLOAD_SHAPE_MISMATCH, f"{name}: characters that can't be kept"))
    return value


def _settings(found: services.Settings) -> ServiceSettings:
    return ServiceSettings(settings=found.config, enabled=found.enabled, revision=found.revision)


def _key(one: ApiKey) -> Key:
    shown = {name: getattr(one, name) for name in Key.model_fields if name not in ("prefix", "present_role")}
    return Key(prefix=prefix_of(one.id), present_role=one.role_now, **shown)


def _shown(made: NewKey) -> KeyShown:
    assert made.expires_at is not None  # noqa: S101  # only the operator's has no end
    return KeyShown(id=made.id, key=made.value, expires_at=made.expires_at)
