"""What may be said in a span or beside a log line: ids, counts and codes by a closed list of names, each with its shape.

Titles, prompts, bodies, addresses and tokens have no name here, and what doesn't have its name's shape is left out: telemetry leaves
the platform for systems that keep it for long and show it to many (threats, E).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypedDict
from uuid import UUID

# W3C Trace Context, version 00: trace id, parent id, flags. Only what this platform made itself is ever stored or read back.
TRACE_PATTERN = r"^00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]$"

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}").fullmatch
# Services, states, reason codes, event names, kinds of effects: all of them are words of ours or of a provider's fixed list.
_WORD = re.compile(r"[a-z][a-z0-9_.]{0,63}").fullmatch


class Facts(TypedDict, total=False):
    """The names."""

    owner: UUID | str | None
    integration: UUID | str | None
    delivery: UUID | str | None
    item: UUID | str | None
    session: UUID | str | None
    effect: UUID | str | None
    run: str | None
    service: str | None
    event: str | None
    kind: str | None
    state: str | None
    outcome: str | None
    reason: str | None
    repository: int | None
    attempt: int | None
    fence: int | None
    tries: int | None
    status: int | None
    bytes: int | None
    files: int | None
    part: int | None
    turns: int | None
    requests: int | None
    covered: int | None
    tokens_in: int | None
    tokens_out: int | None


def _number(value: str) -> object:
    return value.lstrip("-").isdecimal() and len(value) <= 20  # a 64-bit number


_SHAPES: dict[str, Callable[[str], object]] = {
    **dict.fromkeys(("owner", "integration", "delivery", "item", "session", "effect", "run"), _ID),
    **dict.fromkeys(("service", "event", "kind", "state", "outcome", "reason"), _WORD),
    **dict.fromkeys(
        ("repository", "attempt", "fence", "tries", "status", "bytes", "files", "part", "turns", "requests", "covered"), _number
    ),
    **dict.fromkeys(("tokens_in", "tokens_out"), _number),
}
# Which of them every log line within a span carries: whose work it is, not how it went.
ABOUT = ("owner", "integration", "delivery", "item", "session", "effect", "run", "service")


def told(facts: Mapping[str, object]) -> dict[str, str | int]:
    """The facts that have a name and its shape; nothing else."""
    found: dict[str, str | int] = {}
    for name, value in facts.items():
        shape = _SHAPES.get(name)
        if value is None or shape is None:
            continue
        text = str(value)
        if shape(text):
            found[name] = int(text) if shape is _number else text
    return found


_about: ContextVar[Mapping[str, object]] = ContextVar("kilo_about", default={})  # noqa: B039  # replaced, never written to


def about() -> dict[str, str | int]:
    """Whose work this thread or task does now."""
    return told({name: value for name, value in _about.get().items() if name in ABOUT})


@contextmanager
def speaking_of(facts: Mapping[str, object]) -> Iterator[None]:
    """Log lines of this block carry these ids, besides those of the blocks around it."""
    token = _about.set({**_about.get(), **facts})
    try:
        yield
    finally:
        _about.reset(token)


def speak_of(facts: Mapping[str, object]) -> None:
    """The same for the rest of the block around, when an id is known only later."""
    _about.set({**_about.get(), **facts})
