"""Settings of every process: environment (`KILO_*`) over `<home>/config.env` over the defaults below.

Holds: names, defaults and where files lie. Does not belong here: values of secrets in memory longer than a caller needs
them; nothing is read at import time: processes build `Settings()` at their entry point.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from kilo_pipelines.core.limits import Price

# The longest name below the socket directory (a session's door to the model proxy) has 30 bytes, and Linux takes 107 in all.
SOCKETS_BYTES = 75
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class SettingsError(Exception):
    """A setting or a file it names can't be used; the message says which and what to do."""


def default_home() -> Path:
    """`KILO_HOME`, else `~/.kilo-pipelines`."""
    return _absolute(Path(os.environ.get("KILO_HOME") or "~/.kilo-pipelines"))


def _absolute(path: Path) -> Path:
    """Children run in another directory than the caller."""
    return path.expanduser().absolute()


def _safe_address(value: str) -> str:
    """https, or this machine; no credentials, which belong into a secret file, query or fragment. ValueError."""
    parts = urlsplit(value)
    plain = not (parts.username or parts.password or parts.query or parts.fragment) and parts.hostname
    if not plain or not (parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK)):
        raise ValueError("an https address (or http on this machine) without credentials, query or fragment is needed")
    return value


class Settings(BaseSettings):
    """All settings. Each field's description is its documentation (`docs/settings.md`)."""

    model_config = SettingsConfigDict(env_prefix="KILO_", extra="ignore", env_file_encoding="utf-8")

    home: Path = Field(default_factory=default_home, description="Where the platform keeps its state, logs and secrets.")
    run_dir: Path | None = Field(
        default=None, description="Directory of sockets (0700, short path). Default: under /tmp, by home."
    )
    host: str = Field(default="127.0.0.1", description="Address that the listeners bind to.")
    public_port: int = Field(default=8080, description="Webhooks and callbacks.")
    admin_port: int = Field(default=8081, description="Control API, metrics, and Dagster's UI behind the operator's login.")
    admin_origin: str | None = Field(
        default=None,
        description="Origin under which browsers reach the admin port through a TLS proxy, such as https://kilo.example.",
    )
    api_url: str | None = Field(
        default=None,
        description="Control API that the command line speaks; https, but for this machine. Default: this home's admin port.",
    )
    api_key_file: Path | None = Field(
        default=None, description="File (0600) with the command line's API key. Default: the operator's."
    )
    api_key: SecretStr | None = Field(default=None, description="The key itself, where a file can't be had.")
    oidc_issuer: str | None = Field(
        default=None,
        description="OpenID Connect issuer where operators log in, exactly as it names itself. Client secret: secrets/oidc-client-secret.",
    )
    oidc_client_id: str | None = Field(default=None, description="Our client id at that issuer.")
    oidc_operators: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Who of the issuer's people is an operator: verified e-mail addresses or `sub` values, with commas between. Default: nobody.",
    )
    oidc_operator_group: str | None = Field(
        default=None, description="A value of the `groups` claim that makes an operator, too."
    )
    oidc_private_network: bool = Field(
        default=False, description="The issuer may lie in a private network (10/8, 172.16/12, 192.168/16, fc00::/7)."
    )
    password_login: bool = Field(
        default=True, description="Whether operators may log in with the password, too. Without it an issuer is needed."
    )
    public_origin: str | None = Field(
        default=None,
        description="Origin under which providers reach the public port through a TLS proxy, such as https://hooks.kilo.example.",
    )
    twin_port: int = Field(default=8090, description="Offline twin of GitHub and of the model.")
    database_url: str | None = Field(default=None, description="Administrator URL of a given PostgreSQL 16+; unset: embedded.")
    broker_address: str | None = Field(
        default=None,
        description="A given broker: redis://host:6379/0 or rediss://host:6379/0, without its password (secrets/broker-password); unset: embedded.",
    )
    callback_address: str | None = Field(
        default=None,
        description="Base address of the public listener as hosts with agents see it. Default: KILO_HOST and KILO_PUBLIC_PORT.",
    )
    listeners: Literal["both", "public", "admin"] = Field(
        default="both", description="Which listeners an ingress process serves: several public ones may stand beside one admin."
    )
    secrets_from: Path | None = Field(
        default=None,
        description="Directory into which an orchestrator mounts this process's secrets; `run` and `init` copy them to the home, mode 0600.",
    )
    offline: bool = Field(default=True, description="Run against the offline twin.")
    agent: Literal["kilo", "scripted", "hosted"] = Field(
        default="kilo", description="Agent CLI that works in the sandbox, or `hosted`: reviews go to the hosted Cloud Agent."
    )
    scripted_behaviour: str = Field(default="honest", description="How the scripted agent behaves; tests make it lie.")
    agents_max: int | None = Field(default=None, ge=1, description="Sessions at once on this host. Default: by free memory.")
    sandbox: Literal["bwrap", "none"] = Field(default="bwrap", description="`none` works only with the offline twin.")
    sensor_shards: int = Field(default=8, ge=1, le=32, description="Work sensors that wait for events.")
    cloud_agent_url: str | None = Field(
        default=None, description="Base address of the hosted Cloud Agent. Its token: secrets/cloud-agent-token."
    )
    cloud_agent_organization: str | None = Field(
        default=None,
        pattern=r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$",
        description="Kilo organization that hosted sessions are charged to; unset: the token's own account.",
    )
    cloud_agent_poll_seconds: float = Field(
        default=30.0, ge=1, description="How often a hosted session is looked at when no callback comes."
    )
    github_api_url: str = Field(default="https://api.github.com", description="Base address of GitHub's REST API.")
    github_app_id: int | None = Field(default=None, description="Id of the GitHub App.")
    github_reads_per_hour: float = Field(
        default=4500, gt=0, description="Requests of ours an hour and installation; GitHub allows 5,000 and more."
    )
    github_writes_per_hour: float = Field(
        default=450, gt=0, description="Writes of ours an hour and installation; GitHub asks for at most 500."
    )
    model_base_url: str | None = Field(default=None, description="OpenAI-compatible base address of the model.")
    model: str = Field(default="default", description="Model that sessions use where an owner's settings name none.")
    models: list[str] = Field(default=[], description="Further models that owners may be allowed to use: JSON list of names.")
    encryption_key: Path | None = Field(
        default=None, description="Key file elsewhere than in secrets/, such as on a volume that backups leave out."
    )
    model_prices: dict[str, Price] = Field(
        default={},
        description="JSON of model and its price in USD per million tokens: input, output, and cached where it differs.",
    )
    # With recovery's 5 s and a new run's start, what a killed process held is at work again within 30 s.
    lease_seconds: float = Field(default=15.0, ge=2, description="A lease not extended for this long is over.")
    heartbeat_seconds: float = Field(default=5.0, ge=0.5, description="How often a session extends its lease.")
    failpoints: Path | None = Field(
        default=None, description="For crash tests: a directory whose files name the points at which a process kills itself."
    )
    session_silence_seconds: float = Field(default=420.0, description="A session without any sign of life ends after this.")
    session_cap_seconds: float = Field(default=1800.0, description="Hard cap of a session.")
    registries: dict[str, str] = Field(
        default={},
        description="Package registries that owners may allow for write sessions: JSON of name and base address.",
    )
    smtp_url: str | None = Field(
        default=None,
        description="Mail server of notices: smtps://user@host or smtp://host:587. Its password: secrets/smtp-password.",
    )
    smtp_from: str | None = Field(default=None, description="Sender of notices.")
    slack_api_url: str = Field(default="https://slack.com/api", description="Slack. The bot's token: secrets/slack-token.")
    known_exploited_file: Path | None = Field(
        default=None,
        description="Catalogue of exploited vulnerabilities (CISA's JSON). Without one nothing is dismissed automatically.",
    )

    log_format: Literal["text", "json"] = Field(default="text", description="Log lines for people, or one JSON object each.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="What the platform itself and Dagster log at least; other libraries say warnings and worse."
    )
    process: str | None = Field(
        default=None,
        pattern=r"^[a-z][a-z0-9-]{0,40}$",
        description="Name of this process in logs and traces, such as worker-dispatch. `up` sets it for each.",
    )
    otlp_endpoint: str | None = Field(
        default=None,
        description="OpenTelemetry collector (OTLP over HTTP) that gets traces, such as https://collector.example:4318. "
        "Unset: no traces. Its headers: secrets/otlp-headers.",
    )

    # A redelivery comes within days; a quarter's bodies help to understand a dispute.
    keep_delivery_bodies_days: float = Field(
        default=90, gt=3, description="Days that bodies of settled webhooks are kept; their keys stay."
    )
    keep_session_events_days: float = Field(default=90, gt=0, description="Days that steps of ended sessions are kept.")
    keep_callbacks_days: float = Field(default=7, gt=0, description="Days that callbacks are kept after their token's end.")
    keep_service_runs_days: float = Field(
        default=14, gt=0, description="Days that finished runs of services are kept in Dagster."
    )
    keep_asset_runs_days: float = Field(
        default=180, gt=0, description="Days that finished runs of assets, with their plots, are kept."
    )

    @field_validator("registries")
    @classmethod
    def _plain_addresses(cls, value: dict[str, str]) -> dict[str, str]:
        """https, or this machine's twin; no credentials, which every session would share; a slash at the end closes the base."""
        for name, base in value.items():
            parts = urlsplit(base)
            plain = not (parts.username or parts.password or parts.query or parts.fragment) and parts.hostname
            local = parts.scheme == "http" and parts.hostname in LOOPBACK
            if not re.fullmatch(r"[a-z][a-z0-9-]{0,30}", name) or not plain or not (parts.scheme == "https" or local):
                raise ValueError(f"registry {name}: an https address without credentials, query or fragment is needed")
        return {name: f"{base.rstrip('/')}/" for name, base in value.items()}

    @field_validator("oidc_operators", mode="before")
    @classmethod
    def _separated(cls, value: object) -> object:
        return tuple(one.strip() for one in value.split(",") if one.strip()) if isinstance(value, str) else value

    @field_validator("oidc_issuer")
    @classmethod
    def _issuer(cls, value: str | None) -> str | None:
        """As it names itself: what is compared with tokens isn't changed."""
        return _safe_address(value) if value else None

    @field_validator("otlp_endpoint", "cloud_agent_url")
    @classmethod
    def _base(cls, value: str | None) -> str | None:
        """No slash at the end: paths are put behind it."""
        return _safe_address(value).rstrip("/") if value is not None else None

    @field_validator("broker_address")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        """The password is a file: an address stands in process lists and in unit files."""
        if value is not None:
            parts = urlsplit(value)
            if parts.scheme not in ("redis", "rediss") or not parts.hostname or parts.username or parts.password:
                raise ValueError("redis://host:port/db or rediss://host:port/db without a password is needed")
        return value

    @field_validator("public_origin", "admin_origin")
    @classmethod
    def _bare_origin(cls, value: str | None) -> str | None:
        """A scheme and a host, perhaps a port: what follows is ours."""
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("https", "http") or not parts.hostname or parts.path.strip("/") or parts.query or parts.username:
            raise ValueError("an origin such as https://hooks.example is needed")
        return f"{parts.scheme}://{parts.netloc}"

    @field_validator("home", "run_dir", "api_key_file", "secrets_from", "encryption_key")
    @classmethod
    def _from_anywhere(cls, value: Path | None) -> Path | None:
        return None if value is None else _absolute(value)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Adds `<home>/config.env`, whose home must be known before."""
        from pydantic_settings import DotEnvSettingsSource

        home = _absolute(Path(init_settings().get("home") or default_home()))
        chosen = DotEnvSettingsSource(settings_cls, env_file=home / "config.env")
        return init_settings, env_settings, chosen

    @property
    def sockets(self) -> Path:
        """The 0700 directory of unix sockets; SettingsError when its path is too long for one."""
        name = hashlib.sha256(str(self.home).encode()).hexdigest()[:8]
        found = self.run_dir or Path(tempfile.gettempdir()) / f"kilo-{os.getuid()}-{name}"
        if len(os.fsencode(found)) > SOCKETS_BYTES:
            raise SettingsError(
                f"{found} is too long for unix sockets: set KILO_RUN_DIR to a path of at most {SOCKETS_BYTES} bytes"
            )
        return found

    @property
    def secrets_dir(self) -> Path:
        return self.home / "secrets"

    @property
    def logs_dir(self) -> Path:
        return self.home / "logs"

    @property
    def database_admin_file(self) -> Path:
        """Where `init` finds the administrator's URL when KILO_DATABASE_URL isn't set."""
        return self.secrets_dir / "database-admin-url"

    def given_database(self) -> str | None:
        """The administrator's URL of a given PostgreSQL, from environment or secret file; None: embedded."""
        if self.database_url is not None:
            return self.database_url
        return self.database_admin_file.read_text().strip() if self.database_admin_file.exists() else None

    def database_is_elsewhere(self) -> bool:
        """Whether the database runs without this home's supervisor: a given one, or one that an orchestrator gave the logins of."""
        return self.secrets_from is not None or self.given_database() is not None

    @property
    def broker_password_file(self) -> Path:
        return self.secrets_dir / "broker-password"

    @property
    def repos_dir(self) -> Path:
        return self.home / "repositories"

    @property
    def work_dir(self) -> Path:
        return self.home / "work"

    @property
    def dagster_home(self) -> Path:
        return self.home / "dagster"

    @property
    def encryption_key_file(self) -> Path:
        return self.encryption_key or self.secrets_dir / "encryption.key"

    @property
    def github_app_file(self) -> Path:
        """Every secret of the GitHub App, sealed (`store.app_secrets`)."""
        return self.secrets_dir / "github-app.sealed"

    @property
    def github_private_key_file(self) -> Path:
        """Where a person may put the App's key: it is sealed at the next start, and this file goes."""
        return self.secrets_dir / "github-app.pem"

    @property
    def webhook_secret_file(self) -> Path:
        """The same for the webhook's secret."""
        return self.secrets_dir / "github-webhook-secret"

    @property
    def smtp_password_file(self) -> Path:
        """Password of the mail server."""
        return self.secrets_dir / "smtp-password"

    @property
    def slack_token_file(self) -> Path:
        """Token of the Slack app's bot."""
        return self.secrets_dir / "slack-token"

    @property
    def otlp_headers_file(self) -> Path:
        """Headers for the collector of traces, a line `name: value` each."""
        return self.secrets_dir / "otlp-headers"

    def otlp_headers(self) -> dict[str, str]:
        """Those headers, {} without the file; SettingsError for a line that is none (and not what it says)."""
        if not self.otlp_headers_file.exists():
            return {}
        found = {}
        for number, line in enumerate(self.otlp_headers_file.read_text().splitlines(), 1):
            name, colon, value = line.partition(":")
            if line.strip() and not (colon and name.strip() and value.strip()):
                raise SettingsError(f"{self.otlp_headers_file}, line {number}: `name: value` is needed")
            if line.strip():
                found[name.strip().lower()] = value.strip()
        return found

    @property
    def cloud_agent_token_file(self) -> Path:
        """Bearer token of the hosted Cloud Agent."""
        return self.secrets_dir / "cloud-agent-token"

    @property
    def cloud_agent_key_file(self) -> Path:
        """The hosted Cloud Agent's internal key, which `prepareSession` asks for beside the token."""
        return self.secrets_dir / "cloud-agent-internal-key"

    @property
    def model_key_file(self) -> Path:
        return self.secrets_dir / "model-api-key"

    @property
    def operator_key_file(self) -> Path:
        return self.secrets_dir / "operator-api-key"

    @property
    def metrics_token_file(self) -> Path:
        """What a scraper of `/metrics` shows."""
        return self.secrets_dir / "metrics-token"

    @property
    def audit_heads_file(self) -> Path:
        return self.home / "audit" / "heads.log"

    @property
    def public_url(self) -> str:
        return f"http://{self.host}:{self.public_port}"

    @property
    def callback_url(self) -> str:
        """Where sessions call back."""
        return (self.callback_address or self.public_url).rstrip("/")

    @property
    def admin_url(self) -> str:
        return f"http://{self.host}:{self.admin_port}"

    @property
    def admin_address(self) -> str:
        """Where a person's browser finds the admin port."""
        return self.admin_origin or f"http://localhost:{self.admin_port}"

    @property
    def webhook_url(self) -> str:
        """Where GitHub is to send webhooks."""
        return f"{self.public_origin or self.public_url}/webhooks/github"

    @property
    def github_web_url(self) -> str:
        """Where people find GitHub, by the rule that GitHub's own REST addresses follow."""
        return web_url_of(self.github_api_url)

    @property
    def all_models(self) -> list[str]:
        """The platform's models, the default first."""
        return list(dict.fromkeys([self.model, *self.models]))

    @property
    def dagster_prefix(self) -> str:
        """Where the admin listener serves Dagster's UI."""
        return "/dagster"

    @property
    def dagster_url(self) -> str:
        return f"{self.admin_origin or self.admin_url}{self.dagster_prefix}"

    @property
    def dagster_socket(self) -> Path:
        return self.sockets / "dagster-ui.sock"

    @property
    def operator_password_file(self) -> Path:
        return self.secrets_dir / "operator-password"

    @property
    def oidc_configured(self) -> bool:
        """Whether operators can log in at an issuer."""
        return bool(self.oidc_issuer and self.oidc_client_id)

    @property
    def oidc_client_secret_file(self) -> Path:
        """Our secret at the OpenID Connect issuer; without it we are a public client."""
        return self.secrets_dir / "oidc-client-secret"

    @property
    def operator_sessions_file(self) -> Path:
        return self.secrets_dir / "operator-sessions"

    @property
    def twin_url(self) -> str:
        return f"http://localhost:{self.twin_port}"

    def database_logins(self) -> dict[str, str]:
        """SQLAlchemy URLs by login (`migrator`, `app`, `system`, `dagster`); SettingsError before the first start."""
        path = self.secrets_dir / "database.json"
        if not path.exists():
            raise SettingsError(
                f"{path} is missing: start the platform once with `kilo-pipelines up`, or run `kilo-pipelines init`"
            )
        logins: dict[str, str] = json.loads(path.read_text())
        return logins


def web_url_of(api_url: str) -> str:
    """The web address that belongs to a REST address: github.com, GitHub Enterprise Cloud's own names, an Enterprise Server."""
    if api_url.startswith("https://api."):
        return "https://" + api_url.removeprefix("https://api.").rstrip("/")
    return api_url.rstrip("/").removesuffix("/api/v3")


def api_url_of(web_url: str) -> str:
    """The REST address that belongs to a web address; the other way round of `web_url_of`."""
    base = web_url.rstrip("/")
    host = urlsplit(base).hostname or ""
    if host == "github.com" or host.endswith(".ghe.com"):
        return f"https://api.{host}"
    return f"{base}/api/v3"


def private_dir(path: Path) -> Path:
    """Makes a 0700 directory of ours; SettingsError when the path is a link or somebody else's."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise SettingsError(f"{path} must be a directory of user {os.getuid()}")
    path.chmod(0o700)
    return path


def write_secret(path: Path, value: str) -> None:
    """Writes a file with mode 0600 in one step."""
    private_dir(path.parent)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(value)
    partial.replace(path)


def write_config(settings: Settings, values: dict[str, Any]) -> None:
    """Keeps what was decided for this home, beside lines that a person added; the environment still wins over it."""
    path = settings.home / "config.env"
    known = path.read_text().splitlines() if path.exists() else []
    names = {f"KILO_{name.upper()}" for name in values}
    others = [line for line in known if line.strip() and line.split("=", 1)[0].strip() not in names]
    decided = [f"KILO_{name.upper()}={value}" for name, value in values.items() if value is not None]
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join([*decided, *others]) + "\n")
    partial.replace(path)


def in_environment(*names: str) -> list[str]:
    """Which of these settings the environment decides, so that nothing written to `config.env` changes them."""
    return [f"KILO_{name.upper()}" for name in names if f"KILO_{name.upper()}" in os.environ]


def current() -> Settings:
    """The settings as environment and `<home>/config.env` are now; they are read anew only after one of them changed.

    For what asks often: reading them takes a millisecond, and an item asks a dozen times.
    """
    names = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("KILO_")))
    try:
        changed = (default_home() / "config.env").stat().st_mtime_ns
    except FileNotFoundError:
        changed = 0
    return _read(names, changed)


@lru_cache(maxsize=4)
def _read(_environment: tuple[tuple[str, str], ...], _changed: int) -> Settings:
    return Settings()
