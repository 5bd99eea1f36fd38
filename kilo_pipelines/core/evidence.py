"""Evidence of a session: what the model was really sent, and what its result is bound to.

Invariant 6 of the design: a check turns green only with a complete coverage ledger and a bound result.
The runner fills these values, the services judge them, the store keeps them; nobody else invents them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from kilo_pipelines.core.diff import Hunk


class LedgerEntry(BaseModel):
    """One changed blob pair of the diff and what became of it.

    `old_blob` and `new_blob` are full hex object ids; all zeroes where the side does not exist.
    `sent_turn` is the 1-based number of the first *completed* main-conversation turn whose request held this
    entry's diff text; `None` while it was never sent. `excluded` carries a reason code where the owner's
    settings exclude the path; an entry that is neither sent nor excluded is a gap.
    """

    model_config = ConfigDict(extra="forbid")

    entry_id: str
    path: str
    old_path: str | None = None
    status: Literal["added", "modified", "deleted", "renamed", "copied", "type_changed"]
    old_blob: str
    new_blob: str
    old_mode: str
    new_mode: str
    binary: bool = False
    bytes: int = Field(ge=0, description="size of the entry's diff text in bytes")
    sent_turn: int | None = None
    excluded: str | None = None
    hunks: list[Hunk] = Field(default=[], description="line ranges that may carry a comment")


class Evidence(BaseModel):
    """The evidence record of one session, keyed as in the design (threats, rule 9)."""

    model_config = ConfigDict(extra="forbid")

    evidence_class: Literal["observed", "reported"]
    repository_id: int
    pull_number: int | None = Field(description="None: the head of a branch, without a pull request and so without a diff")
    base_ref: str
    merge_base: str
    head: str
    diff_hash: str = Field(description="SHA-256 hex of the canonical full diff")
    turns: int = Field(default=0, ge=0, description="completed main-conversation turns with tools offered")
    ledger: list[LedgerEntry] = Field(default_factory=list)
    result_sha256: str | None = Field(default=None, description="SHA-256 hex of the canonical JSON of the result")
    result_turns: list[int] = Field(default_factory=list, description="turns in which the bound results occurred")
    agent: str
    agent_version: str = ""
    model: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    transcript_sha256: str | None = None
    policy_commit: str | None = Field(default=None, description="default-branch commit that REVIEW.md was read at")
    policy_truncated: bool = False

    found: list[str] | None = Field(
        default=None,
        description="files of the head in which a text occurs that the result says was looked for; None: not looked for",
    )

    @property
    def changed_blobs(self) -> int:
        """Changed blob pairs in the diff."""
        return len(self.ledger)

    @property
    def covered(self) -> int:
        """Blob pairs sent in a completed turn."""
        return sum(1 for entry in self.ledger if entry.sent_turn is not None)

    @property
    def gaps(self) -> list[LedgerEntry]:
        """Blob pairs that were neither sent nor excluded by the owner."""
        return [entry for entry in self.ledger if entry.sent_turn is None and entry.excluded is None]
