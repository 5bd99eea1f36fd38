"""What routes of the control API share: who asks, what a request may look like, how a refusal is answered.

Every route names the act that it is (services/permissions.py) and asks who it is before it looks at anything else. The owner is the
key's. The operator's key, which has none, names one with `owner` where there are several. What is another owner's and what nobody has
are answered alike.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from uuid import UUID

import anyio
from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from kilo_pipelines.acts.people import By
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.refusal import Refusal
from kilo_pipelines.ingress.bodies import CALLBACK_BYTES, BodyError, parse_object, read_body
from kilo_pipelines.services.permissions import ALLOWED, ROLES, Act, act_of, may
from kilo_pipelines.store import Principal, Store, prefix_of

# PostgreSQL's largest offset and repository id.
BIG = 2**63 - 1
# Where a route's description names its act and the roles that it is open to.
ACT, ACT_ROLES = "x-kilo-act", "x-kilo-roles"


class Strict(BaseModel):
    """An answer, or a query whose values are texts."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StrictBody(BaseModel):
    """A body: JSON's own types, nothing coerced."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Asked(Strict):
    """What every query may say."""

    owner: UUID | None = Field(default=None, description="Whose; for the operator's key only.")


class AskedOfRepository(Asked):
    """A query that may be narrowed to one repository."""

    repository: int | None = Field(default=None, ge=1, le=BIG, description="Numeric id at the provider.")


class Nothing(StrictBody):
    """A body that has nothing to say."""


class Refused(Strict):
    """What was refused, and why where a reason can be told."""

    outcome: Literal["refused", "not_found"]
    reason: str | None = None
    detail: str | None = None


class Done(Strict):
    """It is done."""

    outcome: Literal["done"] = "done"


# Answers of every route; what else may happen stands at the route.
Answers = dict[int | str, dict[str, Any]]
REFUSALS: Answers = {
    400: {"model": Refused},
    401: {"model": Refused},
    503: {"model": Refused},
    "default": {"model": Refused, "description": "Refused"},
}
ABOUT_ONE: Answers = REFUSALS | {404: {"model": Refused}}
CHANGES: Answers = ABOUT_ONE | {409: {"model": Refused}, 413: {"model": Refused}, 415: {"model": Refused}}


class RefusedError(Exception):
    """A request ends with this refusal."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal.reason))
        self.refusal = refusal


class NotFoundError(Exception):
    """A request is about what is another owner's, nobody's or no id."""


def act(name: Act) -> dict[str, Any]:
    """What a route's decorator says of who may ask it."""
    return {"openapi_extra": {ACT: name, ACT_ROLES: [one for one in ROLES if one in ALLOWED[name]]}}


class ControlRoute(APIRoute):
    """A route that knows who asks before it reads a query or a body, and reads bodies of JSON within bounds only.

    One that names no act can't be made.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler behind these checks."""
        answer = super().get_route_handler()
        needed = act_of((self.openapi_extra or {}).get(ACT))
        takes_body = self.body_field is not None

        async def handle(request: Request) -> Response:
            request.state.principal = await request.app.state.admit(request, needed)
            asked = request.query_params.multi_items()
            if len(asked) != len(dict(asked)):
                raise RefusedError(Refusal(Reason.QUERY_INVALID, "a name is given twice"))
            if takes_body:
                # Read and looked through here, where size, time and depth have bounds; what follows takes it from the request.
                if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                    raise BodyError(415, Reason.BODY_NOT_JSON)
                body = await read_body(request, CALLBACK_BYTES)
                parse_object(body)
                request._body = body
            return await answer(request)

        return handle


@dataclass(frozen=True)
class Gate:
    """Looks keys up."""

    store: Store

    async def admit(self, request: Request, needed: Act) -> Principal:
        """Who asks; RefusedError without a live key, or when its role doesn't allow the act."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        found = None
        if scheme.lower() == "bearer" and key:
            found = await anyio.to_thread.run_sync(self.store.api_keys.principal, key)
        if found is None:
            raise RefusedError(Refusal(Reason.KEY_REFUSED, ""))
        if not may(found.role, needed):
            raise RefusedError(Refusal(Reason.ROLE_NOT_ALLOWED, found.role))
        return found


async def _principal(request: Request) -> Principal:
    found: Principal = request.state.principal
    return found


Who = Annotated[Principal, Depends(_principal)]


def actor_of(who: Principal) -> str:
    """The name that audit events bear: the person where the key has one, else the key."""
    if who.owner_id is None:
        return "operator"
    return f"person:{who.login}" if who.login is not None else f"key:{prefix_of(who.key_id)}"


def by_of(who: Principal, owner_id: UUID) -> By:
    """Whoever asks, as who acts on an owner."""
    return By(owner_id, who.role, actor_of(who), who.person_id, who.key_id)


def by_query(store: Store, who: Principal, asked: Asked) -> By:
    """Who asks about which owner: the key's, or the one that the operator names."""
    owner_id = one_or_all(store, who, asked)
    if owner_id is None:
        known = store.owners.all()
        if len(known) != 1:
            raise RefusedError(Refusal(Reason.OWNER_NOT_NAMED, f"{len(known)} owners"))
        owner_id = known[0].id
    return by_of(who, owner_id)


def one_or_all(store: Store, who: Principal, asked: Asked) -> UUID | None:
    """The owner of a list; None when the operator named none and sees those of all."""
    if who.owner_id is not None:
        if asked.owner is not None:
            raise RefusedError(Refusal(Reason.QUERY_INVALID, "owner: it is the key's"))
        return who.owner_id
    if asked.owner is not None and asked.owner not in {one.id for one in store.owners.all()}:
        raise NotFoundError
    return asked.owner


def owners_of(store: Store, chosen: UUID | None) -> list[UUID]:
    """The owners whose things a list shows: the chosen one, or all."""
    return [one.id for one in store.owners.all()] if chosen is None else [chosen]


def by_owner_of(who: Principal, owner_id: UUID | None) -> By:
    """Who asks about a thing of this owner (None: nobody's); the operator asks as its owner's operator."""
    if owner_id is None or who.owner_id not in (None, owner_id):
        raise NotFoundError
    return by_of(who, owner_id)


def given(answer: Any) -> Any:
    """The answer of an act, unless it is a refusal."""
    if isinstance(answer, Refusal):
        raise RefusedError(answer)
    return answer


# What was asked is wrong: 400. What can't be done as things stand: 409, for every reason that has no status of its own here.
_STATUS = {
    Reason.QUERY_INVALID: 400,
    Reason.OWNER_NOT_NAMED: 400,
    Reason.PAYLOAD_SHAPE_MISMATCH: 400,
    Reason.REPORT_PERIOD_INVALID: 400,
    Reason.ROLE_NOT_ALLOWED: 401,
    Reason.REPORT_TOO_LARGE: 413,
    Reason.SETTINGS_INVALID: 422,
    Reason.REPORT_OUT_OF_TIME: 503,
}
# Told like what nobody has.
_UNKNOWN = frozenset({Reason.KEY_UNKNOWN, Reason.NOT_A_MEMBER})


def refused(failure: Refusal) -> Response:
    """A refusal with its reason and the status of that."""
    if failure.reason in _UNKNOWN:
        return not_found()
    if failure.reason is Reason.KEY_REFUSED:
        # One answer for no, unknown, expired and revoked keys: a stranger learns nothing of any.
        return JSONResponse({"outcome": "refused", "reason": str(failure.reason)}, 401, headers={"WWW-Authenticate": "Bearer"})
    answer = {"outcome": "refused", "reason": str(failure.reason), "detail": failure.detail}
    return JSONResponse(answer, status_code=_STATUS.get(failure.reason, 409))


def not_found() -> Response:
    """One answer for what is another owner's, what nobody has and what is no id."""
    return JSONResponse({"outcome": "not_found"}, status_code=404)


async def _refused(_request: Request, failure: Exception) -> Response:
    assert isinstance(failure, RefusedError)  # noqa: S101  # registered for it
    return refused(failure.refusal)


async def _not_found(_request: Request, _failure: Exception) -> Response:
    return not_found()


async def _bad_body(_request: Request, failure: Exception) -> Response:
    assert isinstance(failure, BodyError)  # noqa: S101  # registered for it
    return JSONResponse({"outcome": "refused", "reason": str(failure.reason)}, status_code=failure.status)


async def _invalid(_request: Request, failure: Exception) -> Response:
    """Wrong fields by name, without their values; an id in the path that is none is what nobody has."""
    assert isinstance(failure, RequestValidationError)  # noqa: S101  # registered for it
    errors = failure.errors()
    places = {str(one["loc"][0]) for one in errors}
    if "path" in places:
        return not_found()
    fields = "; ".join(f"{'.'.join(map(str, one['loc'][1:])) or 'all'}: {one['msg']}" for one in errors)[:1_000]
    return refused(Refusal(Reason.QUERY_INVALID if "query" in places else Reason.PAYLOAD_SHAPE_MISMATCH, fields))


async def _http(_request: Request, failure: Exception) -> Response:
    """What Starlette itself refuses: no such path, another method."""
    assert isinstance(failure, HTTPException)  # noqa: S101  # registered for it
    if failure.status_code == 404:
        return not_found()
    return JSONResponse({"outcome": "refused"}, status_code=failure.status_code, headers=failure.headers)


Handler = Callable[[Request, Exception], Coroutine[Any, Any, Response]]
HANDLERS: dict[int | type[Exception], Handler] = {
    RefusedError: _refused,
    NotFoundError: _not_found,
    BodyError: _bad_body,
    RequestValidationError: _invalid,
    HTTPException: _http,
}
