"""Connecting an installation to an owner, after the provider's proof (threats, rule 16); and what is connected where."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.services.code_review.admission import SERVICE as CODE_REVIEW
from kilo_pipelines.services.code_review.config import CodeReviewConfig
from kilo_pipelines.services.security.config import SERVICE as SECURITY
from kilo_pipelines.services.security.config import SecurityConfig
from kilo_pipelines.store import AmbiguousInstallationError, Repository, Store


@dataclass(frozen=True)
class Connected:
    """An installation that is an owner's now."""

    owner_id: UUID
    owner_name: str
    created: bool
    repositories: int


def claim_installation(
    store: Store,
    *,
    owner_id: UUID | None,
    installation_id: int,
    account: str,
    organization: bool,
    repositories: list[Repository],
    actor: str,
) -> Connected | Reason:
    """Connects a proven installation: to the owner that was named, else to the one that has it already, else to a new one.

    A name proves nothing: an owner that bears the account's name is not taken for it. `installation_taken` when another owner holds
    the installation, and when two claim it at once, for both. A new owner's services are off until somebody turns them on.
    """
    try:
        holder = store.owners.by_installation("github", installation_id)
    except AmbiguousInstallationError:
        return Reason.INTEGRATION_AMBIGUOUS
    if holder is not None and owner_id not in (None, holder.owner_id):
        return Reason.INSTALLATION_TAKEN
    target = owner_id or (holder.owner_id if holder is not None else None)
    known = next((one for one in store.owners.all() if one.id == target), None)
    if target is not None and known is None:
        return Reason.OWNER_NOT_NAMED
    owner = known or store.owners.create("organization" if organization else "user", account)
    made = store.owners.connect(
        owner.id, provider="github", installation_id=installation_id, account=account, repositories=repositories, actor=actor
    )
    try:
        store.owners.by_installation("github", installation_id)
    except AmbiguousInstallationError:
        store.owners.disconnect(owner.id, made)
        return Reason.INSTALLATION_TAKEN
    for service, config in ((CODE_REVIEW, CodeReviewConfig()), (SECURITY, SecurityConfig())):
        if store.owners.config(owner.id, service) is None:
            wanted = config.model_dump(mode="json")
            store.owners.put_config(owner.id, service, wanted, enabled=False, expected_revision=0, actor=actor)
    return Connected(owner.id, owner.name, known is None, len(repositories))


def services_by_installation(store: Store) -> dict[int, tuple[str, frozenset[str]]]:
    """Owner's name and services that are on, for every connected installation of GitHub."""
    found: dict[int, tuple[str, frozenset[str]]] = {}
    for owner in store.owners.all():
        on = frozenset(one["service"] for one in store.owners.services(owner.id) if one["enabled"])
        for one in store.owners.integrations(owner.id):
            if one["provider"] == "github" and not one["disconnected"]:
                found[one["installation_id"]] = (owner.name, on)
    return found
