"""Who is told what and when, what a message may hold, and which addresses a webhook may have."""

from __future__ import annotations

import socket
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kilo_pipelines.core.effects import EffectKind
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.providers import notices as senders
from kilo_pipelines.providers.github import ProviderError
from kilo_pipelines.services.security import notices as rules
from kilo_pipelines.services.security.config import SecurityConfig, activated
from tests.unit.test_security_analysis import finding as facts

NOW = datetime(2026, 5, 1, tzinfo=UTC)
TO = [
    {"kind": "email", "address": "ada@acme.test"},
    {"kind": "slack", "channel": "#security"},
    {"kind": "webhook", "url": "https://hooks.acme.test/x"},
]


def config(**more: Any) -> SecurityConfig:
    return SecurityConfig.model_validate(
        {"notice_recipients": TO, "notices_enabled_at": NOW, "new_finding_notices": True, **more}
    )


def wanted(kind: str, settings: SecurityConfig | None = None, **more: Any) -> bool:
    known = {
        "status": "open",
        "watched": True,
        "severity": "high",
        "due_at": NOW,
        "paused": False,
        "first_seen_at": NOW,
        "now": NOW,
    }
    return rules.is_wanted(settings or config(), kind, **known | more)


@given(st.integers(-400 * 86_400, 400 * 86_400), st.integers(1, 365))
def test_a_deadline_is_near_or_passed_and_never_both(seconds: int, days: int) -> None:
    now = NOW + timedelta(seconds=seconds)
    settings = config(sla_notice_warning_days=days)
    warned, breached = wanted("sla_warning", settings, now=now), wanted("sla_breach", settings, now=now)
    assert breached == (seconds >= 0)
    assert warned == (-days * 86_400 <= seconds < 0)


@pytest.mark.parametrize(
    "more",
    [
        {"status": "ignored"},
        {"status": "fixed"},
        {"watched": False},
        {"severity": "medium"},
        {"severity": "catastrophic"},
        {"due_at": None},
        {"paused": True},
    ],
)
def test_nobody_is_told_of_what_isnt_open_watched_grave_and_due(more: dict[str, Any]) -> None:
    assert wanted("sla_breach") and not wanted("sla_breach", **more)


def test_switches_are_obeyed_and_without_recipients_nobody_is_told() -> None:
    assert not wanted("sla_breach", config(sla_notices=False)) and not wanted("sla_breach", config(notice_recipients=[]))
    assert wanted("new_finding") and not wanted("new_finding", config(new_finding_notices=False))
    assert not wanted("new_finding", first_seen_at=NOW - timedelta(seconds=1)), "it was there before there was somebody to tell"


def test_naming_recipients_stamps_the_moment() -> None:
    stored = activated(SecurityConfig(), SecurityConfig.model_validate({"notice_recipients": TO}), NOW)
    assert stored.notices_enabled_at == NOW
    assert activated(stored, stored, NOW + timedelta(days=1)).notices_enabled_at == NOW


@pytest.mark.parametrize(
    "recipient",
    [
        {"kind": "email", "address": "ada@acme.test\nBcc: eve@evil.test"},
        {"kind": "email", "address": "ada"},
        {"kind": "slack", "channel": "<!everyone>"},
        {"kind": "webhook", "url": "http://hooks.acme.test/x"},
        {"kind": "webhook", "url": "https://user:secret@hooks.acme.test/x"},
        {"kind": "webhook", "url": "https://hooks.acme.test/x\n"},
        {"kind": "webhook", "url": "file:///etc/passwd"},
        {"kind": "webhook", "url": "https://h:99999/"},
        {"kind": "webhook", "url": "https://h:0x/"},
        {"kind": "webhook", "url": "https://h:0/"},
        {"kind": "webhook", "url": "https://:443/"},
        {"kind": "webhook", "url": "https://[::1"},
        {"kind": "webhook", "url": "https://a..b/"},
        {"kind": "webhook", "url": f"https://{'a' * 64}.test/"},
        {"kind": "pigeon", "address": "x"},
    ],
)
def test_a_recipient_that_isnt_one_is_refused(recipient: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        SecurityConfig.model_validate({"notice_recipients": [recipient]})


@given(st.text(max_size=300))
def test_outside_text_makes_no_line_and_no_header_of_its_own(text: str) -> None:
    one = facts(id=uuid4(), title=text, package_name=text, html_url="https://x.test")
    effects = rules.effects(uuid4(), one, "sla_breach", config(), text, NOW)
    assert [effect.kind for effect in effects] == [EffectKind.NOTICE_EMAIL, EffectKind.NOTICE_SLACK, EffectKind.NOTICE_WEBHOOK]
    said = effects[0].payload["message"]
    assert not [part for part in (said["subject"], said["title"], *said["facts"].values()) if len(part.splitlines()) > 1]
    assert len(said["subject"]) < 300


def test_one_message_for_each_kind_finding_and_person_ever() -> None:
    one = facts(id=uuid4(), html_url=None)
    first = {effect.intent_key for effect in rules.effects(uuid4(), one, "sla_breach", config(), "r", NOW)}
    again = {effect.intent_key for effect in rules.effects(uuid4(), one, "sla_breach", config(), "renamed", None)}
    other = {effect.intent_key for effect in rules.effects(uuid4(), one, "sla_warning", config(), "r", NOW)}
    assert first == again and len(first) == 3 and not first & other


@pytest.mark.parametrize(
    "url", ["https://hooks.acme.test/x?y=z", "https://h:8443/", "https://[2606:4700::1111]/", "https://bücher.test/"]
)
def test_a_webhooks_address_may_be_any_that_can_be_asked_for(url: str) -> None:
    assert config(notice_recipients=[{"kind": "webhook", "url": url}]).notice_recipients


def test_slack_gets_no_mention() -> None:
    assert senders._slack("<!everyone> & <@U1>") == "&lt;!everyone&gt; &amp; &lt;@U1&gt;"


def test_a_webhooks_signature_is_that_of_standard_webhooks() -> None:
    """The vector of its specification's reference libraries."""
    import base64

    secret = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    body = b'{"test": 2432232314}'
    expected = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert senders.signature(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body) == expected


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "169.254.169.254",
        "192.168.1.1",
        "0.0.0.0",
        "::1",
        "fe80::1",
        "::ffff:10.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::a00:1",
        "2002:a9fe:a9fe::",
        "2002:7f00:1::",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "::7f00:1",
        "::ffff:0:10.0.0.1",
        "fec0::1",
        "224.0.0.1",
        "100.64.0.1",
    ],
)
@pytest.mark.parametrize("offline", [False, True])
def test_a_webhook_never_goes_to_an_inner_address(monkeypatch: pytest.MonkeyPatch, address: str, offline: bool) -> None:
    def resolve(*_asked: Any, **_more: Any) -> list[Any]:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return [(family, 1, 6, "", (address, 443)), (socket.AF_INET, 1, 6, "", ("93.184.216.34", 443))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(ProviderError) as refused:
        senders.public_address("https://hooks.acme.test/x", offline=offline)
    assert refused.value.reason is Reason.ADDRESS_REFUSED and not refused.value.retryable


@pytest.mark.parametrize("address", ["93.184.216.34", "::ffff:5db8:d822", "2606:4700::1111"])
def test_a_webhook_goes_to_the_address_that_was_looked_at(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_asked, **_more: [(0, 1, 6, "", (address, 443))])
    assert senders.public_address("https://hooks.acme.test/x", offline=False) == address


@pytest.mark.parametrize(
    "url", ["https://h:99999/", "https://h:0x/", "https://[::1", "https://a..b/", f"https://{'a' * 64}.test/"]
)
def test_an_address_that_is_none_is_refused_and_stops_nobody_elses_messages(url: str) -> None:
    with pytest.raises(ProviderError) as refused:
        senders.public_address(url, offline=False)
    assert refused.value.reason is Reason.ADDRESS_REFUSED and not refused.value.retryable
