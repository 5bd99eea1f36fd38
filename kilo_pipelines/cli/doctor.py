"""What the platform needs, checked one by one; each missing thing with its remedy."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from ipaddress import ip_address
from json import loads
from pathlib import Path

import psutil
from sqlalchemy.exc import ProgrammingError

from kilo_pipelines.acts.installations import services_by_installation
from kilo_pipelines.cli import client, setup, supervisor
from kilo_pipelines.cli.doctor_oidc import login_checks
from kilo_pipelines.cli.roles import SKEW_SHARE
from kilo_pipelines.cloud_agent.adapters.kilo import VERSION
from kilo_pipelines.cloud_agent.hosted import CloudAgentError, client_of
from kilo_pipelines.cloud_agent.install import installed, package_directory
from kilo_pipelines.cloud_agent.sandbox import Sandbox, SandboxUnavailableError
from kilo_pipelines.core.checks import Check
from kilo_pipelines.core.clock import SystemClock
from kilo_pipelines.core.reasons import MEANING, Reason
from kilo_pipelines.providers.github_checks import Holder, look
from kilo_pipelines.providers.github_setup import GitHubSetup, SetupError
from kilo_pipelines.providers.models import ModelError, try_model
from kilo_pipelines.settings import Settings, SettingsError
from kilo_pipelines.store import DatabaseAwayError, SQLAlchemyError, app_secrets
from kilo_pipelines.store.crypto import CipherError
from kilo_pipelines.store.database import RoleError
from kilo_pipelines.store.embedded import EmbeddedPostgresError, binaries
from kilo_pipelines.store.migrate import fit, refusal

# One Kilo session, Postgres, Dagster's processes and workers: measured at about 3 GiB together.
MEMORY_BYTES = 3 * 2**30
DISK_BYTES = 2 * 2**30

_OFFLINE = "offline, `up` takes the twin's; else "


def run(settings: Settings) -> list[Check]:
    """All checks."""
    return [
        _python(),
        _git(),
        _postgres(settings),
        _broker(settings),
        _sandbox(settings),
        _agent(settings),
        *(_hosted(settings) if settings.agent == "hosted" else []),
        _database(settings),
        *_metrics_token(settings),
        *_api_key(settings),
        *_limits(settings),
        *_github(settings),
        *_model(settings),
        *_schema(settings),
        *_ports(settings),
        _listeners(settings),
        *login_checks(settings, SystemClock()),
        _memory(),
        _disk(settings),
    ]


def _python() -> Check:
    version = ".".join(str(part) for part in sys.version_info[:3])
    return Check("python", "python_too_old", sys.version_info >= (3, 11), version, "install Python 3.11 or newer")


def _git() -> Check:
    found = shutil.which("git")
    version = (
        subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout.strip()
        if found
        else "not on PATH"
    )
    return Check("git", "git_missing", found is not None, version, "install git")


def _postgres(settings: Settings) -> Check:
    code = "postgres_missing"
    if settings.database_is_elsewhere():
        return Check("postgres", code, True, "given", "")
    try:
        path = binaries() / "postgres"
    except EmbeddedPostgresError as failure:
        return Check("postgres", code, False, str(failure), "run `make deps`")
    return Check("postgres", code, path.exists(), "embedded" if path.exists() else f"{path} is missing", "run `make deps`")


def _schema(settings: Settings) -> list[Check]:
    """Whether database and program fit together, and this host's clock the database's; nothing before there is a database."""
    if not _store_expected(settings):
        return []
    try:
        store = setup.open_store(settings)
        revision, now = store.database.schema()
        store.database.dispose()
    except (DatabaseAwayError, ProgrammingError, CipherError, SettingsError) as failure:
        return [
            Check("schema", "schema_unreadable", False, type(failure).__name__, "is the database there? `kilo-pipelines init`")
        ]
    skew = abs((datetime.now(UTC) - now).total_seconds())
    return [
        Check("schema", f"schema_{fit(revision)}", fit(revision) == "equal", revision, refusal(revision) or ""),
        Check(
            "clock",
            "clock_skew",
            skew <= settings.lease_seconds * SKEW_SHARE,
            f"{skew:.1f} s from the database's",
            "leases are moments that hosts compare: synchronise the clocks (NTP)",
        ),
    ]


def _broker(settings: Settings) -> Check:
    code = "broker_missing"
    if settings.broker_address is not None:
        return Check("broker", code, True, f"given: {settings.broker_address}", "")
    try:
        path = supervisor.redis_server()
    except supervisor.SupervisorError as failure:
        return Check("broker", code, False, str(failure), "run `make deps`")
    return Check("broker", code, path.exists(), "embedded redis" if path.exists() else f"{path} is missing", "run `make deps`")


def _sandbox(settings: Settings) -> Check:
    code = str(Reason.SANDBOX_UNAVAILABLE)
    if settings.sandbox == "none":
        remedy = "it works only with the offline twin: unset it"
        return Check("sandbox", code, settings.offline, "switched off by KILO_SANDBOX=none", remedy)
    try:
        report = Sandbox.find(package_directory()).probe()
    except SandboxUnavailableError as failure:
        return Check("sandbox", code, False, str(failure), "sessions are refused until it is there")
    found = f"{report.mode}; {'; '.join(report.guarantees or report.problems)}"
    return Check("sandbox", code, report.ok, found, "sessions are refused until bubblewrap works on this machine")


def _agent(settings: Settings) -> Check:
    code = str(Reason.AGENT_UNAVAILABLE)
    if settings.agent != "kilo":
        return Check("agent", code, True, settings.agent, "")
    found = f"kilo {VERSION}" if installed() else f"kilo {VERSION} is not installed"
    return Check("agent", code, installed(), found, "run `make deps`")


def _kept(path: Path) -> bool:
    """Whether a secret lies there."""
    return path.is_file() and path.stat().st_size > 0


def _hosted(settings: Settings) -> list[Check]:
    """Address, token, key, and whether the service answers; offline the twin answers once the platform runs."""
    needed = not settings.offline
    offline = "" if needed else _OFFLINE
    address = settings.cloud_agent_url
    checks = [
        Check(
            "cloud agent",
            str(Reason.AGENT_UNAVAILABLE),
            address is not None,
            address or "no address",
            f"{offline}set KILO_CLOUD_AGENT_URL",
            required=needed,
        )
    ]
    for name, file in (("token", settings.cloud_agent_token_file), ("internal key", settings.cloud_agent_key_file)):
        checks.append(
            Check(
                f"cloud agent {name}",
                str(Reason.AGENT_UNAVAILABLE),
                _kept(file),
                "stored" if _kept(file) else "none",
                f"{offline}store it in {file} (mode 0600)",
                required=needed,
            )
        )
    if all(check.ok for check in checks) and (needed or supervisor.is_running(settings)):
        checks.append(_hosted_answers(settings))
    return checks


def _hosted_answers(settings: Settings) -> Check:
    name, remedy = "cloud agent answers", "look at the address and at the service's status page"
    try:
        word = client_of(settings).health()
    except CloudAgentError as failure:
        return Check(name, str(failure.reason), False, failure.detail or str(failure.reason), remedy)
    return Check(name, str(Reason.CLOUD_AGENT_UNAVAILABLE), word == "ok", word or "nothing that is known", remedy)


def _database(settings: Settings) -> Check:
    """Whether the store answers under logins that may do no more than they should; nothing to ask while nothing runs."""
    code = str(Reason.STORE_UNAVAILABLE)
    if not _store_expected(settings):
        return Check("database", code, True, "not asked: the platform isn't running", "", required=False)
    try:
        store = setup.open_store(settings)
        store.database.check_roles()
        owners = len(store.owners.all())
        store.database.dispose()
    except (SettingsError, CipherError, RoleError) as failure:
        return Check("database", code, False, str(failure), "restore secrets/ from a backup, or start the platform once")
    except SQLAlchemyError as failure:
        return Check("database", code, False, type(failure).__name__, "look at PostgreSQL: `kilo-pipelines status`, postgres.log")
    return Check("database", code, True, f"answers, {owners} owners", "")


def _metrics_token(settings: Settings) -> list[Check]:
    """Nothing before the first start, which makes it."""
    if not settings.secrets_dir.exists():
        return []
    if not _kept(settings.metrics_token_file):
        return [_fault("metrics token", Reason.METRICS_TOKEN_MISSING, "none", required=False)]
    return [Check("metrics token", str(Reason.METRICS_TOKEN_MISSING), True, "stored", "", required=False)]


def _api_key(settings: Settings) -> list[Check]:
    """Whether the command line's key opens the API that it would ask; nothing where neither was named and nothing runs."""
    named = settings.api_url is not None or settings.api_key is not None or settings.api_key_file is not None
    if not named and not supervisor.is_running(settings):
        return []
    try:
        where = client.place(settings)
        role = str(loads(where.ask("GET", "/me", {}))["role"])
    except client.ApiError as failure:
        return [_fault("api key", failure.reason or Reason.API_ANSWER_UNUSABLE, failure.detail)]
    except (ValueError, KeyError, TypeError) as failure:
        return [_fault("api key", Reason.API_ANSWER_UNUSABLE, type(failure).__name__)]
    return [Check("api key", str(Reason.KEY_REFUSED), True, f"{where.base} knows it: {role}", "")]


def _limits(settings: Settings) -> list[Check]:
    """Owners for whom nothing that asks a model may run: meant or not, somebody will ask why."""
    if not _store_expected(settings):
        return []
    try:
        store = setup.open_store(settings)
        stopped = store.spend.stopped()
        store.database.dispose()
    except (SettingsError, CipherError, SQLAlchemyError):
        return []  # `database` says so
    if not stopped:
        return [Check("limits", str(Reason.BUDGET_ZERO), True, "no owner's budget is zero", "", required=False)]
    return [_fault(f"limits of {owner}", reason, scope, required=False) for owner, scope, reason in stopped]


def _store_expected(settings: Settings) -> bool:
    """Whether there is a database to ask: a given one, or the running platform's, after a first start."""
    return (settings.secrets_dir / "database.json").exists() and (
        settings.database_is_elsewhere() or supervisor.is_running(settings)
    )


def _github(settings: Settings) -> list[Check]:
    """What is stored of the App, and then what GitHub says of it."""
    later = settings.offline  # before the first start their absence is no fault
    offline = _OFFLINE if later else ""
    try:
        held = app_secrets.read(settings)
    except (CipherError, OSError) as failure:
        return [_fault("app secrets", Reason.SECRET_UNREADABLE, str(failure))]
    valid = held.valid(SystemClock().now())
    secret, key = bool(valid), held.private_key is not None
    count = f"{len(valid)} valid" if len(valid) > 1 else "stored"
    checks = [
        Check(
            "webhook secret",
            str(Reason.WEBHOOK_SECRET_MISSING),
            secret,
            count if secret else "none: every webhook is answered 503",
            f"{offline}{MEANING[Reason.WEBHOOK_SECRET_MISSING][1]}",
            required=not later,
        ),
        Check(
            "github app",
            str(Reason.GITHUB_APP_MISSING),
            settings.github_app_id is not None and key,
            f"app {settings.github_app_id or 'id missing'}, private key {'stored' if key else 'missing'}",
            f"{offline}{MEANING[Reason.GITHUB_APP_MISSING][1]}",
            required=not later,
        ),
    ]
    if settings.github_app_id is None or held.private_key is None or (later and not supervisor.is_running(settings)):
        return checks
    try:
        with GitHubSetup(settings.github_api_url, settings.github_web_url, SystemClock()) as github:
            asked = look(github, settings.github_app_id, held.private_key, settings.webhook_url, _holders(settings))
    except SetupError as failure:
        asked = [_fault("github app", failure.reason, failure.detail)]
    # What GitHub says of the App stands for what is stored of it.
    return [checks[0], *asked]


def _holders(settings: Settings) -> dict[int, Holder]:
    """Whose the installations are; nobody's where the database can't be asked, which is a check of its own."""
    if not _store_expected(settings):
        return {}
    try:
        store = setup.open_store(settings)
        found = {number: Holder(*one) for number, one in services_by_installation(store).items()}
        store.database.dispose()
    except (SettingsError, CipherError, SQLAlchemyError):
        return {}
    return found


def _fault(name: str, reason: Reason, found: str, *, required: bool = True) -> Check:
    return Check(name, str(reason), False, found or MEANING[reason][0], MEANING[reason][1], required)


def _model(settings: Settings) -> list[Check]:
    """Address and key, and one call of each model by this process, which holds the key for that long."""
    address, needed = settings.model_base_url, not settings.offline
    try:
        key = settings.model_key_file.read_text().strip() if settings.model_key_file.exists() else ""
    except OSError as failure:
        return [_fault("model key", Reason.SECRET_UNREADABLE, str(failure))]
    offline = "" if needed else _OFFLINE
    lacking = [(Reason.MODEL_MISSING, address), (Reason.MODEL_KEY_MISSING, key)]
    if address is None or not key:
        return [
            Check("model", str(reason), False, MEANING[reason][0], f"{offline}{MEANING[reason][1]}", required=needed)
            for reason, held in lacking
            if not held
        ]
    if settings.offline and not supervisor.is_running(settings):
        return [Check("model", str(Reason.MODEL_UNREACHABLE), True, f"{address}, not asked: the twin isn't running", "")]
    return [_model_answers(address, key, model) for model in settings.all_models]


def _model_answers(address: str, key: str, model: str) -> Check:
    try:
        return Check(f"model {model}", str(Reason.MODEL_UNREACHABLE), True, try_model(address, key, model), "")
    except ModelError as failure:
        return _fault(f"model {model}", failure.reason, f"{address}: {failure.detail}")


def _ports(settings: Settings) -> list[Check]:
    if supervisor.is_running(settings):
        return [Check("ports", "port_taken", True, "in use by this platform", "")]
    ports = {"public": settings.public_port, "admin": settings.admin_port}
    if settings.offline:
        ports["twin"] = settings.twin_port
    return [_port(settings.host, name, number) for name, number in ports.items()]


def _port(host: str, name: str, number: int) -> Check:
    remedy = f"set KILO_{name.upper()}_PORT to a free one"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, number))
        except OSError as failure:
            return Check(f"{name} port", "port_taken", False, f"{number}: {failure.strerror}", remedy)
    return Check(f"{name} port", "port_taken", True, str(number), "")


def _listeners(settings: Settings) -> Check:
    """What the running platform's processes listen on; before a start, what they would."""
    listening = _listening(settings) if supervisor.is_running(settings) else {(settings.host, settings.public_port)}
    beyond = sorted(f"{address}:{port}" for address, port in listening if not _loopback(address))
    return Check(
        "listeners",
        "listens_beyond_loopback",
        not beyond,
        f"{', '.join(beyond)} can be reached from elsewhere" if beyond else "loopback only",
        "unset KILO_HOST, or keep a proxy with TLS and a firewall before it",
        required=False,
    )


def _listening(settings: Settings) -> set[tuple[str, int]]:
    found: set[tuple[str, int]] = set()
    for record in supervisor.read_state(settings).get("children", []):
        with suppress(psutil.Error):
            process = psutil.Process(int(str(record["pid"])))
            for one in [process, *process.children(recursive=True)]:
                with suppress(psutil.Error):
                    found |= {tuple(held.laddr) for held in one.net_connections("inet") if held.status == psutil.CONN_LISTEN}
    return found


def _loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _memory() -> Check:
    free = psutil.virtual_memory().available
    found = f"{free / 2**30:.1f} GiB available"
    return Check("memory", "memory_short", free >= MEMORY_BYTES, found, "3 GiB are needed with the Kilo CLI", required=False)


def _disk(settings: Settings) -> Check:
    place = next(path for path in (settings.home, *settings.home.parents) if path.exists())
    free = shutil.disk_usage(place).free
    found = f"{free / 2**30:.1f} GiB free"
    return Check("disk", "disk_short", free >= DISK_BYTES, found, "2 GiB are needed", required=False)
