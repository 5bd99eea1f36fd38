"""Dependabot alerts over GitHub's REST API: one page a call, every answer one typed outcome (contract, section 5).

Holds: how answers are told apart, how far a page may go. Does not belong here: what an alert means (services/security), which
alerts are asked for when (ops). Alerts come back as raw JSON: they are somebody else's text until the services have checked them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import parse_qsl, urlencode, urlsplit

import httpx

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.providers.github import RATE_LIMIT_WAIT, GitHubInstallation, ProviderError, read_within, retry_after

# What a token is minted for, for one repository; `pull_requests` and `contents` of a remediation are minted apart.
READ_ALERTS = {"metadata": "read", "vulnerability_alerts": "read"}
DISMISS_ALERTS = {"metadata": "read", "vulnerability_alerts": "write"}

PER_PAGE = 100  # GitHub's most
# An advisory's description has up to 65,535 characters of up to three bytes (GitHub's OpenAPI description): 100 of them.
MAX_PAGE_BYTES = 20_000_000
# An error's message is a sentence; what is longer isn't read to tell errors apart.
MAX_ERROR_BYTES = 65_536
MAX_COMMENT = 280  # characters of a dismissal's comment; longer ones are a 422

_FULL_NAME = re.compile(r"(?!\.{1,2}/)[\w.-]+/(?!\.{1,2}$)[\w.-]+", re.ASCII)
# GitHub's words where a status alone doesn't tell (contract 5); looked for in `message` only.
_BLOCKED = re.compile(r"access blocked", re.IGNORECASE)
_DISABLED = re.compile(r"alerts are (disabled|not (available|enabled))|archived", re.IGNORECASE)
_LIMITED = re.compile(r"rate limit", re.IGNORECASE)

Status = Literal[
    "ok",
    "unchanged",
    "auth_invalid",
    "repository_unavailable",
    "access_blocked",
    "alerts_disabled",
    "rate_limited",
    "failed",
]


@dataclass(frozen=True)
class AlertPage:
    """One answer. Only `ok` has alerts; every other status but `unchanged` has a reason.

    `next`: what to pass as `after_page`, None on the last page. `retryable`: the same call may succeed later, after
    `retry_after_s` seconds where GitHub says how long. `detail`: status and repository, never a body.
    `repository_unavailable` with `repository_moved`: it exists under another name, so nothing may be concluded from the old one.
    `full_name`: the repository's present name, where another one was asked for (`fetch_alerts_of`).
    """

    status: Status
    alerts: list[object] = field(default_factory=list)
    next: str | None = None
    etag: str | None = None
    rate_remaining: int | None = None
    reason: Reason | None = None
    retryable: bool = False
    retry_after_s: float | None = None
    detail: str = ""
    full_name: str | None = None


def fetch_alerts_of(
    installation: GitHubInstallation, repository_id: int, full_name: str, *, etag: str | None, after_page: str | None
) -> AlertPage:
    """`fetch_alerts` of the repository with this id, whatever it is called by now.

    A name that leads nowhere, elsewhere or to what this token may not read is looked up by the id and asked for once more; GitHub's
    redirect is not followed. Raises ProviderError; `owner_changed` where the id leads nowhere either.
    """
    page = fetch_alerts(installation, full_name, etag=etag, after_page=after_page)
    if page.status != "repository_unavailable" and page.reason is not Reason.PROVIDER_REFUSED:
        return page
    try:
        present = installation.repository(repository_id).full_name
    except ProviderError as failure:
        if failure.reason is not Reason.PROVIDER_NOT_FOUND:
            raise
        raise ProviderError(Reason.OWNER_CHANGED, retryable=False, detail="its id leads nowhere") from None
    if present == full_name:
        return page
    return replace(fetch_alerts(installation, present, etag=etag, after_page=after_page), full_name=present)


def fetch_alerts(installation: GitHubInstallation, full_name: str, *, etag: str | None, after_page: str | None) -> AlertPage:
    """One page of a repository's alerts of every state, those whose state changed last first; raises nothing of GitHub's.

    `etag` is of an earlier first page: the same one again is `unchanged` and costs nothing of the rate limit. With this order a
    change of any alert's state changes the first page. An advisory whose severity changes moves no alert, so that it shows only
    where its page is read: read everything now and then. `after_page` is an earlier page's `next`.
    """
    query = after_page or urlencode({"per_page": PER_PAGE, "sort": "updated", "direction": "desc"})
    headers = {"If-None-Match": etag} if etag and not after_page else {}
    answer, body = _ask(installation, "GET", full_name, f"?{query}", headers=headers)
    if answer.status == "failed" and answer.reason is Reason.PROVIDER_INVALID and after_page:
        return replace(answer, reason=Reason.PAGE_CURSOR_REFUSED)
    if answer.status != "ok":
        return answer
    if not isinstance(body, list):
        return _failed(full_name, Reason.PROVIDER_UNAVAILABLE, "the page is not a list", retryable=True)
    return replace(answer, alerts=body)


def get_alert(installation: GitHubInstallation, full_name: str, number: int) -> dict[str, Any]:
    """One alert as raw JSON; needs READ_ALERTS. Raises ProviderError with the outcome's reason."""
    return _one(installation, "GET", full_name, number)


def dismiss_alert(installation: GitHubInstallation, full_name: str, number: int, reason: str, comment: str) -> dict[str, Any]:
    """Dismisses an open alert; the alert as GitHub has it then. Needs DISMISS_ALERTS.

    `reason`: fix_started, inaccurate, no_bandwidth, not_used or tolerable_risk. `comment`: at most 280 characters, the caller
    cuts. Read it back with `get_alert` first: GitHub refuses what isn't open any more (`provider_invalid`), also after a lost
    answer. Raises ProviderError.
    """
    if len(comment) > MAX_COMMENT:
        raise ProviderError(Reason.PROVIDER_INVALID, retryable=False, detail=f"a comment of {len(comment)} characters")
    body = {"state": "dismissed", "dismissed_reason": reason, "dismissed_comment": comment}
    return _one(installation, "PATCH", full_name, number, json=body)


def reopen_alert(installation: GitHubInstallation, full_name: str, number: int) -> dict[str, Any]:
    """Opens a dismissed alert again; the alert as GitHub has it then. Needs DISMISS_ALERTS. Raises ProviderError."""
    return _one(installation, "PATCH", full_name, number, json={"state": "open"})


def _one(installation: GitHubInstallation, method: str, full_name: str, number: int, **more: Any) -> dict[str, Any]:
    answer, body = _ask(installation, method, full_name, f"/{number}", **more)
    if answer.status == "ok" and not isinstance(body, dict):
        answer = _failed(full_name, Reason.PROVIDER_UNAVAILABLE, "the alert is not an object", retryable=True)
    if answer.reason is not None:
        raise ProviderError(
            answer.reason,
            retryable=answer.retryable,
            retry_after_s=answer.retry_after_s,
            detail=f"alert {number}, {answer.detail}",
        )
    return dict(body)


def _failed(full_name: str, reason: Reason, what: str, *, retryable: bool) -> AlertPage:
    return AlertPage("failed", reason=reason, retryable=retryable, detail=f"{what}: {full_name}")


def _ask(installation: GitHubInstallation, method: str, full_name: str, tail: str, **more: Any) -> tuple[AlertPage, Any]:
    """The outcome of one request and, when it is `ok`, the decoded body."""
    if _FULL_NAME.fullmatch(full_name) is None:
        return AlertPage("failed", reason=Reason.PROVIDER_INVALID, detail="not a repository's name"), None
    path = f"/repos/{full_name}/dependabot/alerts"
    try:
        with installation.stream(method, path + tail, **more) as response:
            raw = read_within(response, MAX_PAGE_BYTES if response.status_code == 200 else MAX_ERROR_BYTES)
    except httpx.InvalidURL:
        return _failed(full_name, Reason.PAGE_CURSOR_REFUSED, "the next page's parameters are no address", retryable=False), None
    except (httpx.HTTPError, TimeoutError) as failure:
        return _failed(full_name, Reason.PROVIDER_UNAVAILABLE, type(failure).__name__, retryable=True), None
    if response.status_code != 200:
        outcome = _outcome(response, raw or b"", full_name)
        if outcome.status == "auth_invalid":
            installation.forget()
        return outcome, None
    if raw is None:
        return _failed(full_name, Reason.ALERT_PAGE_TOO_LARGE, f"more than {MAX_PAGE_BYTES:,} bytes", retryable=False), None
    try:
        body = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return _failed(full_name, Reason.PROVIDER_UNAVAILABLE, "the answer is not JSON", retryable=True), None
    try:
        following = _next(response)
    except ValueError:
        return _failed(full_name, Reason.PAGE_LINK_REFUSED, "the next page is somewhere else", retryable=False), None
    page = AlertPage("ok", next=following, etag=_tag(response.headers), rate_remaining=_remaining(response.headers))
    return page, body


def _refuse_constant(name: str) -> None:
    """NaN and Infinity are no JSON, and no database takes them."""
    raise ValueError(f"{name} is not JSON")


def _next(response: httpx.Response) -> str | None:
    """The parameters of the next page, which are put to our own address; ValueError when the link leads to another server."""
    url = response.links.get("next", {}).get("url")
    if url is None:
        return None
    link, asked = urlsplit(url), urlsplit(str(response.request.url))
    query = parse_qsl(link.query)
    # GitHub's links may lead by the repository's id instead of its name; the last part is the same.
    if (link.scheme, link.netloc) != (asked.scheme, asked.netloc) or not link.path.endswith("/dependabot/alerts") or not query:
        raise ValueError("the link leads elsewhere")
    return urlencode(query)


def _remaining(headers: Mapping[str, str]) -> int | None:
    value = headers.get("x-ratelimit-remaining", "")
    return int(value) if re.fullmatch(r"\d{1,9}", value) else None


def _tag(headers: Mapping[str, str]) -> str | None:
    """The answer's tag, when it is one that a later request may carry."""
    value = headers.get("etag", "")
    return value if re.fullmatch(r"[!-~]{1,200}", value) else None


def _outcome(response: httpx.Response, raw: bytes, full_name: str) -> AlertPage:
    """What an answer other than 200 means; message and headers are looked at, and go nowhere."""
    status, message, wait = response.status_code, _message(raw), retry_after(response.headers)
    page = AlertPage(
        "failed",
        etag=_tag(response.headers),
        rate_remaining=_remaining(response.headers),
        detail=f"HTTP {status}: {full_name}",
    )
    if status == 304:
        return replace(page, status="unchanged")
    if status == 401:  # a new token is minted for the next try
        return replace(page, status="auth_invalid", reason=Reason.PROVIDER_AUTH, retryable=True)
    if status == 451 or (status in (403, 422) and _BLOCKED.search(message)):
        return replace(page, status="access_blocked", reason=Reason.ACCESS_BLOCKED)
    if status in (403, 422) and _DISABLED.search(message):
        return replace(page, status="alerts_disabled", reason=Reason.ALERTS_DISABLED)
    if status == 429 or (status == 403 and (wait is not None or _LIMITED.search(message))):
        wait = RATE_LIMIT_WAIT if wait is None else wait
        return replace(page, status="rate_limited", reason=Reason.PROVIDER_RATE_LIMITED, retryable=True, retry_after_s=wait)
    if status in (301, 302, 307, 308):
        return replace(page, status="repository_unavailable", reason=Reason.REPOSITORY_MOVED)
    if status in (404, 410):
        return replace(page, status="repository_unavailable", reason=Reason.PROVIDER_NOT_FOUND)
    if status >= 500:
        return replace(page, reason=Reason.PROVIDER_UNAVAILABLE, retryable=True, retry_after_s=wait)
    return replace(page, reason=Reason.PROVIDER_REFUSED if status == 403 else Reason.PROVIDER_INVALID)


def _message(raw: bytes) -> str:
    """GitHub's sentence in an error's body; empty when there is none."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return ""
    message = body.get("message") if isinstance(body, dict) else None
    return message if isinstance(message, str) else ""
