"""Receivers of notices who want more than a message: another address, another host, or all the time there is."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kilo_pipelines.core.effects import EffectIntent, EffectKind
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.providers import notices as senders
from kilo_pipelines.providers.github import ProviderError

SAID = {"subject": "s", "title": "t", "facts": {}}
DRIP = 0.2


@contextmanager
def receiver(answer: Callable[[socket.socket], None]) -> Iterator[tuple[int, list[bytes]]]:
    """A server that reads a request and answers as it likes: its port, and what it was asked."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    caller, _ = server.accept()
                except OSError:
                    return
                with caller:
                    asked.append(caller.recv(65_536))
                    try:
                        answer(caller)
                    except OSError:
                        """It has had enough of us."""

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1], asked
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def post(url: str) -> Any:
    intent = EffectIntent(
        kind=EffectKind.NOTICE_WEBHOOK,
        intent_key="k",
        subject_key="k",
        payload={"url": url, "notice": "sla_breach", "finding": "f", "message": SAID},
    )
    return senders.send_webhook(intent, b"secret", 1, lambda: None, offline=True)


def drip(head: bytes) -> Callable[[socket.socket], None]:
    """Begins at once and goes on for ever, each byte before a time-out of reading would strike."""

    def answer(caller: socket.socket) -> None:
        caller.sendall(head)
        while True:
            time.sleep(DRIP)
            caller.sendall(b"x")

    return answer


def test_a_redirect_leads_nowhere() -> None:
    with receiver(lambda inner: inner.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")) as (target, reached):

        def lead(caller: socket.socket) -> None:
            caller.sendall(b"HTTP/1.1 307 T\r\nlocation: http://127.0.0.1:%d/\r\ncontent-length: 0\r\n\r\n" % target)

        with receiver(lead) as (port, asked), pytest.raises(ProviderError) as refused:
            post(f"http://127.0.0.1:{port}/x")
    assert refused.value.reason is Reason.CHANNEL_REFUSED and not refused.value.retryable
    assert len(asked) == 1 and reached == []


def test_a_name_that_means_another_address_by_now_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The address that was looked at is connected to; the second answer would be an inner one."""
    answers = iter(["127.0.0.1", "169.254.169.254"])

    def resolve(_host: Any, port: int, *_asked: Any, **_more: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    with receiver(lambda caller: caller.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")) as (port, asked):
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        assert post(f"http://hooks.acme.test:{port}/x").created
    assert f"host: hooks.acme.test:{port}" in asked[0].decode().lower()
    assert next(answers) == "169.254.169.254", "nobody asked a second time"


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nx-slow: "])
def test_a_webhook_that_trickles_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch, head: bytes) -> None:
    monkeypatch.setattr(senders, "TIMEOUT_SECONDS", 3 * DRIP)
    began = time.monotonic()
    with receiver(drip(head)) as (port, _), pytest.raises(ProviderError) as refused:
        post(f"http://127.0.0.1:{port}/x")
    assert refused.value.reason is Reason.PROVIDER_UNAVAILABLE and time.monotonic() - began < 5


def test_nothing_of_a_webhooks_answer_is_waited_for_but_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(senders, "TIMEOUT_SECONDS", 3 * DRIP)
    with receiver(drip(b"HTTP/1.1 200 OK\r\ncontent-length: 999999\r\n\r\n")) as (port, _):
        assert post(f"http://127.0.0.1:{port}/x").created


def test_a_slack_that_trickles_is_a_lost_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(senders, "TIMEOUT_SECONDS", 3 * DRIP)
    intent = EffectIntent(
        kind=EffectKind.NOTICE_SLACK, intent_key="k", subject_key="k", payload={"channel": "#c", "message": SAID}
    )
    with (
        receiver(drip(b"HTTP/1.1 200 OK\r\ncontent-length: 999999\r\n\r\n{")) as (port, _),
        pytest.raises(ProviderError) as refused,
    ):
        senders.send_slack(intent, f"http://127.0.0.1:{port}", "xoxb", lambda: None)
    assert refused.value.reason is Reason.PROVIDER_UNAVAILABLE
