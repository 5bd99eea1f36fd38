"""Processes by themselves: who gets which secret, where the broker is, and a session that its database doesn't answer."""

from __future__ import annotations

import json
import stat
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from pydantic import ValidationError
from sqlalchemy import make_url

from kilo_pipelines.cli import roles, supervisor
from kilo_pipelines.cli.main import main
from kilo_pipelines.cloud_agent.protocol import Heartbeat
from kilo_pipelines.ops.agent_session import LeasedControl
from kilo_pipelines.settings import Settings, write_secret
from kilo_pipelines.store import DatabaseAwayError

DATABASE = "postgresql://boss@db.example:5432/postgres?sslmode=verify-full&sslrootcert=/ca.pem"


def _bundle(directory: Path, database: str = DATABASE) -> dict[str, Any]:
    done = CliRunner().invoke(main, ["bundle", str(directory), "--database", database, "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.output)
    return found


def test_each_process_gets_its_own_secrets_and_a_second_bundle_changes_none(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    assert _bundle(target)["operator_password"]
    for name in ("github-app.pem", "github-webhook-secret", "model-api-key"):
        write_secret(target / "secrets" / name, name)
    before = json.loads((target / "secrets" / "database.json").read_text())
    assert "operator_password" not in _bundle(target), "shown once"
    assert json.loads((target / "secrets" / "database.json").read_text()) == before
    files = {name: {one.name for one in (target / name).iterdir()} for name in [*roles.ROLES, "init"]}
    assert files["model-proxy"] == {"model-api-key"}
    assert {name for name, held in files.items() if "github-app.pem" in held} == {
        "worker-dispatch",
        "worker-maintenance",
        "worker-agents",
    }
    assert {name for name, held in files.items() if "github-webhook-secret" in held} == {"ingress"}
    assert {name for name, held in files.items() if "database-admin-url" in held} == {"init"}
    logins = {name: set(json.loads((target / name / "database.json").read_text())) for name in files if name != "model-proxy"}
    assert {name for name, held in logins.items() if "migrator" in held} == {"init"}
    assert logins["ingress"] == {"app", "system"}
    for url in before.values():
        assert make_url(url).query == {"sslmode": "verify-full", "sslrootcert": "/ca.pem"} and make_url(url).password
    assert all(stat.S_IMODE(one.stat().st_mode) == 0o600 for one in target.rglob("*") if one.is_file())
    assert (
        make_url((target / "init" / "database-admin-url").read_text()).password == (target / "postgres" / "password").read_text()
    )


def test_mounted_secrets_are_copied_with_the_mode_that_ours_have(tmp_path: Path) -> None:
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    (mounted / "encryption.key").write_text("key")
    (mounted / "encryption.key").chmod(0o444)
    settings = Settings(home=tmp_path / "home", secrets_from=mounted)
    roles.adopt_secrets(settings)
    assert (
        stat.S_IMODE(settings.encryption_key_file.stat().st_mode) == 0o600 and settings.encryption_key_file.read_text() == "key"
    )


def test_a_given_broker_has_its_password_in_a_file_and_never_in_its_address(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, broker_address="rediss://broker.example:6380/0")
    write_secret(settings.broker_password_file, "p@ss/word\n")
    assert supervisor.broker_url(settings) == "rediss://:p%40ss%2Fword@broker.example:6380/0"
    for wrong in ("redis://:secret@broker/0", "http://broker", "redis://"):
        with pytest.raises(ValidationError, match="without a password"):
            Settings(home=tmp_path, broker_address=wrong)


class _Silent:
    """A database behind a network that is gone: calls come back when the test says so."""

    def __init__(self) -> None:
        self.gone = threading.Event()
        self.back = threading.Event()
        self.calls = 0

    def beat(self, *_claim: Any) -> str:
        if self.gone.is_set():
            self.back.wait(10)
        return "ok"

    def event(self, *_step: Any) -> None:
        self.calls += 1
        if self.calls < 3:
            raise DatabaseAwayError("insert", {}, Exception("away"))


def _control(sessions: _Silent, lease_s: float) -> LeasedControl:
    context: Any = SimpleNamespace(log=SimpleNamespace(info=lambda _line: None))
    store: Any = SimpleNamespace(sessions=sessions)
    claim: Any = None
    spec: Any = None
    return LeasedControl(context, store, claim, spec, lease_s=lease_s, every_s=0.02)


def test_a_session_whose_database_does_not_answer_knows_by_the_clock_that_its_lease_is_over() -> None:
    silent = _Silent()
    with _control(silent, 0.3) as control:
        assert control.beat() is Heartbeat.OK
        silent.gone.set()
        deadline = time.monotonic() + 5
        while control.beat() is not Heartbeat.LOST:
            asked = time.monotonic()
            control.beat()
            assert time.monotonic() - asked < 0.2, "nobody waits for the network"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        silent.back.set()


def test_a_step_is_kept_when_the_database_comes_back_within_the_lease_and_given_up_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kilo_pipelines.ops.agent_session.INTERRUPT_POLL_SECONDS", 0.01)
    silent = _Silent()
    with _control(silent, 5) as control:
        control.event("checked_out", {})
    assert silent.calls == 3
    silent.calls = -1_000
    lost = _control(silent, 0.05)  # never entered: nobody extends it
    with pytest.raises(DatabaseAwayError):
        lost.event("checked_out", {})
