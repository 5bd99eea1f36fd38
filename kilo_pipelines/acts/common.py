"""What the acts of a service share."""

from __future__ import annotations

from typing import Protocol
from uuid import UUID

from kilo_pipelines.services.security.config import SERVICE, SecurityConfig
from kilo_pipelines.store import Store


class Log(Protocol):
    """Where work outside of a run's own log tells what it did."""

    def info(self, msg: object, /) -> None: ...
    def warning(self, msg: object, /) -> None: ...
    def error(self, msg: object, /) -> None: ...


def enabled_config(store: Store, owner_id: UUID) -> SecurityConfig | None:
    """The owner's settings; None while the Security Agent is off."""
    setting = store.owners.config(owner_id, SERVICE)
    return SecurityConfig.model_validate(setting.config) if setting is not None and setting.enabled else None
