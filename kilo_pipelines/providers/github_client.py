"""The wire to GitHub: one authenticated PyGithub requester, its time-outs, its pages and its errors.

Holds: addresses that may be used, retries, pagination, the map from answers to `ProviderError`.
Does not belong here: which endpoint is meant (`github.py`, `github_effects.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
import urllib3
from github import Auth, Github, GithubException
from pydantic import BaseModel, ValidationError

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.providers.errors import ProviderError

# GitHub ends its own calls after 10 s; longer than that nobody answers any more.
TIMEOUT_SECONDS = 15
# A read that met a 5xx or a lost connection is repeated this often within the call; writes never are (the outbox does).
READ_RETRIES = 2
READ_BACKOFF_SECONDS = 0.3
# GitHub asks for at least a second between writes and to avoid bursts of reads (its page on best practices for the API).
SECONDS_BETWEEN_WRITES = 1.0
SECONDS_BETWEEN_READS = 0.1
PER_PAGE = 100  # GitHub's most
# 20,000 comments on one pull request: more is not a conversation, and reading on would only spend the rate limit.
MAX_PAGES = 200
# What GitHub's documentation asks for after a secondary limit that names no time.
SECONDARY_LIMIT_SECONDS = 60.0
MAX_DETAIL = 300

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

Answer = TypeVar("Answer", bound=BaseModel)


class GitHubClient:
    """Calls of one credential. Not shared between threads; holds no connection before its first call."""

    def __init__(self, api_url: str, auth: Auth.Auth, clock: Clock) -> None:
        """ProviderError (`provider_invalid`) for an address other than https, or http on this machine (the twin)."""
        address = urlsplit(api_url)
        here = address.hostname in LOOPBACK
        if not (address.scheme == "https" or (address.scheme == "http" and here)):
            raise ProviderError(Reason.PROVIDER_INVALID, retryable=False, detail="GitHub's address must be https (http for localhost only)")
        # PyGithub logs bodies at DEBUG, and the answer to the minting of a token is the token.
        logging.getLogger("github.Requester").setLevel(logging.INFO)
        self._clock = clock
        self._requester = Github(
            base_url=api_url.rstrip("/"),
            auth=auth,
            timeout=TIMEOUT_SECONDS,
            per_page=PER_PAGE,
            retry=urllib3.Retry(
                total=READ_RETRIES,
                backoff_factor=READ_BACKOFF_SECONDS,
                status_forcelist=(500, 502, 503, 504),
                allowed_methods=("GET",),
                raise_on_status=False,
                respect_retry_after_header=False,  # a worker doesn't sleep through a rate limit: the caller's queue waits
            ),
            seconds_between_requests=0 if here else SECONDS_BETWEEN_READS,
            seconds_between_writes=0 if here else SECONDS_BETWEEN_WRITES,
            user_agent="kilo-pipelines",
            lazy=True,
        ).requester

    def __repr__(self) -> str:
        return "GitHubClient(…)"

    def get(self, path: str, answer: type[Answer], parameters: Mapping[str, Any] | None = None) -> Answer:
        """One object."""
        return parsed(answer, self._call("GET", path, parameters=parameters)[1], path)

    def pages(
        self, path: str, answer: type[Answer], *, under: str | None = None, parameters: Mapping[str, Any] | None = None
    ) -> Iterator[Answer]:
        """All objects of a list over all its pages; `under` names the list's field where the answer is an object."""
        for page in range(1, MAX_PAGES + 1):
            headers, data = self._call("GET", path, parameters={**(parameters or {}), "per_page": PER_PAGE, "page": page})
            found = data.get(under) if under is not None and isinstance(data, dict) else data
            if not isinstance(found, list):
                raise _strange(path)
            for one in found:
                yield parsed(answer, one, path)
            # Only *that* there is a next page is believed, never its address: that could lead anywhere.
            if 'rel="next"' not in headers.get("link", ""):
                return
        raise ProviderError(Reason.PROVIDER_INVALID, retryable=False, detail=f"GET {path} has more than {MAX_PAGES} pages")

    def write(self, verb: str, path: str, answer: type[Answer], body: Mapping[str, Any]) -> Answer:
        """POST, PATCH or PUT, sent once."""
        return parsed(answer, self._call(verb, path, body=body)[1], path)

    def _call(
        self, verb: str, path: str, *, parameters: Mapping[str, Any] | None = None, body: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], Any]:
        what = f"{verb} {path}"
        try:
            return self._requester.requestJsonAndCheck(
                verb, path, parameters=dict(parameters) if parameters else None, input=dict(body) if body is not None else None
            )
        except GithubException as failure:
            raise self._refused(what, failure) from failure
        except requests.RequestException as failure:
            detail = f"{what}: {type(failure).__name__}"
            raise ProviderError(Reason.PROVIDER_UNAVAILABLE, retryable=True, detail=detail) from failure
        except ValueError as failure:  # a body that ends in the middle of its JSON
            raise _strange(path) from failure
        except RuntimeError as failure:  # PyGithub's word for a redirect to another host, which is never followed
            raise ProviderError(Reason.PROVIDER_INVALID, retryable=False, detail=f"{what}: redirected elsewhere") from failure

    def _refused(self, what: str, failure: GithubException) -> ProviderError:
        status = failure.status
        headers = {name.lower(): str(value) for name, value in (failure.headers or {}).items()}
        message = str(failure.data.get("message", "")) if isinstance(failure.data, dict) else ""
        detail = f"{what}: {status} {message}"[:MAX_DETAIL]
        wait = self._wait(headers)
        if status == 429 or (status == 403 and _limited(message, headers)):
            wait = SECONDARY_LIMIT_SECONDS if wait is None else wait
            return ProviderError(Reason.PROVIDER_RATE_LIMITED, retryable=True, retry_after_s=wait, detail=detail, status=status)
        if status >= 500 or status in (408, 409):
            return ProviderError(Reason.PROVIDER_UNAVAILABLE, retryable=True, retry_after_s=wait, detail=detail, status=status)
        reason = {401: Reason.PROVIDER_REFUSED, 403: Reason.PROVIDER_REFUSED, 404: Reason.PROVIDER_NOT_FOUND, 410: Reason.PROVIDER_NOT_FOUND}
        return ProviderError(reason.get(status, Reason.PROVIDER_INVALID), retryable=False, detail=detail, status=status)

    def _wait(self, headers: Mapping[str, str]) -> float | None:
        """Seconds that the answer asks for: Retry-After, else the reset of a used-up limit."""
        if (named := headers.get("retry-after", "")).isdecimal():
            return float(named)
        if headers.get("x-ratelimit-remaining") == "0" and headers.get("x-ratelimit-reset", "").isdecimal():
            return max(1.0, float(headers["x-ratelimit-reset"]) - self._clock.now().timestamp())
        return None


def parsed(answer: type[Answer], data: Any, path: str) -> Answer:
    """An answer in the shape that GitHub describes; ProviderError (may be tried again) for any other."""
    try:
        return answer.model_validate(data)
    except ValidationError as failure:
        raise _strange(path) from failure


def _strange(path: str) -> ProviderError:
    return ProviderError(Reason.PROVIDER_UNAVAILABLE, retryable=True, detail=f"{path}: the answer is not what GitHub describes")


def _limited(message: str, headers: Mapping[str, str]) -> bool:
    """403 means both "not allowed" and "too often"; the header or the text tells which."""
    return "retry-after" in headers or headers.get("x-ratelimit-remaining") == "0" or "rate limit" in message.lower()
