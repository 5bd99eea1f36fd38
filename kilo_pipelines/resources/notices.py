"""The channels by which people are told: addresses and secrets of the platform, one message at a time."""

from __future__ import annotations

import time
from collections.abc import Callable

from kilo_pipelines import failpoints
from kilo_pipelines.core.effects import EffectIntent, EffectKind, EffectReceipt
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.providers import notices
from kilo_pipelines.providers.github import ProviderError
from kilo_pipelines.providers.github_effects import LostLeaseError
from kilo_pipelines.settings import current


def send(intent: EffectIntent, secret: bytes, before_write: Callable[[], bool]) -> EffectReceipt:
    """Sends one notice; ProviderError with a reason and whether it may be tried again, LostLeaseError when `before_write` says no.

    `secret` signs the owner's webhooks.
    """
    settings = current()

    def gate() -> None:
        if not before_write():
            raise LostLeaseError("the effect's lease is somebody else's")
        failpoints.reach("before", f"send.{intent.kind}")

    if intent.kind is EffectKind.NOTICE_EMAIL:
        if settings.smtp_url is None or settings.smtp_from is None:
            raise ProviderError(Reason.CHANNEL_MISSING, retryable=False, detail="KILO_SMTP_URL or KILO_SMTP_FROM is not set")
        file = settings.smtp_password_file
        password = file.read_text().strip() if file.exists() else None
        receipt = notices.send_email(intent, settings.smtp_url, settings.smtp_from, password, gate)
    elif intent.kind is EffectKind.NOTICE_SLACK:
        if not settings.slack_token_file.exists():
            raise ProviderError(Reason.CHANNEL_MISSING, retryable=False, detail="there is no Slack token")
        token = settings.slack_token_file.read_text().strip()
        receipt = notices.send_slack(intent, settings.slack_api_url, token, gate)
    else:
        receipt = notices.send_webhook(intent, secret, int(time.time()), gate, offline=settings.offline)
    failpoints.reach("after", f"send.{intent.kind}")
    return receipt
