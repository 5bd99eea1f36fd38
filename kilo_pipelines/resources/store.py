"""The store as a Dagster resource: one pool a process, opened at first use (after the worker's fork)."""

from __future__ import annotations

from functools import lru_cache

from dagster import ConfigurableResource

from kilo_pipelines import failpoints
from kilo_pipelines.core.clock import SystemClock
from kilo_pipelines.settings import Settings, current
from kilo_pipelines.store import Store
from kilo_pipelines.store.crypto import Cipher
from kilo_pipelines.telemetry import traces


def _make(app_url: str, system_url: str, key_file: str) -> Store:
    return Store(app_url, system_url, Cipher.from_file(key_file), SystemClock())


_open = lru_cache(maxsize=4)(_make)


def make_store(settings: Settings) -> Store:
    """A store with pools of its own, to be disposed of by the caller."""
    logins = settings.database_logins()
    return _make(logins["app"], logins["system"], str(settings.encryption_key_file))


def open_store(settings: Settings) -> Store:
    """The process's store for these settings."""
    failpoints.arm(settings.failpoints)
    traces.arm(settings, settings.process or "dagster")
    logins = settings.database_logins()
    return _open(logins["app"], logins["system"], str(settings.encryption_key_file))


class StoreResource(ConfigurableResource[None]):
    """Gives ops and sensors the store; holds no address and no secret in its configuration."""

    def get(self) -> Store:
        """The store of this process."""
        return open_store(current())
