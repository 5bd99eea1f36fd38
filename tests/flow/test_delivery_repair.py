"""Repair of missed deliveries, with GitHub's log (the twin), our ingress and the inbox: nothing is lost, nothing comes twice."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from click.testing import CliRunner
from dagster import DagsterInstance, RunRequest, SkipReason, build_schedule_context, materialize
from sqlalchemy import text

from kilo_pipelines import failpoints
from kilo_pipelines.assets.deliveries import delivery_gaps, log_is_compared, nothing_was_given_up
from kilo_pipelines.cli.main import main
from kilo_pipelines.core import delivery_gaps as rules
from kilo_pipelines.core.clock import ManualClock
from kilo_pipelines.core.markers import Marker
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.ingress.application import Ingress, public_application
from kilo_pipelines.jobs import delivery_repair
from kilo_pipelines.ops import delivery_repair as ops
from kilo_pipelines.ops.admission import admit
from kilo_pipelines.ops.delivery_repair import Repair
from kilo_pipelines.providers import github_deliveries
from kilo_pipelines.resources.github import GitHubResource, ProviderError
from kilo_pipelines.resources.store import StoreResource
from kilo_pipelines.schedules import delivery_repairs
from kilo_pipelines.services.code_review.config import CodeReviewConfig
from kilo_pipelines.settings import Settings, write_secret
from kilo_pipelines.store import Ages, Cipher, Repository, Store
from tests.conftest import Database
from tests.support.ingress import OneSecret
from tests.support.keys import api_key
from tests.support.security import LOG, syncing
from tests.support.served import served
from tests.support.sessions import free_port
from tests.support.twin import Twin

# Time between two runs by the clock.
TICK = timedelta(minutes=10)


class Front:
    """Our ingress on its port, up or down."""

    def __init__(self, store: Store, secret: str, port: int) -> None:
        self._application = public_application(Ingress(store, OneSecret(secret), frozenset({"localhost"})))
        self._port = port

    def up(self) -> None:
        self._server = uvicorn.Server(
            uvicorn.Config(self._application, host="127.0.0.1", port=self._port, log_level="warning", lifespan="off")
        )
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def down(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", self._port)), "nobody listens"


class World:
    """One owner whose installation is the twin's."""

    def __init__(self, database: Database, twin: Twin, front: Front) -> None:
        self.database, self.store, self.twin, self.front = database, database.store, twin, front
        self.clock: ManualClock = database.clock
        self.owner = self.store.owners.create("organization", "acme").id
        self.integration = self.store.owners.connect(
            self.owner,
            provider="github",
            installation_id=twin.credentials["installation_id"],
            account="acme",
            repositories=[
                Repository(one.external_id, one.full_name, one.default_branch, one.private)
                for one in twin.app().installed_repositories(twin.credentials["installation_id"])
            ],
            actor="test",
        )
        config = CodeReviewConfig().model_dump(mode="json")
        self.store.owners.put_config(self.owner, "code_review", config, enabled=True, expected_revision=0, actor="test")

    def fire(self, count: int) -> list[str]:
        """Pull requests are opened; the guids of their events."""
        found = []
        for number in range(count):
            pull = self.twin.control("open-pull", kind="planted", head_ref=f"topic-{time.monotonic_ns()}-{number}")
            found.append(pull["delivery"]["guid"])
        return found

    def send(self, event: str, payload: dict[str, Any], **more: Any) -> str:
        return str(self.twin.control("send", event=event, action=payload.get("action"), payload=payload, **more)["guid"])

    def payload(self, guid: str) -> dict[str, Any]:
        """What the twin sent."""
        page = github_deliveries.list_deliveries(self.twin.app(), None)
        attempt = next(one.id for one in page.attempts if one.guid == guid)
        return dict(json.loads(github_deliveries.fetch_delivery(self.twin.app(), attempt).body))

    def attempts(self, guid: str) -> int:
        """How often the provider tried to deliver an event."""
        return [one.guid for one in github_deliveries.list_deliveries(self.twin.app(), None).attempts].count(guid)

    def repair(self) -> dict[str, int]:
        """One run."""
        repair = Repair(self.store, GitHubResource(), LOG)
        repair.run()
        return {str(name): count for name, count in repair.counts.items() if count}

    def next_tick(self) -> dict[str, int]:
        self.clock.advance(TICK)
        return self.repair()

    def came(self, guids: list[str], seconds: float = 10) -> None:
        """Waits until the redeliveries are stored."""
        deadline = time.monotonic() + seconds
        while self.deliveries(guids) != len(guids):
            assert time.monotonic() < deadline, "a redelivery didn't come"
            time.sleep(0.02)

    def deliveries(self, guids: list[str]) -> int:
        with self.store.database.owner(self.owner) as connection:
            found = connection.execute(
                text("select count(*) from deliveries where provider_delivery_id = any(:guids)"), {"guids": guids}
            )
            return int(found.scalar_one())

    def admitted(self, guids: list[str]) -> list[str]:
        """States of these deliveries after an admission."""
        self.store.inbox.admit_next(lambda tx: admit(tx, Marker(b"k" * 32)), 100)
        with self.store.database.owner(self.owner) as connection:
            found = connection.execute(
                text("select state from deliveries where provider_delivery_id = any(:guids)"), {"guids": guids}
            )
            return list(found.scalars())

    def gaps(self, guids: list[str]) -> set[tuple[str, str | None]]:
        """How these gaps stand: state and reason."""
        found = {one["guid"]: (one["state"], one["reason"]) for one in self.store.delivery_gaps.listed(self.owner, 1_000)}
        return {found[guid] for guid in guids}

    def suspended(self) -> bool:
        found = self.store.owners.by_installation("github", self.twin.credentials["installation_id"])
        assert found is not None
        return found.suspended


@pytest.fixture(scope="module")
def shared(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    port = free_port()
    with syncing(tmp_path_factory.mktemp("repair"), webhook_url=f"http://localhost:{port}/webhooks/github") as twin:
        front = Front(database.store, twin.credentials["webhook_secret"], port)
        front.up()
        yield World(database, twin, front)
        front.down()


@pytest.fixture
def world(shared: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """What this test's events are, is old enough to be missed; what others left is behind."""
    monkeypatch.setattr(rules, "GRACE", timedelta(seconds=-5))
    yield shared
    shared.twin.control("outage", status="", code=0, left=0)
    shared.next_tick()
    shared.next_tick()


def test_an_outage_of_ours_is_repaired_within_two_ticks(world: World) -> None:
    """Goals, N3: five events while the ingress is down are admitted once each, and the asset shows them."""
    world.front.down()
    guids = world.fire(5)
    world.front.up()
    assert world.deliveries(guids) == 0
    counts = world.repair()
    assert (counts["asked"], counts["new"]) == (5, 5) and world.gaps(guids) == {("asked", None)}
    world.came(guids)
    assert world.next_tick()["repaired"] == 5
    assert world.gaps(guids) == {("repaired", Reason.DELIVERY_REPAIRED)}
    assert world.admitted(guids) == ["admitted"] * 5
    assert [world.attempts(one) for one in guids] == [2] * 5
    assert "asked" not in world.next_tick(), "what came is asked for no more"


def test_a_redelivery_that_github_refuses_is_pulled_at_once(world: World) -> None:
    world.twin.control("outage", status="failed to connect", code=502)
    guids = world.fire(2)
    world.twin.control("outage", status="", code=0, left=0)
    world.twin.fault("POST", "/attempts", status=422, times=2)
    counts = world.repair()
    assert counts["pulled"] == 2 and world.gaps(guids) == {("pulled", Reason.DELIVERY_PULLED)}
    assert world.admitted(guids) == ["admitted"] * 2


def test_a_redelivery_that_fails_again_is_pulled_and_its_late_webhook_is_a_duplicate(world: World) -> None:
    """The pulled body has other bytes than the webhook's: its id is known all the same, and not one that somebody forged."""
    world.twin.control("outage", status="timed out", code=504)
    guids = world.fire(1)
    assert world.repair()["asked"] == 1
    deadline = time.monotonic() + 10
    while world.attempts(guids[0]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    world.repair()  # a redelivery that was seen to fail is waited for no longer
    assert world.gaps(guids) == {("pulled", Reason.DELIVERY_PULLED)}
    world.twin.control("outage", status="", code=0, left=0)
    attempt = next(one.id for one in github_deliveries.list_deliveries(world.twin.app(), None).attempts if one.guid == guids[0])
    assert world.twin.control("redeliver", delivery_id=attempt)["status_code"] in (200, 202)
    assert world.admitted(guids) == ["admitted"]


def test_what_was_answered_and_lost_is_pulled(world: World) -> None:
    """After a restore of an older backup GitHub's log says OK, and nothing is here."""
    world.twin.control("outage", status="OK", code=200, left=1)
    guids = world.fire(1)
    world.repair()
    assert world.gaps(guids) == {("pulled", Reason.DELIVERY_PULLED)} and world.attempts(guids[0]) == 1


def test_a_lost_answer_of_the_redelivery_call_costs_nothing(world: World) -> None:
    world.twin.control("outage", status="failed to connect", code=502, left=1)
    guids = world.fire(1)
    world.twin.fault("POST", "/attempts", kind="lost")
    assert world.repair()["asked"] == 1
    world.came(guids)
    assert world.next_tick()["repaired"] == 1 and world.admitted(guids) == ["admitted"] and world.attempts(guids[0]) == 2


def test_entries_of_foreign_installations_and_forged_ones_bring_nothing(world: World) -> None:
    """Threats, rules 15 and 16: the log's installation must be an owner's, and the payload's must be the log's."""
    world.twin.control("outage", status="failed to connect", code=502)
    sample = world.payload(world.fire(1)[0])
    foreign = world.send("pull_request", sample | {"installation": {"id": 999_111}}, installation_id=999_111)
    forged = world.send("pull_request", sample | {"installation": {"id": 999_111}})
    shapeless = world.send("pull_request", {"action": "opened", "installation": sample["installation"]})
    unhandled = world.send("star", {"action": "created", "installation": sample["installation"]})
    first = world.repair()
    assert first["not_ours"] >= 1 and first["not_taken"] >= 1
    world.next_tick()
    assert world.gaps([forged]) == {("gave_up", Reason.INSTALLATION_ID_MISSING)}
    assert world.gaps([shapeless]) == {("gave_up", Reason.PAYLOAD_SHAPE_MISMATCH)}
    assert not {foreign, unhandled} & {one["guid"] for one in world.store.delivery_gaps.listed(world.owner, 1_000)}
    assert world.deliveries([foreign, forged, shapeless, unhandled]) == 0


def test_a_missed_suspension_that_is_over_suspends_nobody(world: World) -> None:
    """Applied late, an installation's event would undo a newer one: what GitHub tells now counts."""
    world.twin.control("outage", status="failed to connect", code=502, left=1)
    missed = world.twin.control("set-installation", suspended=True)["delivery"]["guid"]
    world.repair()
    assert world.suspended(), "GitHub says so"
    world.twin.control("set-installation", suspended=False)
    assert not world.suspended()
    world.twin.control("outage", status="failed to connect", code=502, left=1)
    second = world.twin.control("set-installation", suspended=True)["delivery"]["guid"]
    world.twin.control("set-installation", suspended=False)
    world.repair()
    assert not world.suspended()
    assert world.gaps([missed]) == {("pulled", Reason.DELIVERY_PULLED)}
    # Both within a second have the same body.
    assert world.gaps([second]) <= {("pulled", Reason.DELIVERY_PULLED), ("repaired", Reason.DUPLICATE_DELIVERY)}


def test_a_missed_new_name_is_read_anew(world: World) -> None:
    world.twin.control("outage", status="failed to connect", code=502, left=1)
    renamed = world.twin.control("rename", repository="acme/orders", to="purchases")
    world.repair()
    found = world.store.owners.repository(world.owner, renamed["repository_id"])
    assert found is not None and found.full_name == "acme/purchases"
    world.twin.control("rename", repository="acme/purchases", to="orders")


def killed(world: World, points: Path, point: str) -> bool:
    """A run in a process of its own that dies at the point; whether it did."""
    (points / point).touch()
    pid = os.fork()
    if pid == 0:
        try:
            failpoints.arm(points)
            logins = world.database.logins
            store = Store(logins["app"], logins["system"], world.store.cipher, world.clock)
            Repair(store, GitHubResource(), LOG).run()
        finally:
            os._exit(0)
    status = os.waitpid(pid, 0)[1]
    (points / point).unlink(missing_ok=True)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize(
    "place",
    [
        "store.delivery_gaps.DeliveryGaps.record",
        "store.delivery_gaps.DeliveryGaps.keep_position",
        "store.delivery_gaps.DeliveryGaps._move",
    ],
)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_around_a_commit_loses_nothing_and_asks_at_most_once(
    world: World, tmp_path: Path, moment: str, place: str
) -> None:
    """`_move` before and after is the gap between noting that a redelivery is asked for and asking."""
    world.twin.control("outage", status="failed to connect", code=502, left=1)
    guids = world.fire(1)
    assert killed(world, tmp_path, f"{moment}:{place}")
    world.repair()
    world.next_tick()
    world.next_tick()
    assert world.admitted(guids) == ["admitted"] and world.attempts(guids[0]) <= 2
    # The clock jumps, so that a redelivery may come while its delivery is pulled.
    ends = {("repaired", Reason.DELIVERY_REPAIRED), ("repaired", Reason.DUPLICATE_DELIVERY), ("pulled", Reason.DELIVERY_PULLED)}
    assert world.gaps(guids) <= ends


def test_a_kill_after_a_pulled_delivery_is_stored_ends_as_pulled(world: World, tmp_path: Path) -> None:
    world.twin.control("outage", status="OK", code=200, left=1)
    guids = world.fire(1)
    assert killed(world, tmp_path, "after:store.inbox.Inbox.record")
    assert world.gaps(guids) == {("missing", None)} and world.deliveries(guids) == 1
    world.next_tick()
    assert world.gaps(guids) == {("pulled", Reason.DELIVERY_PULLED)} and world.deliveries(guids) == 1


def test_a_log_that_is_longer_than_a_run_reads_is_read_on_where_it_was_cut(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.repair()
    world.twin.control("outage", status="OK", code=200)
    guids = world.fire(7)
    world.twin.control("outage", status="", code=0, left=0)
    monkeypatch.setattr(github_deliveries, "PER_PAGE", 2)
    monkeypatch.setattr(ops, "PAGES", 2)
    monkeypatch.setattr(rules, "OVERLAP", timedelta())
    for _ in range(4):
        world.next_tick()
    assert world.gaps(guids) == {("pulled", Reason.DELIVERY_PULLED)}


def test_a_budget_that_is_used_up_holds_the_gaps_and_not_the_run(world: World) -> None:
    world.twin.control("outage", status="failed to connect", code=502, left=1)
    guids = world.fire(1)
    world.store.budgets.block(world.owner, world.integration, world.clock.now() + timedelta(minutes=5))
    assert world.repair()["postponed"] == 1 and world.attempts(guids[0]) == 1
    assert world.next_tick()["asked"] == 1
    world.came(guids)


@pytest.mark.parametrize(("status", "reason"), [(401, Reason.PROVIDER_REFUSED), (429, Reason.PROVIDER_RATE_LIMITED)])
def test_what_concerns_the_app_ends_the_run_and_no_gap(world: World, status: int, reason: Reason) -> None:
    world.twin.control("outage", status="OK", code=200, left=1)
    guids = world.fire(1)
    world.twin.fault("GET", "/app/hook/deliveries/", status=status)
    with pytest.raises(ProviderError) as failed:
        world.repair()
    assert failed.value.reason is reason and world.gaps(guids) == {("missing", None)}
    world.next_tick()
    assert world.gaps(guids) == {("pulled", Reason.DELIVERY_PULLED)}


def test_an_installation_that_cant_be_read_now_is_read_later(world: World) -> None:
    """Its event isn't noted as applied before."""
    world.twin.control("outage", status="failed to connect", code=502, left=1)
    renamed = world.twin.control("rename", repository="acme/orders", to="sales")
    world.twin.fault("GET", "/app/installations/", status=502)
    assert world.repair()["pull failed"] == 1
    name = world.store.owners.repository(world.owner, renamed["repository_id"])
    assert name is not None and name.full_name == "acme/orders"
    assert world.next_tick()["pulled"] == 1
    name = world.store.owners.repository(world.owner, renamed["repository_id"])
    assert name is not None and name.full_name == "acme/sales"
    world.twin.control("rename", repository="acme/sales", to="orders")


def test_the_schedule_is_off_while_there_is_no_app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KILO_HOME", str(tmp_path))
    monkeypatch.delenv("KILO_GITHUB_APP_ID", raising=False)
    with build_schedule_context(
        scheduled_execution_time=datetime(2026, 3, 1, tzinfo=UTC), resources={"github": GitHubResource()}
    ) as context:
        assert isinstance(delivery_repairs(context), SkipReason)
        monkeypatch.setenv("KILO_GITHUB_APP_ID", "7")
        asked = delivery_repairs(context)
    assert isinstance(asked, RunRequest) and asked.run_config == {}


def test_the_commands_show_and_repair(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILO_DATABASE_URL", "postgresql://given/elsewhere")
    secrets = Settings().home / "secrets"
    write_secret(secrets / "database.json", json.dumps(world.database.logins))
    write_secret(secrets / "encryption.key", Cipher.new_key_file())
    world.twin.control("outage", status="OK", code=200, left=1)
    guids = world.fire(1)

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(main, ["deliveries", *arguments])
        with warnings.catch_warnings():  # connections, which end with a process of their own
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
        assert done.exit_code == 0, done.output
        return done.stdout

    assert "new" in run("repair")
    key = api_key(world.store, "viewer", world.owner)
    monkeypatch.setenv("KILO_API_KEY", key)
    with served(world.database) as address:
        monkeypatch.setenv("KILO_API_URL", address)
        missed, _, received = run("list", "--limit", "1000").partition("received")
        assert guids[0] in missed
        world.next_tick()
        missed, _, received = run("list", "--limit", "1000").partition("received")
        assert guids[0] in missed and guids[0] in received and "pulled" in received


class _Held:
    store: Store


class _TheStore(StoreResource):
    def get(self) -> Store:
        return _Held.store


def test_the_job_counts_and_the_asset_shows_gaps_and_losses(world: World) -> None:
    _Held.store = world.store
    world.store.retention.sweep(Ages(0, 1, 1))  # what other tests gave up is told no more
    world.twin.control("outage", status="OK", code=200, left=2)
    guids = world.fire(1)
    lost = world.send("pull_request", {"action": "opened", "installation": {"id": world.twin.credentials["installation_id"]}})
    resources: dict[str, Any] = {"store": _TheStore(), "github": GitHubResource()}

    def shown(instance: DagsterInstance) -> tuple[dict[str, Any], dict[str, bool]]:
        done = materialize(
            [delivery_gaps, nothing_was_given_up, log_is_compared], resources=resources, instance=instance, raise_on_error=False
        )
        (made,) = done.asset_materializations_for_node("delivery_gaps")
        checks = {one.check_name: one.passed for one in done.get_asset_check_evaluations()}
        return {name: one.value for name, one in made.metadata.items()}, checks

    with DagsterInstance.ephemeral() as instance:
        assert shown(instance)[1]["nothing_was_given_up"]
        assert delivery_repair.execute_in_process(resources=resources, instance=instance).success
        numbers, checks = shown(instance)
    assert numbers["pulled"] >= 1 and numbers["given up"] >= 1, numbers
    assert checks == {"nothing_was_given_up": False, "log_is_compared": True}
    assert lost in [one["guid"] for one in world.store.delivery_gaps.given_up()]
    assert world.gaps(guids) == {("pulled", Reason.DELIVERY_PULLED)}
