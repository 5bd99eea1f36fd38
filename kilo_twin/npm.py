"""A tiny npm registry: two packages of our own, each in a vulnerable and in a patched version, read only.

Tarballs are made in memory and are the same bytes at every start, so that lock files in git keep their integrity.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import struct
import tarfile
import zlib
from collections.abc import Mapping
from functools import cache
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

_UNPACK = """'use strict';

/** An object of a query string: `a.b=1` becomes `{a: {b: '1'}}`. */
exports.unpack = function unpack(query) {
  const found = %s;
  for (const pair of query.split('&')) {
    const [path, value = ''] = pair.split('=').map(decodeURIComponent);
    const names = path.split('.');
    let place = found;
%s    for (const name of names.slice(0, -1)) place = place[name] = place[name] || {};
    place[names[names.length - 1]] = value;
  }
  return found;
};
"""
_GUARD = "    if (names.some((name) => name === '__proto__' || name === 'constructor')) continue;\n"

_TABLES = """'use strict';

/** Rows of a text table; cells are separated by bars. */
exports.rows = function rows(text) {
  return text.split('\\n').map((line) => line.split(%s));
};
"""

# Names that nobody publishes to the real registry, so that a wrong registry setting is an error and not somebody's code.
PACKAGES: dict[str, dict[str, str]] = {
    "twin-unpack": {"1.4.2": _UNPACK % ("{}", ""), "1.4.3": _UNPACK % ("Object.create(null)", _GUARD)},
    "twin-tables": {"0.9.0": _TABLES % r"/(?:\s*\|\s*)+/", "0.9.1": _TABLES % "'|'"},
}


def manifest(name: str, version: str) -> dict[str, Any]:
    """The package.json of a version."""
    return {"name": name, "version": version, "description": f"{name}, made for the twin", "main": "index.js", "license": "MIT"}


@cache
def tarball(name: str, version: str) -> bytes:
    """A version as npm packs it; KeyError when there is none."""
    files = {"package.json": json.dumps(manifest(name, version), indent=2) + "\n", "index.js": PACKAGES[name][version]}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path, text in files.items():
            entry = tarfile.TarInfo(f"package/{path}")
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return _gzipped(packed.getvalue())


def _gzipped(data: bytes) -> bytes:
    """A gzip file of one stored block (RFC 1951, 1952): a compressor's bytes differ from release to release."""
    size = len(data)
    block = struct.pack("<BHH", 1, size, size ^ 0xFFFF) + data
    return b"\x1f\x8b\x08" + bytes(6) + b"\xff" + block + struct.pack("<LL", zlib.crc32(data), size)


def integrity(name: str, version: str) -> str:
    """The hash that a lock file holds (Subresource Integrity)."""
    return "sha512-" + base64.b64encode(hashlib.sha512(tarball(name, version)).digest()).decode()


def lock_file(name: str, version: str, dependencies: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """A package-lock.json (version 3) without addresses: `dependencies` is the range and the locked version by name."""
    packages: dict[str, Any] = {
        "": {"name": name, "version": version, "dependencies": {one: wanted for one, (wanted, _) in dependencies.items()}}
    }
    for one, (_, locked) in sorted(dependencies.items()):
        packages[f"node_modules/{one}"] = {"version": locked, "integrity": integrity(one, locked), "license": "MIT"}
    return {"name": name, "version": version, "lockfileVersion": 3, "requires": True, "packages": packages}


def locked_versions(lock: object) -> dict[str, list[str]]:
    """Versions of every package of a package-lock.json (version 2 or 3); what isn't an entry is passed over."""
    packages = lock.get("packages") if isinstance(lock, dict) else None
    found: dict[str, list[str]] = {}
    for path, entry in packages.items() if isinstance(packages, dict) else ():
        _, inside, name = path.rpartition("node_modules/")
        if inside and isinstance(entry, dict) and isinstance(entry.get("version"), str):
            found.setdefault(name, []).append(entry["version"])
    return found


def in_range(version: str, conditions: str) -> bool:
    """Whether a version meets an advisory's range, like `>= 1.0.0, < 1.4.3`; ValueError for what isn't one."""
    number = _number(version)
    for condition in conditions.split(","):
        match = re.fullmatch(r"\s*(<=|>=|<|>|=)\s*(\S+)\s*", condition)
        if match is None:
            raise ValueError(f"not a version range: {conditions}")
        bound = _number(match[2])
        holds = {"<": number < bound, "<=": number <= bound, ">": number > bound, ">=": number >= bound, "=": number == bound}
        if not holds[match[1]]:
            return False
    return True


def _number(version: str) -> tuple[int, ...]:
    """Three numbers; what follows a dash (pre-releases) is left out, our packages have none."""
    parts = version.partition("-")[0].split(".")
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"not a version: {version}")
    return tuple(int(part) for part in [*parts, "0", "0"][:3])


def routes(base_url: str) -> list[Route]:
    """`/npm/{name}` and its tarballs; everybody may read, nobody may publish."""

    def document(name: str) -> dict[str, Any]:
        versions = {}
        for version in PACKAGES[name]:
            dist = {
                "tarball": f"{base_url}/npm/{name}/-/{name}-{version}.tgz",
                "integrity": integrity(name, version),
                "shasum": hashlib.sha1(tarball(name, version), usedforsecurity=False).hexdigest(),
            }
            versions[version] = manifest(name, version) | {"_id": f"{name}@{version}", "dist": dist}
        return {"_id": name, "name": name, "dist-tags": {"latest": list(versions)[-1]}, "versions": versions}

    async def package(request: Request) -> Response:
        name = request.path_params["name"]
        return JSONResponse(document(name)) if name in PACKAGES else JSONResponse({"error": "Not found"}, 404)

    async def file(request: Request) -> Response:
        name, wanted = request.path_params["name"], request.path_params["file"]
        for version in PACKAGES.get(name, {}):
            if wanted == f"{name}-{version}.tgz":
                return Response(tarball(name, version), media_type="application/octet-stream")
        return JSONResponse({"error": "Not found"}, 404)

    return [Route("/npm/{name}", package, methods=["GET"]), Route("/npm/{name}/-/{file}", file, methods=["GET"])]
