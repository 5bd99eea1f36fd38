"""The fields of GitHub's `pull_request` event that Code Review uses (contract A4.4b)."""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, BaseModel, Field

_SHA = Field(pattern=r"^[0-9a-f]{40}([0-9a-f]{24})?$")


class Account(BaseModel):
    id: int
    login: str
    type: str = "User"


class Repository(BaseModel):
    id: int
    full_name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,100}/[A-Za-z0-9_.-]{1,100}$")


class Head(BaseModel):
    sha: str = _SHA
    ref: str
    repo: Repository | None = None


class Base(BaseModel):
    sha: str = _SHA
    ref: str


class Label(BaseModel):
    name: str


class PullRequest(BaseModel):
    number: int = Field(ge=1)
    title: str
    draft: bool = False
    state: Literal["open", "closed"]
    html_url: str
    labels: list[Label] = []
    user: Account
    head: Head
    base: Base


class Installation(BaseModel):
    id: int


class ChangedFrom(BaseModel):
    model_config = {"populate_by_name": True}

    from_: object = Field(default=None, alias="from")


class BaseChange(BaseModel):
    ref: ChangedFrom | None = None
    sha: ChangedFrom | None = None


class Changes(BaseModel):
    base: BaseChange | None = None


class PullRequestEvent(BaseModel):
    """A `pull_request` event; unknown fields are ignored, known ones must have their type."""

    action: str
    number: int
    pull_request: PullRequest
    repository: Repository
    installation: Installation
    sender: Account | None = None
    label: Label | None = None
    changes: Changes | None = None


class Comment(BaseModel):
    body: str = ""
    user: Account
    created_at: AwareDatetime


class Issue(BaseModel):
    number: int = Field(ge=1)
    state: Literal["open", "closed"]
    pull_request: dict[str, object] | None = None


class IssueCommentEvent(BaseModel):
    """An `issue_comment` event; `issue.pull_request` is there when it stands on a pull request."""

    action: str
    comment: Comment
    issue: Issue
    repository: Repository
    installation: Installation
    sender: Account
