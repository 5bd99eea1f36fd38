"""Copying an owner's Dependabot alerts into findings: page by page, repository by repository, each with its own outcome."""

import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Literal
from uuid import UUID

from dagster import AssetMaterialization, MetadataValue, Nothing, OpExecutionContext, Out, op

from kilo_pipelines.acts.analysis import queue_analyses
from kilo_pipelines.acts.common import Log
from kilo_pipelines.acts.security import targets_of
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.work import WorkState
from kilo_pipelines.ops.effects import TRANSPORT_RETRY
from kilo_pipelines.ops.findings import as_events, deadline, policy_for
from kilo_pipelines.ops.ids import Ids, each
from kilo_pipelines.ops.items import reopened_by_person, say
from kilo_pipelines.ops.security_dismissal import reexamine
from kilo_pipelines.ops.security_notices import stage
from kilo_pipelines.ops.security_remediation import follow_up
from kilo_pipelines.ops.tables import bars, table
from kilo_pipelines.resources.github import AlertPage, GitHubResource, ProviderError
from kilo_pipelines.resources.store import StoreResource
from kilo_pipelines.services.security import alerts as rules
from kilo_pipelines.services.security import findings as lifecycle
from kilo_pipelines.services.security import sla
from kilo_pipelines.services.security.config import SERVICE, SecurityConfig
from kilo_pipelines.store import (
    Change,
    FindingEventRow,
    FindingRow,
    PageCount,
    Refused,
    SQLAlchemyError,
    Store,
    SyncTarget,
)

SOURCE = "dependabot"
# An owner's share of a run (contract 7.2.6), looked at before each page: the rest goes on where it stopped, stalest repositories first.
OWNER_SECONDS = 480.0
# A refused credential is asked for again after an hour (contract 5).
AUTH_PAUSE = timedelta(minutes=60)
# An advisory's new severity moves no alert (providers/github_alerts.py): every fourth sync reads everything, a day after the last
# one began, or up to half the time between two syncs less: an owner's turn comes now sooner and now later in its run.
WHOLE_READING = timedelta(hours=21)
# A wait for the integration's budget that is slept through: it fills by more than one page a second.
BUDGET_SECONDS = 5.0
# The installation's trouble: its other repositories would get the same answer.
OF_THE_INSTALLATION = (Reason.PROVIDER_AUTH, Reason.PROVIDER_RATE_LIMITED)
# What data of one repository may provoke in our code, in libraries or in the database; whatever stops the process isn't among them.
UNEXPECTED = (SQLAlchemyError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# Pages of a hundred alerts: ten times what GitHub shows of any repository that we know of; a link that leads on for ever ends here.
MAX_PAGES = 1_000


# A sync that somebody asked for is a work item of this service. Its lease outlives the owner's share of a run, the last page and what
# follows it: a fetch of the repository (six minutes at most, cloud_agent/git.py) to look at the grounds of dismissals.
REQUESTED = "security_sync"
REQUESTED_LEASE_SECONDS = OWNER_SECONDS + 420

# What a security lead looks at first; the whole list is `kilo-pipelines security findings`.
SHOWN = 20
SEVERITIES = ("critical", "high", "medium", "low")


@dataclass(frozen=True)
class Trigger:
    """Why an owner is synced, and who wanted it."""

    how: Literal["schedule", "request", "command", "backfill"]
    by: str


BY_CLOCK = Trigger("schedule", "platform")


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
    outdated: int = 0
    quarantined: int = 0
    superseded: int = 0
    analyses: int = 0

    def add(self, page: PageCount) -> None:
        """Counts a page."""
        self.inserted += page.inserted
        self.changed += page.changed
        self.unchanged += page.unchanged
        self.rows_written += page.rows_written
        self.outdated += page.outdated
        self.quarantined += page.quarantined


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

    @staticmethod
    def sort(raw: Sequence[object]) -> tuple[list[_Alert], list[tuple[str, str, str]]]:
        """Alerts that can be taken, and the others as (number, reason, which fields are wrong)."""
        good, bad = [], []
        for one in raw:
            parsed = rules.parse_alert(one)
            if isinstance(parsed, rules.BadAlert):
                bad.append((parsed.source_id, str(parsed.reason), parsed.detail))
            else:
                good.append(_Alert(parsed))
        return good, bad

    def decide(
        self,
        before: FindingRow | None,
        history: list[FindingEventRow],
        alert: _Alert,
        finding_id: UUID,
        newest: tuple[int, Mapping[str, Any]] | None,
    ) -> Change:
        """What follows from one new or changed alert. A policy that was saved since this began counts, not the one it began with."""
        now = datetime.now(UTC)
        steps = lifecycle.transitions(
            before,
            alert.found,
            owner_id=self._owner_id,
            finding_id=finding_id,
            first_sync=self._first_sync,
            history=history,
            seen=now,
        )
        policy = sla.SlaPolicy.of_stored(*newest) if newest else self._policy
        return Change(
            as_events(steps),
            deadline(history, steps, policy, self._repository_id, now),
            undecided=lifecycle.reopened_by_person(before, alert.found),
        )


def sync_owner(
    store: Store,
    github: GitHubResource,
    owner_id: UUID,
    log: Log,
    *,
    only: int | None = None,
    whole: bool = False,
    trigger: Trigger = BY_CLOCK,
) -> OwnerSync:
    """Brings an owner's findings up to date, at most `OWNER_SECONDS`; `only`: one repository, selected or not (contract 7.2.3).

    `whole` reads every alert, whatever the conditional request or a checkpoint would say: a person who asks for a backfill doubts
    what is there.
    """
    until = time.monotonic() + OWNER_SECONDS
    setting = store.owners.config(owner_id, SERVICE)
    if setting is None or not setting.enabled:
        return OwnerSync(owner_id, Reason.SECURITY_DISABLED)
    if setting.action_required is not None:
        return OwnerSync(owner_id, Reason.ACTION_REQUIRED)
    config = SecurityConfig.model_validate(setting.config)
    targets = targets_of(store, owner_id, config, only)
    if not targets:
        return OwnerSync(owner_id, Reason.NO_REPOSITORIES)
    if trigger.how in ("command", "backfill"):  # a request was noted when it was made
        store.findings.note_sync(owner_id, "triggered", {"trigger": trigger.how, "repository_id": only}, actor=trigger.by)
    policy = policy_for(store, owner_id, config, actor="platform")
    # Settings are saved before deadlines follow: what a crash between the two left is caught up with here.
    now = datetime.now(UTC)
    store.findings.follow_policy(
        owner_id, policy.version, lambda history, repository: deadline(history, [], policy, repository, now)
    )
    done = OwnerSync(owner_id, "synced", complete=True)
    refused = {
        one.installation_id: str(Reason.PROVIDER_AUTH)
        for one in targets
        if one.refused_until is not None and one.refused_until > now
    }
    for number, target in enumerate(targets):
        if target.installation_id in refused:
            outcome = refused[target.installation_id]
        elif number and time.monotonic() > until:
            outcome = str(Reason.SYNC_OUT_OF_TIME)
        else:
            try:
                outcome, target = _sync_repository(store, github, owner_id, target, policy, done, log, whole, until)
                if outcome in ("synced", "unchanged"):
                    follow_up(store, github, owner_id, target.repository_id, log)
                    reexamine(store, github, owner_id, target, policy, log, until)
            except UNEXPECTED as failure:
                # The words of an error may be somebody's data: the log says what it was and where.
                log.error(f"{target.full_name}: {type(failure).__name__}\n{''.join(traceback.format_tb(failure.__traceback__))}")
                outcome = str(Reason.SYNC_FAILED)
                store.findings.end_sync(
                    owner_id, target.repository_id, outcome=outcome, detail=type(failure).__name__, complete=False
                )
        if outcome in OF_THE_INSTALLATION:
            refused[target.installation_id] = outcome
        done.repositories[target.full_name] = outcome
        if outcome not in ("synced", "unchanged", Reason.ALERTS_DISABLED):
            done.complete = False
            log.warning(f"{target.full_name}: {outcome}")
    done.outcome = "synced" if done.complete else "partly"
    done.analyses = queue_analyses(store, owner_id, config, log)
    stage(store, owner_id)
    store.findings.note_sync(owner_id, "completed", _counted(done, trigger, only), actor=trigger.by)
    return done


def _counted(done: OwnerSync, trigger: Trigger, only: int | None) -> dict[str, Any]:
    """What the audit keeps of a sync (contract 7.2.9)."""
    return {
        "source": "system" if trigger == BY_CLOCK else "user",
        "trigger": trigger.how,
        "repository_id": only,
        "outcome": done.outcome,
        "repositories": dict(Counter(done.repositories.values())),
        **{name: getattr(done, name) for name in ("inserted", "changed", "unchanged", "quarantined", "superseded", "analyses")},
    }


def _sync_repository(
    store: Store,
    github: GitHubResource,
    owner_id: UUID,
    target: SyncTarget,
    policy: sla.SlaPolicy,
    done: OwnerSync,
    log: Log,
    whole: bool,
    until: float,
) -> tuple[str, SyncTarget]:
    """One repository to its end, or to the reason why not, and the repository under its present name.

    A stopped one goes on at its checkpoint, and then reads what changed since: that stands at the beginning.
    """
    now = datetime.now(UTC)
    state = store.findings.begin_sync(owner_id, target.repository_id)
    if state.not_before is not None and state.not_before > now:
        return state.outcome or str(Reason.PROVIDER_RATE_LIMITED), target

    def end(
        outcome: str, detail: str = "", *, wait: timedelta | None = None, complete: bool = False, **more: Any
    ) -> tuple[str, SyncTarget]:
        after = datetime.now(UTC) + wait if wait is not None else None
        store.findings.end_sync(
            owner_id, target.repository_id, outcome=outcome, detail=detail, not_before=after, complete=complete, **more
        )
        return outcome, target

    def refused_there(outcome: str, detail: str, wait: timedelta | None, **more: Any) -> tuple[str, SyncTarget]:
        """The provider's limit is everybody's; a short budget of ours was left to others and holds nobody else."""
        if wait is not None and outcome == Reason.PROVIDER_RATE_LIMITED:
            store.budgets.block(owner_id, target.integration_id, datetime.now(UTC) + wait)
        return end(outcome, detail, wait=wait, **more)

    taker = AlertTaker(owner_id, target.repository_id, policy, first_sync=state.succeeded_at is None)
    cursor, etag, read, bad = None if whole else state.cursor, None, 0, 0
    resumed = behind = cursor is not None
    # The tag tells of changed states only, and only for the beginning: a day after the last whole reading all is read again.
    lately = state.read_at is not None and now - state.read_at < WHOLE_READING
    tag = state.etag if lately and not resumed and not whole else None
    try:
        for number in range(MAX_PAGES):
            if number and time.monotonic() > until:
                return end(str(Reason.SYNC_OUT_OF_TIME), f"after {number} pages")
            short = _within_budget(store, github, owner_id, target)
            if short is not None:
                return end(str(Reason.PROVIDER_RATE_LIMITED), "the integration's budget is used up", wait=short)
            page = github.alerts(target.installation_id, target.repository_id, target.full_name, etag=tag, after=cursor)
            if page.full_name is not None:
                log.info(f"{target.full_name} is {page.full_name} now")
                store.owners.rename(owner_id, target.repository_id, page.full_name)
                target = replace(target, full_name=page.full_name)
            if page.status == "unchanged":
                return end("unchanged", complete=True)
            if page.status != "ok":
                # A checkpoint that the provider doesn't take any more would be offered to it for ever.
                stuck = page.reason == Reason.PAGE_CURSOR_REFUSED
                return refused_there(str(page.reason), page.detail, _wait(page), restart=stuck)
            etag = page.etag if cursor is None else etag
            tag = None
            good, refused = taker.sort(page.alerts)
            store.findings.quarantine(owner_id, target.repository_id, refused)
            taken = store.findings.apply_page(owner_id, target.repository_id, SOURCE, good, taker.decide, cursor=page.next)
            done.add(taken)
            done.quarantined += len(refused)
            read, bad, cursor = read + len(page.alerts), bad + len(refused) + taken.quarantined, page.next
            known = resumed and not behind and not taken.inserted + taken.changed
            if known or (cursor is None and not behind):
                break
            behind = behind and cursor is not None
        else:
            return end(str(Reason.SYNC_OUT_OF_TIME), f"more than {MAX_PAGES} pages")
    except ProviderError as failure:
        wait = timedelta(seconds=failure.retry_after_s) if failure.retry_after_s is not None else None
        return refused_there(str(failure.reason), "", wait)
    done.superseded += supersede(store, owner_id, target.repository_id, policy)
    log.info(f"{target.full_name}: {read} alerts read, {bad} in quarantine")
    told = f"{bad} alerts in quarantine" if bad else ""
    if resumed:
        # What lies before a checkpoint was read at another time: no whole reading, and the next sync makes one.
        return end("synced", told, complete=True)
    return end("synced", told, complete=True, etag=etag, alerts=read, whole_since=state.attempted_at)


def _within_budget(store: Store, github: GitHubResource, owner_id: UUID, target: SyncTarget) -> timedelta | None:
    """Takes a page from the integration's budget, after a short wait if need be; else how long it has to be waited for."""
    while True:
        now = datetime.now(UTC)
        until = store.budgets.take(owner_id, target.integration_id, github.page_costs(), now)
        if until is None:
            return None
        wait = until - now
        if wait.total_seconds() > BUDGET_SECONDS:
            return wait
        time.sleep(wait.total_seconds())


def _wait(page: AlertPage) -> timedelta | None:
    if page.status == "auth_invalid":
        return AUTH_PAUSE
    return timedelta(seconds=page.retry_after_s) if page.retry_after_s is not None else None


def supersede(store: Store, owner_id: UUID, repository_id: int, policy: sla.SlaPolicy) -> int:
    """`settle_duplicates` for a whole repository."""
    found = store.findings.of_repository(owner_id, repository_id, open_or_superseded=True)
    return settle_duplicates(found, partial(store.findings.dispose, owner_id), owner_id, repository_id, policy)


def settle_duplicates(
    found: list[FindingRow], dispose: Callable[..., bool], owner_id: UUID, repository_id: int, policy: sla.SlaPolicy
) -> int:
    """Duplicates of one advisory, package and manifest: the newest alert speaks for all, and the others come back when it is done."""
    now = datetime.now(UTC)
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
        moved += dispose(finding_id, disposition, change("ignored", "superseded", canonical), actor="platform")
    for finding_id in back:
        moved += dispose(finding_id, None, change("reopened", "reopened", None), actor="platform")
    return moved


def worst(store: Store, owner_id: UUID) -> dict[str, MetadataValue[Any]]:
    """The worst open findings of an owner, and the page of the first one."""
    wanted = ("severity", "repository", "package_name", "title", "due_at", "overdue", "patched_version", "html_url")
    found = store.findings.listed(owner_id, status="open", limit=SHOWN)
    page = found[0]["html_url"] if found else None
    return {
        **({"the worst one": MetadataValue.url(page)} if page else {}),
        "the worst": table([{name: row[name] for name in wanted} for row in found]),
    }


def findings_metadata(
    numbers: Mapping[str, Any], the_worst: Mapping[str, MetadataValue[Any]], repositories: Mapping[str, str]
) -> dict[str, MetadataValue[Any]]:
    """What is shown of an owner's findings: numbers that Dagster plots, the worst ones, how each repository stands."""
    shown = ("findings", "open", *(f"open_{one}" for one in SEVERITIES), "fixed", "ignored", "overdue", "quarantined")
    return {
        **{name.replace("_", " "): MetadataValue.float(float(numbers[name])) for name in shown},
        "open by severity": bars({one: numbers[f"open_{one}"] for one in SEVERITIES}),
        **the_worst,
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
        **worst(store, owner_id),
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
        f" {done.outdated} {Reason.ALERT_OUTDATED}, {done.quarantined} in quarantine, {done.superseded} superseded or back"
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
        by = Trigger("request", claim.details["requested_by"])
        done = sync_owner(platform, github, claim.owner_id, context.log, only=only, trigger=by)
        tell(context, platform, done, whole=only is None)
        if done.complete:
            platform.queue.complete(claim, Reason.ALERTS_SYNCED, details={}, effects=[])
            say(context, item_id, Reason.ALERTS_SYNCED)
        else:
            reason = Reason.SYNC_PARTLY if done.repositories else Reason(done.outcome)
            platform.queue.conclude(claim, WorkState.FAILED, reason)
            say(context, item_id, reason)

    each(context, config.ids, one)
