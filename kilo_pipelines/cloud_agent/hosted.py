"""The hosted Cloud Agent's client: tRPC over HTTP, one call each, every answer classified into exactly one outcome.

Source of calls and errors: contract of the Cloud Agent, A3 to A7. When to call again is the engine's (`ops/hosted_session.py`);
here only a refused token is read anew, once. Nothing that this module raises holds a token, a header or a prompt.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.redact import BLACK, redact
from kilo_pipelines.core.text import clean
from kilo_pipelines.providers import outbound
from kilo_pipelines.settings import Settings

# An answer is a small object; the largest holds one assistant's text, itself capped by the service's queue.
ANSWER_BYTES = 4 * 2**20
# The service answers once a turn is admitted, within seconds (contract C1); the older one prepares the workspace first.
SECONDS = 60.0
CONNECT_SECONDS = 5.0
DETAIL_CHARS = 300
# Both planes' ids (A1).
SESSION_ID = re.compile(r"(?:agent|workspace)_[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")

# A7: what the service's clients look for in an error's text, lower case.
_BILLING = (
    "insufficient credits",
    "paid model",
    "add credits",
    "credits required",
    "credit balance is too low",
    "insufficient funds",
    "payment required",
)
# A7: rejections of a second `initiate`; its effect is there.
_INITIATED = ("already initiated", "already been initiated", "already_initiated")
# A7: conflicts that pass, where the service doesn't say so itself.
_PASSING = frozenset({"COMPUTE_STOPPING", "creation_in_progress"})


class Action(StrEnum):
    """What an answer asks of the caller; every answer asks exactly one thing."""

    DONE = "done"
    STARTED = "started"  # the effect is there already: a success of `initiate`, an error of anything else
    REFRESH = "refresh"  # another token, once
    RETRY = "retry"  # later, a bounded number of times
    BILLING = "billing"  # ends the work; the owner's service waits
    FAIL = "fail"


@dataclass(frozen=True)
class Answer:
    """A classified answer; `data` is the result of DONE, `reason` and `detail` are of everything else."""

    action: Action
    reason: Reason | None = None
    data: Any = None
    detail: str = ""


class CloudAgentError(Exception):
    """The service could not or would not; `retry`: the same call may be made again later."""

    def __init__(self, reason: Reason, *, retry: bool, detail: str = "", started: bool = False) -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
        self.retry = retry
        self.detail = detail
        self.started = started


def classify(status: int, body: bytes) -> Answer:
    """The one outcome of an HTTP answer (contract A7). An assistant's words in a success are never taken for an error."""
    try:
        decoded = json.loads(body) if len(body) <= ANSWER_BYTES else None
    except (ValueError, RecursionError):
        decoded = None
    if 200 <= status < 300:
        result = decoded.get("result") if isinstance(decoded, dict) else None
        if isinstance(result, dict) and "data" in result:
            return Answer(Action.DONE, data=result["data"])
        return Answer(Action.FAIL, Reason.CLOUD_AGENT_PROTOCOL, detail=f"HTTP {status} without result.data")
    error = decoded.get("error") if isinstance(decoded, dict) else None
    known = error if isinstance(error, dict) else {}
    data = known["data"] if isinstance(known.get("data"), dict) else {}
    domain, message = data.get("error"), known.get("message")
    detail = f"HTTP {status}" + "".join(f", {one}" for one in (domain, message) if isinstance(one, str))
    lower = body.decode(errors="replace").lower()
    if status == 402 or (status >= 400 and any(one in lower for one in _BILLING)):
        return Answer(Action.BILLING, Reason.INSUFFICIENT_CREDITS, detail=detail)
    if status >= 500:
        return Answer(Action.RETRY, Reason.CLOUD_AGENT_UNAVAILABLE, detail=detail)
    if status < 400 or not isinstance(error, dict):
        return Answer(Action.FAIL, Reason.CLOUD_AGENT_PROTOCOL, detail=f"HTTP {status} without an error object")
    if status in (400, 409) and any(one in lower for one in _INITIATED):
        return Answer(Action.STARTED, Reason.CLOUD_AGENT_INVALID, detail=detail)
    if status == 401:
        return Answer(Action.REFRESH, Reason.CLOUD_AGENT_REFUSED, detail=detail)
    if status == 403:
        return Answer(Action.FAIL, Reason.CLOUD_AGENT_REFUSED, detail=detail)
    if status == 404:
        return Answer(Action.FAIL, Reason.CLOUD_AGENT_SESSION_GONE, detail=detail)
    if status == 409:
        return _conflict(data, detail)
    if status == 429:
        return Answer(Action.RETRY, Reason.CLOUD_AGENT_BUSY, detail=detail)
    return Answer(Action.FAIL, Reason.CLOUD_AGENT_INVALID, detail=detail)


def _conflict(data: dict[str, Any], detail: str) -> Answer:
    if data.get("error") == "EXECUTION_IN_PROGRESS" or "activeExecutionId" in data:
        return Answer(Action.STARTED, Reason.CLOUD_AGENT_BUSY, detail=detail)
    if data.get("retryable") is True or (isinstance(data.get("error"), str) and data["error"] in _PASSING):
        return Answer(Action.RETRY, Reason.CLOUD_AGENT_BUSY, detail=detail)
    return Answer(Action.FAIL, Reason.CLOUD_AGENT_INVALID, detail=detail)


class _Told(BaseModel):
    """What the service says; what it says beyond that is left aside."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)


class Prepared(_Told):
    """A registered session."""

    session_id: str = Field(alias="cloudAgentSessionId", pattern=f"^{SESSION_ID.pattern}$")
    kilo_session_id: str | None = Field(default=None, alias="kiloSessionId", max_length=200)


class Ack(_Told):
    """A durably admitted turn (A5); `messageId` is absent in older services, where `executionId` is the turn's name."""

    execution_id: str = Field(alias="executionId", min_length=1, max_length=200)
    message_id: str | None = Field(default=None, alias="messageId", min_length=1, max_length=200)

    @property
    def turn(self) -> str:
        return self.message_id or self.execution_id


class Execution(_Told):
    """The session's present or last turn (A6)."""

    id: str = Field(min_length=1, max_length=200)


class SessionView(_Told):
    """A session as the service tells it (A6)."""

    session_id: str = Field(alias="sessionId")
    initial_message_id: str | None = Field(default=None, alias="initialMessageId", max_length=200)
    execution: Execution | None = None

    @property
    def first_turn(self) -> str | None:
        return self.initial_message_id or (self.execution.id if self.execution else None)


class Assistant(_Told):
    """The last message of a completed turn."""

    text: str | None = None


class MessageResult(_Told):
    """The exact outcome of one turn. `failure` is untyped on purpose: an odd one is dropped alone (A9)."""

    status: str
    failure: Any = None
    assistant: Assistant | None = None


class SessionHealth(_Told):
    """Whether somebody still works (A6)."""

    sandbox: str = Field(alias="sandboxStatus")
    execution: str = Field(alias="executionHealth")


T = TypeVar("T", bound=_Told)
# (method, URL, body, headers) to (status, at most ANSWER_BYTES + 1 bytes); raises UnreachableError, AnswerLostError, AddressRefusedError.
Send = Callable[[str, str, bytes | None, dict[str, str]], tuple[int, bytes]]


def guarded(*, offline: bool) -> Send:
    """The way out: https to a public address, which is vetted at every call; beside the offline twin this machine."""

    def send(method: str, url: str, raw: bytes | None, headers: dict[str, str]) -> tuple[int, bytes]:
        asked = outbound.exchange(
            method,
            url,
            address=outbound.vetted_address(url, loopback=offline),
            headers={"content-type": "application/json; charset=utf-8", **headers},
            content=raw or b"",
            most=ANSWER_BYTES + 1,  # one more tells that there was more
            seconds=SECONDS,
            connect=CONNECT_SECONDS,
        )
        answer = asyncio.run(asked)
        return answer.status, answer.content

    return send


def client_of(settings: Settings) -> HostedClient:
    """The client of these settings; CloudAgentError `agent_unavailable` while address, token or key are missing."""
    files = (settings.cloud_agent_token_file, settings.cloud_agent_key_file)
    missing = [file.name for file in files if not file.is_file()]
    if settings.cloud_agent_url is None or missing:
        lacking = ["KILO_CLOUD_AGENT_URL"] if settings.cloud_agent_url is None else []
        raise CloudAgentError(Reason.AGENT_UNAVAILABLE, retry=False, detail=f"missing: {', '.join(lacking + missing)}")
    token, key = (partial(_secret, file) for file in files)
    return HostedClient(settings.cloud_agent_url, token, key, guarded(offline=settings.offline))


def _secret(file: Path) -> str:
    return file.read_text().strip()


class HostedClient:
    """Calls of one service with one account's token. Tokens are read at each call, so that a renewed one is used at once."""

    def __init__(self, base_url: str, token: Callable[[], str], internal_key: Callable[[], str], send: Send) -> None:
        self._base = base_url.rstrip("/")
        self._token = token
        self._internal_key = internal_key
        self._send = send

    def prepare(self, wanted: dict[str, Any]) -> Prepared:
        """Registers a session; with the same `operationKey` and input again it may be the same one. Costs nothing until initiated."""
        return self._read(Prepared, self._mutate("prepareSession", wanted, internal=True))

    def initiate(self, session_id: str) -> Ack | None:
        """Queues the first turn; None when it was queued before, by a call whose answer was lost."""
        try:
            return self._read(Ack, self._mutate("initiateFromKilocodeSessionV2", {"cloudAgentSessionId": session_id}))
        except CloudAgentError as failure:
            if failure.started:
                return None
            raise

    def send_message(self, session_id: str, prompt: str, *, mode: str, model: str) -> Ack:
        """Queues a further turn."""
        wanted = {"cloudAgentSessionId": session_id, "prompt": prompt, "mode": mode, "model": model}
        return self._read(Ack, self._mutate("sendMessageV2", wanted))

    def interrupt(self, session_id: str) -> None:
        """Stops all turns of a session; an unknown session is no error (A11)."""
        self._mutate("interruptSession", {"sessionId": session_id})

    def delete(self, session_id: str) -> None:
        """Removes a session with its workspace; an unknown one is no error (A11)."""
        self._mutate("deleteSession", {"sessionId": session_id})

    def session(self, session_id: str) -> SessionView:
        """A session; CloudAgentError `cloud_agent_protocol` when the service tells of another one."""
        found = self._read(SessionView, self._query("getSession", {"cloudAgentSessionId": session_id}))
        if found.session_id != session_id:
            raise CloudAgentError(Reason.CLOUD_AGENT_PROTOCOL, retry=False, detail="getSession told of another session")
        return found

    def result(self, session_id: str, message_id: str) -> MessageResult:
        """The outcome of one turn."""
        asked = {"cloudAgentSessionId": session_id, "messageId": message_id}
        return self._read(MessageResult, self._query("getMessageResult", asked))

    def session_health(self, session_id: str) -> SessionHealth:
        """Whether sandbox and turn are alive; wakes nothing."""
        return self._read(SessionHealth, self._mutate("getSessionHealth", {"cloudAgentSessionId": session_id}))

    def health(self) -> str:
        """The service's own word on itself, `ok` when it is well."""
        data = self._query("health", None)
        return clean(str(data.get("status", "")))[:60] if isinstance(data, dict) else ""

    # -- one call --------------------------------------------------------------------------------------------------------

    def _mutate(self, name: str, wanted: dict[str, Any], *, internal: bool = False) -> Any:
        return self._call("POST", f"{self._base}/trpc/{name}", json.dumps(wanted).encode(), internal=internal)

    def _query(self, name: str, asked: dict[str, Any] | None) -> Any:
        tail = f"?input={quote(json.dumps(asked), safe='')}" if asked is not None else ""
        return self._call("GET", f"{self._base}/trpc/{name}{tail}", None, internal=False)

    def _call(self, method: Literal["GET", "POST"], url: str, raw: bytes | None, *, internal: bool) -> Any:
        token = self._token()
        answer, secrets = self._once(method, url, raw, token, internal=internal)
        if answer.action is Action.REFRESH and (renewed := self._token()) != token:
            answer, secrets = self._once(method, url, raw, renewed, internal=internal)
        if answer.action is Action.DONE:
            return answer.data
        assert answer.reason is not None  # noqa: S101  # everything but DONE has one
        raise CloudAgentError(
            answer.reason,
            # A turn of an older service's session is in progress: the next one is taken later.
            retry=answer.action is Action.RETRY or answer.reason is Reason.CLOUD_AGENT_BUSY,
            detail=_scrubbed(answer.detail, secrets),
            started=answer.action is Action.STARTED,
        )

    def _once(self, method: str, url: str, raw: bytes | None, token: str, *, internal: bool) -> tuple[Answer, tuple[str, ...]]:
        key = self._internal_key() if internal else ""
        # Compressed answers would be read to any size before they are measured.
        headers = {"authorization": f"Bearer {token}", "accept-encoding": "identity"}
        headers |= {"x-internal-api-key": key} if key else {}
        try:
            status, body = self._send(method, url, raw, headers)
        except (outbound.UnreachableError, outbound.AnswerLostError) as failure:
            return Answer(Action.RETRY, Reason.CLOUD_AGENT_UNAVAILABLE, detail=str(failure)), (token, key)
        except outbound.AddressRefusedError as failure:
            return Answer(Action.FAIL, Reason.CLOUD_AGENT_ADDRESS_REFUSED, detail=str(failure)), (token, key)
        return classify(status, body), (token, key)

    @staticmethod
    def _read(shape: type[T], data: Any) -> T:
        try:
            return shape.model_validate(data)
        except ValidationError as failure:
            places = ", ".join(".".join(str(one) for one in error["loc"]) for error in failure.errors()[:5])
            raise CloudAgentError(Reason.CLOUD_AGENT_PROTOCOL, retry=False, detail=f"{shape.__name__}: {places}") from None


def _scrubbed(text: str, secrets: tuple[str, ...]) -> str:
    """A service's own words without our tokens, which it may have repeated, and without control characters."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, BLACK)
    return redact(clean(text))[:DETAIL_CHARS]
