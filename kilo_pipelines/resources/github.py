"""The GitHub App as a Dagster resource."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from dagster import ConfigurableResource

from kilo_pipelines.core.clock import SystemClock
from kilo_pipelines.core.effects import EffectIntent, EffectReceipt
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.providers import github_effects
from kilo_pipelines.providers.github import GitHubApp, GitHubInstallation, ProviderError
from kilo_pipelines.settings import Settings

__all__ = ["GitHubResource", "ProviderError"]

# What each use of a token may do at GitHub; minted per repository, least privilege (threats, rules 1 and 7).
READ = {"metadata": "read", "pull_requests": "read", "contents": "read"}
POST = {"metadata": "read", "pull_requests": "write", "issues": "write", "checks": "write"}


@lru_cache(maxsize=4)
def _app(api_url: str, app_id: int, key_file: str) -> GitHubApp:
    return GitHubApp(api_url, app_id, Path(key_file).read_text(), SystemClock())


class GitHubResource(ConfigurableResource[None]):
    """Reads and posts as the App's installation; tokens live in the client's memory only."""

    def _app(self) -> GitHubApp:
        settings = Settings()
        if settings.github_app_id is None:
            raise ProviderError(Reason.GITHUB_APP_MISSING, retryable=False)
        return _app(settings.github_api_url, settings.github_app_id, str(settings.github_private_key_file))

    def reader(self, installation_id: int, repository_id: int) -> GitHubInstallation:
        """A client that may read one repository."""
        return self._app().installation(installation_id, [repository_id], READ)

    def clone_token(self, installation_id: int, repository_id: int) -> str:
        """A read-only token for fetching one repository."""
        return self._app().token(installation_id, [repository_id], {"metadata": "read", "contents": "read"})

    def apply(self, installation_id: int, repository_id: int, intent: EffectIntent) -> EffectReceipt:
        """Makes one intended write; raises ProviderError with a reason and whether it may be tried again."""
        return github_effects.apply(self._app().installation(installation_id, [repository_id], POST), intent)
