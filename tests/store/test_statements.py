"""Invariant 8: the system login runs the listed statements and no others; and what every run needs is found by index."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import create_engine, event, text

from kilo_pipelines.core.delivery_gaps import Attempt
from kilo_pipelines.core.effects import EffectReceipt
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store import Ages, Claimed, Refused, Repository, SessionClaim, StaleRevisionError, Store
from kilo_pipelines.store.system_statements import INVARIANTS, SECURITY_CHECKS, STATEMENTS, SWEEP
from tests.conftest import Database
from tests.support.store import World, intent

# Enough rows that the planner prefers an index wherever it has one.
FINISHED = 20_000


def _use_everything(database: Database) -> None:
    """Each public call of the store once or more."""
    store, clock = database.store, database.clock
    world = World(store, clock)
    owner = world.owner.id
    assert store.owners.all() and store.owners.integrations(owner) and store.owners.repository(owner, world.repository)
    integration = store.owners.by_installation("github", world.installation)
    assert integration is not None
    store.owners.set_suspended(integration, True)
    store.owners.set_suspended(integration, False)
    store.owners.change_repositories(integration, added=[Repository(1, "octo/other", "main", True)], removed=[1])
    revision = store.owners.put_config(owner, "code_review", {}, enabled=True, expected_revision=0, actor="test")
    with pytest.raises(StaleRevisionError):
        store.owners.put_config(owner, "code_review", {}, enabled=True, expected_revision=revision + 1, actor="test")
    assert store.owners.config(owner, "code_review")
    _use_people(store, owner, clock.now())
    cookie = store.setup_links.open(store.setup_links.make({}))
    assert cookie is not None
    link = store.setup_links.of(cookie)
    assert link is not None
    store.setup_links.note(link, {"seen": True})
    assert store.setup_links.take(cookie, store.setup_links.expect(link, "manifest"), "manifest")
    store.owners.allow_model(owner, "m", True, actor="test")
    assert store.owners.models(owner) == ["m"]
    store.queue.switch("all", "pause", "test", actor="test")
    assert store.queue.switches()
    assert store.queue.pause_reason() == "test" and store.queue.unswitch("all")

    new = world.delivery()
    store.inbox.record(new)
    store.inbox.record(new)
    store.inbox.record(world.delivery(), skip="event_unknown")
    store.inbox.record_many([(world.delivery(), "event_unknown")])
    assert store.owners.by_installations("github", [world.installation]) == [
        store.owners.by_installation("github", world.installation)
    ]
    store.inbox.admit_next(lambda tx: tx.cancel(tx.open(world.new_item(1)), Reason.SUPERSEDED), 10)

    claim, session = world.launched()
    store.queue.switch(f"owner:{owner}", "pause", "test", actor="test")
    assert isinstance(world.session_claim(session), Refused)
    store.queue.unswitch(f"owner:{owner}")
    held = world.session_claim(session)
    assert isinstance(held, SessionClaim)
    store.queue.offers(100)
    store.sessions.event(held, "turn", {})
    assert store.sessions.requeue(held, Reason.WORKER_STOPPING) and not store.sessions.requeue(held, Reason.WORKER_STOPPING)
    held = world.session_claim(held.session_id)
    assert isinstance(held, SessionClaim)
    store.sessions.beat(held, 30)
    store.sessions.record_callback(held.session_id, held.callback_token, b"{}")
    assert store.sessions.finish(held, status="completed", reason=None, result={})
    assert not store.sessions.finish(held, status="completed", reason=None, result={})
    assert store.sessions.get(held.session_id) and store.sessions.events(held.session_id)
    with store.settlements.open(claim.item_id) as tx:
        assert tx is not None and tx.session() and tx.siblings() == []
        tx.conclude(state="completed", reason="reviewed", verdict={}, evidence=None, effects=[intent(uuid4().hex, "a")])
    effect = store.outbox.claim_next(claim.item_id)
    assert effect is not None
    store.outbox.retry(effect, timedelta(0), "x", final=False)
    effect = store.outbox.claim_next(claim.item_id)
    assert effect is not None and store.outbox.applied(effect, EffectReceipt(external_id="1", created=True))
    assert store.outbox.of_item(claim.item_id) and store.reviews.get(claim.item_id) and store.reviews.of_owner(owner)
    store.reviews.previous_head(owner, world.repository, 1, "x")
    store.reviews.owners_with_news(5)
    store.reviews.outcomes(owner, 1)
    _, step = world.initiated()
    assert store.hosted.offers(10) == [] and store.hosted.get(step.session.session_id)
    by_hand = store.queue.open(owner, world.new_item(2), actor="test")
    assert by_hand is not None and store.queue.cancel(by_hand, reason=Reason.USER_CANCELLED, actor="test")
    assert store.queue.reopen(by_hand, actor="test")
    found = world.claim(by_hand)
    assert isinstance(found, Claimed)
    assert store.queue.release(found, not_before=clock.now(), reason=Reason.PROVIDER_UNAVAILABLE)

    world.claim(world.item(), lease=1)
    world.running()
    world.launched()
    clock.advance(timedelta(days=2))
    moved = store.recovery.reap()
    assert all(moved[name] for name in ("starting_lease", "session_lease", "session_deadline", "running_deadline")), moved
    assert store.audit.seal() and store.audit.seals() and store.audit.verify({}) is None and store.audit.unsealed() == 0
    assert store.audit.listed()
    line = Attempt(1, "missed", clock.now(), False, "pull_request", "opened", world.installation, world.repository)
    assert store.delivery_gaps.record(integration, [[line]]) == 1 and not store.delivery_gaps.stored([(integration, "missed")])
    assert store.delivery_gaps.due(5) and store.delivery_gaps.by_owner() and store.delivery_gaps.given_up() == []
    position = store.delivery_gaps.position(7)
    assert store.delivery_gaps.keep_position(7, position, complete=True) and store.delivery_gaps.compared_at(7) == clock.now()
    store.retention.sweep(Ages(1, 1, 1))
    store.keys.in_use()
    store.keys.reseal()
    store.queue.run_lost("x")
    assert store.queue.run_failed("x") == 0
    assert store.queue.items(limit=1) and store.outbox.listed(limit=1)
    assert store.outbox.abandon(uuid4(), actor="test") is None
    store.queue.switch(f"owner:{owner}", "kill", "test", actor="test")
    store.queue.unswitch(f"owner:{owner}")
    store.queue.gauges()
    assert {name: store.invariants.offenders(name) for name in INVARIANTS}
    store.queue.counters()
    store.queue.trace_of(claim.item_id)
    store.figures.beat("test")
    assert store.figures.now().heartbeats and store.figures.ended(clock.now() - timedelta(hours=1)).sessions == []
    assert store.spend.owners_today() == [] and store.spend.gauges() == []
    assert store.spend.over_budget() == [] and store.spend.stopped() == []
    assert store.findings.posture() == [] and store.findings.owners() == [] and store.findings.owner_of(uuid4()) is None
    assert store.analyses.owners() == [] and store.notices.owners() == [] and store.findings.changed_owners(10) == []
    assert all(store.findings.offenders(name) == [] for name in SECURITY_CHECKS)
    store.owners.disconnect(integration.owner_id, integration.id)
    assert store.database.schema()[0]
    store.handover.busy()
    store.handover.restored(clock.now())
    store.queue.unswitch("all")


def _use_people(store: Store, owner: UUID, now: datetime) -> None:
    """People, members and keys."""
    person = store.people.ensure("grace")
    assert store.people.add(owner, person, "owner", lambda _kind, _members: None, actor="test") is None
    assert store.people.members(owner) and store.people.listed()
    ends = now + timedelta(days=1)
    made = store.api_keys.create("owner", owner, expires_at=ends, person_id=person.id, actor="test")
    assert made is not None and store.api_keys.principal(made.value)
    assert store.api_keys.get(made.id) and store.api_keys.of_owner(owner)
    assert store.api_keys.rotate(made.id, expires_at=ends, old_until=now, actor="test")
    assert store.api_keys.revoke(made.id, actor="test")
    assert store.people.change(owner, person.id, None, lambda _kind, _members: None, actor="test") is None
    assert store.api_keys.revoke_operators(made.id) == 0


def test_the_system_login_runs_the_listed_statements_and_no_others(database: Database) -> None:
    """Whatever else runs there looks past the owners' policies without a reason."""
    seen: set[str] = set()

    def listen(_connection: Any, clause: Any, *_rest: Any) -> None:
        seen.add(clause.text)

    engine = database.store.database._system
    event.listen(engine, "before_execute", listen)
    try:
        _use_everything(database)
    finally:
        event.remove(engine, "before_execute", listen)
    known = {statement.sql for statement in STATEMENTS.values()}
    assert seen - known == set()
    assert {name for name, one in STATEMENTS.items() if one.sql not in seen} == set(), "listed and never run"


def test_reasons_are_sentences() -> None:
    for name, statement in STATEMENTS.items():
        assert len(statement.reason) > 20, name


@pytest.fixture(scope="module")
def full(database: Database) -> World:
    """A database with a history: thousands of finished rows and a few live ones."""
    world = World(database.store, database.clock)
    _, held = world.running()
    with database.store.database.system() as connection:
        values = {"o": world.owner.id, "r": world.repository, "n": FINISHED}
        connection.execute(
            text(
                "insert into work_items (owner_id, id, service, subject_key, repository_id, state, not_before, created_at, updated_at, ended_at,"
                " announced) select :o, gen_random_uuid(), 'code_review', 's' || g, :r, 'completed', now(), now(), now() - interval '9 days',"
                " now(), true from generate_series(1, :n) g"
            ),
            values,
        )
        connection.execute(
            text(
                "insert into sessions (owner_id, id, item_id, attempt, item_fence, state, spec, deadline, created_at, ended_at)"
                " select owner_id, gen_random_uuid(), id, 1, 1, 'completed', '{}', now(), now(), now() from work_items"
                " where owner_id = :o and state = 'completed'"
            ),
            values,
        )
        connection.execute(
            text(
                "insert into effects (owner_id, id, item_id, kind, intent_key, subject_key, payload, state, not_before, created_at, ended_at)"
                " select owner_id, gen_random_uuid(), id, 'github.reaction', id::text, 's', '{}', 'applied', now(), now(), now() from work_items"
                " where owner_id = :o and state = 'completed'"
            ),
            values,
        )
        connection.execute(
            text(
                "insert into deliveries (owner_id, id, integration_id, provider_delivery_id, event, body, body_sha256, state, not_before, received_at,"
                " settled_at, reason) select :o, gen_random_uuid(), :i, g::text, 'push', '', sha256(g::text::bytea), 'skipped', now(), now(), now(),"
                " 'x' from generate_series(1, :n) g"
            ),
            {**values, "i": world.integration},
        )
    owner = create_engine(database.logins["migrator"], isolation_level="AUTOCOMMIT")
    with owner.connect() as connection:
        connection.execute(text("analyze"))
    owner.dispose()
    assert held.session_id
    return world


HISTORY = ("work_items", "sessions", "effects", "deliveries")
# Asked by a person now and then, or once a day: they may look through everything.
FOR_PEOPLE = {"ITEMS_OF_PEOPLE", "EFFECTS_OF_PEOPLE", "EFFECT_OWNER", "SESSIONS_TO_RESEAL", "KEYS_IN_USE"}
FOR_PEOPLE |= {"RESTORED_ITEMS", "RESTORED_SESSIONS", "RESTORED_EFFECTS", "RESTORED_ONCE"}  # once after a restore
FOR_PEOPLE |= {f"SWEEP.{name}" for name in SWEEP}
REPEATED = sorted(
    name for name, one in STATEMENTS.items() if any(table in one.sql for table in HISTORY) and name not in FOR_PEOPLE
)


@pytest.mark.parametrize("name", REPEATED)
def test_no_repeated_statement_reads_the_whole_history(database: Database, full: World, name: str) -> None:
    """What every run, beat and second of recovery asks must not grow with what is finished."""
    now = database.clock.now()
    values: dict[str, Any] = dict.fromkeys(("now", "until", "overlooked", "since", "after", "grace", "seen", "gone"), now)
    values |= {
        "limit": 20,
        "capacity": 5,
        "most": 3,
        "fence": 1,
        "step": 1,
        "once": ["x"],
        "owner": full.owner.id,
        "id": uuid4(),
        "session": uuid4(),
    }
    values |= dict.fromkeys(("run", "host", "reason", "lost", "state", "detail", "scope"), "x") | {
        "result": "{}",
        "evidence": "{}",
    }
    values |= {"owner_ids": [full.owner.id], "ids": [uuid4()], "integration_ids": [full.integration], "actions": [None]}
    values |= {"bounds": [1.0], "used": now, "name": "x", "traces": [None]}
    values |= {key: ["x"] for key in ("provider_ids", "events", "headers", "reasons")} | {"bodies": [b""], "digests": [b""]}
    explained = text(f"explain {STATEMENTS[name].sql}")
    with database.store.database._system.connect() as connection:
        plan = [row[0] for row in connection.execute(explained, {key: values[key] for key in explained._bindparams}).all()]
        connection.rollback()
    scans = [line.strip() for line in plan if "Seq Scan on" in line and any(f"on {table} " in line for table in HISTORY)]
    assert scans == [], "\n".join(plan)
