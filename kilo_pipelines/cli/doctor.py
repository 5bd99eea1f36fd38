"""What the platform needs, checked one by one; each missing thing with its remedy."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass

import psutil

from kilo_pipelines.cli import supervisor
from kilo_pipelines.cloud_agent.adapters.kilo import VERSION
from kilo_pipelines.cloud_agent.install import installed, package_directory
from kilo_pipelines.cloud_agent.sandbox import Sandbox, SandboxUnavailableError
from kilo_pipelines.settings import Settings
from kilo_pipelines.store.embedded import EmbeddedPostgresError, binaries

# One Kilo session, Postgres, Dagster's processes and workers: measured at about 3 GiB together.
MEMORY_BYTES = 3 * 2**30
DISK_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    ok: bool
    found: str
    remedy: str
    required: bool = True


def run(settings: Settings) -> list[Check]:
    """All checks."""
    return [
        _python(),
        _git(),
        _postgres(settings),
        _broker(),
        _sandbox(settings),
        _agent(settings),
        *_github(settings),
        _model(settings),
        *_ports(settings),
        _memory(),
        _disk(settings),
    ]


def _python() -> Check:
    version = ".".join(str(part) for part in sys.version_info[:3])
    return Check("python", sys.version_info >= (3, 11), version, "install Python 3.11 or newer")


def _git() -> Check:
    found = shutil.which("git")
    version = (
        subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout.strip()
        if found
        else "not on PATH"
    )
    return Check("git", found is not None, version, "install git")


def _postgres(settings: Settings) -> Check:
    if settings.database_url is not None:
        return Check("postgres", True, "given by KILO_DATABASE_URL", "")
    try:
        path = binaries() / "postgres"
    except EmbeddedPostgresError as failure:
        return Check("postgres", False, str(failure), "run `make deps`")
    return Check("postgres", path.exists(), "embedded", "run `make deps`")


def _broker() -> Check:
    try:
        return Check("broker", supervisor.redis_server().exists(), "embedded redis", "run `make deps`")
    except supervisor.SupervisorError as failure:
        return Check("broker", False, str(failure), "run `make deps`")


def _sandbox(settings: Settings) -> Check:
    if settings.sandbox == "none":
        return Check(
            "sandbox", settings.offline, "switched off by KILO_SANDBOX=none", "it works only with the offline twin: unset it"
        )
    try:
        report = Sandbox.find(package_directory()).probe()
    except SandboxUnavailableError as failure:
        return Check("sandbox", False, str(failure), "sessions are refused until it is there")
    found = f"{report.mode}; {'; '.join(report.guarantees or report.problems)}"
    return Check("sandbox", report.ok, found, "sessions are refused until bubblewrap works on this machine")


def _agent(settings: Settings) -> Check:
    if settings.agent == "scripted":
        return Check("agent", True, "scripted", "")
    return Check(
        "agent", installed(), f"kilo {VERSION}" if installed() else f"kilo {VERSION} is not installed", "run `make deps`"
    )


def _github(settings: Settings) -> list[Check]:
    later = settings.offline  # `up` takes the twin's, so before the first start their absence is no fault
    return [
        Check(
            "webhook secret",
            settings.webhook_secret_file.exists(),
            "stored" if settings.webhook_secret_file.exists() else "none: every webhook is answered 503 (webhook_secret_missing)",
            f"store the webhook's secret in {settings.webhook_secret_file} (mode 0600) and start again",
            required=not later,
        ),
        Check(
            "github app",
            settings.github_app_id is not None and settings.github_private_key_file.exists(),
            f"app {settings.github_app_id}" if settings.github_app_id else "no app id",
            f"set KILO_GITHUB_APP_ID and store the private key in {settings.github_private_key_file} (mode 0600)",
            required=not later,
        ),
    ]


def _model(settings: Settings) -> Check:
    found = settings.model_base_url or "no address"
    return Check("model", settings.model_base_url is not None, found, "set KILO_MODEL_BASE_URL", required=not settings.offline)


def _ports(settings: Settings) -> list[Check]:
    if supervisor.is_running(settings):
        return [Check("ports", True, "in use by this platform", "")]
    ports = {"public": settings.public_port, "admin": settings.admin_port, "dagster": settings.dagster_port}
    if settings.offline:
        ports["twin"] = settings.twin_port
    return [_port(name, number) for name, number in ports.items()]


def _port(name: str, number: int) -> Check:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError as failure:
            return Check(f"{name} port", False, f"{number}: {failure.strerror}", f"set KILO_{name.upper()}_PORT to a free one")
    return Check(f"{name} port", True, str(number), "")


def _memory() -> Check:
    free = psutil.virtual_memory().available
    return Check(
        "memory", free >= MEMORY_BYTES, f"{free / 2**30:.1f} GiB available", "3 GiB are needed with the Kilo CLI", required=False
    )


def _disk(settings: Settings) -> Check:
    place = settings.home if settings.home.exists() else settings.home.parent
    free = shutil.disk_usage(place if place.exists() else "/").free
    return Check("disk", free >= DISK_BYTES, f"{free / 2**30:.1f} GiB free", "2 GiB are needed", required=False)
