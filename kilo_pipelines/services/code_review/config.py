"""An owner's settings of Code Review (contract A14; differences are listed in docs/services/code-review.md)."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class CodeReviewConfig(BaseModel):
    """Validated settings; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    review_style: Literal["strict", "balanced", "lenient"] = Field(default="balanced", description="How much is worth a finding.")
    focus_areas: list[Literal["security", "performance", "bugs", "style", "testing", "documentation"]] = Field(
        default=[], description="What to look at first."
    )
    gate_threshold: Literal["off", "all", "warning", "critical"] = Field(
        default="off", description="Findings that fail the check."
    )
    advisory: bool = Field(default=False, description="The check never blocks: `neutral` instead of anything that isn't green.")
    accept_reported_evidence: bool = Field(
        default=False, description="Let evidence that a hosted agent reported turn the check green."
    )
    repository_selection_mode: Literal["all", "selected"] = Field(default="all", description="Which repositories are reviewed.")
    selected_repository_ids: list[int] = Field(default=[], description="Numeric ids of the selected repositories.")
    skip_bot_pull_requests: bool = Field(default=True, description="Leave pull requests of bots alone.")
    disable_review_md: bool = Field(default=False, description="Ignore REVIEW.md of the default branch.")
    exclude_paths: list[str] = Field(
        default=[], max_length=100, description="Glob patterns of paths that are listed, not reviewed."
    )
    max_parts: int = Field(default=6, ge=1, le=20, description="Conversations that a large pull request may be split into.")
