"""Repair of missed deliveries: GitHub's log of the App's webhooks against our inbox (goals, N3; docs/deliveries.md)."""

import time
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import datetime

from dagster import Failure, MetadataValue, Nothing, OpExecutionContext, Out, op

from kilo_pipelines.acts.common import Log
from kilo_pipelines.acts.installation import align
from kilo_pipelines.core import delivery_gaps as rules
from kilo_pipelines.core.delivery_gaps import Action, Attempt, GapState, Standing, Step
from kilo_pipelines.core.events import ADMITTED, LIFECYCLE
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.ops.effects import TRANSPORT_RETRY
from kilo_pipelines.resources.github import GitHubResource, LoggedDelivery, LogPage, ProviderError
from kilo_pipelines.resources.store import StoreResource
from kilo_pipelines.store import Cost, DueGap, Integration, NewDelivery, Position, Repository, Store

# Pages of a hundred attempts that one run reads: 30,000 attempts an hour for 300 requests; a longer outage's log goes on where it
# stopped.
PAGES = 50
# GitHub asks for a second between writes, so that these take 200 s; what is missing beside them is pulled, which takes a fraction of
# that.
ASKS = 200
# Gaps of one run; what is left is the next one's.
GAPS = 1_000
# Half of the time between two runs (schedules.REPAIR_CRON): one is over when the next begins.
RUN_SECONDS = 300.0
# What no other try would change: GitHub forgot the delivery, or it isn't what the log calls it.
HOPELESS = {
    Reason.PROVIDER_NOT_FOUND,
    Reason.PROVIDER_INVALID,
    Reason.PAYLOAD_SHAPE_MISMATCH,
    Reason.INSTALLATION_ID_MISSING,
    Reason.BODY_TOO_LARGE,
}


@dataclass(frozen=True)
class _Read:
    """What was read of the log. `cursor`: where it was cut; None when it was read back to the last comparison."""

    attempts: list[Attempt]
    began: datetime  # by the provider's clock, as `now`
    now: datetime
    cursor: str | None
    pages: int


@dataclass
class Repair:
    """One run over all owners. `counts`: guids of the log by standing, and gaps by what was done about them."""

    store: Store
    github: GitHubResource
    log: Log
    counts: Counter[str] = field(default_factory=Counter)
    _asks: int = 0

    def run(self) -> None:
        """Compares the log with the inbox, then takes the next step of every gap that is due.

        Raises ProviderError when the log can't be read, when GitHub refuses the App's key or asks for a rest: what was done until then
        stands, and the next run goes on there.
        """
        app_id = self.github.app_id()
        if app_id is None:
            raise ProviderError(Reason.GITHUB_APP_MISSING, retryable=False)
        self._compare(app_id)
        until = time.monotonic() + RUN_SECONDS
        for due in self.store.delivery_gaps.due(GAPS):
            if time.monotonic() > until:
                self.log.warning("out of time: the next run goes on")
                break
            self._take(due, rules.next_step(due.gap, self.store.clock.now(), may_ask=self._asks < ASKS))

    # -- the log ------------------------------------------------------------------------------------------------------

    def _compare(self, app_id: int) -> None:
        """Notes what is missing since the last comparison; one that was cut is gone on with first, so that nothing between is skipped."""
        gaps, left = self.store.delivery_gaps, PAGES
        while left > 0:
            position = gaps.position(app_id)
            read = self._read(position, left)
            left -= read.pages
            self._note(read)
            done = read.cursor is None
            after = Position(
                revision=position.revision,
                compared_until=read.began if done else position.compared_until,
                reading_until=None if done else read.began,
                cursor=read.cursor,
            )
            newest_too = done and position.cursor is None
            if not gaps.keep_position(app_id, after, complete=newest_too):
                self.log.info("another comparison was faster: its position counts")
                return
            if newest_too:
                return
        self.log.warning(f"the log has more than {PAGES} new pages: the next run goes on")

    def _read(self, position: Position, most: int) -> _Read:
        """Pages from the newest one, or from where the last comparison was cut, back to before it began."""
        attempts: list[Attempt] = []
        cursor, began = position.cursor, position.reading_until
        for number in range(1, most + 1):
            try:
                page = self.github.deliveries(cursor)
            except ProviderError as failure:
                if failure.reason is not Reason.PAGE_CURSOR_REFUSED or number > 1:
                    raise
                cursor, began = None, None  # it has expired: everything again
                page = self.github.deliveries(cursor)
            began = began or page.provider_now
            attempts += page.attempts
            self.counts["malformed"] += page.malformed
            cursor = page.next
            if cursor is None or self._is_behind(page, (position.compared_until or began - rules.RETENTION) - rules.OVERLAP):
                return _Read(attempts, began, page.provider_now, None, number)
        return _Read(attempts, began or page.provider_now, page.provider_now, cursor, most)

    @staticmethod
    def _is_behind(page: LogPage, horizon: datetime) -> bool:
        return bool(page.attempts) and min(one.delivered_at for one in page.attempts) < horizon

    def _note(self, read: _Read) -> None:
        """What each guid of the log is; missing ones become gaps of their owners."""
        events = rules.by_guid(read.attempts)
        wanted = {guid: some[-1].installation_id for guid, some in events.items() if some[-1].event in ADMITTED | LIFECYCLE}
        installations = sorted({one for one in wanted.values() if one is not None})
        found = dict(zip(installations, self.store.owners.by_installations("github", installations), strict=True))
        ours = {
            guid: integration
            for guid, installation in wanted.items()
            if installation is not None and isinstance(integration := found[installation], Integration)
        }
        stored = self.store.delivery_gaps.stored([(integration, guid) for guid, integration in ours.items()])
        missing: dict[Integration, list[list[Attempt]]] = {}
        for guid, some in events.items():
            integration = ours.get(guid)
            how = rules.standing(
                some,
                connected_at=integration.connected_at if integration else None,
                suspended=integration is not None and integration.suspended,
                stored=integration is not None and (integration.id, guid) in stored,
                provider_now=read.now,
            )
            self.counts[how] += 1
            if how is Standing.MISSING and integration is not None:
                missing.setdefault(integration, []).append(some)
        for integration, gaps in missing.items():
            self.counts["new"] += self.store.delivery_gaps.record(integration, gaps)

    # -- gaps ---------------------------------------------------------------------------------------------------------

    def _take(self, due: DueGap, step: Step) -> None:
        if step.action is Action.ASK:
            self._ask(due)
        elif step.action is Action.PULL:
            self._pull(due)
        elif step.state is not None and step.reason is not None:
            self._end(due, step.state, step.reason)

    def _ask(self, due: DueGap) -> None:
        if not self._affordable(due, self.github.redelivery_costs()):
            return
        if not self.store.delivery_gaps.asking(due, rules.WINDOW):
            self.counts[Reason.MOVED_ON] += 1
            return
        self._asks += 1
        self.counts["asked"] += 1
        try:
            self.github.redeliver(due.attempt_id)
        except ProviderError as failure:
            self._give_rest(failure)
            self.log.warning(f"delivery {due.guid}: its redelivery may not come ({failure.reason})")
            # After a lost answer it may come all the same, and the next run looks; after a refusal it won't.
            if not failure.retryable:
                self._pull(replace(due, gap=replace(due.gap, state=GapState.ASKED)))

    def _pull(self, due: DueGap) -> None:
        about_installation = due.gap.event in LIFECYCLE
        if not self._affordable(due, self.github.pull_costs(installation=about_installation)):
            return
        if not self.store.delivery_gaps.pulling(due, rules.pull_wait(due.gap.pulls)):
            self.counts[Reason.MOVED_ON] += 1
            return
        try:
            found = self.github.delivery(due.attempt_id)
        except ProviderError as failure:
            self._give_rest(failure)
            if failure.reason in HOPELESS:
                self._end(due, GapState.GAVE_UP, failure.reason)
            else:
                self._try_again(due, failure.reason)
            return
        if (found.guid, found.event, found.installation_id) != (due.guid, due.gap.event, due.installation_id):
            self._end(due, GapState.GAVE_UP, Reason.PAYLOAD_SHAPE_MISMATCH)
            return
        (integration,) = self.store.owners.by_installations("github", [due.installation_id])
        if not isinstance(integration, Integration) or integration.id != due.integration_id:
            self.counts[Reason.MOVED_ON] += 1  # it left its owner this moment: the next run ends the gap
            return
        try:
            self._keep(due, integration, found, about_installation=about_installation)
        except ProviderError as failure:
            self._try_again(due, failure.reason)

    def _keep(self, due: DueGap, integration: Integration, found: LoggedDelivery, *, about_installation: bool) -> None:
        """Stores a pulled delivery as the ingress would have. Like there, what concerns the installation is applied before that.

        Not what the event says: it comes late, and what it says may have been undone since. What GitHub tells now is right.
        """
        if about_installation:
            known = self.store.owners.repository_ids(integration)
            present = self.github.installation_now(integration.installation_id)
            if present is None:
                self.store.owners.disconnect(integration.owner_id, integration.id)
            else:
                align(
                    self.store,
                    integration,
                    suspended=present.suspended,
                    repositories=[Repository(**vars(one)) for one in present.repositories],
                    known=known,
                )
        new = NewDelivery(
            owner_id=due.owner_id,
            integration_id=due.integration_id,
            provider_delivery_id=due.guid,
            event=found.event,
            action=found.action,
            body=found.body,
            headers={"pulled": str(due.attempt_id)},
        )
        receipt = self.store.inbox.record(new, skip=Reason.LIFECYCLE_APPLIED if about_installation else None)
        if receipt.outcome == "stored":
            self._end(due, GapState.PULLED, Reason.DELIVERY_PULLED)
        else:  # its webhook came meanwhile, or its body was here under another id
            self._end(due, GapState.REPAIRED, Reason.DUPLICATE_DELIVERY)

    def _try_again(self, due: DueGap, reason: Reason) -> None:
        """When it may be tried again was noted before."""
        self.counts["pull failed"] += 1
        self.log.warning(f"delivery {due.guid} could not be pulled ({reason}): tried again later")

    def _end(self, due: DueGap, state: GapState, reason: Reason) -> None:
        if self.store.delivery_gaps.end(due, state, reason):
            self.counts[state] += 1
            if state is GapState.GAVE_UP:
                self.log.warning(f"delivery {due.guid} ({due.gap.event}) is given up: {reason}")

    def _affordable(self, due: DueGap, costs: list[Cost]) -> bool:
        """Takes the costs from the integration's budget; False: not now, and the gap waits until they are there."""
        until = self.store.budgets.take(due.owner_id, due.integration_id, costs, self.store.clock.now())
        if until is not None:
            self.store.delivery_gaps.postpone(due, until)
            self.counts["postponed"] += 1
        return until is None

    @staticmethod
    def _give_rest(failure: ProviderError) -> None:
        """Raises what concerns the App and so every other gap, too: a limit, or its key."""
        if failure.reason in (Reason.PROVIDER_RATE_LIMITED, Reason.PROVIDER_REFUSED):
            raise failure


@op(
    out=Out(Nothing),
    retry_policy=TRANSPORT_RETRY,
    description="Compares GitHub's log of deliveries with the inbox; asks for what is missing again, then pulls it.",
)
def repair_deliveries(context: OpExecutionContext, store: StoreResource, github: GitHubResource) -> None:
    repair = Repair(store.get(), github, context.log)
    try:
        repair.run()
    except ProviderError as failure:
        # Who asks for a rest gets it: the next run by the clock is the retry.
        again = failure.retryable and failure.reason is not Reason.PROVIDER_RATE_LIMITED
        raise Failure(f"GitHub's log of deliveries: {failure}", allow_retries=again) from None
    finally:
        counts = {str(name): count for name, count in sorted(repair.counts.items()) if count}
        context.log.info(", ".join(f"{name}: {count}" for name, count in counts.items()) or "nothing in the log")
        context.add_output_metadata({name: MetadataValue.int(count) for name, count in counts.items()})
