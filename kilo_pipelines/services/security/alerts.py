"""One Dependabot alert as GitHub tells it, validated by itself: a bad one is set aside and never stops its neighbours.

Shape: GitHub REST API, "Dependabot alerts"; contract sections 5 and 6.1.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.text import clean, storable

# Descriptions are for people and the model, which sees less; advisories of real life stay far below.
DESCRIPTION_LIMIT = 20_000
CUT = "\n\n(shortened)"
_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,4}")
_URL = re.compile(r"https?://[^\s<>\"'\\^`{|}\x00-\x20\x7f\ud800-\udfff]{1,2000}")


def _shorten(text: str) -> str:
    text = clean(text[: DESCRIPTION_LIMIT * 2])
    return text if len(text) <= DESCRIPTION_LIMIT else text[: DESCRIPTION_LIMIT - len(CUT)] + CUT


# No alert is of another time, and whatever is counted from these (budgets, pauses, tables in nanoseconds) stays within a calendar.
_FIRST, _LAST = datetime(1970, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
# Ecosystem, name and path stand in one row of an index, which PostgreSQL lets have 2,704 bytes.
NAME_BYTES = 400
PATH_BYTES = 1_600


def _utc(moment: datetime) -> datetime:
    if not _FIRST <= moment < _LAST:
        raise ValueError("no date of an alert")
    return moment.astimezone(UTC)


def _name(most: int) -> AfterValidator:
    def check(text: str) -> str:
        kept = storable(clean(text))
        if len(kept.encode()) > most:
            raise ValueError(f"more than {most} bytes")
        return kept

    return AfterValidator(check)


Line = Annotated[str, Field(strict=True, max_length=65_536), AfterValidator(lambda text: storable(clean(text))[:500])]
Name = Annotated[str, Field(strict=True, min_length=1, max_length=1_000), _name(NAME_BYTES)]
FilePath = Annotated[str, Field(strict=True, min_length=1, max_length=4_096), _name(PATH_BYTES)]
Body = Annotated[str, Field(strict=True), AfterValidator(lambda text: storable(_shorten(text)))]
Moment = Annotated[AwareDatetime, BeforeValidator(lambda value: value if isinstance(value, str) else None), AfterValidator(_utc)]
Severity = Literal["critical", "high", "medium", "low"]


class _Shape(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Package(_Shape):
    ecosystem: Name
    name: Name


class _Dependency(_Shape):
    package: _Package
    manifest_path: FilePath
    scope: Literal["development", "runtime"] | None = None


class _Weakness(_Shape):
    cwe_id: Name


class _Score(_Shape):
    score: Annotated[float, Field(ge=0, le=10)] | None = None


class _Advisory(_Shape):
    ghsa_id: Name | None = None
    cve_id: Name | None = None
    summary: Line
    description: Body = ""
    severity: Severity
    cvss: _Score | None = None
    cwes: list[_Weakness] | None = Field(default=None, max_length=100)


class _Patched(_Shape):
    identifier: Name


class _Vulnerability(_Shape):
    vulnerable_version_range: Line | None = None
    first_patched_version: _Patched | None = None


class _Person(_Shape):
    login: Name


class _Alert(_Shape):
    number: Annotated[int, Field(strict=True, gt=0, lt=2**31)]
    state: Literal["open", "fixed", "dismissed", "auto_dismissed"]
    dependency: _Dependency
    security_advisory: _Advisory
    security_vulnerability: _Vulnerability
    html_url: object = None
    created_at: Moment
    updated_at: Moment
    dismissed_at: Moment | None = None
    dismissed_by: _Person | None = None
    dismissed_reason: Name | None = None
    dismissed_comment: Body | None = None
    fixed_at: Moment | None = None
    auto_dismissed_at: Moment | None = None


@dataclass(frozen=True)
class AlertFacts:
    """What the source says of one alert; times are UTC."""

    source_id: str
    severity: Severity
    ghsa_id: str | None
    cve_id: str | None
    title: str
    description: str
    package_name: str
    package_ecosystem: str
    manifest_path: str
    dependency_scope: str | None
    vulnerable_version_range: str | None
    patched_version: str | None
    cwe_ids: tuple[str, ...]
    cvss_score: float | None
    html_url: str | None
    upstream_state: Literal["open", "fixed", "dismissed", "auto_dismissed"]
    upstream_reason: str | None
    upstream_by: str | None
    upstream_comment: str | None
    created_at: datetime
    updated_at: datetime
    fixed_at: datetime | None
    dismissed_at: datetime | None
    auto_dismissed_at: datetime | None

    def fingerprint(self) -> str:
        """SHA-256 (hex) over all facts: equal for an unchanged alert."""
        return hashlib.sha256(json.dumps(list(vars(self).values()), default=str).encode()).hexdigest()


@dataclass(frozen=True)
class BadAlert:
    """An alert that can't be taken: its number or a name for it, and which fields are wrong (names, never values)."""

    source_id: str
    reason: Reason
    detail: str


def parse_alert(raw: object) -> AlertFacts | BadAlert:
    """The facts of one alert, or why it can't be taken. Never raises."""
    try:
        alert = _Alert.model_validate(raw)
    except ValidationError as failure:
        number = raw.get("number") if isinstance(raw, dict) else None
        known = str(number) if type(number) is int and 0 < number < 2**31 else _digest(raw)
        fields = sorted(
            {".".join(str(part) for part in error["loc"]) or "alert" for error in failure.errors(include_input=False)}
        )
        return BadAlert(known, Reason.ALERT_MALFORMED, ", ".join(fields)[:300])
    advisory, vulnerability, dependency = alert.security_advisory, alert.security_vulnerability, alert.dependency
    return AlertFacts(
        source_id=str(alert.number),
        severity=advisory.severity,
        ghsa_id=advisory.ghsa_id,
        cve_id=advisory.cve_id,
        title=advisory.summary,
        description=advisory.description,
        package_name=dependency.package.name,
        package_ecosystem=dependency.package.ecosystem,
        manifest_path=dependency.manifest_path,
        dependency_scope=dependency.scope,
        vulnerable_version_range=vulnerability.vulnerable_version_range,
        patched_version=vulnerability.first_patched_version.identifier if vulnerability.first_patched_version else None,
        cwe_ids=tuple(one.cwe_id for one in advisory.cwes or ()),
        cvss_score=advisory.cvss.score if advisory.cvss else None,
        html_url=alert.html_url if isinstance(alert.html_url, str) and _URL.fullmatch(alert.html_url) else None,
        upstream_state=alert.state,
        upstream_reason=alert.dismissed_reason,
        upstream_by=alert.dismissed_by.login if alert.dismissed_by else None,
        upstream_comment=alert.dismissed_comment,
        created_at=alert.created_at,
        updated_at=alert.updated_at,
        fixed_at=alert.fixed_at,
        dismissed_at=alert.dismissed_at,
        auto_dismissed_at=alert.auto_dismissed_at,
    )


def _digest(raw: object) -> str:
    """What an alert without a number is called: the same one the same in every sync."""
    try:
        text = json.dumps(raw, sort_keys=True, default=str)
    except RecursionError:  # nested as deep as it could be read
        text = "nested"
    return f"?{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def without_addresses(text: str) -> str:
    """The text with e-mail addresses blacked out (contract 14)."""
    return _EMAIL.sub("[redacted-email]", text)


def snapshot(facts: Any) -> dict[str, str | float | None]:
    """What an audit event keeps of a finding (contract 14): no description, no person, e-mail addresses blacked out."""
    return {
        "source_id": facts.source_id,
        "severity": facts.severity,
        "package": facts.package_name,
        "ecosystem": facts.package_ecosystem,
        "manifest": facts.manifest_path,
        "title": without_addresses(facts.title),
        "cve": facts.cve_id,
        "ghsa": facts.ghsa_id,
        "upstream_state": facts.upstream_state,
        "url": facts.html_url,
    }
