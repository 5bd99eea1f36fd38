"""`dependabot_alert` events: the alert's new state at once, however late, often and in whatever order they come."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from kilo_pipelines.core.markers import Marker
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.ops.admission import admit
from kilo_pipelines.ops.findings import policy_for
from kilo_pipelines.ops.security_sync import SOURCE, AlertTaker
from kilo_pipelines.providers.github_webhooks import event_of_shape, shape_matches
from kilo_pipelines.services.security.config import SERVICE, SecurityConfig
from kilo_pipelines.services.security.sla import SlaPolicy
from kilo_pipelines.store import NewDelivery
from tests.conftest import Database
from tests.support.alerts import alert
from tests.support.store import World

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def event(world: World, number: int, at: datetime, state: str = "open", **more: Any) -> dict[str, Any]:
    moment = at.isoformat()
    ended = {"fixed": {"fixed_at": moment}, "dismissed": {"dismissed_at": moment, "dismissed_reason": "not_used"}}
    changed = {"state": state, "updated_at": moment, **ended.get(state, {}), **more}
    return {
        "action": "created" if state == "open" else state,
        "alert": alert(number, **changed),
        "repository": {"id": world.repository, "full_name": "octo/demo", "private": False},
        "installation": {"id": 1},
    }


def deliver(world: World, payload: dict[str, Any]) -> str | None:
    """Stores and admits the event; the reason of its skip."""
    body = json.dumps(payload).encode() + b" " * random.Random(uuid4().int).randint(0, 10**6)
    new = NewDelivery(world.owner.id, world.integration, str(uuid4()), "dependabot_alert", payload["action"], body, {})
    receipt = world.store.inbox.record(new)
    world.store.inbox.admit_next(lambda tx: admit(tx, Marker(b"k" * 32)), 10)
    with world.store.database.owner(world.owner.id) as connection:
        found = connection.exec_driver_sql(
            "select state, reason from deliveries where id = %(id)s", {"id": receipt.delivery_id}
        ).one()
    assert found[0] in ("admitted", "skipped")
    return found[1]


@pytest.fixture
def owner(world: World) -> Iterator[World]:
    """Its alert 1 was read by a sync."""
    world.store.owners.put_config(world.owner.id, SERVICE, {}, enabled=True, expected_revision=0, actor="test")
    policy = policy_for(world.store, world.owner.id, SecurityConfig(), actor="test")
    taker = AlertTaker(world.owner.id, world.repository, policy, first_sync=True)
    good, _ = taker.sort([event(world, 1, NOW)["alert"]])
    world.store.findings.apply_page(world.owner.id, world.repository, SOURCE, good, taker.decide, cursor=None)
    yield world


def states(world: World) -> dict[str, str]:
    found = world.store.findings.of_repository(world.owner.id, world.repository, open_or_superseded=False)
    return {one.source_id: one.status for one in found}


def test_a_new_alert_and_a_fixed_one_are_taken_with_their_deadlines(owner: World) -> None:
    assert deliver(owner, event(owner, 2, NOW)) is None
    assert deliver(owner, event(owner, 1, NOW + timedelta(hours=1), "fixed")) is None
    assert states(owner) == {"1": "fixed", "2": "open"}
    due = {one["source_id"]: one["due_at"] for one in owner.store.findings.listed(owner.owner.id, status="open", limit=10)}
    assert due["2"] is not None


def test_events_in_any_order_and_twice_end_in_the_last_state(owner: World) -> None:
    steps = [
        event(owner, 1, NOW + timedelta(hours=hour), state)
        for hour, state in enumerate(["fixed", "open", "dismissed", "open", "fixed"], 1)
    ]
    shuffled = [*steps, *steps]
    random.Random(7).shuffle(shuffled)
    answers = {deliver(owner, one) for one in shuffled}
    assert states(owner) == {"1": "fixed"} and answers == {None, Reason.ALERT_OUTDATED}


def test_duplicates_are_settled_with_the_event(owner: World) -> None:
    """What the newest alert speaks for is open again the moment that it is fixed, not at the next sync."""
    same = {"security_advisory.ghsa_id": "GHSA-same", "dependency.package.name": "left"}
    deliver(owner, event(owner, 7, NOW, **same))
    deliver(owner, event(owner, 8, NOW, **same))
    deliver(owner, event(owner, 9, NOW, **same, **{"dependency.manifest_path": "other/package-lock.json"}))
    assert states(owner) == {"1": "open", "7": "ignored", "8": "open", "9": "open"}
    deliver(owner, event(owner, 8, NOW + timedelta(hours=1), "fixed", **same))
    assert states(owner) == {"1": "open", "7": "open", "8": "fixed", "9": "open"}
    due = {one["source_id"]: one["paused"] for one in owner.store.findings.listed(owner.owner.id, status="open", limit=10)}
    assert due["7"] is False


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        ("off", Reason.SECURITY_DISABLED),
        ("unselected", Reason.REPOSITORY_NOT_SELECTED),
        ("other repository", Reason.REPOSITORY_UNKNOWN),
        ("malformed", Reason.ALERT_MALFORMED),
    ],
)
def test_what_isnt_taken_says_why_and_changes_nothing(owner: World, prepare: str, reason: Reason) -> None:
    payload = event(owner, 1, NOW + timedelta(days=1), "fixed")
    if prepare in ("off", "unselected"):
        config = {"repository_selection_mode": "selected"} if prepare == "unselected" else {}
        owner.store.owners.put_config(
            owner.owner.id, SERVICE, config, enabled=prepare != "off", expected_revision=1, actor="test"
        )
    elif prepare == "other repository":
        payload["repository"]["id"] = owner.repository + 999_999
    else:
        payload["alert"]["state"] = "snoozed"
    assert deliver(owner, payload) == reason
    assert states(owner) == {"1": "open"}


def test_an_alert_that_the_database_refuses_says_why(owner: World) -> None:
    policy = SlaPolicy.of_stored(*(owner.store.findings.policy(owner.owner.id) or (0, {})))
    taker = AlertTaker(owner.owner.id, owner.repository, policy, first_sync=False)
    (good,), _ = taker.sort([event(owner, 1, NOW + timedelta(days=1), "fixed")["alert"]])
    noise = random.Random(1).randbytes(9_000).hex()
    wide = type(good)(replace(good.found, manifest_path=noise))
    new = NewDelivery(owner.owner.id, owner.integration, str(uuid4()), "dependabot_alert", "fixed", b"{}", {})
    receipt = owner.store.inbox.record(new)
    owner.store.inbox.admit_next(lambda tx: tx.take_alerts(owner.repository, SOURCE, [wide], taker.decide), 10)
    with owner.store.database.owner(owner.owner.id) as connection:
        found = connection.exec_driver_sql("select reason from deliveries where id = %(id)s", {"id": receipt.delivery_id}).one()
    assert found[0] == Reason.ALERT_REFUSED and states(owner) == {"1": "open"}
    assert len(owner.store.findings.quarantined(owner.owner.id)) == 1


def test_before_the_first_sync_an_event_is_left_to_it(database: Database) -> None:
    world = World(database.store, database.clock)
    world.store.owners.put_config(world.owner.id, SERVICE, {}, enabled=True, expected_revision=0, actor="test")
    assert deliver(world, event(world, 1, NOW)) == Reason.NOT_SYNCED_YET and states(world) == {}


def test_an_alert_goes_by_its_own_name_only(owner: World) -> None:
    payload = event(owner, 1, NOW)
    assert event_of_shape(payload) == "dependabot_alert" and shape_matches("dependabot_alert", payload)
    for other in ("pull_request", "code_scanning_alert", "push"):
        assert not shape_matches(other, payload)
    assert not shape_matches("dependabot_alert", {**payload, "repository": {"id": "1", "full_name": "octo/demo"}})
    scanning = {**payload, "alert": {"number": 1, "rule": {}, "state": "open"}}
    assert shape_matches("code_scanning_alert", scanning) and not shape_matches("dependabot_alert", scanning)
