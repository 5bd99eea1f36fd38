"""How a provider fails: one error with a stable reason, whether another try can help, and when."""

from __future__ import annotations

from kilo_pipelines.core.reasons import Reason


class ProviderError(Exception):
    """A call to a provider failed.

    `reason` is a code of `core.reasons`; `retryable` says whether the same call may succeed later; `retry_after_s` is the
    provider's own wish in seconds, None when it named none; `status` is the HTTP status, None without an answer.
    The text is for people and holds no credential.
    """

    def __init__(
        self, reason: Reason | str, *, retryable: bool, retry_after_s: float | None = None, detail: str = "", status: int | None = None
    ) -> None:
        self.reason = Reason(reason)
        self.retryable = retryable
        self.retry_after_s = retry_after_s
        self.detail = detail
        self.status = status
        super().__init__(f"{self.reason}: {detail}" if detail else str(self.reason))
