"""Remediations end to end: the platform's own runs, the twin's model and registry, a real sandbox, a pull request on the twin."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from dagster import DagsterInstance

from tests.conftest import Database
from tests.support.remediation import Shop, analysed
from tests.support.security import Dispatcher, syncing, with_model
from tests.support.twin import Twin


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twin]:
    # Sockets have short names: the home of pytest's own making would be too long for them.
    with syncing(tmp_path_factory.mktemp("r")) as running, with_model(running):
        yield running


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterInstance]:
    with DagsterInstance.local_temp(str(tmp_path_factory.mktemp("dagster"))) as found:
        yield found


@pytest.fixture
def desk(database: Database, instance: DagsterInstance) -> Dispatcher:
    return Dispatcher(database, instance)


def _file(shop: Shop, name: str, ref: str) -> dict[str, object]:
    repository = shop.twin.installation(repository_id=shop.repository_id).repository(shop.full_name)
    content = repository.get_contents(name, ref=ref)
    assert not isinstance(content, list)
    found: dict[str, object] = json.loads(base64.b64decode(content.content))
    return found


def test_a_remediation_ends_as_one_open_pull_request_with_the_patched_version(
    database: Database, twin: Twin, desk: Dispatcher, tmp_path: Path
) -> None:
    shop = Shop(database, twin, tmp_path)
    finding = shop.finding("twin-unpack")
    analysed(shop, finding)
    item = shop.asked(finding)
    desk.work(shop.id)
    row = shop.row(item)
    assert (row.state, row.reason) == ("completed", "remediated"), row
    (pull,) = shop.pulls()
    print(pull["title"], pull["body"])
    assert (pull["state"], pull["draft"], pull["number"]) == ("open", False, row.pull_number)
