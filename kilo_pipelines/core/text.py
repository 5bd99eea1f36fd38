"""Text from models and from outside becomes harmless Markdown before it is posted (threats, rule 13)."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_IMAGE = re.compile(r"!\[")
_MENTION = re.compile(r"@(?=[A-Za-z0-9_])")
_COMMAND = re.compile(r"^([ \t>*\-]*)/", re.MULTILINE)
_CLOSING = re.compile(
    r"\b(clos(?:e|es|ed|ing)|fix(?:es|ed|ing)?|resolv(?:e|es|ed|ing))(\s*:?\s+)(?=#|GH-|https?://|[\w.-]+/[\w.-]+#)",
    re.IGNORECASE,
)
_LINK = re.compile(r"\]\(\s*(?!https?://)[^)]*\)")

# An invisible joiner behind the sign keeps the text readable, in code too, and breaks tag, mention and command.
_JOINER = "\u2060"


def clean(text: str) -> str:
    """Line ends unified, control and direction characters removed (an invisible instruction is none)."""
    return _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def harmless(text: str) -> str:
    """Markdown without HTML, images, mentions, commands, closing keywords or links that aren't http(s)."""
    safe = clean(text)
    safe = _TAG.sub(f"<{_JOINER}", safe)
    safe = _IMAGE.sub("!\\[", safe)
    safe = _LINK.sub("](#)", safe)
    safe = _MENTION.sub(f"@{_JOINER}", safe)
    safe = _COMMAND.sub(rf"\1{_JOINER}/", safe)
    return _CLOSING.sub(rf"\1{_JOINER}\2", safe)


def one_line(text: str, limit: int) -> str:
    """One harmless line of at most `limit` characters."""
    line = " ".join(harmless(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def cut(text: str, limit: int) -> str:
    """At most `limit` characters, with a visible note when something was cut."""
    note = "\n\n_(shortened)_"
    return text if len(text) <= limit else text[: limit - len(note)] + note


def fence(text: str) -> str:
    """A code fence that the text can't close: longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)
