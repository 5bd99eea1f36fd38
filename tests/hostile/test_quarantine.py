"""Packs that no honest finalisation makes: the sandbox's own program is believed in nothing (threats, rules 1 and 14)."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from kilo_pipelines.cloud_agent import git as ours
from kilo_pipelines.cloud_agent.workspace import PACK_NAME, ResultFileError, Workspace
from kilo_pipelines.core.changes import MAX_FILES, Change, refusal_of
from kilo_pipelines.core.reasons import Reason
from tests.support.git import ENV, BareRepository, git


class Place:
    """The platform's repository with a head, and a sandbox's repository that packs come from."""

    def __init__(self, path: Path) -> None:
        self.bare, self.sandbox = BareRepository(path / "bare.git"), BareRepository(path / "sandbox.git")
        files: dict[str, bytes | tuple[str, bytes] | None] = {"a.py": b"one\n", "src/b.py": b"two\n", "secret": b"elsewhere\n"}
        self.head = self.bare.commit(files)
        (self.sandbox.path / "objects/info/alternates").write_text(f"{self.bare.path}/objects\n")
        self.quarantine = ours.Quarantine(self.bare.path, path / "quarantine")

    def tree(self, files: dict[str, bytes | tuple[str, bytes] | None]) -> str:
        """A tree on the head with these files changed."""
        return git(self.sandbox.path, "rev-parse", f"{self.sandbox.commit(files, self.head)}^{{tree}}")

    def raw_tree(self, *entries: tuple[str, bytes, str]) -> str:
        """A tree of exactly these entries (mode, name, id), whatever git thinks of them."""
        content = b"".join(mode.encode() + b" " + name + b"\0" + bytes.fromhex(sha) for mode, name, sha in entries)
        return git(self.sandbox.path, "hash-object", "-t", "tree", "--literally", "-w", "--stdin", stdin=content)

    def pack(self, *ids: str) -> bytes:
        """These objects, none that they name."""

        command = ["git", "-C", str(self.sandbox.path), "pack-objects", "-q", "--stdout"]
        return subprocess.run(command, input="\n".join(ids).encode(), capture_output=True, check=True, env=ENV).stdout

    def new(self, tree: str) -> list[str]:
        """What an honest pack of this tree holds."""
        return [
            line.split()[0]
            for line in git(self.sandbox.path, "rev-list", "--objects", tree, "--not", f"{self.head}^{{tree}}").splitlines()
        ]

    def read(self, pack: bytes, tree: str) -> list[Change] | Reason:
        """What the platform makes of a pack; the platform's repository must hold nothing of it afterwards."""
        before = git(self.bare.path, "count-objects", "-v")
        try:
            return self.quarantine.read(pack, tree, self.head)
        except ours.GitError as refusal:
            return refusal.reason
        finally:
            assert git(self.bare.path, "count-objects", "-v") == before


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_an_honest_pack_is_read_and_committed_without_entering_the_repository(place: Place) -> None:
    tree = place.tree({"a.py": b"changed\n", "src/b.py": None, "run.sh": ("100755", b"#!/bin/sh\n")})
    found = place.read(place.pack(*place.new(tree)), tree)
    assert found == [
        Change("a.py", "100644", "100644", 8),
        Change("run.sh", "000000", "100755", 10),
        Change("src/b.py", "100644", "000000", 0),
    ]
    commit = place.quarantine.commit(tree, place.head, "Words\n")
    assert git(place.bare.path, "cat-file", "-e", place.head) == ""
    with pytest.raises(AssertionError):
        git(place.bare.path, "cat-file", "-e", commit)


def test_a_change_that_only_moves_what_is_there_needs_no_objects(place: Place) -> None:
    tree = git(place.sandbox.path, "rev-parse", f"{place.head}:src")
    found = place.read(place.pack(), tree)
    assert isinstance(found, list) and {change.path for change in found} == {"a.py", "b.py", "secret", "src/b.py"}


def test_the_head_itself_is_no_change(place: Place) -> None:
    found = place.read(place.pack(), git(place.bare.path, "rev-parse", f"{place.head}^{{tree}}"))
    assert isinstance(found, list)
    refusal = refusal_of(found)
    assert refusal is not None and refusal.reason is Reason.NO_CHANGES


def _gitlink(place: Place) -> tuple[bytes, str]:
    tree = place.tree({"sub": ("160000", b"c" * 40)})
    return place.pack(*place.new(tree)), tree


def _link(place: Place) -> tuple[bytes, str]:
    tree = place.tree({"l": ("120000", b"/etc/passwd")})
    return place.pack(*place.new(tree)), tree


def _mode(mode: str) -> Callable[[Place], tuple[bytes, str]]:
    def build(place: Place) -> tuple[bytes, str]:
        blob = place.sandbox.blob(b"x")
        tree = place.raw_tree((mode, b"x", blob))
        return place.pack(blob, tree), tree

    return build


def _named(name: bytes) -> Callable[[Place], tuple[bytes, str]]:
    def build(place: Place) -> tuple[bytes, str]:
        blob = place.sandbox.blob(b"x")
        tree = place.raw_tree(("100644", name, blob))
        return place.pack(blob, tree), tree

    return build


def _with_commit(place: Place) -> tuple[bytes, str]:
    commit = place.sandbox.commit({"a.py": b"changed\n"}, place.head)
    tree = git(place.sandbox.path, "rev-parse", f"{commit}^{{tree}}")
    return place.pack(*place.new(tree), commit), tree


def _with_tag(place: Place) -> tuple[bytes, str]:
    tree = place.tree({"a.py": b"changed\n"})
    words = f"object {tree}\ntype tree\ntag v1\ntagger m <m@example.test> 0 +0000\n\nm\n".encode()
    return place.pack(*place.new(tree), git(place.sandbox.path, "mktag", stdin=words)), tree


def _a_commit_as_tree(place: Place) -> tuple[bytes, str]:
    return place.pack(), place.head


def _a_blob_as_tree(place: Place) -> tuple[bytes, str]:
    blob = place.sandbox.blob(b"x")
    return place.pack(blob), blob


def _an_option_as_tree(place: Place) -> tuple[bytes, str]:
    return place.pack(), "--output=/tmp/pwned"


def _missing_blob(place: Place) -> tuple[bytes, str]:
    tree = place.tree({"a.py": b"changed\n"})
    return place.pack(tree), tree


def _cut(place: Place) -> tuple[bytes, str]:
    tree = place.tree({"a.py": os.urandom(5_000)})
    return place.pack(*place.new(tree))[:-500], tree


def _changed_byte(place: Place) -> tuple[bytes, str]:
    tree = place.tree({"a.py": os.urandom(5_000)})
    pack = bytearray(place.pack(*place.new(tree)))
    pack[2_500] ^= 1
    return bytes(pack), tree


def _nothing(place: Place) -> tuple[bytes, str]:
    return b"", place.tree({"a.py": b"changed\n"})


def _object_header(kind: int, size: int) -> bytes:
    first, size = (kind << 4) | (size & 15), size >> 4
    header = bytearray()
    while size:
        header.append(first | 0x80)
        first, size = size & 0x7F, size >> 7
    return bytes([*header, first])


def _packed(*objects: bytes) -> bytes:
    content = b"PACK" + struct.pack(">II", 2, len(objects)) + b"".join(objects)
    return content + hashlib.sha1(content).digest()


def _zeros(place: Place) -> tuple[bytes, str]:
    """Half a gigabyte in half a megabyte: more than git takes into memory at once, so that it may read all of it."""
    press, size = zlib.compressobj(1), 2**29 + 2**20
    content = b"".join(press.compress(bytes(2**20)) for _ in range(size // 2**20)) + press.flush()
    return _packed(_object_header(3, size) + content), "1" * 40


def _delta(size: int) -> Callable[[Place], tuple[bytes, str]]:
    """A few kilobytes that unpack to this many bytes: the first 64 KiB of the base, again and again."""

    def number(value: int) -> bytes:
        out = bytearray()
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        return bytes([*out, value])

    def build(place: Place) -> tuple[bytes, str]:
        base = os.urandom(2**16)
        name = hashlib.sha1(b"blob %d\0" % len(base) + base).digest()
        delta = number(len(base)) + number(size) + b"\x80" * (size // 2**16)
        return _packed(
            _object_header(3, len(base)) + zlib.compress(base), _object_header(7, len(delta)) + name + zlib.compress(delta)
        ), "1" * 40

    return build


def _nested(place: Place) -> tuple[bytes, str]:
    """Ten trees name ten thousand million files."""
    tree, ids = place.sandbox.blob(b"x"), []
    ids.append(tree)
    mode = "100644"
    for _ in range(10):
        tree = place.raw_tree(*((mode, b"%d" % number, tree) for number in range(10)))
        ids.append(tree)
        mode = "40000"
    return place.pack(*ids), tree


HOSTILE: dict[str, tuple[Callable[[Place], tuple[bytes, str]], set[Reason]]] = {
    "submodule": (_gitlink, {Reason.CHANGE_GITLINK}),
    "link": (_link, {Reason.CHANGE_SYMLINK}),
    "setuid": (_mode("104755"), {Reason.CHANGE_MODE}),
    "group writable": (_mode("100664"), {Reason.CHANGE_MODE}),
    "device": (_mode("60000"), {Reason.CHANGE_MODE}),
    "dot git": (_named(b".git"), {Reason.CHANGE_NESTED_REPOSITORY}),
    "dot git on NTFS": (_named(b"GIT~1"), {Reason.CHANGE_NESTED_REPOSITORY}),
    "dot git with a stream": (_named(b".git::$INDEX_ALLOCATION"), {Reason.CHANGE_NESTED_REPOSITORY}),
    "dot dot": (_named(b".."), {Reason.CHANGE_PACK_REFUSED}),
    "slash": (_named(b"a/b"), {Reason.CHANGE_PACK_REFUSED}),
    "backslash": (_named(b"a\\b"), {Reason.CHANGE_PATH}),
    "line feed": (_named(b"a\nb"), {Reason.CHANGE_PATH}),
    "no UTF-8": (_named(b"a\xff"), {Reason.CHANGE_PATH}),
    "a commit": (_with_commit, {Reason.CHANGE_HISTORY}),
    "a tag": (_with_tag, {Reason.CHANGE_HISTORY}),
    "a commit as the tree": (_a_commit_as_tree, {Reason.CHANGE_PACK_REFUSED}),
    "a blob as the tree": (_a_blob_as_tree, {Reason.CHANGE_PACK_REFUSED}),
    "an option as the tree": (_an_option_as_tree, {Reason.CHANGE_PACK_REFUSED}),
    "a blob that isn't there": (_missing_blob, {Reason.CHANGE_PACK_REFUSED}),
    "cut": (_cut, {Reason.CHANGE_PACK_REFUSED}),
    "a changed byte": (_changed_byte, {Reason.CHANGE_PACK_REFUSED}),
    "nothing": (_nothing, {Reason.CHANGE_PACK_REFUSED}),
    "half a gigabyte of zeros": (_zeros, {Reason.CHANGE_TOO_LARGE}),
    "a delta of 64 MB": (_delta(2**26), {Reason.CHANGE_TOO_LARGE}),
    "a delta of more than our memory": (_delta(2**30), {Reason.CHANGE_PACK_REFUSED}),
    "trees of trees": (_nested, {Reason.CHANGE_TOO_LARGE}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_pack_that_isnt_a_plain_change_is_refused_and_stays_outside(place: Place, name: str) -> None:
    build, reasons = HOSTILE[name]
    pack, tree = build(place)
    began = time.monotonic()
    found = place.read(pack, tree)
    if isinstance(found, list):
        refusal = refusal_of(found)
        assert refusal is not None, "was accepted"
        found = refusal.reason
    assert found in reasons and time.monotonic() - began < 20


def test_reading_stops_at_the_first_file_too_many(place: Place) -> None:
    tree = place.tree({f"d/{number}": b"x" for number in range(MAX_FILES + 50)})
    found = place.read(place.pack(*place.new(tree)), tree)
    assert isinstance(found, list) and len(found) == MAX_FILES + 1


@pytest.mark.parametrize("kind", ["link", "pipe", "second name", "too large", "directory"])
def test_the_pack_is_a_small_regular_file_of_its_own(tmp_path: Path, kind: str) -> None:
    found = Workspace(tmp_path, uuid4())
    found.create(None)
    found.create_final(None)
    assert found.read_pack(100) is None
    path, outside = found.final / PACK_NAME, tmp_path / "outside"
    outside.write_bytes(b"x")
    if kind == "link":
        path.symlink_to(outside)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "second name":
        path.hardlink_to(outside)
    elif kind == "too large":
        path.write_bytes(b"x" * 101)
    else:
        path.mkdir()
    with pytest.raises(ResultFileError):
        found.read_pack(100)
