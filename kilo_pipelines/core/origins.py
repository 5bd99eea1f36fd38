"""Where packages come from and what runs when they are installed, as manifests and lock files say: what a change must not bring in.

Pure, and no parser of any one package manager: whatever could be an address counts as one, and what the former file named stays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from typing import Any
from urllib.parse import unquote

from kilo_pipelines.core.changes import Refusal
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.text import one_line

_NPM = ("package.json", "package-lock.json", "npm-shrinkwrap.json")
_TEXT = (
    "yarn.lock",
    "pnpm-lock.yaml",
    "pnpm-workspace.yaml",
    "bun.lock",
    "pyproject.toml",
    "poetry.lock",
    "pdm.lock",
    "uv.lock",
    "pylock.toml",
    "pipfile",
    "pipfile.lock",
    "cargo.lock",
    "gemfile.lock",
)
_REQUIREMENTS = re.compile(r"(?:.*/)?(?:[^/]*(?:requirements|constraints)[^/]*\.(?:txt|in|pip)|requirements/[^/]*\.(?:txt|in))")
# What npm, yarn and pnpm run by themselves: at an install, before a publication (npm Docs: "Life Cycle Scripts").
_LIFECYCLE = re.compile(
    r"(?:pre|post)?(?:install|uninstall|prepare|publish|pack|dependencies|version)|prepublishOnly|pnpm:devPreinstall"
)
# In npm's files packages are named below these; addresses elsewhere (funding, homepages) are nobody's source.
_SPECS = frozenset(
    [
        "dependencies",
        "devDependencies",
        "optionalDependencies",
        "peerDependencies",
        "overrides",
        "resolutions",
        "requires",
        "pnpm",
        "packageManager",
        "version",
        "resolved",
        "from",
    ]
)
# Everybody has a place of their own there, so that one's address says nothing of another's.
_FORGES = ("github.com", "codeload.github.com", "raw.githubusercontent.com", "gitlab.com", "bitbucket.org")
# `https:/x` and `https:\\x` are addresses to a browser's parser, which npm uses.
_ADDRESS = re.compile(
    r"(?:https?:[/\\]*|:[/\\]{2,})([^\s/\\?#\"'<>|,;(){}\[\]]*)([^\s\"'<>|,;(){}\[\]]*)",
    re.IGNORECASE,
)
_HOST = re.compile(r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?(?::[0-9]{1,5})?")
# `x@user/repository` and `git@host:path`; a version has no path, a protocol no dot.
_SHORT = re.compile(r"(?<=\w)@([\w.-]+)(/|:(?=[\w~/]))([\w.~/-]+)")
_LOCAL = re.compile(r"(?<![\w.+-])(?:file|link|portal|exec|github|gitlab|bitbucket|gist):[^\s\"',)}\]]+", re.IGNORECASE)
_ESCAPED = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(/)|\r?\n[ \t]*)")
# A registry's words about a package, each a scalar that fills its line: text for people.
_WORDS = re.compile(
    r"^(?: +deprecated: |description = )(?:'(?:[^'\n]|'')*'|\"(?:[^\"\\\n]|\\.)*\"|(?![&*!|>%@`])(?:[^\s'\"{}\[\]:]|:(?! )|[ ](?!#))+)$",
    re.MULTILINE,
)


def reads(path: str) -> bool:
    """Whether a file of this name says where packages come from."""
    lowered = path.lower()
    return lowered.rpartition("/")[2] in (*_NPM, *_TEXT) or _REQUIREMENTS.fullmatch(lowered) is not None


def refusal_in(path: str, old: bytes | None, new: bytes, hosts: Collection[str]) -> Refusal | None:
    """Why the new content of such a file isn't pushed; None when it may be.

    Packages come from `hosts` (with their ports) or from where the old content had some.
    """
    npm = path.lower().rpartition("/")[2] in _NPM
    try:
        before, after = (_loaded(one) if npm else _text(one) for one in (old, new))
    except (ValueError, RecursionError):
        return Refusal(Reason.CHANGE_UNREADABLE, f"{path} can't be read")
    if npm:
        known = _scripts(before)
        for name, script in _scripts(after).items():
            if _LIFECYCLE.fullmatch(name) and known.get(name) != script:
                return Refusal(Reason.CHANGE_INSTALL_SCRIPT, one_line(f"{path}: {name}", 200))
    sources = _of_npm if npm else _of_requirements if _REQUIREMENTS.fullmatch(path.lower()) else _of_text
    foreign = set(sources(after)) - set(sources(before)) - set(hosts)
    return Refusal(Reason.CHANGE_FOREIGN_SOURCE, one_line(f"{path}: {min(foreign)}", 200)) if foreign else None


def _loaded(content: bytes | None) -> Any:
    return json.loads(content) if content is not None else {}


def _text(content: bytes | None) -> str:
    return (content or b"").decode().replace("\t", "")


def _scripts(package: Any) -> dict[str, Any]:
    found = package.get("scripts") if isinstance(package, dict) else None
    return found if isinstance(found, dict) else {}


def _of_npm(document: Any) -> Iterator[str]:
    pending = [(document, False)]
    while pending:
        node, names = pending.pop()
        if isinstance(node, dict):
            pending += [(value, names or key in _SPECS) for key, value in node.items() if key != "integrity"]
        elif isinstance(node, list):
            pending += [(value, names) for value in node]
        elif isinstance(node, str) and names:
            yield from _of_spec(re.sub(r"[\x00-\x1f]", "", node))


def _of_spec(spec: str) -> Iterator[str]:
    """A version of the registry's, or the address, path or repository that it is instead."""
    if "://" in spec or "%" in spec:
        yield from _of_text(spec)
    elif re.search(r"[/\\:]|\.t(?:gz|ar)", spec, re.IGNORECASE) and not re.match(r"(?:npm|workspace|catalog):", spec):
        yield spec


def _of_requirements(text: str) -> Iterator[str]:
    yield from _of_text(text)
    for line in _unescaped(text).splitlines():
        kept = re.sub(r"--hash[= ]\S+", "", re.sub(r"(?:^|\s)#.*", "", line)).strip()
        # An option, another file, or a path in place of a name.
        if re.search(r"(?:^|\s)-", kept) or re.match(r"[^\s;]*(?:[/\\]|\.(?:whl|zip|tar|tgz)\b)", kept):
            yield kept


def _of_text(text: str) -> Iterator[str]:
    kept = _WORDS.sub("", text)
    plain = _unescaped(kept)
    # As it stands, too: what is decoded once too often looks like another address.
    for told in {kept, plain, unquote(plain), unquote(unquote(plain))}:
        for match in _ADDRESS.finditer(told):
            if match[1] or match[2]:
                yield _source(match[1], match[2])
        for match in _SHORT.finditer(told):
            if match[2] == "/":
                yield _source("github.com", f"/{match[1]}/{match[3]}")
            elif "." in match[1]:
                yield _source(match[1], f"/{match[3]}")
        yield from (match[0] for match in _LOCAL.finditer(told))


def _unescaped(text: str) -> str:
    def plain(match: re.Match[str]) -> str:
        digits = match[1] or match[2] or match[3]
        return match[4] or (chr(int(digits, 16)) if digits and int(digits, 16) < 0x110000 else "")

    return _ESCAPED.sub(plain, text)


def _source(authority: str, path: str) -> str:
    """The host, of a forge with the repository; an authority that two parsers may read differently is a source of its own."""
    host = authority.lower().removeprefix("git@")
    if not _HOST.fullmatch(host) or path.startswith("\\"):
        return authority + path
    if host in _FORGES:
        place = re.split(r"[?#@]", path.lower())[0].strip("/").split("/")[:2]
        return "/".join((host, *place)).removesuffix(".git")
    return host
