"""Findings: pages of alerts in one transaction each, their history, their SLA, and what a sync learnt of a repository."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol
from uuid import UUID, uuid4

import psycopg
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.effects import EffectIntent
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store import system_statements as system
from kilo_pipelines.store.database import Database, changed, notify, one, rows
from kilo_pipelines.store.finding_lists import Wanted, count_wanted, read_page, read_summary, read_work
from kilo_pipelines.store.queue import audit, intend, lock_subject
from kilo_pipelines.store.rows import FindingEventRow, FindingRow, NewFindingEvent, SlaRow, SyncRow

# What a sync may write of a finding. The disposition is ours: no sync touches it.
FACTS = {
    "severity": "text",
    "ghsa_id": "text",
    "cve_id": "text",
    "package_name": "text",
    "package_ecosystem": "text",
    "manifest_path": "text",
    "dependency_scope": "text",
    "vulnerable_version_range": "text",
    "patched_version": "text",
    "title": "text",
    "description": "text",
    "cvss_score": "numeric",
    "html_url": "text",
    "upstream_state": "text",
    "upstream_reason": "text",
    "upstream_by": "text",
    "upstream_comment": "text",
    "fingerprint": "text",
    "detected_at": "timestamptz",
    "source_updated_at": "timestamptz",
    "fixed_at": "timestamptz",
    "dismissed_at": "timestamptz",
    "auto_dismissed_at": "timestamptz",
}
_STATUS = "finding_status(f.upstream_state, f.disposition)"
_COLUMNS = ", ".join(f"f.{name}" for name in FindingRow.__dataclass_fields__ if name != "status") + f", {_STATUS} as status"
_SLA = {
    "severity": "text",
    "started_at": "timestamptz",
    "due_at": "timestamptz",
    "budget_days": "integer",
    "paused_seconds": "bigint",
    "paused": "boolean",
    "period": "integer",
    "closed_at": "timestamptz",
    "reconstructed": "boolean",
    "policy_version": "integer",
    "met_due": "timestamptz[]",
    "missed_due": "timestamptz[]",
}
# What only the row's own values can be blamed for: an alert that nobody foresaw, never a lost connection or a deadlock.
_REFUSALS = (
    psycopg.errors.DataError,
    psycopg.errors.CheckViolation,
    psycopg.errors.NotNullViolation,
    psycopg.errors.ProgramLimitExceeded,
)
# About 15,000 findings: some ten megabytes as a table in our process, whatever an owner has.
BLOCK_BYTES = 2_000_000
# The same without a table: one statement of some megabytes.
BLOCK_ROWS = 10_000


class Alert(Protocol):
    """What the source says of one alert, validated (services/security/alerts.py)."""

    @property
    def source_id(self) -> str: ...
    @property
    def cwe_ids(self) -> Sequence[str]: ...

    def fingerprint(self) -> str:
        """Equal for equal facts."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """The values of `FACTS` but the fingerprint, by name."""
        ...


@dataclass(frozen=True)
class Change:
    """What follows from one new or changed alert: history, audit, deadline, and whether our own decision of it is over."""

    events: list[NewFindingEvent]
    sla: SlaRow | None
    undecided: bool = False


# An SLA policy: its version and its content.
Policy = tuple[int, dict[str, Any]]
# (the finding as it stands or None, its history, the alert, its finding's id, the newest policy) -> what follows
Decide = Callable[[FindingRow | None, list[FindingEventRow], Any, UUID, Policy | None], Change]
# (a finding, its history) -> what follows from a decision of ours; None where it moved on
Dispose = Callable[[FindingRow, list[FindingEventRow]], Change | None]


@dataclass
class PageCount:
    """What a page did."""

    inserted: int = 0
    changed: int = 0
    unchanged: int = 0
    rows_written: int = 0
    outdated: int = 0
    quarantined: int = 0


class NotDisposedError(Exception):
    """The finding moved on before it was decided about: whatever was to be committed with the decision isn't."""


class Findings:
    """Findings of all owners, each in its owner's scope."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    # -- syncs ---------------------------------------------------------------------------------------------------------

    def begin_sync(self, owner_id: UUID, repository_id: int) -> SyncRow:
        """Notes an attempt; what the last ones left."""
        with self._database.owner(owner_id) as connection:
            row = one(
                connection,
                "insert into repository_syncs (owner_id, repository_id, attempted_at) values (:owner, :repository, :now)"
                " on conflict (owner_id, repository_id) do update set attempted_at = :now"
                " returning etag, cursor, outcome, detail, alerts, attempted_at, succeeded_at, read_at, not_before, syncs",
                owner=owner_id,
                repository=repository_id,
                now=self._clock.now(),
            )
        assert row is not None  # noqa: S101  # upserts return their row
        return SyncRow(**row)

    def end_sync(
        self,
        owner_id: UUID,
        repository_id: int,
        *,
        outcome: str,
        detail: str = "",
        etag: str | None = None,
        alerts: int | None = None,
        not_before: datetime | None = None,
        complete: bool,
        restart: bool = False,
        whole_since: datetime | None = None,
    ) -> None:
        """Keeps how a sync of a repository ended. Only a complete one makes it fresh; that and `restart` give up its checkpoint.

        `alerts` is how many there are, for a sync that read them all: it counts as of when it began. `whole_since`: every alert was
        read since then; what waits in quarantine and wasn't among them is gone.
        """
        now = self._clock.now()
        with self._database.owner(owner_id) as connection:
            changed(
                connection,
                "update repository_syncs set outcome = :outcome, detail = :detail, not_before = :after,"
                " succeeded_at = case when :complete then cast(:now as timestamptz) else succeeded_at end,"
                " syncs = syncs + case when :complete then 1 else 0 end, cursor = case when :complete or :restart then null else cursor end,"
                " etag = coalesce(:etag, etag), alerts = coalesce(:alerts, alerts),"
                " read_at = case when cast(:alerts as integer) is not null then attempted_at else read_at end"
                " where owner_id = :owner and repository_id = :repository",
                owner=owner_id,
                repository=repository_id,
                outcome=outcome,
                detail=detail,
                after=not_before,
                complete=complete,
                restart=restart,
                etag=etag,
                alerts=alerts,
                now=now,
            )
            if whole_since is not None:
                changed(
                    connection,
                    "update quarantined_alerts set taken_at = :now where owner_id = :owner and repository_id = :repository"
                    " and taken_at is null and last_seen_at < :since",
                    owner=owner_id,
                    repository=repository_id,
                    now=now,
                    since=whole_since,
                )

    def note_sync(self, owner_id: UUID, what: str, data: Mapping[str, Any], *, actor: str) -> None:
        """The audit event of an owner's sync: `triggered` or `completed`."""
        with self._database.owner(owner_id) as connection:
            audit(connection, owner_id, actor, f"security.sync.{what}", str(owner_id), dict(data), self._clock.now())

    def syncs(self, owner_id: UUID) -> list[dict[str, Any]]:
        """How each of an owner's repositories stands."""
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                "select r.external_id as repository_id, r.full_name, s.outcome, s.detail, s.alerts, s.attempted_at, s.succeeded_at, s.not_before,"
                " s.syncs, (select count(*) from quarantined_alerts q where q.owner_id = r.owner_id and q.repository_id = r.external_id"
                " and q.taken_at is null) as quarantined"
                " from repositories r left join repository_syncs s on s.owner_id = r.owner_id and s.repository_id = r.external_id"
                " where r.owner_id = :owner and r.removed_at is null order by r.full_name",
                owner=owner_id,
            )
        return [dict(row) for row in found]

    def quarantine(self, owner_id: UUID, repository_id: int, bad: Sequence[tuple[str, str, str]]) -> None:
        """Keeps alerts that can't be taken, as (source id, reason, detail): counted and shown, each once."""
        if not bad:
            return
        with self._database.owner(owner_id) as connection:
            _quarantine(connection, owner_id, repository_id, bad, self._clock.now())

    def quarantined(self, owner_id: UUID) -> list[dict[str, Any]]:
        """What waits in quarantine, newest first."""
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                "select q.repository_id, r.full_name, q.source_id, q.reason, q.detail, q.first_seen_at, q.last_seen_at from quarantined_alerts q"
                " join repositories r on r.owner_id = q.owner_id and r.external_id = q.repository_id where q.owner_id = :owner and q.taken_at is null"
                " order by q.last_seen_at desc, q.source_id",
                owner=owner_id,
            )
        return [dict(row) for row in found]

    def apply_page(
        self, owner_id: UUID, repository_id: int, source: str, alerts: Sequence[Alert], decide: Decide, *, cursor: str | None
    ) -> PageCount:
        """One page of a repository's alerts in one transaction: what is new or changed is written with its history, audit and SLA.

        An unchanged or outdated alert writes nothing; one that the database refuses goes into quarantine. `cursor` is the page after this one: where a sync that stops here goes on.
        """
        with self._database.owner(owner_id) as connection:
            count = write_alerts(connection, owner_id, repository_id, source, alerts, decide, self._clock.now())
            changed(
                connection,
                "update repository_syncs set cursor = :cursor where owner_id = :owner and repository_id = :repository"
                " and cursor is distinct from :cursor",
                owner=owner_id,
                repository=repository_id,
                cursor=cursor,
            )
        return count

    def history(self, owner_id: UUID, finding_ids: Sequence[UUID]) -> dict[UUID, list[FindingEventRow]]:
        """The steps of findings, in the order in which they happened."""
        with self._database.owner(owner_id) as connection:
            return read_history(connection, owner_id, finding_ids)

    # -- dispositions --------------------------------------------------------------------------------------------------

    def dispose(
        self,
        owner_id: UUID,
        finding_id: UUID,
        disposition: Mapping[str, Any] | None,
        decide: Callable[[FindingRow, list[FindingEventRow]], Change | None],
        *,
        actor: str,
    ) -> bool:
        """Sets (or with None clears) what was decided here of a finding, with history, audit and SLA; False when `decide` says None.

        `disposition` has the keys disposition, reason, by, actor, evidence, canonical.
        """
        now = self._clock.now()
        with self._database.owner(owner_id) as connection:
            return self.dispose_within(connection, owner_id, finding_id, disposition, decide, actor, now)

    def disposing(
        self,
        owner_id: UUID,
        finding_id: UUID,
        disposition: Mapping[str, Any],
        decide: Callable[[FindingRow, list[FindingEventRow]], Change | None],
        *,
        actor: str,
    ) -> Callable[[Connection], None]:
        """`dispose` in a transaction of the queue's, which it ends with NotDisposedError where `decide` says None."""

        def also(connection: Connection) -> None:
            if not self.dispose_within(connection, owner_id, finding_id, disposition, decide, actor, self._clock.now()):
                raise NotDisposedError(str(finding_id))

        return also

    def undo(
        self,
        owner_id: UUID,
        finding_id: UUID,
        decide: Callable[[FindingRow, list[FindingEventRow]], Change | None],
        *,
        item_id: UUID,
        effects: list[EffectIntent],
        actor: str,
    ) -> bool:
        """Takes a dismissal of ours back, with the effects that its item wants now, in one transaction; False when `decide` says None."""
        now = self._clock.now()
        with self._database.owner(owner_id) as connection:
            done = self.dispose_within(connection, owner_id, finding_id, None, decide, actor, now)
            if done:
                intend(connection, owner_id, item_id, effects, now)
        return done

    def bound(self, owner_id: UUID, repository_id: int) -> list[FindingRow]:
        """Findings of a repository that were dismissed here on a ground that can be looked at again."""
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                f"select {_COLUMNS} from findings f where f.owner_id = :owner and f.repository_id = :repository and f.disposition = 'dismissed'"
                " and f.upstream_state in ('open', 'dismissed') and f.disposition_evidence ? 'binding' order by f.id",
                owner=owner_id,
                repository=repository_id,
            )
        return [FindingRow(**row) for row in found]

    def dismissed_on(self, owner_id: UUID, analysis_id: UUID) -> bool:
        """Whether an analysis was drawn on for a dismissal before, whatever became of it."""
        with self._database.owner(owner_id) as connection:
            row = one(
                connection,
                "select exists (select 1 from dismissals where owner_id = :owner and analysis_id = :analysis) as known",
                owner=owner_id,
                analysis=analysis_id,
            )
        return bool(row and row["known"])

    def rebind(self, owner_id: UUID, finding_id: UUID, commit: str) -> None:
        """The same ground was found at a later commit."""
        with self._database.owner(owner_id) as connection:
            changed(
                connection,
                "update findings set disposition_evidence = jsonb_set(disposition_evidence, '{binding,commit}', to_jsonb(cast(:commit as text)))"
                " where owner_id = :owner and id = :id and disposition = 'dismissed'",
                owner=owner_id,
                id=finding_id,
                commit=commit,
            )

    @staticmethod
    def dispose_within(
        connection: Connection,
        owner_id: UUID,
        finding_id: UUID,
        disposition: Mapping[str, Any] | None,
        decide: Callable[[FindingRow, list[FindingEventRow]], Change | None],
        actor: str,
        now: datetime,
    ) -> bool:
        """`dispose` in the caller's transaction."""
        finding = read_finding(connection, owner_id, finding_id, lock=True)
        change = finding and decide(finding, read_history(connection, owner_id, [finding_id]).get(finding_id, []))
        if not change:
            return False
        made = disposition or {}
        changed(
            connection,
            "update findings set disposition = :kind, disposition_reason = :reason, disposition_by = :by, disposition_actor = :actor,"
            " disposition_at = :at, disposition_evidence = cast(:evidence as jsonb), canonical_id = :canonical, changed_at = :now"
            " where owner_id = :owner and id = :id",
            owner=owner_id,
            id=finding_id,
            kind=made.get("disposition"),
            reason=made.get("reason"),
            by=made.get("by"),
            actor=made.get("actor"),
            at=now if disposition else None,
            evidence=json.dumps(made["evidence"]) if made.get("evidence") is not None else None,
            canonical=made.get("canonical"),
            now=now,
        )
        events = [{"finding_id": finding_id, **vars(event)} for event in change.events]
        _write_events(connection, owner_id, events, actor, now)
        if change.sla is not None:
            _write_sla(connection, owner_id, [{"finding_id": finding_id, **vars(change.sla)}])
        notify(connection, f"finding:{finding_id}")
        return True

    # -- reading -------------------------------------------------------------------------------------------------------

    def owner_of(self, finding_id: UUID) -> UUID | None:
        """Whose finding this is."""
        with self._database.system() as connection:
            row = one(connection, system.FINDING_OWNER.sql, id=finding_id)
        return row["owner_id"] if row else None

    def get(self, owner_id: UUID, finding_id: UUID) -> FindingRow | None:
        """One finding of an owner."""
        with self._database.owner(owner_id) as connection:
            return read_finding(connection, owner_id, finding_id)

    def of_repository(self, owner_id: UUID, repository_id: int, *, open_or_superseded: bool) -> list[FindingRow]:
        """A repository's findings; with `open_or_superseded` those that supersession looks at."""
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                f"select {_COLUMNS} from findings f where f.owner_id = :owner and f.repository_id = :repository"
                + (
                    " and (finding_status(f.upstream_state, f.disposition) = 'open' or f.disposition = 'superseded')"
                    if open_or_superseded
                    else ""
                )
                + " order by f.source_id, f.id",
                owner=owner_id,
                repository=repository_id,
            )
        return [FindingRow(**row) for row in found]

    def open_of_package(
        self, owner_id: UUID, repository_id: int, ecosystem: str, package: str, manifest: str
    ) -> list[FindingRow]:
        """Open findings of one package of a manifest."""
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                f"select {_COLUMNS} from findings f where f.owner_id = :owner and f.repository_id = :repository and f.package_ecosystem = :ecosystem"
                f" and f.package_name = :package and f.manifest_path = :manifest and {_STATUS} = 'open' order by f.id",
                owner=owner_id,
                repository=repository_id,
                ecosystem=ecosystem,
                package=package,
                manifest=manifest,
            )
        return [FindingRow(**row) for row in found]

    def open_after(self, owner_id: UUID, after: UUID | None, *, limit: int) -> list[FindingRow]:
        """The next open findings in the order of their ids: a cursor that reaches every one of them, whatever changes meanwhile."""
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                f"select {_COLUMNS} from findings f where f.owner_id = :owner and (cast(:after as uuid) is null or f.id > :after)"
                f" and {_STATUS} = 'open' order by f.id limit :limit",
                owner=owner_id,
                after=after,
                limit=limit,
            )
        return [FindingRow(**row) for row in found]

    def listed(
        self,
        owner_id: UUID,
        *,
        status: str | None = None,
        severity: str | None = None,
        repository_id: int | None = None,
        outcome: str | None = None,
        overdue: bool = False,
        sort: str = "severity_desc",
        limit: int = 50,
        offset: int = 0,
    ) -> list[dict[str, Any]]:
        """Findings with their deadlines; by default the worst first (severity, then soonest due). Filters and orders: store/finding_lists.py."""
        wanted = Wanted(status, severity, repository_id, outcome, overdue)
        with self._database.owner(owner_id) as connection:
            return read_page(connection, owner_id, wanted, sort=sort, limit=limit, offset=offset, now=self._clock.now())

    def page(self, owner_id: UUID, wanted: Wanted, *, sort: str, limit: int, offset: int) -> tuple[list[dict[str, Any]], int]:
        """A page of findings, and how many the filters let through in all."""
        now = self._clock.now()
        with self._database.owner(owner_id) as connection:
            found = read_page(connection, owner_id, wanted, sort=sort, limit=limit, offset=offset, now=now)
            return found, count_wanted(connection, owner_id, wanted, now)

    def summary(self, owner_id: UUID, repository_id: int | None = None) -> dict[str, Any]:
        """What the dashboard of contract 15 shows, counted in the database by the lists' own definitions."""
        with self._database.owner(owner_id) as connection:
            return read_summary(connection, owner_id, repository_id, self._clock.now())

    def work(self, owner_id: UUID, finding_id: UUID) -> list[dict[str, Any]]:
        """The work items of a finding, newest first, each with its effects; no payloads."""
        with self._database.owner(owner_id) as connection:
            return read_work(connection, owner_id, finding_id)

    def numbers(self, owner_id: UUID, *, days: int = 90) -> dict[str, Any]:
        """An owner's findings counted in the database: by severity and status, overdue, met and missed of what was due in the last `days`."""
        now = self._clock.now()
        with self._database.owner(owner_id) as connection:
            row = one(connection, _NUMBERS, owner=owner_id, now=now, since=now - timedelta(days=days))
        assert row is not None  # noqa: S101  # aggregates always answer
        return dict(row)

    def posture(self) -> list[dict[str, Any]]:
        """The same for every owner that has findings or the Security Agent on, for the operator."""
        with self._database.system() as connection:
            return [dict(row) for row in rows(connection, system.POSTURE.sql, now=self._clock.now())]

    def offenders(self, check: str, *, limit: int = 50) -> list[dict[str, Any]]:
        """What breaks one of `SECURITY_CHECKS`, the worst first."""
        with self._database.system() as connection:
            found = rows(connection, system.SECURITY_CHECKS[check].sql, now=self._clock.now(), limit=limit)
        return [dict(row) for row in found]

    def owners(self) -> list[UUID]:
        """Owners whose Security Agent is on, in the order of their ids."""
        with self._database.system() as connection:
            return [row["owner_id"] for row in rows(connection, system.SECURITY_OWNERS.sql)]

    # -- SLA -----------------------------------------------------------------------------------------------------------

    def changed_owners(self, limit: int) -> list[tuple[UUID, datetime]]:
        """Owners whose Security Agent was switched on, or whose settings changed, without a sync since; with that moment."""
        with self._database.system() as connection:
            found = rows(connection, system.CHANGED_SECURITY_OWNERS.sql, limit=limit)
        return [(row["owner_id"], row["updated_at"]) for row in found]

    def policy(self, owner_id: UUID, at: datetime | None = None) -> Policy | None:
        """The SLA policy in force (at a moment): its version and content; before the first one, the first one."""
        with self._database.owner(owner_id) as connection:
            return read_policy(connection, owner_id, at)

    def keep_policy(self, owner_id: UUID, policy: Mapping[str, Any], *, actor: str) -> int:
        """The version of this policy: the newest one when it says the same, else a new one."""
        now = self._clock.now()
        with self._database.owner(owner_id) as connection:
            _lock_policy(connection, owner_id, "pg_advisory_xact_lock")
            newest = one(
                connection,
                "select version, policy from sla_policies where owner_id = :owner order by version desc limit 1",
                owner=owner_id,
            )
            if newest is not None and newest["policy"] == dict(policy):
                return int(newest["version"])
            version = int(newest["version"]) + 1 if newest is not None else 1
            changed(
                connection,
                "insert into sla_policies (owner_id, version, policy, valid_from) values (:owner, :version, cast(:policy as jsonb), :now)",
                owner=owner_id,
                version=version,
                policy=json.dumps(policy),
                now=now,
            )
            audit(connection, owner_id, actor, "security.sla.policy", str(version), dict(policy), now)
        return version

    def deadlines_csv(self, owner_id: UUID) -> Iterator[bytes]:
        """All findings with what their deadline follows from and what is stored of it, as CSV without a header, in blocks of whole lines.

        Columns: `DEADLINE_COLUMNS`; times are seconds since 1970. The server's COPY keeps our memory flat and is parsed in C.
        """
        with self._database.owner(owner_id) as connection:
            driver = connection.connection.driver_connection
            assert driver is not None  # noqa: S101  # the pool's connection is a psycopg one
            kept: list[bytes] = []
            size = 0
            with driver.cursor().copy(_DEADLINES, {"owner": owner_id}) as stream:
                for block in stream:
                    kept.append(bytes(block))  # a row each
                    size += len(block)
                    if size >= BLOCK_BYTES:
                        yield b"".join(kept)
                        kept, size = [], 0
            if kept:
                yield b"".join(kept)

    def behind_policy(self, owner_id: UUID, version: int) -> Iterator[dict[UUID, int]]:
        """Findings (id -> repository id) whose deadline is of an older policy version or missing, in blocks of a bounded size."""
        after = UUID(int=0)
        while True:
            with self._database.owner(owner_id) as connection:
                found = rows(
                    connection,
                    "select f.id, f.repository_id from findings f left join finding_sla s on s.owner_id = f.owner_id and s.finding_id = f.id"
                    " where (f.owner_id = :owner) and (f.id > :after) and (coalesce(s.policy_version < :version, true)) order by f.id limit :limit",
                    owner=owner_id,
                    after=after,
                    version=version,
                    limit=BLOCK_ROWS,
                )
            if found:
                yield {row["id"]: row["repository_id"] for row in found}
            if len(found) < BLOCK_ROWS:
                return
            after = found[-1]["id"]

    def follow_policy(
        self, owner_id: UUID, version: int, deadline: Callable[[list[FindingEventRow], int], SlaRow]
    ) -> tuple[int, int]:
        """Deadlines of older policy versions anew, as `deadline(history, repository id)` says; (findings looked at, rows written).

        Each block is read and written in transactions of its own: what a crash leaves is found by whoever comes next.
        """
        looked = written = 0
        for block in self.behind_policy(owner_id, version):
            histories = self.history(owner_id, list(block))
            looked += len(block)
            written += self.write_sla(
                owner_id, ((one, deadline(histories.get(one, []), repository)) for one, repository in block.items())
            )
        return looked, written

    def write_sla(self, owner_id: UUID, deadlines: Iterable[tuple[UUID, SlaRow]]) -> int:
        """Brings deadlines up to date; how many rows. Whatever was written since of a longer history or a newer policy stays."""
        records = [{"finding_id": finding_id, **vars(sla)} for finding_id, sla in deadlines]
        with self._database.owner(owner_id) as connection:
            return _write_sla(connection, owner_id, records)


def read_policy(connection: Connection, owner_id: UUID, at: datetime | None) -> Policy | None:
    """The SLA policy of a moment, in an owner's scope."""
    row = one(
        connection,
        "select version, policy from sla_policies where owner_id = :owner"
        " order by (cast(:at as timestamptz) is null or valid_from <= :at) desc, case when cast(:at as timestamptz) is null or valid_from <= :at"
        " then version end desc nulls last, version limit 1",
        owner=owner_id,
        at=at,
    )
    return (row["version"], row["policy"]) if row else None


def read_history(connection: Connection, owner_id: UUID, finding_ids: Sequence[UUID]) -> dict[UUID, list[FindingEventRow]]:
    """The steps of findings in an owner's scope, in the order in which they happened."""
    found: dict[UUID, list[FindingEventRow]] = {}
    if finding_ids:
        for row in rows(
            connection,
            "select finding_id, at, kind, severity, reconstructed from finding_events where owner_id = :owner and finding_id = any(:ids)"
            " order by finding_id, at, id",
            owner=owner_id,
            ids=list(finding_ids),
        ):
            found.setdefault(row["finding_id"], []).append(
                FindingEventRow(row["at"], row["kind"], row["severity"], row["reconstructed"])
            )
    return found


def write_alerts(
    connection: Connection,
    owner_id: UUID,
    repository_id: int,
    source: str,
    alerts: Sequence[Alert],
    decide: Decide,
    now: datetime,
) -> PageCount:
    """Writes what is new or changed of these alerts, with history, audit and SLA, in the caller's transaction."""
    # The checks of foreign keys keep the plan of a session's first page, made for a table that was all but empty then: they would
    # read the whole of it for each row of the hundredth page.
    connection.execute(text("set local plan_cache_mode = force_custom_plan"))
    # A webhook and a sync of one repository go one after the other: neither sees half of the other's new rows.
    lock_subject(connection, owner_id, "findings", str(repository_id))
    # A policy is saved before this, or its recomputing comes after it.
    _lock_policy(connection, owner_id, "pg_advisory_xact_lock_shared")
    policy = read_policy(connection, owner_id, None)
    count = PageCount()
    latest = {alert.source_id: alert for alert in alerts}
    known = {
        row["source_id"]: FindingRow(**row)
        for row in rows(
            connection,
            f"select {_COLUMNS} from findings f where f.owner_id = :owner and f.repository_id = :repository and f.source = :source"
            " and f.source_id = any(:ids) order by f.source_id for update",
            owner=owner_id,
            repository=repository_id,
            source=source,
            ids=list(latest),
        )
    }
    fresh: list[_Fresh] = []
    for number, alert in sorted(latest.items()):
        old, facts = known.get(number), {**alert.facts(), "fingerprint": alert.fingerprint()}
        if old is not None and facts["fingerprint"] == old.fingerprint:
            count.unchanged += 1
        elif old is not None and facts["source_updated_at"] < old.source_updated_at:
            count.outdated += 1  # an event was quicker than the page
        else:
            fresh.append(_Fresh(number, old, alert, facts))
    history = read_history(connection, owner_id, [one.old.id for one in fresh if one.old is not None])

    def write(some: list[_Fresh]) -> list[tuple[str, str, str]]:
        """These as a whole, else each by itself; what the database refuses."""
        try:
            with connection.begin_nested():
                count.rows_written += _write_fresh(
                    connection, owner_id, repository_id, source, some, history, policy, decide, now
                )
        except DBAPIError as failure:
            if not isinstance(failure.orig, _REFUSALS):
                raise
            if len(some) > 1:
                return [refused for one in some for refused in write([one])]
            return [(some[0].number, str(Reason.ALERT_REFUSED), type(failure.orig).__name__)]
        return []

    refused = write(fresh) if fresh else []
    _quarantine(connection, owner_id, repository_id, refused, now)
    set_aside = {number for number, _, _ in refused}
    count.quarantined = len(refused)
    count.inserted = sum(one.old is None for one in fresh if one.number not in set_aside)
    count.changed = len(fresh) - count.quarantined - count.inserted
    changed(
        connection,
        "update quarantined_alerts set taken_at = :now where owner_id = :owner and repository_id = :repository and source_id = any(:ids)"
        " and taken_at is null",
        now=now,
        owner=owner_id,
        repository=repository_id,
        ids=[number for number in latest if number not in set_aside],
    )
    return count


@dataclass(frozen=True)
class _Fresh:
    """An alert that is new or changed, with the finding as it stands."""

    number: str
    old: FindingRow | None
    alert: Alert
    facts: Mapping[str, Any]


def _write_fresh(
    connection: Connection,
    owner_id: UUID,
    repository_id: int,
    source: str,
    fresh: list[_Fresh],
    history: Mapping[UUID, list[FindingEventRow]],
    policy: Policy | None,
    decide: Decide,
    now: datetime,
) -> int:
    """Findings with all that follows from them; how many."""
    records, events, slas, undecided = [], [], [], []
    for new in fresh:
        finding_id = new.old.id if new.old else uuid4()
        change = decide(new.old, history.get(finding_id, []), new.alert, finding_id, policy)
        records.append({"id": finding_id, "source_id": new.number, "cwe_ids": list(new.alert.cwe_ids), **new.facts})
        events += [{"finding_id": finding_id, **vars(event)} for event in change.events]
        if change.sla is not None:
            slas.append({"finding_id": finding_id, **vars(change.sla)})
        if change.undecided:
            undecided.append(finding_id)
    names = ", ".join(FACTS)
    shape = ", ".join(f"{name} {kind}" for name, kind in FACTS.items())
    sets = ", ".join(f"{name} = excluded.{name}" for name in FACTS)
    written = changed(
        connection,
        f"insert into findings (owner_id, id, repository_id, source, source_id, cwe_ids, first_seen_at, changed_at, {names})"
        f" select :owner, x.id, :repository, :source, x.source_id, x.cwe_ids, :now, :now, {', '.join('x.' + name for name in FACTS)}"
        f" from jsonb_to_recordset(cast(:records as jsonb)) as x (id uuid, source_id text, cwe_ids text[], {shape}) order by x.source_id"
        f" on conflict (owner_id, repository_id, source, source_id) do update set {sets}, cwe_ids = excluded.cwe_ids, changed_at = excluded.changed_at",
        owner=owner_id,
        repository=repository_id,
        source=source,
        records=json.dumps(records, default=str),
        now=now,
    )
    if undecided:
        changed(
            connection,
            "update findings set disposition = null, disposition_reason = null, disposition_by = null, disposition_actor = null,"
            " disposition_at = null, disposition_evidence = null where owner_id = :owner and id = any(:ids)",
            owner=owner_id,
            ids=undecided,
        )
    _write_events(connection, owner_id, events, source, now)
    _write_sla(connection, owner_id, slas)
    return written


def _quarantine(
    connection: Connection, owner_id: UUID, repository_id: int, bad: Sequence[tuple[str, str, str]], now: datetime
) -> None:
    for source_id, reason, detail in bad:
        changed(
            connection,
            "insert into quarantined_alerts (owner_id, repository_id, source_id, reason, detail, first_seen_at, last_seen_at)"
            " values (:owner, :repository, :source_id, :reason, :detail, :now, :now)"
            " on conflict (owner_id, repository_id, source_id) do update set reason = excluded.reason, detail = excluded.detail,"
            " last_seen_at = excluded.last_seen_at, taken_at = null",
            owner=owner_id,
            repository=repository_id,
            source_id=source_id,
            reason=reason,
            detail=detail,
            now=now,
        )


def _lock_policy(connection: Connection, owner_id: UUID, how: str) -> None:
    """An owner's policy until commit: exclusive for who saves one, shared for who computes deadlines with it."""
    connection.execute(text(f"select {how}(hashtextextended('sla:' || :owner, 0))"), {"owner": str(owner_id)})


def read_finding(connection: Connection, owner_id: UUID, finding_id: UUID, *, lock: bool = False) -> FindingRow | None:
    """A finding in an owner's scope."""
    row = one(
        connection,
        f"select {_COLUMNS} from findings f where f.owner_id = :owner and f.id = :id {'for update' if lock else ''}",
        owner=owner_id,
        id=finding_id,
    )
    return FindingRow(**row) if row else None


def read_duplicates(connection: Connection, owner_id: UUID, repository_id: int, ghsa_id: str) -> list[FindingRow]:
    """A repository's findings of one advisory that supersession looks at, in an owner's scope."""
    found = rows(
        connection,
        f"select {_COLUMNS} from findings f where f.owner_id = :owner and f.repository_id = :repository and f.ghsa_id = :ghsa"
        f" and ({_STATUS} = 'open' or f.disposition = 'superseded') order by f.source_id, f.id",
        owner=owner_id,
        repository=repository_id,
        ghsa=ghsa_id,
    )
    return [FindingRow(**row) for row in found]


def noted(
    owner_id: UUID, finding_id: UUID, events: Sequence[NewFindingEvent], *, actor: str, now: datetime
) -> Callable[[Connection], None]:
    """Adds steps of one finding in a transaction of the queue's: what became of an analysis or a remediation of it."""
    records = [{"finding_id": finding_id, **vars(event)} for event in events]
    return lambda connection: _write_events(connection, owner_id, records, actor, now)


def read_findings(
    connection: Connection,
    owner_id: UUID,
    finding_ids: Sequence[UUID] | None,
    repository_id: int | None,
    *,
    after: UUID | None = None,
    limit: int | None = None,
) -> list[FindingRow]:
    """Findings in an owner's scope by id, after one of them: these (None: all), of a repository (None: of all)."""
    found = rows(
        connection,
        f"select {_COLUMNS} from findings f where (f.owner_id = :owner) and (cast(:after as uuid) is null or f.id > :after)"
        " and (cast(:ids as uuid[]) is null or f.id = any(:ids))"
        " and (cast(:repository as bigint) is null or f.repository_id = :repository) order by f.id limit :limit",
        owner=owner_id,
        after=after,
        ids=None if finding_ids is None else list(finding_ids),
        repository=repository_id,
        limit=limit,
    )
    return [FindingRow(**row) for row in found]


def _write_events(connection: Connection, owner_id: UUID, events: list[dict[str, Any]], actor: str, now: datetime) -> None:
    """History and audit in one statement; an event whose key is there already adds nothing to either."""
    if not events:
        return
    changed(
        connection,
        """
with incoming as (
    select x.*, row_number() over () as place from jsonb_to_recordset(cast(:events as jsonb)) as x (finding_id uuid, at timestamptz, kind text,
        severity text, reconstructed boolean, event_key text, action text, data jsonb)
), fresh as (
    insert into finding_events (owner_id, finding_id, at, kind, severity, reconstructed, event_key, recorded_at)
    select :owner, finding_id, at, kind, severity, reconstructed, event_key, :now from incoming where kind is not null order by place
    on conflict (owner_id, event_key) do nothing returning event_key
)
insert into audit_events (owner_id, at, actor, action, subject, data)
select :owner, :now, :actor, i.action, i.finding_id::text, i.data from incoming i left join fresh f on f.event_key = i.event_key
where i.kind is null or f.event_key is not null order by i.place
""",
        owner=owner_id,
        events=json.dumps(events, default=str),
        actor=actor,
        now=now,
    )


def _write_sla(connection: Connection, owner_id: UUID, records: list[dict[str, Any]]) -> int:
    """Deadlines, but none over one that follows from more steps, or from the same ones under a newer policy.

    What was added under an older policy is written all the same: it is found by `behind_policy`.
    """
    if not records:
        return 0
    names = ", ".join(_SLA)
    return changed(
        connection,
        f"insert into finding_sla (owner_id, finding_id, events, {names}) select :owner, x.finding_id,"
        # A step whose key was there already wasn't added.
        " least(x.events, (select count(*) from finding_events e where e.owner_id = :owner and e.finding_id = x.finding_id)),"
        f" {', '.join('x.' + name for name in _SLA)} from jsonb_to_recordset(cast(:records as jsonb))"
        f" as x (finding_id uuid, events integer, {', '.join(f'{name} {kind}' for name, kind in _SLA.items())})"
        f" on conflict (owner_id, finding_id) do update set events = excluded.events, {', '.join(f'{name} = excluded.{name}' for name in _SLA)}"
        " where (finding_sla.events, finding_sla.policy_version) <= (excluded.events, excluded.policy_version)",
        owner=owner_id,
        records=json.dumps(records, default=str),
    )


_NUMBERS = f"""
select count(*) as findings,
    count(*) filter (where finding_status(f.upstream_state, f.disposition) = 'open') as open,
    count(*) filter (where finding_status(f.upstream_state, f.disposition) = 'open' and f.severity = 'critical') as open_critical,
    count(*) filter (where finding_status(f.upstream_state, f.disposition) = 'open' and f.severity = 'high') as open_high,
    count(*) filter (where finding_status(f.upstream_state, f.disposition) = 'open' and f.severity = 'medium') as open_medium,
    count(*) filter (where finding_status(f.upstream_state, f.disposition) = 'open' and f.severity = 'low') as open_low,
    count(*) filter (where finding_status(f.upstream_state, f.disposition) = 'fixed') as fixed,
    count(*) filter (where finding_status(f.upstream_state, f.disposition) = 'ignored') as ignored,
    count(*) filter (where finding_status(f.upstream_state, f.disposition) = 'open' and s.due_at <= :now and {system.WATCHED}) as overdue,
    count(*) filter (where finding_status(f.upstream_state, f.disposition) = 'open' and s.due_at > :now and {system.WATCHED}) as within_due,
    count(*) filter (where s.due_at > :since and s.due_at <= :now and s.closed_at <= s.due_at and {system.WATCHED})
        + coalesce(sum((select count(*) from unnest(s.met_due) due where due > :since and due <= :now)) filter (where s.met_due <> '{{}}' and {system.WATCHED}), 0)::bigint as met,
    count(*) filter (where s.due_at > :since and s.due_at <= :now and coalesce(s.closed_at > s.due_at, true) and {system.WATCHED})
        + coalesce(sum((select count(*) from unnest(s.missed_due) due where due > :since and due <= :now)) filter (where s.missed_due <> '{{}}' and {system.WATCHED}), 0)::bigint as missed,
    (select count(*) from quarantined_alerts q where q.owner_id = :owner and q.taken_at is null) as quarantined
from findings f join repositories r on r.owner_id = f.owner_id and r.external_id = f.repository_id
{system.WATCHED_BY} left join finding_sla s on s.owner_id = f.owner_id and s.finding_id = f.id where f.owner_id = :owner
"""


def _epochs(column: str) -> str:
    """Moments of an array as seconds with blanks between them; nothing for none."""
    return f"case when {column} <> '{{}}' then array_to_string(array(select extract(epoch from due) from unnest({column}) due), ' ') end"


DEADLINE_COLUMNS = (
    "id",
    "repository_id",
    "severity",
    "status",
    "steps",
    "straight",
    "opened",
    "opened_as",
    "fixed",
    "due",
    "closed",
    "paused",
    "reconstructed",
    "version",
    "watched",
    "met_due",
    "missed_due",
)
_DEADLINES = f"""
copy (
    select f.id, f.repository_id, f.severity, finding_status(f.upstream_state, f.disposition), coalesce(e.steps, 0),
        (coalesce(e.first, 0) = 1 and e.steps = 1 + (e.fixed is not null)::int and coalesce(e.fixed >= e.opened, true))::int,
        extract(epoch from e.opened), e.opened_as, extract(epoch from e.fixed),
        extract(epoch from s.due_at), extract(epoch from s.closed_at), coalesce(s.paused, false)::int, coalesce(e.reconstructed, 0), s.policy_version,
        {system.WATCHED}::int, {_epochs("s.met_due")}, {_epochs("s.missed_due")}
    from findings f join repositories r on r.owner_id = f.owner_id and r.external_id = f.repository_id
    {system.WATCHED_BY}
    left join (select finding_id, count(*) as steps, max(reconstructed::int) as reconstructed,
        count(*) filter (where kind = 'opened') as first, max(at) filter (where kind = 'opened') as opened,
        max(severity) filter (where kind = 'opened') as opened_as, max(at) filter (where kind = 'fixed') as fixed
        from finding_events where owner_id = %(owner)s group by finding_id) e on e.finding_id = f.id
    left join finding_sla s on s.owner_id = f.owner_id and s.finding_id = f.id
    where f.owner_id = %(owner)s
) to stdout with (format csv)
"""
