"""The model proxy: its own process, the only holder of the model key, one unix socket a session (threats, rule 5).

The socket is the session's identity, and its one way out: requests for packages are handed on to the session's registry
mirror, another process, over another socket and by a client that never had the key. Control goes over a socket in a 0700 directory. Prompts and answers stay in memory and
in no log.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Unpack

import httpx
import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from kilo_pipelines.cloud_agent.transcript import Transcript, Turn
from kilo_pipelines.core.limits import Price, Usage, cost
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.settings import Settings, current, private_dir
from kilo_pipelines.telemetry import logs, traces
from kilo_pipelines.telemetry.facts import TRACE_PATTERN, Facts

log = logging.getLogger(__name__)

BODY_BYTES = 16 * 2**20
ANSWER_BYTES = 2**20
# Longer answers are no review; the owner's budget ends them anyway.
MAX_TOKENS = 32_000
# A text of so many bytes has about a token (English prose and code: 3 to 4); where nobody tells the usage, rather too many are counted.
BYTES_A_TOKEN = 3
CONNECT_SECONDS = 10
KEEPALIVE_SECONDS = 2.0
READ_SECONDS = 300  # a model may think for minutes before its first word
_KEPT = (
    "messages",
    "tools",
    "tool_choice",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "stop",
    "parallel_tool_calls",
    "reasoning_effort",
)
_COUNTED_ENDS = ("stop", "tool_calls")


class Registration(BaseModel):
    """A session as the runner announces it."""

    model_config = ConfigDict(extra="forbid")

    session_id: str
    model: str
    turns: int
    tokens: int
    micro_usd: int | None = Field(default=None, description="what the session may cost, at `price`; None: money isn't counted")
    price: Price | None = None
    mirror: Path | None = Field(default=None, description="socket of the session's registry mirror")
    trace: str | None = Field(default=None, pattern=TRACE_PATTERN, description="below which the model's calls are told")


class Part(BaseModel):
    """The conversation that comes next: its nonce and the texts that must reach the model."""

    model_config = ConfigDict(extra="forbid")

    nonce: str
    covers: dict[str, str]


class Question(BaseModel):
    """One structured question of the platform itself: the model answers by calling the one tool, and nothing else is read."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[dict[str, str]]
    tool: dict[str, Any]
    seconds: float
    max_tokens: int
    trace: str | None = Field(default=None, pattern=TRACE_PATTERN)


@dataclass
class Session:
    """What is known of one session."""

    registration: Registration
    socket: Path
    server: uvicorn.Server
    task: asyncio.Task[None]
    transcript: Transcript = field(default_factory=Transcript)
    mirror: httpx.AsyncClient | None = None
    part: Part | None = None
    chain: Any = field(default_factory=hashlib.sha256)
    # What requests under way may still use: others see it, so that many at once don't each take the same rest.
    held: int = 0

    @property
    def usage(self) -> Usage:
        return Usage(self.transcript.tokens_in, self.transcript.tokens_out, self.transcript.cached)


class RefusedError(Exception):
    """A request that the proxy doesn't pass on."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


def rebuild(body: dict[str, Any], model: str) -> dict[str, Any]:
    """The request from an allow-list: text messages and function tools only, the model forced."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise RefusedError(400, "messages_missing")
    kept = {name: body[name] for name in _KEPT if name in body}
    kept["messages"] = [_message(one) for one in messages]
    if "tools" in kept:
        tools = kept["tools"] if isinstance(kept["tools"], list) else []
        if any(not isinstance(tool, dict) or tool.get("type") != "function" for tool in tools):
            raise RefusedError(400, "tool_kind_refused")
        kept["tools"] = [{"type": "function", "function": tool.get("function")} for tool in tools]
    asked = body.get("max_tokens")
    kept["max_tokens"] = min(asked, MAX_TOKENS) if isinstance(asked, int) and asked > 0 else MAX_TOKENS
    if kept.get("stream"):
        kept["stream_options"] = {"include_usage": True}
    return {**kept, "model": model}


def _message(message: dict[str, Any]) -> dict[str, Any]:
    allowed: dict[str, Any] = {
        name: message[name]
        for name in ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content")
        if name in message
    }
    content = allowed.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise RefusedError(400, "content_kind_refused")
        allowed["content"] = [{"type": "text", "text": part.get("text", "")} for part in content]
    elif content is not None and not isinstance(content, str):
        raise RefusedError(400, "content_kind_refused")
    return allowed


def message_texts(body: dict[str, Any]) -> list[str]:
    """Texts of the user's and tools' messages."""
    texts = []
    for message in body["messages"]:
        if message.get("role") not in ("user", "tool"):
            continue
        content = message.get("content")
        texts += [content] if isinstance(content, str) else [part["text"] for part in content or []]
    return texts


@dataclass
class Answer:
    """An answer as it is put together from a stream or a whole."""

    text: str = ""
    arguments: dict[int, str] = field(default_factory=dict)
    finish: str | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    cached: int = 0

    def take(self, event: dict[str, Any]) -> None:
        """One chunk (or the whole) of a completion."""
        for choice in event.get("choices") or []:
            delta = choice.get("delta") or choice.get("message") or {}
            self.text += delta.get("content") or ""
            for position, call in enumerate(delta.get("tool_calls") or []):
                index = call.get("index", position)
                self.arguments[index] = self.arguments.get(index, "") + ((call.get("function") or {}).get("arguments") or "")
            self.finish = choice.get("finish_reason") or self.finish
        usage = event.get("usage") or {}
        self.tokens_in = usage.get("prompt_tokens") or self.tokens_in
        self.tokens_out = usage.get("completion_tokens") or self.tokens_out
        self.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or self.cached

    def settle(self, body: dict[str, Any]) -> None:
        """Where the provider told no usage (a cut stream, a server that counts none), what was sent and came counts by its size."""
        if not self.tokens_in:
            self.tokens_in = estimate(body)
        if not self.tokens_out:
            self.tokens_out = -(-len((self.text + "".join(self.arguments.values())).encode()) // BYTES_A_TOKEN)


def estimate(body: dict[str, Any]) -> int:
    """About how many tokens a request sends, rather too many."""
    sent = json.dumps([body.get("messages"), body.get("tools")], ensure_ascii=False)
    return -(-len(sent.encode()) // BYTES_A_TOKEN)


@dataclass(frozen=True)
class Upstream:
    """The model's side as it is set up now. No address: there is none yet."""

    url: str | None
    key: str
    models: frozenset[str]

    def __repr__(self) -> str:
        return f"Upstream({self.url})"


class ModelProxy:
    """Sessions and their listeners. `upstream` is asked for each request: a set-up changes it while sessions run."""

    def __init__(self, directory: Path, upstream: Callable[[], Upstream]) -> None:
        self._directory = directory
        self._upstream = upstream
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            # Servers close idle connections after 5 s and more; a request on one that just closed would look like an outage.
            limits=httpx.Limits(keepalive_expiry=KEEPALIVE_SECONDS),
            follow_redirects=False,
            trust_env=False,
        )
        self._sessions: dict[str, Session] = {}

    # -- control ---------------------------------------------------------------------------------------------------

    def control(self) -> Starlette:
        """The control application; its socket lies in a 0700 directory."""
        return Starlette(
            routes=[
                Route("/health", self._health, methods=["GET"]),
                Route("/questions", self._question, methods=["POST"]),
                Route("/sessions", self._register, methods=["POST"]),
                Route("/sessions/{session}/part", self._next_part, methods=["POST"]),
                Route("/sessions/{session}", self._evidence, methods=["GET"]),
                Route("/sessions/{session}", self._close, methods=["DELETE"]),
            ]
        )

    async def _health(self, _request: Request) -> Response:
        return JSONResponse({"sessions": len(self._sessions)})

    async def _register(self, request: Request) -> Response:
        try:
            registration = Registration.model_validate(await request.json())
        except ValidationError as failure:
            return JSONResponse({"error": str(failure)}, 400)
        if registration.model not in self._upstream().models:
            return JSONResponse({"error": "the platform doesn't allow this model", "reason": Reason.MODEL_NOT_ALLOWED}, 403)
        await self._drop(registration.session_id)
        name = hashlib.sha256(registration.session_id.encode()).hexdigest()[:16]
        path = self._directory / f"m-{name}.sock"
        path.unlink(missing_ok=True)
        routes = [Route("/v1/chat/completions", self._completions(registration.session_id), methods=["POST"])]
        mirror = None
        if registration.mirror is not None:
            transport = httpx.AsyncHTTPTransport(uds=str(registration.mirror))
            mirror = httpx.AsyncClient(transport=transport, timeout=READ_SECONDS, trust_env=False)
            routes.append(Route("/registry/{path:path}", _packages(mirror), methods=["GET"]))
        application = Starlette(routes=routes)
        config = uvicorn.Config(
            application,
            uds=str(path),
            log_config=None,
            log_level="error",  # an agent can send what is no HTTP as often as it likes
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        task = asyncio.create_task(server._serve())
        while not server.started:
            if task.done():
                return JSONResponse({"error": "the session's socket can't be opened"}, 500)
            await asyncio.sleep(0.01)
        transcript = Transcript(meter=secrets.token_hex(16))
        self._sessions[registration.session_id] = Session(registration, path, server, task, transcript, mirror=mirror)
        return JSONResponse({"socket": str(path)})

    async def _question(self, request: Request) -> Response:
        """Asks once; `arguments` of the tool's call as the model wrote them, or the reason why there are none."""
        question = Question.model_validate(await request.json())
        with traces.following(question.trace, "model_call") as span:
            return await self._ask(question, span)

    async def _ask(self, question: Question, span: traces.Span) -> Response:
        body = {
            "model": question.model,
            "messages": question.messages,
            "tools": [{"type": "function", "function": question.tool}],
            "tool_choice": {"type": "function", "function": {"name": question.tool["name"]}},
            "max_tokens": question.max_tokens,
        }
        if question.model not in self._upstream().models:
            return JSONResponse({"reason": Reason.MODEL_NOT_ALLOWED})
        if self._upstream().url is None:
            return JSONResponse({"reason": Reason.MODEL_MISSING})
        try:
            async with asyncio.timeout(question.seconds):
                upstream = await self._client.send(self._request(body), stream=True)
                try:
                    content = await _bounded(upstream)
                finally:
                    await upstream.aclose()
        except (httpx.HTTPError, TimeoutError) as failure:
            span.set(reason=Reason.MODEL_UNREACHABLE)
            log.warning("the model doesn't answer a question: %s", type(failure).__name__)
            # What timed out was sent, and will be on the bill.
            sent = estimate(body) if isinstance(failure, TimeoutError | httpx.ReadError | httpx.ReadTimeout) else 0
            return JSONResponse({"reason": Reason.MODEL_UNREACHABLE, "meter": secrets.token_hex(16), "tokens_in": sent})
        span.set(status=upstream.status_code)
        if upstream.status_code != 200:
            log.warning("the model answers a question with HTTP %s", upstream.status_code)
            return JSONResponse({"reason": _refusal(upstream.status_code)})
        answer = Answer()
        with suppress(ValueError):
            answer.take(json.loads(content))
        answer.settle(body)
        usage = {"tokens_in": answer.tokens_in, "tokens_out": answer.tokens_out, "cached": answer.cached}
        span.set(tokens_in=answer.tokens_in, tokens_out=answer.tokens_out)
        return JSONResponse({"arguments": answer.arguments.get(0), "meter": secrets.token_hex(16), **usage})

    async def _next_part(self, request: Request) -> Response:
        session = self._sessions.get(request.path_params["session"])
        if session is None:
            return JSONResponse({"error": "unknown session"}, 404)
        session.part = Part.model_validate(await request.json())
        return JSONResponse({})

    async def _evidence(self, request: Request) -> Response:
        session = self._sessions.get(request.path_params["session"])
        if session is None:
            return JSONResponse({"error": "unknown session"}, 404)
        session.transcript.sha256 = session.chain.hexdigest()
        return JSONResponse(session.transcript.model_dump(mode="json"))

    async def _close(self, request: Request) -> Response:
        final = await self._drop(request.path_params["session"])
        if final is None:
            return JSONResponse({"error": "unknown session"}, 404)
        return JSONResponse(final.model_dump(mode="json"))

    async def _drop(self, session_id: str) -> Transcript | None:
        """Ends a session; its last reading. Requests still under way count with all that they may use: the provider may answer them."""
        session = self._sessions.pop(session_id, None)
        final = None
        if session is not None:
            final = session.transcript.model_copy(update={"tokens_out": session.transcript.tokens_out + session.held})
            session.server.should_exit = True
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(session.task, 3)
            session.socket.unlink(missing_ok=True)
            if session.mirror is not None:
                await session.mirror.aclose()
        return final

    # -- the agent's side --------------------------------------------------------------------------------------------

    def _completions(self, session_id: str) -> Any:
        async def endpoint(request: Request) -> Response:
            session = self._sessions.get(session_id)
            if session is None:
                return JSONResponse({"error": {"message": "no session", "code": "no_session"}}, 503)
            session.transcript.requests += 1
            try:
                body = rebuild(await _json(request), session.registration.model)
                held = self._check_budget(session, body)
                session.held += held
                try:
                    return await self._forward(session, body, held)
                except BaseException:
                    session.held -= held
                    raise
            except RefusedError as refusal:
                return JSONResponse({"error": {"message": refusal.code, "type": "proxy", "code": refusal.code}}, refusal.status)

        return endpoint

    @staticmethod
    def _check_budget(session: Session, body: dict[str, Any]) -> int:
        """What this request may use, which bounds its answer; 402 ends the agent at once, with 429 it would go on asking.

        What others under way may use is gone already: the cap is passed by no more than the estimate of one request's size is wrong.
        """
        transcript, limits = session.transcript, session.registration
        left = limits.tokens - transcript.tokens_in - transcript.tokens_out - session.held
        sent = estimate(body)
        broke = False
        if limits.micro_usd is not None and limits.price is not None:
            rest = limits.micro_usd - cost(limits.price, session.usage) - limits.price.worst(session.held)
            broke = rest < cost(limits.price, Usage(sent, 0))
            dearest = max(limits.price.input, limits.price.output)
            left = min(left, int(rest / dearest)) if dearest else left
        if transcript.requests > 2 * limits.turns or len(transcript.turns) >= limits.turns or broke or left <= sent:
            transcript.last_failure = Reason.BUDGET_EXCEEDED
            raise RefusedError(402, "budget_exceeded")
        body["max_tokens"] = min(body["max_tokens"], left - sent)
        return sent + int(body["max_tokens"])

    def _request(self, body: dict[str, Any]) -> httpx.Request:
        """The one endpoint, with the key as it is now."""
        upstream = self._upstream()
        headers = {"authorization": f"Bearer {upstream.key}"}
        return self._client.build_request("POST", f"{str(upstream.url).rstrip('/')}/chat/completions", json=body, headers=headers)

    async def _forward(self, session: Session, body: dict[str, Any], held: int) -> Response:
        begun = time.time_ns()
        if self._upstream().url is None:
            session.transcript.last_failure = Reason.MODEL_MISSING
            raise RefusedError(402, "model_missing")
        try:
            upstream = await self._client.send(self._request(body), stream=True)
        except httpx.HTTPError as failure:
            session.transcript.last_failure = Reason.MODEL_UNREACHABLE
            _tell(session, begun, reason=Reason.MODEL_UNREACHABLE)
            log.warning("the model doesn't answer: %s", type(failure).__name__)
            raise RefusedError(503, "model_unreachable") from None
        if upstream.status_code != 200:
            await upstream.aclose()
            log.warning("the model answers HTTP %s", upstream.status_code)
            session.transcript.last_failure = _refusal(upstream.status_code)
            _tell(session, begun, status=upstream.status_code, reason=session.transcript.last_failure)
            passing = session.transcript.last_failure is Reason.MODEL_UNREACHABLE
            raise RefusedError(upstream.status_code if passing else 402, "model_refused")
        if body.get("stream"):
            return StreamingResponse(self._pass_on(session, body, upstream, begun, held), media_type="text/event-stream")
        answer = Answer()
        try:
            content = await upstream.aread()
            with suppress(ValueError):
                answer.take(json.loads(content))
        finally:
            await upstream.aclose()
            self._count(session, body, answer)
        self._record(session, body, answer)
        _tell(session, begun, status=200, tokens_in=answer.tokens_in, tokens_out=answer.tokens_out)
        session.held -= held
        return Response(content, media_type="application/json")

    async def _pass_on(
        self, session: Session, body: dict[str, Any], upstream: httpx.Response, begun: int, held: int
    ) -> AsyncIterator[bytes]:
        """Passes the stream on and reads it; only one that ended cleanly is a turn, and each is paid for."""
        answer, pending, ended, counted = Answer(), b"", False, False
        try:
            async for chunk in upstream.aiter_bytes():
                pending += chunk
                *lines, pending = pending.split(b"\n")
                for line in lines:
                    if line.startswith(b"data:"):
                        data = line[5:].strip()
                        ended = ended or data == b"[DONE]"
                        with suppress(ValueError):
                            answer.take(json.loads(data))
                if ended:
                    # Before the agent sees the end: it may be gone, with its result, the moment it does.
                    if not counted:
                        counted = True
                        self._count(session, body, answer)
                        self._record(session, body, answer)
                    ended = False
                yield chunk
        except httpx.HTTPError:
            session.transcript.last_failure = Reason.MODEL_UNREACHABLE
        finally:
            session.held -= held
            if not counted:  # cut, by the provider or by an agent that left: it was answered so far all the same
                self._count(session, body, answer)
            _tell(session, begun, status=200, tokens_in=answer.tokens_in, tokens_out=answer.tokens_out)
            await upstream.aclose()

    @staticmethod
    def _count(session: Session, body: dict[str, Any], answer: Answer) -> None:
        """What a request cost, however it ended."""
        answer.settle(body)
        transcript = session.transcript
        transcript.tokens_in += answer.tokens_in
        transcript.tokens_out += answer.tokens_out
        transcript.cached += answer.cached

    @staticmethod
    def _record(session: Session, body: dict[str, Any], answer: Answer) -> None:
        """Notes a turn when it is one: tools offered, the nonce in the request, a clean end."""
        transcript = session.transcript
        session.chain.update(json.dumps([body, answer.text, answer.arguments], sort_keys=True).encode())
        part = session.part
        if part is None or not body.get("tools") or answer.finish not in _COUNTED_ENDS:
            return
        texts = message_texts(body)
        if not any(part.nonce in text for text in texts):
            return
        number = len(transcript.turns) + 1
        transcript.turns.append(
            Turn(
                number=number,
                nonce=part.nonce,
                text=answer.text,
                arguments=[answer.arguments[key] for key in sorted(answer.arguments)],
            )
        )
        for entry_id, text in part.covers.items():
            if entry_id not in transcript.covered and any(text in one for one in texts):
                transcript.covered[entry_id] = number


def _tell(of: Session, begun: int, **facts: Unpack[Facts]) -> None:
    """The span of one call of the model that is over."""
    registration = of.registration
    facts["session"] = registration.session_id
    traces.past("model_call", begun, time.time_ns(), parent=registration.trace, **facts)


def _refusal(status: int) -> Reason:
    """What a status other than 200 means: it may pass, somebody has to pay, or (wrong key, redirect) our operator has to act."""
    if status in (408, 429, 500, 502, 503, 504):
        return Reason.MODEL_UNREACHABLE
    return Reason.INSUFFICIENT_CREDITS if status == 402 else Reason.MODEL_REFUSED


async def _bounded(answer: httpx.Response) -> bytes:
    """The body; a longer one than any answer to a question is cut, which makes it no JSON."""
    content = bytearray()
    async for chunk in answer.aiter_bytes():
        content += chunk
        if len(content) > ANSWER_BYTES:
            break
    return bytes(content[:ANSWER_BYTES])


def _packages(mirror: httpx.AsyncClient) -> Callable[[Request], Awaitable[Response]]:
    """Hands method and path on to the mirror, nothing else of the request."""

    async def endpoint(request: Request) -> Response:
        if request.scope["query_string"]:
            return JSONResponse({"error": "query_refused"}, 400)
        path = request.scope["raw_path"]
        address = httpx.URL("http://mirror").copy_with(raw_path=path)
        if address.raw_path != path:  # the client would resolve dots that the mirror must see
            return JSONResponse({"error": "path_refused"}, 400)
        try:
            answer = await mirror.send(mirror.build_request(request.method, address), stream=True)
        except (httpx.HTTPError, httpx.InvalidURL):
            return JSONResponse({"error": "mirror_unreachable"}, 502)
        kind = answer.headers.get("content-type", "application/octet-stream")
        closing = BackgroundTask(answer.aclose)
        return StreamingResponse(answer.aiter_raw(), answer.status_code, {"content-type": kind}, background=closing)

    return endpoint


async def _json(request: Request) -> dict[str, Any]:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES:
            raise RefusedError(413, "body_too_large")
    try:
        decoded = json.loads(bytes(body))
    except (ValueError, RecursionError):
        raise RefusedError(400, "body_not_json") from None
    if not isinstance(decoded, dict):
        raise RefusedError(400, "body_not_json")
    return decoded


def control_socket(settings: Settings) -> Path:
    """Where the runner finds the proxy."""
    return settings.sockets / "proxy" / "control.sock"


def _present_upstream() -> Upstream:
    """Address, key and models as they are now; files are read anew after one of them changed."""
    settings = current()
    key = settings.model_key_file
    changed = key.stat().st_mtime_ns if key.exists() else 0
    return Upstream(settings.model_base_url, _key(str(key), changed), frozenset(settings.all_models))


@lru_cache(maxsize=1)
def _key(file: str, changed: int) -> str:
    return Path(file).read_text().strip() if changed else ""


def main() -> None:
    """Serves until SIGTERM."""
    settings = Settings()
    logs.set_up(settings, "model-proxy")
    traces.arm(settings, "model-proxy")
    path = control_socket(settings)
    private_dir(path.parent)
    for stale in path.parent.glob("*.sock"):
        stale.unlink()
    if settings.model_base_url is None:
        log.warning("no model is set up: sessions end with %s until `kilo-pipelines setup model`", Reason.MODEL_MISSING)
    proxy = ModelProxy(path.parent, _present_upstream)
    os.umask(0o077)
    uvicorn.run(proxy.control(), uds=str(path), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2)


if __name__ == "__main__":
    main()
