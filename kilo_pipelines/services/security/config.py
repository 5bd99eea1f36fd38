"""An owner's settings of the Security Agent (contract section 4), with one set of defaults for every process."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kilo_pipelines.services.security.sla import SlaPolicy

SERVICE = "security_agent"

# What a threshold lets through: severities of its rank or a lower one (contract 7.3). An unknown severity is as low as low.
RANKS = {"critical": 0, "high": 1, "medium": 2, "low": 3}
Threshold = Literal["critical", "high", "medium", "all"]

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


class _Recipient(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Email(_Recipient):
    """A mailbox."""

    kind: Literal["email"]
    address: str = Field(
        max_length=254, pattern=r"^[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*$"
    )


class Slack(_Recipient):
    """A channel, by its id or name."""

    kind: Literal["slack"]
    channel: str = Field(pattern=r"^[#A-Za-z0-9_-]{2,80}$")


class Webhook(_Recipient):
    """An address that takes signed JSON; plain http only for this machine, which only the offline world may send to."""

    kind: Literal["webhook"]
    url: str = Field(max_length=2_000, pattern=r"^(https://[^\s@\\#]+|http://(localhost|127\.0\.0\.1)(:\d{1,5})?/[^\s@\\#]*)$")

    @field_validator("url")
    @classmethod
    def _address(cls, url: str) -> str:
        """A host and a port that can be asked for; either raises ValueError otherwise."""
        parts = urlsplit(url)
        if not (parts.hostname or "").encode("idna") or parts.port == 0:
            raise ValueError("neither host nor port may be empty")
        return url


Recipient = Annotated[Email | Slack | Webhook, Field(discriminator="kind")]


class SecurityConfig(BaseModel):
    """Validated settings; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sla_preset: Literal["default", "strict", "federal", "custom"] = Field(
        default="default",
        description="Days by severity (critical/high/medium/low): default 15/30/45/90, strict 7/30/90/90, federal 30/30/90/180; custom: `sla_days`.",
    )
    sla_days: SlaDays | None = Field(default=None, description="The four numbers of the preset custom, each 1 to 365.")
    sla_repository_overrides: dict[int, SlaDays] = Field(
        default={}, description="Days by severity of single repositories, by id."
    )
    sla_business_days: bool = Field(default=False, description="Count Monday to Friday only (UTC), without holidays.")
    sla_pause_while_ignored: bool = Field(
        default=True, description="Time during which a finding is ignored doesn't count; without it ignoring closes."
    )
    auto_sync_enabled: bool = Field(default=True, description="Sync by the clock; by hand it is always possible.")
    repository_selection_mode: Literal["all", "selected"] = Field(default="all", description="Which repositories are synced.")
    selected_repository_ids: list[int] = Field(
        default=[], description="Numeric ids of the selected repositories; with none, none is."
    )

    analysis_mode: Literal["auto", "shallow", "deep"] = Field(
        default="auto",
        description="Shallow: the alert's metadata alone. Deep: a session in the repository. Auto: the first decides about the second.",
    )
    triage_model: str | None = Field(
        default=None, max_length=200, description="Model of the shallow analysis; none is KILO_MODEL."
    )
    analysis_model: str | None = Field(
        default=None, max_length=200, description="Model of the deep analysis; none is KILO_MODEL."
    )
    auto_analysis_enabled: bool = Field(default=False, description="Analyse findings without being asked.")
    auto_analysis_min_severity: Threshold = Field(default="high", description="Only these and worse.")
    auto_analysis_include_existing: bool = Field(default=False, description="Also findings from before it was switched on.")
    auto_analysis_enabled_at: datetime | None = Field(
        default=None, description="When automatic analysis was switched on; kept by the platform."
    )

    auto_dismiss_enabled: bool = Field(default=False, description="Dismiss what the analysis says can be dismissed.")
    auto_dismiss_confidence: Literal["high", "medium", "low"] = Field(
        default="high", description="How sure a shallow analysis has to be."
    )

    remediation_model: str | None = Field(default=None, max_length=200, description="Model of remediations; none is KILO_MODEL.")
    auto_remediation_enabled: bool = Field(
        default=False, description="Open pull requests for what the analysis says can be fixed."
    )
    auto_remediation_min_severity: Threshold = Field(default="high", description="Only these and worse.")
    auto_remediation_include_existing: bool = Field(
        default=False, description="Also findings analysed before it was switched on."
    )
    auto_remediation_require_approval: bool = Field(default=True, description="A person starts each one after all.")
    auto_remediation_enabled_at: datetime | None = Field(
        default=None, description="When automatic remediation was switched on; kept by the platform."
    )
    remediation_registries: list[str] = Field(
        default=[], description="Package registries that a remediation may read, among those of KILO_REGISTRIES."
    )
    remediation_allow_protected: list[str] = Field(
        default=[], description="Patterns of protected paths that a remediation may change."
    )

    notice_recipients: list[Recipient] = Field(
        default=[],
        max_length=20,
        description='Who is told, at most 20: `{"kind": "email", "address": …}`, `{"kind": "slack", "channel": …}`,'
        ' `{"kind": "webhook", "url": …}`; a key that may only read is shown the kinds alone.',
    )
    new_finding_notices: bool = Field(default=False, description="Tell of findings that came after there was somebody to tell.")
    new_finding_notice_min_severity: Threshold = Field(default="high", description="Only these and worse.")
    sla_notices: bool = Field(default=True, description="Tell before a deadline and when it has passed.")
    sla_notice_min_severity: Threshold = Field(default="high", description="Only these and worse.")
    sla_notice_warning_days: int = Field(default=3, ge=1, le=365, description="Days before the deadline.")
    notices_enabled_at: datetime | None = Field(
        default=None, description="Since when there is somebody to tell; kept by the platform."
    )

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


def activated(before: SecurityConfig | None, wanted: SecurityConfig, now: datetime) -> SecurityConfig:
    """What is stored of wanted settings: the moments of switching on are the platform's, not the writer's (contract 4).

    Off to on stamps `now`; what stays on keeps its moment, and gets one when it has none.
    """
    moments: dict[str, datetime | None] = {}
    switches = {
        "auto_analysis": "auto_analysis_enabled",
        "auto_remediation": "auto_remediation_enabled",
        "notices": "notice_recipients",
    }
    for name, switch in switches.items():
        was_on = before is not None and bool(getattr(before, switch))
        since = getattr(before, f"{name}_enabled_at") if before is not None else None
        on = bool(getattr(wanted, switch))
        moments[f"{name}_enabled_at"] = (since or now if was_on else now) if on else since
    return wanted.model_copy(update=moments)


def reaches(severity: str, threshold: Threshold) -> bool:
    """Whether a severity is the threshold's or worse (contract 7.3); an unknown one only passes `all`."""
    return RANKS.get(severity, RANKS["low"]) <= RANKS.get(threshold, RANKS["low"])


def selects(config: SecurityConfig, repository_id: int) -> bool:
    """Whether a repository is synced. An empty selection selects nothing (contract 7.2.2)."""
    return config.repository_selection_mode == "all" or repository_id in config.selected_repository_ids
