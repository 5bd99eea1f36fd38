"""Dependabot alerts of a repository, one page a call, with every answer as one typed outcome (contract section 5).

GitHub REST API, "Dependabot alerts" (version 2022-11-28): cursor pagination by the Link header, `per_page` at most 100.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import quote, urlsplit

import httpx

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.providers.github import TIMEOUT_SECONDS

PAGE = 100
# A hundred alerts with the longest advisories; what is larger is no answer of GitHub's.
PAGE_BYTES = 64 * 2**20
DEFAULT_RETRY_SECONDS = 60.0

Status = Literal["ok", "unchanged", "refused"]


@dataclass(frozen=True)
class AlertPage:
    """`ok` with raw alerts, `unchanged` (nothing new since the tag), or `refused` with a reason; never holds a body's text."""

    status: Status
    reason: Reason | None = None
    detail: str = ""
    alerts: list[object] = field(default_factory=list)
    next: str | None = None
    etag: str | None = None
    retry_after_s: float | None = None


class AlertReader:
    """Reads one installation's alerts with a token that may do nothing else."""

    def __init__(self, api_url: str, token: str) -> None:
        self._api_url = api_url.rstrip("/")
        self._headers = {
            "authorization": f"Bearer {token}",
            "accept": "application/vnd.github+json",
            "x-github-api-version": "2022-11-28",
            "user-agent": "kilo-pipelines",
        }

    def page(self, full_name: str, *, etag: str | None = None, after: str | None = None) -> AlertPage:
        """One page of a repository's alerts in all states, newest change first; `after` is the page's own address."""
        first = f"{self._api_url}/repos/{quote(full_name)}/dependabot/alerts?per_page={PAGE}&sort=updated&direction=desc"
        url = after or first
        if not self._ours(url):
            return AlertPage("refused", Reason.PROVIDER_INVALID, f"{full_name}: the next page is somewhere else")
        headers = self._headers | ({"if-none-match": etag} if etag else {})
        try:
            with httpx.stream(
                "GET", url, headers=headers, timeout=TIMEOUT_SECONDS, follow_redirects=False, trust_env=False
            ) as answer:
                body = bytearray()
                for block in answer.iter_bytes():
                    body += block
                    if len(body) > PAGE_BYTES:
                        return AlertPage("refused", Reason.PROVIDER_INVALID, f"{full_name}: more than {PAGE_BYTES} bytes")
        except httpx.HTTPError as failure:
            return AlertPage("refused", Reason.PROVIDER_UNAVAILABLE, f"{full_name}: {type(failure).__name__}")
        return self._understood(answer, bytes(body), full_name)

    def _ours(self, url: str) -> bool:
        here, there = urlsplit(self._api_url), urlsplit(url)
        return (here.scheme, here.netloc) == (there.scheme, there.netloc) and there.path.startswith(here.path + "/")

    def _understood(self, answer: httpx.Response, body: bytes, full_name: str) -> AlertPage:
        if answer.status_code == 304:
            return AlertPage("unchanged")
        if answer.status_code == 200:
            try:
                alerts = json.loads(body)
            except (ValueError, RecursionError):
                return AlertPage("refused", Reason.PROVIDER_UNAVAILABLE, f"{full_name}: the answer is not JSON")
            if not isinstance(alerts, list):
                return AlertPage("refused", Reason.PROVIDER_INVALID, f"{full_name}: the answer is no list")
            following = answer.links.get("next", {}).get("url")
            return AlertPage("ok", alerts=alerts, next=following, etag=answer.headers.get("etag"))
        reason, wait = refusal(answer.status_code, answer.headers, body)
        return AlertPage("refused", reason, f"{full_name}: HTTP {answer.status_code}", retry_after_s=wait)


def refusal(status: int, headers: Any, body: bytes) -> tuple[Reason, float | None]:
    """The reason of an answer that isn't 200 or 304, and the seconds to wait when it says so."""
    text = body[:4_096].lower()
    asked = headers.get("retry-after", "")
    wait = float(asked) if asked.isdecimal() else None
    if status == 429 or (
        status == 403 and (wait is not None or headers.get("x-ratelimit-remaining") == "0" or b"rate limit" in text)
    ):
        return Reason.PROVIDER_RATE_LIMITED, wait or DEFAULT_RETRY_SECONDS
    if status == 401:
        return Reason.PROVIDER_REFUSED, None
    if status == 404:
        return Reason.PROVIDER_NOT_FOUND, None
    if status == 451 or (status in (403, 422) and b"access blocked" in text):
        return Reason.ACCESS_BLOCKED, None
    if status in (403, 422) and any(word in text for word in (b"disabled", b"not available", b"archived")):
        return Reason.ALERTS_DISABLED, None
    if status >= 500:
        return Reason.PROVIDER_UNAVAILABLE, wait
    return Reason.PROVIDER_REFUSED if status == 403 else Reason.PROVIDER_INVALID, None
