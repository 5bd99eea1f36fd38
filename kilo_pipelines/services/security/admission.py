"""Admission of `dependabot_alert`: a hint that brings an alert's new state at once; the schedule reads what is true."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Protocol

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.services.security.alerts import AlertFacts, BadAlert, parse_alert
from kilo_pipelines.services.security.config import SecurityConfig, selects


class Setting(Protocol):
    """The owner's settings of the Security Agent as they are stored."""

    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def enabled(self) -> bool: ...
    @property
    def action_required(self) -> dict[str, Any] | None: ...


def refusal(setting: Setting | None, repository_id: int, *, repository_known: bool, synced: bool) -> Reason | None:
    """Why an owner's alerts of a repository aren't taken; None when they are.

    `synced`: the owner's findings were read once, so that there is a policy for their deadlines; the first sync brings this alert too.
    """
    if setting is None or not setting.enabled:
        return Reason.SECURITY_DISABLED
    if setting.action_required is not None:
        return Reason.ACTION_REQUIRED
    if not repository_known:
        return Reason.REPOSITORY_UNKNOWN
    if not selects(SecurityConfig.model_validate(setting.config), repository_id):
        return Reason.REPOSITORY_NOT_SELECTED
    return None if synced else Reason.NOT_SYNCED_YET


def alert_of(payload: Mapping[str, Any]) -> AlertFacts | BadAlert:
    """The event's alert by the same rules as a sync's."""
    return parse_alert(payload["alert"])


def is_outdated(facts: AlertFacts, known_at: datetime | None) -> bool:
    """Whether a later state of the alert is known: events come late and in any order."""
    return known_at is not None and facts.updated_at < known_at
