"""GitHub's log of an App's webhook deliveries: its lines, one delivery's payload, a redelivery.

Holds: how a page is asked for and checked, and what a payload out of the log must look like. Does not belong here: which
deliveries are missed (core/delivery_gaps), what is stored (store). A payload out of the log has no signature over its bytes: that it
is GitHub's is known by the TLS address and the App's own token that it was asked with (docs/decisions/0029).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Annotated, Any
from urllib.parse import parse_qs, urlsplit

import httpx
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from kilo_pipelines.core.delivery_gaps import Attempt
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.providers.github import (
    RATE_LIMIT_WAIT,
    GitHubApp,
    ProviderError,
    provider_errors,
    read_within,
    retry_after,
)
from kilo_pipelines.providers.github_webhooks import Action, Name, ProviderId, installation_id, shape_matches

PATH = "/app/hook/deliveries"
PER_PAGE = 100  # GitHub's most
# A line of the log has some 400 bytes.
MAX_PAGE_BYTES = 2_000_000
# GitHub's cap of a webhook's body is 25 MB; beside it stand headers and the answer that it got.
MAX_DELIVERY_BYTES = 30 * 2**20
# An error's message is a sentence, and isn't read.
MAX_ERROR_BYTES = 65_536
# GitHub's cursors are some twenty characters.
MAX_CURSOR = 200
# GitHub sends its own id of a delivery in the header and the log; ours keep as much of a header.
Guid = Annotated[str, Field(strict=True, pattern=r"^[0-9A-Za-z-]{1,100}$")]


@dataclass(frozen=True)
class LogPage:
    """One page of the log, newest attempts first. `next`: the cursor of the page after it. `provider_now`: GitHub's clock."""

    attempts: list[Attempt]
    malformed: int
    next: str | None
    provider_now: datetime


@dataclass(frozen=True)
class LoggedDelivery:
    """An event out of the log: its payload has its event's shape and names this installation. `body` is our own writing of it."""

    guid: str
    event: str
    action: str | None
    installation_id: int
    body: bytes


class _Line(BaseModel):
    model_config = ConfigDict(extra="ignore")

    id: ProviderId
    guid: Guid
    delivered_at: AwareDatetime
    status_code: int
    event: Name
    action: Action | None
    installation_id: ProviderId | None
    repository_id: ProviderId | None

    def attempt(self) -> Attempt:
        # GitHub's own classes of the outcome: 200 to 399 is a success.
        return Attempt(
            id=self.id,
            guid=self.guid,
            delivered_at=self.delivered_at,
            answered=200 <= self.status_code < 400,
            event=self.event,
            action=self.action,
            installation_id=self.installation_id,
            repository_id=self.repository_id,
        )


class _Request(BaseModel):
    headers: dict[str, Any]
    payload: dict[str, Any]


class _Whole(_Line):
    request: _Request


def list_deliveries(app: GitHubApp, cursor: str | None) -> LogPage:
    """The newest page of the log, or the one at `cursor`.

    Raises ProviderError: `page_cursor_refused` where GitHub doesn't take the cursor any more, `page_link_refused` where the next page
    would be somewhere else.
    """
    parameters: dict[str, str | int] = {"per_page": PER_PAGE} | ({"cursor": cursor} if cursor else {})
    response, found = _ask(app, PATH, MAX_PAGE_BYTES, parameters)
    if response.status_code in (400, 422) and cursor:
        raise ProviderError(Reason.PAGE_CURSOR_REFUSED, retryable=False)
    _check(response)
    if not isinstance(found, list):
        raise ProviderError(Reason.PROVIDER_UNAVAILABLE, retryable=True, detail="the log is not a list")
    attempts = []
    for line in found:
        try:
            attempts.append(_Line.model_validate(line).attempt())
        except ValidationError:  # counted, and shown by the run: one line must not hide the others
            continue
    return LogPage(attempts, len(found) - len(attempts), _next(response), _provider_now(response))


def fetch_delivery(app: GitHubApp, attempt_id: int) -> LoggedDelivery:
    """One delivery's payload.

    Raises ProviderError: `provider_not_found` when GitHub forgot it, `body_too_large`, `payload_shape_mismatch` where the payload isn't
    what the log calls it (the checks of the ingress), `installation_id_missing`.
    """
    response, found = _ask(app, f"{PATH}/{attempt_id}", MAX_DELIVERY_BYTES, {})
    _check(response)
    try:
        whole = _Whole.model_validate(found)
        body = json.dumps(whole.request.payload, allow_nan=False).encode()
    except (ValidationError, ValueError, RecursionError):
        raise ProviderError(Reason.PAYLOAD_SHAPE_MISMATCH, retryable=False, detail=f"delivery {attempt_id}") from None
    payload, headers = whole.request.payload, {name.lower(): value for name, value in whole.request.headers.items()}
    named = (headers.get("x-github-event"), headers.get("x-github-delivery"))
    if whole.id != attempt_id or named != (whole.event, whole.guid) or not shape_matches(whole.event, payload):
        raise ProviderError(Reason.PAYLOAD_SHAPE_MISMATCH, retryable=False, detail=f"delivery {attempt_id}")
    installation = installation_id(payload)
    if installation is None or installation != whole.installation_id:
        raise ProviderError(Reason.INSTALLATION_ID_MISSING, retryable=False, detail=f"delivery {attempt_id}")
    return LoggedDelivery(whole.guid, whole.event, whole.action, installation, body)


def redeliver(app: GitHubApp, attempt_id: int) -> None:
    """Asks GitHub to send a delivery again; it comes some time later, under the same guid. Raises ProviderError."""
    with provider_errors():
        # PyGithub's client keeps a second between writes, as GitHub asks for.
        app.requester.requestJsonAndCheck("POST", f"{PATH}/{attempt_id}/attempts")


def _ask(app: GitHubApp, path: str, most: int, parameters: dict[str, str | int]) -> tuple[httpx.Response, Any]:
    """The answer, and its body decoded where it is a 200."""
    try:
        with app.stream_as_app("GET", path, params=parameters) as response:
            raw = read_within(response, most if response.status_code == 200 else MAX_ERROR_BYTES)
    except (httpx.HTTPError, TimeoutError) as failure:
        raise ProviderError(Reason.PROVIDER_UNAVAILABLE, retryable=True, detail=type(failure).__name__) from None
    if response.status_code != 200:
        return response, None
    if raw is None:
        raise ProviderError(Reason.BODY_TOO_LARGE, retryable=False, detail=f"more than {most:,} bytes")
    try:
        return response, json.loads(raw)
    except (ValueError, RecursionError):
        raise ProviderError(Reason.PROVIDER_UNAVAILABLE, retryable=True, detail="the answer is not JSON") from None


def _check(response: httpx.Response) -> None:
    """Raises what an answer other than 200 means."""
    status, wait = response.status_code, retry_after(response.headers)
    if status == 200:
        return
    detail = f"HTTP {status}"
    if status == 429 or (status == 403 and wait is not None):
        raise ProviderError(
            Reason.PROVIDER_RATE_LIMITED, retryable=True, retry_after_s=RATE_LIMIT_WAIT if wait is None else wait, detail=detail
        )
    if status >= 500:
        raise ProviderError(Reason.PROVIDER_UNAVAILABLE, retryable=True, retry_after_s=wait, detail=detail)
    if status in (401, 403):
        raise ProviderError(Reason.PROVIDER_REFUSED, retryable=False, detail=detail)
    missing = status in (404, 410)
    raise ProviderError(Reason.PROVIDER_NOT_FOUND if missing else Reason.PROVIDER_INVALID, retryable=False, detail=detail)


def _next(response: httpx.Response) -> str | None:
    """The next page's cursor, which is put to our own address; the link must lead to the same log."""
    url = response.links.get("next", {}).get("url")
    if url is None:
        return None
    link, asked = urlsplit(url), urlsplit(str(response.request.url))
    cursors = parse_qs(link.query).get("cursor", [])
    same = (link.scheme, link.netloc, link.path) == (asked.scheme, asked.netloc, asked.path)
    if not same or len(cursors) != 1 or len(cursors[0]) > MAX_CURSOR or "\x00" in cursors[0]:
        raise ProviderError(Reason.PAGE_LINK_REFUSED, retryable=False, detail="the next page is somewhere else")
    return cursors[0]


def _provider_now(response: httpx.Response) -> datetime:
    """GitHub's clock as it answered: the log's times are by it."""
    try:
        return parsedate_to_datetime(response.headers.get("date", "")).astimezone(UTC)
    except ValueError:
        raise ProviderError(Reason.PROVIDER_UNAVAILABLE, retryable=True, detail="the answer has no date") from None
