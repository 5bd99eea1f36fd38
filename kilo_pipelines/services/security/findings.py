"""What a finding's status is, what a change at the source means for its history, and which duplicates speak for each other.

What the source says and what was decided here are kept apart; the effective status follows from both (contract, "Beyond the
reference", 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol
from urllib.parse import quote
from uuid import UUID

from kilo_pipelines.services.security.alerts import AlertFacts, snapshot


class Finding(Protocol):
    """A stored finding, as far as these rules look at it."""

    @property
    def id(self) -> UUID: ...
    @property
    def source_id(self) -> str: ...
    @property
    def severity(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def upstream_state(self) -> str: ...
    @property
    def disposition(self) -> str | None: ...
    @property
    def canonical_id(self) -> UUID | None: ...
    @property
    def fixed_at(self) -> datetime | None: ...
    @property
    def ghsa_id(self) -> str | None: ...
    @property
    def package_name(self) -> str: ...
    @property
    def manifest_path(self) -> str: ...


class PastStep(Protocol):
    """A step of a finding's stored history."""

    @property
    def at(self) -> datetime: ...
    @property
    def kind(self) -> str: ...


# What begins time that counts; every other kind but a severity ends it.
_OPENING = ("opened", "reopened")


@dataclass(frozen=True)
class Step:
    """One step of history with its audit event; a `kind` of None is audit only. The same `event_key` counts once."""

    at: datetime
    kind: str | None
    severity: str | None
    reconstructed: bool
    event_key: str
    action: str
    data: dict[str, Any]


def effective_status(upstream_state: str, disposition: str | None) -> str:
    """open, fixed or ignored: fixed upstream wins, else either side may ignore."""
    if upstream_state == "fixed":
        return "fixed"
    return "ignored" if upstream_state != "open" or disposition is not None else "open"


def event_key(owner_id: UUID, finding_id: UUID, action: str, *discriminator: object) -> str:
    """The idempotent key of a finding's event (contract 14)."""
    parts = [f"owner:{owner_id}", str(finding_id), action, *(str(one) for one in discriminator)]
    return "security_finding_audit:v1:" + ":".join(quote(one, safe="") for one in parts)


def reopened_by_person(before: Finding | None, after: AlertFacts) -> bool:
    """Somebody opened at the source again what was dismissed there: then our own dismissal is over, too."""
    return (
        before is not None
        and before.disposition == "dismissed"
        and before.upstream_state in ("dismissed", "auto_dismissed")
        and after.upstream_state == "open"
    )


def transitions(
    before: Finding | None,
    after: AlertFacts,
    *,
    owner_id: UUID,
    finding_id: UUID,
    first_sync: bool,
    history: Sequence[PastStep],
    seen: datetime,
) -> list[Step]:
    """Steps that lead from what is known of an alert to what the source says now; none for a change of mere words.

    `seen`: when we saw this change. It is part of each key, so that what changes there and back again counts each time.
    """

    def step(kind: str, action: str, at: datetime, *discriminator: object, **data: Any) -> Step:
        return Step(
            at=at,
            kind=kind,
            severity=after.severity if kind in ("opened", "severity") else None,
            reconstructed=first_sync,
            event_key=event_key(owner_id, finding_id, action, *discriminator),
            action=f"security.finding.{action}",
            data={"finding": snapshot(after), "source_occurred_at": at.isoformat(), **data},
        )

    def moved(old: str, new: str) -> Step:
        kind = {"open": "reopened", "fixed": "fixed", "ignored": "ignored"}[new]
        action = {"dismissed": "dismissed", "auto_dismissed": "auto_dismissed"}.get(after.upstream_state, "status_change")
        at = _not_before(kind, _moment(after), [*history, *found])
        return step(kind, action, at, at.isoformat(), old, new, seen.isoformat(), before=old, after=new)

    found: list[Step] = []
    if before is None:
        found.append(step("opened", "created", after.created_at, after.created_at.isoformat()))
        old_status = "open"
        disposition = None
    else:
        old_status = before.status
        disposition = None if reopened_by_person(before, after) else before.disposition
        if before.severity != after.severity:
            # An advisory's new severity doesn't touch the alert's own date: the new days count from when it was seen.
            at = max([seen, *(one.at for one in history)])
            found.append(
                step(
                    "severity",
                    "severity_changed",
                    at,
                    seen.isoformat(),
                    before.severity,
                    after.severity,
                    before=before.severity,
                    after=after.severity,
                )
            )
    status = effective_status(after.upstream_state, disposition)
    if status != old_status:
        found.append(moved(old_status, status))
    elif before is not None and status == "fixed" and before.fixed_at and after.fixed_at and after.fixed_at > before.fixed_at:
        # Fixed anew: nobody saw it open, and its second fix is the only moment that is known of it.
        found.append(moved("fixed", "open"))
        found.append(moved("open", "fixed"))
    return found


def _not_before(kind: str, at: datetime, history: Iterable[Any]) -> datetime:
    """The moment of a step, after the newest one that it answers: else a source with odd dates would open what it closes."""
    answered: list[datetime] = [
        one.at for one in history if one.kind != "severity" and (one.kind in _OPENING) != (kind in _OPENING)
    ]
    return max([at, *answered])


def _moment(facts: AlertFacts) -> datetime:
    """When the present state began, by the source (contract 14)."""
    dates = {"fixed": facts.fixed_at, "dismissed": facts.dismissed_at, "auto_dismissed": facts.auto_dismissed_at}
    return dates.get(facts.upstream_state) or facts.updated_at


def decided(
    finding: Any, kind: str, action: str, *, owner_id: UUID, at: datetime, discriminator: object, data: dict[str, Any]
) -> Step:
    """A step that was decided here: ignored or reopened."""
    return Step(
        at=at,
        kind=kind,
        severity=None,
        reconstructed=False,
        event_key=event_key(owner_id, finding.id, action, discriminator),
        action=f"security.finding.{action}",
        data={"finding": snapshot(finding), **data},
    )


def supersessions(findings: Iterable[Finding]) -> tuple[dict[UUID, UUID], set[UUID]]:
    """Which open findings of a repository another one speaks for (id -> canonical id), and which superseded ones are open again.

    Alerts of one advisory, package and manifest are one problem; the newest one (highest number) speaks for them while it is open.
    """
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for one in findings:
        if one.upstream_state == "open" and one.ghsa_id and one.disposition != "dismissed":
            groups.setdefault((one.ghsa_id, one.package_name, one.manifest_path), []).append(one)
    old: dict[UUID, UUID] = {}
    back: set[UUID] = set()
    for group in groups.values():
        canonical = max(group, key=lambda one: (int(one.source_id) if one.source_id.isdecimal() else 0, one.source_id))
        if canonical.disposition == "superseded":
            back.add(canonical.id)
        old |= {one.id: canonical.id for one in group if one is not canonical and one.canonical_id != canonical.id}
    return old, back
