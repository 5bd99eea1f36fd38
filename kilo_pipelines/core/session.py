"""What a service asks of a session and what the platform read before any agent ran: the seam between services and runner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

EntryStatus = Literal["added", "modified", "deleted", "renamed", "copied", "type_changed"]


class DiffEntry(BaseModel):
    """One changed blob pair with the exact text that must reach the model."""

    model_config = ConfigDict(extra="forbid")

    entry_id: str
    path: str
    old_path: str | None = None
    status: EntryStatus
    old_blob: str
    new_blob: str
    old_mode: str
    new_mode: str
    binary: bool = False
    text: str = Field(description="the entry's full unified diff, as made in the bare repository")


class WorkspaceFacts(BaseModel):
    """What the platform itself read in the bare repository before any agent ran."""

    model_config = ConfigDict(extra="forbid")

    merge_base: str
    head_sha: str
    diff_hash: str
    entries: list[DiffEntry]
    policy_text: str | None = None
    policy_commit: str | None = None
    policy_truncated: bool = False


@dataclass(frozen=True)
class BriefPart:
    """One conversation: its prompt and, per diff entry that it covers, the text which must occur in it verbatim."""

    prompt: str
    covers: dict[str, str]


@dataclass(frozen=True)
class Brief:
    """What the agent is asked. `refused` carries a reason code when the work must not be started at all."""

    parts: list[BriefPart] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)  # entry id -> reason code
    refused: str | None = None


class SessionTask(Protocol):
    """A service's half of a session."""

    def compose(self, facts: WorkspaceFacts, nonce: str, result_path: str) -> Brief:
        """The brief for these facts. The nonce must occur in every part's prompt and in the result."""
        ...

    def validate(self, result: object, nonce: str) -> list[str]:
        """Problems of a decoded JSON result in plain words; empty when valid."""
        ...

    def repair_prompt(self, problems: list[str], nonce: str, result_path: str) -> str:
        """The one repair turn's prompt."""
        ...

    def merge(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        """One result out of the parts' results."""
        ...


class ReportingTask(SessionTask, Protocol):
    """A service's half of a session whose result may be the agent's last message: `result_path` is None then."""

    def compose(self, facts: WorkspaceFacts, nonce: str, result_path: str | None) -> Brief:
        """As in `SessionTask`."""
        ...

    def repair_prompt(self, problems: list[str], nonce: str, result_path: str | None) -> str:
        """As in `SessionTask`."""
        ...


@runtime_checkable
class SearchingTask(SessionTask, Protocol):
    """A service's half of a session whose result says what it looked for; the platform looks for it, too."""

    def searched(self, result: dict[str, Any]) -> list[str]:
        """Literal texts of one line each, out of the merged result."""
        ...


@runtime_checkable
class WriteTask(SessionTask, Protocol):
    """A service's half of a session whose change is pushed."""

    def commit_message(self, result: dict[str, Any]) -> str | None:
        """Subject, empty line, body of the commit, out of the merged result; None when the result asks for no push.

        The platform makes it harmless and writes author and committer itself.
        """
        ...
