"""The inbox: deliveries are stored before they are answered and admitted each in its own transaction (invariant 1)."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Connection
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.effects import EffectIntent
from kilo_pipelines.core.limits import LimitsConfig
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store import system_statements as system
from kilo_pipelines.store.approvals import note_approval
from kilo_pipelines.store.database import Database, changed, notify, one, rows
from kilo_pipelines.store.findings import Alert, Decide, Dispose, Findings, read_duplicates, write_alerts
from kilo_pipelines.store.queue import end_item, intend, lock_subject, open_item, reopen_item
from kilo_pipelines.store.rows import DeliveryRow, FindingRow, ItemView, NewDelivery, NewItem, Receipt, Repository, ServiceConfig
from kilo_pipelines.store.standing import own_limits
from kilo_pipelines.telemetry import traces

log = logging.getLogger(__name__)

# An admission is pure rules over stored rows: when it fails five times it will fail for ever, and a person must look.
MAX_TRIES = 5
RETRY_SECONDS = 10


class Inbox:
    """Deliveries of all owners."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def record(self, new: NewDelivery, *, skip: str | None = None) -> Receipt:
        """Stores a delivery; known ones answer `resumed` before their admission and `duplicate` after it.

        With `skip` the delivery is stored as settled with that reason (an event that nothing handles).
        """
        digest = hashlib.sha256(new.body).digest()
        now = self._clock.now()
        delivery_id = uuid4()
        values: dict[str, Any] = {
            "owner": new.owner_id,
            "id": delivery_id,
            "integration": new.integration_id,
            "provider_id": new.provider_delivery_id,
            "event": new.event,
            "action": new.action,
            "body": new.body,
            "digest": digest,
            "headers": json.dumps(new.headers),
            "state": "skipped" if skip else "received",
            "reason": skip,
            "now": now,
            "settled": now if skip else None,
            "trace": new.trace,
        }
        try:
            with self._database.owner(new.owner_id) as connection:
                changed(
                    connection,
                    "insert into deliveries (owner_id, id, integration_id, provider_delivery_id, event, action, body, body_sha256, headers, state,"
                    " reason, not_before, received_at, settled_at, trace) values (:owner, :id, :integration, :provider_id, :event, :action, :body, :digest,"
                    " cast(:headers as jsonb), :state, :reason, :now, :now, :settled, :trace)",
                    **values,
                )
                notify(connection, f"delivery:{delivery_id}")
            return Receipt(delivery_id, "stored")
        except IntegrityError:
            known = self.known(new)
            if known is None:  # not one of the two keys: an integration that isn't this owner's
                raise
            return known

    def record_many(self, news: Sequence[tuple[NewDelivery, str | None]]) -> list[Receipt | Exception]:
        """Stores deliveries (each with its `skip`, as `record`) with one commit, which costs the same for one and for many.

        One answer a delivery, in their order: known ones answer as `record` does. When the database refuses them together, each
        is stored by itself, so that a bad one fails alone; its exception is its answer.
        """
        ids = [uuid4() for _ in news]
        digests = [hashlib.sha256(new.body).digest() for new, _ in news]
        try:
            with self._database.system_statement() as connection:
                stored = {
                    row["id"]
                    for row in rows(
                        connection,
                        system.RECORD_DELIVERIES.sql,
                        owner_ids=[new.owner_id for new, _ in news],
                        ids=ids,
                        integration_ids=[new.integration_id for new, _ in news],
                        provider_ids=[new.provider_delivery_id for new, _ in news],
                        events=[new.event for new, _ in news],
                        actions=[new.action for new, _ in news],
                        bodies=[new.body for new, _ in news],
                        digests=digests,
                        headers=[json.dumps(new.headers) for new, _ in news],
                        reasons=[skip for _, skip in news],
                        traces=[new.trace for new, _ in news],
                        now=self._clock.now(),
                    )
                }
        except (DataError, IntegrityError):
            return [self._alone(new, skip) for new, skip in news]
        return [
            Receipt(one, "stored") if one in stored else self._alone(new, skip)
            for one, (new, skip) in zip(ids, news, strict=True)
        ]

    def _alone(self, new: NewDelivery, skip: str | None) -> Receipt | Exception:
        """`record` with its failure as an answer: it belongs to this delivery alone."""
        try:
            return self.record(new, skip=skip)
        except SQLAlchemyError as failure:
            return failure

    def known(self, new: NewDelivery) -> Receipt | None:
        """What a delivery that was stored before is answered (see `record`); None for a new one."""
        digest = hashlib.sha256(new.body).digest()
        with self._database.owner(new.owner_id) as connection:
            found = rows(
                connection,
                "select id, body_sha256, state, reason, (headers -> 'pulled') is not null as pulled from deliveries where owner_id = :owner and integration_id = :integration"
                " and (provider_delivery_id = :provider_id or body_sha256 = :digest)",
                owner=new.owner_id,
                integration=new.integration_id,
                provider_id=new.provider_delivery_id,
                digest=digest,
            )
            if not found:
                return None
            # A payload out of the provider's log was written by us: its bytes are not those of the webhook that comes after all.
            same = [row for row in found if bytes(row["body_sha256"]) == digest or row["pulled"]]
            if not same:
                return Receipt(found[0]["id"], "id_reused")
            # A delivery that a defect ended was never admitted: its redelivery tries again, from the first try.
            resumed = changed(
                connection,
                "update deliveries set not_before = :now, tries = case state when 'skipped' then 0 else tries end, state = 'received',"
                " reason = null, settled_at = null where owner_id = :owner and id = :id"
                " and (state = 'received' or (state = 'skipped' and reason = :defect))",
                owner=new.owner_id,
                id=same[0]["id"],
                now=self._clock.now(),
                defect=Reason.ADMISSION_ERROR,
            )
            if not resumed:
                return Receipt(same[0]["id"], "duplicate")
            notify(connection, f"delivery:{same[0]['id']}")
            return Receipt(same[0]["id"], "resumed")

    def admit_next(self, admit: Callable[[AdmissionTx], None], limit: int) -> int:
        """Admits up to `limit` deliveries, each in its own transaction; one that fails waits and blocks no other."""
        done = 0
        while done < limit:
            with self._database.system() as connection:
                due = rows(connection, system.DUE_DELIVERIES.sql, now=self._clock.now(), limit=limit - done)
            admitted = sum(self._admit_one(admit, row["owner_id"], row["id"]) for row in due)
            if not admitted:  # none is due, or other shards hold them all
                break
            done += admitted
        return done

    def _admit_one(self, admit: Callable[[AdmissionTx], None], owner_id: UUID, delivery_id: UUID) -> bool:
        """Admits one delivery under its owner's scope. False: somebody else has it or had it."""
        now = self._clock.now()
        with self._database.owner(owner_id) as connection:
            row = one(
                connection,
                "select owner_id, id, integration_id, event, action, body, received_at, tries, trace from deliveries where owner_id = :owner"
                " and id = :id and state = 'received' and not_before <= :now for update skip locked",
                owner=owner_id,
                id=delivery_id,
                now=now,
            )
            if row is None:
                return False
            with traces.following(row["trace"], "admit", owner=owner_id, delivery=delivery_id, event=row["event"]) as span:
                savepoint = connection.begin_nested()
                try:
                    tx = AdmissionTx(connection, _delivery(row), now)
                    admit(tx)
                    tx.close()
                    savepoint.commit()
                    span.set(outcome=tx.outcome, reason=tx.reason)
                except Exception:  # whatever a rule raises must not lose the delivery or stop the others
                    savepoint.rollback()
                    span.set(reason=Reason.ADMISSION_ERROR)
                    log.exception("admission of delivery %s failed", delivery_id)
                    self._failed(connection, owner_id, delivery_id, row["tries"] + 1)
        return True

    def _failed(self, connection: Connection, owner_id: UUID, delivery_id: UUID, tries: int) -> None:
        now = self._clock.now()
        final = tries >= MAX_TRIES
        changed(
            connection,
            "update deliveries set tries = :tries, not_before = :after, state = :state, reason = :reason, settled_at = :settled"
            " where owner_id = :owner and id = :id and state = 'received'",
            owner=owner_id,
            id=delivery_id,
            tries=tries,
            after=now + timedelta(seconds=RETRY_SECONDS * 2**tries),
            state="skipped" if final else "received",
            reason=Reason.ADMISSION_ERROR if final else None,
            settled=now if final else None,
        )


def _delivery(row: Any) -> DeliveryRow:
    return DeliveryRow(
        owner_id=row["owner_id"],
        id=row["id"],
        integration_id=row["integration_id"],
        event=row["event"],
        action=row["action"],
        payload=json.loads(bytes(row["body"])),
        received_at=row["received_at"],
    )


class AdmissionTx:
    """What an admission may see and do: one delivery of one owner, the database only."""

    def __init__(self, connection: Connection, delivery: DeliveryRow, now: Any) -> None:
        self._connection = connection
        self._now = now
        self._decided = False
        # How it was decided, in the end.
        self.outcome: str = "undecided"
        self.reason: str | None = None
        self.delivery = delivery

    def repository(self, external_id: int) -> Repository | None:
        """The owner's repository through the delivery's integration."""
        row = one(
            self._connection,
            "select external_id, full_name, default_branch, private from repositories"
            " where owner_id = :owner and integration_id = :integration and external_id = :id and removed_at is null",
            owner=self.delivery.owner_id,
            integration=self.delivery.integration_id,
            id=external_id,
        )
        return Repository(**row) if row else None

    def config(self, service: str) -> ServiceConfig | None:
        """The owner's settings of a service."""
        row = one(
            self._connection,
            "select config, enabled, revision, action_required from service_configs where owner_id = :owner and service = :service",
            owner=self.delivery.owner_id,
            service=service,
        )
        return ServiceConfig(**row) if row else None

    def items(self, service: str, subject_key: str) -> list[ItemView]:
        """All items of a subject, newest first. The subject is locked, so that two deliveries of it don't race."""
        lock_subject(self._connection, self.delivery.owner_id, service, subject_key)
        found = rows(
            self._connection,
            "select w.id, w.state, w.reason, r.head_sha, r.head_since, r.base_ref, w.session_id from work_items w"
            " join reviews r on r.owner_id = w.owner_id and r.item_id = w.id"
            " where w.owner_id = :owner and w.service = :service and w.subject_key = :subject order by w.created_at desc, w.id",
            owner=self.delivery.owner_id,
            service=service,
            subject=subject_key,
        )
        return [ItemView(**row) for row in found]

    def skip(self, reason: str, item_id: UUID | None = None) -> None:
        """Settles the delivery without work, with its reason."""
        self._settle("skipped", reason, item_id)

    def open(self, new: NewItem) -> UUID:
        """Opens a work item with the service's own row; the delivery is admitted with it."""
        item_id = open_item(self._connection, self.delivery.owner_id, new, self._now)
        if item_id is None:
            raise RuntimeError(f"{new.subject_key} has a live item of {new.service}: admission has to end it first")
        self._settle("admitted", None, item_id)
        return item_id

    def limits(self) -> LimitsConfig:
        """The owner's limits; defaults where none can be read: its claims spend nothing then."""
        return own_limits(self._connection, self.delivery.owner_id) or LimitsConfig()

    @property
    def now(self) -> datetime:
        """When the admission happens."""
        at: datetime = self._now
        return at

    def approve(self, repository_id: int, pull_number: int, *, head_sha: str, login: str, how: str, subject_key: str) -> None:
        """Somebody approved a pull request's head, as far as the delivery tells; whether they may is asked at the claim."""
        note_approval(
            self._connection,
            self.delivery.owner_id,
            repository_id,
            pull_number,
            head_sha=head_sha,
            login=login,
            how=how,
            subject_key=subject_key,
            granted=None,
            now=self._now,
        )

    def intend(self, item_id: UUID, effects: list[EffectIntent]) -> None:
        """Effects of the admission itself, committed with it."""
        intend(self._connection, self.delivery.owner_id, item_id, effects, self._now)

    def sla_policy(self) -> tuple[int, dict[str, Any]] | None:
        """The owner's newest SLA policy: version and content; None before its first sync."""
        row = one(
            self._connection,
            "select version, policy from sla_policies where owner_id = :owner order by version desc limit 1",
            owner=self.delivery.owner_id,
        )
        return (row["version"], row["policy"]) if row else None

    def alert_known_at(self, repository_id: int, source: str, source_id: str) -> datetime | None:
        """When the source touched the alert last, as far as it is known; its repository's findings are locked until commit."""
        lock_subject(self._connection, self.delivery.owner_id, "findings", str(repository_id))
        row = one(
            self._connection,
            "select source_updated_at from findings where owner_id = :owner and repository_id = :repository and source = :source"
            " and source_id = :id",
            owner=self.delivery.owner_id,
            repository=repository_id,
            source=source,
            id=source_id,
        )
        return row["source_updated_at"] if row else None

    def take_alerts(self, repository_id: int, source: str, alerts: Sequence[Alert], decide: Decide) -> None:
        """Brings findings up to what the delivery says of their alerts; the delivery is settled with it."""
        count = write_alerts(self._connection, self.delivery.owner_id, repository_id, source, alerts, decide, self._now)
        if count.quarantined:
            self._settle("skipped", Reason.ALERT_REFUSED, None)
        else:
            self._settle("admitted", None, None)

    def duplicates(self, repository_id: int, ghsa_id: str) -> list[FindingRow]:
        """A repository's findings of one advisory that supersession looks at."""
        return read_duplicates(self._connection, self.delivery.owner_id, repository_id, ghsa_id)

    def dispose(self, finding_id: UUID, disposition: Mapping[str, Any] | None, decide: Dispose, *, actor: str) -> bool:
        """`Findings.dispose` with the admission."""
        return Findings.dispose_within(
            self._connection, self.delivery.owner_id, finding_id, disposition, decide, actor, self._now
        )

    def cancel(self, item_id: UUID, reason: str) -> None:
        """Ends an older item of the subject; its session is asked to stop."""
        end_item(
            self._connection,
            owner_id=self.delivery.owner_id,
            item_id=item_id,
            state="cancelled",
            reason=reason,
            now=self._now,
            announced=False,
        )

    def reexamine(self, item_id: UUID, reason: str) -> None:
        """Sends a claimed item back to wait for a new attempt: its session stops, its slot is free, its claim is void.

        What the pull request is now, the next claim reads; an event that comes late can't end a review by itself.
        """
        owner = self.delivery.owner_id
        interrupted = end_item(
            self._connection,
            owner_id=owner,
            item_id=item_id,
            state="cancelled",
            reason=reason,
            now=self._now,
            announced=False,
            guard="and state in ('starting', 'running')",
        )
        if interrupted:
            reopen_item(self._connection, owner_id=owner, item_id=item_id, states="('cancelled')", now=self._now)
            # An event starts it anew, whoever asked for it first: events may come for ever.
            changed(
                self._connection,
                "update work_items set by_person = false where owner_id = :owner and id = :id",
                owner=owner,
                id=item_id,
            )

    def _settle(self, state: str, reason: str | None, item_id: UUID | None) -> None:
        if self._decided:
            raise RuntimeError(f"admission of delivery {self.delivery.id} decided twice")
        self._decided = True
        self.outcome, self.reason = state, reason
        changed(
            self._connection,
            "update deliveries set state = :state, reason = :reason, item_id = :item, settled_at = :now"
            " where owner_id = :owner and id = :id and state = 'received'",
            owner=self.delivery.owner_id,
            id=self.delivery.id,
            state=state,
            reason=reason,
            item=item_id,
            now=self._now,
        )

    def close(self) -> None:
        """An admission that decided nothing is a defect, and the delivery must not wait for ever unseen."""
        if not self._decided:
            raise RuntimeError(f"admission of delivery {self.delivery.id} decided nothing")
