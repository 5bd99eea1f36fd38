"""The control API of limits: what was spent, what is held for a person and let go, suggest-only mode, an owner's models.

Budgets are the settings `limits` (ingress/owners.py).
"""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated, Any, Self
from uuid import UUID

from fastapi import APIRouter, Path, Query
from pydantic import Field, model_validator

from kilo_pipelines.acts import limits as acts
from kilo_pipelines.core.text import storable
from kilo_pipelines.ingress.control import (
    ABOUT_ONE,
    CHANGES,
    Asked,
    Done,
    NotFoundError,
    Strict,
    StrictBody,
    Who,
    act,
    actor_of,
    by_owner_of,
    by_query,
    given,
    one_or_all,
)
from kilo_pipelines.ingress.work import EffectChanged, SwitchWish, review_of, scope_of
from kilo_pipelines.services.permissions import may
from kilo_pipelines.store import Store

# What anybody of the owner may see of a notice; beside it stand addresses, which may hold a secret (as in the settings of notices).
_OF_A_NOTICE = ("finding", "notice", "message")
# A year and a day: a ledger is read by months and by years.
MOST_DAYS = 366


class SpendQuery(Asked):
    """How many UTC days, today among them."""

    days: int = Field(default=1, ge=1, le=MOST_DAYS)


class Spent(Strict):
    """What one service's use of one model cost on one UTC day; `micro_usd` is millionths of a dollar."""

    owner_id: UUID
    owner: str
    day: date
    service: str
    model: str
    tokens_in: int
    tokens_out: int
    tokens_cached: int
    micro_usd: int
    unpriced_tokens: int = Field(description="For which no price was known: they are in no `micro_usd`.")


class BudgetToday(Strict):
    """How a budget stands today; `tokens` and `micro_usd` null: unbounded. `told`: `warned`, `exhausted`."""

    owner_id: UUID
    owner: str
    scope: str = Field(description="`all`, or the service that it is for.")
    tokens: int | None
    micro_usd: int | None
    spent_tokens: int
    spent_micro_usd: int
    reserved_tokens: int
    reserved_micro_usd: int
    told: list[str]


class SpendShown(Strict):
    """The ledger, the newest day first, and the budgets of today."""

    days: list[Spent]
    budgets: list[BudgetToday]


class SuggestOnly(SwitchWish):
    """Suggest-only mode on, with the reason why, or off."""

    on: bool
    reason: str | None = Field(default=None, min_length=1, max_length=500)

    @model_validator(mode="after")
    def _says_why(self) -> Self:
        if self.on and self.reason is None:
            raise ValueError("reason: those who wonder want to know")
        return self


class SuggestOnlySet(Strict):
    """How it is now."""

    scope: str
    on: bool


class EffectContent(Strict):
    """What an effect writes, and the hash that an approval names.

    `payload` of a notice is without its address, and `sha256` null, for a key that may not see the settings of notices.
    """

    owner_id: UUID
    id: UUID
    item_id: UUID
    kind: str
    subject_key: str
    payload: dict[str, Any]
    state: str
    reason: str | None
    tries: int
    held_until: datetime | None
    url: str | None
    created_at: datetime
    ended_at: datetime | None
    sha256: str | None


class EffectApproval(StrictBody):
    """`sha256` of what was shown: nothing else is let go."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class ReviewApproval(StrictBody):
    """The commit that was looked at, by its first seven digits at least: no other is approved."""

    head: str = Field(pattern=r"^[0-9a-f]{7,64}$")


class ReviewApproved(Strict):
    """The approval."""

    approval: UUID


class ModelList(Strict):
    """Models that the owner may name in its settings beside the platform's default one."""

    models: list[str]


class ModelWish(StrictBody):
    """Whether the owner may use it."""

    allowed: bool


def limit_routes(router: APIRouter, store: Store) -> None:
    """Adds the routes."""

    @router.get("/api/v1/spend", responses=ABOUT_ONE, **act("read"))
    def show_spend(who: Who, asked: Annotated[SpendQuery, Query()]) -> SpendShown:
        """What models cost, by day, service and model, and how the budgets stand; for the operator of every owner."""
        chosen = one_or_all(store, who, asked)
        owners = [one for one in store.owners.all() if chosen in (None, one.id)]
        return SpendShown(
            days=[
                Spent(owner_id=one.id, owner=one.name, **row)
                for one in owners
                for row in store.spend.of_owner(one.id, asked.days)
            ],
            budgets=[
                BudgetToday(owner_id=one.id, owner=one.name, **row) for one in owners for row in store.spend.standing(one.id)
            ],
        )

    @router.post("/api/v1/suggest-only", responses=CHANGES, **act("switch"))
    def set_suggest_only(who: Who, wish: SuggestOnly) -> SuggestOnlySet:
        """Holds what work in the scope would write outside until a person approves it, or ends that; the operator's only by the operator."""
        scope, reason = scope_of(store, who, wish), storable(wish.reason or "")
        given(acts.suggest_only(store, scope, wish.on, reason, owner_id=who.owner_id, role=who.role, actor=actor_of(who)))
        return SuggestOnlySet(scope=scope, on=wish.on)

    @router.get("/api/v1/effects/{effect}", responses=ABOUT_ONE, **act("read"))
    def show_effect(who: Who, effect: UUID) -> EffectContent:
        """One effect with its content."""
        found = store.outbox.get(effect)
        if found is None or who.owner_id not in (None, found["owner_id"]):
            raise NotFoundError
        if found["kind"].startswith("notice.") and not may(who.role, "settings"):
            payload = {name: value for name, value in found["payload"].items() if name in _OF_A_NOTICE}
            found = {**found, "payload": payload, "sha256": None}
        return EffectContent(**found)

    @router.post("/api/v1/effects/{effect}/approve", responses=CHANGES, **act("effects"))
    def approve_effect(who: Who, effect: UUID, wish: EffectApproval) -> EffectChanged:
        """Lets a held effect go exactly as it was shown; one that newer work has overtaken is dropped instead."""
        by = by_owner_of(who, store.outbox.owner_of(effect))
        return EffectChanged(state=given(acts.approve_effect(store, effect, wish.sha256, by=by)))

    @router.post("/api/v1/reviews/{item}/approve", responses=CHANGES, **act("work"))
    def approve_review(who: Who, item: UUID, wish: ReviewApproval) -> ReviewApproved:
        """Lets an outsider's pull request be reviewed at exactly this head."""
        by = by_owner_of(who, review_of(store, who, item).owner_id)
        return ReviewApproved(approval=given(acts.approve_review(store, item, wish.head, by=by)))

    @router.get("/api/v1/models", responses=ABOUT_ONE, **act("read"))
    def list_models(who: Who, asked: Annotated[Asked, Query()]) -> ModelList:
        """Models that the owner was allowed by name."""
        return ModelList(models=store.owners.models(by_query(store, who, asked).owner_id))

    @router.put("/api/v1/models/{model:path}", responses=CHANGES, **act("platform"))
    def allow_model(
        who: Who,
        model: Annotated[str, Path(max_length=200, pattern=r"^[\x21-\x7e]+$")],
        asked: Annotated[Asked, Query()],
        wish: ModelWish,
    ) -> Done:
        """Lets an owner name a model, or not any more; one that the platform doesn't have is refused when it is to be used."""
        by = by_query(store, who, asked)
        store.owners.allow_model(by.owner_id, model, wish.allowed, actor=by.actor)
        return Done()
