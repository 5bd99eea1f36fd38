"""`kilo-pipelines setup model` against the twin's model: what is stored, and each way in which a model can't be used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kilo_pipelines.cli.main import main
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.settings import Settings
from tests.support.twin import Twin


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twin]:
    running = Twin(tmp_path_factory.mktemp("model") / "twin")
    yield running
    running.stop()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KILO_HOME", str(tmp_path))
    return tmp_path


def run(twin: Twin, *arguments: str, key: str | None = None) -> tuple[int, dict[str, Any]]:
    given = ["setup", "model", "--base-url", f"http://localhost:{twin.port}/model/v1", "--key-file", "-", "--json", *arguments]
    done = CliRunner().invoke(main, given, input=key or twin.credentials["model_api_key"])
    return done.exit_code, json.loads(done.stdout)


def test_address_key_and_models_are_kept_after_each_model_called_a_tool(twin: Twin, home: Path) -> None:
    code, told = run(twin, "--model", "scripted-reviewer", "--model", "other")
    assert code == 0 and len(told["tested"]) == 2, told
    settings = Settings()
    assert settings.all_models == ["scripted-reviewer", "other"] and settings.model_key_file.stat().st_mode & 0o077 == 0
    assert twin.credentials["model_api_key"] not in (home / "config.env").read_text() + json.dumps(told)


def test_a_stored_key_is_not_shown_to_another_address(twin: Twin, home: Path) -> None:
    assert run(twin, "--model", "m")[0] == 0
    given = ["setup", "model", "--base-url", "http://localhost:9/v1", "--json"]
    assert json.loads(CliRunner().invoke(main, given).stdout)["reason"] == Reason.MODEL_KEY_MISSING


def test_what_cant_be_used_is_not_stored(twin: Twin, home: Path) -> None:
    def refused(reason: Reason, *arguments: str, key: str | None = None) -> None:
        code, told = run(twin, "--model", "m", *arguments, key=key)
        assert code == 1 and told["reason"] == reason and told["remedy"], told

    refused(Reason.MODEL_KEY_REFUSED, key="wrong")
    refused(Reason.MODEL_UNREACHABLE, "--base-url", "http://localhost:9/v1")
    chat = {"method": "POST", "path": "/chat/completions", "left": 1}
    twin.control("faults", faults=[{**chat, "kind": "words"}])
    refused(Reason.MODEL_CANNOT_CALL_TOOLS)
    twin.control("faults", faults=[{**chat, "kind": "error", "status": 402}])
    refused(Reason.INSUFFICIENT_CREDITS)
    assert not Settings().model_key_file.exists() and not (home / "config.env").exists()


def test_an_address_of_ones_own_network_is_asked_for_by_name(twin: Twin, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threats, rule 22: outside the offline world only the public internet, unless the operator says otherwise."""
    monkeypatch.setenv("KILO_OFFLINE", "false")
    code, told = run(twin, "--model", "m")
    assert code == 1 and Reason.ADDRESS_REFUSED in told["error"] and "--private" in told["error"]
    assert run(twin, "--model", "m", "--private")[0] == 0
