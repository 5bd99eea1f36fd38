"""What every op that changes findings does alike: steps for the store, the deadline that follows, the policy in force."""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from kilo_pipelines.services.security import findings as lifecycle
from kilo_pipelines.services.security import sla
from kilo_pipelines.services.security.config import SecurityConfig, policy_of
from kilo_pipelines.store import FindingEventRow, NewFindingEvent, SlaRow, Store


def as_events(steps: Sequence[lifecycle.Step]) -> list[NewFindingEvent]:
    """Steps as the store takes them."""
    return [NewFindingEvent(**vars(one)) for one in steps]


def deadline(
    history: Sequence[FindingEventRow], added: Sequence[lifecycle.Step], policy: sla.SlaPolicy, repository_id: int, now: datetime
) -> SlaRow:
    """The deadline that follows from a finding's history and what is added to it."""
    steps = sla.steps_of([*history, *(one for one in added if one.kind is not None)])
    return SlaRow(**sla.kept(steps, policy, repository_id, now))


def policy_for(store: Store, owner_id: UUID, config: SecurityConfig, *, actor: str) -> sla.SlaPolicy:
    """The owner's policy, kept as a version when its settings say something new."""
    policy = policy_of(config)
    return policy.at_version(store.findings.keep_policy(owner_id, policy.stored(), actor=actor))
