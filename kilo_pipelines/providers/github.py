"""GitHub as an App: short-lived tokens per repository and permission, reads that the engine needs (PyGithub)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cached_property, partial
from typing import Any
from urllib.parse import urlsplit

import requests
from github import Auth, Consts, Github, GithubException, GithubIntegration, RateLimitExceededException
from github.PullRequest import PullRequest
from github.Repository import Repository

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.reasons import Reason

# Half of an effect's lease (store/outbox.py): a write is over, or its answer lost, before anybody may take the effect over.
TIMEOUT_SECONDS = 10
# A cached token is given out only while it lives at least this long: longer than any single use of it.
TOKEN_MARGIN = timedelta(minutes=5)
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class ProviderError(Exception):
    """GitHub could not or would not: a reason code, whether trying again may help, and when (seconds)."""

    def __init__(self, reason: Reason, *, retryable: bool, retry_after_s: float | None = None, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
        self.retryable = retryable
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class PullState:
    """A pull request as GitHub tells it now."""

    repository_id: int
    number: int
    state: str
    draft: bool
    merged: bool
    title: str
    body: str
    author: str
    author_type: str
    labels: list[str]
    head_sha: str
    head_ref: str
    head_repository_id: int | None
    base_sha: str
    base_ref: str
    url: str
    full_name: str
    clone_url: str
    default_branch: str


@dataclass(frozen=True)
class ExistingReviewComment:
    """An inline comment that stands on a pull request."""

    path: str
    line: int | None
    body: str
    is_ours: bool


@dataclass(frozen=True)
class InstalledRepository:
    """A repository of an installation."""

    external_id: int
    full_name: str
    default_branch: str
    private: bool


@contextmanager
def provider_errors(forget: Callable[[], None] | None = None) -> Iterator[None]:
    """Turns PyGithub's exceptions into ProviderError; bodies and tokens stay out of messages.

    With `forget` a refused token is dropped first, and the call may be tried again with a new one.
    """
    try:
        yield
    except RateLimitExceededException as failure:
        raise ProviderError(Reason.PROVIDER_RATE_LIMITED, retryable=True, retry_after_s=_retry_after(failure) or 60.0) from None
    except GithubException as failure:
        if failure.status == 401 and forget is not None:
            forget()
            raise ProviderError(Reason.PROVIDER_REFUSED, retryable=True, detail="HTTP 401: the token was refused") from None
        raise _of_status(failure) from None
    except requests.RequestException as failure:
        raise ProviderError(Reason.PROVIDER_UNAVAILABLE, retryable=True, detail=type(failure).__name__) from None
    except json.JSONDecodeError:  # an answer that ends in its middle
        raise ProviderError(Reason.PROVIDER_UNAVAILABLE, retryable=True, detail="the answer is not JSON") from None


def _retry_after(failure: GithubException) -> float | None:
    """Seconds that the answer asks for: Retry-After, else the reset of a used-up limit by the provider's own clock."""
    headers = failure.headers or {}
    value = headers.get("retry-after")
    if value and value.isdecimal():
        return float(value)
    reset, date = headers.get("x-ratelimit-reset", ""), headers.get("date")
    if headers.get("x-ratelimit-remaining") == "0" and reset.isdecimal() and date:
        return max(1.0, float(reset) - parsedate_to_datetime(date).timestamp())
    return None


def _of_status(failure: GithubException) -> ProviderError:
    status, wait = failure.status, _retry_after(failure)
    if status == 429 or (status == 403 and wait is not None):
        return ProviderError(Reason.PROVIDER_RATE_LIMITED, retryable=True, retry_after_s=wait or 60.0)
    if status >= 500:
        return ProviderError(Reason.PROVIDER_UNAVAILABLE, retryable=True, retry_after_s=wait, detail=f"HTTP {status}")
    by_status = {401: Reason.PROVIDER_REFUSED, 403: Reason.PROVIDER_REFUSED, 404: Reason.PROVIDER_NOT_FOUND}
    return ProviderError(by_status.get(status, Reason.PROVIDER_INVALID), retryable=False, detail=f"HTTP {status}")


def _check_address(api_url: str) -> None:
    parts = urlsplit(api_url)
    if parts.scheme != "https" and parts.hostname not in LOOPBACK:
        raise ProviderError(Reason.PROVIDER_REFUSED, retryable=False, detail="GitHub is asked over https only")


class GitHubApp:
    """One GitHub App. Keeps minted tokens in memory until shortly before they expire."""

    def __init__(self, api_url: str, app_id: int, private_key_pem: str, clock: Clock) -> None:
        _check_address(api_url)
        # PyGithub logs answers at DEBUG, and the answer to the minting of a token is the token.
        logging.getLogger("github.Requester").setLevel(logging.INFO)
        self.api_url = api_url
        self._clock = clock
        # PyGithub spaces its requests for api.github.com; our own outbox paces writes, a local server needs no pause.
        self._options: dict[str, Any] = {"base_url": api_url, "timeout": TIMEOUT_SECONDS, "retry": None}
        if urlsplit(api_url).hostname in LOOPBACK:
            self._options |= {"seconds_between_requests": 0, "seconds_between_writes": 0}
        self._integration = GithubIntegration(auth=Auth.AppAuth(app_id, private_key_pem), **self._options)
        self._tokens: dict[tuple[int, tuple[int, ...], tuple[tuple[str, str], ...]], tuple[str, datetime]] = {}

    def __repr__(self) -> str:
        return f"GitHubApp({self.api_url})"

    @cached_property
    def bot_login(self) -> str:
        """The login under which this App writes."""
        with provider_errors():
            return f"{self._integration.get_app().slug}[bot]"

    def token(self, installation_id: int, repository_ids: list[int], permissions: dict[str, str]) -> str:
        """An installation token for these repositories and permissions only."""
        key = (installation_id, tuple(sorted(repository_ids)), tuple(sorted(permissions.items())))
        cached = self._tokens.get(key)
        if cached and cached[1] - self._clock.now() > TOKEN_MARGIN:
            return cached[0]
        with provider_errors():
            # PyGithub's helper can't name repositories: the same endpoint is asked with the same client.
            _, data = self._integration.requester.requestJsonAndCheck(
                "POST",
                f"/app/installations/{installation_id}/access_tokens",
                input={"repository_ids": list(repository_ids), "permissions": permissions},
                headers={"Accept": Consts.mediaTypeIntegrationPreview},
            )
        expires = datetime.fromisoformat(data["expires_at"])
        self._tokens[key] = (data["token"], expires)
        return str(data["token"])

    def forget(self, installation_id: int) -> None:
        """Drops cached tokens of an installation (revoked, suspended)."""
        self._tokens = {key: value for key, value in self._tokens.items() if key[0] != installation_id}

    def installation(self, installation_id: int, repository_ids: list[int], permissions: dict[str, str]) -> GitHubInstallation:
        """A client that may do only this; a refused mint tells that the repository isn't in the installation now."""
        try:
            token = self.token(installation_id, repository_ids, permissions)
        except ProviderError as failure:
            if failure.reason in (Reason.PROVIDER_INVALID, Reason.PROVIDER_NOT_FOUND):
                raise ProviderError(
                    Reason.OWNER_CHANGED, retryable=False, detail="the repository is not in the installation"
                ) from None
            raise
        forget = partial(self.forget, installation_id)
        return GitHubInstallation(Github(auth=Auth.Token(token), **self._options), self.bot_login, repository_ids, forget)

    def installed_repositories(self, installation_id: int) -> list[InstalledRepository]:
        """Every repository of an installation."""
        with provider_errors():
            found = self._integration.get_app_installation(installation_id).get_repos()
            return [InstalledRepository(one.id, one.full_name, one.default_branch, one.private) for one in found]


class GitHubInstallation:
    """Reads and writes with one scoped token."""

    def __init__(self, client: Github, bot_login: str, repository_ids: list[int], forget: Callable[[], None]) -> None:
        self._client = client
        self._forget = forget
        self.bot_login = bot_login
        self._repository_ids = repository_ids

    def errors(self) -> AbstractContextManager[None]:
        """`provider_errors` for calls with this client's token."""
        return provider_errors(self._forget)

    def repository(self, full_name: str) -> Repository:
        """The repository, provided that its id is one that this token was minted for."""
        with self.errors():
            found = self._client.get_repo(full_name)
        if found.id not in self._repository_ids:
            raise ProviderError(Reason.OWNER_CHANGED, retryable=False, detail="another repository has this name now")
        return found

    def pull_object(self, full_name: str, number: int) -> PullRequest:
        """PyGithub's pull request."""
        repository = self.repository(full_name)
        with self.errors():
            return repository.get_pull(number)

    def pull(self, full_name: str, number: int) -> PullState:
        """The pull request's present state."""
        repository = self.repository(full_name)
        with self.errors():
            pull = repository.get_pull(number)
            return PullState(
                repository_id=repository.id,
                number=pull.number,
                state=pull.state,
                draft=pull.draft,
                merged=pull.merged,
                title=pull.title,
                body=pull.body or "",
                # A deleted account leaves no user; GitHub shows it as "ghost".
                author=pull.user.login if pull.user else "ghost",
                author_type=pull.user.type if pull.user else "User",
                labels=[label.name for label in pull.labels],
                head_sha=pull.head.sha,
                head_ref=pull.head.ref,
                head_repository_id=pull.head.repo.id if pull.head.repo else None,
                base_sha=pull.base.sha,
                base_ref=pull.base.ref,
                url=pull.html_url,
                full_name=repository.full_name,
                clone_url=repository.clone_url,
                default_branch=repository.default_branch,
            )

    def review_comments(self, full_name: str, number: int) -> list[ExistingReviewComment]:
        """All inline comments, every page."""
        pull = self.pull_object(full_name, number)
        with self.errors():
            return [
                ExistingReviewComment(one.path, one.line, one.body, one.user is not None and one.user.login == self.bot_login)
                for one in pull.get_review_comments()
            ]

    def summary_comment(self, full_name: str, number: int, marker: str) -> str | None:
        """Body of our newest summary: our author *and* our marker, every page (contract A21, weakness 7)."""
        pull = self.pull_object(full_name, number)
        with self.errors():
            ours = [
                one
                for one in pull.get_issue_comments()
                if one.user is not None and one.user.login == self.bot_login and marker in (one.body or "")
            ]
            return max(ours, key=lambda one: one.updated_at).body if ours else None
