"""The twin's storefront from alert to fix: lock file, registry, pushed branch, pull request, merge, scan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from kilo_pipelines.core.effects import EffectIntent, EffectKind
from kilo_pipelines.providers.github import GitHubInstallation, ProviderError
from kilo_pipelines.providers.github_alerts import READ_ALERTS, fetch_alerts
from kilo_pipelines.providers.github_effects import apply
from tests.support.http import HTTP
from tests.support.twin import Twin

REMEDIATION = {"metadata": "read", "contents": "write", "pull_requests": "write"}


@pytest.fixture
def twin(tmp_path: Path) -> Iterator[Twin]:
    running = Twin(tmp_path / "twin")
    yield running
    running.stop()


class Storefront:
    """The seeded shop, and a clone of it."""

    full_name = "acme/storefront"

    def __init__(self, twin: Twin, clone: Path) -> None:
        made = twin.control("seed-alerts", count=3)["repositories"]
        self.twin, self.clone = twin, clone
        self.id = next(one["repository_id"] for one in made if one["repository"] == self.full_name)
        self._run("git", "clone", "-q", str(twin.home / "git" / f"{self.full_name}.git"), str(clone), cwd=twin.home)

    def client(self, permissions: dict[str, str]) -> GitHubInstallation:
        return self.twin.installation(permissions, self.id)

    def states(self) -> dict[str, str]:
        """Package and state of every alert, read over REST."""
        page = fetch_alerts(self.client(READ_ALERTS), self.full_name, etag=None, after_page=None)
        return {one["dependency"]["package"]["name"]: one["state"] for one in page.alerts if isinstance(one, dict)}

    def npm(self, *arguments: str) -> None:
        env = {"npm_config_registry": f"http://localhost:{self.twin.port}/npm/", "npm_config_cache": str(self.twin.home / "npm")}
        quiet = ("--no-audit", "--no-fund", "--ignore-scripts", "--silent")
        self._run(sys.executable, "-m", "kilo_pipelines.cloud_agent.install", "npm", str(self.clone), *arguments, *quiet, env=env)

    def push(self, permissions: dict[str, str], branch: str) -> subprocess.CompletedProcess[bytes]:
        """Commits what is there and pushes it as a new branch, with a token of these permissions."""
        self._run("git", "commit", "-qa", "--allow-empty", "-m", f"Patched version for {branch}", cwd=self.clone)
        token = self.twin.app().token(self.twin.credentials["installation_id"], [self.id], permissions)
        url = f"http://x-access-token:{token}@localhost:{self.twin.port}/git/{self.full_name}.git"
        argv = ["git", "push", "-q", url, f"HEAD:refs/heads/{branch}"]
        return subprocess.run(argv, cwd=self.clone, env=self._env({}), capture_output=True, check=False)

    def _run(self, *argv: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
        done = subprocess.run(argv, cwd=cwd, env=self._env(env or {}), capture_output=True, check=False)
        assert done.returncode == 0, done.stderr

    def _env(self, more: dict[str, str]) -> dict[str, str]:
        author = {f"GIT_{who}_{what}": "kilo@acme.test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        base = {"PATH": os.environ["PATH"], "HOME": str(self.twin.home), "PYTHONPATH": os.getcwd(), "GIT_TERMINAL_PROMPT": "0"}
        return base | author | more


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storefront]:
    """One for the tests that leave the default branch as it is."""
    home = tmp_path_factory.mktemp("shop")
    running = Twin(home / "twin")
    yield Storefront(running, home / "clone")
    running.stop()


@pytest.fixture
def branch() -> str:
    """A new branch's name."""
    return f"kilo/{uuid4().hex[:8]}/1"


def test_an_alert_is_fixed_by_the_merge_of_a_lock_file_that_npm_updated(twin: Twin, tmp_path: Path, branch: str) -> None:
    shop = Storefront(twin, tmp_path / "clone")
    assert shop.states() == {"twin-unpack": "open", "twin-tables": "open"}
    shop.npm("update", "twin-unpack", "--package-lock-only")
    locked = json.loads((shop.clone / "package-lock.json").read_text())["packages"]
    assert {name: one["version"] for name, one in locked.items() if name} == {
        "node_modules/twin-tables": "0.9.0",
        "node_modules/twin-unpack": "1.4.3",
    }
    assert shop.push(REMEDIATION, branch).returncode == 0
    client = shop.client(REMEDIATION)
    assert client.find_open_pull(shop.full_name, branch) is None
    opened = client.create_pull(shop.full_name, title="Patch twin-unpack", body="b", head=branch, base="main", draft=True)
    assert client.find_open_pull(shop.full_name, branch) == opened
    assert (opened.head_ref, opened.base_ref, opened.draft, opened.author) == (branch, "main", True, client.bot_login)
    assert shop.twin.control("scan", repository=shop.full_name) == {"changes": []}
    shop.twin.control("merge", repository=shop.full_name, number=opened.number)
    assert client.pull(shop.full_name, opened.number).merged and client.find_open_pull(shop.full_name, branch) is None
    assert shop.states()["twin-unpack"] == "open"  # GitHub tells at its next scan
    assert shop.twin.control("scan", repository=shop.full_name)["changes"] == [{"action": "fixed", "number": 1}]
    assert shop.states() == {"twin-unpack": "fixed", "twin-tables": "open"}
    _reverted(shop)
    assert shop.twin.control("scan", repository=shop.full_name)["changes"] == [{"action": "reintroduced", "number": 1}]


def _reverted(shop: Storefront) -> None:
    """The old lock file on the default branch again."""
    git = ["git", "-C", str(shop.twin.home / "git" / f"{shop.full_name}.git")]
    first = subprocess.run([*git, "rev-parse", "main^1"], capture_output=True, check=True).stdout.decode().strip()
    subprocess.run([*git, "update-ref", "refs/heads/main", first], check=True)


def test_what_the_registry_serves_is_what_the_lock_file_names(shop: Storefront) -> None:
    """npm checks the hash of each tarball against the lock file."""
    shop.npm("ci")
    unpack = json.loads((shop.clone / "node_modules/twin-unpack/package.json").read_text())
    assert (unpack["name"], unpack["version"]) == ("twin-unpack", "1.4.2")
    registry = f"http://localhost:{shop.twin.port}/npm"
    assert HTTP.get(f"{registry}/left-pad").status_code == 404
    assert HTTP.get(f"{registry}/twin-unpack/-/twin-unpack-9.9.9.tgz").status_code == 404
    assert HTTP.put(f"{registry}/twin-unpack", json={}).status_code == 405


def test_a_branch_is_pushed_only_with_contents_write(shop: Storefront, branch: str) -> None:
    (shop.clone / "README.md").write_text(f"for {branch}\n")
    refused = shop.push({"metadata": "read", "contents": "read"}, branch)
    assert refused.returncode != 0 and b"403" in refused.stderr
    listed = subprocess.run(
        ["git", "ls-remote", str(shop.twin.home / "git" / f"{shop.full_name}.git")], capture_output=True, check=True
    )
    assert branch.encode() not in listed.stdout


def test_pull_requests_that_cannot_be_are_refused_and_a_lost_answer_is_found(shop: Storefront, branch: str) -> None:
    client = shop.client(REMEDIATION)

    def create(**changes: Any) -> Any:
        values = {"title": "t", "body": "b", "head": branch, "base": "main", "draft": False} | changes
        return client.create_pull(shop.full_name, **values)

    (shop.clone / "README.md").write_text(f"for {branch}\n")
    assert shop.push(REMEDIATION, branch).returncode == 0
    for changes in ({"head": "nowhere"}, {"base": "nowhere"}, {"title": " "}, {"head": "main"}):
        with pytest.raises(ProviderError) as refused:
            create(**changes)
        assert (refused.value.reason, refused.value.retryable) == ("provider_invalid", False)
    shop.twin.fault("POST", f"{shop.full_name}/pulls", "lost")
    with pytest.raises(ProviderError) as lost:
        create()
    assert lost.value.retryable
    found = client.find_open_pull(shop.full_name, branch)
    assert found is not None and found.title == "t"
    with pytest.raises(ProviderError) as twice:
        create()
    assert twice.value.reason == "provider_invalid"
    shown = HTTP.get(
        found.url.replace("/acme/", "/api/v3/repos/acme/").replace("/pull/", "/pulls/"), headers=_bearer(shop)
    ).json()
    shop.twin.fault("GET", f"{shop.full_name}/pulls", "raw", text=json.dumps([shown]))
    assert client.find_open_pull(shop.full_name, "kilo/another") is None  # GitHub answers everything to a filter it can't read
    shop.twin.control("act", full_name=shop.full_name, number=found.number, action="close")
    assert client.find_open_pull(shop.full_name, branch) is None


def test_a_repository_without_drafts_gets_an_ordinary_pull_request(shop: Storefront, branch: str) -> None:
    (shop.clone / "README.md").write_text(f"for {branch}\n")
    assert shop.push(REMEDIATION, branch).returncode == 0
    shop.twin.control("set-repository", repository=shop.full_name, drafts=False)
    made = shop.client(REMEDIATION).create_pull(shop.full_name, title="t", body="b", head=branch, base="main", draft=True)
    shop.twin.control("set-repository", repository=shop.full_name)
    assert (made.state, made.draft, made.head_ref) == ("open", False, branch)


def _pull_request(shop: Storefront, branch: str, commit: str) -> EffectIntent:
    payload = {"full_name": shop.full_name, "head_ref": branch, "head_sha": commit, "base_ref": "main"}
    text = {"title": "t", "body": "b", "draft": False}
    return EffectIntent(kind=EffectKind.GITHUB_PULL_REQUEST, intent_key="k", subject_key="s", payload=payload | text)


def test_a_branch_that_moves_while_its_pull_request_is_opened_leaves_none_open(shop: Storefront, branch: str) -> None:
    (shop.clone / "README.md").write_text(f"for {branch}\n")
    assert shop.push(REMEDIATION, branch).returncode == 0
    bare = ["git", "-C", str(shop.twin.home / "git" / f"{shop.full_name}.git")]
    ref = f"refs/heads/{branch}"
    checked = subprocess.run([*bare, "rev-parse", ref], capture_output=True, check=True).stdout.decode().strip()

    def moves() -> bool:
        author = ["-c", "user.name=a", "-c", "user.email=a@acme.test"]
        made = subprocess.run([*bare, *author, "commit-tree", f"{ref}^{{tree}}", "-p", ref, "-m", "later"], capture_output=True)
        subprocess.run([*bare, "update-ref", ref, made.stdout.decode().strip()], check=True)
        return True

    client = shop.client(REMEDIATION)
    with pytest.raises(ProviderError) as refused:
        apply(client, _pull_request(shop, branch, checked), moves)
    assert (refused.value.reason, refused.value.retryable) == ("head_moved", False)
    found = client.find_pull(shop.full_name, branch)
    assert found is not None and found.state == "closed"


def test_a_pull_request_that_leads_to_another_branch_is_not_taken_for_ours(shop: Storefront, branch: str) -> None:
    (shop.clone / "README.md").write_text(f"for {branch}\n")
    assert shop.push(REMEDIATION, branch).returncode == 0
    client = shop.client(REMEDIATION)
    made = client.create_pull(shop.full_name, title="t", body="b", head=branch, base="main", draft=False)
    assert apply(client, _pull_request(shop, branch, made.head_sha), lambda: True).external_id == str(made.number)
    shop.twin.control("act", full_name=shop.full_name, number=made.number, action="edit-base", base=f"{branch}-base")
    with pytest.raises(ProviderError) as refused:
        apply(client, _pull_request(shop, branch, made.head_sha), lambda: True)
    assert refused.value.reason == "head_moved"


def _bearer(shop: Storefront) -> dict[str, str]:
    token = shop.twin.app().token(shop.twin.credentials["installation_id"], [shop.id], REMEDIATION)
    return {"authorization": f"Bearer {token}"}


def test_a_push_to_a_pull_requests_branch_moves_its_head(shop: Storefront, branch: str) -> None:
    client = shop.client(REMEDIATION)
    (shop.clone / "README.md").write_text("one\n")
    shop.push(REMEDIATION, branch)
    opened = client.create_pull(shop.full_name, title="t", body="", head=branch, base="main", draft=False)
    (shop.clone / "README.md").write_text("two\n")
    assert shop.push(REMEDIATION, branch).returncode == 0
    assert client.pull(shop.full_name, opened.number).head_sha != opened.head_sha


def test_the_world_survives_a_restart_and_the_review_world_knows_nothing_of_it(twin: Twin, tmp_path: Path) -> None:
    assert not (twin.home / "alerts.json").exists()
    assert twin.pull["repository"] == "acme/orders"
    shop = Storefront(twin, tmp_path / "again")
    twin.control("move-alert", repository=shop.full_name, number=2, action="dismissed", by="grace", reason="not_used")
    twin.stop()
    twin.start()
    assert shop.states() == {"twin-unpack": "open", "twin-tables": "dismissed"}
    with pytest.raises(AssertionError, match="has alerts already"):
        twin.control("seed-alerts", count=3)
