"""Whatever a signed body holds: no answer is a 5xx, nothing is unhandled before or after it is stored, time and memory are bounded."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings

from kilo_pipelines.core.reasons import Reason
from tests.conftest import Database
from tests.hostile.corpus import bodies
from tests.support.asgi import InProcess, Post, signed
from tests.support.figures import Figures
from tests.support.ingress import IngressWorld, pull_request, sign, world

__all__ = ["world"]

MEGABYTE = 2**20
EXAMPLES_BOUNDED, EXAMPLES_FULL = 200, 5_000
# 25 MB of small objects are 0.8 GB of Python's, and only one such body is parsed at a time (6 MB: 0.2 GB; four at once: 0.9).
RSS_LIMIT_MB, RSS_LIMIT_MB_BOUNDED = 1_500, 600
SECONDS_PER_BODY = 5.0


@pytest.fixture(scope="module")
def ingress(database: Database) -> InProcess:
    return InProcess(database.store)


def judge(ingress: InProcess, posts: list[Post]) -> list[int]:
    """Posts and admits; the statuses. Unhandled errors of the application are raised by `post_all`."""
    answers = ingress.post_all(posts)
    bad = [(answer, post.chunks[0][:400]) for answer, post in zip(answers, posts, strict=True) if answer.status >= 500]
    assert not bad, bad[:3]
    assert all(answer.reason for answer in answers)
    ingress.admit()
    stuck = [
        one
        for one in ingress.deliveries()
        if one["tries"] or one["state"] == "received" or one["reason"] == Reason.ADMISSION_ERROR
    ]
    assert not stuck, f"admission failed on what was accepted: {stuck[:3]}"
    return [answer.status for answer in answers]


@pytest.mark.parametrize("action", ["opened", "edited", "labeled"])
def test_every_field_of_a_pull_request_may_be_anything(ingress: InProcess, full: bool, figures: Figures, action: str) -> None:
    """Missing, and of every wrong type and size; what passes the ladder is admitted or skipped with a reason.

    The bounded form takes every ninth case of an action, other ones for each: the stride is no divisor of the number of values.
    """
    payload = ingress.ours(bodies.full_payload()) | {"action": action}
    cases = bodies.every_field(payload)
    chosen = cases if full else cases[len(action) % 9 :: 9]
    posts = [signed(json.dumps(one).encode()) for one in chosen]
    statuses = judge(ingress, posts)
    figures(tried=len(posts))
    assert set(statuses) <= {200, 202, 400, 404} and 202 in statuses and 400 in statuses


def test_bytes_that_no_library_writes_are_answered_in_time(ingress: InProcess, figures: Figures) -> None:
    corpus = bodies.raw(ingress.ours(bodies.full_payload()))
    slowest = 0.0
    for name, body in corpus.items():
        began = time.perf_counter()
        (status,) = judge(ingress, [signed(body)])
        slowest = max(slowest, time.perf_counter() - began)
        assert status in (200, 202, 400, 404), name
    figures(tried=len(corpus), slowest_body_seconds=round(slowest, 2))
    assert slowest < SECONDS_PER_BODY


def test_no_generated_payload_breaks_the_ladder_or_the_admission(ingress: InProcess, full: bool, figures: Figures) -> None:
    waiting: list[Post] = []

    @settings(
        max_examples=EXAMPLES_FULL if full else EXAMPLES_BOUNDED,
        deadline=None,
        database=None,
        derandomize=not full,
        suppress_health_check=list(HealthCheck),
    )
    @given(payload=bodies.payloads(), body=bodies.spliced())
    def collect(payload: dict[str, Any], body: bytes) -> None:
        waiting.append(signed(json.dumps(_ours(ingress, payload)).encode()))
        waiting.append(signed(body.replace(b'"id": 4711', b'"id": %d' % ingress.installation)))

    collect()
    for start in range(0, len(waiting), 500):
        judge(ingress, waiting[start : start + 500])
    figures(tried=len(waiting))
    assert len(waiting) >= 2 * (EXAMPLES_FULL if full else EXAMPLES_BOUNDED) * 0.9


def _ours(ingress: InProcess, payload: dict[str, Any]) -> dict[str, Any]:
    """Installation and repository of this owner where they are still objects: the deeper ladder is what is fuzzed."""
    if isinstance(payload.get("installation"), dict) and payload["installation"].get("id") == 4711:
        payload["installation"]["id"] = ingress.installation
    if isinstance(payload.get("repository"), dict) and payload["repository"].get("id") == 990_001:
        payload["repository"]["id"] = ingress.repository
    return payload


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_the_border_of_25_mb_is_exact_however_the_body_comes(ingress: InProcess, over: int, full: bool, figures: Figures) -> None:
    """With its length, in chunks without one, with a length that lies low, high or makes no sense."""
    payload = ingress.ours(pull_request())
    text = json.dumps(payload).encode()
    body = text[:-1] + b',"p":"' + b"x" * (25 * MEGABYTE + over - len(text) - 8) + b'"}'
    body += b" " * (25 * MEGABYTE + over - len(body))
    assert len(body) == 25 * MEGABYTE + over
    whole = signed(body)
    chunks = [body[start : start + MEGABYTE] for start in range(0, len(body), MEGABYTE)]
    bare = [pair for pair in whole.headers if pair[0] != b"content-length"]
    lies = [b"0", b"1", b"-1", b"x", b"1_000", b"+5", b"\xb2", b"9" * 5_000]
    posts = [whole, Post(bare, chunks)]
    posts += [Post([*bare, (b"content-length", lie)], chunks) for lie in lies] if full or over > 0 else []
    statuses = judge(ingress, posts)
    figures(tried=len(posts))
    assert set(statuses[:2]) <= ({413} if over > 0 else {200, 202})
    assert set(statuses) <= {200, 202, 400, 413}


def test_a_length_that_lies_on_the_wire_hurts_nobody(world: IngressWorld, figures: Figures) -> None:
    """The HTTP server's half: too short, too long, twice, with chunks, and chunks that lie about themselves."""
    body = json.dumps(pull_request()).encode()
    head = b"POST /webhooks/github HTTP/1.1\r\nHost: localhost\r\nX-GitHub-Event: pull_request\r\nX-GitHub-Delivery: w-%d\r\n"
    head += b"X-Hub-Signature-256: " + sign(body).encode() + b"\r\n"
    lengths = [
        b"Content-Length: %d\r\n\r\n" % (len(body) - 1),
        b"Content-Length: 0\r\n\r\n",
        b"Content-Length: %d\r\nContent-Length: %d\r\n\r\n" % (len(body), len(body) + 1),
        b"Content-Length: %d, %d\r\n\r\n" % (len(body), len(body)),
        b"Content-Length: +%d\r\n\r\n" % len(body),
        b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n" % len(body),
        b"Transfer-Encoding: chunked, identity\r\n\r\n",
        b"Transfer-Encoding: xchunked\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n5;x=" + b"y" * 100_000 + b"\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ]
    accepted = 0
    for number, length in enumerate(lengths):
        answer = world.raw(head % number + length + body + b"\r\n0\r\n\r\n", seconds=3)
        status = int(answer.split(b" ", 2)[1]) if answer else 0
        assert status == 0 or 400 <= status < 500, (length[:60], answer[:200])
        accepted += status == 202
    figures(tried=len(lengths), accepted=accepted)
    assert world.webhook(pull_request()).status_code == 202 and "Traceback" not in world.log


def test_memory_stays_bounded_under_many_large_bodies(world: IngressWorld, full: bool, figures: Figures) -> None:
    """Bodies of 25 MB (bounded: 6) made of what costs a parser most, several at once; the largest resident size is reported."""
    process = psutil.Process(world._ingress.pid if world._ingress else 0)
    before = process.memory_info().rss
    head = json.dumps(pull_request()).encode()[:-1]

    size, pieces = (25 * MEGABYTE, [b'{"a":1}', b"[]", b'{"a":1}', b"12345"] * 3) if full else (6 * MEGABYTE, [b'{"a":1}'] * 4)

    def heavy(piece: bytes) -> bytes:
        return head + b',"p":[' + b",".join([piece] * ((size - len(head) - 100) // (len(piece) + 1))) + b"]}"

    large = [heavy(piece) for piece in pieces]
    high = before
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(world.webhook, None, body=body, delivery=f"big-{number}") for number, body in enumerate(large)]
        while not all(one.done() for one in waiting):
            high = max(high, process.memory_info().rss)
            time.sleep(0.02)
    statuses = [one.result().status_code for one in waiting]
    figures(tried=len(large), rss_mb=round(high / MEGABYTE), rss_idle_mb=round(before / MEGABYTE))
    assert set(statuses) <= {200, 202, 400}, statuses
    assert high / MEGABYTE < (RSS_LIMIT_MB if full else RSS_LIMIT_MB_BOUNDED)
