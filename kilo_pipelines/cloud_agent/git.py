"""git, with two rules: a token only where no agent can write, and no git of ours in a tree that an agent wrote.

Everything here works on bare repositories of the platform, one per owner and repository id, whose configuration we wrote.
The environment of every call follows threats rule 2; diffs follow rule 10. What a write session made is read, committed and
pushed from a `Quarantine` beside the bare repository and never enters it.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit
from uuid import UUID

from kilo_pipelines.core.changes import MAX_BYTES, MAX_FILES, Change
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.session import DiffEntry, EntryStatus, WorkspaceFacts
from kilo_pipelines.settings import LOOPBACK

TIMEOUT_SECONDS = 360  # contract B4: clone and fetch together
MAX_TREE_ENTRIES = 200_000
MAX_TREE_BYTES = 2 * 2**30
# GitHub itself shows no more files of a pull request; each one costs a git process, and a session's parts hold fewer anyway.
MAX_CHANGES = 3_000
MAX_ENTRY_TEXT = 1_000_000  # far over what any part may hold; such an entry ends as diff_too_large, not as a full memory
# A pack of a change that may be pushed is smaller than its contents; trees of the changed directories come on top.
MAX_PACK_BYTES = MAX_BYTES + 2**23
# Unpacked: the contents, twice over for trees of very wide directories. A small pack can unpack to any size.
MAX_UNPACKED_BYTES = 2 * MAX_BYTES
# For git reading such a pack: eight times the largest honest object, and minutes where seconds are enough.
UNPACK_MEMORY_BYTES = 8 * MAX_BYTES + 2**26
UNPACK_CPU_SECONDS = 60
# `.invalid` belongs to nobody (RFC 2606), so no account of the provider is shown as the author.
AUTHOR_NAME, AUTHOR_EMAIL = "kilo-pipelines", "agent@kilo-pipelines.invalid"
POLICY_PATH = "REVIEW.md"
POLICY_CHARS = 10_000  # contract A8.4
_HEX = re.compile(r"^[0-9a-f]{40}([0-9a-f]{24})?$")
_ZERO = "0" * 40
# git's message ids (git-fsck, "fsck messages") that have a reason of their own.
_OF_FSCK = {"badFilemode": Reason.CHANGE_MODE, "hasDotgit": Reason.CHANGE_NESTED_REPOSITORY}
_STATUS: dict[str, EntryStatus] = {
    "A": "added",
    "M": "modified",
    "D": "deleted",
    "R": "renamed",
    "C": "copied",
    "T": "type_changed",
}


# Uses of one package: a megabyte of such lines is no ground that a person could look at.
MAX_HITS_BYTES = 2**20


class GitError(Exception):
    """git could not do it; `reason` is a code, the text is scrubbed of tokens."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def _environment(extra: dict[str, str] | None = None, config: dict[str, str] | None = None) -> dict[str, str]:
    """Nothing of the machine's or the user's git configuration; configuration of ours through the environment."""
    settings = {
        "protocol.allow": "never",
        "protocol.https.allow": "always",
        "http.followRedirects": "false",
        "core.hooksPath": os.devnull,
        "core.fsmonitor": "false",
        "core.attributesFile": os.devnull,
        "gc.auto": "0",
        "fetch.fsckObjects": "true",
        # Old commits of real repositories carry these harmless oddities (git's own hosting warns, too).
        "fetch.fsck.zeroPaddedFilemode": "warn",
        "fetch.fsck.badTimezone": "warn",
        "fetch.fsck.missingSpaceBeforeDate": "warn",
        "safe.directory": "*",
        "diff.renames": "true",
        **(config or {}),
    }
    pairs = {
        f"GIT_CONFIG_{part}_{index}": text
        for index, item in enumerate(settings.items())
        for part, text in zip(("KEY", "VALUE"), item, strict=True)
    }
    return {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "HOME": "/nonexistent",
        "LANG": "C.UTF-8",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_LITERAL_PATHSPECS": "1",
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_CONFIG_COUNT": str(len(settings)),
        **pairs,
        **(extra or {}),
    }


def _run(
    bare: Path,
    *args: str,
    config: dict[str, str] | None = None,
    stdin: bytes | None = None,
    stdout: IO[bytes] | int = subprocess.PIPE,
    reason: Reason = Reason.FETCH_FAILED,
    secret: str = "",
    extra: dict[str, str] | None = None,
    within: tuple[str, ...] = (),
) -> bytes:
    """Output of git; `extra` goes into its environment, `within` is a program that starts it."""
    try:
        done = subprocess.run(
            [*within, "git", f"--git-dir={bare}", *args],
            input=stdin if stdin is not None else b"",
            stdout=stdout,
            stderr=subprocess.PIPE,
            env=_environment(extra, config),
            timeout=TIMEOUT_SECONDS,
            check=False,
            cwd="/",
        )
    except subprocess.TimeoutExpired:
        raise GitError(reason, f"git {args[0]} took longer than {TIMEOUT_SECONDS} s") from None
    if done.returncode:
        message = done.stderr.decode(errors="replace").strip()[-500:]
        raise GitError(reason, f"git {args[0]}: {message.replace(secret, '***') if secret else message}")
    return done.stdout or b""


@contextmanager
def _reading(
    bare: Path,
    *args: str,
    reason: Reason,
    extra: dict[str, str] | None = None,
    seconds: float = TIMEOUT_SECONDS,
    finds: bool = False,
) -> Iterator[IO[bytes]]:
    """The output of git as it comes, for what may be endless: leaving early ends git, an error of git is a GitError.

    With `finds` git's status 1 is an answer (nothing found), and any word of complaint an error: something was not looked at.
    """
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            ["git", f"--git-dir={bare}", *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=_environment(extra),
            cwd="/",
        ) as process,
    ):
        assert process.stdout is not None  # noqa: S101  # asked for above
        alarm = threading.Timer(seconds, process.kill)
        alarm.start()
        try:
            yield process.stdout
            ended = not process.stdout.read(1)
        except BaseException:
            process.kill()
            raise
        finally:
            alarm.cancel()
        if not ended:  # the reader has seen enough
            process.kill()
            return
        status = process.wait()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip()[-500:]
        if status not in ((0, 1) if finds else (0,)) or (finds and said):
            raise GitError(reason, f"git {args[0]} ({status}): {said}")


def bare_path(repositories: Path, owner_id: UUID, repository_id: int) -> Path:
    """Where an owner's copy of a repository lies: by ids, never by names."""
    return repositories / str(owner_id) / f"{int(repository_id)}.git"


@contextmanager
def _locked(bare: Path) -> Iterator[None]:
    """The bare repository, made where it isn't there yet; one at a time."""
    bare.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with bare.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (bare / "HEAD").exists():
            _run(bare, "init", "-q", "--bare")
        yield


def _authorised(clone_url: str, token: str, reason: Reason) -> tuple[dict[str, str], str]:
    """Configuration of one git process with the token, scoped to the address, and what must not stand in any message."""
    parts = urlsplit(clone_url)
    if parts.scheme != "https" and parts.hostname not in LOOPBACK:
        raise GitError(reason, "repositories are reached over https only")
    origin = f"{parts.scheme}://{parts.netloc}/"
    basic = base64.b64encode(f"x-access-token:{token}".encode()).decode()
    config = {f"http.{origin}.extraHeader": f"Authorization: Basic {basic}"}
    if parts.scheme == "http":
        config["protocol.http.allow"] = "always"
    return config, basic


def fetch(bare: Path, clone_url: str, token: str, refs: dict[str, str]) -> dict[str, str]:
    """Fetches full refs (local name to remote name) and answers their commits by local name; GitError(fetch_failed)."""
    config, basic = _authorised(clone_url, token, Reason.FETCH_FAILED)
    with _locked(bare):
        specs = [f"+{remote}:{local}" for local, remote in refs.items()]
        _run(
            bare,
            "fetch",
            "-q",
            "--no-tags",
            "--no-write-fetch-head",
            "--end-of-options",
            clone_url,
            *specs,
            config=config,
            secret=basic,
        )
        # Read under the same lock: another session of this repository moves the same names next.
        return {local: commit_of(bare, local) for local in refs}


def remote_refs(bare: Path, clone_url: str, token: str, names: list[str], reason: Reason = Reason.FETCH_FAILED) -> dict[str, str]:
    """What the provider holds under these full names, by name; what it doesn't have is left out."""
    config, basic = _authorised(clone_url, token, reason)
    asked = ("ls-remote", "--refs", "--end-of-options", clone_url, *names)
    with _locked(bare):
        listed = _run(bare, *asked, config=config, secret=basic, reason=reason).decode()
    found = {name: commit for commit, name in (line.split("\t") for line in listed.splitlines())}
    return {name: found[name] for name in names if name in found}


def commit_of(bare: Path, ref: str) -> str:
    """The commit that a full ref of ours points at."""
    return _run(bare, "rev-parse", "--verify", "-q", "--end-of-options", f"{ref}^{{commit}}").decode().strip()


def contains(bare: Path, tip: str, commit: str) -> bool:
    """Whether a commit is an ancestor of the tip; not when it is unknown."""
    try:
        return not _run(bare, "rev-list", "-n1", _hex(commit), f"^{_hex(tip)}")
    except GitError:
        return False


def _hex(value: str, reason: Reason = Reason.HEAD_MOVED) -> str:
    if not _HEX.match(value):
        raise GitError(reason, "not an object id")
    return value


def blobs_at(bare: Path, commit: str, paths: list[str]) -> dict[str, str]:
    """Ids of those of these files that a commit has, by path; an id is a hash of the content."""
    listed = _run(bare, "ls-tree", "-z", "--full-tree", _hex(commit), "--", *paths)
    found = {}
    for line in listed.split(b"\0"):
        meta, _, path = line.partition(b"\t")
        if path:
            found[path.decode(errors="replace")] = meta.split()[2].decode()
    return found


def lines_with(bare: Path, commit: str, texts: list[str], seconds: float) -> list[tuple[str, str]]:
    """Lines of a commit's files, binary ones too, that hold one of these literal texts, as (path, line).

    GitError: `ground_too_wide` when there are too many, `fetch_failed` when the search didn't come to its end.
    """
    if not texts:
        return []
    patterns = [part for text in texts for part in ("-e", text)]
    # As text: one NUL in a file, or an attribute, would hide all of it (threats, rule 10).
    command = ("grep", "-a", "-F", "-z", "--full-name", "--no-color", "--threads=1", *patterns, _hex(commit))
    with _reading(bare, *command, reason=Reason.FETCH_FAILED, seconds=seconds, finds=True) as output:
        content = output.read(MAX_HITS_BYTES + 1)
    if len(content) > MAX_HITS_BYTES:
        raise GitError(Reason.GROUND_TOO_WIDE, "the search hits more than a dismissal can rest on")
    found = []
    for line in content.split(b"\n"):
        path, _, text = line.partition(b"\0")
        if path:
            found.append((path.decode(errors="replace").removeprefix(f"{commit}:"), text.decode(errors="replace")))
    return found


def read_facts(bare: Path, *, base: str, head: str, policy_commit: str | None) -> WorkspaceFacts:
    """Merge base, the whole diff by changed blob pair, and REVIEW.md; GitError for trees beyond the caps."""
    merge_base = _run(bare, "merge-base", _hex(base), _hex(head)).decode().strip()
    _check_size(bare, head)
    entries = _entries(bare, merge_base, head)
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(
            f"{entry.status} {entry.old_mode} {entry.new_mode} {entry.old_blob} {entry.new_blob} {entry.old_path or ''}\0{entry.path}\0".encode(
                errors="surrogateescape"
            )
        )
        digest.update(entry.text.encode())
    text, cut = _policy(bare, policy_commit) if policy_commit else (None, False)
    return WorkspaceFacts(
        merge_base=merge_base,
        head_sha=head,
        diff_hash=digest.hexdigest(),
        entries=entries,
        policy_text=text,
        policy_commit=policy_commit if text else None,
        policy_truncated=cut,
    )


def _check_size(bare: Path, head: str, extra: dict[str, str] | None = None, reason: Reason = Reason.REPOSITORY_TOO_LARGE) -> None:
    """Counts entries and bytes before anything is checked out: a tree can name one blob, or one tree, a million times.

    The listing is read as it comes and only as far as the caps: ten nested trees list ten thousand million files.
    """
    entries = size = 0
    with _reading(bare, "ls-tree", "-r", "-z", "--long", head, reason=Reason.FETCH_FAILED, extra=extra) as listing:
        for line in _fields(listing):
            entries += 1
            meta = line.split(b"\t", 1)[0].split()
            if len(meta) == 4 and meta[3].isdigit():
                size += int(meta[3])
            if entries > MAX_TREE_ENTRIES or size > MAX_TREE_BYTES:
                raise GitError(reason, f"more than {entries} files or {size} bytes")


def _entries(bare: Path, old: str, new: str) -> list[DiffEntry]:
    raw = _run(bare, "diff-tree", "-r", "-z", "--raw", "--full-index", "--no-abbrev", "-M", old, new)
    fields = raw.decode(errors="surrogateescape").split("\0")
    changes = sum(1 for field in fields if field.startswith(":"))
    if changes > MAX_CHANGES:
        raise GitError(Reason.DIFF_TOO_LARGE, f"{changes} changed files, {MAX_CHANGES} are read")
    entries, index = [], 0
    while index < len(fields) and fields[index].startswith(":"):
        old_mode, new_mode, old_blob, new_blob, letter = fields[index][1:].split()
        renamed = letter[0] in "RC"
        old_path = fields[index + 1] if renamed else None
        path = fields[index + 2] if renamed else fields[index + 1]
        index += 3 if renamed else 2
        entries.append(_entry(bare, old, new, (old_mode, new_mode, old_blob, new_blob, letter[0]), path, old_path))
    return entries


def _entry(bare: Path, old: str, new: str, meta: tuple[str, str, str, str, str], path: str, old_path: str | None) -> DiffEntry:
    old_mode, new_mode, old_blob, new_blob, letter = meta
    paths = [old_path, path] if old_path else [path]
    with _reading(
        bare,
        "diff-tree",
        "-r",
        "-p",
        "--text",
        "--no-ext-diff",
        "--no-textconv",
        "--full-index",
        "--no-color",
        "-M",
        old,
        new,
        "--",
        *paths,
        reason=Reason.FETCH_FAILED,
    ) as output:
        content = output.read(MAX_ENTRY_TEXT + 1)
    binary = _is_binary(content)
    name = path.encode(errors="surrogateescape").decode(errors="backslashreplace")
    if binary or len(content) > MAX_ENTRY_TEXT:
        what = "binary content" if binary else "content too large to show"
        text = f"{what}: {name}, mode {old_mode} -> {new_mode}, blob {old_blob} -> {new_blob}"
        if not binary:
            text += "\n" + "." * MAX_ENTRY_TEXT  # keeps the entry larger than any part: it is refused, never cut
    else:
        text = content.decode(errors="backslashreplace").replace("\0", "\\x00").rstrip("\n")
    identity = f"{old_blob}:{new_blob}:{old_mode}:{new_mode}:{path}".encode(errors="surrogateescape")
    return DiffEntry(
        entry_id=hashlib.sha256(identity).hexdigest()[:16],
        path=name,
        old_path=old_path.encode(errors="surrogateescape").decode(errors="backslashreplace") if old_path else None,
        status=_STATUS.get(letter, "modified"),
        old_blob=old_blob,
        new_blob=new_blob,
        old_mode=old_mode,
        new_mode=new_mode,
        binary=binary,
        text=text,
    )


_ODD = bytes(one for one in range(32) if one not in b"\0\t\n\x0b\x0c\r\x1b") + b"\x7f"


def _is_binary(diff: bytes) -> bool:
    """Whether a diff's lines can't be shown as text.

    One NUL doesn't make a binary: shells and JavaScript run sources with NULs in them, and what counts as binary isn't read by
    any model. UTF-16 stays text, with its NULs visible.
    """
    content = b"\n".join(line[1:] for line in diff[diff.find(b"\n@@") + 1 :].split(b"\n") if line[:1] in (b"+", b"-", b" "))
    if b"\0" not in content:
        return False
    text = content.decode(errors="ignore").encode()
    odd = len(content) - len(text.translate(None, _ODD))
    return odd > len(content) * 0.2 or content.count(b"\0") > len(content) * 0.6


def _policy(bare: Path, commit: str) -> tuple[str | None, bool]:
    """REVIEW.md at a recorded commit: a plain file, normalised, cut at its limit (contract A8.4, threats rule 12)."""
    listing = _run(bare, "ls-tree", "-z", _hex(commit), POLICY_PATH).decode(errors="replace")
    mode, kind, blob = [*listing.split("\t", 1)[0].split(), "", "", ""][:3]
    if kind != "blob" or mode not in ("100644", "100755"):
        return None, False
    raw = _run(bare, "cat-file", "blob", blob).decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", raw).strip()
    if not text:
        return None, False
    return (text[:POLICY_CHARS] + "\n(cut here)", True) if len(text) > POLICY_CHARS else (text, False)


def export_pack(bare: Path, commits: list[str], target: Path) -> None:
    """Writes the commits' trees as one shallow bundle-like pack, for a checkout inside the sandbox."""
    wanted = b"".join(f"{_hex(commit)}\n".encode() for commit in commits)
    objects = _run(bare, "rev-list", "--objects", "--no-walk", "--stdin", stdin=wanted, reason=Reason.CHECKOUT_FAILED)
    ids = b"".join(line.split(b" ", 1)[0] + b"\n" for line in objects.splitlines())
    # Into the file, not through our memory: a tree may have 2 GB.
    with target.open("wb") as pack:
        _run(bare, "pack-objects", "-q", "--stdout", stdin=ids, reason=Reason.CHECKOUT_FAILED, stdout=pack)


class Quarantine:
    """The objects of one write session's change: they see the bare repository, the bare repository never sees them.

    `directory` belongs to the platform; no agent can write there. Removing it is the end of a change that isn't pushed.
    """

    def __init__(self, bare: Path, directory: Path) -> None:
        self.bare, self.directory = bare, directory
        self._alone = {"GIT_OBJECT_DIRECTORY": str(directory), "GIT_NO_REPLACE_OBJECTS": "1"}
        # Quoted: git splits the list at colons.
        self._joined = self._alone | {"GIT_ALTERNATE_OBJECT_DIRECTORIES": f'"{bare / "objects"}"'}

    def read(self, pack: bytes, tree: str, head: str) -> list[Change]:
        """Checks a pack from the sandbox and answers how its tree differs from the recorded head's; stops past `MAX_FILES`.

        GitError: change_pack_refused, change_history (commits or tags in the pack), change_too_large.
        """
        (self.directory / "pack").mkdir(parents=True)
        try:
            self._run(
                "index-pack",
                # Odd modes are a remark to git, and a comparison of trees tells only what git makes of them.
                "--strict=badFilemode=error",
                "--fsck-objects",
                f"--max-input-size={MAX_PACK_BYTES}",
                "--stdin",
                stdin=pack,
                # A few kilobytes of deltas can ask for gigabytes.
                within=("prlimit", f"--data={UNPACK_MEMORY_BYTES}", f"--cpu={UNPACK_CPU_SECONDS}"),
            )
        except GitError as failure:
            reason = next((_OF_FSCK[name] for name in _OF_FSCK if f" {name}:" in failure.detail), failure.reason)
            raise GitError(reason, failure.detail) from None
        self._check_objects()
        if self._run("cat-file", "-t", _hex(tree, Reason.CHANGE_PACK_REFUSED)).strip() != b"tree":
            raise GitError(Reason.CHANGE_PACK_REFUSED, "not a tree")
        # Before the comparison, which git tells only when it has all of it.
        _check_size(self.bare, tree, self._joined, Reason.CHANGE_TOO_LARGE)
        found = []
        with _reading(
            self.bare,
            "diff-tree",
            "-r",
            "-z",
            "--raw",
            "--no-renames",
            "--no-abbrev",
            f"{_hex(head)}^{{tree}}",
            tree,
            reason=Reason.CHANGE_PACK_REFUSED,
            extra=self._joined,
        ) as listing:
            fields = _fields(listing)
            for meta in islice(fields, MAX_FILES + 1):
                old_mode, new_mode, _, blob, _ = meta[1:].decode().split()
                found.append((next(fields).decode(errors="surrogateescape"), old_mode, new_mode, blob))
        sizes = self._sizes({blob for *_, mode, blob in found if mode != "160000" and blob != _ZERO})
        return [Change(path, old, new, sizes.get(blob, 0)) for path, old, new, blob in found]

    def content(self, of: str, path: str) -> bytes:
        """A file of a tree or commit; GitError for one that is larger than a whole change may be."""
        blob = f"{_hex(of)}:{path}"
        with _reading(self.bare, "cat-file", "blob", blob, reason=Reason.CHANGE_PACK_REFUSED, extra=self._joined) as output:
            found = output.read(MAX_BYTES + 1)
        if len(found) > MAX_BYTES:
            raise GitError(Reason.CHANGE_TOO_LARGE, path)
        return found

    def commit(self, tree: str, head: str, message: str) -> str:
        """The one commit of the change: this tree on the recorded head, author, committer and message ours; its id."""
        who = {
            f"GIT_{role}_{field}": value
            for role in ("AUTHOR", "COMMITTER")
            for field, value in (("NAME", AUTHOR_NAME), ("EMAIL", AUTHOR_EMAIL))
        }
        made = self._run("commit-tree", _hex(tree), "-p", _hex(head), "-F", "-", stdin=message.encode(), more=who)
        return made.decode().strip()

    def push(self, clone_url: str, token: str, commit: str, branch: str) -> None:
        """Creates `refs/heads/<branch>` at the commit; never moves or forces anything (threats, rule 14).

        Done when the branch holds this commit already: an earlier answer was lost. GitError: branch_taken, push_failed.
        """
        config, basic = _authorised(clone_url, token, Reason.PUSH_FAILED)
        ref = f"refs/heads/{branch}"

        try:
            # The lease expects that there is no such branch; the server itself compares once more.
            self._run(
                "push",
                "-q",
                "--no-verify",
                "--no-follow-tags",
                "--recurse-submodules=no",
                f"--force-with-lease={ref}:",
                "--end-of-options",
                clone_url,
                f"{_hex(commit)}:{ref}",
                config=config,
                secret=basic,
                reason=Reason.PUSH_FAILED,
            )
        except GitError as failure:
            held = remote_refs(self.bare, clone_url, token, [ref], Reason.PUSH_FAILED).get(ref)
            if held is None:
                raise failure from None
            if held != commit:
                raise GitError(Reason.BRANCH_TAKEN, f"{branch} holds another commit") from None

    def _check_objects(self) -> None:
        """Trees and blobs only, and not more of them than a change may have."""
        unpacked = 0
        with _reading(
            self.bare,
            "cat-file",
            "--batch-check=%(objecttype) %(objectsize)",
            "--batch-all-objects",
            "--unordered",
            reason=Reason.CHANGE_PACK_REFUSED,
            extra=self._alone,
        ) as listing:
            for line in listing:
                kind, size = line.split()
                if kind not in (b"tree", b"blob"):
                    raise GitError(Reason.CHANGE_HISTORY, f"a {kind.decode()} in the pack")
                unpacked += int(size)
                if unpacked > MAX_UNPACKED_BYTES:
                    raise GitError(Reason.CHANGE_TOO_LARGE, f"more than {MAX_UNPACKED_BYTES} bytes unpacked")

    def _sizes(self, blobs: set[str]) -> dict[str, int]:
        answer = self._run("cat-file", "--batch-check=%(objectname) %(objectsize)", stdin="\n".join(blobs).encode())
        return {name: int(size) for name, size in (line.split() for line in answer.decode().splitlines())}

    def _run(
        self,
        *args: str,
        stdin: bytes | None = None,
        config: dict[str, str] | None = None,
        secret: str = "",
        reason: Reason = Reason.CHANGE_PACK_REFUSED,
        more: dict[str, str] | None = None,
        within: tuple[str, ...] = (),
    ) -> bytes:
        extra = self._joined | (more or {})
        return _run(self.bare, *args, stdin=stdin, config=config, secret=secret, reason=reason, extra=extra, within=within)


def _fields(listing: IO[bytes]) -> Iterator[bytes]:
    """Fields of a `-z` output as they come."""
    pending = b""
    while chunk := listing.read(2**16):
        *fields, pending = (pending + chunk).split(b"\0")
        yield from fields
