"""Runs inside a sandbox of its own once the agent is dead: the work tree as one tree object, and a pack of what is new in it.

Usage: finalise.py REQUEST, a JSON object {tree, pack, git, target, head, addresses, files, bytes}; it prints one JSON object,
{"tree": id} or {"refused": what, "detail": where}. Standard library only; it shares nothing with the platform, which believes
none of its answers. The agent's own `.git` is never read: the repository is a fresh one, so that neither its configuration,
hooks, refs, history, replacements nor alternates have a say.
"""

import json
import os
import subprocess
import sys

CONFIG = {
    "advice.addEmbeddedRepo": "false",
    "core.attributesFile": os.devnull,
    "core.excludesFile": os.devnull,
    "core.fsmonitor": "false",
    "core.hooksPath": os.devnull,
    "core.protectHFS": "true",
    "core.protectNTFS": "true",
    "core.safecrlf": "false",
    "core.untrackedCache": "false",
    # A status within a submodule would run git with that directory's own configuration.
    "diff.ignoreSubmodules": "all",
    "gc.auto": "0",
    "protocol.allow": "never",
    "safe.directory": "*",
}


class Refused(Exception):
    """The tree is no change that could be pushed."""


def environment(request):
    pairs = {}
    for index, (name, value) in enumerate(CONFIG.items()):
        pairs |= {f"GIT_CONFIG_KEY_{index}": name, f"GIT_CONFIG_VALUE_{index}": value}
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": "/nonexistent",
        "LC_ALL": "C.UTF-8",
        "GIT_DIR": request["git"],
        "GIT_WORK_TREE": request["tree"],
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_NO_REPLACE_OBJECTS": "1",
        "GIT_CONFIG_COUNT": str(len(CONFIG)),
        **pairs,
    }


class Git:
    def __init__(self, request):
        self.tree, self.env = request["tree"], environment(request)

    def run(self, *args, text=b"", source=None, target=subprocess.PIPE, accepted=(0,)):
        given = {"input": text} if source is None else {"stdin": source}
        done = subprocess.run(["git", *args], cwd=self.tree, env=self.env, stdout=target, stderr=subprocess.PIPE, **given)
        if done.returncode not in accepted:
            raise Refused("unreadable", f"git {args[0]}: {done.stderr.decode(errors='replace').strip()[-300:]}")
        return done.stdout

    def lines(self, *args):
        return [line for line in self.run(*args).split(b"\0") if line]


def look_for_repositories(git):
    """Nested repositories outside ignored directories; git itself would leave them out, or make submodules of them."""
    # find goes any depth, and its failure says that something can't be read.
    command = ["find", ".", "-path", "./.git", "-prune", "-o", "-iname", ".git", "-print0"]
    found = subprocess.run(command, cwd=git.tree, env=git.env, capture_output=True)
    if found.returncode:
        raise Refused("unreadable", found.stderr.decode(errors="replace").strip()[-300:])
    nested = {one.removeprefix(b"./") for one in found.stdout.split(b"\0") if one}
    if nested:
        ignored = git.run("check-ignore", "-z", "--stdin", text=b"\0".join(nested), accepted=(0, 1)).split(b"\0")
        visible = nested - set(ignored)
        if visible:
            raise Refused("nested", min(visible).decode(errors="backslashreplace")[:200])


def look_at_size(git, files, size):
    """Before anything is hashed and stored: a bomb of files costs its maker time, not us."""
    changed = [*git.lines("diff-files", "--name-only", "-z"), *git.lines("ls-files", "-z", "--others", "--exclude-standard")]
    total = 0
    for name in changed:
        try:
            total += os.lstat(os.path.join(os.fsencode(git.tree), name)).st_size
        except (FileNotFoundError, NotADirectoryError):
            continue
    if len(changed) > files or total > size:
        raise Refused("too_large", f"{len(changed)} files, {total} bytes")


def restore_addresses(git, head, addresses):
    """The mirror's addresses, as package managers keep them in lock files, become those of the registries behind it."""
    fields = git.lines("diff-index", "--cached", "--raw", "--no-renames", "--no-abbrev", "-z", head)
    for meta, name in zip(fields[::2], fields[1::2], strict=True):
        _, mode, _, blob, _ = meta.split()
        if not mode.startswith(b"100"):
            continue
        content = restored = git.run("cat-file", "blob", blob.decode())
        for ours, theirs in addresses.items():
            restored = restored.replace(ours.encode(), theirs.encode())
        if restored != content:
            made = git.run("hash-object", "-w", "--stdin", text=restored).strip()
            git.run("update-index", "-z", "--index-info", text=mode + b" " + made + b"\t" + name + b"\0")


def finalise(request):
    git, head = Git(request), request["head"]
    git.run("init", "-q", "--template=")
    with open(request["pack"], "rb") as pack:
        git.run("index-pack", "--stdin", source=pack)
    git.run("read-tree", head)
    look_for_repositories(git)
    git.run("update-index", "-q", "--refresh", accepted=(0, 1))
    look_at_size(git, request["files"], request["bytes"])
    git.run("add", "--all", "--", ".")
    if request["addresses"]:
        restore_addresses(git, head, request["addresses"])
    tree = git.run("write-tree").decode().strip()
    new = git.run("rev-list", "--objects", tree, "--not", f"{head}^{{tree}}")
    ids = b"".join(line.split(b" ", 1)[0] + b"\n" for line in new.splitlines())
    with open(request["target"], "wb") as target:
        git.run("pack-objects", "-q", "--stdout", text=ids, target=target)
    return {"tree": tree}


if __name__ == "__main__":
    try:
        answer = finalise(json.loads(sys.argv[1]))
    except Refused as refusal:
        answer = dict(zip(("refused", "detail"), refusal.args, strict=True))
    print(json.dumps(answer))
