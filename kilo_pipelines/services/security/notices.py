"""Notices: who is told what of a finding, once per kind, finding and person (contract 12)."""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID

from kilo_pipelines.core.effects import EffectIntent, EffectKind
from kilo_pipelines.core.text import clean
from kilo_pipelines.services.security.config import Email, Recipient, SecurityConfig, Slack, Webhook, reaches

SERVICE = "notice"
Kind = Literal["new_finding", "sla_warning", "sla_breach"]
_WORDS: dict[Kind, str] = {
    "new_finding": "New finding",
    "sla_warning": "Deadline is near",
    "sla_breach": "Deadline has passed",
}


def is_wanted(
    config: SecurityConfig,
    kind: str,
    *,
    status: str,
    watched: bool,
    severity: str,
    due_at: datetime | None,
    paused: bool,
    first_seen_at: datetime,
    now: datetime,
) -> bool:
    """Whether somebody is to be told this of a finding now. An unknown severity never qualifies."""
    if not config.notice_recipients or status != "open" or not watched or severity not in ("critical", "high", "medium", "low"):
        return False
    if kind == "new_finding":
        since = config.notices_enabled_at
        known = since is not None and first_seen_at >= since
        return config.new_finding_notices and known and reaches(severity, config.new_finding_notice_min_severity)
    if not config.sla_notices or due_at is None or paused or not reaches(severity, config.sla_notice_min_severity):
        return False
    if kind == "sla_breach":
        return now >= due_at
    return due_at - timedelta(days=config.sla_notice_warning_days) <= now < due_at


def subject_key(finding_id: UUID | str, kind: str) -> str:
    """The item that tells it: one at a time for each finding and kind."""
    return f"notice:{finding_id}:{kind}"


def message_keys(finding_id: UUID | str, kind: str, config: SecurityConfig) -> dict[str, Recipient]:
    """Who is told, by the key of the message: it makes a second one of this kind to this recipient impossible."""
    people = {hashlib.sha256(one.model_dump_json().encode()).hexdigest()[:16]: one for one in config.notice_recipients}
    return {f"{subject_key(finding_id, kind)}:{person}": one for person, one in people.items()}


def _line(text: str, limit: int = 160) -> str:
    """Text from outside on one line."""
    line = " ".join(clean(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _message(kind: Kind, finding: Any, repository: str, due_at: datetime | None) -> dict[str, Any]:
    """What is said, each part one line."""
    due = f"{due_at:%Y-%m-%d %H:%M} UTC" if due_at else None
    facts = {
        "severity": finding.severity,
        "package": _line(finding.package_name),
        "repository": _line(repository),
        "advisory": _line(" ".join(one for one in (finding.cve_id, finding.ghsa_id) if one)) or None,
        "fixed in": _line(finding.patched_version) if finding.patched_version else None,
        "due": due,
        "alert": finding.html_url,
    }
    return {
        "subject": f"{_WORDS[kind]}: {finding.severity} in {_line(finding.package_name, 80)} ({_line(repository, 80)})",
        "title": _line(finding.title),
        "facts": {name: value for name, value in facts.items() if value},
    }


def effects(
    item_id: UUID, finding: Any, kind: Kind, config: SecurityConfig, repository: str, due_at: datetime | None
) -> list[EffectIntent]:
    """One message for each recipient."""
    message = _message(kind, finding, repository, due_at)
    found = []
    for key, one in message_keys(finding.id, kind, config).items():
        to: dict[str, Any] = one.model_dump(exclude={"kind"})
        effect = {
            Email: EffectKind.NOTICE_EMAIL,
            Slack: EffectKind.NOTICE_SLACK,
            Webhook: EffectKind.NOTICE_WEBHOOK,
        }[type(one)]
        payload = {"finding": str(finding.id), "notice": kind, "message": message, **to}
        found.append(EffectIntent(kind=effect, intent_key=key, subject_key=key, payload=payload))
    return found
