"""Reading request bodies from strangers: bounded in size, time, depth and number, before anything is parsed."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any, NoReturn

import anyio
from starlette.requests import ClientDisconnect, Request

from kilo_pipelines.core.reasons import Reason

# GitHub's own cap for webhook payloads.
WEBHOOK_BYTES = 25 * 2**20
CALLBACK_BYTES = 2**20
# A body up to this size is checked, parsed and stored in less time than a thread takes to start on it.
INLINE_BYTES = 64 * 1024
# GitHub's deepest events stay below 20; Python's own parser would recurse.
MAX_DEPTH = 64
# Bodies over this size are read at most four at a time: a flood of large ones must not fill the memory.
LARGE_BYTES = 2**20
LARGE_AT_ONCE = 4
# GitHub gives up after 10 s; a sender that drips its body longer only holds a place that others need.
READ_SECONDS = 15.0
_large = asyncio.Semaphore(LARGE_AT_ONCE)
# 25 MB of small JSON objects are 0.8 GB of Python's: only one large body is an object at a time.
_parsed = asyncio.Semaphore(1)

# Strings as a whole (an unfinished one to the end), so that brackets inside them are not counted.
_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)


class BodyError(Exception):
    """The body is refused with this status and reason."""

    def __init__(self, status: int, reason: Reason) -> None:
        super().__init__(str(reason))
        self.status = status
        self.reason = reason


async def read_body(request: Request, limit: int) -> bytes:
    """The raw body; BodyError 413 as soon as it is known to be larger than `limit`, 400 when it doesn't come in time."""
    announced = request.headers.get("content-length", "").lstrip("0")
    # More digits than any body here may have are not even converted: Python refuses to from 4,300 on.
    if announced.isdecimal() and (len(announced) > len(str(limit)) or int(announced) > limit):
        raise BodyError(413, Reason.BODY_TOO_LARGE)
    try:
        async with asyncio.timeout(READ_SECONDS):
            return await _collect(request, limit)
    except (TimeoutError, ClientDisconnect):
        raise BodyError(400, Reason.BODY_NOT_JSON) from None


async def _collect(request: Request, limit: int) -> bytes:
    """Takes one of the large bodies' places at the byte that makes it large, whatever the sender announced."""
    body = bytearray()
    stream = request.stream()
    async for chunk in stream:
        body += chunk
        if len(body) > LARGE_BYTES:
            break
    else:
        return bytes(_within(body, limit))
    async with _large:
        async for chunk in stream:
            body += chunk
            _within(body, limit)
    return bytes(_within(body, limit))


def _within(body: bytearray, limit: int) -> bytearray:
    if len(body) > limit:
        raise BodyError(413, Reason.BODY_TOO_LARGE)
    return body


@asynccontextmanager
async def parsed(body: bytes) -> AsyncIterator[dict[str, Any]]:
    """The body as an object for as long as somebody needs it; BodyError 400 when it is none."""
    if len(body) <= INLINE_BYTES:
        yield parse_object(body)
        return
    async with _parsed if len(body) > LARGE_BYTES else nullcontext():
        yield await anyio.to_thread.run_sync(parse_object, body)


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object (RFC 8259: UTF-8, finite numbers); BodyError 400 otherwise. Duplicate keys: the last one counts."""
    if _too_deep(body):
        raise BodyError(400, Reason.BODY_TOO_DEEP)
    try:
        decoded = json.loads(body.decode(), parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError):
        raise BodyError(400, Reason.BODY_NOT_JSON) from None
    if not isinstance(decoded, dict):
        raise BodyError(400, Reason.BODY_NOT_JSON)
    return decoded


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number beyond every float")
    return number


def _too_deep(body: bytes) -> bool:
    """Whether brackets nest deeper than `MAX_DEPTH`, counted without parsing."""
    depth = 0
    for token in _TOKENS.finditer(body):
        first = body[token.start()]
        if first in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif first in b"]}":
            depth -= 1
    return False
