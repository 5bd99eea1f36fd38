"""Bodies that were made to break a parser, a rule or a column: a fixed corpus, every field of a payload, and hypothesis."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from tests.support.ingress import pull_request

# What a field is replaced by: wrong types, borders of integer columns, what PostgreSQL refuses, what a template would run.
STRANGE: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1.5,
    2**31 - 1,
    2**31,
    2**53 + 1,
    2**63 - 1,
    2**63,
    10**400,
    -(10**400),
    1e308,
    "",
    " ",
    "x\x00y",
    "\ud800",
    "\udfff\ud800",
    "\U0001f600" * 300,
    "x" * 70_000,
    "\u202e\u200b",
    "{{7*7}}${jndi:ldap://x}",
    "'; drop table deliveries; --",
    "$.a[?(@.b)]",
    "*/0 * * * *",
    "../../etc/passwd",
    "-x",
    "a\nb",
    "0" * 40,
    "F" * 40,
    [],
    [None],
    [[1]],
    {},
    {"id": 1},
    {"id": 2**63},
    {"__proto__": {"type": "User"}},
]


def full_payload() -> dict[str, Any]:
    """A `pull_request` payload with every field that any of our models reads, the optional ones included."""
    payload = pull_request(action="edited")
    payload["pull_request"]["labels"] = [{"id": 1, "name": "kilo"}]
    payload["label"] = {"id": 1, "name": "kilo"}
    payload["changes"] = {"base": {"ref": {"from": "main"}, "sha": {"from": "c" * 40}}, "title": {"from": "old"}}
    return payload


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at] * bool(at) + [path for key, one in inner for path in paths(one, (*at, key))]


def replaced(payload: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """The payload with another value in one place."""
    changed: dict[str, Any] = json.loads(json.dumps(payload))
    here: Any = changed
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = value
    return changed


def removed(payload: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    """The payload without one place."""
    changed: dict[str, Any] = json.loads(json.dumps(payload))
    here: Any = changed
    for key in path[:-1]:
        here = here[key]
    del here[path[-1]]
    return changed


def every_field(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """The payload with every field missing and with every strange value."""
    found = [removed(payload, path) for path in paths(payload)]
    return found + [replaced(payload, path, value) for path in paths(payload) for value in STRANGE]


def raw(payload: dict[str, Any]) -> dict[str, bytes]:
    """Bytes that no JSON library writes."""
    text = json.dumps(payload)
    body = text.encode()
    deep = {f"depth {n}": b'{"x":' + b"[" * n + b"]" * n + b"," + body[1:] for n in (60, 63, 64, 500, 5_000, 1_000_000)}
    return deep | {
        "duplicate keys": b'{"action":"closed","action":"x",' + body[1:],
        "duplicate pull requests": body[:-1] + b',"pull_request":{"number":1}}',
        "duplicate installations": body[:-1] + b',"installation":{"id":1}}',
        "a hundred thousand keys": body[:-1] + b"," + b",".join(b'"k%d":1' % n for n in range(100_000)) + b"}",
        "a hundred thousand times one key": body[:-1] + b"," + b",".join([b'"k":1'] * 100_000) + b"}",
        "number of a million digits": body[:-1] + b',"n":' + b"9" * 1_000_000 + b"}",
        "float of a million digits": body[:-1] + b',"n":0.' + b"9" * 1_000_000 + b"}",
        "exponent": body[:-1] + b',"n":1e-999999999}',
        "large exponent": body[:-1] + b',"n":1e999999999}',
        "NaN": body[:-1] + b',"n":NaN}',
        "minus infinity": body[:-1] + b',"n":-Infinity}',
        "NUL byte": body[:-1] + b',"n":"\x00"}',
        "NUL escape": body[:-1] + rb',"n":"\u0000"}',
        "NUL escape in a key": body[:-1] + rb',"\u0000":1}',
        "lone surrogate": body[:-1] + rb',"n":"\ud83d"}',
        "lone surrogate in a key": body[:-1] + rb',"\udc00":1}',
        "surrogates in the wrong order": body[:-1] + rb',"n":"\ude00\ud83d"}',
        "UTF-8 of a surrogate": body[:-1] + b',"n":"\xed\xa0\x80"}',
        "overlong UTF-8": body[:-1] + b',"n":"\xc0\xaf"}',
        "bad escape": body[:-1] + rb',"n":"\x41"}',
        "half an escape": body[:-2] + rb',"n":"\u12',
        "comments": b"/* x */" + body,
        "trailing comma": body[:-1] + b",}",
        "two values": body + body,
        "single quotes": text.replace('"', "'").encode(),
        "brackets in text": body[:-1] + b',"n":"' + b"[{" * 200_000 + b'"}',
        "quotes without end": body[:-1] + b',"n":"' + rb"\"" * 500_000,
        "backslashes": body[:-1] + b',"n":"' + rb"\\" * 500_000 + b'"}',
        "many short texts": body[:-1] + b',"n":[' + b",".join([b'""'] * 500_000) + b"]}",
        "pickle": b"\x80\x04\x95\x00",
        "gzip": b"\x1f\x8b\x08\x00",
        "form": b"payload=" + body,
        "blank": b"   ",
        "UTF-32": text.encode("utf-32"),
    }


# JSON values of any shape, surrogates and NUL included; small, because what is large is in the fixed corpus.
TEXTS = st.text(st.characters(), max_size=20) | st.sampled_from(
    [one for one in STRANGE if isinstance(one, str) and len(one) < 2_000]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def payloads(draw: st.DrawFn) -> dict[str, Any]:
    """A payload with one to four fields replaced, removed or added."""
    payload = full_payload()
    for _ in range(draw(st.integers(1, 4))):
        path = draw(st.sampled_from(paths(payload)))
        payload = removed(payload, path) if draw(st.integers(0, 5)) == 0 else replaced(payload, path, draw(VALUES))
    return payload


@st.composite
def spliced(draw: st.DrawFn) -> bytes:
    """The bytes of a payload with a few bytes overwritten, doubled or put in."""
    body = bytearray(json.dumps(full_payload()).encode())
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(body)))
        upto = min(len(body), at + draw(st.integers(0, 30)))
        body[at:upto] = draw(
            st.binary(max_size=6) | st.sampled_from([b"[" * 70, b"{", b'"', b"\\u0000", b"\\ud800", b"1e999", b"null"])
        )
    return bytes(body)
