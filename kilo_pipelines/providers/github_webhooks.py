"""What GitHub sends us: the signature over the raw body, and the fields of each event that are used.

Holds: verification and shapes. Does not belong here: who the owner is, what is stored, HTTP. Imports no client, so that
the ingress starts fast.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

_SIGNATURE = re.compile(r"sha256=[0-9a-f]{64}")
# GitHub's ids are positive and fit a database's bigint.
ProviderId = Annotated[int, Field(strict=True, gt=0, lt=2**63)]
# Numbers of pull requests count up by one in a repository; the column that holds them is an integer.
PullNumber = Annotated[int, Field(strict=True, gt=0, lt=2**31)]


def _storable(value: str) -> str:
    """PostgreSQL holds no NUL in text; GitHub sends none."""
    if "\x00" in value:
        raise ValueError("NUL in text")
    return value


Text = Annotated[str, Field(strict=True, max_length=65_536), AfterValidator(_storable)]
Name = Annotated[str, Field(strict=True, min_length=1, max_length=255), AfterValidator(_storable)]
Action = Annotated[str, Field(strict=True, pattern=r"^[a-z_]{1,64}$")]
Sha = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{40}([0-9a-f]{24})?$")]


def well_formed_signature(header: str | None) -> bool:
    """Whether the header can be a signature at all: cheap, before a body is read."""
    return header is not None and _SIGNATURE.fullmatch(header) is not None


def verify_signature(secret: str, body: bytes, header: str | None) -> bool:
    """Whether `X-Hub-Signature-256` is the HMAC-SHA256 of exactly these bytes; constant time; False without a secret."""
    if not secret or header is None or not well_formed_signature(header):
        return False
    expected = "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    return hmac.compare_digest(expected.encode(), header.encode())


def signed_with(secrets: Sequence[str], body: bytes, header: str | None) -> int | None:
    """Which of the secrets signed these bytes; None for none. All are tried, so that the time tells nothing of which it was."""
    matches = [verify_signature(secret, body, header) for secret in secrets]
    return matches.index(True) if any(matches) else None


class _Shape(BaseModel):
    """Unknown fields are GitHub's right; missing or mistyped ones that we use are refused."""

    model_config = ConfigDict(extra="ignore")


class _InstallationId(_Shape):
    id: ProviderId


class _Account(_Shape):
    login: Name


class _InstallationObject(_Shape):
    id: ProviderId
    account: _Account


class RepositoryLabel(_Shape):
    """A repository in an installation's list: GitHub leaves the default branch out there."""

    id: ProviderId
    full_name: Name
    private: bool = True


class _Author(_Shape):
    id: ProviderId
    login: Name
    type: Name = "User"


class _HeadRepository(_Shape):
    full_name: Name


class _Head(_Shape):
    sha: Sha
    ref: Name
    repo: _HeadRepository | None = None


class _Base(_Shape):
    sha: Sha
    ref: Name


class _Label(_Shape):
    name: Text


class _Pull(_Shape):
    number: PullNumber
    title: Text
    draft: bool = False
    state: Literal["open", "closed"]
    html_url: Text
    labels: list[_Label] = Field(default_factory=list)
    user: _Author
    head: _Head
    base: _Base


class PullRequestShape(_Shape):
    """`pull_request`: the fields that Code Review uses."""

    action: Action
    number: PullNumber
    pull_request: _Pull
    repository: RepositoryLabel
    installation: _InstallationId
    label: _Label | None = None


class _Comment(_Shape):
    id: ProviderId
    body: Text = ""
    user: _Author


class _Issue(_Shape):
    number: PullNumber
    state: Literal["open", "closed"]


class IssueCommentShape(_Shape):
    """`issue_comment`: who wrote what under which issue or pull request."""

    action: Action
    comment: _Comment
    issue: _Issue
    repository: RepositoryLabel
    installation: _InstallationId
    sender: _Author


class DependabotAlertShape(_Shape):
    """`dependabot_alert`: whose alert it is; the alert itself is checked field by field by the Security Agent."""

    action: Action
    alert: dict[str, Any]
    repository: RepositoryLabel
    installation: _InstallationId


class InstallationShape(_Shape):
    """`installation`: a full installation object, which no other event carries except `installation_repositories`."""

    action: Action
    installation: _InstallationObject
    repositories: list[RepositoryLabel] = Field(default_factory=list)


class InstallationRepositoriesShape(_Shape):
    """`installation_repositories`: what was added to and removed from the installation's selection."""

    action: Action
    installation: _InstallationObject
    repositories_added: list[RepositoryLabel]
    repositories_removed: list[RepositoryLabel]


class RepositoryShape(_Shape):
    """`repository`: what became of a repository itself, under its present name."""

    action: Action
    repository: RepositoryLabel
    installation: _InstallationId


class PingShape(_Shape):
    """`ping`: sent when a hook is made."""

    zen: Text
    hook_id: ProviderId


SHAPES: dict[str, type[_Shape]] = {
    "pull_request": PullRequestShape,
    "issue_comment": IssueCommentShape,
    "dependabot_alert": DependabotAlertShape,
    "installation": InstallationShape,
    "installation_repositories": InstallationRepositoriesShape,
    "repository": RepositoryShape,
    "ping": PingShape,
}

# `repository` has no field of its own: its actions, and nothing beside what every event of a repository carries, tell it from others.
_REPOSITORY_ACTIONS = frozenset(
    {"archived", "created", "deleted", "edited", "privatized", "publicized", "renamed", "transferred", "unarchived"}
)
_REPOSITORY_FIELDS = frozenset({"action", "changes", "enterprise", "installation", "organization", "repository", "sender"})

# What only other events about a pull request carry beside it.
_NOT_PULL_REQUEST = ("review", "comment", "thread")


def event_of_shape(payload: Mapping[str, Any]) -> str | None:
    """Which of our events a body is by its own look, None for any other (the event header is outside the signature)."""
    if "pull_request" in payload and "number" in payload and not any(name in payload for name in _NOT_PULL_REQUEST):
        return "pull_request"
    if isinstance(payload.get("issue"), dict) and isinstance(payload.get("comment"), dict):
        return "issue_comment"
    alert = payload.get("alert")
    # Alerts of code and secret scanning have neither.
    if isinstance(alert, dict) and "security_advisory" in alert and "dependency" in alert:
        return "dependabot_alert"
    if "repositories_added" in payload or "repositories_removed" in payload:
        return "installation_repositories"
    installation = payload.get("installation")
    if isinstance(installation, dict) and "account" in installation and "repository" not in payload:
        return "installation"
    if "zen" in payload and "hook_id" in payload:
        return "ping"
    action = payload.get("action")
    if (
        "repository" in payload
        and payload.keys() <= _REPOSITORY_FIELDS
        and isinstance(action, str)
        and action in _REPOSITORY_ACTIONS
    ):
        return "repository"
    return None


def shape_matches(event: str, payload: Mapping[str, Any]) -> bool:
    """Whether a body is what its unsigned event header says (threats, rule 15).

    A body of ours under the name of an event that nothing handles would be stored as settled, and the real one, when it
    came, would be a duplicate: so what looks like one of our events must be named so.
    """
    shape = SHAPES.get(event)
    if event_of_shape(payload) != (event if shape else None):
        return False
    if shape is None:
        return True
    try:
        shape.model_validate(payload)
    except ValidationError:
        return False
    return True


def installation_id(payload: Mapping[str, Any]) -> int | None:
    """The installation's id when it is there and is an id; True, floats and text are none."""
    installation = payload.get("installation")
    found = installation.get("id") if isinstance(installation, dict) else None
    return found if type(found) is int and 0 < found < 2**63 else None
