"""Text from models and from outside becomes harmless Markdown before it is posted (threats, rule 13)."""

from __future__ import annotations

import re

# Controls, direction marks and everything else that a person doesn't see and a model does: tag characters and variation
# selectors spell whole sentences. Written with escapes only, so that this file holds none of them.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\u00ad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u17b4\u17b5\u180e"
    "\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# Line ends for JavaScript's and Python's readers of lines, which is what bots are written in.
_LINE_ENDS = re.compile("\r\n|[\r\x85\u2028\u2029]")
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
# Renderers decode these first: `&#64;` is a mention.
_ENTITY = re.compile(r"&(?=#?\w{1,32};)")
_IMAGE = re.compile(r"!\[")
_MENTION = re.compile(r"@(?=[A-Za-z0-9_])")
_LISTED = r"(?:[^\S\n]|[>*+\-#|]|\d{1,9}[.)])*+"
_COMMAND = re.compile(rf"^({_LISTED})/", re.MULTILINE)
# One click away from being committed, and rendered out of any text; ours are put together in `services/*/render.py`.
# A fence, and before it whatever some reader may take for the marker of a list or a quotation.
_SUGGESTION = re.compile(r"^((?:[^\S\n]|[>*+\-#|.)\d])*+(?:`{3,}|~{3,})[^\S\n]*)(?=suggestion)", re.MULTILINE | re.IGNORECASE)
_CLOSING = re.compile(
    r"\b(clos(?:e|es|ed|ing)|fix(?:es|ed|ing)?|resolv(?:e|es|ed|ing))(\s*:?\s+)(?=#|GH-|https?://|[\w.-]+/[\w.-]+#)",
    re.IGNORECASE,
)
# What UTF-8 has no bytes for.
_SURROGATE = re.compile("[\ud800-\udfff]")
_LINK = re.compile(r"\]\(\s*(?!https?://)[^)]*\)")

# An invisible joiner behind the sign keeps the text readable, in code too, and breaks tag, mention and command.
_JOINER = "\u2060"


def storable(text: str) -> str:
    """The same text without what PostgreSQL refuses: NUL characters and lone surrogates."""
    return _SURROGATE.sub("\ufffd", text.replace("\x00", ""))


def clean(text: str) -> str:
    """Line ends unified, control and direction characters removed (an invisible instruction is none)."""
    return _CONTROL.sub("", _LINE_ENDS.sub("\n", text))


def harmless(text: str) -> str:
    """Markdown without HTML, images, mentions, commands, suggestions, closing keywords or links that aren't http(s)."""
    safe = clean(text)
    safe = _TAG.sub(f"<{_JOINER}", safe)
    safe = _ENTITY.sub(f"&{_JOINER}", safe)
    safe = _IMAGE.sub("!\\[", safe)
    safe = _LINK.sub("](#)", safe)
    safe = _MENTION.sub(f"@{_JOINER}", safe)
    safe = _COMMAND.sub(rf"\1{_JOINER}/", safe)
    safe = _SUGGESTION.sub(rf"\1{_JOINER}", safe)
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


def plain_line(text: str) -> str:
    """A name from outside on one line of a brief, at most 300 characters."""
    return " ".join(clean(text).split())[:300]


def as_data(text: str, nonce: str) -> str:
    """A fence that the text can't close, marked as data with the nonce that the text can't know."""
    mark = fence(text)
    return f"{mark} DATA {nonce}\n{text}\n{mark}"
