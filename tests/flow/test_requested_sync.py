"""A sync that somebody asks for, from the request to the alerts of the running twin, and how it ends when the provider doesn't answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
from dagster import DagsterInstance

from kilo_pipelines.acts.security import request_sync
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.jobs import requested_security_sync, settle_quiet_items
from kilo_pipelines.resources.github import GitHubResource
from kilo_pipelines.resources.store import StoreResource
from kilo_pipelines.sensors import work_once
from kilo_pipelines.services.security.config import SERVICE, SecurityConfig
from kilo_pipelines.store import Claimed, Store
from tests.conftest import Database
from tests.support.security import Owner, syncing
from tests.support.twin import Twin


class Held:
    """What the store resource hands out."""

    store: Store


class TheStore(StoreResource):
    def get(self) -> Store:
        return Held.store


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twin]:
    with syncing(tmp_path_factory.mktemp("sync")) as running:
        yield running


@pytest.fixture
def instance(database: Database) -> Iterator[DagsterInstance]:
    Held.store = database.store
    with DagsterInstance.ephemeral() as made:
        yield made


def ask(owner: Owner, repository: int | None = None) -> Any:
    return request_sync(owner.store, owner.id, repository, role="member", actor="owner:x")


def carry_out(owner: Owner, instance: DagsterInstance, item: UUID) -> Any:
    """The run that the shard asks for."""
    (request,) = [one for one in work_once(owner.store) if str(item) in str(one.run_config)]
    assert request.job_name in (requested_security_sync.name, settle_quiet_items.name)
    job = requested_security_sync if request.job_name == requested_security_sync.name else settle_quiet_items
    resources = {"store": TheStore(), "github": GitHubResource()}
    done = job.execute_in_process(
        run_config=request.run_config,
        resources=resources,
        instance=instance,
        tags=request.tags,
    )
    assert done.success
    return done


def ended(owner: Owner, item: UUID) -> tuple[str, str | None, bool]:
    row = owner.store.queue.get(item)
    assert row is not None
    return row.state, row.reason, row.announced


def test_a_requested_sync_reads_the_owners_alerts(database: Database, twin: Twin, instance: DagsterInstance) -> None:
    owner = Owner(database, twin, 2, 40)
    item = ask(owner)
    done = carry_out(owner, instance, item)
    assert ended(owner, item) == ("completed", Reason.ALERTS_SYNCED, True)
    assert sum(owner.by_status().values()) == 40 and set(owner.fresh().values()) == {True}
    assert [one.asset_key.to_user_string() for one in done.asset_materializations_for_node("sync_requested")] == [
        "security_findings",
        "finding_sla",
        "sla_compliance",
    ]


def test_one_repository_is_read_alone_and_materializes_nothing(database: Database, twin: Twin, instance: DagsterInstance) -> None:
    owner = Owner(database, twin, 2, 40)
    item = ask(owner, owner.repositories[1]["repository_id"])
    done = carry_out(owner, instance, item)
    assert ended(owner, item)[0] == "completed" and owner.fresh() == {owner.names[0]: False, owner.names[1]: True}
    assert done.asset_materializations_for_node("sync_requested") == []


def test_a_sync_that_could_not_read_everything_has_failed_and_may_be_asked_for_again(
    database: Database, twin: Twin, instance: DagsterInstance
) -> None:
    owner = Owner(database, twin, 2, 40)
    owner.fault(owner.names[0], status=500, times=5)
    item = ask(owner)
    assert ask(owner) is None, "one waits already"
    carry_out(owner, instance, item)
    assert ended(owner, item) == ("failed", Reason.SYNC_PARTLY, False) and owner.fresh()[owner.names[1]]
    carry_out(owner, instance, item)
    assert ended(owner, item) == ("failed", Reason.SYNC_PARTLY, True)
    again = ask(owner)
    assert isinstance(again, UUID) and again != item


def test_a_policy_whose_recomputing_was_lost_is_caught_up_with_by_the_next_sync(database: Database, twin: Twin) -> None:
    """Settings are saved, and the process dies before the deadlines follow."""
    owner = Owner(database, twin, 1, 30)
    owner.sync()
    config = SecurityConfig(sla_preset="strict").model_dump(mode="json")
    owner.store.owners.put_config(owner.id, SERVICE, config, enabled=True, expected_revision=1, actor="x")
    assert owner.sync().rows_written == 0, "no alert has changed"
    critical = owner.store.findings.listed(owner.id, severity="critical", limit=100)
    assert critical and {one["budget_days"] for one in critical} == {7}
    assert owner.store.findings.policy(owner.id) is not None and owner.store.findings.follow_policy(owner.id, 2, _none) == (0, 0)


def _none(_history: object, _repository: int) -> Any:
    raise AssertionError("nothing is left to recompute")


def test_one_sync_an_owner_runs_at_a_time(database: Database, twin: Twin, instance: DagsterInstance) -> None:
    owner, other = Owner(database, twin, 1, 20), Owner(database, twin, 1, 20)
    item = ask(owner, owner.repositories[0]["repository_id"])
    second, elsewhere = ask(owner), ask(other)
    held = owner.store.queue.claim(item, "security_sync", run_id="x", pools=lambda _kind, _plan: {"security_sync": 1}, lease_s=30)
    assert isinstance(held, Claimed)
    for waits in (second, elsewhere):
        assert requested_security_sync.execute_in_process(
            run_config={"ops": {"sync_requested": {"config": {"ids": [str(waits)]}}}},
            resources={"store": TheStore(), "github": GitHubResource()},
            instance=instance,
        ).success
    assert ended(owner, second)[0] == "waiting" and ended(other, elsewhere)[0] == "completed"


def test_an_agent_that_was_switched_off_meanwhile_reads_nothing(
    database: Database, twin: Twin, instance: DagsterInstance
) -> None:
    owner = Owner(database, twin, 1, 20)
    item = ask(owner)
    owner.store.owners.enable_service(owner.id, "security_agent", False, actor="x")
    carry_out(owner, instance, item)
    assert ended(owner, item)[:2] == ("failed", Reason.SECURITY_DISABLED) and sum(owner.by_status().values()) == 0
