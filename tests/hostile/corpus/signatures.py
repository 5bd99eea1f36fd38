"""Forged signatures: vendor vectors, mutations of a right request, and captured requests sent again."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from tests.support.asgi import Post, signed
from tests.support.ingress import SECRET, sign

# (what, key, body, HMAC-SHA256): GitHub's page "Validating webhook deliveries" and RFC 4231, the cases with a key in UTF-8.
VECTORS = [
    (
        "GitHub",
        "It's a Secret to Everybody",
        b"Hello, World!",
        "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17",
    ),
    (
        "RFC 4231, case 1",
        "\x0b" * 20,
        b"Hi There",
        "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7",
    ),
    (
        "RFC 4231, case 2",
        "Jefe",
        b"what do ya want for nothing?",
        "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
    ),
    (
        "RFC 4231, case 4",
        "".join(map(chr, range(1, 26))),
        b"\xcd" * 50,
        "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b",
    ),
]

_NAME = b"x-hub-signature-256"


def _with(one: Post, *values: bytes, name: bytes = _NAME) -> Post:
    """The request with these signature headers instead of its own."""
    return Post([pair for pair in one.headers if pair[0] != _NAME] + [(name, value) for value in values], one.chunks)


def _digest(name: str, body: bytes, key: str = SECRET) -> bytes:
    return hmac.new(key.encode(), body, name).hexdigest().encode()


def _flip(value: bytes, bit: int) -> bytes:
    changed = bytearray(value)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _in_script(digits: bytes, zero: int) -> bytes:
    """Decimal digits of another script, which `isdigit` and `int` take."""
    return digits.decode().translate({48 + number: zero + number for number in range(10)}).encode()


def spelled(body: bytes) -> dict[str, Post]:
    """Other ways to write a signature that must not be taken, the right digest included."""
    one = signed(body)
    right = sign(body).encode()
    digits = right.removeprefix(b"sha256=")
    keys = {
        "empty key": "",
        "newline behind the key": SECRET + "\n",
        "key without its end": SECRET[:-1],
        "upper-case key": SECRET.upper(),
        "reversed key": SECRET[::-1],
        "key None": "None",
        "key null": "null",
        "key undefined": "undefined",
        "key of NUL": "\x00",
        "hexadecimal key": SECRET.encode().hex(),
        "key as its own digest": hashlib.sha256(SECRET.encode()).hexdigest(),
    }
    cases: dict[str, tuple[bytes, ...]] = {
        "none": (),
        "empty": (b"",),
        "prefix only": (b"sha256=",),
        "upper case": (right.upper(),),
        "upper-case digits": (b"sha256=" + digits.upper(),),
        "upper-case name": (b"SHA256=" + digits,),
        "mixed case": (b"sha256=" + digits.title(),),
        "digits alone": (digits,),
        "sha1": (b"sha1=" + _digest("sha1", body),),
        "sha1 named sha256": (b"sha256=" + _digest("sha1", body),),
        "sha512": (b"sha512=" + _digest("sha512", body),),
        "sha512 cut": (b"sha256=" + _digest("sha512", body)[:64],),
        "plain hash": (b"sha256=" + hashlib.sha256(body).hexdigest().encode(),),
        "hash of key and body": (b"sha256=" + hashlib.sha256(SECRET.encode() + body).hexdigest().encode(),),
        "zeroes": (b"sha256=" + b"0" * 64,),
        "doubled": (right, right),
        "right after wrong": (b"sha256=" + b"0" * 64, right),
        "wrong after right": (right, b"sha256=" + b"0" * 64),
        "joined": (right + b"," + right,),
        "joined with blanks": (b"sha256=" + b"0" * 64 + b", " + right,),
        "newline behind": (right + b"\n",),
        "carriage return behind": (right + b"\r\n",),
        "NUL behind": (right + b"\x00",),
        "blank before": (b" " + right,),
        "tab behind": (right + b"\t",),
        "quoted": (b'"' + right + b'"',),
        "0x": (b"sha256=0x" + digits,),
        "colon": (b"sha256:" + digits,),
        "base64": (b"sha256=" + base64.b64encode(hmac.new(SECRET.encode(), body, "sha256").digest()),),
        "full-width digits": (b"sha256=" + _in_script(digits, 0xFF10),),
        "Arabic digits": (b"sha256=" + _in_script(digits, 0x0660),),
        "Latin-1": (right[:-1] + b"\xe9",),
        "superscript": (b"sha256=" + digits[:-1] + b"\xb2",),
        "one digit more": (right + b"0",),
        "very long": (right + b"0" * 100_000,),
    }
    made = {name: _with(one, *values) for name, values in cases.items()}
    made |= {f"signed with: {name}": _with(one, b"sha256=" + _digest("sha256", body, key)) for name, key in keys.items()}
    made["under the old header"] = _with(one, right, name=b"x-hub-signature")
    made["under a name with underscores"] = _with(one, right, name=b"x_hub_signature_256")
    made["as authorization"] = _with(one, right, name=b"authorization")
    return made


def changed_bodies(body: bytes) -> dict[str, bytes]:
    """The same JSON value, or nearly, in other bytes: the signature is over bytes."""
    value = json.loads(body)
    return {
        "indented": json.dumps(value, indent=1).encode(),
        "sorted": json.dumps(value, sort_keys=True).encode() + b" ",
        "newline behind": body + b"\n",
        "blank before": b" " + body,
        "byte order mark": b"\xef\xbb\xbf" + body,
        "NUL behind": body + b"\x00",
        "UTF-16": body.decode().encode("utf-16"),
        "another key": body[:-1] + b', "x": 1}',
        "key twice": body[:-1] + b', "action": "closed"}',
        "empty": b"",
    }


def mutations(body: bytes, chance: random.Random) -> Iterator[tuple[str, Post]]:
    """Endless: bits, bytes, cuts and doublings in body or signature, at random."""
    one, right = signed(body), sign(body).encode()
    ways: dict[str, Callable[[], Post]] = {
        "bit of the signature": lambda: _with(one, _flip(right, chance.randrange(len(right) * 8))),
        "signature cut": lambda: _with(one, right[: chance.randrange(len(right))]),
        "signature cut in front": lambda: _with(one, b"sha256=" + right[7 + chance.randrange(1, 64) :]),
        "digits exchanged": lambda: _with(one, _exchanged(right, chance)),
        "case of one digit": lambda: _with(one, _upper_one(right, chance)),
        "random digits": lambda: _with(one, b"sha256=" + chance.randbytes(32).hex().encode()),
        "random bytes": lambda: _with(one, chance.randbytes(chance.randrange(1, 90)).replace(b"\n", b"x")),
        "bit of the body": lambda: Post(one.headers, [_flip(body, chance.randrange(len(body) * 8))]),
        "body cut": lambda: Post(one.headers, [body[: chance.randrange(len(body))]]),
        "byte into the body": lambda: Post(one.headers, [_inserted(body, chance)]),
        "piece of the body twice": lambda: Post(one.headers, [body, body[: chance.randrange(1, len(body))]]),
        "pieces in another order": lambda: Post(one.headers, _shuffled(body, chance)),
        "signed with a near key": lambda: _with(one, b"sha256=" + _digest("sha256", body, _near_key(chance))),
    }
    while True:
        how = chance.choice(list(ways))
        yield how, ways[how]()


def _exchanged(right: bytes, chance: random.Random) -> bytes:
    first, second = chance.sample(range(7, 71), 2)
    while right[first] == right[second]:
        first, second = chance.sample(range(7, 71), 2)
    changed = bytearray(right)
    changed[first], changed[second] = changed[second], changed[first]
    return bytes(changed)


def _upper_one(right: bytes, chance: random.Random) -> bytes:
    at = chance.choice([place for place in range(len(right)) if right[place : place + 1].isalpha()])
    return right[:at] + right[at : at + 1].upper() + right[at + 1 :]


def _inserted(body: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(body) + 1)
    return body[:at] + chance.randbytes(1) + body[at:]


def _shuffled(body: bytes, chance: random.Random) -> list[bytes]:
    at = chance.randrange(1, len(body) // 2)
    return [body[at:], body[:at]]


def _near_key(chance: random.Random) -> str:
    at = chance.randrange(len(SECRET))
    return SECRET[:at] + chr(33 + (ord(SECRET[at]) - 32) % 90) + SECRET[at + 1 :]


def replays(first: Any, second: Any) -> dict[str, Post]:
    """Requests made of two captured ones, each signed by GitHub itself; the first one was delivered under the id `first`."""
    one, other = json.dumps(first).encode(), json.dumps(second).encode()
    return {
        "the same again": signed(one, delivery="first"),
        "another id": signed(one, delivery="changed"),
        "another body under the id": signed(other, delivery="first"),
        "another body with the old signature": signed(other, delivery="fresh", signature=sign(one)),
        "the body as a push": signed(one, "push", delivery="event-1"),
        "the body as an issue": signed(one, "issues", delivery="event-2"),
        "the body as an installation": signed(one, "installation", delivery="event-3"),
        "the body as a ping": signed(one, "ping", delivery="event-4"),
        "id in upper case": signed(one, delivery="FIRST"),
        "empty id": Post([(name, b"" if name == b"x-github-delivery" else value) for name, value in signed(one).headers], [one]),
        "no event": Post([pair for pair in signed(one).headers if pair[0] != b"x-github-event"], [one]),
    }
