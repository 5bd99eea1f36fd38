"""The hosted Cloud Agent's API: sessions, turns and callbacks, with an agent that is the scripted model or follows a script.

Sessions live in memory: they end with the twin. Inputs, errors and reads follow the API's contract; what a test needs beyond the
honest course (balance, behaviours, odd callbacks) is set by `configure`.
"""

from __future__ import annotations

import json
import secrets
import shlex
import threading
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal
from uuid import UUID, uuid4

import anyio
from pydantic import AnyHttpUrl, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kilo_twin import model
from kilo_twin.state import Twin, git, now

QUEUE = 10
# Of callbacks, in seconds; shortened by the setting `scale`.
RETRIES = (60, 120, 240, 480)
BUILT_IN = frozenset({"code", "plan", "debug", "orchestrator", "ask", "build", "architect", "custom"})
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("bash", "read", "write")]
STEPS = 60
PATH = "result.json"
NAMES = {
    400: "BAD_REQUEST",
    401: "UNAUTHORIZED",
    402: "PAYMENT_REQUIRED",
    404: "NOT_FOUND",
    409: "CONFLICT",
    429: "TOO_MANY_REQUESTS",
    500: "INTERNAL_SERVER_ERROR",
    502: "BAD_GATEWAY",
    503: "SERVICE_UNAVAILABLE",
}
# (url, JSON body, headers) to the HTTP status; 0 when nobody answers.
Post = Callable[[str, dict[str, Any], dict[str, str]], int]

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$")]
Branch = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[A-Za-z0-9._\-/]+$")]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[A-Za-z0-9._\-/:]+$")]
Mode = Annotated[str, StringConstraints(max_length=50, pattern=r"^[a-z][a-z0-9-]*$")]
Variant = Annotated[str, StringConstraints(max_length=50, pattern=r"^[A-Za-z]+$")]


class _Input(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CallbackTarget(_Input):
    """Where a turn's end is told."""

    url: AnyHttpUrl
    headers: dict[str, str] = {}


class Prepare(_Input):
    """`prepareSession`: the fields that a caller without profiles, skills and attachments may send."""

    prompt: str = Field(min_length=1, max_length=100_000)
    mode: Mode
    appendSystemPrompt: str | None = Field(default=None, max_length=10_000)
    model: ModelName
    variant: Variant | None = None
    githubRepo: Name | None = None
    gitUrl: Annotated[str, StringConstraints(pattern=r"^https://")] | None = None
    githubToken: str | None = None
    gitToken: str | None = None
    platform: Literal["github", "gitlab", "bitbucket"] | None = None
    envVars: dict[Annotated[str, StringConstraints(max_length=128)], Annotated[str, StringConstraints(max_length=4096)]] = Field(
        default={}, max_length=50
    )
    setupCommands: list[Annotated[str, StringConstraints(max_length=500)]] = Field(default=[], max_length=20)
    upstreamBranch: Branch | None = None
    autoCommit: bool = False
    condenseOnComplete: bool = False
    shallow: bool = False
    callbackTarget: CallbackTarget | None = None
    kilocodeOrganizationId: UUID | None = None
    createdOnPlatform: str | None = Field(default=None, max_length=100)
    gateThreshold: Literal["off", "all", "warning", "critical"] | None = None
    autoInitiate: bool = False
    operationKey: UUID | None = None

    @model_validator(mode="after")
    def _coherent(self) -> Prepare:
        if (self.githubRepo is None) == (self.gitUrl is None):
            raise ValueError("exactly one of githubRepo and gitUrl")
        if self.mode not in BUILT_IN:
            raise ValueError("unknown mode")
        if self.mode == "custom" and not (self.appendSystemPrompt or "").strip():
            raise ValueError("mode custom needs appendSystemPrompt")
        if self.envVars.keys() & {"HOME", "SESSION_ID", "SESSION_HOME"}:
            raise ValueError("a reserved name in envVars")
        return self


class Initiate(_Input):
    """`initiateFromKilocodeSessionV2`, strict."""

    cloudAgentSessionId: str


class SendMessage(_Input):
    """`sendMessageV2` with a prompt."""

    cloudAgentSessionId: str
    prompt: str = Field(min_length=1, max_length=100_000)
    mode: Mode
    model: ModelName
    variant: Variant | None = None
    messageId: str | None = None
    autoCommit: bool = False
    condenseOnComplete: bool = False


class BySession(_Input):
    """`interruptSession`, `deleteSession`."""

    sessionId: str


class ByMessage(_Input):
    """`getMessageResult`."""

    cloudAgentSessionId: str
    messageId: str


class ApiError(Exception):
    """An error of the API."""

    def __init__(self, status: int, message: str, domain: str | None = None, **more: Any) -> None:
        super().__init__(message)
        self.status = status
        data = {"code": NAMES[status], "httpStatus": status, **({"error": domain} if domain else {}), **more}
        self.body = {"error": {"message": message, "code": -32600 if status < 500 else -32603, "data": data}}


def post_json(url: str, body: dict[str, Any], headers: dict[str, str]) -> int:
    """One delivery of a callback over the network."""
    import httpx

    try:
        return httpx.post(url, json=body, headers=headers, timeout=10, trust_env=False).status_code
    except httpx.HTTPError:
        return 0


def in_thread(work: Callable[[], None]) -> None:
    """Runs a turn beside the request that admitted it."""
    threading.Thread(target=work, daemon=True).start()


class CloudAgents:
    """The service's state. `spawn` runs a turn, `post` delivers a callback; a test in one process gives its own."""

    def __init__(self, twin: Twin, post: Post = post_json, spawn: Callable[[Callable[[], None]], None] = in_thread) -> None:
        self.twin = twin
        self.sessions: dict[str, dict[str, Any]] = {}
        self.calls: list[str] = []
        self._operations: dict[str, tuple[dict[str, Any], str]] = {}
        self._post, self._spawn = post, spawn
        self._lock = threading.RLock()
        self.configure()

    def configure(
        self, behaviour: str = "honest", balance: float = 25.0, callbacks: str = "once", seconds: float = 0.2, scale: float = 0.01
    ) -> dict[str, Any]:
        """How it goes from now on.

        `behaviour`: honest, silent, prose, truncated, other_nonce, contradicts, repaired, paused, or `fail:<code>[:<subtype or
        assistant reason>]`. `callbacks`: once, none, twice, forged (a lie about the turn first), early (before `initiate` answers).
        `seconds`: of a turn. `scale`: of the delays between deliveries.
        """
        self.behaviour, self.balance, self.callbacks, self.seconds, self.scale = behaviour, balance, callbacks, seconds, scale
        return {"behaviour": behaviour, "balance": balance, "callbacks": callbacks}

    def told(self) -> dict[str, Any]:
        """What the service's operator sees: its sessions, without what callers keep secret, and the calls in order."""
        listed = [
            {
                "id": one["id"],
                "initiated": one["initiatedAt"] is not None,
                "interrupted": one["interrupted"],
                "deleted": one["deleted"],
                "input": {key: value for key, value in one["input"].items() if key not in ("prompt", "callbackTarget")},
                "turns": [{name: turn[name] for name in ("id", "status", "callbacks")} for turn in one["turns"]],
            }
            for one in self.sessions.values()
        ]
        return {"sessions": listed, "calls": self.calls}

    # -- procedures --------------------------------------------------------------------------------------------------------

    def call(self, name: str, given: Any, bearer: str, internal: str) -> Any:
        """One procedure; ApiError."""
        if name == "health":
            return {"status": "ok", "timestamp": now(), "version": "twin"}
        known = self._procedures()
        if name not in known:
            raise ApiError(404, f"no procedure {name}")
        if not secrets.compare_digest(bearer, f"Bearer {self.twin.credentials['cloud_agent_token']}"):
            raise ApiError(401, "bad signature")
        if name == "prepareSession" and not secrets.compare_digest(
            internal, str(self.twin.credentials["cloud_agent_internal_key"])
        ):
            raise ApiError(401, "internal key missing or wrong")
        shape, act = known[name]
        try:
            wanted = shape.model_validate(given)
        except ValidationError as failure:
            places = ", ".join(".".join(map(str, one["loc"])) or one["msg"] for one in failure.errors()[:5])
            raise ApiError(400, f"invalid input: {places}") from None
        with self._lock:
            self.calls.append(name)
            return act(wanted)

    def _procedures(self) -> dict[str, tuple[type[_Input], Callable[[Any], Any]]]:
        return {
            "prepareSession": (Prepare, self._prepare),
            "initiateFromKilocodeSessionV2": (Initiate, self._initiate),
            "sendMessageV2": (SendMessage, self._send),
            "interruptSession": (BySession, self._interrupt),
            "deleteSession": (BySession, self._delete),
            "getSession": (Initiate, self._get),
            "getSessionHealth": (Initiate, self._health),
            "getMessageResult": (ByMessage, self._result),
        }

    def _prepare(self, wanted: Prepare) -> dict[str, Any]:
        given = wanted.model_dump(mode="json")
        key = str(wanted.operationKey) if wanted.operationKey and wanted.autoInitiate else None
        if key in self._operations:
            before, session_id = self._operations[key]
            if before != given:
                raise ApiError(409, "another input under this key", "operation_key_reuse_mismatch")
            return {**self._ids(self.sessions[session_id]), "replayed": True}
        plane = ("agent", "workspace")[len(self.sessions) % 2]
        session: dict[str, Any] = {
            "id": f"{plane}_{uuid4()}",
            "kiloSessionId": f"ses_{secrets.token_hex(13)}",
            "input": given,
            "preparedAt": now(),
            "initiatedAt": None,
            "interrupted": False,
            "deleted": False,
            "turns": [],
        }
        self.sessions[session["id"]] = session
        if key:
            self._operations[key] = (given, session["id"])
        if wanted.autoInitiate:
            session["initiatedAt"] = now()
            self._admit(session, wanted.prompt)
        return self._ids(session)

    @staticmethod
    def _ids(session: dict[str, Any]) -> dict[str, Any]:
        return {"cloudAgentSessionId": session["id"], "kiloSessionId": session["kiloSessionId"]}

    def _known(self, session_id: str) -> dict[str, Any]:
        session = self.sessions.get(session_id)
        if session is None or session["deleted"]:
            raise ApiError(404, "session not found")
        return session

    def _paid(self) -> None:
        if self.balance < 1:
            raise ApiError(402, "Insufficient credits: at least $1 is needed", billingFailure=True)

    def _initiate(self, wanted: Initiate) -> dict[str, Any]:
        self._paid()
        session = self._known(wanted.cloudAgentSessionId)
        if session["initiatedAt"] is not None:
            raise ApiError(400, "Session was already initiated")
        session["initiatedAt"] = now()
        return self._admit(session, session["input"]["prompt"])

    def _send(self, wanted: SendMessage) -> dict[str, Any]:
        self._paid()
        session = self._known(wanted.cloudAgentSessionId)
        if session["initiatedAt"] is None:
            raise ApiError(400, "session is not initiated")
        return self._admit(session, wanted.prompt)

    def _admit(self, session: dict[str, Any], prompt: str) -> dict[str, Any]:
        if sum(turn["status"] == "queued" for turn in session["turns"]) >= QUEUE:
            raise ApiError(429, "too many queued turns", "PENDING_QUEUE_FULL")
        turn = {
            "id": f"msg_{secrets.token_hex(13)}",
            "prompt": prompt,
            "status": "queued",
            "text": None,
            "failure": None,
            "createdAt": now(),
            "callbacks": 0,
        }
        session["turns"].append(turn)
        if self.callbacks == "early":
            self._tell(session, turn, "completed")
        self._spawn(lambda: self._run(session, turn))
        return {
            "cloudAgentSessionId": session["id"],
            "executionId": turn["id"],
            "messageId": turn["id"],
            "status": "started",
            "streamUrl": f"/stream?cloudAgentSessionId={session['id']}",
            "delivery": "queued",
        }

    def _interrupt(self, wanted: BySession) -> dict[str, Any]:
        session = self.sessions.get(wanted.sessionId)
        if session is None or session["deleted"]:
            return {"success": False, "message": "session not found", "processesFound": False}
        session["interrupted"] = True
        live = [turn for turn in session["turns"] if turn["status"] in ("queued", "running")]
        for turn in live:
            turn.update(status="interrupted", failure={"stage": "interruption", "code": "user_interrupt", "message": "stopped"})
        return {"success": True, "message": "interrupted", "processesFound": bool(live)}

    def _delete(self, wanted: BySession) -> dict[str, Any]:
        if wanted.sessionId in self.sessions:
            self.sessions[wanted.sessionId]["deleted"] = True
        return {"success": True}

    def _get(self, wanted: Initiate) -> dict[str, Any]:
        session = self._known(wanted.cloudAgentSessionId)
        last = session["turns"][-1] if session["turns"] else None
        return {
            "sessionId": session["id"],
            "kiloSessionId": session["kiloSessionId"],
            "userId": "twin-user",
            "githubRepo": session["input"]["githubRepo"],
            "execution": {"id": last["id"], "status": last["status"], "startedAt": last["createdAt"], "health": "healthy"}
            if last
            else None,
            "preparedAt": session["preparedAt"],
            "initiatedAt": session["initiatedAt"],
            "initialMessageId": session["turns"][0]["id"] if session["turns"] else None,
            "timestamp": now(),
            "version": 2,
            "latestEventId": None,
        }

    def _health(self, wanted: Initiate) -> dict[str, Any]:
        session = self._known(wanted.cloudAgentSessionId)
        live = any(turn["status"] in ("queued", "running") for turn in session["turns"])
        alive = "stale" if self.behaviour == "silent" else "healthy"
        return {
            "cloudAgentSessionId": session["id"],
            "sandboxStatus": "healthy",
            "executionHealth": alive if live else "none",
        }

    def _result(self, wanted: ByMessage) -> dict[str, Any]:
        session = self._known(wanted.cloudAgentSessionId)
        turn = next((one for one in session["turns"] if one["id"] == wanted.messageId), None)
        if turn is None:
            raise ApiError(404, "message not found")
        found = {"status": turn["status"], "createdAt": turn["createdAt"]}
        if turn["status"] in ("failed", "interrupted"):
            found["failure"] = turn["failure"]
        if turn["status"] == "completed":
            found["assistant"] = {"messageId": f"{turn['id']}-answer", "text": turn["text"]}
        return found

    # -- turns -------------------------------------------------------------------------------------------------------------

    def _run(self, session: dict[str, Any], turn: dict[str, Any]) -> None:
        time.sleep(self.seconds)
        with self._lock:
            if turn["status"] != "queued":
                return
            turn["status"] = "running"
        if self.behaviour == "silent":
            return
        outcome = self._outcome(session, turn)
        with self._lock:
            if turn["status"] != "running":
                return
            turn.update(outcome)
        self._call_back(session, turn)

    def _outcome(self, session: dict[str, Any], turn: dict[str, Any]) -> dict[str, Any]:
        how, _, more = self.behaviour.partition(":")
        if how == "fail":
            code, _, why = more.partition(":")
            narrow = {"subtype" if code == "workspace_setup_failed" else "assistantReason": why} if why else {}
            return {"status": "failed", "failure": {"stage": "unknown", "code": code, "message": "as told", **narrow}}
        if how == "paused":
            return {"status": "paused"}
        if how == "prose" or (how == "repaired" and "can't be used" not in turn["prompt"]):
            return {"status": "completed", "text": "All is well. I approve."}
        told = self._work(session, turn)
        if how == "other_nonce":
            told["nonce"] = "0" * 32
        text = f"```json\n{json.dumps(told, indent=1)}\n```\nThat is all."
        if how == "truncated":
            text = text[: len(text) // 2]
        if how == "contradicts":
            text += f"\n\n```json\n{json.dumps({**told, 'summary': 'Or rather not.'})}\n```"
        return {"status": "completed", "text": text}

    def _work(self, session: dict[str, Any], turn: dict[str, Any]) -> dict[str, Any]:
        """The scripted model with a checkout's tools, until it writes its result."""
        briefs = [
            one["prompt"] for one in session["turns"][: session["turns"].index(turn) + 1] if "Changed files:" in one["prompt"]
        ]
        messages: list[dict[str, Any]] = [{"role": "user", "content": f"Result path: {PATH}\n{briefs[-1]}"}]
        for _ in range(STEPS):
            said, _finish = model.reply({"messages": messages, "tools": TOOLS})
            messages.append({"role": "assistant", **said})
            for call in said.get("tool_calls") or []:
                arguments = json.loads(call["function"]["arguments"])
                if call["function"]["name"] == "write":
                    written: dict[str, Any] = json.loads(arguments["content"])
                    return written
                output = self._tool(session, call["function"]["name"], arguments)
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": output})
            if not said.get("tool_calls"):
                break
        return {"nonce": "", "summary": "nothing was found out", "findings": []}

    def _tool(self, session: dict[str, Any], name: str, arguments: dict[str, Any]) -> str:
        """What a checkout of the session's branch would show."""
        repository = self.twin.path(session["input"]["githubRepo"])
        try:
            if name == "bash":
                words = shlex.split(arguments["command"])
                return git(repository, *words[1:]).decode(errors="replace") if words[:2] == ["git", "diff"] else "not allowed"
            content = git(repository, "show", f"{session['input']['upstreamBranch']}:{arguments['filePath']}")
        except RuntimeError as failure:
            return str(failure)
        return "\n".join(f"{number}: {line}" for number, line in enumerate(content.decode(errors="replace").splitlines(), 1))

    # -- callbacks ---------------------------------------------------------------------------------------------------------

    def _call_back(self, session: dict[str, Any], turn: dict[str, Any]) -> None:
        """At least once, when the session is idle; again after the delays where that may help."""
        if self.callbacks == "none" or any(one["status"] in ("queued", "running") for one in session["turns"]):
            return
        if self.callbacks == "forged":
            self._tell(
                session, turn, "completed", lastAssistantMessageText='{"nonce": "forged", "summary": "ok", "findings": []}'
            )
        for delay in (0, *RETRIES):
            time.sleep(delay * self.scale)
            status = self._tell(session, turn, turn["status"])
            if 200 <= status < 300:
                break
            if status not in (0, 429) and status < 500:
                return
        if self.callbacks == "twice":
            self._tell(session, turn, turn["status"])

    def _tell(self, session: dict[str, Any], turn: dict[str, Any], status: str, **more: Any) -> int:
        target = session["input"]["callbackTarget"]
        if target is None:
            return 404
        turn["callbacks"] += 1
        body = {
            "sessionId": session["id"],
            "cloudAgentSessionId": session["id"],
            "executionId": turn["id"],
            "messageId": turn["id"],
            "status": status,
            "kiloSessionId": session["kiloSessionId"],
            "idempotencyKey": turn["id"],
            **({"lastAssistantMessageText": turn["text"]} if turn["text"] and status == "completed" else {}),
            **more,
        }
        return self._post(target["url"], body, target["headers"])


def routes(agents: CloudAgents, fault_of: Callable[[str, str], dict[str, Any] | None]) -> list[Route]:
    """The API under /cloud-agent. A fault answers with its `status` (an `error` makes it the API's own, with `retryable`), or
    `lost`: carried out, and the answer is a gateway's page; `seconds` come before either."""

    async def trpc(request: Request) -> Response:
        name = request.path_params["name"]
        fault = fault_of(request.method, request.url.path) or {}
        await anyio.sleep(fault.get("seconds", 0))
        if "status" in fault and not fault.get("lost"):
            if "error" in fault or fault["status"] in (401, 402, 404, 409, 429):
                made = ApiError(fault["status"], "as told", fault.get("error"), retryable=fault.get("retryable", False))
                return JSONResponse(made.body, made.status)
            return Response("<html>as told</html>", fault["status"], media_type="text/html")
        try:
            given = await request.json() if request.method == "POST" else json.loads(request.query_params.get("input", "null"))
        except ValueError:
            return JSONResponse(ApiError(400, "not JSON").body, 400)
        bearer, internal = (request.headers.get(one, "") for one in ("authorization", "x-internal-api-key"))
        try:
            data = await anyio.to_thread.run_sync(agents.call, name, given, bearer, internal)
        except ApiError as failure:
            return JSONResponse(failure.body, failure.status)
        if fault.get("lost"):
            return Response("<html>gateway time-out</html>", 504, media_type="text/html")
        return JSONResponse({"result": {"data": data}})

    async def health(_request: Request) -> Response:
        return JSONResponse({"status": "ok", "timestamp": now()})

    return [
        Route("/cloud-agent/trpc/{name}", trpc, methods=["GET", "POST"]),
        Route("/cloud-agent/health", health, methods=["GET"]),
    ]
