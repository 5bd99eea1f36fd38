"""Routes of the control API about deliveries: what came, and what is missing."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import Field

from kilo_pipelines.ingress.control import ABOUT_ONE, Asked, Strict, Who, act, by_query
from kilo_pipelines.store import Store


class DeliveryQuery(Asked):
    """How many of each list."""

    limit: int = Field(default=20, ge=1, le=1_000)


class Gap(Strict):
    """A delivery that the provider sent and we don't have, or didn't have for a while."""

    guid: str
    event: str
    action: str | None
    repository: str | None
    state: str
    reason: str | None
    asks: int
    pulls: int
    sent_at: datetime
    missing_since: datetime
    asked_at: datetime | None
    not_before: datetime | None
    deadline: datetime | None
    ended_at: datetime | None


class Came(Strict):
    """A delivery that came, or was pulled."""

    guid: str
    event: str
    action: str | None
    state: str
    reason: str | None
    received_at: datetime
    pulled: bool


class Deliveries(Strict):
    """An owner's missed deliveries and its newest ones."""

    gaps: list[Gap]
    received: list[Came]


def delivery_routes(router: APIRouter, store: Store) -> None:
    """Adds the routes."""

    @router.get("/api/v1/deliveries", responses=ABOUT_ONE, **act("read"))
    def list_deliveries(who: Who, asked: Annotated[DeliveryQuery, Query()]) -> Deliveries:
        """Missed deliveries of an owner, and the newest ones that came."""
        owner_id = by_query(store, who, asked).owner_id
        gaps, came = store.delivery_gaps.listed(owner_id, asked.limit), store.delivery_gaps.received(owner_id, asked.limit)
        return Deliveries(gaps=[Gap(**one) for one in gaps], received=[Came(**one) for one in came])
