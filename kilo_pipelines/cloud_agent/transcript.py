"""What the proxy saw of a conversation, and what follows from it: binding of a result, coverage. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

_FENCED = re.compile(r"```[a-zA-Z]*\n(.*?)\n```", re.DOTALL)
# Texts with JSON objects in prose are searched from each opening brace; more of them is an attack on our time.
MAX_STARTS = 50


class Turn(BaseModel):
    """One completed main-conversation response with tools offered, whose request held the brief's nonce."""

    model_config = ConfigDict(extra="forbid")

    number: int
    nonce: str
    text: str
    arguments: list[str] = Field(default=[], description="arguments of the response's tool calls, as the model wrote them")


class Transcript(BaseModel):
    """Everything that the proxy answers for a session."""

    model_config = ConfigDict(extra="forbid")

    turns: list[Turn] = []
    covered: dict[str, int] = Field(default={}, description="entry id -> first completed turn whose request held its text")
    tokens_in: int = 0
    tokens_out: int = 0
    cached: int = Field(default=0, description="of tokens_in, what the model's provider had kept")
    meter: str = Field(default="", description="names this count of tokens: one registration at the proxy, never another")
    sha256: str = ""
    last_failure: str | None = Field(default=None, description="reason code of the last request that could not be served")
    requests: int = 0


def canonical(value: object) -> str:
    """One text per JSON value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def objects_in(text: str) -> Iterator[Any]:
    """JSON objects in a text: the whole, fenced blocks, and objects within prose."""
    for candidate in [text, *_FENCED.findall(text)]:
        try:
            yield json.loads(candidate)
        except (ValueError, RecursionError):
            continue
    decoder, start = json.JSONDecoder(), 0
    for _ in range(MAX_STARTS):
        start = text.find("{", start)
        if start < 0:
            return
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            start += 1
            continue
        yield value
        start = end


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)


def written_objects(turn: Turn) -> Iterator[Any]:
    """Every JSON value that the model itself wrote in a turn: in its text, as tool arguments, or as text within them."""
    yield from objects_in(turn.text)
    for arguments in turn.arguments:
        for value in objects_in(arguments):
            yield value
            for text in _strings(value):
                yield from objects_in(text)


def bind(result: object, turns: Iterable[Turn], nonce: str) -> int | None:
    """The turn in which the model wrote exactly this result (threats, rule 6); None when no turn with the nonce holds it."""
    wanted = canonical(result)
    for turn in turns:
        if turn.nonce == nonce and any(isinstance(value, dict) and canonical(value) == wanted for value in written_objects(turn)):
            return turn.number
    return None
