"""What routes of the control API share: who asks, how a query and a body are read, how a refusal is answered.

The owner is the key's. The operator's key, which has none, names one with `owner` where there are several. What is another owner's
and what nobody has are answered alike.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, TypeVar
from uuid import UUID

import anyio
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kilo_pipelines.acts.security import fields_of
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.refusal import Refusal
from kilo_pipelines.ingress.bodies import CALLBACK_BYTES, BodyError, parse_object, read_body
from kilo_pipelines.services.permissions import Act, may
from kilo_pipelines.store import Store

# PostgreSQL's largest offset and repository id.
BIG = 2**63 - 1
# (owner of the key, None for the operator's; role), or nobody.
Principal = Callable[[Request], Awaitable[tuple[UUID | None, str] | None]]


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


class Refused(Strict):
    """What was refused, and why where a reason can be told."""

    outcome: Literal["refused", "not_found"]
    reason: str | None = None
    detail: str | None = None


@dataclass(frozen=True)
class Operation:
    """A route in OpenAPI's words; `documents`: media types of a 200 beside JSON."""

    summary: str
    answers: dict[int, type[BaseModel]]
    query: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    documents: tuple[str, ...] = ()


REFUSALS: dict[int, type[BaseModel]] = {400: Refused, 401: Refused}


@dataclass(frozen=True)
class Caller:
    """Who asks: the owner that is asked about, the role, and the name that audit events bear."""

    owner_id: UUID
    role: str
    actor: str


Query = TypeVar("Query", bound=Asked)
Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True)
class Desk:
    """Asks who it is before anything else is looked at."""

    store: Store
    principal: Principal

    async def who(self, request: Request, act: Act) -> tuple[UUID | None, str] | Response:
        """The key's owner and role, when the role allows the act."""
        found = await self.principal(request)
        if found is None:
            return JSONResponse({"outcome": "refused"}, status_code=401)
        return found if may(found[1], act) else refused(Refusal(Reason.ROLE_NOT_ALLOWED, found[1]))

    async def caller(self, request: Request, act: Act, model: type[Query]) -> tuple[Caller, Query] | Response:
        """Who asks about which owner, and what the query says."""
        found = await self.who(request, act)
        if isinstance(found, Response):
            return found
        asked = _asked(request, model)
        if isinstance(asked, Refusal):
            return refused(asked)
        owner_id, role = found
        if owner_id is not None:
            if asked.owner is not None:
                return refused(Refusal(Reason.QUERY_INVALID, "owner: it is the key's"))
            return Caller(owner_id, role, f"owner:{owner_id}"), asked
        known = [one.id for one in await anyio.to_thread.run_sync(self.store.owners.all)]
        if asked.owner is None and len(known) != 1:
            return refused(Refusal(Reason.OWNER_NOT_NAMED, f"{len(known)} owners"))
        chosen = asked.owner or known[0]
        return (Caller(chosen, role, "operator"), asked) if chosen in known else not_found()

    async def of_finding(self, request: Request, act: Act) -> tuple[Caller, UUID] | Response:
        """Who asks about the finding that the path names; the operator asks as its owner's operator."""
        found = await self.who(request, act)
        if isinstance(found, Response):
            return found
        finding_id = id_in_path(request, "finding")
        if finding_id is None:
            return not_found()
        owner_id, role = found
        if owner_id is not None:
            return Caller(owner_id, role, f"owner:{owner_id}"), finding_id
        known = await anyio.to_thread.run_sync(self.store.findings.owner_of, finding_id)
        return not_found() if known is None else (Caller(known, role, "operator"), finding_id)


def id_in_path(request: Request, name: str) -> UUID | None:
    """An id of ours in the path; None when it is none."""
    try:
        return UUID(request.path_params[name])
    except ValueError:
        return None


def _asked(request: Request, model: type[Query]) -> Query | Refusal:
    """The query as a model; a name that is given twice is as wrong as an unknown one."""
    given = request.query_params.multi_items()
    if len(given) != len(dict(given)):
        return Refusal(Reason.QUERY_INVALID, "a name is given twice")
    try:
        return model.model_validate(dict(given))
    except ValidationError as failure:
        return Refusal(Reason.QUERY_INVALID, fields_of(failure))


async def body_of(request: Request, model: type[Body]) -> Body | Response:
    """The body as a model, or what is wrong with it."""
    try:
        return model.model_validate(parse_object(await read_body(request, CALLBACK_BYTES)))
    except ValidationError as failure:
        return refused(Refusal(Reason.PAYLOAD_SHAPE_MISMATCH, fields_of(failure)))
    except BodyError as failure:
        return JSONResponse({"outcome": "refused", "reason": str(failure.reason)}, status_code=failure.status)


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


def refused(failure: Refusal) -> Response:
    """A refusal with its reason and the status of that."""
    answer = {"outcome": "refused", "reason": str(failure.reason), "detail": failure.detail}
    return JSONResponse(answer, status_code=_STATUS.get(failure.reason, 409))


def not_found() -> Response:
    """One answer for what is another owner's, what nobody has and what is no id."""
    return JSONResponse({"outcome": "not_found"}, status_code=404)


def told(answer: BaseModel, status: int = 200) -> Response:
    """An answer in its documented shape."""
    return Response(answer.model_dump_json(by_alias=True), status_code=status, media_type="application/json")
