"""What an analysis says of a finding, in the two forms in which a model answers, and whether it still holds.

A shallow analysis (triage) reads the alert's metadata; a deep one is a session in the repository (contract 9 and 10). Both answer by
schema, and nothing is read out of prose.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator

# The finding's facts that an analysis speaks of (contract 3.1). Not among them: its state and when the source touched it last, which a
# dismissal and its end change without a word about the vulnerability.
_FACTS = (
    "repository_id",
    "source",
    "source_id",
    "severity",
    "package_name",
    "package_ecosystem",
    "dependency_scope",
    "cve_id",
    "ghsa_id",
    "title",
    "vulnerable_version_range",
    "patched_version",
    "manifest_path",
)


class Triage(BaseModel):
    """What the metadata alone tell (contract 9). `fallback`: the model gave no usable answer, and a deep analysis has to decide."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    needs_deep: StrictBool
    reasoning: str = Field(max_length=4_000)
    action: Literal["dismiss", "analyze_codebase", "manual_review"]
    confidence: Literal["high", "medium", "low"]
    fallback: bool = False

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        """Who wants the code read needs a deep analysis, and who dismisses doesn't (contract, "Beyond the reference", 8)."""
        if self.needs_deep != (self.action == "analyze_codebase"):
            raise ValueError("needs_deep goes with the action analyze_codebase, and with no other")
        return self


# A literal text on one line: shorter ones would be found everywhere.
SearchText = Annotated[str, Field(min_length=3, max_length=200, pattern=r"^[^\r\n\x00]+$")]


class Location(BaseModel):
    """Where the package is used; lines are 1-based."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(max_length=1_000)
    line: int = Field(ge=1)


class DeepAnalysis(BaseModel):
    """What reading the repository told (contract 10.3)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    exploitable: StrictBool | Literal["unknown"]
    reasoning: str = Field(max_length=8_000)
    locations: list[Location] = Field(default=[], max_length=200)
    search: list[SearchText] = Field(
        default=[], max_length=10, description="Literal texts that show a use of the package; what they hit binds a dismissal."
    )
    suggested_fix: str = Field(default="", max_length=8_000)
    action: Literal["dismiss", "open_pr", "manual_review", "monitor"]
    summary: str = Field(max_length=2_000)

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        """What can be exploited isn't dismissed, and a dismissal rests on something that can be looked for again."""
        if self.action == "dismiss" and self.exploitable is not False:
            raise ValueError("only what can't be exploited may be dismissed")
        if self.action == "dismiss" and not self.search:
            raise ValueError("a dismissal needs at least one text in search")
        return self


def snapshot_of(finding: Any) -> dict[str, Any]:
    """What was analysed, as JSON; the description only by its hash, since it may be as long as 64 KB."""
    return {
        **{name: getattr(finding, name) for name in _FACTS},
        "cvss_score": None if finding.cvss_score is None else str(finding.cvss_score),
        "cwe_ids": sorted(set(finding.cwe_ids)),
        "description_sha256": hashlib.sha256(finding.description.encode()).hexdigest(),
    }


def is_fresh(taken: dict[str, Any] | None, finding: Any) -> bool:
    """Whether an analysis speaks of the finding as it is now: its snapshot equals the present facts (contract 13.1)."""
    return taken == snapshot_of(finding)
