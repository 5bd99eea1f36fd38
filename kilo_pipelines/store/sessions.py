"""Sessions: launch, claim, lease, outcome. A session outlives its run; its row is the truth, runs and callbacks are news."""

from __future__ import annotations

import hashlib
import json
import secrets
import socket
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.effects import EffectIntent
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.receipt import Receipt, violation
from kilo_pipelines.core.redact import redact
from kilo_pipelines.store import system_statements as system
from kilo_pipelines.store.crypto import Cipher
from kilo_pipelines.store.database import Database, changed, count_late_write, notify, one, rows
from kilo_pipelines.store.queue import intend, set_details
from kilo_pipelines.store.recovery import MAX_LAUNCHES
from kilo_pipelines.store.rows import Claimed, Refused, SessionClaim, SessionRow
from kilo_pipelines.telemetry import traces

# A session waits for a free place on the host at most this long before its item is tried as failed: a host that has no
# capacity for a working day has an operator's problem.
QUEUE_SECONDS = 8 * 3600
# A silent host's places are forgotten after a day: a restart would have brought it back.
HOST_GONE = timedelta(days=1)
# Callbacks may come late by their own retries (60+120+240+480 s, contract A9), never later than this.
CALLBACK_GRACE_SECONDS = 3600
# The agent whose sessions take no place on a host (store/hosted.py).
HOSTED = "hosted"


class Sessions:
    """Sessions of all owners."""

    def __init__(self, database: Database, clock: Clock, cipher: Cipher) -> None:
        self._database = database
        self._clock = clock
        self._cipher = cipher

    def _owner(self, session_id: UUID) -> UUID | None:
        with self._database.system() as connection:
            row = one(connection, system.SESSION_OWNER.sql, id=session_id)
        return row["owner_id"] if row else None

    def launch(
        self,
        claim: Claimed,
        *,
        session_id: UUID,
        spec: dict[str, Any],
        head: dict[str, Any],
        effects: list[EffectIntent],
        cap_s: float,
        receipt: Receipt,
    ) -> bool:
        """Prepares and initiates a session for a claimed item, once, fenced: session row, item running, effects intended.

        `head` are the freshly read columns of the service's own row. Returns False for a late writer: nothing was changed.
        ValueError for capabilities that no session may have: whoever launches has refused them before.
        """
        if (broken := violation(receipt)) is not None:
            raise ValueError(f"no session may have these capabilities: {broken}")
        now = self._clock.now()
        deadline = now + timedelta(seconds=QUEUE_SECONDS + cap_s)
        token = secrets.token_urlsafe(32)
        with self._database.owner(claim.owner_id) as connection:
            done = changed(
                connection,
                "update work_items set state = 'running', session_id = :session, lease_until = null, deadline = :deadline, updated_at = :now"
                " where owner_id = :owner and id = :item and state = 'starting' and fence = :fence and session_id is null",
                owner=claim.owner_id,
                item=claim.item_id,
                fence=claim.fence,
                session=session_id,
                deadline=deadline + timedelta(seconds=CALLBACK_GRACE_SECONDS),
                now=now,
            )
            if not done:
                count_late_write(connection, "launch")
                return False
            changed(
                connection,
                "insert into sessions (owner_id, id, item_id, attempt, item_fence, spec, receipt, callback_token, deadline, created_at, trace)"
                " values (:owner, :id, :item, :attempt, :fence, cast(:spec as jsonb), cast(:receipt as jsonb), :token, :deadline, :now, :trace)",
                owner=claim.owner_id,
                id=session_id,
                item=claim.item_id,
                attempt=claim.attempt,
                fence=claim.fence,
                spec=json.dumps(spec),
                receipt=receipt.model_dump_json(),
                token=self._cipher.seal(token, f"callback:{session_id}"),
                deadline=deadline,
                now=now,
                trace=traces.here(),
            )
            if spec.get("agent") == HOSTED:
                changed(
                    connection,
                    "insert into hosted_sessions (owner_id, session_id, created_at) values (:owner, :session, :now)",
                    owner=claim.owner_id,
                    session=session_id,
                    now=now,
                )
            changed(
                connection,
                "insert into callback_tokens (owner_id, session_id, token_hash, expires_at) values (:owner, :session, :hash, :expires)",
                owner=claim.owner_id,
                session=session_id,
                hash=hashlib.sha256(token.encode()).digest(),
                expires=deadline + timedelta(seconds=CALLBACK_GRACE_SECONDS),
            )
            changed(
                connection,
                "update attempts set session_id = :session where owner_id = :owner and item_id = :item and number = :number",
                owner=claim.owner_id,
                item=claim.item_id,
                number=claim.attempt,
                session=session_id,
            )
            set_details(connection, claim.owner_id, claim.item_id, claim.service, head)
            intend(connection, claim.owner_id, claim.item_id, effects, now)
            notify(connection, f"session:{session_id}")
        return True

    def ensure_capacity(self, places: int) -> None:
        """Says that this host is there, with so many places; surplus ones are removed when they are free, and hosts long gone forgotten.

        With 0 places the host takes leave.
        """
        host, now = socket.gethostname(), self._clock.now()
        with self._database.system() as connection:
            changed(connection, system.ADD_CAPACITY.sql, host=host, places=places, now=now)
            changed(connection, system.DROP_CAPACITY.sql, host=host, places=places)
            # A surplus place that a session still holds is offered no more, and forgotten when its lease is over.
            changed(connection, system.LEAVE_CAPACITY.sql, host=host, places=places)
            changed(connection, system.FORGET_HOSTS.sql, gone=now - HOST_GONE, now=now)

    def claim(self, session_id: UUID, *, run_id: str, lease_s: float) -> SessionClaim | Refused:
        """Takes a queued session with a place on this host: higher fence, lease; one transaction."""
        now = self._clock.now()
        until = now + timedelta(seconds=lease_s)
        with self._database.system() as connection:
            row = one(connection, system.LOCK_SESSION.sql, id=session_id)
            if row is None:
                return Refused(Reason.MOVED_ON, "unknown")
            if row["state"] != "queued" or row["interrupt_requested"]:
                return Refused(Reason.MOVED_ON, row["state"], session_id)
            if row["blocked"]:
                self._defer(connection, row, until)
                return Refused(Reason.KILL_SWITCH if row["blocked"] == "kill" else Reason.PAUSED, "queued", session_id)
            if not changed(
                connection, system.CLAIM_CAPACITY.sql, session=session_id, until=until, now=now, host=socket.gethostname()
            ):
                self._defer(connection, row, until)
                return Refused(Reason.NO_CAPACITY, "queued", session_id)
            changed(
                connection,
                system.START_SESSION.sql,
                owner=row["owner_id"],
                id=session_id,
                run=run_id,
                until=until,
                now=now,
            )
        return SessionClaim(
            owner_id=row["owner_id"],
            session_id=session_id,
            item_id=row["item_id"],
            fence=row["fence"] + 1,
            spec=row["spec"],
            callback_token=self._cipher.open(bytes(row["callback_token"]), f"callback:{session_id}"),
            accepted={"status": "completed", "result": row["result"], "evidence": row["evidence"]} if row["result"] else None,
            trace=row["trace"],
        )

    @staticmethod
    def _defer(connection: Connection, session: Any, until: datetime) -> None:
        changed(connection, system.DEFER_SESSION.sql, owner=session["owner_id"], id=session["id"], after=until)

    def beat(self, claim: SessionClaim, lease_s: float) -> str:
        """Extends the lease: `ok`, `cancel` (interrupt requested), `lost` (somebody else's by now) or `unreachable` (no database)."""
        try:
            return self._beat(claim, lease_s)
        except OperationalError:
            return "unreachable"

    def _beat(self, claim: SessionClaim, lease_s: float) -> str:
        until = self._clock.now() + timedelta(seconds=lease_s)
        with self._database.system() as connection:
            row = one(
                connection,
                system.KEEP_SESSION.sql,
                owner=claim.owner_id,
                id=claim.session_id,
                fence=claim.fence,
                until=until,
            )
            if row is None:
                return "lost"
            changed(connection, system.KEEP_CAPACITY.sql, session=claim.session_id, until=until)
            return "cancel" if row["interrupt_requested"] else "ok"

    def event(self, claim: SessionClaim, kind: str, data: dict[str, Any]) -> None:
        """Keeps one step of a session; ids only grow. A late writer's step is counted and not kept."""
        with self._database.owner(claim.owner_id) as connection:
            kept = changed(
                connection,
                "insert into session_events (owner_id, session_id, kind, data, at) select owner_id, id, :kind, cast(:data as jsonb), :now"
                " from sessions where owner_id = :owner and id = :session and state = 'running' and fence = :fence",
                owner=claim.owner_id,
                session=claim.session_id,
                fence=claim.fence,
                kind=kind,
                data=json.dumps(data),
                now=self._clock.now(),
            )
            if not kept:
                count_late_write(connection, "event")

    def accept(self, claim: SessionClaim, *, result: dict[str, Any], evidence: dict[str, Any]) -> bool:
        """Keeps what a write session ends with once its push has happened, guarded by its fence. False for a late writer."""
        with self._database.owner(claim.owner_id) as connection:
            kept = changed(
                connection,
                "update sessions set result = cast(:result as jsonb), evidence = cast(:evidence as jsonb)"
                " where owner_id = :owner and id = :session and state = 'running' and fence = :fence",
                owner=claim.owner_id,
                session=claim.session_id,
                fence=claim.fence,
                result=json.dumps(result),
                evidence=json.dumps(evidence),
            )
            if not kept:
                count_late_write(connection, "accept")
        return bool(kept)

    def finish(
        self,
        claim: SessionClaim,
        *,
        status: str,
        reason: str | None,
        detail: str | None = None,
        result: dict[str, Any] | None = None,
        evidence: dict[str, Any] | None = None,
    ) -> bool:
        """Stores how a session ended, guarded by its fence; the item is offered for settling. False for a late writer."""
        now = self._clock.now()
        with self._database.system() as connection:
            done = changed(
                connection,
                system.END_SESSION.sql,
                owner=claim.owner_id,
                id=claim.session_id,
                fence=claim.fence,
                state=status,
                reason=reason,
                detail=redact(detail) if detail is not None else None,
                result=json.dumps(result) if result is not None else None,
                evidence=json.dumps(evidence) if evidence is not None else None,
                now=now,
            )
            if not done:
                count_late_write(connection, "session")
                return False
            changed(connection, system.FREE_CAPACITY_OF.sql, session=claim.session_id)
            notify(connection, f"session:{claim.session_id}")
        return True

    def requeue(self, claim: SessionClaim, reason: str) -> bool:
        """This worker stops: another one takes the session again, unless it was to stop or has used up its launches.

        False for a late writer: session and place belong to its successor.
        """
        with self._database.system() as connection:
            done = changed(
                connection,
                system.GIVE_BACK_SESSION.sql,
                owner=claim.owner_id,
                id=claim.session_id,
                fence=claim.fence,
                reason=reason,
                lost=Reason.SESSION_LOST,
                most=MAX_LAUNCHES,
                now=self._clock.now(),
            )
            if not done:
                count_late_write(connection, "requeue")
                return False
            changed(connection, system.FREE_CAPACITY_OF.sql, session=claim.session_id)
            notify(connection, f"session:{claim.session_id}")
        return True

    def get(self, session_id: UUID) -> SessionRow | None:
        """A session, or None."""
        owner_id = self._owner(session_id)
        if owner_id is None:
            return None
        with self._database.owner(owner_id) as connection:
            row = one(connection, "select * from sessions where owner_id = :owner and id = :id", owner=owner_id, id=session_id)
        return session_row(row) if row else None

    def events(self, session_id: UUID, after_id: int = 0) -> list[dict[str, Any]]:
        """Events of a session after an id, in order."""
        owner_id = self._owner(session_id)
        if owner_id is None:
            return []
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                "select id, kind, data, at from session_events where owner_id = :owner and session_id = :session and id > :after order by id",
                owner=owner_id,
                session=session_id,
                after=after_id,
            )
        return [dict(row) for row in found]

    def record_callback(self, session_id: UUID, token: str, body: bytes) -> str:
        """Stores a callback: accepted, duplicate (same body again), conflict (another body), refused, expired.

        A hosted session's callbacks are hints, of which there are several with different bodies: each makes the next look due,
        nothing is concluded from them (threats, rule 24). An unknown session and a wrong token are both `refused`: the answer tells
        nothing about which sessions exist.
        """
        owner_id = self._owner(session_id)
        given = hashlib.sha256(token.encode()).digest()
        if owner_id is None:
            return "refused"
        digest = hashlib.sha256(body).digest()
        now = self._clock.now()
        with self._database.owner(owner_id) as connection:
            row = one(
                connection,
                "select * from callback_tokens where owner_id = :owner and session_id = :id for update",
                owner=owner_id,
                id=session_id,
            )
            if row is None or not secrets.compare_digest(bytes(row["token_hash"]), given):
                return "refused"
            if row["expires_at"] <= now:
                return "expired"
            hinted = changed(
                connection,
                "update hosted_sessions set hint_at = :now where owner_id = :owner and session_id = :id and state <> 'closed'",
                owner=owner_id,
                id=session_id,
                now=now,
            )
            if row["body_sha256"] is not None and bytes(row["body_sha256"]) == digest:
                return "duplicate"
            if row["body_sha256"] is not None and not hinted:
                changed(
                    connection,
                    "update callback_tokens set refused = refused + 1 where owner_id = :owner and session_id = :id",
                    owner=owner_id,
                    id=session_id,
                )
                return "conflict"
            changed(
                connection,
                "update callback_tokens set body_sha256 = :digest, body = :body, received_at = :now"
                " where owner_id = :owner and session_id = :id",
                owner=owner_id,
                id=session_id,
                digest=digest,
                body=body,
                now=now,
            )
            notify(connection, f"callback:{session_id}")
        return "accepted"


def session_row(row: Any) -> SessionRow:
    """The public part of a session's row."""
    names = (
        "id",
        "item_id",
        "attempt",
        "state",
        "reason",
        "detail",
        "spec",
        "result",
        "evidence",
        "receipt",
        "run_id",
        "launches",
        "started_at",
        "ended_at",
    )
    return SessionRow(**{name: row[name] for name in names})
