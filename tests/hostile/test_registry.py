"""The registry mirror: a write session reaches the registries that its owner allows, by GET, and nothing else through it."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kilo_pipelines.cloud_agent import registry_mirror
from kilo_pipelines.cloud_agent.adapters.scripted import ScriptedAdapter
from kilo_pipelines.cloud_agent.protocol import PUSHED
from kilo_pipelines.cloud_agent.registry_mirror import Mirror, RefusedError, Rewriter, target
from kilo_pipelines.core.reasons import Reason
from tests.support.git import git
from tests.support.sessions import Control, Provider, SessionWorld

ADDRESS = "http://127.0.0.1:8100"
VERSIONS = ("1.0.0", "1.0.1")


def _package(version: str) -> bytes:
    """A package that npm accepts."""
    content, made = json.dumps({"name": "whole", "version": version}).encode(), io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        member = tarfile.TarInfo("package/package.json")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return made.getvalue()


def _metadata(upstream: Upstream) -> dict[str, Any]:
    versions = {}
    for version in VERSIONS:
        path = f"whole/-/whole-{version}.tgz"
        digest = base64.b64encode(hashlib.sha512(upstream.tarballs[f"/npm/{path}"]).digest()).decode()
        dist = {"tarball": upstream.base + path, "integrity": f"sha512-{digest}"}
        versions[version] = {"name": "whole", "version": version, "dist": dist}
    return {"name": "whole", "dist-tags": {"latest": VERSIONS[-1]}, "versions": versions}


class Upstream(ThreadingHTTPServer):
    """A registry of the test's own; keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.base = f"http://127.0.0.1:{self.server_port}/npm/"
        self.tarballs = {f"/npm/whole/-/whole-{version}.tgz": _package(version) for version in VERSIONS}


class Answers(BaseHTTPRequestHandler):
    """What the registry answers, by path."""

    server: Upstream
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append((self.command, self.path, dict(self.headers)))
        kind, status, body, more = "application/json", 200, b"{}", {}
        if self.path == "/npm/whole":
            body = json.dumps(_metadata(self.server)).encode()
        elif self.path in self.server.tarballs:
            kind, body = "application/octet-stream", self.server.tarballs[self.path]
        elif self.path == "/npm/leftish":
            tarball = f"{self.server.base}leftish/-/leftish-1.0.1.tgz"
            body = json.dumps({"name": "leftish", "dist": {"tarball": tarball}, "elsewhere": "http://127.0.0.1:1/x"}).encode()
        elif self.path.endswith(".tgz"):
            kind, body = "application/octet-stream", b"\0bytes of " + self.server.base.encode()
        elif self.path == "/npm/moved":
            status, more = 302, {"location": "/elsewhere"}
        elif self.path == "/npm/pressed":
            body, more = gzip.compress(b"{}"), {"content-encoding": "gzip"}
        elif self.path == "/npm/missing":
            status = 404
        elif self.path == "/npm/large":
            kind, body = "application/octet-stream", bytes(200_000)
        self.send_response(status)
        for name, value in {"content-type": kind, "content-length": str(len(body)), "set-cookie": "x=canary", **more}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_PUT = do_GET  # names of http.server

    def log_message(self, *_args: object) -> None:
        """Quiet."""


@contextmanager
def serving() -> Iterator[Upstream]:
    upstream = Upstream()
    thread = threading.Thread(target=upstream.serve_forever, daemon=True)
    thread.start()
    yield upstream
    upstream.shutdown()
    upstream.server_close()


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    world = SessionWorld()
    yield Provider(world)
    world.close()


@pytest.fixture(scope="module")
def mirror(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The mirror's process, asked on its socket."""
    process = Mirror(tmp_path_factory.mktemp("m") / "r.sock", ADDRESS, {"npm": upstream.base})
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(process.socket)), base_url="http://mirror") as client:
        yield client
    counts = process.close()
    assert counts.requests > 0 and counts.refused > 0 and not process.socket.exists()


def test_a_session_asks_its_registry_through_its_one_socket_and_locks_the_registrys_own_addresses(
    provider: Provider, upstream: Upstream
) -> None:
    upstream.asked.clear()
    orders = "\n".join(
        f"Ask: {line}"
        for line in (
            "GET leftish",
            "HEAD leftish",
            "GET leftish/-/leftish-1.0.1.tgz",
            "POST leftish",
            "PUT leftish",
            "GET leftish?secret=canary",
            "GET ../secret",
            "GET %2e%2e/secret",
            "GET moved",
            f"GET {ADDRESS}/registry/pypi/x",
            f"GET {ADDRESS}/sessions",
            f"GET {upstream.base}leftish",
        )
    )
    control = Control()
    spec = provider.world.branch_spec(provider.pull, provider.head, registries=["npm"], task={"orders": orders})
    outcome = provider.world.run(
        spec, ScriptedAdapter("write_fetch"), control, registries={"npm": upstream.base, "pypi": upstream.base}
    )
    assert outcome.result is not None, (outcome.reason, outcome.detail)
    written = git(provider.server.path, "show", f"{outcome.result[PUSHED]['commit']}:fetched.txt").splitlines()
    answers = {tuple(line.split(" ", 2)[:2]): line.split(" ", 3)[2:] for line in written}
    assert answers["GET", "leftish"][0] == "200" and answers["ENV", "ignore_scripts"] == ["true"]
    # The mirror wrote its own address; what is pushed names the registry again.
    assert (
        f'"{upstream.base}leftish/-/leftish-1.0.1.tgz"' in answers["GET", "leftish"][1]
        and ADDRESS not in answers["GET", "leftish"][1]
    )
    assert answers["GET", "leftish/-/leftish-1.0.1.tgz"][0] == "200"
    for method, path, status in (
        ("HEAD", "leftish", "405"),
        ("POST", "leftish", "405"),
        ("PUT", "leftish", "405"),
        ("GET", "leftish?secret=canary", "400"),
        ("GET", "../secret", "400"),
        ("GET", "%2e%2e/secret", "400"),
        ("GET", "moved", "502"),
    ):
        assert answers[method, path][0] == status, (path, answers[method, path])
    rest = [
        line
        for line in written
        if "/registry/pypi/x" in line
        or "/sessions" in line
        or line.startswith("GET http://127.0.0.1:" + str(upstream.server_port))
    ]
    assert len(rest) == 3 and not any(" 200 " in line for line in rest), rest
    assert {(method, path) for method, path, _ in upstream.asked} == {
        ("GET", "/npm/leftish"),
        ("GET", "/npm/leftish/-/leftish-1.0.1.tgz"),
        ("GET", "/npm/moved"),
    }
    key = provider.world.credentials["model_api_key"]
    assert "canary" not in json.dumps(upstream.asked) and key not in json.dumps(upstream.asked)
    assert ("packages_asked" in [kind for kind, _ in control.events]) and not list(
        (provider.world.home / "s" / "proxy").glob("r-*")
    )


@pytest.mark.skipif(not Path("/usr/bin/npm").exists(), reason="the sandbox sees the machine's npm only below /usr")
def test_npm_itself_updates_a_lock_file_through_the_mirror(provider: Provider, upstream: Upstream) -> None:
    orders = "Package: whole\nPatched version: 1.0.1\nManifest: package.json\n"
    spec = provider.world.branch_spec(provider.pull, provider.head, registries=["npm"], task={"orders": orders})
    outcome = provider.world.run(spec, ScriptedAdapter(), registries={"npm": upstream.base})
    assert outcome.result is not None and PUSHED in outcome.result, (outcome.reason, outcome.detail)
    locked = json.loads(git(provider.server.path, "show", f"{outcome.result[PUSHED]['commit']}:package-lock.json"))
    entry, published = locked["packages"]["node_modules/whole"], _metadata(upstream)["versions"]["1.0.1"]["dist"]
    assert (entry["version"], entry["resolved"], entry["integrity"]) == ("1.0.1", published["tarball"], published["integrity"])


def test_without_an_allowed_registry_there_is_no_way_to_one(provider: Provider, upstream: Upstream) -> None:
    upstream.asked.clear()
    orders = f"Ask: GET {ADDRESS}/registry/npm/leftish"
    spec = provider.world.branch_spec(provider.pull, provider.head, task={"orders": orders})
    outcome = provider.world.run(spec, ScriptedAdapter("write_fetch"), registries={"npm": upstream.base})
    assert outcome.reason == Reason.AGENT_CRASHED and "npm_config_registry" in (outcome.detail or "") and not upstream.asked


def test_a_registry_that_the_platform_doesnt_know_ends_the_session_before_its_agent(provider: Provider) -> None:
    spec = provider.world.branch_spec(provider.pull, provider.head, registries=["npm"])
    outcome = provider.world.run(spec, ScriptedAdapter("write_edit"))
    assert outcome.reason == Reason.REGISTRY_UNKNOWN


def test_only_plain_whole_answers_come_through(mirror: httpx.Client, upstream: Upstream) -> None:
    asked = {path: mirror.get(f"/registry/npm/{path}") for path in ("leftish", "moved", "pressed", "missing", "a//b")}
    assert {path: answer.status_code for path, answer in asked.items()} == {
        "leftish": 200,
        "moved": 502,
        "pressed": 502,
        "missing": 404,
        "a//b": 400,
    }
    assert asked["leftish"].json()["dist"]["tarball"] == f"{ADDRESS}/registry/npm/leftish/-/leftish-1.0.1.tgz"
    assert "set-cookie" not in asked["leftish"].headers and "location" not in asked["moved"].headers
    assert "/elsewhere" not in [path for _, path, _ in upstream.asked]
    assert mirror.get("/registry/other/leftish").status_code == 404 and mirror.get("/leftish").status_code == 404


def test_packages_keep_their_bytes(mirror: httpx.Client, upstream: Upstream) -> None:
    """Their hashes stand in lock files."""
    assert mirror.get("/registry/npm/x/-/x.tgz").content == b"\0bytes of " + upstream.base.encode()


@pytest.mark.parametrize(
    ("cap", "value", "statuses"),
    [
        ("MAX_REQUESTS", 2, [200, 200, 403]),
        ("MAX_SESSION_BYTES", 250_000, [200, 0, 403]),
        ("MAX_RESPONSE_BYTES", 100_000, [502, 502, 502]),
    ],
)
def test_a_session_has_a_bounded_share(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch, cap: str, value: int, statuses: list[int]
) -> None:
    monkeypatch.setattr(registry_mirror, cap, value)
    served = registry_mirror.RegistryMirror(ADDRESS, {"npm": upstream.base})

    async def ask() -> list[int]:
        found = []
        transport = httpx.ASGITransport(served.application())
        async with httpx.AsyncClient(transport=transport, base_url="http://mirror") as client:
            for _ in statuses:
                try:
                    found.append((await client.get("/registry/npm/large")).status_code)
                except ConnectionAbortedError:
                    found.append(0)
        await served._client.aclose()
        return found

    assert asyncio.run(ask()) == statuses


def test_the_mirror_ends_with_whoever_holds_it(tmp_path: Path, upstream: Upstream) -> None:
    process = Mirror(tmp_path / "r.sock", ADDRESS, {"npm": upstream.base})
    process._in.close()  # as the end of its owner does
    assert process._process.wait(5) == 0
    process._out.close()


def test_the_mirrors_process_has_nothing_to_give_away(
    tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILO_CANARY", "canary-of-the-platform")
    process = Mirror(tmp_path / "r.sock", ADDRESS, {"npm": upstream.base})
    environment = Path(f"/proc/{process._process.pid}/environ").read_text()
    process.close()
    assert "canary" not in environment and "KILO_" not in environment


_PIECE = st.sampled_from(
    ["a", "..", ".", "%2e", "%2E%2e", "%252e%252e", "/", "%2f", "\\", "%5c", "@scope", "-", "b.tgz", "%00", ":", "//"]
)


@given(st.lists(_PIECE, max_size=8))
@settings(max_examples=300, deadline=None)
def test_no_path_leads_out_of_its_base(pieces: list[str]) -> None:
    base = "https://registry.example/npm/"
    try:
        address = target(base, "".join(pieces))
    except RefusedError:
        return
    asked = httpx.URL(address)
    assert asked.host == "registry.example" and asked.raw_path.startswith(b"/npm/")
    seen = asked.raw_path.decode().lower()
    for _ in range(3):
        seen = seen.replace("%25", "%").replace("%2e", ".").replace("%2f", "/").replace("%5c", "/")
    assert ".." not in seen.replace("\\", "/").split("/")


def test_scoped_packages_are_asked_as_npm_spells_them() -> None:
    assert target("https://r.example/", "@scope%2fname") == "https://r.example/@scope%2fname"


@given(
    st.lists(st.sampled_from([b"http://r/", b"http://r/x/", b"htt", b"p://", b"r/", b"x/", b"z", b"\0"]), max_size=12), st.data()
)
@settings(max_examples=200, deadline=None)
def test_addresses_are_rewritten_however_the_body_is_cut(words: list[bytes], data: st.DataObject) -> None:
    addresses = {b"http://r/": b"A", b"http://r/x/": b"B"}
    body = b"".join(words)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=5)))
    rewriter = Rewriter(addresses)
    pieces = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    told = b"".join([*(rewriter.feed(piece) for piece in pieces), rewriter.end()])
    assert told == body.replace(b"http://r/x/", b"B").replace(b"http://r/", b"A")
