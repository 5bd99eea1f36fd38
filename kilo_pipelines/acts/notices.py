"""What decides about a notice of a finding: asked when it is staged, when its item is claimed and right before it is sent."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from kilo_pipelines.acts.common import enabled_config
from kilo_pipelines.services.security import notices as rules
from kilo_pipelines.services.security.config import SecurityConfig
from kilo_pipelines.store import Store


def holds(config: SecurityConfig, kind: str, facts: Mapping[str, Any], now: datetime) -> bool:
    """Whether somebody is to be told this of a finding with these facts."""
    names = ("status", "watched", "severity", "due_at", "paused", "first_seen_at")
    return rules.is_wanted(config, kind, **{name: facts[name] for name in names}, now=now)


def wanted(
    store: Store, owner_id: UUID, finding_id: UUID, kind: str, now: datetime
) -> tuple[SecurityConfig, Mapping[str, Any]] | None:
    """The settings and the facts of a notice that holds now; None when it doesn't."""
    config, facts = enabled_config(store, owner_id), store.notices.facts(owner_id, finding_id)
    if config is None or facts is None or not holds(config, kind, facts, now):
        return None
    return config, facts
