"""One test call to a model: whether the address answers, takes the key, knows the model, and whether the model calls a tool.

Holds: the call and what each answer means. The process that makes it holds the key for that long; sessions go through the model proxy.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.providers import outbound

# A model on a machine of one's own may have to be loaded first.
READ_SECONDS = 60.0
CONNECT_SECONDS = 10.0
ANSWER_BYTES = 2**20
MAX_TOKENS = 200
_TOOL = {
    "name": "report",
    "description": "Reports that the model can call tools.",
    "parameters": {
        "type": "object",
        "properties": {"word": {"type": "string"}},
        "required": ["word"],
        "additionalProperties": False,
    },
}


class ModelError(Exception):
    """The model can't be used: a reason code and a detail without the key."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def try_model(base_url: str, key: str, model: str, *, address: str | None = None) -> str:
    """Asks the model to call a tool; what came back, in words. Raises ModelError.

    `address` is connected to, whatever the host's name means by now (threats, rule 22).
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Call the tool `report` with the word ready."}],
        "tools": [{"type": "function", "function": _TOOL}],
        "tool_choice": {"type": "function", "function": {"name": _TOOL["name"]}},
        "max_tokens": MAX_TOKENS,
    }
    status, answered = _post(f"{base_url.rstrip('/')}/chat/completions", key, body, address)
    if status != 200:
        raise ModelError(_refusal(status, answered), f"HTTP {status}")
    choices = answered.get("choices")
    message = choices[0].get("message") if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
    if not isinstance(message, dict):
        raise ModelError(Reason.MODEL_UNREACHABLE, "the answer isn't that of an OpenAI-compatible address")
    if not message.get("tool_calls"):
        raise ModelError(Reason.MODEL_CANNOT_CALL_TOOLS, f"{model} answered in words")
    usage = answered.get("usage")
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    return f"{model} calls tools" + (f" ({tokens} tokens)" if isinstance(tokens, int) else "")


def _refusal(status: int, answered: dict[str, Any]) -> Reason:
    """What a refusal means. Providers tell an unknown model by 404 or by 400 and words; the words are looked at, never shown."""
    words = json.dumps(answered.get("error", answered)).lower()
    if status in (401, 403):
        return Reason.MODEL_KEY_REFUSED
    if status == 402:
        return Reason.INSUFFICIENT_CREDITS
    if status in (400, 404, 422) and "tool" in words:
        return Reason.MODEL_CANNOT_CALL_TOOLS
    if status in (400, 404, 422) and "model" in words:
        return Reason.MODEL_UNKNOWN
    if status in (408, 429) or status >= 500:
        return Reason.MODEL_UNREACHABLE
    return Reason.MODEL_REFUSED


def _post(url: str, key: str, body: dict[str, Any], address: str | None) -> tuple[int, dict[str, Any]]:
    asked = outbound.exchange(
        "POST",
        url,
        address=address,
        headers={"authorization": f"Bearer {key}", "content-type": "application/json"},
        content=json.dumps(body).encode(),
        most=ANSWER_BYTES,
        seconds=READ_SECONDS,
        connect=CONNECT_SECONDS,
    )
    try:
        answer = asyncio.run(asked)
    except (outbound.OutboundError, httpx.InvalidURL, UnicodeError) as failure:
        raise ModelError(Reason.MODEL_UNREACHABLE, str(failure) or type(failure).__name__) from None
    try:
        decoded = json.loads(answer.content)
    except ValueError:
        decoded = {}
    return answer.status, decoded if isinstance(decoded, dict) else {}
