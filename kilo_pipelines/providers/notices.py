"""Sends notices: mail by SMTP, messages to Slack, signed JSON to a webhook. One try each; when to try again is the outbox's.

What fails before a message can have been taken is `channel_unavailable` and may be tried again; a lost answer is
`provider_unavailable`, after which nothing is sent twice by itself. Addresses are an owner's: a webhook is only sent to hosts of the
public internet (threats, rule 22), except in the offline world.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import smtplib
import ssl
from collections.abc import Callable
from email.message import EmailMessage
from email.policy import SMTP
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx

from kilo_pipelines.core.effects import EffectIntent, EffectReceipt
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.providers import outbound
from kilo_pipelines.providers.github import ProviderError, retry_after
from kilo_pipelines.settings import LOOPBACK

# A whole HTTP exchange: httpx's own time-outs are per read, so that a trickle would never end. It ends within the effect's lease (20 s).
# Of mail, whose server is the operator's, each step.
TIMEOUT_SECONDS = 10.0
# Reaching the address, and once more the TLS handshake: together less than the whole, which then only ends what was sent already.
CONNECT_SECONDS = 4.0
# Nothing of Slack's answer is used but its first words, and nothing of a webhook's.
ANSWER_BYTES = 65_536
# Slack's codes that pass by themselves (chat.postMessage, errors).
_SLACK_PASSING = frozenset({"ratelimited", "rate_limited", "service_unavailable", "request_timeout"})
# Those after which the message may have been posted all the same: a lost answer.
_SLACK_LOST = frozenset({"internal_error", "fatal_error"})


def _refused(reason: Reason, detail: str, *, retryable: bool = False, wait: float | None = None) -> ProviderError:
    return ProviderError(reason, retryable=retryable, retry_after_s=wait, detail=detail)


def _text(message: dict[str, Any]) -> str:
    facts = "\n".join(f"{name}: {value}" for name, value in message["facts"].items())
    return f"{message['title']}\n\n{facts}\n"


# -- mail -----------------------------------------------------------------------------------------------------------------


def send_email(
    intent: EffectIntent, url: str, sender: str, password: str | None, before_write: Callable[[], None]
) -> EffectReceipt:
    """One mail; `url`: smtp://host:port (with STARTTLS unless it is this machine) or smtps://user@host."""
    # Lines end as SMTP wants them, and every byte is ASCII: nobody has to ask whether the server takes others.
    message = EmailMessage(policy=SMTP.clone(cte_type="7bit"))
    said = intent.payload["message"]
    message["From"], message["To"], message["Subject"] = sender, intent.payload["address"], said["subject"]
    message["Message-ID"] = f"<{hashlib.sha256(intent.intent_key.encode()).hexdigest()[:32]}@kilo-pipelines.invalid>"
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(_text(said))
    server = _connected(url, password)
    try:
        before_write()
        refused = _handed_over(server, message)
    finally:
        server.close()
    if refused:
        raise _refused(Reason.CHANNEL_REFUSED, "the mail server refuses the address")
    return EffectReceipt(external_id=str(message["Message-ID"]), created=True)


def _connected(url: str, password: str | None) -> smtplib.SMTP:
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        if parts.scheme == "smtps":
            server: smtplib.SMTP = smtplib.SMTP_SSL(
                host, parts.port or 465, timeout=TIMEOUT_SECONDS, context=ssl.create_default_context()
            )
        else:
            server = smtplib.SMTP(host, parts.port or 587, timeout=TIMEOUT_SECONDS)
            if host not in LOOPBACK:
                server.starttls(context=ssl.create_default_context())
        if parts.username and password is not None:
            server.login(unquote(parts.username), password)
    except smtplib.SMTPAuthenticationError:
        raise _refused(Reason.CHANNEL_REFUSED, "the mail server refuses the login") from None
    except (OSError, smtplib.SMTPException) as failure:
        raise _refused(Reason.CHANNEL_UNAVAILABLE, type(failure).__name__, retryable=True) from None
    return server


def _handed_over(server: smtplib.SMTP, message: EmailMessage) -> bool:
    """Whether the address was refused; a lost answer to the body itself is `provider_unavailable`."""
    try:
        server.ehlo_or_helo_if_needed()
        if server.mail(str(message["From"]))[0] != 250:
            raise _refused(Reason.CHANNEL_UNAVAILABLE, "the mail server takes no sender now", retryable=True)
        status = server.rcpt(str(message["To"]))[0]
        if status not in (250, 251):
            if 400 <= status < 500:
                raise _refused(Reason.CHANNEL_UNAVAILABLE, f"SMTP {status}", retryable=True)
            return True
    except (OSError, smtplib.SMTPException) as failure:
        raise _refused(Reason.CHANNEL_UNAVAILABLE, type(failure).__name__, retryable=True) from None
    try:
        status = server.data(message.as_bytes())[0]
    except smtplib.SMTPDataError as failure:
        status = failure.smtp_code
    except (OSError, smtplib.SMTPException) as failure:
        raise _refused(Reason.PROVIDER_UNAVAILABLE, type(failure).__name__, retryable=True) from None
    if status != 250:
        passing = 400 <= status < 500  # nothing was taken, and a later try may be (greylisting)
        reason = Reason.CHANNEL_UNAVAILABLE if passing else Reason.CHANNEL_REFUSED
        raise _refused(reason, f"SMTP {status}", retryable=passing)
    return False


# -- Slack ----------------------------------------------------------------------------------------------------------------


def _slack(text: str) -> str:
    """Slack reads these three, and mentions begin with one of them (formatting text, escaping)."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def send_slack(intent: EffectIntent, api: str, token: str, before_write: Callable[[], None]) -> EffectReceipt:
    """One message to a channel."""
    said = intent.payload["message"]
    body = {
        "channel": intent.payload["channel"],
        "text": _slack(f"{said['subject']}\n{_text(said)}"),
        "mrkdwn": False,
        "unfurl_links": False,
        "parse": "none",
    }
    before_write()
    status, headers, raw = _post(
        f"{api}/chat.postMessage", json.dumps(body).encode(), {"authorization": f"Bearer {token}"}, most=ANSWER_BYTES
    )
    wait = retry_after(headers)
    if status == 429:
        raise _refused(Reason.CHANNEL_UNAVAILABLE, "Slack asks to wait", retryable=True, wait=wait or 30.0)
    if status >= 500:
        raise _refused(Reason.PROVIDER_UNAVAILABLE, f"HTTP {status}", retryable=True)
    try:
        answer = json.loads(raw)
    except ValueError:
        raise _refused(Reason.PROVIDER_UNAVAILABLE, "the answer is not JSON", retryable=True) from None
    if status != 200 or not isinstance(answer, dict) or answer.get("ok") is not True:
        code = str(answer.get("error", status))[:60] if isinstance(answer, dict) else str(status)
        if code in _SLACK_LOST:
            raise _refused(Reason.PROVIDER_UNAVAILABLE, code, retryable=True)
        if code in _SLACK_PASSING:
            raise _refused(Reason.CHANNEL_UNAVAILABLE, code, retryable=True, wait=wait)
        raise _refused(Reason.CHANNEL_REFUSED, code)
    return EffectReceipt(external_id=str(answer.get("ts", ""))[:100], created=True)


# -- webhooks -------------------------------------------------------------------------------------------------------------


def signature(secret: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """Over id, time and body, as Standard Webhooks signs: `v1,` and the HMAC-SHA256 in base64."""
    digest = hmac.new(secret, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


def send_webhook(
    intent: EffectIntent, secret: bytes, timestamp: int, before_write: Callable[[], None], *, offline: bool
) -> EffectReceipt:
    """One signed POST; the same id each time, so that a receiver can tell a repeated one. `offline`: this machine may be sent to."""
    url = intent.payload["url"]
    address = public_address(url, offline=offline)
    body = {"type": f"security.{intent.payload['notice']}", "finding": intent.payload["finding"], **intent.payload["message"]}
    raw = json.dumps(body, sort_keys=True).encode()
    message_id = f"msg_{hashlib.sha256(intent.intent_key.encode()).hexdigest()[:32]}"
    headers = {
        "content-type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signature(secret, message_id, timestamp, raw),
    }
    before_write()
    status, answered, _ = _post(url, raw, headers, most=0, address=address)
    if 200 <= status < 300:
        return EffectReceipt(external_id=message_id, created=True)
    passing = status == 429 or status >= 500
    reason = Reason.CHANNEL_UNAVAILABLE if passing else Reason.CHANNEL_REFUSED
    raise _refused(reason, f"HTTP {status}", retryable=passing, wait=retry_after(answered) if passing else None)


def public_address(url: str, *, offline: bool) -> str:
    """The address of the URL's host, which is then connected to; ProviderError `address_refused` unless all of them are public."""
    try:
        return outbound.vetted_address(url, loopback=offline)
    except outbound.UnreachableError as failure:
        raise _refused(Reason.CHANNEL_UNAVAILABLE, str(failure), retryable=True) from None
    except outbound.AddressRefusedError as failure:
        raise _refused(Reason.ADDRESS_REFUSED, str(failure)) from None


def _post(
    url: str, raw: bytes, headers: dict[str, str], *, most: int, address: str | None = None
) -> tuple[int, httpx.Headers, bytes]:
    """Status, headers and the first `most` bytes of the answer, all within TIMEOUT_SECONDS; no redirects.

    `address` is connected to, whatever the name means by now.
    """
    asked = outbound.exchange(
        "POST",
        url,
        address=address,
        headers={"content-type": "application/json; charset=utf-8", **headers},
        content=raw,
        most=most,
        seconds=TIMEOUT_SECONDS,
        connect=CONNECT_SECONDS,
    )
    try:
        answer = asyncio.run(asked)
    except outbound.UnreachableError as failure:
        raise _refused(Reason.CHANNEL_UNAVAILABLE, str(failure), retryable=True) from None
    except outbound.AnswerLostError as failure:
        raise _refused(Reason.PROVIDER_UNAVAILABLE, str(failure), retryable=True) from None
    return answer.status, answer.headers, answer.content
