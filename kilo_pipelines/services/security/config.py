"""An owner's settings of the Security Agent (contract section 4), with one set of defaults for every process."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kilo_pipelines.services.security.sla import SlaPolicy

SERVICE = "security_agent"

Days = Annotated[int, Field(ge=1, le=365)]

PRESETS: dict[str, tuple[int, int, int, int]] = {
    "default": (15, 30, 45, 90),
    "strict": (7, 30, 90, 90),
    "federal": (30, 30, 90, 180),
}


class SlaDays(BaseModel):
    """Days that a finding of each severity may stay open."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    critical: Days
    high: Days
    medium: Days
    low: Days


class SecurityConfig(BaseModel):
    """Validated settings; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sla_preset: Literal["default", "strict", "federal", "custom"] = Field(
        default="default", description="Days by severity: 15/30/45/90, 7/30/90/90, 30/30/90/180, or `sla_days`."
    )
    sla_days: SlaDays | None = Field(default=None, description="Days by severity of the preset `custom`.")
    sla_repository_overrides: dict[int, SlaDays] = Field(
        default={}, description="Days by severity of single repositories, by id."
    )
    sla_business_days: bool = Field(default=False, description="Count Monday to Friday only (UTC).")
    sla_pause_while_ignored: bool = Field(default=True, description="Time during which a finding is ignored doesn't count.")
    auto_sync_enabled: bool = Field(default=True, description="Sync by the clock; by hand it is always possible.")
    repository_selection_mode: Literal["all", "selected"] = Field(default="all", description="Which repositories are synced.")
    selected_repository_ids: list[int] = Field(default=[], description="Numeric ids of the selected repositories; none is none.")

    @model_validator(mode="after")
    def _preset_or_days(self) -> Self:
        if (self.sla_preset == "custom") != (self.sla_days is not None):
            raise ValueError("sla_days belongs to the preset custom, and the preset custom wants sla_days")
        return self


def policy_of(config: SecurityConfig) -> SlaPolicy:
    """The deadlines that these settings ask for; its version is the store's to give."""
    days = config.sla_days or SlaDays(**dict(zip(SlaDays.model_fields, PRESETS[config.sla_preset], strict=True)))
    return SlaPolicy(
        days=days.model_dump(),
        business_days=config.sla_business_days,
        overrides={key: value.model_dump() for key, value in config.sla_repository_overrides.items()},
        pause_while_ignored=config.sla_pause_while_ignored,
    )


def selects(config: SecurityConfig, repository_id: int) -> bool:
    """Whether a repository is synced. An empty selection selects nothing (contract 7.2.2)."""
    return config.repository_selection_mode == "all" or repository_id in config.selected_repository_ids
