"""What the GitHub App asks for, and why: the one list from which the manifest, the set-up page, `doctor` and docs/setup.md are made.

Holds: permissions and events by service, and the comparison with what an App or an installation has. Pure data: it asks nobody.
Administration and workflows are never asked for (threats, rule 14).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

Level = Literal["read", "write"]

# Needed whatever services are on.
PLATFORM = "platform"
CODE_REVIEW = "code_review"
SECURITY = "security_agent"


@dataclass(frozen=True)
class Permission:
    """One permission of the App as one service needs it. `title` is what GitHub's pages call it."""

    name: str
    title: str
    level: Level
    service: str
    reason: str


@dataclass(frozen=True)
class Event:
    """One event that the App subscribes to for a service. `needs`: the permission without which GitHub doesn't offer it."""

    name: str
    service: str
    needs: str
    reason: str


@dataclass(frozen=True)
class Missing:
    """What a service needs and doesn't have."""

    kind: Literal["permission", "event"]
    name: str
    service: str
    wanted: str
    held: str


PERMISSIONS = (
    Permission("metadata", "Metadata", "read", PLATFORM, "names and ids of the repositories that the installation selects"),
    Permission(
        "members",
        "Members (organization)",
        "read",
        PLATFORM,
        "asks GitHub whether the person who connects an organization administers it",
    ),
    Permission("contents", "Contents", "read", CODE_REVIEW, "fetches the commits that are reviewed"),
    Permission(
        "pull_requests", "Pull requests", "write", CODE_REVIEW, "reads pull requests and posts reviews with inline comments"
    ),
    Permission(
        "issues", "Issues", "write", CODE_REVIEW, "posts the summary comment and the reaction, which GitHub counts as an issue's"
    ),
    Permission("checks", "Checks", "write", CODE_REVIEW, "reports the review as a check that a branch rule can require"),
    Permission(
        "vulnerability_alerts",
        "Dependabot alerts",
        "write",
        SECURITY,
        "reads alerts and dismisses those that somebody decided on",
    ),
    Permission(
        "contents", "Contents", "write", SECURITY, "pushes a remediation to a new branch of its own, never to an existing one"
    ),
    Permission("pull_requests", "Pull requests", "write", SECURITY, "opens the pull request of a remediation"),
)

EVENTS = (
    Event("repository", PLATFORM, "metadata", "follows renamed, transferred and deleted repositories"),
    Event("pull_request", CODE_REVIEW, "pull_requests", "starts a review when a pull request is opened or pushed to"),
    Event("issue_comment", CODE_REVIEW, "issues", "hears `/ok-to-test` about an outsider's pull request"),
    Event("dependabot_alert", SECURITY, "vulnerability_alerts", "takes a new, fixed or dismissed alert over at once"),
)

SERVICES = (CODE_REVIEW, SECURITY)
_RANK = {"": 0, "read": 1, "write": 2, "admin": 3}


def permissions_for(services: Collection[str]) -> dict[str, str]:
    """The permissions that these services and the platform itself need together, each at its highest level."""
    found: dict[str, str] = {}
    for one in PERMISSIONS:
        if one.service == PLATFORM or one.service in services:
            found[one.name] = max(found.get(one.name, ""), one.level, key=lambda level: _RANK[level])
    return found


def events_for(services: Collection[str]) -> list[str]:
    """The events that these services and the platform itself need."""
    return [one.name for one in EVENTS if one.service == PLATFORM or one.service in services]


def missing(
    services: Collection[str], permissions: Mapping[str, str], events: Collection[str], *, organization: bool = True
) -> list[Missing]:
    """What these services need beyond what is granted, service by service; an unknown level grants nothing.

    A person's installation has no members that could be read: `organization` is False there.
    """
    found = [
        Missing("permission", one.name, one.service, one.level, permissions.get(one.name, "nothing"))
        for one in PERMISSIONS
        if (one.service == PLATFORM or one.service in services)
        and _RANK[one.level] > _RANK.get(permissions.get(one.name, ""), 0)
        and (organization or one.name != "members")
    ]
    found += [
        Missing("event", one.name, one.service, "subscribed", "not subscribed")
        for one in EVENTS
        if (one.service == PLATFORM or one.service in services) and one.name not in events
    ]
    return found


def manifest(
    *, name: str, home: str, webhook: str, created: str, authorized: str, installed: str, services: Collection[str] = SERVICES
) -> dict[str, object]:
    """The App's manifest as GitHub takes it; addresses are absolute."""
    return {
        "name": name,
        "url": home,
        "description": "Reviews, triage and security work by coding agents, run by ourselves.",
        "public": False,
        "hook_attributes": {"url": webhook, "active": True},
        "redirect_url": created,
        "callback_urls": [authorized],
        "setup_url": installed,
        "setup_on_update": False,
        # The person is asked by an authorization of its own after the installation: only that one brings our state back.
        "request_oauth_on_install": False,
        "default_permissions": permissions_for(services),
        "default_events": events_for(services),
    }
