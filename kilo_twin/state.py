"""The twin's state: one JSON file and bare git repositories in its home. One process, one writer."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

ACCOUNT = "acme"
APP_SLUG = "kilo-reviewer"

_GIT_ENV = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_AUTHOR_NAME": "Ada",
    "GIT_AUTHOR_EMAIL": "ada@acme.test",
    "GIT_COMMITTER_NAME": "Ada",
    "GIT_COMMITTER_EMAIL": "ada@acme.test",
    "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
}


def now() -> str:
    """GitHub's way to write a time."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def git(repository: Path, *args: str, stdin: bytes | None = None, env: dict[str, str] | None = None) -> bytes:
    """Output of one git command in a bare repository; RuntimeError with git's words when it fails."""
    done = subprocess.run(
        ["git", "-C", str(repository), *args], input=stdin, capture_output=True, env=_GIT_ENV | (env or {}), check=False
    )
    if done.returncode:
        raise RuntimeError(f"git {args[0]}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def new_private_key() -> str:
    """An App's key as GitHub hands it over."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    ).decode()


class Twin:
    """Everything that is known; `save` after each change."""

    def __init__(self, home: Path, base_url: str) -> None:
        self.home = home
        self.base_url = base_url
        self.lock = threading.RLock()
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.credentials = self._credentials()
        self.data: dict[str, Any] = self.read("state.json") or self._empty()
        self.tokens: dict[str, dict[str, Any]] = {}
        self.faults: list[dict[str, Any]] = []

    def fault_of(self, method: str, path: str) -> dict[str, Any] | None:
        """The fault that this call meets, used up by it; None when it goes well."""
        for fault in self.faults:
            if fault["left"] > 0 and fault["method"] == method and fault["path"] in path:
                fault["left"] -= 1
                return fault
        return None

    @staticmethod
    def _empty() -> dict[str, Any]:
        return {"next_id": 1000, "repositories": {}, "deliveries": [], "seeded": {}}

    def _credentials(self) -> dict[str, Any]:
        path = self.home / "credentials.json"
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            later = self._later()
            if later.keys() <= found.keys():
                return found
            # A home from before there was a hosted agent or an issuer, or people could authorize.
            return self._keep_credentials(path, later | found)
        made = {
            "app_id": 4242,
            "app_slug": APP_SLUG,
            "private_key_pem": new_private_key(),
            "webhook_secret": secrets.token_hex(24),
            "model_api_key": f"twin-model-{secrets.token_hex(16)}",
            "installation_id": 77001,
            "account": ACCOUNT,
            "control_token": secrets.token_hex(24),
            **self._later(),
        }
        return self._keep_credentials(path, made)

    @staticmethod
    def _later() -> dict[str, str]:
        """Credentials that the first homes didn't have."""
        return {
            "client_id": "Iv1.twin",
            "client_secret": secrets.token_hex(20),
            "oidc_client_secret": secrets.token_hex(24),
            "cloud_agent_token": f"twin-cloud-{secrets.token_hex(24)}",
            "cloud_agent_internal_key": f"twin-internal-{secrets.token_hex(24)}",
        }

    @staticmethod
    def _keep_credentials(path: Path, made: dict[str, Any]) -> dict[str, Any]:
        partial = path.with_suffix(".partial")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(made, file)
        partial.replace(path)
        return made

    def save_credentials(self) -> None:
        """Writes what the twin's operator is shown."""
        self._keep_credentials(self.home / "credentials.json", self.credentials)

    def installations(self) -> dict[int, dict[str, Any]]:
        """The App's installations by number; the seeded world has one."""
        seeded = {str(self.credentials["installation_id"]): {"account": ACCOUNT, "suspended_at": None}}
        return {int(number): held for number, held in self.data.get("installations", seeded).items()}

    def keep_installations(self, known: dict[int, dict[str, Any]]) -> None:
        """Writes the App's installations."""
        self.data["installations"] = {str(number): held for number, held in known.items()}
        self.save()

    def save(self) -> None:
        """Writes the state."""
        self.write("state.json", self.data)

    def read(self, name: str) -> Any:
        """A file of the home; None when there is none."""
        file = self.home / name
        return json.loads(file.read_text()) if file.exists() else None

    def write(self, name: str, value: Any) -> None:
        """Writes a file in one step; one writer at a time, or a second one replaces the first one's file under its hands."""
        with self.lock:
            partial = (self.home / name).with_suffix(".partial")
            partial.write_text(json.dumps(value))
            partial.replace(self.home / name)

    def new_id(self) -> int:
        """A fresh numeric id."""
        with self.lock:
            self.data["next_id"] += 1
            return int(self.data["next_id"])

    # -- repositories ---------------------------------------------------------------------------------------------

    def path(self, full_name: str) -> Path:
        """The bare repository of a known name."""
        return self.home / "git" / f"{full_name}.git"

    def repository(self, full_name: str) -> dict[str, Any] | None:
        """A repository's state by name."""
        found: dict[str, Any] | None = self.data["repositories"].get(full_name)
        return found

    def by_id(self, repository_id: int) -> dict[str, Any] | None:
        """A repository's state by id."""
        return next((one for one in self.data["repositories"].values() if one["id"] == repository_id), None)

    def create_repository(self, name: str, default_branch: str = "main") -> dict[str, Any]:
        """An empty repository of the account."""
        full_name = f"{ACCOUNT}/{name}"
        path = self.path(full_name)
        path.mkdir(parents=True)
        git(path, "init", "-q", "--bare", f"--initial-branch={default_branch}")
        git(path, "config", "http.receivepack", "true")
        git(path, "config", "uploadpack.allowReachableSHA1InWant", "true")
        repository = {
            "id": self.new_id(),
            "name": name,
            "full_name": full_name,
            "default_branch": default_branch,
            "installed": True,
            "created_at": now(),
            "next_number": 1,
            "pulls": {},
            "check_runs": [],
            "statuses": [],
        }
        self.data["repositories"][full_name] = repository
        self.save()
        return repository

    def commit(self, full_name: str, parent: str | None, files: dict[str, str | None], message: str) -> str:
        """A commit over `parent` with these files changed (None deletes); returns its id, moves no ref."""
        path = self.path(full_name)
        index = {"GIT_INDEX_FILE": str(path / f"index.{secrets.token_hex(4)}")}
        if parent:
            git(path, "read-tree", parent, env=index)
        for name, content in files.items():
            if content is None:
                git(path, "update-index", "--index-info", stdin=f"0 {'0' * 40}\t{name}\n".encode(), env=index)
            else:
                blob = git(path, "hash-object", "-w", "--stdin", stdin=content.encode()).decode().strip()
                git(path, "update-index", "--add", "--cacheinfo", f"100644,{blob},{name}", env=index)
        tree = git(path, "write-tree", env=index).decode().strip()
        Path(index["GIT_INDEX_FILE"]).unlink(missing_ok=True)
        parents = ["-p", parent] if parent else []
        return git(path, "commit-tree", tree, *parents, "-m", message).decode().strip()

    def merge(self, full_name: str, pull: dict[str, Any]) -> str:
        """Merges an open pull request into its base branch; the merge commit. RuntimeError when it doesn't merge cleanly."""
        path = self.path(full_name)
        head, base = self.head_sha(full_name, pull), self.base_sha(full_name, pull)
        tree = git(path, "merge-tree", "--write-tree", base, head).decode().split()[0]
        message = f"Merge pull request #{pull['number']} from {pull['head_ref']}"
        merged = git(path, "commit-tree", tree, "-p", base, "-p", head, "-m", message).decode().strip()
        self.set_ref(full_name, f"refs/heads/{pull['base_ref']}", merged)
        pull.update(state="closed", merged_at=now(), updated_at=now(), merge_commit_sha=merged)
        self.save()
        return merged

    def rename(self, full_name: str, to: str) -> dict[str, Any]:
        """Gives a repository another name; the old one leads to it until somebody else takes it. KeyError for an unknown one."""
        with self.lock:
            repository: dict[str, Any] = self.data["repositories"].pop(full_name)
            repository.update(full_name=to, name=to.partition("/")[2])
            self.data["repositories"][to] = repository
            self.path(to).parent.mkdir(exist_ok=True)
            self.path(full_name).rename(self.path(to))
            self.data.setdefault("moved", {})[full_name] = repository["id"]
            self.save()
        return repository

    def set_ref(self, full_name: str, ref: str, sha: str) -> None:
        """Points a ref at a commit."""
        git(self.path(full_name), "update-ref", ref, sha)

    def resolve(self, full_name: str, name: str) -> str | None:
        """A commit's id by branch name, ref or id; None when there is none."""
        for ref in (f"refs/heads/{name}", name):
            if ref.startswith("-"):
                continue
            try:
                return (
                    git(self.path(full_name), "rev-parse", "--verify", "-q", "--end-of-options", f"{ref}^{{commit}}")
                    .decode()
                    .strip()
                )
            except RuntimeError:
                continue
        return None

    def branch(self, full_name: str, name: str) -> str | None:
        """The tip of a branch; None when there is none."""
        try:
            return git(self.path(full_name), "show-ref", "--verify", "--hash", f"refs/heads/{name}").decode().strip()
        except RuntimeError:
            return None

    # -- pull requests --------------------------------------------------------------------------------------------

    def open_pull(
        self, full_name: str, *, title: str, body: str, author: str, author_type: str, head_ref: str, base_ref: str
    ) -> dict[str, Any]:
        """A pull request between two existing branches."""
        repository = self.data["repositories"][full_name]
        number = repository["next_number"]
        repository["next_number"] += 1
        pull = {
            "id": self.new_id(),
            "number": number,
            "title": title,
            "body": body,
            "author": author,
            "author_type": author_type,
            "author_id": 9000 + sum(author.encode()),
            "head_ref": head_ref,
            "base_ref": base_ref,
            "state": "open",
            "draft": False,
            "labels": [],
            "created_at": now(),
            "updated_at": now(),
            "reviews": [],
            "review_comments": [],
            "comments": [],
            "reactions": [],
        }
        repository["pulls"][str(number)] = pull
        self.follow_head(full_name, pull)
        self.save()
        return pull

    def follow_head(self, full_name: str, pull: dict[str, Any]) -> None:
        """Keeps refs/pull/N/head at the head branch."""
        head = self.resolve(full_name, pull["head_ref"])
        if head:
            self.set_ref(full_name, f"refs/pull/{pull['number']}/head", head)

    def head_sha(self, full_name: str, pull: dict[str, Any]) -> str:
        """The commit that the pull request proposes now."""
        return git(self.path(full_name), "rev-parse", f"refs/pull/{pull['number']}/head").decode().strip()

    def base_sha(self, full_name: str, pull: dict[str, Any]) -> str:
        """The tip of the base branch."""
        return git(self.path(full_name), "rev-parse", f"refs/heads/{pull['base_ref']}").decode().strip()
