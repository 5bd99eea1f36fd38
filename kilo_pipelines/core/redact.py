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
    r"|(?<=://)[^/\s:@]{1,100}:[^/\s@]{1,300}(?=@)"
    r"|(?i:(?<=bearer )|(?<=authorization: basic )|(?<=x-callback-token: ))[A-Za-z0-9._~+/=-]{16,}",
    re.DOTALL,
)


def redact(text: str) -> str:
    """The text with everything that looks like a credential replaced; anything else stays as it is."""
    return _SHAPES.sub(BLACK, text)


class RedactingFilter(logging.Filter):
    """On a handler: no line leaves with a credential in it, whichever library wrote it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrites the finished message; the exception's text, too."""
        record.msg, record.args = redact(record.getMessage()), None
        if record.exc_info:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        return True


def redact_logs() -> None:
    """Puts the filter on every handler of the root logger; called by a process once its logging stands."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(RedactingFilter())
