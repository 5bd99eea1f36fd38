"""Copying an owner's Dependabot alerts into findings: page by page, repository by repository, each with its own outcome."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from dagster import AssetMaterialization, MetadataValue, Nothing, OpExecutionContext, Out, TableMetadataValue, op

from kilo_pipelines.acts.analysis import queue_analyses
from kilo_pipelines.acts.common import Log
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.work import WorkState
from kilo_pipelines.ops.effects import TRANSPORT_RETRY
from kilo_pipelines.ops.findings import as_events, deadline, policy_for
from kilo_pipelines.ops.ids import Ids, each
from kilo_pipelines.ops.items import reopened_by_person, say
from kilo_pipelines.ops.security_dismissal import reexamine
from kilo_pipelines.ops.security_notices import stage
from kilo_pipelines.ops.security_remediation import follow_up
from kilo_pipelines.ops.tables import table
from kilo_pipelines.resources.github import AlertPage, GitHubResource, ProviderError
from kilo_pipelines.resources.store import StoreResource
from kilo_pipelines.services.security import alerts as rules
from kilo_pipelines.services.security import findings as lifecycle
from kilo_pipelines.services.security import sla
from kilo_pipelines.services.security.config import SERVICE, SecurityConfig, selects
from kilo_pipelines.store import (
    Change,
    FindingEventRow,
    FindingRow,
    PageCount,
    Refused,
    Store,
    SyncTarget,
)

SOURCE = "dependabot"
# An owner's share of a run (contract 7.2.6): the rest goes on where it stopped, stalest repositories first.
OWNER_SECONDS = 480.0
# A refused credential is asked for again after an hour (contract 5).
AUTH_PAUSE = timedelta(minutes=60)
# An advisory's new severity moves no alert (providers/github_alerts.py): every fourth sync reads everything.
WHOLE_READING = timedelta(hours=24)
# Pages of a hundred alerts: ten times what GitHub shows of any repository that we know of; a link that leads on for ever ends here.
MAX_PAGES = 1_000


# A sync that somebody asked for is a work item of this service; its lease outlives the owner's share of a run.
REQUESTED = "security_sync"
REQUESTED_LEASE_SECONDS = OWNER_SECONDS + 120

# What a security lead looks at first; the whole list is `kilo-pipelines security findings`.
SHOWN = 20
SEVERITIES = ("critical", "high", "medium", "low")


@dataclass
class OwnerSync:
    """How an owner's sync ended. `complete`: every selected repository was read to its end (disabled ones apart)."""

    owner_id: UUID
    outcome: str
    complete: bool = False
    repositories: dict[str, str] = field(default_factory=dict)
    inserted: int = 0
    changed: int = 0
    unchanged: int = 0
    rows_written: int = 0
    quarantined: int = 0
    superseded: int = 0
    analyses: int = 0

    def add(self, page: PageCount) -> None:
        """Counts a page."""
        self.inserted += page.inserted
        self.changed += page.changed
        self.unchanged += page.unchanged
        self.rows_written += page.rows_written


@dataclass(frozen=True)
class _Alert:
    """An alert's facts under the names of the findings' columns."""

    found: rules.AlertFacts

    @property
    def source_id(self) -> str:
        return self.found.source_id

    @property
    def cwe_ids(self) -> list[str]:
        return list(self.found.cwe_ids)

    def fingerprint(self) -> str:
        return self.found.fingerprint()

    def facts(self) -> Mapping[str, Any]:
        facts = self.found
        return {
            "severity": facts.severity,
            "ghsa_id": facts.ghsa_id,
            "cve_id": facts.cve_id,
            "package_name": facts.package_name,
            "package_ecosystem": facts.package_ecosystem,
            "manifest_path": facts.manifest_path,
            "dependency_scope": facts.dependency_scope,
            "vulnerable_version_range": facts.vulnerable_version_range,
            "patched_version": facts.patched_version,
            "title": facts.title,
            "description": facts.description,
            "cvss_score": facts.cvss_score,
            "html_url": facts.html_url,
            "upstream_state": facts.upstream_state,
            "upstream_reason": facts.upstream_reason,
            "upstream_by": facts.upstream_by,
            "upstream_comment": facts.upstream_comment,
            "detected_at": facts.created_at,
            "source_updated_at": facts.updated_at,
            "fixed_at": facts.fixed_at,
            "dismissed_at": facts.dismissed_at,
            "auto_dismissed_at": facts.auto_dismissed_at,
        }


class AlertTaker:
    """Takes raw alerts of one repository for one owner under its policy; used by syncs and by webhooks."""

    def __init__(self, owner_id: UUID, repository_id: int, policy: sla.SlaPolicy, *, first_sync: bool) -> None:
        self._owner_id = owner_id
        self._repository_id = repository_id
        self._policy = policy
        self._first_sync = first_sync
        self._now = datetime.now(UTC)

    @staticmethod
    def sort(raw: Sequence[object]) -> tuple[list[_Alert], list[tuple[str, str, str]]]:
        """Alerts that can be taken, and the others as (number, reason, which fields are wrong)."""
        good, bad = [], []
        for one in raw:
            parsed = rules.parse_alert(one)
            if isinstance(parsed, rules.BadAlert):
                bad.append((str(parsed.number) if parsed.number is not None else "?", str(parsed.reason), parsed.detail))
            else:
                good.append(_Alert(parsed))
        return good, bad

    def decide(self, before: FindingRow | None, history: list[FindingEventRow], alert: _Alert, finding_id: UUID) -> Change:
        """What follows from one new or changed alert."""
        steps = lifecycle.transitions(
            before, alert.found, owner_id=self._owner_id, finding_id=finding_id, first_sync=self._first_sync
        )
        return Change(
            as_events(steps),
            deadline(history, steps, self._policy, self._repository_id, self._now),
            undecided=lifecycle.reopened_by_person(before, alert.found),
        )


def sync_owner(
    store: Store, github: GitHubResource, owner_id: UUID, log: Log, *, only: int | None = None, whole: bool = False
) -> OwnerSync:
    """Brings an owner's findings up to date, at most `OWNER_SECONDS`; `only`: one repository, selected or not (contract 7.2.3).

    `whole` reads every alert, whatever the conditional request would say: a person who asks for a backfill doubts what is there.
    """
    setting = store.owners.config(owner_id, SERVICE)
    if setting is None or not setting.enabled:
        return OwnerSync(owner_id, Reason.SECURITY_DISABLED)
    if setting.action_required is not None:
        return OwnerSync(owner_id, Reason.ACTION_REQUIRED)
    config = SecurityConfig.model_validate(setting.config)
    targets = [
        one
        for one in store.owners.sync_targets(owner_id)
        if (selects(config, one.repository_id) if only is None else one.repository_id == only)
    ]
    if not targets:
        return OwnerSync(owner_id, Reason.NO_REPOSITORIES)
    policy = policy_for(store, owner_id, config, actor="platform")
    # Settings are saved before deadlines follow: what a crash between the two left is caught up with here.
    now = datetime.now(UTC)
    store.findings.follow_policy(
        owner_id, policy.version, lambda history, repository: deadline(history, [], policy, repository, now)
    )
    done = OwnerSync(owner_id, "synced", complete=True)
    until = time.monotonic() + OWNER_SECONDS
    refused: set[int] = set()
    for number, target in enumerate(targets):
        if target.installation_id in refused:
            outcome = str(Reason.PROVIDER_AUTH)
        elif number and time.monotonic() > until:
            outcome = str(Reason.SYNC_OUT_OF_TIME)
        else:
            outcome = _sync_repository(store, github, owner_id, target, policy, done, log, whole)
        if outcome == Reason.PROVIDER_AUTH:
            refused.add(target.installation_id)
        done.repositories[target.full_name] = outcome
        if outcome in ("synced", "unchanged"):
            follow_up(store, github, owner_id, target.repository_id, log)
            reexamine(store, github, owner_id, target, policy, log, until)
        if outcome not in ("synced", "unchanged", Reason.ALERTS_DISABLED):
            done.complete = False
            log.warning(f"{target.full_name}: {outcome}")
    done.outcome = "synced" if done.complete else "partly"
    done.analyses = queue_analyses(store, owner_id, config, log)
    stage(store, owner_id)
    return done


def _sync_repository(
    store: Store,
    github: GitHubResource,
    owner_id: UUID,
    target: SyncTarget,
    policy: sla.SlaPolicy,
    done: OwnerSync,
    log: Log,
    whole: bool,
) -> str:
    """One repository to its end, or to the reason why not; a stopped one goes on at its checkpoint."""
    now = datetime.now(UTC)
    state = store.findings.begin_sync(owner_id, target.repository_id)
    if state.not_before is not None and state.not_before > now:
        return state.outcome or str(Reason.PROVIDER_RATE_LIMITED)

    def end(outcome: str, detail: str = "", *, wait: timedelta | None = None, complete: bool = False, **more: Any) -> str:
        after = now + wait if wait is not None else None
        store.findings.end_sync(
            owner_id, target.repository_id, outcome=outcome, detail=detail, not_before=after, complete=complete, **more
        )
        return outcome

    taker = AlertTaker(owner_id, target.repository_id, policy, first_sync=state.succeeded_at is None)
    cursor, etag, read, bad = state.cursor, None, 0, 0
    # The tag tells of changed states only, and only for the beginning: a day after the last whole reading all is read again.
    lately = state.read_at is not None and now - state.read_at < WHOLE_READING
    tag = state.etag if lately and cursor is None and not whole else None
    try:
        for _ in range(MAX_PAGES):
            page = github.alerts(target.installation_id, target.repository_id, target.full_name, etag=tag, after=cursor)
            if page.status == "unchanged":
                return end("unchanged", complete=True)
            if page.status != "ok":
                # A checkpoint that the provider doesn't take any more would be offered to it for ever.
                stuck = page.reason == Reason.PAGE_CURSOR_REFUSED
                return end(str(page.reason), page.detail, wait=_wait(page), restart=stuck)
            etag = page.etag if cursor is None else etag
            tag = None
            good, refused = taker.sort(page.alerts)
            store.findings.quarantine(owner_id, target.repository_id, refused)
            done.add(store.findings.apply_page(owner_id, target.repository_id, SOURCE, good, taker.decide, cursor=page.next))
            done.quarantined += len(refused)
            read, bad, cursor = read + len(page.alerts), bad + len(refused), page.next
            if cursor is None:
                break
        else:
            return end(str(Reason.SYNC_OUT_OF_TIME), f"more than {MAX_PAGES} pages")
    except ProviderError as failure:
        wait = timedelta(seconds=failure.retry_after_s) if failure.retry_after_s is not None else None
        return end(str(failure.reason), wait=wait)
    done.superseded += supersede(store, owner_id, target.repository_id, policy)
    log.info(f"{target.full_name}: {read} alerts read, {bad} in quarantine")
    # A sync that went on at a checkpoint has no tag of the first page, and another one is read whole soon.
    return end("synced", f"{bad} alerts in quarantine" if bad else "", complete=True, etag=etag, alerts=read)


def _wait(page: AlertPage) -> timedelta | None:
    if page.status == "auth_invalid":
        return AUTH_PAUSE
    return timedelta(seconds=page.retry_after_s) if page.retry_after_s is not None else None


def supersede(store: Store, owner_id: UUID, repository_id: int, policy: sla.SlaPolicy) -> int:
    """Duplicates of one advisory, package and manifest: the newest alert speaks for all, and the others come back when it is done."""
    now = datetime.now(UTC)
    found = store.findings.of_repository(owner_id, repository_id, open_or_superseded=True)
    old, back = lifecycle.supersessions(found)

    def change(kind: str, action: str, canonical: UUID | None) -> Callable[[FindingRow, list[FindingEventRow]], Change | None]:
        def decide(finding: FindingRow, history: list[FindingEventRow]) -> Change | None:
            if finding.canonical_id == canonical:  # somebody was quicker
                return None
            data = {"canonical": str(canonical)} if canonical else {}
            # From one canonical finding to another nothing changes but who speaks for it.
            moves = (finding.status == "open") == (kind == "ignored")
            steps = [
                lifecycle.decided(
                    finding,
                    kind,
                    action,
                    owner_id=owner_id,
                    at=now,
                    discriminator=f"{canonical or finding.canonical_id}:{now.isoformat()}",
                    data=data,
                )
            ]
            return Change(as_events(steps), deadline(history, steps, policy, repository_id, now)) if moves else Change([], None)

        return decide

    moved = 0
    for finding_id, canonical in old.items():
        disposition = {"disposition": "superseded", "reason": f"superseded:{canonical}", "by": "system", "canonical": canonical}
        moved += store.findings.dispose(
            owner_id, finding_id, disposition, change("ignored", "superseded", canonical), actor="platform"
        )
    for finding_id in back:
        moved += store.findings.dispose(owner_id, finding_id, None, change("reopened", "reopened", None), actor="platform")
    return moved


def worst(store: Store, owner_id: UUID) -> TableMetadataValue:
    """The worst open findings of an owner."""
    wanted = ("severity", "repository", "package_name", "title", "due_at", "overdue", "patched_version", "html_url")
    found = store.findings.listed(owner_id, status="open", limit=SHOWN)
    return table([{name: row[name] for name in wanted} for row in found])


def findings_metadata(
    numbers: Mapping[str, Any], the_worst: TableMetadataValue, repositories: Mapping[str, str]
) -> dict[str, MetadataValue[Any]]:
    """What is shown of an owner's findings: numbers that Dagster plots, the worst ones, how each repository stands."""
    shown = ("findings", "open", *(f"open_{one}" for one in SEVERITIES), "fixed", "ignored", "overdue")
    return {
        **{name.replace("_", " "): MetadataValue.float(float(numbers[name])) for name in shown},
        "the worst": the_worst,
        "repositories": table([{"repository": name, "outcome": how} for name, how in repositories.items()]),
    }


def deadline_metadata(
    store: Store, owner_id: UUID, numbers: Mapping[str, Any], policy: sla.SlaPolicy
) -> dict[str, MetadataValue[Any]]:
    """What is shown of an owner's deadlines."""
    return {
        "findings": MetadataValue.float(float(numbers["findings"])),
        "overdue": MetadataValue.float(float(numbers["overdue"])),
        "policy version": MetadataValue.int(policy.version),
        "the worst": worst(store, owner_id),
    }


def compliance_metadata(total: Mapping[str, int]) -> dict[str, MetadataValue[Any]]:
    """The two published figures with what they are made of; a figure without anything to measure is left out."""
    figures = {
        "open within due %": sla.percent(total["within_due"], total["within_due"] + total["overdue"]),
        "met of due in 90 days %": sla.percent(total["met"], total["met"] + total["missed"]),
    }
    return {
        **{name: MetadataValue.float(value) for name, value in figures.items() if value is not None},
        **{
            name.replace("_", " "): MetadataValue.float(float(total[name]))
            for name in ("open", "within_due", "overdue", "met", "missed")
        },
    }


def _materialized(store: Store, done: OwnerSync) -> Iterator[AssetMaterialization]:
    """What a sync brought up to date: every page wrote its findings' deadlines with them."""
    numbers = store.findings.numbers(done.owner_id)
    policy = store.findings.policy(done.owner_id)
    assert policy is not None  # noqa: S101  # a sync keeps one before it reads anything
    shown = {
        "security_findings": findings_metadata(numbers, worst(store, done.owner_id), done.repositories),
        "finding_sla": deadline_metadata(store, done.owner_id, numbers, sla.SlaPolicy.of_stored(*policy)),
        "sla_compliance": compliance_metadata(numbers),
    }
    for key, metadata in shown.items():
        yield AssetMaterialization(asset_key=key, partition=str(done.owner_id), metadata=metadata)


@op(
    out=Out(Nothing),
    retry_policy=TRANSPORT_RETRY,
    description="Syncs the named owners one after the other; each that was read whole is materialized.",
)
def sync_owners(context: OpExecutionContext, config: Ids, store: StoreResource, github: GitHubResource) -> None:
    platform = store.get()

    each(context, config.ids, lambda owner_id: tell(context, platform, sync_owner(platform, github, owner_id, context.log)))


def tell(context: OpExecutionContext, store: Store, done: OwnerSync, *, whole: bool = True) -> None:
    """What a sync did; an owner of whom everything was read is materialized."""
    context.log.info(
        f"owner {done.owner_id}: {done.outcome}; {done.inserted} new, {done.changed} changed, {done.unchanged} unchanged,"
        f" {done.quarantined} in quarantine, {done.superseded} superseded or back"
    )
    if done.complete and whole:
        for made in _materialized(store, done):
            context.log_event(made)


@op(
    out=Out(Nothing),
    retry_policy=TRANSPORT_RETRY,
    description="Claims syncs that somebody asked for and carries them out, one an owner at a time.",
)
def sync_requested(context: OpExecutionContext, config: Ids, store: StoreResource, github: GitHubResource) -> None:
    platform = store.get()

    def one(item_id: UUID) -> None:
        if reopened_by_person(context, platform, item_id):
            return
        claim = platform.queue.claim(
            item_id, REQUESTED, run_id=context.run_id, pools=lambda _kind, _plan: {REQUESTED: 1}, lease_s=REQUESTED_LEASE_SECONDS
        )
        if isinstance(claim, Refused):
            say(context, item_id, claim.outcome)
            return
        only = claim.details["repository_id"]
        done = sync_owner(platform, github, claim.owner_id, context.log, only=only)
        tell(context, platform, done, whole=only is None)
        if done.complete:
            platform.queue.complete(claim, Reason.ALERTS_SYNCED, details={}, effects=[])
            say(context, item_id, Reason.ALERTS_SYNCED)
        else:
            reason = Reason.SYNC_PARTLY if done.repositories else Reason(done.outcome)
            platform.queue.conclude(claim, WorkState.FAILED, reason)
            say(context, item_id, reason)

    each(context, config.ids, one)
