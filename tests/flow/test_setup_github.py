"""Setting a GitHub App up, from the operator's link to a connected installation; and everybody who must not get there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store import app_secrets
from tests.support.browser import browser
from tests.support.ingress import sign
from tests.support.setup import Person, SetupWorld


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SetupWorld]:
    running = SetupWorld(tmp_path_factory.mktemp("setup") / "twin")
    yield running
    running.close()


def enterprise(world: SetupWorld) -> list[str]:
    return ["--enterprise-url", f"http://localhost:{world.twin.port}"]


@pytest.fixture(scope="module")
def made(world: SetupWorld) -> SetupWorld:
    """The world after its App was made, by a person without a screen."""
    grace = Person("grace")
    page = grace.go(world.link("--org", "acme", *enterprise(world)))
    assert "What it may do, and why" in page.text
    done = grace.send(grace.send(page))
    assert grace.reason(done) is None, done.text
    return world


def connect(world: SetupWorld, name: str, account: str, *arguments: str) -> tuple[Person, httpx.Response]:
    """A person follows a link, installs the App on an account and authorizes; where they end."""
    person = Person(name)
    person.go(world.link(*arguments))
    chosen = person.send(person.go(f"http://localhost:{world.admin}/setup/github/install"), account=account)
    return person, (person.send(chosen) if "Authorize" in chosen.text else chosen)


def checks(world: SetupWorld) -> dict[str, dict[str, Any]]:
    _, told = world.cli("doctor")
    return {one["name"]: one for one in told["checks"]}


def test_try(made: SetupWorld) -> None:
    person, page = connect(made, "grace", "acme")
    print(person.reason(page), page.text[:3000])
    for name, one in checks(made).items():
        print(name, one)
    assert 0
