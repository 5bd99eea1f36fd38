"""Reading request bodies from strangers: bounded in size, depth and number, before anything is parsed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import Request

from kilo_pipelines.core.reasons import Reason

# GitHub's own cap for webhook payloads.
WEBHOOK_BYTES = 25 * 2**20
CALLBACK_BYTES = 2**20
# GitHub's deepest events stay below 20; Python's own parser would recurse.
MAX_DEPTH = 64
# Bodies over this size are read at most four at a time: a flood of large ones must not fill the memory.
LARGE_BYTES = 2**20
_large = asyncio.Semaphore(4)


class BodyError(Exception):
    """The body is refused with this status and reason."""

    def __init__(self, status: int, reason: Reason) -> None:
        super().__init__(str(reason))
        self.status = status
        self.reason = reason


async def read_body(request: Request, limit: int) -> bytes:
    """The raw body; BodyError 413 as soon as it is known to be larger than `limit`."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise BodyError(413, Reason.BODY_TOO_LARGE)
    if announced.isdigit() and int(announced) <= LARGE_BYTES:
        return await _collect(request, limit)
    async with _large:
        return await _collect(request, limit)


async def _collect(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise BodyError(413, Reason.BODY_TOO_LARGE)
    return bytes(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object that the database can keep; BodyError 400 otherwise."""
    if _depth(body) > MAX_DEPTH:
        raise BodyError(400, Reason.BODY_TOO_DEEP)
    try:
        decoded = json.loads(body)
        json.dumps(decoded, ensure_ascii=False).encode()  # lone surrogates
    except (ValueError, UnicodeError, RecursionError):
        raise BodyError(400, Reason.BODY_NOT_JSON) from None
    if not isinstance(decoded, dict):
        raise BodyError(400, Reason.BODY_NOT_JSON)
    return decoded


def _depth(body: bytes) -> int:
    """Deepest nesting, counted without parsing; brackets inside strings are skipped."""
    depth = deepest = 0
    in_string = escaped = False
    for byte in body:
        if in_string:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                in_string = False
        elif byte == 0x22:
            in_string = True
        elif byte in (0x7B, 0x5B):
            depth += 1
            deepest = max(deepest, depth)
        elif byte in (0x7D, 0x5D):
            depth -= 1
    return deepest
