"""Nobody but the holder of the webhook secret is believed: every forged, changed or repeated request ends without work."""

from __future__ import annotations

import json
import random
from itertools import islice

import pytest

from kilo_pipelines.providers.github_webhooks import verify_signature
from tests.conftest import Database
from tests.hostile.corpus import signatures
from tests.support.asgi import Answer, InProcess, Post, signed
from tests.support.figures import Figures
from tests.support.ingress import pull_request

MUTATIONS_BOUNDED, MUTATIONS_FULL = 300, 5_000


@pytest.fixture
def ingress(database: Database) -> InProcess:
    return InProcess(database.store)


def accepted(ingress: InProcess, attacks: list[Post]) -> list[tuple[Post, Answer]]:
    """Those that weren't refused as unsigned, or left a row."""
    before = len(ingress.deliveries())
    answers = ingress.post_all(attacks)
    taken = [(attack, answer) for attack, answer in zip(attacks, answers, strict=True) if answer.status != 401]
    assert len(ingress.deliveries()) == before + len([one for _, one in taken if one.status == 202])
    return taken


@pytest.mark.parametrize("vector", signatures.VECTORS, ids=lambda vector: vector[0])
def test_published_vectors_verify_and_nothing_beside_them(database: Database, vector: tuple[str, str, bytes, str]) -> None:
    """The control of this file: the right digest passes the real application's ladder as far as its body allows."""
    _, key, body, digits = vector
    assert verify_signature(key, body, f"sha256={digits}")
    assert not verify_signature(key, body + b" ", f"sha256={digits}")
    ingress = InProcess(database.store, secret=key)
    assert (ingress.post(signed(body, signature=f"sha256={digits}")).status, ingress.deliveries()) == (400, [])
    assert ingress.post(signed(body, signature=f"sha256={digits[::-1]}")).status == 401


def test_no_other_spelling_of_a_signature_is_taken(ingress: InProcess, figures: Figures) -> None:
    body = json.dumps(ingress.ours(pull_request())).encode()
    attacks = list(signatures.spelled(body).values())
    attacks += [Post(signed(body).headers, [changed]) for changed in signatures.changed_bodies(body).values()]
    attacks += [
        Post([*signed(body).headers[:-1], (b"x-hub-signature-256", right[:cut])], [body])
        for right in [signed(body).headers[-1][1]]
        for cut in range(71)
    ]
    taken = accepted(ingress, attacks)
    figures(tried=len(attacks), accepted=len(taken))
    assert not taken
    assert ingress.post(signed(body)).status == 202, "the control: the right request is taken"


def test_no_mutation_of_a_signed_request_is_taken(ingress: InProcess, full: bool, figures: Figures) -> None:
    body = json.dumps(ingress.ours(pull_request())).encode()
    wanted = MUTATIONS_FULL if full else MUTATIONS_BOUNDED
    attacks = [one for _, one in islice(signatures.mutations(body, random.Random(20_261)), wanted)]
    taken = accepted(ingress, attacks)
    figures(tried=len(attacks), accepted=len(taken))
    assert not taken
    assert ingress.deliveries() == []


@pytest.mark.parametrize("secret", [None, ""])
def test_without_a_secret_nobody_is_believed(database: Database, secret: str | None, figures: Figures) -> None:
    """An empty key is a usable HMAC key for whoever guesses it."""
    ingress = InProcess(database.store, secret=secret)
    body = json.dumps(ingress.ours(pull_request())).encode()
    attacks = [signed(body, signature=""), signed(body), signatures.spelled(body)["signed with: empty key"]]
    answers = ingress.post_all(attacks)
    figures(tried=len(attacks), accepted=sum(1 for one in answers if one.status < 400))
    assert {(one.status, one.reason) for one in answers} == {(503, "webhook_secret_missing")} and ingress.deliveries() == []


def test_a_captured_request_sent_again_makes_no_second_work(ingress: InProcess, figures: Figures) -> None:
    """Id and event headers are outside the signature: under any of them one event is one work item."""
    first, second = ingress.ours(pull_request()), ingress.ours(pull_request())
    original = signed(json.dumps(first).encode(), delivery="first")
    assert ingress.post(original).status == 202
    attacks = signatures.replays(first, second)
    answers = dict(zip(attacks, ingress.post_all(attacks.values(), at_once=1), strict=True))
    ingress.admit()
    again = dict(zip(attacks, ingress.post_all(attacks.values(), at_once=1), strict=True))
    ingress.admit()
    extra = len(ingress.items()) - 1
    figures(tried=2 * len(attacks), accepted=extra)
    assert [row["head_sha"] for row in ingress.items()] == [first["pull_request"]["head"]["sha"]]
    assert answers["another id"].reason == "resumed" and again["another id"].reason == "duplicate_delivery"
    assert {answers["another body under the id"].status, again["another body under the id"].status} == {409}
    assert {answers[f"the body as {one}"].status for one in ("a push", "an issue", "an installation", "a ping")} == {400}
    assert len(ingress.deliveries()) == 1, "a replay under another event must not settle the real one before it comes"
