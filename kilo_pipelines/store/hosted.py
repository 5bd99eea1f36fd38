"""Hosted sessions: one step at a time under the session's own fence. No run waits for a hosted agent.

A step claims the session (the fence rises), does what is next, and *parks* it: the session stays `running`, and `look_at` says
when the next step is due. A callback is a hint that makes it due now. After the session's end, whatever ended it, one more kind
of step closes what is left at the service (docs/cloud-agent.md has the states).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store import system_statements as system
from kilo_pipelines.store.crypto import Cipher
from kilo_pipelines.store.database import Database, changed, count_late_write, one, rows
from kilo_pipelines.store.queue import session_offer
from kilo_pipelines.store.rows import Offer, Refused, SessionClaim

# A lost offer costs at most this; as of items (docs/decisions/0008).
OFFER_SECONDS = 20
# Two steps that close the same session do no harm: interrupt and delete are idempotent at the service.
CLOSING_SECONDS = 60
# Columns that a step may write, and those of them that are JSON.
_COLUMNS = frozenset({"state", "plan", "message_id", "part", "repaired", "results", "tries", "reason", "initiated_at"})
_JSON = frozenset({"plan", "results"})


@dataclass(frozen=True)
class HostedClaim:
    """A hosted session in this step's hands. `ended`: only what is left at the service is to be closed."""

    session: SessionClaim
    ended: bool
    now: datetime
    state: str
    plan: dict[str, Any] | None
    cloud_session_id: str | None
    message_id: str | None
    part: int
    repaired: bool
    results: list[dict[str, Any]]
    tries: int
    closings: int
    initiated_at: datetime | None
    interrupt_requested: str | None
    installation_id: int
    repository_id: int


class Hosted:
    """Hosted sessions of all owners."""

    def __init__(self, database: Database, clock: Clock, cipher: Cipher) -> None:
        self._database = database
        self._clock = clock
        self._cipher = cipher

    def offers(self, limit: int) -> list[Offer]:
        """Steps that are due; a run each. Those of stopped or ended sessions are offered whatever is paused."""
        now = self._clock.now()
        until = now + timedelta(seconds=OFFER_SECONDS)
        with self._database.system() as connection:
            found = rows(connection, system.OFFER_HOSTED.sql, now=now, until=until, limit=limit)
        return [session_offer(row) for row in found]

    def claim(self, session_id: UUID, *, run_id: str, lease_s: float) -> HostedClaim | Refused:
        """Takes the session for one step: a higher fence and a lease, or, when it has ended, the closing of what is left."""
        now = self._clock.now()
        until = now + timedelta(seconds=lease_s)
        with self._database.system() as connection:
            known = one(connection, system.SESSION_OWNER.sql, id=session_id)
        if known is None:
            return Refused(Reason.MOVED_ON, "unknown")
        owner_id = known["owner_id"]
        with self._database.owner(owner_id) as connection:
            row = one(
                connection,
                "select s.*, h.state as hosted_state, h.plan, h.cloud_session_id, h.message_id, h.part, h.repaired, h.results, h.tries, h.closings,"
                " h.initiated_at, h.look_at, i.repository_id, i.service, g.installation_id"
                " from sessions s join hosted_sessions h on h.owner_id = s.owner_id and h.session_id = s.id"
                " join work_items i on i.owner_id = s.owner_id and i.id = s.item_id"
                " join repositories r on r.owner_id = i.owner_id and r.external_id = i.repository_id"
                " join integrations g on g.owner_id = r.owner_id and g.id = r.integration_id"
                " where s.owner_id = :owner and s.id = :id for update of s, h",
                owner=owner_id,
                id=session_id,
            )
            if row is None or row["hosted_state"] == "closed":
                return Refused(Reason.MOVED_ON, "unknown" if row is None else row["state"], session_id)
            ended = row["ended_at"] is not None
            waits = row["look_at"] is not None and row["look_at"] > now
            if ended and waits:
                return Refused(Reason.MOVED_ON, row["state"], session_id)
            if row["state"] == "running" and row["look_at"] is None:  # another step has it
                return Refused(Reason.MOVED_ON, row["state"], session_id)
            if row["state"] == "queued":
                blocked = one(
                    connection,
                    "select kind from switches where scope in ('all', :service, :owner) limit 1",
                    service=f"service:{row['service']}",
                    owner=f"owner:{owner_id}",
                )
                if blocked is not None:
                    return Refused(Reason.KILL_SWITCH if blocked["kind"] == "kill" else Reason.PAUSED, "queued", session_id)
            if not ended:
                changed(
                    connection,
                    "update sessions set state = 'running', fence = fence + 1, launches = launches + (state = 'queued')::int, run_id = :run,"
                    " lease_until = :until, started_at = coalesce(started_at, :now)"
                    " where owner_id = :owner and id = :id and state in ('queued', 'running')",
                    owner=owner_id,
                    id=session_id,
                    run=run_id,
                    until=until,
                    now=now,
                )
            changed(
                connection,
                "update hosted_sessions set looked_at = :now, look_at = :busy, offer_until = null"
                " where owner_id = :owner and session_id = :id",
                owner=owner_id,
                id=session_id,
                now=now,
                busy=now + timedelta(seconds=CLOSING_SECONDS) if ended else None,
            )
        session = SessionClaim(
            owner_id=owner_id,
            session_id=session_id,
            item_id=row["item_id"],
            fence=row["fence"] if ended else row["fence"] + 1,
            spec=row["spec"],
            callback_token=self._cipher.open(bytes(row["callback_token"]), f"callback:{session_id}"),
            trace=row["trace"],
        )
        copied = (
            "plan",
            "cloud_session_id",
            "message_id",
            "part",
            "repaired",
            "results",
            "tries",
            "closings",
            "initiated_at",
            "interrupt_requested",
            "installation_id",
            "repository_id",
        )
        return HostedClaim(
            session=session, ended=ended, now=now, state=row["hosted_state"], **{name: row[name] for name in copied}
        )

    def keep(self, claim: HostedClaim, **columns: Any) -> bool:
        """Writes what a step found out, guarded by its fence; False for a late writer: nothing was changed."""
        return self._write(claim, "keep", columns)

    def keep_ids(self, claim: HostedClaim, cloud_session_id: str, kilo_session_id: str | None) -> bool:
        """Stores the service's ids where none is stored, guarded by the fence. False: a late writer, or another id is there."""
        more = {"cloud_session_id": cloud_session_id, "kilo_session_id": kilo_session_id}
        return self._write(claim, "ids", {"state": "prepared", "tries": 0}, more, "and cloud_session_id is null")

    def park(self, claim: HostedClaim, wait: timedelta, **columns: Any) -> bool:
        """Ends the step: the session stays running, the next step is due after `wait`. False for a late writer.

        The lease of a parked session is the session's own deadline: recovery then takes it back like a dead worker's.
        """
        more = {"look_at": self._clock.now() + wait, "offer_until": None}
        return self._write(claim, "park", columns, more, parked=True)

    def close(self, claim: HostedClaim, reason: str | None = None) -> None:
        """Nothing is left at the service, or it could not be told (`reason`): what was sent is forgotten."""
        self._after_the_end(
            claim, "state = 'closed', plan = null, reason = coalesce(:reason, reason), closed_at = :now", reason=reason
        )

    def put_off(self, claim: HostedClaim, wait: timedelta) -> None:
        """Closing failed: tried again after `wait`."""
        self._after_the_end(claim, "closings = closings + 1, look_at = :after", after=self._clock.now() + wait)

    def get(self, session_id: UUID) -> dict[str, Any] | None:
        """What is known of a hosted session, without what was sent; None when it is none."""
        with self._database.system() as connection:
            known = one(connection, system.SESSION_OWNER.sql, id=session_id)
        if known is None:
            return None
        with self._database.owner(known["owner_id"]) as connection:
            row = one(
                connection,
                "select state, cloud_session_id, kilo_session_id, message_id, part, repaired, tries, reason, look_at, initiated_at, closed_at"
                " from hosted_sessions where owner_id = :owner and session_id = :id",
                owner=known["owner_id"],
                id=session_id,
            )
        return dict(row) if row else None

    def _write(
        self,
        claim: HostedClaim,
        name: str,
        columns: Mapping[str, Any],
        more: Mapping[str, Any] | None = None,
        guard: str = "",
        *,
        parked: bool = False,
    ) -> bool:
        if not columns.keys() <= _COLUMNS:
            raise ValueError(f"no columns of a step: {sorted(columns.keys() - _COLUMNS)}")
        values = {key: json.dumps(value) if key in _JSON else value for key, value in columns.items()} | dict(more or {})
        sets = [f"{key} = cast(:{key} as jsonb)" if key in _JSON else f"{key} = :{key}" for key in values]
        with self._database.owner(claim.session.owner_id) as connection:
            held = changed(
                connection,
                # Locks the session's row, so that no other step takes it between this look and the write.
                "update sessions set lease_until = case when :parked then deadline else lease_until end"
                " where owner_id = :owner and id = :id and state = 'running' and fence = :fence",
                owner=claim.session.owner_id,
                id=claim.session.session_id,
                fence=claim.session.fence,
                parked=parked,
            )
            done = (
                held
                and changed(
                    connection,
                    f"update hosted_sessions set {', '.join(sets)} where owner_id = :owner and session_id = :id {guard}",  # names of ours
                    owner=claim.session.owner_id,
                    id=claim.session.session_id,
                    **values,
                )
            )
            if not done:
                count_late_write(connection, f"hosted_{name}")
        return bool(done)

    def _after_the_end(self, claim: HostedClaim, sets: str, **values: Any) -> None:
        with self._database.owner(claim.session.owner_id) as connection:
            changed(
                connection,
                f"update hosted_sessions set {sets} where owner_id = :owner and session_id = :id and state <> 'closed'"
                " and exists (select 1 from sessions s where s.owner_id = :owner and s.id = :id and s.ended_at is not null)",
                owner=claim.session.owner_id,
                id=claim.session.session_id,
                **({"now": self._clock.now()} | values if ":now" in sets else values),
            )
