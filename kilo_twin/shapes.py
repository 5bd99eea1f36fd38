"""GitHub's JSON objects, as far as the platform and PyGithub read them."""

from __future__ import annotations

import base64
from typing import Any

from kilo_twin.state import ACCOUNT, APP_SLUG, Twin, git

# When everything that has no history of its own was made.
MADE = "2026-01-01T00:00:00Z"
ORGANIZATIONS = frozenset({ACCOUNT, "umbrella"})
EVENTS = ["pull_request", "issue_comment", "dependabot_alert", "repository"]
PERMISSIONS = {
    "checks": "write",
    "contents": "write",
    "metadata": "read",
    "members": "read",
    "pull_requests": "write",
    "issues": "write",
    "vulnerability_alerts": "write",
}


def account(login: str, kind: str = "User", number: int | None = None) -> dict[str, Any]:
    """A simple user."""
    number = number if number is not None else 9000 + sum(login.encode())
    url = f"https://api.github.com/users/{login}"
    return {
        "login": login,
        "id": number,
        "node_id": base64.b64encode(f"User{number}".encode()).decode(),
        "avatar_url": f"https://avatars.githubusercontent.com/u/{number}",
        "gravatar_id": "",
        "url": url,
        "html_url": f"https://github.com/{login}",
        "followers_url": f"{url}/followers",
        "following_url": f"{url}/following{{/other_user}}",
        "gists_url": f"{url}/gists{{/gist_id}}",
        "starred_url": f"{url}/starred{{/owner}}{{/repo}}",
        "subscriptions_url": f"{url}/subscriptions",
        "organizations_url": f"{url}/orgs",
        "repos_url": f"{url}/repos",
        "events_url": f"{url}/events{{/privacy}}",
        "received_events_url": f"{url}/received_events",
        "type": kind,
        "site_admin": False,
    }


def bot() -> dict[str, Any]:
    """The App's own account."""
    return account(f"{APP_SLUG}[bot]", "Bot", 4242)


def person(login: str) -> dict[str, Any]:
    """Who did something: the App, GitHub itself or a user."""
    if login == bot()["login"]:
        return bot()
    return account(login, "Organization" if login == "github" else "User")


def organization(login: str) -> dict[str, Any]:
    """An organization as webhooks show it."""
    url = f"https://api.github.com/orgs/{login}"
    more = {name: f"{url}/{name.removesuffix('_url')}" for name in ("hooks_url", "issues_url")}
    members = {"members_url": f"{url}/members{{/member}}", "public_members_url": f"{url}/public_members{{/member}}"}
    return account(login, "Organization") | more | members | {"description": None}


_REPOSITORY_URLS = {
    "archive_url": "/{archive_format}{/ref}",
    "assignees_url": "/assignees{/user}",
    "blobs_url": "/git/blobs{/sha}",
    "branches_url": "/branches{/branch}",
    "collaborators_url": "/collaborators{/collaborator}",
    "comments_url": "/comments{/number}",
    "commits_url": "/commits{/sha}",
    "compare_url": "/compare/{base}...{head}",
    "contents_url": "/contents/{+path}",
    "contributors_url": "/contributors",
    "deployments_url": "/deployments",
    "downloads_url": "/downloads",
    "events_url": "/events",
    "forks_url": "/forks",
    "git_commits_url": "/git/commits{/sha}",
    "git_refs_url": "/git/refs{/sha}",
    "git_tags_url": "/git/tags{/sha}",
    "hooks_url": "/hooks",
    "issue_comment_url": "/issues/comments{/number}",
    "issue_events_url": "/issues/events{/number}",
    "issues_url": "/issues{/number}",
    "keys_url": "/keys{/key_id}",
    "labels_url": "/labels{/name}",
    "languages_url": "/languages",
    "merges_url": "/merges",
    "milestones_url": "/milestones{/number}",
    "notifications_url": "/notifications{?since,all,participating}",
    "pulls_url": "/pulls{/number}",
    "releases_url": "/releases{/id}",
    "stargazers_url": "/stargazers",
    "statuses_url": "/statuses/{sha}",
    "subscribers_url": "/subscribers",
    "subscription_url": "/subscription",
    "tags_url": "/tags",
    "teams_url": "/teams",
    "trees_url": "/git/trees{/sha}",
}


class Shapes:
    """Objects of one twin; addresses lead back to it."""

    def __init__(self, twin: Twin) -> None:
        self.twin = twin
        self.api = f"{twin.base_url}/api/v3"

    def repository(self, repository: dict[str, Any]) -> dict[str, Any]:
        """A full repository."""
        full_name = repository["full_name"]
        url = f"{self.api}/repos/{full_name}"
        html = f"{self.twin.base_url}/{full_name}"
        return {
            "id": repository["id"],
            "node_id": base64.b64encode(f"Repository{repository['id']}".encode()).decode(),
            "name": repository["name"],
            "full_name": full_name,
            "private": False,
            "owner": account(full_name.split("/")[0], "Organization"),
            "html_url": html,
            "description": None,
            "fork": False,
            "url": url,
            **{name: url + tail for name, tail in _REPOSITORY_URLS.items()},
            "clone_url": f"{self.twin.base_url}/git/{full_name}.git",
            "git_url": f"git://localhost/{full_name}.git",
            "ssh_url": f"git@localhost:{full_name}.git",
            "svn_url": html,
            "mirror_url": None,
            "homepage": None,
            "language": "Python",
            "forks_count": 0,
            "forks": 0,
            "stargazers_count": 0,
            "watchers_count": 0,
            "watchers": 0,
            "size": 10,
            "default_branch": repository["default_branch"],
            "open_issues_count": 0,
            "open_issues": 0,
            "topics": [],
            "has_issues": True,
            "has_projects": False,
            "has_wiki": False,
            "has_pages": False,
            "has_downloads": False,
            "has_discussions": False,
            "archived": repository.get("archived", False),
            "disabled": False,
            "visibility": "public",
            "pushed_at": repository["created_at"],
            "created_at": repository["created_at"],
            "updated_at": repository["created_at"],
            "license": None,
            "network_count": 0,
            "subscribers_count": 0,
            "allow_forking": True,
            "is_template": False,
            "web_commit_signoff_required": False,
        }

    def pull(self, repository: dict[str, Any], pull: dict[str, Any]) -> dict[str, Any]:
        """A full pull request."""
        full_name, number = repository["full_name"], pull["number"]
        url = f"{self.api}/repos/{full_name}/pulls/{number}"
        issue = f"{self.api}/repos/{full_name}/issues/{number}"
        html = f"{self.twin.base_url}/{full_name}/pull/{number}"
        head, base = self.twin.head_sha(full_name, pull), self.twin.base_sha(full_name, pull)
        owner = full_name.split("/")[0]
        whole = self.repository(repository)
        closed = pull["state"] == "closed"
        return {
            "url": url,
            "id": pull["id"],
            "node_id": base64.b64encode(f"PullRequest{pull['id']}".encode()).decode(),
            "html_url": html,
            "diff_url": f"{html}.diff",
            "patch_url": f"{html}.patch",
            "issue_url": issue,
            "commits_url": f"{url}/commits",
            "review_comments_url": f"{url}/comments",
            "review_comment_url": f"{self.api}/repos/{full_name}/pulls/comments{{/number}}",
            "comments_url": f"{issue}/comments",
            "statuses_url": f"{self.api}/repos/{full_name}/statuses/{head}",
            "number": number,
            "state": pull["state"],
            "locked": False,
            "active_lock_reason": None,
            "title": pull["title"],
            "user": account(pull["author"], pull["author_type"], pull["author_id"]),
            "body": pull["body"],
            "labels": [self.label(repository, name) for name in pull["labels"]],
            "milestone": None,
            "created_at": pull["created_at"],
            "updated_at": pull["updated_at"],
            "closed_at": pull["updated_at"] if closed else None,
            "merged_at": pull.get("merged_at"),
            "merge_commit_sha": pull.get("merge_commit_sha"),
            "assignee": None,
            "assignees": [],
            "requested_reviewers": [],
            "requested_teams": [],
            "head": self._side(owner, pull["head_ref"], head, self.fork(whole, pull) if pull.get("fork") else whole),
            "base": self._side(owner, pull["base_ref"], base, whole),
            "_links": {
                name: {"href": href}
                for name, href in {
                    "self": url,
                    "html": html,
                    "issue": issue,
                    "comments": f"{issue}/comments",
                    "review_comments": f"{url}/comments",
                    "review_comment": f"{self.api}/repos/{full_name}/pulls/comments{{/number}}",
                    "commits": f"{url}/commits",
                    "statuses": f"{self.api}/repos/{full_name}/statuses/{head}",
                }.items()
            },
            "author_association": "MEMBER",
            "auto_merge": None,
            "draft": pull["draft"],
            "merged": pull.get("merged_at") is not None,
            "mergeable": True,
            "rebaseable": True,
            "mergeable_state": "clean",
            "merged_by": None,
            "comments": len(pull["comments"]),
            "review_comments": len(pull["review_comments"]),
            "maintainer_can_modify": False,
            "commits": 1,
            "additions": 1,
            "deletions": 0,
            "changed_files": 1,
        }

    @staticmethod
    def fork(repository: dict[str, Any], pull: dict[str, Any]) -> dict[str, Any]:
        """The author's fork of a repository: another repository by its id."""
        full_name = f"{pull['author']}/{repository['name']}"
        own = {"full_name": full_name, "fork": True, "owner": account(pull["author"], "User", pull["author_id"])}
        return repository | own | {"id": repository["id"] + 1_000_000}

    @staticmethod
    def _side(owner: str, ref: str, sha: str, repository: dict[str, Any]) -> dict[str, Any]:
        return {"label": f"{owner}:{ref}", "ref": ref, "sha": sha, "user": account(owner, "Organization"), "repo": repository}

    def label(self, repository: dict[str, Any], name: str) -> dict[str, Any]:
        """A label by name."""
        url = f"{self.api}/repos/{repository['full_name']}/labels/{name}"
        return {"id": 1, "node_id": "TA==", "url": url, "name": name, "color": "ededed", "default": False, "description": None}

    def comment(self, repository: dict[str, Any], number: int, comment: dict[str, Any]) -> dict[str, Any]:
        """An issue comment."""
        issue = f"{self.api}/repos/{repository['full_name']}/issues/{number}"
        return {
            "id": comment["id"],
            "node_id": "SUM=",
            "url": f"{self.api}/repos/{repository['full_name']}/issues/comments/{comment['id']}",
            "html_url": f"{self.twin.base_url}/{repository['full_name']}/pull/{number}#issuecomment-{comment['id']}",
            "issue_url": issue,
            "user": comment["user"],
            "body": comment["body"],
            "created_at": comment["created_at"],
            "updated_at": comment["updated_at"],
            "author_association": "NONE",
        }

    def review(self, repository: dict[str, Any], number: int, review: dict[str, Any]) -> dict[str, Any]:
        """A review."""
        pull = f"{self.api}/repos/{repository['full_name']}/pulls/{number}"
        html = f"{self.twin.base_url}/{repository['full_name']}/pull/{number}#pullrequestreview-{review['id']}"
        return {
            "id": review["id"],
            "node_id": "UFJS",
            "user": review["user"],
            "body": review["body"],
            "state": "COMMENTED",
            "html_url": html,
            "pull_request_url": pull,
            "_links": {"html": {"href": html}, "pull_request": {"href": pull}},
            "submitted_at": review["submitted_at"],
            "commit_id": review["commit_id"],
            "author_association": "NONE",
        }

    def review_comment(self, repository: dict[str, Any], number: int, comment: dict[str, Any]) -> dict[str, Any]:
        """An inline comment."""
        pull = f"{self.api}/repos/{repository['full_name']}/pulls/{number}"
        url = f"{self.api}/repos/{repository['full_name']}/pulls/comments/{comment['id']}"
        html = f"{self.twin.base_url}/{repository['full_name']}/pull/{number}#discussion_r{comment['id']}"
        return {
            "url": url,
            "pull_request_review_id": comment["review_id"],
            "id": comment["id"],
            "node_id": "UFJD",
            "diff_hunk": comment["diff_hunk"],
            "path": comment["path"],
            "commit_id": comment["commit_id"],
            "original_commit_id": comment["commit_id"],
            "user": comment["user"],
            "body": comment["body"],
            "created_at": comment["created_at"],
            "updated_at": comment["created_at"],
            "html_url": html,
            "pull_request_url": pull,
            "author_association": "NONE",
            "_links": {"self": {"href": url}, "html": {"href": html}, "pull_request": {"href": pull}},
            "start_line": comment.get("start_line"),
            "original_start_line": comment.get("start_line"),
            "start_side": comment.get("start_side"),
            "line": comment["line"],
            "original_line": comment["line"],
            "side": comment["side"],
            "position": 1,
            "original_position": 1,
            "subject_type": "line",
            "reactions": {
                "url": f"{url}/reactions",
                "total_count": 0,
                **dict.fromkeys(("+1", "-1", "laugh", "confused", "heart", "hooray", "eyes", "rocket"), 0),
            },
        }

    def check_run(self, repository: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
        """A check run."""
        url = f"{self.api}/repos/{repository['full_name']}/check-runs/{run['id']}"
        return {
            "id": run["id"],
            "head_sha": run["head_sha"],
            "node_id": "Q1I=",
            "external_id": run["external_id"],
            "url": url,
            "html_url": f"{self.twin.base_url}/{repository['full_name']}/runs/{run['id']}",
            "details_url": run["details_url"],
            "status": run["status"],
            "conclusion": run["conclusion"],
            "started_at": run["started_at"],
            "completed_at": run["completed_at"],
            "output": {
                "title": run["title"],
                "summary": run["summary"],
                "text": None,
                "annotations_count": 0,
                "annotations_url": f"{url}/annotations",
            },
            "name": run["name"],
            "check_suite": {"id": 1},
            "app": self.app(),
            "pull_requests": [],
        }

    def alert(self, repository: dict[str, Any], alert: dict[str, Any], advisory: dict[str, Any]) -> dict[str, Any]:
        """A Dependabot alert with its advisory."""
        tail = f"{repository['full_name']}/dependabot/alerts/{alert['number']}"
        vulnerabilities = [
            {
                "package": {"ecosystem": one["ecosystem"], "name": one["name"]},
                "severity": advisory["severity"],
                "vulnerable_version_range": one["range"],
                "first_patched_version": {"identifier": one["patched"]} if one["patched"] else None,
            }
            for one in advisory["vulnerabilities"]
        ]
        named = [{"type": "GHSA", "value": advisory["ghsa_id"]}]
        if advisory["cve_id"]:
            named.append({"type": "CVE", "value": advisory["cve_id"]})
        kept = ("ghsa_id", "cve_id", "summary", "description", "severity", "cvss", "cwes")
        times = ("published_at", "updated_at", "withdrawn_at")
        ends = (
            "created_at",
            "updated_at",
            "dismissed_at",
            "dismissed_reason",
            "dismissed_comment",
            "fixed_at",
            "auto_dismissed_at",
        )
        return {
            "number": alert["number"],
            "state": alert["state"],
            "dependency": {
                "package": vulnerabilities[0]["package"],
                "manifest_path": alert["manifest_path"],
                "scope": alert["scope"],
                "relationship": alert["relationship"],
            },
            "security_advisory": {
                **{name: advisory[name] for name in kept},
                "vulnerabilities": vulnerabilities,
                "identifiers": named,
                "references": [{"url": f"https://github.com/advisories/{advisory['ghsa_id']}"}],
                **{name: advisory[name] for name in times},
            },
            "security_vulnerability": vulnerabilities[0],
            "url": f"{self.api}/repos/{tail}",
            "html_url": f"{self.twin.base_url}/{repository['full_name']}/security/dependabot/{alert['number']}",
            **{name: alert[name] for name in ends},
            "dismissed_by": person(alert["dismissed_by"]) if alert["dismissed_by"] else None,
            "assignees": [],
        }

    def public_user(self, login: str) -> dict[str, Any]:
        """A person as they see themselves without further scopes."""
        counts = dict.fromkeys(("public_repos", "public_gists", "followers", "following"), 0)
        words = dict.fromkeys(("company", "location", "email", "hireable", "bio", "twitter_username"))
        return (
            account(login)
            | counts
            | words
            | {"name": login.title(), "blog": "", "user_view_type": "public"}
            | dict.fromkeys(("created_at", "updated_at"), MADE)
        )

    def app(self) -> dict[str, Any]:
        """The App itself."""
        return {
            "id": self.twin.credentials["app_id"],
            "slug": APP_SLUG,
            "client_id": self.twin.credentials["client_id"],
            "node_id": "QXBw",
            "owner": account(self.twin.credentials["account"], "Organization"),
            "name": self.twin.credentials.get("app_name", "Kilo Reviewer"),
            "description": "",
            "external_url": self.twin.base_url,
            "html_url": f"{self.twin.base_url}/apps/{APP_SLUG}",
            "created_at": MADE,
            "updated_at": MADE,
            "permissions": self.twin.credentials.get("permissions", PERMISSIONS),
            "events": self.twin.credentials.get("events", EVENTS),
        }

    def granted(self) -> dict[str, str]:
        """The App's permissions without those that the owner hasn't accepted."""
        withheld = self.twin.data.get("withheld", [])
        return {name: level for name, level in self.app()["permissions"].items() if name not in withheld}

    def installation(self, number: int | None = None) -> dict[str, Any]:
        """An installation; the one of the seeded account unless another one is asked for."""
        number = number if number is not None else self.twin.credentials["installation_id"]
        held = self.twin.installations().get(number, {"account": self.twin.credentials["account"], "suspended_at": None})
        kind = "Organization" if held["account"] in ORGANIZATIONS else "User"
        owner = account(held["account"], kind)
        return {
            "id": number,
            # GitHub's description joins a user and an enterprise here: both kinds of fields.
            "account": owner | {"name": owner["login"], "slug": owner["login"], "created_at": MADE, "updated_at": MADE},
            "repository_selection": "all",
            "access_tokens_url": f"{self.api}/app/installations/{number}/access_tokens",
            "repositories_url": f"{self.api}/installation/repositories",
            "html_url": f"{self.twin.base_url}/settings/installations/{number}",
            "app_id": self.twin.credentials["app_id"],
            "target_id": owner["id"],
            "target_type": kind,
            "permissions": self.granted(),
            "events": self.app()["events"],
            "created_at": MADE,
            "updated_at": MADE,
            "single_file_name": None,
            "has_multiple_single_files": False,
            "single_file_paths": [],
            "app_slug": APP_SLUG,
            "suspended_at": held["suspended_at"],
            "suspended_by": owner if held["suspended_at"] else None,
        }

    def commit(self, full_name: str, sha: str) -> dict[str, Any]:
        """A commit, as far as check runs need it."""
        message = git(self.twin.path(full_name), "log", "-1", "--format=%B", sha).decode().strip()
        tree, *parents = git(self.twin.path(full_name), "log", "-1", "--format=%T %P", sha).decode().split()
        url = f"{self.api}/repos/{full_name}/commits/{sha}"
        person = {"name": "Ada", "email": "ada@acme.test", "date": MADE}
        return {
            "url": url,
            "sha": sha,
            "node_id": "Q29t",
            "html_url": f"{self.twin.base_url}/{full_name}/commit/{sha}",
            "comments_url": f"{url}/comments",
            "commit": {
                "url": f"{self.api}/repos/{full_name}/git/commits/{sha}",
                "author": person,
                "committer": person,
                "message": message,
                "comment_count": 0,
                "tree": {"sha": tree, "url": f"{self.api}/repos/{full_name}/git/trees/{tree}"},
            },
            "author": account("ada"),
            "committer": account("ada"),
            "parents": [{"sha": parent, "url": f"{self.api}/repos/{full_name}/commits/{parent}"} for parent in parents],
        }
