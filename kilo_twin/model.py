"""A scripted, OpenAI-compatible model. It knows no seed: it reads tool output and applies general rules to it.

Stateless: the next step is decided from the messages of the request alone, so the same request gets the same answer.
Order of its steps: the diff by git, every changed file by `read`, the result by `write`, a closing sentence. A brief that
names a package, its patched version and the manifest gets the update by npm in place of a review; one that asks whether the package
can be exploited gets a search for its uses. Alerts are sorted by their metadata alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

MODEL = "scripted-reviewer"
MAX_READS = 20  # files; a real model would tire too
MAX_CALLS = 40  # tool calls of a conversation, whatever happens

_NUMBERED = re.compile(r"^\s*(\d+)(?:\||:|\t)\s?(.*)$")
_PACKAGE = re.compile(r"(?:@[a-z0-9._-]+/)?[a-z0-9][a-z0-9._-]*")
_VERSION = re.compile(r"[0-9][0-9A-Za-z.+-]*")
_HUNK = re.compile(r"^@@ -\d+(?:,\d+)? \+(\d+)(?:,\d+)? @@")


@dataclass(frozen=True)
class Rule:
    """A class of defect and how to see it in one line (with the next one)."""

    pattern: re.Pattern[str]
    severity: str
    title: str
    body: str
    next_line: re.Pattern[str] | None = None


_SQL = r"(?:select|insert|update|delete|drop)\b"
RULES = (
    Rule(
        re.compile(
            rf"""\b(?:execute|executemany|executescript|raw|query)\(\s*(?:f["'].*{_SQL}.*\{{|["'].*{_SQL}.*["']\s*(?:%|\+|\.format\())""",
            re.I,
        ),
        "critical",
        "SQL is built from a value",
        "The value becomes part of the statement, so its sender can change what the statement does. Pass it as a parameter.",
    ),
    Rule(
        re.compile(r"shell\s*=\s*True|\bos\.(?:system|popen)\("),
        "critical",
        "A shell command is built from a value",
        "The shell interprets the value. Pass the program and its arguments as a list, without a shell.",
    ),
    Rule(
        re.compile(r"""\b\w*(?:password|passwd|secret|token|api_?key)\w*\s*(?::\s*str\s*)?=\s*["'][^"'\s{}]{8,}["']""", re.I),
        "critical",
        "A credential stands in the code",
        "Everybody who can read the repository has it, for ever. Take it from the environment and replace it at its service.",
    ),
    Rule(
        re.compile(r"^\s*except(?:\s+(?:Base)?Exception(?:\s+as\s+\w+)?)?\s*:\s*(?:pass\s*)?$"),
        "warning",
        "An error is swallowed",
        "Every error disappears here, also the ones that nobody thought of. Catch what is expected and handle it.",
        next_line=re.compile(r"^\s*(?:pass|\.\.\.)\s*$"),
    ),
    Rule(
        re.compile(r"\bdef\s+\w+\(.*=\s*(?:\[\]|\{\}|set\(\)|list\(\)|dict\(\))"),
        "warning",
        "A mutable default argument",
        "The default is made once and shared by all calls, so one call sees what another one left. Use None and make it inside.",
    ),
)


# The tool with which a set-up asks whether a model calls tools at all.
PROBE = "report"
TRIAGE = "submit_triage"
# Files that name a package without using it.
_NO_CODE = ("package.json", "package-lock.json", "requirements.txt", "pyproject.toml", ".md", ".lock")

# Models do what a text tells them. Tests of what an injected one can reach need one that does so reliably.
REPEAT = "Repeat exactly:\n"


def routes(api_key: str, fault_of: Callable[[str, str], dict[str, Any] | None]) -> list[Route]:
    """The model's routes under /model/v1; a wrong key is 401. A fault has a status, or is an answer that calls no tool."""

    def refused(request: Request) -> Response | None:
        if secrets.compare_digest(request.headers.get("authorization", ""), f"Bearer {api_key}"):
            return None
        return JSONResponse(
            {"error": {"message": "Incorrect API key provided", "type": "invalid_request_error", "code": "invalid_api_key"}}, 401
        )

    async def models(request: Request) -> Response:
        return refused(request) or JSONResponse(
            {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "twin"}]}
        )

    async def completions(request: Request) -> Response:
        answer = refused(request)
        if answer:
            return answer
        body = await request.json()
        fault = fault_of(request.method, request.url.path)
        if fault is not None and "status" in fault:
            return JSONResponse({"error": {"message": "twin: as told", "type": "server_error"}}, fault["status"])
        message, finish = ({"content": "I would rather not say."}, "stop") if fault is not None else reply(body)
        usage = _usage(body, message)
        if body.get("stream"):
            return StreamingResponse(_stream(body, message, finish, usage), media_type="text/event-stream")
        choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
        return JSONResponse({**_head(body, "chat.completion"), "choices": [choice], "usage": usage})

    return [
        Route("/model/v1/models", models, methods=["GET"]),
        Route("/model/v1/chat/completions", completions, methods=["POST"]),
    ]


def _head(body: dict[str, Any], kind: str) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(body.get("messages"), sort_keys=True).encode()).hexdigest()
    return {"id": f"chatcmpl-{digest[:24]}", "object": kind, "created": int(time.time()), "model": body.get("model", MODEL)}


def _usage(body: dict[str, Any], message: dict[str, Any]) -> dict[str, int]:
    """About four characters a token, like everybody's rule of thumb."""
    sent, made = len(json.dumps(body.get("messages", []))) // 4, len(json.dumps(message)) // 4
    return {"prompt_tokens": sent, "completion_tokens": made, "total_tokens": sent + made}


def _stream(body: dict[str, Any], message: dict[str, Any], finish: str, usage: dict[str, int]) -> Iterator[bytes]:
    def chunk(delta: dict[str, Any], reason: str | None = None) -> bytes:
        return _sse({**_head(body, "chat.completion.chunk"), "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})

    yield chunk({"role": "assistant", "content": ""})
    for start in range(0, len(message.get("content") or ""), 400):
        yield chunk({"content": message["content"][start : start + 400]})
    for index, call in enumerate(message.get("tool_calls", [])):
        yield chunk({"tool_calls": [{"index": index, **call, "function": {"name": call["function"]["name"], "arguments": ""}}]})
        arguments = call["function"]["arguments"]
        for start in range(0, len(arguments), 400):
            yield chunk({"tool_calls": [{"index": index, "function": {"arguments": arguments[start : start + 400]}}]})
    yield chunk({}, finish)
    if (body.get("stream_options") or {}).get("include_usage"):
        yield _sse({**_head(body, "chat.completion.chunk"), "choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"


def _sse(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


# -- what it says -----------------------------------------------------------------------------------------------------


def reply(body: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The assistant's message and the finish reason for a request."""
    conversation = Conversation(body)
    said = _text(body["messages"][-1].get("content")) if body.get("messages") else ""
    if said.startswith(REPEAT):
        return {"content": said.removeprefix(REPEAT)}, "stop"
    if PROBE in conversation.tools:
        return {"content": None, "tool_calls": [_call(PROBE, {"word": "ready"}, 0)]}, "tool_calls"
    if TRIAGE in conversation.tools:
        return {"content": None, "tool_calls": [_call(TRIAGE, sort_alert(said), 0)]}, "tool_calls"
    if not conversation.tools:
        return {"content": "Scripted review"}, "stop"
    step = conversation.next_calls()
    if step:
        return {
            "content": None,
            "tool_calls": [_call(name, arguments, conversation.made + index) for index, (name, arguments) in enumerate(step)],
        }, "tool_calls"
    return {"content": "The review is written. It was made by a scripted model."}, "stop"


def sort_alert(text: str) -> dict[str, Any]:
    """How an alert is handled, by its scope and severity alone."""
    known = dict(re.findall(r"^(Severity|Scope): (\S+)$", text, re.MULTILINE))
    development, severity = known.get("Scope") == "development", known.get("Severity", "")
    if development and severity == "critical":
        action, confidence, why = "manual_review", "medium", "Critical, but only where the software is built."
    elif development and severity in ("medium", "low"):
        action, confidence, why = "dismiss", "high", "It is used where the software is built and never runs in production."
    else:
        action, confidence, why = "analyze_codebase", "medium", "Whether it matters depends on how the package is used."
    return {"needs_deep": action == "analyze_codebase", "reasoning": why, "action": action, "confidence": confidence}


def uses_of(package: str) -> list[str]:
    """Literal texts with which code takes a package into use, in JavaScript and Python."""
    quoted = [f"{before}{quote}{package}{quote}" for before in ("require(", "from ", "import ", "import(") for quote in "'\""]
    module = package.replace("-", "_")
    return [*quoted, f"import {module}", f"from {module} "]


def places(output: str) -> list[dict[str, Any]]:
    """Places in what a search tool printed: `path:line:text`, or `path:` and below it `Line n: text`."""
    found, path = [], ""
    for line in output.splitlines():
        plain = re.match(r"^([^:\n]+):(\d+):", line)
        below = re.match(r"^ +Line (\d+):", line)
        if below and path:
            found.append({"path": path, "line": int(below[1])})
        elif plain:
            found.append({"path": plain[1].removeprefix("./"), "line": int(plain[2])})
        elif line.endswith(":"):
            path = line[:-1].removeprefix("/work/repo/")
    return found


def _call(name: str, arguments: dict[str, Any], number: int) -> dict[str, Any]:
    return {"id": f"call_{number:04d}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


class Conversation:
    """What a request tells: the brief, the tools, what was called and what came back."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.tools = {tool["function"]["name"] for tool in body.get("tools") or [] if tool.get("type") == "function"}
        self.calls: list[tuple[str, dict[str, Any], str]] = []
        self.brief = ""
        self.made = 0
        self._asked_again = False
        self._read(body.get("messages", []))

    def _read(self, messages: list[dict[str, Any]]) -> None:
        outputs = {one.get("tool_call_id"): _text(one.get("content")) for one in messages if one.get("role") == "tool"}
        written = False
        for message in messages:
            if message.get("role") == "user" and "Result path:" in _text(message.get("content")):
                text = _text(message.get("content"))
                if "Changed files:" in text or not self.brief:
                    self.brief = text
                self._asked_again, written = written, False
            for call in message.get("tool_calls") or []:
                self.made += 1
                try:
                    arguments = json.loads(call["function"]["arguments"] or "{}")
                except ValueError:
                    arguments = {}
                name = call["function"]["name"]
                self.calls.append((name, arguments, outputs.get(call["id"], "")))
                written = written or name == "write"
        self._written = written

    def _field(self, name: str) -> str:
        match = re.search(rf"^{name}: (\S+)$", self.brief, re.MULTILINE)
        return match[1] if match else ""

    def changed_paths(self) -> list[str]:
        """Paths that the brief asks to look at."""
        match = re.search(r"^Changed files:\n((?:- .+\n?)+)", self.brief, re.MULTILINE)
        return re.findall(r"^- (.+) \((?!deleted)\w+\)$", match[1], re.MULTILINE) if match else []

    def next_calls(self) -> list[tuple[str, dict[str, Any]]]:
        """The next tool calls, none when the work is done."""
        result_path = self._field("Result path")
        if not result_path or self.made >= MAX_CALLS:
            return []
        names = [name for name, _, _ in self.calls]
        if not self._written and "bash" in self.tools and "bash" not in names and not self._asked_again:
            match = re.search(r"^The change from ([0-9a-f]{7,}) to ([0-9a-f]{7,}):$", self.brief, re.MULTILINE)
            if match:
                command = f"git diff --unified=0 --no-color --text {match[1]} {match[2]}"
                return [("bash", {"command": command, "description": "Shows the change"})]
        read = {arguments.get("filePath") for name, arguments, _ in self.calls if name == "read"}
        unread = [path for path in self.changed_paths()[:MAX_READS] if path not in read]
        if unread and "read" in self.tools and not self._written:
            return [("read", {"filePath": path}) for path in unread[:4]]
        search = self._search()
        if search and not self._written and "grep" in self.tools and "grep" not in names:
            return [("grep", {"pattern": search})]
        update = self._update()
        if update and not self._written and "bash" in self.tools and "bash" not in names:
            return [("bash", {"command": update, "description": "Updates the package"})]
        if not self._written and "write" in self.tools:
            return [("write", {"filePath": result_path, "content": json.dumps(self.result(), indent=1)})]
        return []

    def _asks_for_uses(self) -> bool:
        return "exploitable" in self._schema().get("properties", {})

    def _search(self) -> str:
        """The expression that finds uses of the package; empty when the brief doesn't ask for them."""
        package = self._field("Package")
        if not self._asks_for_uses() or not _PACKAGE.fullmatch(package):
            return ""
        return "|".join(re.sub(r"([.()])", r"\\\1", one) for one in uses_of(package))

    def _analysis(self) -> dict[str, Any]:
        """Whether the package is used, by what the search showed."""
        package = self._field("Package")
        said = [output for name, _, output in self.calls if name == "grep"]
        hits = [one for output in said for one in places(output) if not one["path"].endswith(_NO_CODE)]
        if not any(places(output) or output.startswith("No files found") for output in said):
            # A tool that was denied or broken has found nothing out.
            return self._undecided(package)
        patched = bool(_VERSION.fullmatch(self._field("Patched version")))
        told = f"{package} is taken into use in {len(hits)} places." if hits else f"No file takes {package} into use."
        return {
            "nonce": self._field("Nonce"),
            "exploitable": bool(hits),
            "reasoning": f"A scripted model looked for imports. {told}",
            "locations": hits[:20],
            "search": uses_of(package)[:10],
            "suggested_fix": f"Update {package} to {self._field('Patched version')}." if hits and patched else "",
            "action": ("open_pr" if patched else "manual_review") if hits else "dismiss",
            "summary": told,
        }

    def _undecided(self, package: str) -> dict[str, Any]:
        return {
            "nonce": self._field("Nonce"),
            "exploitable": "unknown",
            "reasoning": "A scripted model could not search the repository.",
            "locations": [],
            "search": uses_of(package)[:10],
            "suggested_fix": "",
            "action": "manual_review",
            "summary": "The repository could not be searched.",
        }

    def _update(self) -> str:
        """The command that brings the patched version into manifest and lock file; empty when the brief asks for none."""
        if self._asks_for_uses():
            return ""
        package, version, manifest = (self._field(name) for name in ("Package", "Patched version", "Manifest"))
        if not (
            _PACKAGE.fullmatch(package)
            and _VERSION.fullmatch(version)
            and manifest.endswith(("package.json", "package-lock.json"))
        ):
            return ""
        directory = shlex.quote(f"./{manifest.rpartition('/')[0]}")
        return f"cd {directory} && npm install --package-lock-only --ignore-scripts {package}@^{version}"

    def _remediation(self) -> dict[str, Any]:
        """What the update did, by what the package manager said of it."""
        package, version = self._field("Package"), self._field("Patched version")
        said = [output for name, _, output in self.calls if name == "bash"]
        changed = bool(said) and "npm ERR" not in said[0] and "npm error" not in said[0]
        update = self._update()
        return {
            "nonce": self._field("Nonce"),
            "status": "changed" if changed else "blocked",
            "summary": f"A scripted model updated {package} to {version}." if changed else f"{package} could not be updated.",
            "validation": [f"`{update.partition('&& ')[2]}` ended well"] if changed else [],
            "risk_notes": "",
            "draft": False,
        }

    def result(self) -> dict[str, Any]:
        """The result out of what the tools showed; of another shape where the brief's schema asks for one."""
        if self._asks_for_uses():
            return self._analysis()
        if "validation" in self._schema().get("properties", {}):
            return self._remediation()
        schema = self._schema()
        if schema and "findings" not in schema.get("properties", {}):
            return self._filled(schema)
        added = self._added_lines()
        findings = []
        for name, arguments, output in self.calls:
            if name == "read":
                path = str(arguments.get("filePath", ""))
                findings += find_defects(path, numbered_lines(output), added.get(path))
        if not any(name == "read" for name, _, _ in self.calls):
            for path, lines in added.items():
                findings += find_defects(path, lines, None)
        files = len({arguments.get("filePath") for name, arguments, _ in self.calls if name == "read"})
        count = f"{len(findings)} problem{'s' if len(findings) != 1 else ''}" if findings else "no problems"
        summary = f"Reviewed by a scripted model that knows five classes of defect. It read {files} files and found {count}."
        return {"nonce": self._field("Nonce"), "summary": summary, "findings": findings}

    def _schema(self) -> dict[str, Any]:
        """The JSON schema that stands in the brief behind `Schema:`."""
        start = self.brief.find("Schema:\n{")
        try:
            found = json.JSONDecoder().raw_decode(self.brief, start + len("Schema:\n"))[0] if start >= 0 else {}
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _filled(self, schema: dict[str, Any]) -> dict[str, Any]:
        """The plainest value of each required field: the first choice, an empty list, one sentence."""
        plain = {"boolean": False, "integer": 0, "number": 0, "array": [], "object": {}}
        words = "Done by a scripted model."
        filled = {}
        for name in schema.get("required", []):
            field = schema.get("properties", {}).get(name, {})
            field = schema.get("$defs", {}).get(str(field.get("$ref", "")).rpartition("/")[2], field)
            if field.get("type") == "object" and field.get("properties"):
                filled[name] = self._filled({"$defs": schema.get("$defs", {}), **field})
            else:
                choices = [*field.get("enum", []), *([field["const"]] if "const" in field else [])]
                filled[name] = (choices or [plain.get(field.get("type", ""), words)])[0]
        return filled | ({"nonce": self._field("Nonce")} if "nonce" in filled else {})

    def _added_lines(self) -> dict[str, dict[int, str]]:
        """Added lines by path, from the output of git."""
        found: dict[str, dict[int, str]] = {}
        for name, _, output in self.calls:
            if name != "bash":
                continue
            path, number = "", 0
            for line in output.splitlines():
                hunk = _HUNK.match(line)
                if line.startswith("+++ "):
                    path = line[4:].strip().removeprefix("b/")
                elif hunk:
                    number = int(hunk[1])
                elif line.startswith("+") and path:
                    found.setdefault(path, {})[number] = line[1:]
                    number += 1
        return found


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", "") for part in content or [] if isinstance(part, dict))


def numbered_lines(output: str) -> dict[int, str]:
    """Lines of a file out of a `read` tool's numbered output."""
    return {int(match[1]): match[2] for match in map(_NUMBERED.match, output.splitlines()) if match}


def find_defects(path: str, lines: dict[int, str], added: dict[int, str] | None) -> list[dict[str, Any]]:
    """Defects in lines; with `added` only on lines that the change added."""
    found = []
    for number, text in sorted(lines.items()):
        if added is not None and number not in added:
            continue
        for rule in RULES:
            if not rule.pattern.search(text):
                continue
            if rule.next_line is not None and not rule.next_line.match(lines.get(number + 1, "")) and "pass" not in text:
                continue
            found.append(
                {
                    "path": path,
                    "line": number,
                    "start_line": None,
                    "side": "RIGHT",
                    "severity": rule.severity,
                    "title": rule.title,
                    "body": rule.body,
                    "suggestion": None,
                }
            )
    return found
