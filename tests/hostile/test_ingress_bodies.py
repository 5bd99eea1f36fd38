"""Bad input at the public listener: every answer is a refusal with a reason, none is a 5xx, no secret is logged."""

from __future__ import annotations

import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest

from tests.support.ingress import INSTALLATION, SECRET, IngressWorld, lifecycle, pull_request, sign, world

__all__ = ["world"]

MEGABYTE = 2**20


def _status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


def test_more_than_25_mb_is_413_before_it_is_read(world: IngressWorld) -> None:
    head = f"POST /webhooks/github HTTP/1.1\r\nHost: localhost\r\nContent-Length: {25 * MEGABYTE + 1}\r\n\r\n".encode()
    began = time.monotonic()
    assert _status(world.raw(head)) == 413
    assert time.monotonic() - began < 5


def test_more_than_25_mb_in_chunks_without_a_length_is_413(world: IngressWorld) -> None:
    chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    head = b"POST /webhooks/github HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert _status(world.raw(head + chunk * 27 + b"0\r\n\r\n")) == 413


def test_just_under_25_mb_is_taken(world: IngressWorld) -> None:
    payload = pull_request()
    payload["padding"] = "x" * (25 * MEGABYTE - len(json.dumps(payload)) - 100)
    assert world.webhook(payload).status_code == 202


def test_a_large_callback_is_413(world: IngressWorld) -> None:
    answer = world.post(f"/callbacks/sessions/{uuid4()}", b" " * (MEGABYTE + 1), {"X-Callback-Token": "x"})
    assert answer.status_code == 413


def test_slow_senders_do_not_stop_others(world: IngressWorld) -> None:
    """Ten connections that never send what they announce hold no place that a real delivery needs."""
    wires = []
    try:
        for _ in range(10):
            wire = socket.create_connection(("127.0.0.1", world.public))
            wire.sendall(b"POST /webhooks/github HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")
            wires.append(wire)
        began = time.monotonic()
        assert world.webhook(pull_request()).status_code == 202
        body = json.dumps(pull_request()).encode()
        chunked = (
            b"POST /webhooks/github HTTP/1.1\r\nHost: localhost\r\nX-GitHub-Event: pull_request\r\nX-GitHub-Delivery: %s\r\n"
            b"X-Hub-Signature-256: %s\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
        ) % (str(uuid4()).encode(), sign(body).encode(), len(body), body)
        assert _status(world.raw(chunked)) == 202
        assert time.monotonic() - began < 5
    finally:
        for wire in wires:
            wire.close()


BODIES: dict[str, bytes] = {
    "empty": b"",
    "text": b"hello",
    "truncated": json.dumps(pull_request()).encode()[:-20],
    "list": b"[]",
    "number": b"1",
    "null": b"null",
    "arrays 100k deep": b"[" * 100_000,
    "objects 100k deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep in a field": b'{"installation": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    "number of 100k digits": b'{"number": ' + b"9" * 100_000 + b"}",
    "not a number": b'{"number": NaN}',
    "infinity": b'{"number": Infinity}',
    "beyond every float": b'{"number": 1e999}',
    "nul byte": b'{"action": "a\x00"}',
    "not UTF-8": b'{"action": "\xff\xfe"}',
    "UTF-16": json.dumps(pull_request()).encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(pull_request()).encode(),
    "form": b"payload=%7B%7D",
    "unfinished string": b'{"a": "' + b"\\" * 9_999,
}


@pytest.mark.parametrize("name", BODIES)
def test_what_is_not_a_json_object_is_400(world: IngressWorld, name: str) -> None:
    answer = world.webhook(None, body=BODIES[name])
    assert answer.status_code == 400, answer.text
    assert answer.json()["reason"] in ("body_not_json", "body_too_deep")


def test_duplicate_keys_are_tolerated(world: IngressWorld) -> None:
    body = json.dumps(pull_request()).encode()
    assert world.webhook(None, body=b'{"action": "closed", ' + body[1:]).status_code == 202


def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at] * bool(at) + [path for key, one in inner for path in _paths(one, (*at, key))]


def _with(payload: dict[str, Any], path: tuple[Any, ...], value: Any, *, remove: bool = False) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(payload))
    here: Any = changed
    for key in path[:-1]:
        here = here[key]
    if remove:
        del here[path[-1]]
    else:
        here[path[-1]] = value
    return changed


STRANGE = [None, True, -1, 0, 2**63, 2**200, 1.5, "", "x\x00y", "\ud800", "x" * 70_000, [], [None], {}, {"id": 1}, [[1]]]


@pytest.mark.parametrize("event", ["pull_request", "installation", "installation_repositories", "ping", "issues"])
def test_no_field_of_any_type_makes_a_5xx(world: IngressWorld, event: str) -> None:
    """Every field of every event: missing, and of every wrong type and size."""
    label = {"id": 77, "full_name": "octo/third", "private": True}
    seeds: dict[str, dict[str, Any]] = {
        "pull_request": pull_request(),
        "installation": lifecycle("new_permissions_accepted", repositories=[label]),
        "installation_repositories": lifecycle("added", repositories_added=[label], repositories_removed=[label]),
        "ping": {"zen": "Design for failure.", "hook_id": 1, "hook": {"type": "App"}},
        "issues": {"action": "opened", "issue": {"number": 1}, "installation": {"id": INSTALLATION}},
    }
    seed = seeds[event]
    cases = [_with(seed, path, None, remove=True) for path in _paths(seed)]
    cases += [_with(seed, path, value) for path in _paths(seed) for value in STRANGE]
    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(lambda case: (world.webhook(case, event).status_code, case), cases))
    bad = [(status, case) for status, case in statuses if status >= 500]
    assert not bad, bad[:3]
    assert {status for status, _ in statuses} <= {200, 202, 400, 404, 409}


def test_no_mutation_of_a_signed_request_is_taken(world: IngressWorld) -> None:
    """Flipped bits, cuts and insertions in body or signature: 401 each time (400 when HTTP itself breaks)."""
    chance = random.Random(20_260)
    body = json.dumps(pull_request()).encode()
    signature = sign(body)
    for _ in range(150):
        changed, claimed = bytearray(body), signature
        how = chance.randrange(4)
        at = chance.randrange(len(changed))
        if how == 0:
            changed[at] ^= 1 << chance.randrange(8)
        elif how == 1:
            del changed[at:]
        elif how == 2:
            changed[at:at] = bytes([chance.randrange(256)])
        else:
            place = chance.randrange(7, len(claimed))
            claimed = claimed[:place] + chance.choice("0123456789abcdefg ".replace(claimed[place], "")) + claimed[place + 1 :]
        answer = world.webhook(None, body=bytes(changed), **{"X-Hub-Signature-256": claimed})
        assert answer.status_code == 401, (how, at, answer.text)


def test_two_signatures_are_none(world: IngressWorld) -> None:
    body = json.dumps(pull_request()).encode()
    lines = [
        "POST /webhooks/github HTTP/1.1",
        "Host: localhost",
        f"Content-Length: {len(body)}",
        f"X-Hub-Signature-256: {sign(body)}",
        f"X-Hub-Signature-256: {sign(body)}",
        "X-GitHub-Event: pull_request",
        f"X-GitHub-Delivery: {uuid4()}",
    ]
    assert _status(world.raw("\r\n".join(lines).encode() + b"\r\n\r\n" + body)) == 401


HEADERS = [
    ("X-GitHub-Event", "x" * 5_000),
    ("X-GitHub-Event", "pull_request\xff"),
    ("X-GitHub-Event", "__proto__"),
    ("X-GitHub-Delivery", "x" * 5_000),
    ("X-GitHub-Delivery", "'; drop table deliveries; --"),
    ("X-GitHub-Delivery", "\xe9\xe8"),
    ("User-Agent", "\xff" * 3_000),
    ("Content-Type", "text/plain; charset=utf-7"),
    ("Content-Encoding", "gzip"),
]


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: f"{header[0]}={header[1][:12]!r}")
def test_strange_headers_make_no_5xx(world: IngressWorld, header: tuple[str, str]) -> None:
    body = json.dumps(pull_request()).encode()
    headers = {"Host": "localhost", "X-GitHub-Event": "pull_request", "X-GitHub-Delivery": str(uuid4()), header[0]: header[1]}
    lines = ["POST /webhooks/github HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    lines += [f"Content-Length: {len(body)}", f"X-Hub-Signature-256: {sign(body)}"]
    assert 200 <= _status(world.raw("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)) < 500


@pytest.mark.parametrize(
    "data",
    [
        b"POST /webhooks/github HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /webhooks/github HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999999999\r\n\r\n",
        b"POST /webhooks/github HTTP/1.1\r\nHost: localhost\r\nContent-Length: \xb2\r\n\r\n",
        b"POST /webhooks/github HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /webhooks/github HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_broken_http_is_refused_and_the_listener_lives(world: IngressWorld, data: bytes) -> None:
    status = _status(world.raw(data, seconds=20))
    assert status == 0 or 400 <= status < 500
    assert world.webhook(pull_request()).status_code == 202


def test_a_sender_that_goes_away_is_no_error(world: IngressWorld) -> None:
    with socket.create_connection(("127.0.0.1", world.public)) as wire:
        wire.sendall(b"POST /webhooks/github HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
    assert world.webhook(pull_request()).status_code == 202
    assert "Traceback" not in world.log


@pytest.mark.parametrize(
    "path",
    [
        "/callbacks/sessions/",
        "/callbacks/sessions/%00",
        "/callbacks/sessions/" + "a" * 4_000,
        "/callbacks/sessions/../../metrics",
    ],
)
def test_strange_callback_addresses_are_refused(world: IngressWorld, path: str) -> None:
    assert 400 <= world.post(path, b"{}", {"X-Callback-Token": "x"}).status_code < 500


@pytest.mark.parametrize("name", BODIES)
def test_a_strange_callback_body_is_refused(world: IngressWorld, name: str) -> None:
    assert world.post(f"/callbacks/sessions/{uuid4()}", BODIES[name], {"X-Callback-Token": "x"}).status_code == 400


def test_no_secret_is_in_the_log(world: IngressWorld) -> None:
    """After everything above: neither the webhook secret nor a key, a token or a signature."""
    payload = pull_request(marker="canary-in-the-body")
    world.webhook(payload)
    world.webhook(payload, **{"X-Hub-Signature-256": "sha256=" + "0" * 64})
    world.post(f"/callbacks/sessions/{uuid4()}", b"{}", {"X-Callback-Token": "canary-callback-token"})
    world.api("GET", "/api/v1/reviews", "kilo_canary-api-key")
    for canary in (SECRET, "canary", world.operator_key, "sha256=", "Authorization"):
        assert canary not in world.log
