"""The control API of work: reviews, items of every service, effects, the switches, and how the platform does."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import Field

from kilo_pipelines import __version__
from kilo_pipelines.acts import work as acts
from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.effects import EffectState
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.refusal import Refusal
from kilo_pipelines.core.text import storable
from kilo_pipelines.core.work import WorkState
from kilo_pipelines.ingress.control import (
    ABOUT_ONE,
    CHANGES,
    REFUSALS,
    Asked,
    Done,
    NotFoundError,
    Nothing,
    RefusedError,
    Strict,
    StrictBody,
    Who,
    act,
    actor_of,
    by_owner_of,
    given,
    one_or_all,
    owners_of,
)
from kilo_pipelines.store import ItemRow, Principal, ReviewRow, Store
from kilo_pipelines.store.migrate import head

# A dispatch finds its pull request among this many newest reviews of an owner.
DISPATCH_LOOK_BACK = 1_000
MOST = 1_000


class ListQuery(Asked):
    """How many, the newest first."""

    limit: int = Field(default=50, ge=1, le=MOST)


class Review(Strict):
    """A review of a pull request with its item's state."""

    owner_id: UUID
    item_id: UUID
    state: str
    reason: str | None
    attempt: int
    session_id: UUID | None
    session_state: str | None
    run_id: str | None
    session_run_id: str | None
    repository: str
    repository_id: int
    pull_number: int
    title: str
    author: str
    url: str
    base_ref: str
    head_ref: str
    head_sha: str
    verdict: dict[str, Any] | None
    evidence: dict[str, Any] | None
    created_at: datetime
    ended_at: datetime | None


class ReviewList(Strict):
    """Reviews, the newest first."""

    reviews: list[Review]


class EffectOfItem(Strict):
    """One intended write to the outside."""

    kind: str
    intent_key: str
    state: str
    reason: str | None
    tries: int
    external_id: str | None
    url: str | None


class SessionEvent(Strict):
    """One step of a session."""

    id: int
    kind: str
    data: dict[str, Any]
    at: datetime


class ReviewShown(Review):
    """The same with effects and steps of the session."""

    effects: list[EffectOfItem]
    events: list[SessionEvent]


class Dispatch(StrictBody):
    """A pull request that the platform knows; `force` repeats a completed review."""

    repository: str = Field(max_length=300)
    pull_number: int = Field(le=2**31 - 1)
    force: bool = False


class Dispatched(Strict):
    """The review that is done again."""

    outcome: Literal["dispatched"] = "dispatched"
    review: UUID


class Cancelled(Strict):
    """It is over, its session with it."""

    outcome: Literal["cancelled"] = "cancelled"


class ItemQuery(ListQuery):
    """Which items; `live`: those that haven't ended."""

    service: str | None = Field(default=None, max_length=100)
    state: Literal["live"] | WorkState | None = None


class Item(Strict):
    """One unit of work."""

    owner_id: UUID
    id: UUID
    service: str
    subject_key: str
    state: str
    reason: str | None
    attempt: int
    fence: int
    tries: int
    priority: int
    not_before: datetime
    lease_until: datetime | None
    deadline: datetime | None
    session_id: UUID | None
    run_id: str | None
    announced: bool
    created_at: datetime
    ended_at: datetime | None


class ItemList(Strict):
    """Work items, the newest first."""

    items: list[Item]


class Attempt(Strict):
    """One try at an item."""

    number: int
    state: str
    reason: str | None
    session_id: UUID | None
    started_at: datetime
    ended_at: datetime | None


class SessionOfItem(Strict):
    """The session of an item's present attempt."""

    id: UUID
    state: str
    reason: str | None
    launches: int
    run: str | None
    receipt: dict[str, Any] | None = Field(description="What it may see and do; docs/limits.md.")


class SpendOfItem(Strict):
    """What one meter of an item counted; `micro_usd` is millionths of a dollar."""

    meter: str
    session_id: UUID | None
    model: str
    tokens_in: int
    tokens_out: int
    tokens_cached: int
    micro_usd: int
    first_at: datetime
    last_at: datetime


class ItemShown(Strict):
    """One item: its attempts, its session, its effects."""

    id: UUID
    owner_id: UUID
    service: str
    subject_key: str
    repository_id: int
    state: str
    reason: str | None
    attempt: int
    fence: int
    attempts: list[Attempt]
    session: SessionOfItem | None
    spend: list[SpendOfItem]
    effects: list[EffectOfItem]


class RetryWish(StrictBody):
    """`force`: of a completed item, too."""

    force: bool = False


class EffectQuery(ListQuery):
    """Which effects."""

    state: EffectState | None = None
    item: UUID | None = None


class EffectShown(Strict):
    """One intended write to the outside."""

    owner_id: UUID
    id: UUID
    item_id: UUID
    kind: str
    subject_key: str
    intent_key: str
    state: str
    reason: str | None
    tries: int
    not_before: datetime
    url: str | None
    created_at: datetime
    ended_at: datetime | None


class EffectList(Strict):
    """Effects, the newest first."""

    effects: list[EffectShown]


class EffectChanged(Strict):
    """The effect's state now."""

    state: str


class SwitchWish(StrictBody):
    """`scope`: `all`, `service:NAME` or `owner:ID`, for the operator, who has to name one; an owner's key acts on its own owner."""

    scope: str | None = Field(default=None, pattern=r"^(all|service:[a-z_]{1,100}|owner:[0-9a-f-]{36})$")


class SwitchOn(SwitchWish):
    """And why, for those who wonder."""

    reason: str = Field(min_length=1, max_length=500)


class SwitchShown(Strict):
    """A scope in which nothing is started (`kill`: what ran was cancelled, too), or nothing is written unasked (`suggest`)."""

    scope: str
    kind: Literal["pause", "kill", "suggest"]
    reason: str
    set_by: str
    set_at: datetime


class SwitchList(Strict):
    """Switches that are set; an owner sees its own."""

    switches: list[SwitchShown]


class Switched(Strict):
    """What is switched now, and how many items were cancelled."""

    scope: str
    kind: Literal["pause", "kill"]
    cancelled: int


class Released(Strict):
    """Nothing holds this scope by itself any more."""

    scope: str
    released: Literal[True] = True


class Schema(Strict):
    """The revision of the database's schema, and the one that this version wants."""

    present: str | None
    wanted: str | None


class Health(Strict):
    """How the platform does; `work`: live rows by what and state."""

    ok: bool
    version: str
    migration: Schema
    switches: list[SwitchShown]
    work: dict[str, int]


def work_routes(router: APIRouter, store: Store, clock: Clock) -> None:
    """Adds the routes."""

    @router.get("/api/v1/reviews", responses=ABOUT_ONE, **act("read"))
    def list_reviews(who: Who, asked: Annotated[ListQuery, Query()]) -> ReviewList:
        """Reviews: the owner's newest; for the operator those of every owner."""
        chosen = one_or_all(store, who, asked)
        found = [one for owner in owners_of(store, chosen) for one in store.reviews.of_owner(owner, limit=asked.limit)]
        newest = sorted(found, key=lambda one: one.created_at, reverse=True)[: asked.limit]
        return ReviewList(reviews=[Review(**vars(one)) for one in newest])

    @router.post("/api/v1/reviews/dispatch", status_code=202, responses=CHANGES, **act("work"))
    def dispatch_review(who: Who, wish: Dispatch) -> Dispatched:
        """Has a pull request that the platform knows reviewed again."""
        found = [
            one
            for owner in owners_of(store, who.owner_id)
            for one in store.reviews.of_owner(owner, limit=DISPATCH_LOOK_BACK)
            if (one.repository, one.pull_number) == (wish.repository, wish.pull_number)
        ]
        if not found:
            raise NotFoundError
        if len({one.owner_id for one in found}) > 1:  # the operator's key: two owners hold a repository of this name
            raise RefusedError(Refusal(Reason.INTEGRATION_AMBIGUOUS, wish.repository))
        newest = max(found, key=lambda one: one.created_at)
        if not store.queue.reopen(newest.item_id, actor=actor_of(who), force=wish.force):
            raise RefusedError(Refusal(Reason.MOVED_ON, str(newest.item_id)))
        return Dispatched(review=newest.item_id)

    @router.get("/api/v1/reviews/{item}", responses=ABOUT_ONE, **act("read"))
    def show_review(who: Who, item: UUID) -> ReviewShown:
        """One review with its evidence: what was sent to the model, what was not."""
        found = review_of(store, who, item)
        events = store.sessions.events(found.session_id) if found.session_id else []
        return ReviewShown.model_validate({**vars(found), "effects": store.outbox.of_item(item), "events": events})

    @router.post("/api/v1/reviews/{item}/cancel", responses=CHANGES, **act("work"))
    def cancel_review(who: Who, item: UUID) -> Cancelled:
        """Ends a review that waits or runs."""
        found = review_of(store, who, item)
        if not store.queue.cancel(found.item_id, reason=Reason.USER_CANCELLED, actor=actor_of(who)):
            raise RefusedError(Refusal(Reason.MOVED_ON, str(item)))
        return Cancelled()

    @router.get("/api/v1/items", responses=ABOUT_ONE, **act("read"))
    def list_items(who: Who, asked: Annotated[ItemQuery, Query()]) -> ItemList:
        """Work items of every service."""
        found = store.queue.items(
            owner_id=one_or_all(store, who, asked), service=asked.service, state=asked.state, limit=asked.limit
        )
        return ItemList(items=[Item(**one) for one in found])

    @router.get("/api/v1/items/{item}", responses=ABOUT_ONE, **act("read"))
    def show_item(who: Who, item: UUID) -> ItemShown:
        """One item: why it is where it is."""
        found = _item(store, who, item)
        session = store.sessions.get(found.session_id) if found.session_id else None
        own = (name for name in ItemShown.model_fields if name not in ("attempts", "session", "spend", "effects"))
        return ItemShown(
            **{name: getattr(found, name) for name in own},
            attempts=[Attempt(**one) for one in store.queue.attempts(item)],
            session=None
            if session is None
            else SessionOfItem(
                id=session.id,
                state=session.state,
                reason=session.reason,
                launches=session.launches,
                run=session.run_id,
                receipt=session.receipt,
            ),
            spend=[SpendOfItem(**one) for one in store.spend.of_item(found.owner_id, item)],
            effects=[EffectOfItem(**one) for one in store.outbox.of_item(item)],
        )

    @router.post("/api/v1/items/{item}/cancel", responses=CHANGES, **act("work"))
    def cancel_item(who: Who, item: UUID) -> Cancelled:
        """Ends an item that waits or runs."""
        found = _item(store, who, item)
        given(acts.cancel_item(store, found, by=by_owner_of(who, found.owner_id)))
        return Cancelled()

    @router.post("/api/v1/items/{item}/retry", responses=CHANGES, **act("work"))
    def retry_item(who: Who, item: UUID, wish: RetryWish) -> Done:
        """Opens a new attempt of an item that failed or was cancelled."""
        found = _item(store, who, item)
        given(acts.retry_item(store, found, force=wish.force, by=by_owner_of(who, found.owner_id)))
        return Done()

    @router.get("/api/v1/effects", responses=ABOUT_ONE, **act("read"))
    def list_effects(who: Who, asked: Annotated[EffectQuery, Query()]) -> EffectList:
        """Intended writes to the outside, and dead letters among them."""
        found = store.outbox.listed(
            owner_id=one_or_all(store, who, asked), state=asked.state, item_id=asked.item, limit=asked.limit
        )
        return EffectList(effects=[EffectShown(**one) for one in found])

    @router.post("/api/v1/effects/{effect}/retry", responses=CHANGES, **act("effects"))
    def retry_effect(who: Who, effect: UUID, wish: Nothing) -> EffectChanged:
        """Tries a dead or unknown effect again; it is dropped when a newer one of its kind stands already."""
        by = by_owner_of(who, store.outbox.owner_of(effect))
        return EffectChanged(state=given(acts.change_effect(store, effect, "retry", by=by)))

    @router.post("/api/v1/effects/{effect}/drop", responses=CHANGES, **act("effects"))
    def drop_effect(who: Who, effect: UUID, wish: Nothing) -> EffectChanged:
        """Gives an effect up that isn't being applied."""
        by = by_owner_of(who, store.outbox.owner_of(effect))
        return EffectChanged(state=given(acts.change_effect(store, effect, "drop", by=by)))

    @router.get("/api/v1/switches", responses=REFUSALS, **act("read"))
    def list_switches(who: Who) -> SwitchList:
        """What is paused, stopped or in suggest-only mode."""
        return SwitchList(
            switches=[one for one in _switches(store) if who.owner_id is None or one.scope == f"owner:{who.owner_id}"]
        )

    @router.post("/api/v1/switches/pause", responses=CHANGES, **act("switch"))
    def pause(who: Who, wish: SwitchOn) -> Switched:
        """Starts nothing new in the scope; what runs goes on to its end."""
        return _switch(store, who, wish, "pause")

    @router.post("/api/v1/switches/kill", responses=CHANGES, **act("switch"))
    def kill(who: Who, wish: SwitchOn) -> Switched:
        """The kill switch: cancels what runs in the scope and starts nothing until it is released."""
        return _switch(store, who, wish, "kill")

    @router.post("/api/v1/switches/resume", responses=CHANGES, **act("switch"))
    def resume(who: Who, wish: SwitchWish) -> Released:
        """Releases a switch of exactly this scope; the operator's own only by the operator."""
        scope = scope_of(store, who, wish)
        given(acts.release_switch(store, scope, owner_id=who.owner_id, role=who.role, actor=actor_of(who)))
        return Released(scope=scope)

    @router.get("/api/v1/health", responses=REFUSALS, **act("platform"))
    def show_health(who: Who) -> Health:
        """Database, schema, switches and what waits."""
        schema = Schema(present=store.database.schema()[0], wanted=head())
        return Health(
            ok=schema.present == schema.wanted,
            version=__version__,
            migration=schema,
            switches=_switches(store),
            work={f"{what}.{state}": count for (what, state), count in store.queue.gauges().items()},
        )


def _item(store: Store, who: Principal, item: UUID) -> ItemRow:
    found = store.queue.get(item)
    if found is None or who.owner_id not in (None, found.owner_id):
        raise NotFoundError
    return found


def review_of(store: Store, who: Principal, item: UUID) -> ReviewRow:
    """A review that whoever asks may know of."""
    found = store.reviews.get(item)
    if found is None or who.owner_id not in (None, found.owner_id):
        raise NotFoundError
    return found


def scope_of(store: Store, who: Principal, wish: SwitchWish) -> str:
    """The scope that is meant; a switch of everything is never meant by saying nothing."""
    if (who.owner_id is None) == (wish.scope is None):
        detail = "scope: name one" if who.owner_id is None else "scope: it is the key's owner"
        raise RefusedError(Refusal(Reason.PAYLOAD_SHAPE_MISMATCH, detail))
    if wish.scope is None:
        return f"owner:{who.owner_id}"
    if wish.scope.startswith("owner:") and wish.scope not in {f"owner:{one.id}" for one in store.owners.all()}:
        raise NotFoundError
    return wish.scope


def _switches(store: Store) -> list[SwitchShown]:
    return [SwitchShown(**{**one, "scope": one["scope"].removeprefix("suggest:")}) for one in store.queue.switches()]


def _switch(store: Store, who: Principal, wish: SwitchOn, kind: Literal["pause", "kill"]) -> Switched:
    scope = scope_of(store, who, wish)
    reason = storable(wish.reason)
    stopped = given(acts.set_switch(store, scope, kind, reason, owner_id=who.owner_id, role=who.role, actor=actor_of(who)))
    return Switched(scope=scope, kind=kind, cancelled=stopped)
