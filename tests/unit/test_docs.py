"""Docs live with code: what exists is documented, what is documented exists."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import click

from kilo_pipelines.cli.main import main
from kilo_pipelines.core.limits import LimitsConfig
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.services.code_review.config import CodeReviewConfig
from kilo_pipelines.services.security.config import SecurityConfig
from kilo_pipelines.settings import Settings

ROOT = Path(__file__).parents[2]


def _rows(page: str) -> set[str]:
    return set(re.findall(r"^\| `([^`]+)`", (ROOT / "docs" / page).read_text(), re.MULTILINE))


def test_every_reason_code_is_documented() -> None:
    assert _rows("reasons.md") == {str(reason) for reason in Reason}


def test_every_setting_is_documented() -> None:
    assert _rows("settings.md") == {f"KILO_{name.upper()}" for name in Settings.model_fields}


def test_every_owner_setting_is_documented() -> None:
    assert set(CodeReviewConfig.model_fields) <= _rows("services/code-review.md")
    assert set(SecurityConfig.model_fields) <= _rows("services/security.md")
    assert set(LimitsConfig.model_fields) == {one for one in _rows("limits.md") if one in LimitsConfig.model_fields}


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[=\[<>]", one)[0] for one in [*project["dependencies"], *project["optional-dependencies"]["dev"]]}
    assert _rows("dependencies.md") == wanted
    locked = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    assert wanted <= locked


def test_the_lock_names_no_address() -> None:
    assert "://" not in (ROOT / "requirements.lock").read_text()


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for name, command in main.commands.items():
        assert f"`kilo-pipelines {name}`" in readme
        if isinstance(command, click.Group):
            assert all(f"`{sub}`" in readme for sub in command.commands), name


def test_every_make_target_of_the_readme_exists() -> None:
    rules = re.findall(r"^([a-z][a-z -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    for page in ("README.md", "CONTRIBUTING.md"):
        assert set(re.findall(r"`make ([a-z-]+)", (ROOT / page).read_text())) <= targets
