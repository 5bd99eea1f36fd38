"""The session protocol between the engine and whatever runs an agent.

The engine writes a `SessionSpec`; the self-hosted runner carries it out with a `core.session.SessionTask` (the service's
brief and result rules) under a `SessionControl` (the engine's lease, interrupt and log) and answers a `SessionOutcome`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal, Protocol
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, field_validator

from kilo_pipelines.core.evidence import Evidence
from kilo_pipelines.core.text import clean


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
    tokens: int = Field(default=2_000_000, description="tokens in plus out over the whole session")
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
    service: Literal["code_review"]
    repository: RepositoryRef
    pull_number: int
    base_ref: str
    base_sha: str
    head_sha: str
    checkout_ref: str = Field(description="provider ref that holds the head, e.g. refs/pull/7/head")
    agent: Literal["kilo", "scripted"]
    model: str
    limits: SessionLimits = SessionLimits()
    task: dict[str, Any] = Field(default_factory=dict, description="the service's own inputs for its brief (JSON)")


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
    result: dict[str, Any] | None = None
    evidence: Evidence | None = None

    @field_validator("detail")
    @classmethod
    def _plain(cls, value: str | None) -> str | None:
        """Last words come from the sandbox: the database takes no NUL, a terminal should get no escape sequence."""
        return None if value is None else clean(value)
