"""Events are hints (design, section 3): however a pull request's events arrive, the same reviews stand in the end.

Histories are generated, delivered in order and shuffled, repeated and late, with work done in between. Admission is the real
one over the real inbox, the launch decides with the functions that the op uses; the provider's present state is the history's.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from kilo_pipelines.core.limits import SETTINGS, LimitsConfig
from kilo_pipelines.core.markers import Marker
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.work import FINAL, WorkState
from kilo_pipelines.ops.admission import admit
from kilo_pipelines.ops.code_review import subject_of
from kilo_pipelines.services.code_review import launch, outcome
from kilo_pipelines.services.code_review.config import CodeReviewConfig
from kilo_pipelines.store import Claimed, NewDelivery, SessionClaim
from tests.conftest import Database
from tests.support.figures import Figures
from tests.support.store import RECEIPT, World

MARKER = Marker(b"m" * 32)
# Histories that once left the last head's check to a superseded review.
FOUND = (467, 537)


@dataclass(frozen=True)
class Pull:
    """What the provider would answer at a moment."""

    repository_id: int
    number: int
    state: str = "open"
    draft: bool = False
    head: int = 1
    base: int = 1
    title: str = "t"
    body: str = ""
    author: str = "grace"
    head_ref: str = "topic"
    base_sha: str = "b" * 40

    @property
    def head_sha(self) -> str:
        return f"{self.number:020x}{self.head:020x}"

    @property
    def base_ref(self) -> str:
        return f"release-{self.base}"

    def event(self, action: str, installation: int, **more: Any) -> bytes:
        """The body that the provider sends for what just happened."""
        repository = {"id": self.repository_id, "full_name": "octo/demo"}
        pull = {
            "number": self.number,
            "title": self.title,
            "draft": self.draft,
            "state": self.state,
            "html_url": "http://localhost/pull",
            "user": {"id": 5, "login": self.author, "type": "User"},
            "head": {"sha": self.head_sha, "ref": self.head_ref, "repo": repository},
            "base": {"sha": self.base_sha, "ref": self.base_ref},
        }
        known = {"action": action, "number": self.number, "pull_request": pull, "repository": repository}
        return json.dumps(known | {"installation": {"id": installation}, "nonce": uuid4().hex} | more).encode()


def happen(pull: Pull, chance: random.Random) -> tuple[Pull, str, dict[str, Any]]:
    """The next thing that a person does to a pull request; heads and bases only grow."""
    label: dict[str, Any] = {"label": {"name": chance.choice(["kilo", "bug"])}}
    retarget: dict[str, Any] = {"changes": {"base": {"ref": {"from": pull.base_ref}}}}
    rest = [
        ("labeled", pull, label),
        ("edited", replace(pull, base=pull.base + 1), retarget),
        ("edited", replace(pull, title="u"), {}),
    ]
    if pull.state == "closed":
        rest += [("reopened", replace(pull, state="open"), {})] * 4
    else:
        rest += [("synchronize", replace(pull, head=pull.head + 1), {})] * 4 + [("closed", replace(pull, state="closed"), {})] * 3
        turned = replace(pull, draft=not pull.draft)
        rest += [("ready_for_review" if pull.draft else "converted_to_draft", turned, {})] * (3 if pull.draft else 1)
    action, after, more = chance.choice(rest)
    return after, action, more


class Review:
    """One pull request's way through the platform."""

    def __init__(self, world: World, number: int, chance: random.Random) -> None:
        self.world, self.chance, self.number = world, chance, number
        self.present = Pull(world.repository, number, draft=chance.random() < 0.2)
        self.happened: list[NewDelivery] = [self._delivery("opened", {})]
        self.delivered: set[int] = set()
        self.held: list[tuple[Claimed, Pull]] = []

    def _delivery(self, action: str, more: dict[str, Any]) -> NewDelivery:
        body = self.present.event(action, self.world.installation, **more)
        return NewDelivery(self.world.owner.id, self.world.integration, uuid4().hex, "pull_request", action, body, {})

    def happens(self) -> None:
        self.present, action, more = happen(self.present, self.chance)
        self.happened.append(self._delivery(action, more))

    def deliver(self, index: int) -> None:
        """As it came, or once more under its own or a forged delivery id."""
        new = self.happened[index]
        if index in self.delivered and self.chance.random() < 0.5:
            new = NewDelivery(**{**vars(new), "provider_delivery_id": uuid4().hex})
        receipt = self.world.store.inbox.record(new)
        assert (receipt.outcome == "duplicate") == (index in self.delivered)
        self.delivered.add(index)
        self.world.store.inbox.admit_next(lambda tx: admit(tx, MARKER), 50)

    def items(self) -> list[dict[str, Any]]:
        with self.world.store.database.owner(self.world.owner.id) as connection:
            found = connection.execute(
                text(
                    "select w.id, w.state, w.reason, w.session_id, w.announced, r.head_sha, r.base_ref, r.verdict from work_items w"
                    " join reviews r on r.owner_id = w.owner_id and r.item_id = w.id"
                    " where r.repository_id = :repository and r.pull_number = :number order by w.created_at, w.id"
                ),
                {"repository": self.world.repository, "number": self.number},
            )
            return [dict(row) for row in found.mappings()]

    def work(self) -> bool:
        """One step of whatever can be done, as the ops do it; reading the pull request and deciding are two steps."""
        items = self.items()
        assert sum(1 for one in items if WorkState(one["state"]) not in FINAL) <= 1, "two live reviews of one pull request"
        steps: list[Any] = [lambda held=held: self._decide(*held) for held in self.held]
        for one in items:
            if one["state"] == "waiting":
                steps.append(lambda item=one["id"]: self._claim(item))
            elif one["state"] == "running":
                steps.append(lambda item=one: self._end(item))
            elif one["state"] in FINAL and not one["announced"]:
                steps.append(lambda item=one["id"]: self._announce(item))
        if steps:
            self.chance.choice(steps)()
        return bool(steps)

    def _claim(self, item: UUID) -> None:
        claim = self.world.claim(item)
        if isinstance(claim, Claimed):
            self.held.append((claim, self.present))

    def _decide(self, claim: Claimed, pull: Pull) -> None:
        self.held.remove((claim, pull))
        store = self.world.store
        head = launch.head_of(pull)
        reviewed = store.reviews.reviewed_elsewhere(claim, head)
        stop = launch.stop_reason(pull, claim.repository_id, reviewed=reviewed)
        if stop is not None:
            store.queue.conclude(claim, *stop)
            return
        subject = subject_of(claim, claim.attempt, claim.subject_key, None, **head)
        effects = outcome.start_effects(subject, MARKER, admitted_head=claim.details["head_sha"])
        store.sessions.launch(claim, session_id=uuid4(), spec={}, head=head, effects=effects, cap_s=60, receipt=RECEIPT)

    def _end(self, item: dict[str, Any]) -> None:
        store = self.world.store
        held = self.world.session_claim(item["session_id"])
        assert isinstance(held, SessionClaim)
        store.sessions.finish(held, status="completed", reason=None, result={})
        with store.settlements.open(item["id"]) as tx:
            assert tx is not None
            subject = subject_of(tx.item, tx.item.attempt, tx.item.subject_key, None)
            ended = outcome.announce(subject, "completed", Reason.REVIEWED, [], MARKER)
            verdict = {"conclusion": "success", "reason": "reviewed"}
            assert tx.conclude(state="completed", reason="reviewed", verdict=verdict, evidence=None, effects=ended.effects)

    def _announce(self, item: UUID) -> None:
        with self.world.store.settlements.open(item) as tx:
            assert tx is not None
            subject = subject_of(tx.item, tx.item.attempt, tx.item.subject_key, None)
            ended = outcome.announce(subject, tx.item.state, Reason(tx.item.reason or "user_cancelled"), [], MARKER)
            assert tx.announce(ended.stored_verdict(), None, [] if tx.replaced() else ended.effects)

    def finish(self) -> None:
        """Whatever is still on its way arrives, whatever waits is done."""
        missing = [one for one in range(len(self.happened)) if one not in self.delivered]
        self.chance.shuffle(missing)
        for index in missing:
            self.deliver(index)
        for _ in range(200):
            if not self.work():
                return
        raise AssertionError("the work never ends")

    def checks(self) -> dict[str, tuple[str, str | None, str]]:
        """The last word on each head's check, and whose item spoke it."""
        with self.world.store.database.owner(self.world.owner.id) as connection:
            found = connection.execute(
                text(
                    "select e.payload ->> 'head_sha', e.payload ->> 'status', e.payload ->> 'title', e.item_id::text from effects e"
                    " join reviews r on r.owner_id = e.owner_id and r.item_id = e.item_id where r.repository_id = :repository"
                    " and r.pull_number = :number and e.kind = 'github.check_run' order by e.seq"
                ),
                {"repository": self.world.repository, "number": self.number},
            )
            return {row[0]: (row[1], row[2], row[3]) for row in found}

    def faults(self) -> list[str]:
        """What is not as the pull request's end asks for."""
        items = self.items()
        last = (self.present.head_sha, self.present.base_ref)
        reviewed = [one for one in items if one["state"] == "completed"]
        wanted = self.present.state == "open" and not self.present.draft
        wrong = [f"still live: {one['state']}" for one in items if WorkState(one["state"]) not in FINAL]
        keys = [(one["head_sha"], one["base_ref"]) for one in reviewed]
        if wanted and last not in keys:
            wrong.append("0 reviews of the last head")
        # A late retarget of a reviewed head opens its check again, and a review must close it; nothing else repeats one.
        if self.present.base == 1:
            wrong += [f"{keys.count(key)} reviews of {key}" for key in set(keys) if keys.count(key) > 1]
        checks = self.checks()
        wrong += [f"the check of {head[-4:]} stays {status}" for head, (status, _, _) in checks.items() if status != "completed"]
        speakers = {str(one["id"]) for one in reviewed if (one["head_sha"], one["base_ref"]) == last}
        if wanted and speakers and checks[last[0]][2] not in speakers:
            wrong.append(f"the last head's check says {checks[last[0]][1]} and not what its review found")
        return wrong

    def told(self) -> str:
        """The history, for a failing test's reader."""
        events = [(one.action, json.loads(one.body)["pull_request"]["head"]["sha"][-2:]) for one in self.happened]
        return f"events {events}; items {[(one['state'], one['reason'], one['head_sha'][-2:], one['base_ref']) for one in self.items()]}"


@pytest.fixture(scope="module")
def team(database: Database) -> World:
    world = World(database.store, database.clock)
    config = CodeReviewConfig().model_dump(mode="json")
    database.store.owners.put_config(world.owner.id, "code_review", config, enabled=True, expected_revision=0, actor="test")
    # All histories are one author's, and time stands still: what an author may start at once has tests of its own.
    flood = LimitsConfig(author_burst=10_000, author_starts_per_hour=10_000).model_dump(mode="json")
    database.store.owners.put_config(world.owner.id, SETTINGS, flood, enabled=True, expected_revision=0, actor="test")
    return world


def in_order(world: World, seed: int, number: int) -> Review:
    """Each event is admitted as it happens, the work follows at the end."""
    chance = random.Random(seed)
    review = Review(world, number, chance)
    review.deliver(0)
    for index in range(1, 2 + seed % 9):
        review.happens()
        review.deliver(index)
    review.finish()
    return review


def shuffled(world: World, seed: int, number: int, *, busy: bool) -> Review:
    """The same history; events come late, in any order and several times. `busy`: work is done in between."""
    chance = random.Random(seed)
    review = Review(world, number, chance)
    histories = 1 + seed % 9
    for _ in range(histories if not busy else 0):
        review.happens()
    review.chance = random.Random(seed + 1)
    while busy and (histories or review.chance.random() < 0.7):
        step = review.chance.random()
        world.clock.advance(timedelta(seconds=1))
        if step < 0.3 and histories:
            review.happens()
            histories -= 1
        elif step < 0.65:
            review.deliver(review.chance.randrange(len(review.happened)))
        else:
            review.work()
    order = list(range(len(review.happened))) * (1 if busy else 2)
    review.chance.shuffle(order)
    for index in order[: review.chance.randrange(len(order) + 1)] if busy else order:
        review.deliver(index)
    review.finish()
    return review


def test_shuffled_and_repeated_events_end_as_ordered_ones(team: World, full: bool, figures: Figures) -> None:
    """The same history twice: the same heads are reviewed, the same checks have the same last word."""
    wrong, lost, twice = [], 0, 0
    seeds = range(500 if full else 25)
    for seed in seeds:
        first, second = in_order(team, seed, 10_000 + seed), shuffled(team, seed, 20_000 + seed, busy=False)
        ends = [
            sorted((one["head_sha"][20:], one["base_ref"]) for one in review.items() if one["state"] == "completed")
            for review in (first, second)
        ]
        wanted = 1 if first.present.state == "open" and not first.present.draft else 0
        lost += sum(len(end) < wanted for end in ends)
        twice += sum(len(end) > wanted for end in ends)
        faults = first.faults() + second.faults()
        if ends[0] != ends[1] or faults or len(ends[0]) != wanted:
            wrong.append(f"seed {seed}: {ends} {faults} {second.told()}")
    figures(tried=2 * len(seeds), lost=lost, duplicated=twice)
    assert wrong == [], "\n".join(wrong[:5])


def test_late_events_between_claims_launches_and_verdicts_lose_no_review(team: World, full: bool, figures: Figures) -> None:
    """Events arrive at any moment of the work: before the re-read, between re-read and launch, during the session, after it."""
    wrong, lost, twice = [], 0, 0
    seeds = sorted({*range(2_000 if full else 60), *FOUND})  # each once: a seed is a pull request
    for seed in seeds:
        review = shuffled(team, seed, 30_000 + seed, busy=True)
        faults = review.faults()
        lost += any("0 reviews" in one or "live" in one for one in faults)
        twice += any("reviews of" in one and not one.startswith("0") for one in faults)
        if faults:
            wrong.append(f"seed {seed}: {faults} {review.told()}")
    figures(tried=len(seeds), lost=lost, duplicated=twice)
    assert wrong == [], f"{len(wrong)} of {len(seeds)}\n" + "\n".join(wrong[:5])


def test_an_event_between_the_re_read_and_its_decision_is_not_lost(team: World) -> None:
    """The launch read `closed` and is about to end the item when `reopened` arrives: its decision is void, the next claim reads again."""
    review = Review(team, 50_000, random.Random(0))
    review.present = replace(review.present, draft=False)
    review.happened = [review._delivery("opened", {})]
    review.deliver(0)
    review.present = replace(review.present, state="closed")
    review._claim(review.items()[0]["id"])
    ((claim, read),) = review.held
    review.present = replace(review.present, state="open")
    review.happened.append(review._delivery("reopened", {}))
    review.deliver(1)
    review._decide(claim, read)
    assert review.items()[0]["state"] == "waiting"
    review.finish()
    assert review.faults() == [] and [one["state"] for one in review.items()] == ["completed"]


def test_a_late_event_of_an_older_head_repeats_no_finished_review(team: World) -> None:
    """The provider's own re-sending of what was missed brings old events hours later."""
    review = Review(team, 50_001, random.Random(0))
    review.present = replace(review.present, draft=False)
    review.happened = [review._delivery("opened", {})]
    review.present = replace(review.present, head=2)
    review.happened.append(review._delivery("synchronize", {}))
    review.deliver(1)
    while review.work():
        pass
    review.deliver(0)
    review.finish()
    assert review.faults() == []
    assert {(one["state"], one["reason"]) for one in review.items()} == {
        ("completed", "reviewed"),
        ("cancelled", Reason.ALREADY_REVIEWED),
    }
