"""Secrets out of texts: whatever looks like a credential is blacked out before it is logged, stored or posted (threats, rule 23).

Shapes only: the platform's own secrets never come near these texts by design; this stops what a pull request, an agent or a
library's message carries along.
"""

from __future__ import annotations

import logging
import re

BLACK = "[redacted]"

# GitHub: "Behind GitHub's new authentication token formats" (ghp_, gho_, ghu_, ghs_, ghr_, github_pat_); ours: kilo_; model keys
# of the common form sk-…; credentials in addresses; authorization headers; PEM blocks.
_SHAPES = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|\b(?:gh[pousr]_[A-Za-z0-9]{20,255}|github_pat_[A-Za-z0-9_]{20,255}|kilo_[A-Za-z0-9_-]{40,64}|sk-[A-Za-z0-9_-]{20,200}|xox[abprs]-[A-Za-z0-9-]{10,200}|AKIA[0-9A-Z]{16})\b"
    r"|(?<=://)[^/\s:@]{0,100}:[^/\s@]{1,300}(?=@)"
    r"|(?i:(?<=bearer )|(?<=authorization: basic )|(?<=x-callback-token: ))[A-Za-z0-9._~+/=-]{16,}",
    re.DOTALL,
)


def redact(text: str) -> str:
    """The text with everything that looks like a credential replaced; anything else stays as it is."""
    return _SHAPES.sub(BLACK, text)


# A log line besides may be a header, a setting or an argument by its name: what stands behind such a name is nobody's to read. In
# comments and stored texts it may be the code under review.
_HEADERS = re.compile(
    r"""(?i)((?:proxy-)?authorization|(?:set-)?cookie)(['"]?\)?\s*[:=,]\s*(?:b?['"])?)(?!\[redacted\])([^\r\n'"]{4,})"""
)
_NAMED = re.compile(
    r"(?i)(x-[a-z-]*(?:token|key|secret|signature[a-z0-9-]*)"
    r"|[a-z_-]*(?:password|passwd|secret|api[_-]?key|access[_-]?token|private[_-]?key))"
    r"""(['"]?\)?\s*[:=,]\s*(?:b?['"])?)(?!\[redacted\])([^\s'",;)}\]]{6,})"""
)


def redact_line(text: str) -> str:
    """The same for a log line: also what stands behind the name of a header or setting that holds a secret."""
    scrubbed = redact(text)
    for names in (_HEADERS, _NAMED):
        scrubbed = names.sub(lambda found: f"{found.group(1)}{found.group(2)}{BLACK}", scrubbed)
    return scrubbed


class RedactingFilter(logging.Filter):
    """On a handler: no line leaves with a credential in it, whichever library wrote it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrites the finished message; the exception's text, too."""
        try:
            message = record.getMessage()
        except (TypeError, ValueError, KeyError):  # a caller's slip in a format must not end its work, nor lose the line
            message = str(record.msg)
        record.msg, record.args = redact_line(message), None
        if record.exc_info:
            record.exc_text = redact_line(logging.Formatter().formatException(record.exc_info))
        return True


def redact_logs() -> None:
    """Puts the filter on every handler of the root logger; called by a process once its logging stands."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(RedactingFilter())
