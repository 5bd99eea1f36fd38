"""GitHub as an App: short-lived tokens per repository and permission, reads that the engine needs (PyGithub)."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cached_property, partial
from typing import Any
from urllib.parse import urlsplit

import httpx
import jwt
import requests
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from github import Auth, Consts, Github, GithubException, GithubIntegration, RateLimitExceededException
from github.PullRequest import PullRequest
from github.Repository import Repository
from github.Requester import Requester

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.settings import LOOPBACK
from kilo_pipelines.telemetry import traces

# Half of an effect's lease (store/outbox.py): a write is over, or its answer lost, before anybody may take the effect over.
TIMEOUT_SECONDS = 10
# A cached token is given out only while it lives at least this long: longer than any single use of it.
TOKEN_MARGIN = timedelta(minutes=5)
# GitHub names no wait: "wait at least one minute" (REST API, secondary rate limits). Its limits are hourly: no wait is longer.
RATE_LIMIT_WAIT = 60.0
MAX_WAIT = 3_600.0
# The version of the API that the client was written against.
HEADERS = {"Accept": "application/vnd.github+json", "X-GitHub-Api-Version": "2022-11-28", "User-Agent": "kilo-pipelines"}
# A whole body; httpx's own time-out is per read, so that a trickle would never end.
BODY_SECONDS = 30.0


class ProviderError(Exception):
    """GitHub could not or would not: a reason code, whether trying again may help, and when (seconds)."""

    def __init__(self, reason: Reason, *, retryable: bool, retry_after_s: float | None = None, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
        self.retryable = retryable
        self.retry_after_s = retry_after_s


# GitHub's words where a plan has no drafts, as the message or as one of its errors.
_NO_DRAFTS = "Draft pull requests are not supported"


# The same of a pull request between two branches that has one.
_HAS_ONE = "A pull request already exists"


class PullExistsError(ProviderError):
    """A pull request from this branch is open; GitHub's list may not show it yet."""

    def __init__(self) -> None:
        super().__init__(Reason.PROVIDER_INVALID, retryable=True, detail=_HAS_ONE)


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


def _pull_state(repository: Repository, pull: PullRequest) -> PullState:
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


@dataclass(frozen=True)
class BranchHead:
    """The head of a repository's default branch."""

    repository_id: int
    full_name: str
    clone_url: str
    default_branch: str
    head_sha: str


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


@dataclass(frozen=True)
class InstallationNow:
    """An installation that exists; of a suspended one GitHub shows no repositories."""

    suspended: bool
    repositories: list[InstalledRepository]


@contextmanager
def provider_errors(forget: Callable[[], None] | None = None) -> Iterator[None]:
    """Turns PyGithub's exceptions into ProviderError; bodies and tokens stay out of messages. What is asked within is one span.

    With `forget` a refused token is dropped first, and the call may be tried again with a new one.
    """
    with traces.span("github") as span:
        try:
            with _translated(forget):
                yield
        except ProviderError as failure:
            span.set(reason=failure.reason)
            raise


@contextmanager
def _translated(forget: Callable[[], None] | None) -> Iterator[None]:
    try:
        yield
    except RateLimitExceededException as failure:
        raise ProviderError(
            Reason.PROVIDER_RATE_LIMITED, retryable=True, retry_after_s=retry_after(failure.headers or {}) or RATE_LIMIT_WAIT
        ) from None
    except GithubException as failure:
        if failure.status == 401 and forget is not None:
            forget()
            raise ProviderError(Reason.PROVIDER_REFUSED, retryable=True, detail="HTTP 401: the token was refused") from None
        raise _of_status(failure) from None
    except requests.RequestException as failure:
        raise ProviderError(Reason.PROVIDER_UNAVAILABLE, retryable=True, detail=type(failure).__name__) from None
    except json.JSONDecodeError:  # an answer that ends in its middle
        raise ProviderError(Reason.PROVIDER_UNAVAILABLE, retryable=True, detail="the answer is not JSON") from None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the answer asks for: Retry-After, else the reset of a used-up limit by the provider's own clock."""
    value = headers.get("retry-after", "")
    if value.isdecimal():
        return min(float(value), MAX_WAIT)
    reset, date = headers.get("x-ratelimit-reset", ""), headers.get("date", "")
    if headers.get("x-ratelimit-remaining") == "0" and reset.isdecimal():
        try:
            left = float(reset) - parsedate_to_datetime(date).timestamp()
        except ValueError:  # no clock to count by
            return None
        return min(max(1.0, left), MAX_WAIT)
    return None


def read_within(response: httpx.Response, most: int) -> bytes | None:
    """The decoded body of a streamed answer; None when it is longer. Raises TimeoutError after BODY_SECONDS."""
    until = time.monotonic() + BODY_SECONDS
    parts, size = [], 0
    for part in response.iter_bytes():
        size += len(part)
        if size > most:
            return None
        if time.monotonic() > until:
            raise TimeoutError
        parts.append(part)
    return b"".join(parts)


def _of_status(failure: GithubException) -> ProviderError:
    status, wait = failure.status, retry_after(failure.headers or {})
    if status == 429 or (status == 403 and wait is not None):
        return ProviderError(Reason.PROVIDER_RATE_LIMITED, retryable=True, retry_after_s=wait or RATE_LIMIT_WAIT)
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
        self._private_key_pem = private_key_pem
        self._auth = Auth.AppAuth(app_id, sign_func=self._sign)
        self._integration = GithubIntegration(auth=self._auth, **self._options)
        # Redirects are followed by nobody here (threats, rule 22); connections are kept over pages and repositories.
        self._http = httpx.Client(timeout=TIMEOUT_SECONDS, follow_redirects=False)
        self._tokens: dict[tuple[int, tuple[int, ...], tuple[tuple[str, str], ...]], tuple[str, datetime]] = {}

    def __repr__(self) -> str:
        return f"GitHubApp({self.api_url})"

    @cached_property
    def _key(self) -> RSAPrivateKey:
        """The App's key, read once: reading it takes far longer than signing with it, and every minted token is asked for with it."""
        key = load_pem_private_key(self._private_key_pem.encode(), password=None)
        if not isinstance(key, RSAPrivateKey):
            raise ProviderError(Reason.GITHUB_APP_MISSING, retryable=False, detail="the App's key is no RSA key")
        return key

    def _sign(self, claims: dict[str, Any]) -> str:
        return jwt.encode(claims, self._key, algorithm="RS256")

    @cached_property
    def bot_login(self) -> str:
        """The login under which this App writes."""
        with provider_errors():
            return f"{self._integration.get_app().slug}[bot]"

    def token(self, installation_id: int, repository_ids: list[int], permissions: dict[str, str]) -> str:
        """An installation token for these repositories and permissions only.

        Raises ProviderError; `permission_missing` when the owner hasn't granted one of them.
        """
        key = (installation_id, tuple(sorted(repository_ids)), tuple(sorted(permissions.items())))
        cached = self._tokens.get(key)
        if cached and cached[1] - self._clock.now() > TOKEN_MARGIN:
            return cached[0]
        with provider_errors():
            # PyGithub's helper can't name repositories: the same endpoint is asked with the same client.
            try:
                _, data = self._integration.requester.requestJsonAndCheck(
                    "POST",
                    f"/app/installations/{installation_id}/access_tokens",
                    input={"repository_ids": list(repository_ids), "permissions": permissions},
                    headers={"Accept": Consts.mediaTypeIntegrationPreview},
                )
            except GithubException as failure:
                # The same status as for a repository that isn't there; only the words differ.
                if failure.status == 422 and "permissions requested" in str(failure.message):
                    raise ProviderError(Reason.PERMISSION_MISSING, retryable=False, detail=", ".join(permissions)) from None
                raise
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
        client = Github(auth=Auth.Token(token), **self._options)
        return GitHubInstallation(client, self.bot_login, repository_ids, forget, partial(self._stream, token))

    def _stream(self, token: str, method: str, path: str, **more: Any) -> AbstractContextManager[httpx.Response]:
        headers = {**HEADERS, **more.pop("headers", {}), "Authorization": f"Bearer {token}"}
        return self._http.stream(method, self.api_url + path, headers=headers, **more)

    def stream_as_app(self, method: str, path: str, **more: Any) -> AbstractContextManager[httpx.Response]:
        """One request as the App itself, its answer's body not yet read: for what belongs to no installation."""
        return self._stream(self._auth.token, method, path, **more)

    @property
    def requester(self) -> Requester:
        """PyGithub's client of the App itself."""
        return self._integration.requester

    def installation_now(self, installation_id: int) -> InstallationNow | None:
        """The installation as GitHub tells it now; None when it is gone. Raises ProviderError."""
        try:
            with provider_errors():
                _, found = self.requester.requestJsonAndCheck("GET", f"/app/installations/{installation_id}")
        except ProviderError as failure:
            if failure.reason is Reason.PROVIDER_NOT_FOUND:
                return None
            raise
        if found.get("suspended_at") is not None:
            return InstallationNow(suspended=True, repositories=[])
        return InstallationNow(suspended=False, repositories=self.installed_repositories(installation_id))

    def installed_repositories(self, installation_id: int) -> list[InstalledRepository]:
        """Every repository of an installation."""
        with provider_errors():
            found = self._integration.get_app_installation(installation_id).get_repos()
            return [InstalledRepository(one.id, one.full_name, one.default_branch, one.private) for one in found]


class GitHubInstallation:
    """Reads and writes with one scoped token."""

    def __init__(
        self,
        client: Github,
        bot_login: str,
        repository_ids: list[int],
        forget: Callable[[], None],
        stream: Callable[..., AbstractContextManager[httpx.Response]],
    ) -> None:
        self._client = client
        self.forget = forget
        # One request with this client's token, its answer's body not yet read: for what PyGithub reads without a bound.
        self.stream = stream
        self.bot_login = bot_login
        self._repository_ids = repository_ids

    def errors(self) -> AbstractContextManager[None]:
        """`provider_errors` for calls with this client's token."""
        return provider_errors(self.forget)

    def repository(self, which: str | int) -> Repository:
        """The repository by name or by its id, provided that its id is one that this token was minted for."""
        with self.errors():
            found = self._client.get_repo(which)
        if found.id not in self._repository_ids:
            raise ProviderError(Reason.OWNER_CHANGED, retryable=False, detail="another repository has this name now")
        return found

    def pull_object(self, full_name: str, number: int) -> PullRequest:
        """PyGithub's pull request."""
        repository = self.repository(full_name)
        with self.errors():
            return repository.get_pull(number)

    def default_branch(self, full_name: str) -> BranchHead:
        """The default branch as it is now. Raises ProviderError; `provider_not_found` for an empty repository."""
        repository = self.repository(full_name)
        with self.errors():
            head = repository.get_commit(f"heads/{repository.default_branch}").sha
        return BranchHead(repository.id, repository.full_name, repository.clone_url, repository.default_branch, head)

    def pull(self, full_name: str, number: int) -> PullState:
        """The pull request's present state."""
        repository = self.repository(full_name)
        with self.errors():
            return _pull_state(repository, repository.get_pull(number))

    def find_open_pull(self, full_name: str, head_ref: str) -> PullState | None:
        """The newest open pull request from a branch of this repository, whoever opened it; None when there is none. Raises ProviderError."""
        return self._find_pull(full_name, head_ref, "open")

    def find_pull(self, full_name: str, head_ref: str) -> PullState | None:
        """The same, also when it is merged or closed by now.

        Asked before `create_pull`, so that a lost answer doesn't open a second one.
        """
        return self._find_pull(full_name, head_ref, "all")

    def _find_pull(self, full_name: str, head_ref: str, state: str) -> PullState | None:
        repository = self.repository(full_name)
        with self.errors():
            # GitHub leaves a filter out that it can't read, so what it answers is looked at again; forks have other ids.
            found = [
                one
                for one in repository.get_pulls(state=state, head=f"{repository.owner.login}:{head_ref}")
                if one.head.ref == head_ref and one.head.repo is not None and one.head.repo.id == repository.id
            ]
            newest = max(found, key=lambda one: one.number, default=None)
            # A list shows less than the pull request itself: whether it is merged would be asked of GitHub in any case.
            return None if newest is None else _pull_state(repository, repository.get_pull(newest.number))

    def create_pull(self, full_name: str, *, title: str, body: str, head: str, base: str, draft: bool) -> PullState:
        """Opens a pull request from branch `head` to branch `base` of this repository; needs pull_requests:write.

        A repository without drafts (private ones of some plans) gets an ordinary one. Raises ProviderError: `provider_invalid` when
        a branch is missing or nothing lies between them, PullExistsError when one is open already.
        """
        repository = self.repository(full_name)
        with self.errors():
            try:
                made = repository.create_pull(base, head, title=title, body=body, draft=draft)
            except GithubException as failure:
                told = json.dumps(failure.data) if failure.status == 422 else ""
                if _HAS_ONE in told:
                    raise PullExistsError from None
                if not (draft and _NO_DRAFTS in told):
                    raise
                made = repository.create_pull(base, head, title=title, body=body, draft=False)
            return _pull_state(repository, made)

    def may_write(self, full_name: str, login: str) -> bool:
        """Whether a person may write to the repository now, as its own list says; needs metadata:read. False for whom nobody knows.

        Raises ProviderError.
        """
        repository = self.repository(full_name)
        try:
            with self.errors():
                # `maintain` and custom roles that may push are told as `write` here (REST API, "Get repository permissions for a user").
                return repository.get_collaborator_permission(login) in ("admin", "write")
        except ProviderError as failure:
            if failure.reason is Reason.PROVIDER_NOT_FOUND:
                return False
            raise

    def close_pull(self, full_name: str, number: int) -> None:
        """Closes a pull request; needs pull_requests:write. Raises ProviderError."""
        pull = self.pull_object(full_name, number)
        with self.errors():
            pull.edit(state="closed")

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
