"""Who is analysed: what automatic analysis is due to, and what a person may ask for (contract 2, 7.3, 10.4)."""

from __future__ import annotations

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.retry import CLASS_OF, FailureClass
from kilo_pipelines.services.permissions import may
from kilo_pipelines.services.security.config import RANKS, SecurityConfig, reaches

# Ends of an analysis that say nothing of the finding and pass: it is due again. What broke an agent twice is an answer of a kind, and
# what a person cancelled a person asks for again.
_PASSING = (FailureClass.DEPENDENCY, FailureClass.OPERATOR, FailureClass.ACTION_REQUIRED, FailureClass.STOPPED)
PASSING = frozenset(
    {reason for reason, kind in CLASS_OF.items() if kind in _PASSING} - {Reason.USER_CANCELLED}
    | {Reason.ANALYSIS_NOT_WANTED, Reason.FINDING_NOT_OPEN, Reason.SECURITY_DISABLED}
)


def severities(config: SecurityConfig) -> list[str]:
    """Severities that automatic analysis is due to; none while it is off or nobody knows since when it is on."""
    if not config.auto_analysis_enabled or config.auto_analysis_enabled_at is None:
        return []
    return [one for one in RANKS if reaches(one, config.auto_analysis_min_severity)]


def automatic(config: SecurityConfig, finding_status: str, severity: str) -> Reason | None:
    """Why a waiting automatic analysis isn't started after all; None when it is. Asked again at the claim."""
    if finding_status != "open":
        return Reason.FINDING_NOT_OPEN
    return None if severity in severities(config) else Reason.ANALYSIS_NOT_WANTED


def by_person(role: str, finding_status: str) -> Reason | None:
    """Why a person's analysis isn't started; its severity and the automatic switch don't matter."""
    if not may(role, "analyse"):
        return Reason.ROLE_NOT_ALLOWED
    return None if finding_status == "open" else Reason.FINDING_NOT_OPEN


def goes_deep(mode: str, config: SecurityConfig, *, needs_deep: bool) -> bool:
    """Whether the repository is read: a mode that was asked for wins over the owner's (contract 9)."""
    wanted = config.analysis_mode if mode == "auto" else mode
    return wanted == "deep" or (wanted == "auto" and needs_deep)
