"""First start and every start: secrets, database, the twin's credentials, the demo owner."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

from kilo_pipelines.core.clock import SystemClock
from kilo_pipelines.ingress.operators import new_password
from kilo_pipelines.providers.github import GitHubApp, ProviderError
from kilo_pipelines.services.code_review.admission import SERVICE
from kilo_pipelines.services.code_review.config import CodeReviewConfig
from kilo_pipelines.services.security.config import SERVICE as SECURITY
from kilo_pipelines.services.security.config import SecurityConfig
from kilo_pipelines.settings import Settings, private_dir, write_config, write_secret
from kilo_pipelines.store import Cipher, Repository, Store, app_secrets
from kilo_pipelines.store.app_secrets import AppSecrets, WebhookSecret
from kilo_pipelines.store.migrate import migrate, provision, read_logins

DEMO_OWNER = "acme"
# The repository of the offline world with an alert that nobody can read.
SPOILED = "acme/accounts"


def prepare_secrets(settings: Settings) -> str | None:
    """Makes what the platform needs for itself; the operator's password when it was made now, to be shown once."""
    private_dir(settings.secrets_dir)
    if not settings.encryption_key_file.exists():
        write_secret(settings.encryption_key_file, Cipher.new_key_file())
    for path, size in ((settings.secrets_dir / "broker-password", 24), (settings.metrics_token_file, 32)):
        if not path.exists():
            write_secret(path, secrets.token_urlsafe(size))
    if settings.operator_password_file.exists():
        return None
    return new_password(settings.operator_password_file, settings.operator_sessions_file)


def prepare_database(settings: Settings, admin_url: str) -> None:
    """Roles, databases, our schema and Dagster's tables."""
    path = settings.secrets_dir / "database.json"
    logins = provision(admin_url, read_logins(path))
    write_secret(path, json.dumps(logins))
    migrate(logins["migrator"])
    marker = settings.home / "run" / "dagster-tables"
    if not marker.exists():
        subprocess.run(
            [sys.executable, "-c", "import sys; from dagster_postgres import DagsterPostgresStorage as S; S(sys.stdin.read())"],
            input=logins["dagster"],
            text=True,
            check=True,
            capture_output=True,
        )
        marker.write_text("made\n")


def open_store(settings: Settings) -> Store:
    """The store for the command line."""
    logins = settings.database_logins()
    return Store(logins["app"], logins["system"], Cipher.from_file(settings.encryption_key_file), SystemClock())


def twin_credentials(settings: Settings) -> dict[str, Any]:
    """What the twin shows its operator, as GitHub does at the App's page."""
    found: dict[str, Any] = json.loads((settings.home / "twin" / "credentials.json").read_text())
    return found


def refuse_mixed_worlds(settings: Settings) -> None:
    """A home belongs to the twin or to a real App for ever: their credentials never meet (threats, rule 25); ValueError."""
    twins = _origin(settings).exists()
    real = not twins and any(
        path.exists()
        for path in (
            settings.github_app_file,
            settings.github_private_key_file,
            settings.webhook_secret_file,
            settings.model_key_file,
            settings.cloud_agent_token_file,
            settings.cloud_agent_key_file,
        )
    )
    if settings.offline and real:
        raise ValueError(
            "this home holds credentials of a real GitHub App: start it with KILO_OFFLINE=false, or use another KILO_HOME"
        )
    if not settings.offline and twins:
        raise ValueError("this home holds the offline twin's credentials: use another KILO_HOME for a real GitHub App")


def _origin(settings: Settings) -> Path:
    """The mark of a home whose credentials are the twin's."""
    return settings.secrets_dir / "origin"


def adopt_twin(settings: Settings, credentials: dict[str, Any]) -> None:
    """Stores the twin's App secrets, model key and Cloud Agent keys where the real ones would lie."""
    refuse_mixed_worlds(settings)
    write_secret(_origin(settings), "twin")
    app_secrets.update(settings, lambda held: _twins(held, credentials))
    write_secret(settings.model_key_file, credentials["model_api_key"])
    write_secret(settings.cloud_agent_token_file, credentials["cloud_agent_token"])
    write_secret(settings.cloud_agent_key_file, credentials["cloud_agent_internal_key"])


def _twins(held: AppSecrets, credentials: dict[str, Any]) -> AppSecrets:
    """The twin's secrets; its webhook secret keeps its name from start to start."""
    value = credentials["webhook_secret"]
    kept = [one for one in held.webhook_secrets if one.value == value]
    return AppSecrets(
        client_id=credentials["client_id"],
        client_secret=credentials["client_secret"],
        private_key=credentials["private_key_pem"],
        webhook_secrets=tuple(kept or [WebhookSecret(id=app_secrets.new_id(), value=value)]),
    )


def github_app(settings: Settings) -> GitHubApp:
    """The App for the command line."""
    key = app_secrets.read(settings).private_key
    if settings.github_app_id is None or key is None:
        raise ValueError("there is no GitHub App yet: run `kilo-pipelines setup github`")
    return GitHubApp(settings.github_api_url, settings.github_app_id, key, SystemClock())


def connect_installation(settings: Settings, store: Store, owner_id: UUID, installation_id: int, account: str) -> UUID:
    """Connects an installation with the repositories that GitHub names."""
    found = github_app(settings).installed_repositories(installation_id)
    repositories = [Repository(one.external_id, one.full_name, one.default_branch, one.private) for one in found]
    return store.owners.connect(
        owner_id, provider="github", installation_id=installation_id, account=account, repositories=repositories, actor="operator"
    )


def ensure_demo_owner(settings: Settings, store: Store, credentials: dict[str, Any], gate: str) -> UUID:
    """The seeded world's owner, its installation and Code Review with a gate."""
    owner = next((one for one in store.owners.all() if one.name == DEMO_OWNER), None) or store.owners.create(
        "organization", DEMO_OWNER
    )
    connect_installation(settings, store, owner.id, credentials["installation_id"], credentials["account"])
    known = store.owners.config(owner.id, SERVICE)
    wanted = CodeReviewConfig(gate_threshold=gate).model_dump(mode="json")  # type: ignore[arg-type]  # validated by pydantic
    if known is None:
        store.owners.put_config(owner.id, SERVICE, wanted, enabled=True, expected_revision=0, actor="operator")
    return owner.id


def ensure_demo_security(settings: Settings, store: Store, owner_id: UUID, alerts: int) -> None:
    """The seeded world's alerts, once, one of them broken, and the Security Agent for its owner, which may use the world's registry."""
    if store.owners.config(owner_id, SECURITY) is not None:
        return
    twin_call(settings, "seed-alerts", "--count", str(alerts))
    twin_call(settings, "spoil-alert", "--repo", SPOILED, "--number", "7", "--kind", "unknown_severity")
    credentials = twin_credentials(settings)
    connect_installation(settings, store, owner_id, credentials["installation_id"], credentials["account"])
    wanted = SecurityConfig(remediation_registries=["npm"]).model_dump(mode="json")
    store.owners.put_config(owner_id, SECURITY, wanted, enabled=True, expected_revision=0, actor="operator")


def twin_call(settings: Settings, *arguments: str) -> dict[str, Any]:
    """One command of the twin, in a process of its own."""
    argv = [
        sys.executable,
        "-m",
        "kilo_twin",
        *arguments,
        "--home",
        str(settings.home / "twin"),
        "--port",
        str(settings.twin_port),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=Path(__file__).resolve().parents[2])
    if done.returncode:
        raise ValueError(f"the twin refused: {done.stderr.strip() or done.stdout.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


__all__ = [
    "ProviderError",
    "adopt_twin",
    "connect_installation",
    "ensure_demo_owner",
    "ensure_demo_security",
    "github_app",
    "open_store",
    "prepare_database",
    "prepare_secrets",
    "refuse_mixed_worlds",
    "twin_call",
    "twin_credentials",
    "write_config",
]
