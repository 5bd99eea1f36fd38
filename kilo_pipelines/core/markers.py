"""Hidden markers of our comments: an HMAC, so that text from outside can't forge one (threats, rule 13)."""

from __future__ import annotations

import hashlib
import hmac

# 128 bits are beyond guessing and keep comments short.
HEX_DIGITS = 32


class Marker:
    """Makes markers under one key; the key never leaves the platform."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def __repr__(self) -> str:
        return "Marker(…)"

    def token(self, scope: str, *parts: object) -> str:
        """The bare token, for fields that are no comment (a check run's external id)."""
        message = "\x00".join([scope, *(str(part) for part in parts)])
        return hmac.new(self._key, message.encode(), hashlib.sha256).hexdigest()[:HEX_DIGITS]

    def make(self, scope: str, *parts: object) -> str:
        """An HTML comment that GitHub doesn't show."""
        return f"<!-- kilo-pipelines:{scope}:{self.token(scope, *parts)} -->"
