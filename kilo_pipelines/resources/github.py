"""The GitHub App as a Dagster resource."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from dagster import ConfigurableResource

from kilo_pipelines.core.clock import SystemClock
from kilo_pipelines.core.effects import EffectIntent, EffectKind, EffectReceipt
from kilo_pipelines.core.rates import Rate
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.providers import github_alerts, github_deliveries, github_effects
from kilo_pipelines.providers.github import BranchHead, GitHubApp, GitHubInstallation, InstallationNow, ProviderError, PullState
from kilo_pipelines.providers.github_alerts import AlertPage
from kilo_pipelines.providers.github_deliveries import LoggedDelivery, LogPage
from kilo_pipelines.providers.github_effects import LostLeaseError
from kilo_pipelines.settings import current
from kilo_pipelines.store import Cost, app_secrets
from kilo_pipelines.store.crypto import CipherError

__all__ = [
    "AlertPage",
    "BranchHead",
    "GitHubInstallation",
    "GitHubResource",
    "InstallationNow",
    "LogPage",
    "LoggedDelivery",
    "LostLeaseError",
    "ProviderError",
    "PullState",
]

# What each use of a token may do at GitHub; minted per repository, least privilege (threats, rules 1 and 7).
READ = {"metadata": "read", "pull_requests": "read", "contents": "read"}
POST = {"metadata": "read", "pull_requests": "write", "issues": "write", "checks": "write"}
OPEN_PULL = {"metadata": "read", "contents": "read", "pull_requests": "write"}
PERMISSIONS = {
    EffectKind.GITHUB_PULL_REQUEST: OPEN_PULL,
    EffectKind.GITHUB_DISMISS_ALERT: github_alerts.DISMISS_ALERTS,
    EffectKind.GITHUB_REOPEN_ALERT: github_alerts.DISMISS_ALERTS,
}

# What a launch and an effect ask of GitHub (pull request, its author's permission, its comments; repository, installation, read-back), counted in tests; a new
# pull request asks once more, which its rarity makes up for.
LAUNCH_READS = 9
EFFECT_READS = 5
# GitHub allows 900 points a minute, a read is one (REST API, secondary rate limits); half is left to others. Twenty launches and
# the effects of their admission are 260.
READ_BURST = 450
# Syncs can wait, reviews can't: they never take the last of the budget, which a few launches with their effects need at once.
READS_LEFT = 4 * (LAUNCH_READS + EFFECT_READS)
# A redelivery is a write, and a write is five points (REST API, secondary rate limits).
REDELIVERY_READS = 5
# An installation read anew: itself, a token, and two pages of repositories, which are more than most owners have.
INSTALLATION_READS = 4
# GitHub asks for at most 80 content-generating requests a minute (REST API, secondary rate limits); half is left to others.
WRITE_BURST = 40


@lru_cache(maxsize=4)
def _app(api_url: str, app_id: int, _home: str, _state: tuple[int, ...]) -> GitHubApp:
    """The App's client, with its tokens, for as long as its key's files stay as they are."""
    try:
        key = app_secrets.read(current()).private_key
    except CipherError as failure:
        raise ProviderError(Reason.GITHUB_APP_MISSING, retryable=False, detail=str(failure)) from None
    if key is None:
        raise ProviderError(Reason.GITHUB_APP_MISSING, retryable=False, detail="no private key is stored")
    return GitHubApp(api_url, app_id, key, SystemClock())


class GitHubResource(ConfigurableResource[None]):
    """Reads and posts as the App's installation; tokens live in the client's memory only."""

    def _app(self) -> GitHubApp:
        settings = current()
        if settings.github_app_id is None:
            raise ProviderError(Reason.GITHUB_APP_MISSING, retryable=False)
        return _app(settings.github_api_url, settings.github_app_id, str(settings.home), app_secrets.state(settings))

    def reader(self, installation_id: int, repository_id: int) -> GitHubInstallation:
        """A client that may read one repository."""
        return self._app().installation(installation_id, [repository_id], READ)

    def default_branch(self, installation_id: int, repository_id: int, full_name: str) -> BranchHead:
        """The head of a repository's default branch now; raises ProviderError."""
        return self.reader(installation_id, repository_id).default_branch(full_name)

    def alerts(
        self, installation_id: int, repository_id: int, full_name: str, *, etag: str | None, after: str | None
    ) -> AlertPage:
        """One page of a repository's Dependabot alerts (see `providers.github_alerts.fetch_alerts_of`); ProviderError without a token."""
        installation = self._app().installation(installation_id, [repository_id], github_alerts.READ_ALERTS)
        return github_alerts.fetch_alerts_of(installation, repository_id, full_name, etag=etag, after_page=after)

    def may_read_alerts(self, installation_id: int, repository_id: int) -> None:
        """Raises ProviderError where a repository's alerts may not be read: `permission_missing`, `owner_changed` and others."""
        self._app().installation(installation_id, [repository_id], github_alerts.READ_ALERTS)

    def clone_token(self, installation_id: int, repository_id: int) -> str:
        """A read-only token for fetching one repository."""
        return self._app().token(installation_id, [repository_id], {"metadata": "read", "contents": "read"})

    def push_token(self, installation_id: int, repository_id: int) -> str:
        """A token for creating one branch of one repository; minted when a checked commit is ready, never before."""
        return self._app().token(installation_id, [repository_id], {"metadata": "read", "contents": "write"})

    def launch_costs(self) -> list[Cost]:
        """What launching one review takes from the integration's budget."""
        return [Cost("read", LAUNCH_READS, self._reads())]

    def effect_costs(self) -> list[Cost]:
        """What one effect takes from the integration's budget."""
        return [Cost("read", EFFECT_READS, self._reads()), Cost("write", 1, Rate(current().github_writes_per_hour, WRITE_BURST))]

    def page_costs(self) -> list[Cost]:
        """What one page of alerts takes from the integration's budget; it leaves what launches and effects need."""
        return [Cost("read", 1, self._reads(), leave=READS_LEFT)]

    def app_id(self) -> int | None:
        """The App's id; None while there is no App."""
        return current().github_app_id

    def deliveries(self, cursor: str | None) -> LogPage:
        """A page of the App's log of deliveries (see `providers.github_deliveries.list_deliveries`); raises ProviderError."""
        return github_deliveries.list_deliveries(self._app(), cursor)

    def delivery(self, attempt_id: int) -> LoggedDelivery:
        """One delivery's payload out of the log, checked; raises ProviderError."""
        return github_deliveries.fetch_delivery(self._app(), attempt_id)

    def redeliver(self, attempt_id: int) -> None:
        """Asks for a redelivery; raises ProviderError."""
        github_deliveries.redeliver(self._app(), attempt_id)

    def installation_now(self, installation_id: int) -> InstallationNow | None:
        """The installation as it is now, None when it is gone; raises ProviderError."""
        return self._app().installation_now(installation_id)

    def redelivery_costs(self) -> list[Cost]:
        """What asking for one redelivery takes from the integration's budget; it leaves what launches and effects need."""
        return [Cost("read", REDELIVERY_READS, self._reads(), leave=READS_LEFT)]

    def pull_costs(self, *, installation: bool) -> list[Cost]:
        """What pulling one delivery takes, with the installation read anew where its event is about that."""
        return [Cost("read", 1 + INSTALLATION_READS * installation, self._reads(), leave=READS_LEFT)]

    @staticmethod
    def _reads() -> Rate:
        return Rate(current().github_reads_per_hour, READ_BURST)

    def apply(
        self, installation_id: int, repository_id: int, intent: EffectIntent, before_write: Callable[[], bool]
    ) -> EffectReceipt:
        """Makes one intended write; raises ProviderError with a reason and whether it may be tried again.

        `before_write` is asked right before the write: False (somebody else has the effect by now) and nothing is written.
        """
        permissions = PERMISSIONS.get(intent.kind, POST)
        return github_effects.apply(self._app().installation(installation_id, [repository_id], permissions), intent, before_write)
