"""The command line's one client of the control API, on this machine or another.

Without KILO_API_URL it speaks to this home's admin port with the operator's key. A named address gets only a key that was named with it:
the operator's own key never leaves its machine by itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import httpx

from kilo_pipelines.cli.common import end
from kilo_pipelines.core.reasons import MEANING, Reason
from kilo_pipelines.settings import LOOPBACK, Settings

# Longer than the slowest answer, a report of 25 s that waits behind two others.
SECONDS = 90.0
# A report has 8 MiB at most; an answer beyond this comes from something else.
MOST_BYTES = 32 * 2**20
# Refusals of what was typed: the command was misused (exit status 2).
_MISUSED = frozenset(
    {
        Reason.QUERY_INVALID,
        Reason.PAYLOAD_SHAPE_MISMATCH,
        Reason.OWNER_NOT_NAMED,
        Reason.REPORT_PERIOD_INVALID,
        Reason.SETTINGS_INVALID,
    }
)


class ApiError(Exception):
    """The API can't be asked, or answers a refusal: why (None: there is no such thing), and what of it may be shown."""

    def __init__(self, reason: Reason | None, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Place:
    """Where the control API is, and the key for it."""

    base: str
    key: str = field(repr=False)
    # Whether this home's own platform is asked, beside which its secrets and its store are at hand.
    local: bool

    def ask(self, method: str, path: str, query: dict[str, Any], body: dict[str, Any] | None = None) -> bytes:
        """The bytes of an answer; what isn't given (None) is left out of the query. Raises ApiError."""
        asked = {
            name: str(value).lower() if isinstance(value, bool) else value for name, value in query.items() if value is not None
        }
        headers = {"Authorization": f"Bearer {self.key}"}
        # No redirects: the key goes where it was meant to go, and nowhere else. A proxy of the environment has no place before loopback.
        try:
            with (
                httpx.Client(
                    timeout=SECONDS, follow_redirects=False, trust_env=not self.local and not is_loopback(self.base)
                ) as client,
                client.stream(method, f"{self.base}/api/v1{path}", params=asked, json=body, headers=headers) as answer,
            ):
                content = bytearray()
                for chunk in answer.iter_bytes():
                    content += chunk
                    if len(content) > MOST_BYTES:
                        raise ApiError(Reason.API_ANSWER_UNUSABLE, f"more than {MOST_BYTES} bytes")
        except (httpx.HTTPError, httpx.InvalidURL) as failure:
            raise ApiError(Reason.API_UNREACHABLE, f"{self.base}: {type(failure).__name__}") from None
        if not answer.is_success:
            raise _refusal(answer.status_code, bytes(content))
        return bytes(content)


def _refusal(status: int, content: bytes) -> ApiError:
    try:
        told = json.loads(content)
        outcome, code, detail = told["outcome"], told.get("reason"), told.get("detail")
    except (ValueError, KeyError, TypeError, AttributeError):
        return ApiError(Reason.API_ANSWER_UNUSABLE, f"status {status}")
    if outcome == "not_found":
        return ApiError(None, "there is nothing like this, or it is another owner's")
    if code not in set(Reason):
        return ApiError(Reason.API_ANSWER_UNUSABLE, f"status {status}")
    return ApiError(Reason(code), detail or "")


@dataclass(frozen=True)
class Api:
    """Asks, and ends the command with reason and remedy when the answer is a refusal."""

    place: Place
    plain: bool

    @property
    def local(self) -> bool:
        """Whether this home's own platform is asked."""
        return self.place.local

    def get(self, path: str, **query: Any) -> Any:
        """A JSON answer."""
        return self._json(self.raw("GET", path, query))

    def post(self, path: str, body: dict[str, Any] | None = None, **query: Any) -> Any:
        """The same for something that is done."""
        return self._json(self.raw("POST", path, query, body))

    def put(self, path: str, body: dict[str, Any], **query: Any) -> Any:
        """The same for something that is changed."""
        return self._json(self.raw("PUT", path, query, body))

    def delete(self, path: str, **query: Any) -> Any:
        """The same for something that ends."""
        return self._json(self.raw("DELETE", path, query))

    def raw(self, method: str, path: str, query: dict[str, Any], body: dict[str, Any] | None = None) -> bytes:
        """The bytes of an answer; what isn't given (None) is left out of the query."""
        try:
            return self.place.ask(method, path, query, body)
        except ApiError as failure:
            if failure.reason is None:
                end(self.plain, failure.detail)
            refuse(self.plain, failure.reason, failure.detail, 2 if failure.reason in _MISUSED else 1)

    def _json(self, content: bytes) -> Any:
        try:
            return json.loads(content)
        except ValueError:
            refuse(self.plain, Reason.API_ANSWER_UNUSABLE, "no JSON")


def refuse(plain: bool, reason: Reason, detail: str, code: int = 1) -> NoReturn:
    """Ends the command with what a reason means and what to do."""
    meaning, remedy = MEANING[reason]
    end(plain, f"{f'{detail}: ' if detail else ''}{meaning} {remedy} ({reason})", code, reason=reason)


def is_loopback(address: str) -> bool:
    """Whether an address is this machine's own."""
    return urlsplit(address).hostname in LOOPBACK


def api(plain: bool) -> Api:
    """The control API that this command speaks to; ends it where the address or the key can't be used."""
    try:
        return Api(place(Settings()), plain)
    except ApiError as failure:
        assert failure.reason is not None  # noqa: S101  # only answers lack one
        refuse(plain, failure.reason, failure.detail)


def place(settings: Settings) -> Place:
    """Where these settings say that the API is, and the key that goes there. Raises ApiError."""
    if settings.api_url is None:
        host = settings.host if settings.host not in ("0.0.0.0", "::") else "127.0.0.1"  # noqa: S104  # where it listens, not where it is asked
        local = f"http://{f'[{host}]' if ':' in host else host}:{settings.admin_port}"
        return Place(local, _key(settings, settings.operator_key_file), True)
    parts = urlsplit(settings.api_url)
    safe = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK)
    if not safe or not parts.hostname or parts.username or parts.password or parts.query or parts.fragment:
        raise ApiError(Reason.API_ADDRESS_REFUSED, "KILO_API_URL")
    return Place(settings.api_url.rstrip("/"), _key(settings, None), False)


def _key(settings: Settings, default: Path | None) -> str:
    """The key that was named, else the operator's of this home."""
    if settings.api_key is not None:
        found = settings.api_key.get_secret_value().strip()
        name = "KILO_API_KEY"
    else:
        file = settings.api_key_file or default
        if file is None or not file.is_file():
            raise ApiError(Reason.API_KEY_MISSING, str(file) if file else "KILO_API_KEY_FILE")
        if file.stat().st_mode & 0o077:
            raise ApiError(Reason.API_KEY_MISSING, f"others can read {file}: chmod 600")
        found, name = file.read_text().strip(), str(file)
    if not found or not found.isascii() or not found.isprintable():
        raise ApiError(Reason.API_KEY_MISSING, f"{name} holds none")
    return found
