"""Settings of every service and an owner's limits, and switching services on and off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ValidationError

from kilo_pipelines.acts import security
from kilo_pipelines.acts.people import By
from kilo_pipelines.core.limits import CAP, SPENDING_SETTINGS, Budget, LimitsConfig
from kilo_pipelines.core.limits import SETTINGS as LIMITS
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.refusal import Refusal
from kilo_pipelines.services.code_review.admission import SERVICE as CODE_REVIEW
from kilo_pipelines.services.code_review.config import CodeReviewConfig
from kilo_pipelines.services.permissions import may
from kilo_pipelines.services.security.config import SERVICE as SECURITY
from kilo_pipelines.services.security.config import SecurityConfig
from kilo_pipelines.store import StaleRevisionError, Store

# Services with settings, which are switched on and off; the Security Agent's further services share its own.
SERVICES = frozenset({CODE_REVIEW, SECURITY})
# What has settings, a revision and an audit event for each change.
CONFIGS: dict[str, type[BaseModel]] = {CODE_REVIEW: CodeReviewConfig, SECURITY: SecurityConfig, LIMITS: LimitsConfig, CAP: Budget}


@dataclass(frozen=True)
class Settings:
    """What is stored of a service's settings, with defaults for what isn't; `revision` 0: none saved yet."""

    config: dict[str, Any]
    enabled: bool
    revision: int


def settings_of(store: Store, service: str, *, by: By) -> Settings | Refusal:
    """The settings as the role sees them: of recipients of notices, whoever may not change them sees the kinds.

    `service` is one of `CONFIGS`. A refusal names the fields where what is stored can't be read, and the revision to mend it over.
    """
    stored = store.owners.config(by.owner_id, service)
    try:
        shown = CONFIGS[service].model_validate(stored.config if stored else {}).model_dump(mode="json")
    except ValidationError as failure:
        unreadable = Reason.LIMITS_INVALID if service in SPENDING_SETTINGS else Reason.SETTINGS_INVALID
        return Refusal(unreadable, f"at revision {stored.revision if stored else 0}: {security.fields_of(failure)}")
    if not may(by.role, "settings") and "notice_recipients" in shown:
        shown["notice_recipients"] = [{"kind": one["kind"]} for one in shown["notice_recipients"]]
    return Settings(shown, stored.enabled if stored else service in SPENDING_SETTINGS, stored.revision if stored else 0)


def save(
    store: Store, service: str, changes: Mapping[str, Any], *, expected_revision: int, by: By, now: datetime
) -> Settings | Refusal:
    """Lays changes over the settings at the revision that was read; on or off stays as it is."""
    if service == SECURITY:
        saved = security.save_settings(
            store,
            by.owner_id,
            changes,
            expected_revision=expected_revision,
            role=by.role,
            actor=by.actor,
            now=now,
            recompute=security.recompute_deadlines,
        )
        if isinstance(saved, Refusal):
            return saved
        return Settings(saved.config.model_dump(mode="json"), saved.enabled, saved.revision)
    # What an owner may spend at most is not for the owner to say.
    if not may(by.role, "platform" if service == CAP else "settings"):
        return Refusal(Reason.ROLE_NOT_ALLOWED, by.role)
    stored = store.owners.config(by.owner_id, service)
    # What is stored under a name that is none (any more) would be in the way of every save, and nobody could take it away.
    kept = {name: value for name, value in (stored.config if stored else {}).items() if name in CONFIGS[service].model_fields}
    try:
        wanted = CONFIGS[service].model_validate({**kept, **changes}).model_dump(mode="json")
    except ValidationError as failure:
        return Refusal(Reason.SETTINGS_INVALID, security.fields_of(failure))
    if not security.is_storable(wanted):
        return Refusal(Reason.SETTINGS_INVALID, "a text holds characters that no database takes")
    enabled = stored.enabled if stored else service in SPENDING_SETTINGS
    try:
        revision = store.owners.put_config(
            by.owner_id, service, wanted, enabled=enabled, expected_revision=expected_revision, actor=by.actor
        )
    except StaleRevisionError as failure:
        return Refusal(Reason.SETTINGS_STALE, str(failure))
    return Settings(wanted, enabled, revision)


def switch(store: Store, service: str, *, enabled: bool, by: By) -> Refusal | None:
    """Switches one of `SERVICES` on, which clears what it waited for, or off.

    Whether the provider lets the Security Agent read alerts is not asked here: the sync that follows at once asks, and tells.
    """
    if not may(by.role, "settings"):
        return Refusal(Reason.ROLE_NOT_ALLOWED, by.role)
    if enabled and service == SECURITY:
        done = security.enable(store, by.owner_id, role=by.role, actor=by.actor)
    else:
        done = store.owners.enable_service(by.owner_id, service, enabled, actor=by.actor)
    if isinstance(done, Refusal):
        return done
    return None if done else Refusal(Reason.SETTINGS_MISSING, service)
