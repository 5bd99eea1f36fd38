"""The session protocol between the engine and whatever runs an agent.

The engine writes a `SessionSpec`; the self-hosted runner carries it out with a `core.session.SessionTask` (the service's
brief and result rules) under a `SessionControl` (the engine's lease, interrupt and log) and answers a `SessionOutcome`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal, Protocol, Self
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kilo_pipelines.core.evidence import Evidence
from kilo_pipelines.core.limits import SESSION_TOKENS, Price, Usage
from kilo_pipelines.core.text import clean

# Which services' sessions may write (design, section 7); all others read.
WRITING_SERVICES = frozenset({"remediation"})
# A result's key for what the platform pushed. The agent's own result may not have it.
PUSHED = "pushed"
# Names that git takes for a branch on every file system, but for `.lock` at a segment's end, which it keeps for itself.
_BRANCH = r"^(?:[a-z0-9](?:[a-z0-9_-]|\.[a-z0-9])*/){2,}[1-9][0-9]{0,5}$"


class RepositoryRef(BaseModel):
    """A repository by its immutable numeric id; names and addresses are labels."""

    model_config = ConfigDict(extra="forbid")

    provider: Literal["github"]
    external_id: int
    full_name: str
    clone_url: str
    default_branch: str


class SessionLimits(BaseModel):
    """Bounds of one session; all times in seconds, sizes in bytes."""

    model_config = ConfigDict(extra="forbid")

    turns: int = Field(default=60, description="completed turns of a session; a review that needs more is lost in a loop")
    tokens: int = Field(default=SESSION_TOKENS, description="tokens in plus out over the whole session")
    micro_usd: int | None = Field(default=None, description="micro-USD over the whole session; None: money isn't counted")
    price: Price | None = Field(default=None, description="what the model costs, as known at the claim")
    cut: bool = Field(default=False, description="the day's budget left less than a session has on other days")
    silence_s: float = Field(default=420.0, description="no event from the agent and no model call: contract C7")
    hard_cap_s: float = Field(default=1_800.0, description="whole session, all parts")
    result_bytes: int = Field(default=1_000_000)
    memory_bytes: int = Field(
        default=4 * 2**30, description="address space is not bounded (JS engines reserve it); data and cgroup are"
    )
    processes: int = 512
    file_bytes: int = Field(default=256 * 2**20, description="largest file that a process in the sandbox may write")


class SessionSpec(BaseModel):
    """What a session works on. Stored with the session; holds no secret and no brief text."""

    model_config = ConfigDict(extra="forbid")

    session_id: UUID
    owner_id: UUID
    service: Literal["code_review", "security_analysis", "remediation"]
    repository: RepositoryRef
    pull_number: int | None = Field(description="None: a branch's head without a pull request; base and head are one commit")
    base_ref: str
    base_sha: str
    head_sha: str
    checkout_ref: str = Field(description="provider ref that holds the head, e.g. refs/pull/7/head or refs/heads/main")
    agent: Literal["kilo", "scripted", "hosted"]
    model: str
    limits: SessionLimits = SessionLimits()
    task: dict[str, Any] = Field(default_factory=dict, description="the service's own inputs for its brief (JSON)")
    writes: bool = Field(default=False, description="the agent's change is checked and pushed as `branch` before the end is told")
    branch: str | None = Field(
        default=None, max_length=120, pattern=_BRANCH, description="<prefix>/<item>/<attempt>: created once, never moved"
    )
    allow_protected: list[str] = Field(default=[], description="patterns of protected paths that the owner lets through")
    registries: list[str] = Field(default=[], description="the owner's allow-list among the platform's package registries")

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        """A review has a pull request; without one there is nothing between base and head; only some services write."""
        if self.service == "code_review" and self.pull_number is None:
            raise ValueError("a review is of a pull request")
        if self.pull_number is None and self.base_sha != self.head_sha:
            raise ValueError("without a pull request base and head are one commit")
        if self.writes and (self.service not in WRITING_SERVICES or self.pull_number is not None or self.branch is None):
            raise ValueError("a write session is of a writing service, on a branch's head, and names the branch that it creates")
        if ".lock/" in (self.branch or ""):
            raise ValueError("a segment of a branch's name doesn't end with .lock")
        if not self.writes and (self.branch is not None or self.allow_protected or self.registries):
            raise ValueError("a session that only reads has no branch, no paths to change and no package registries")
        return self


class Heartbeat(StrEnum):
    """The engine's answer to a heartbeat."""

    OK = "ok"
    CANCEL = "cancel"  # interrupt requested: stop within 5 s, outcome `interrupted`
    LOST = "lost"  # the lease went to somebody else: stop, report nothing


class SessionControl(Protocol):
    """The engine's half: the runner calls `beat` at least once a second; the implementation spaces out its writes."""

    def beat(self) -> Heartbeat: ...

    def event(self, kind: str, data: dict[str, Any]) -> None:
        """A step worth keeping (session_events) and showing in the run's log; never a secret, prompt or diff."""
        ...

    def spent(self, meter: str, usage: Usage) -> bool:
        """What a meter shows by now, told as often as it moved and once more at the end; False when it could not be kept now."""
        ...

    def accepted(self, outcome: SessionOutcome) -> bool:
        """Keeps the outcome that a push is about to make true; False when the session is somebody else's by now.

        Whoever takes the session up again after a death is given it, and ends with it when the push has happened.
        """
        ...


class SessionStatus(StrEnum):
    """Terminal statuses (contract A9)."""

    COMPLETED = "completed"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


class SessionOutcome(BaseModel):
    """How a session ended. `reason` is a code of `core.reasons` unless completed."""

    model_config = ConfigDict(extra="forbid")

    status: SessionStatus
    reason: str | None = None
    detail: str | None = Field(default=None, max_length=2_000, description="one scrubbed sentence for people")
    result: dict[str, Any] | None = Field(
        default=None,
        description="the validated result; of a write session with the key `pushed`: {branch, commit, parent, files}",
    )
    evidence: Evidence | None = None

    @field_validator("detail")
    @classmethod
    def _plain(cls, value: str | None) -> str | None:
        """Last words come from the sandbox: the database takes no NUL, a terminal should get no escape sequence."""
        return None if value is None else clean(value)
