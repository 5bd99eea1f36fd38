"""Lists and figures of findings against a Python oracle, on a random world of two owners of the same repositories."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.rows import dict_row

from kilo_pipelines.ops.findings import policy_for
from kilo_pipelines.ops.security_sync import SOURCE, AlertTaker
from kilo_pipelines.services.security.config import SERVICE, SecurityConfig
from kilo_pipelines.store import NewItem, Repository, Wanted
from kilo_pipelines.store.finding_lists import ANALYZED, NEEDS_ACTION, ORDERS, OUTCOMES, STATUSES
from tests.conftest import Database
from tests.support.alerts import alert
from tests.support.store import World
from tests.support.two import connect

SEED = 20_261_123
REPOSITORIES = {660_001: "octo/one", 660_002: "octo/two"}
SEVERITIES = ("critical", "high", "medium", "low")
FINDINGS = 120
DEEP = ({"exploitable": True}, {"exploitable": False}, {"exploitable": "unknown"}, None)
ACTIONS = ("dismiss", "open_pr", "manual_review", "monitor")


def _text(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class Side:
    """One owner, as the store and as the oracle see it."""

    database: Database
    admin: psycopg.Connection[Any]
    owner: UUID

    @property
    def findings(self) -> Any:
        return self.database.store.findings

    def rows(self) -> list[dict[str, Any]]:
        """Raw rows past every policy, with outcome and overdue worked out in Python."""
        with self.admin.cursor(row_factory=dict_row) as cursor:
            found = cursor.execute("select * from findings where owner_id = %s", (self.owner,)).fetchall()
            slas = cursor.execute("select * from finding_sla where owner_id = %s", (self.owner,)).fetchall()
            work = cursor.execute(
                "select a.*, w.state, w.ended_at from finding_analyses a join work_items w on w.owner_id = a.owner_id and w.id = a.item_id where a.owner_id = %s",
                (self.owner,),
            ).fetchall()
        sla = {one["finding_id"]: one for one in slas}
        now = self.database.clock.now()
        for one in found:
            own = [item for item in work if item["finding_id"] == one["id"]]
            decided = one["upstream_state"] != "open" or one["disposition"] is not None
            one["status"] = "fixed" if one["upstream_state"] == "fixed" else "ignored" if decided else "open"
            one["due_at"], one["closed_at"] = sla[one["id"]]["due_at"], sla[one["id"]]["closed_at"]
            one["overdue"] = one["status"] == "open" and one["due_at"] is not None and one["due_at"] <= now
            one["outcome"] = outcome(one["status"], own)
        return found

    def fill(self, chance: random.Random) -> None:
        """Alerts of every state and age, and analyses of every kind."""
        store, now = self.database.store, self.database.clock.now()
        policy = policy_for(store, self.owner, SecurityConfig(), actor="test")
        for number, (repository, name) in enumerate(REPOSITORIES.items()):
            raw = []
            for one in range(1, FINDINGS // 2 + 1):
                created = now - timedelta(hours=chance.randint(1, 24 * 100))
                state = chance.choice(["open", "open", "open", "fixed", "dismissed", "auto_dismissed"])
                ended = _text(created + (now - created) * chance.random())
                moments = {f"{state}_at": ended} if state != "open" else {}
                raw.append(
                    alert(
                        one + number * 1_000,
                        state=state,
                        created_at=_text(created),
                        updated_at=ended if moments else _text(created),
                        **moments,
                        **{"security_advisory.severity": chance.choice(SEVERITIES), "security_advisory.summary": name},
                    )
                )
            taker = AlertTaker(self.owner, repository, policy, first_sync=False)
            good, bad = taker.sort(raw)
            assert not bad
            store.findings.begin_sync(self.owner, repository)
            store.findings.apply_page(self.owner, repository, SOURCE, good, taker.decide, cursor=None)
        # Some without a deadline: their severity was learnt of by nobody.
        for row in chance.sample(self.rows(), 6):
            self.admin.execute(
                "update finding_sla set due_at = null where owner_id = %s and finding_id = %s", (self.owner, row["id"])
            )
        for row in chance.sample(self.rows(), FINDINGS // 2):
            for _ in range(chance.randint(1, 3)):
                self.analyse(chance, row["id"], row["repository_id"])
        # Ids are random, and so is what the world above holds: these are there in any case.
        free = (one for one in self.rows() if one["outcome"] == "not_analyzed")
        for state, triage, deep in (
            ("waiting", None, None),
            ("failed", None, None),
            ("completed", None, {"exploitable": True, "action": "open_pr"}),
            ("completed", None, {"exploitable": False, "action": "dismiss"}),
            ("completed", {"action": "dismiss"}, None),
            ("completed", {"action": "manual_review"}, None),
            ("completed", {"action": "analyze_codebase"}, None),
            ("completed", {"action": "analyze_codebase"}, {"exploitable": "unknown", "action": "monitor"}),
        ):
            one = next(free)
            self.open(one["id"], one["repository_id"], state, triage, deep, now)

    def analyse(self, chance: random.Random, finding: UUID, repository: int) -> None:
        state = chance.choice(["waiting", "completed", "completed", "completed", "failed", "cancelled"])
        triage = chance.choice([None, {"action": chance.choice(["dismiss", "analyze_codebase", "manual_review"])}])
        deep = chance.choice(DEEP)
        at = self.database.clock.now() - timedelta(minutes=chance.randint(1, 10_000))
        self.open(finding, repository, state, triage, deep and {**deep, "action": chance.choice(ACTIONS)}, at)

    def open(self, finding: UUID, repository: int, state: str, triage: Any, deep: Any, at: datetime) -> None:
        details = {"finding_id": str(finding), "origin": "manual", "requested_by": "test", "mode": "auto"}
        if state == "completed":
            details |= {"triage": triage, "deep": deep, "completed_at": at.isoformat()}
        item = NewItem("security_analysis", f"finding:{finding}", repository, 0, details)
        opened = self.database.store.queue.open(self.owner, item, actor="test")
        if opened is not None and state != "waiting":  # None: one waits already
            self.admin.execute("update work_items set state = %s, ended_at = now() where id = %s", (state, opened))


def outcome(status: str, own: list[dict[str, Any]]) -> str:
    """Contract 15 in Python."""
    if status != "open":
        return "fixed" if status == "fixed" else "dismissed"
    if any(one["ended_at"] is None for one in own):
        return "analyzing"
    done = [one for one in own if one["state"] == "completed" and one["completed_at"]]
    if not done:
        return "failed" if any(one["state"] == "failed" for one in own) else "not_analyzed"
    last = sorted(done, key=lambda one: (-one["completed_at"].timestamp(), one["item_id"]))[0]
    deep, triage = last["deep"] or {}, last["triage"] or {}
    if isinstance(deep.get("exploitable"), bool):
        return "exploitable" if deep["exploitable"] else "not_exploitable"
    action = deep.get("action") or triage.get("action")
    if action in ("dismiss", "manual_review"):
        return "safe_to_dismiss" if action == "dismiss" else "needs_review"
    return "triage_complete" if triage.get("action") == "analyze_codebase" else "needs_review"


@pytest.fixture(scope="module")
def sides(database: Database, postgres_admin: str) -> Iterator[tuple[Side, Side]]:
    chance = random.Random(SEED)
    with connect(database, postgres_admin) as admin:
        made = []
        for _ in range(2):
            world = World(database.store, database.clock, repository=min(REPOSITORIES))
            names = [Repository(one, name, "main", False) for one, name in REPOSITORIES.items()]
            database.store.owners.connect(
                world.owner.id,
                provider="github",
                installation_id=world.installation,
                account="octo",
                repositories=names,
                actor="test",
            )
            database.store.owners.put_config(world.owner.id, SERVICE, {}, enabled=True, expected_revision=0, actor="test")
            side = Side(database, admin, world.owner.id)
            side.fill(chance)
            made.append(side)
        yield made[0], made[1]


def matches(one: dict[str, Any], wanted: Wanted) -> bool:
    return (
        (wanted.status is None or one["status"] == wanted.status or (wanted.status == "closed" and one["status"] != "open"))
        and wanted.severity in (None, one["severity"])
        and wanted.repository_id in (None, one["repository_id"])
        and wanted.outcome in (None, one["outcome"])
        and (not wanted.overdue or one["overdue"])
    )


def place(one: dict[str, Any], sort: str) -> tuple[Any, ...]:
    rank = SEVERITIES.index(one["severity"])
    due = (one["due_at"] is None, one["due_at"] or datetime(1970, 1, 1, tzinfo=UTC))
    ties = (one["detected_at"], one["id"])
    return (*due, rank, *ties) if sort == "sla_due_at_asc" else (rank if sort == "severity_desc" else -rank, *due, *ties)


def test_the_world_holds_every_outcome(sides: tuple[Side, Side]) -> None:
    """Else the comparisons below prove little."""
    for side in sides:
        rows = side.rows()
        assert len(rows) == FINDINGS and {one["outcome"] for one in rows} == set(OUTCOMES)
        assert {one["overdue"] for one in rows} == {True, False}


FILTERS = list(
    itertools.product(
        [None, *STATUSES], [None, "critical", "low"], [None, *REPOSITORIES, 660_003], [None, *OUTCOMES], [False, True]
    )
)


@pytest.mark.parametrize("sort", ORDERS)
def test_every_filter_and_order_answers_as_the_oracle_does_and_never_with_another_owners(
    sides: tuple[Side, Side], sort: str
) -> None:
    """Contract 17.23. All single filters and a random part of their combinations."""
    chance = random.Random(SEED)
    single = [one for one in FILTERS if sum(bool(part) for part in one) <= 1]
    for side in sides:
        rows = side.rows()
        for parts in [*single, *chance.sample(FILTERS, 60)]:
            wanted = Wanted(*parts)
            expected = sorted((one for one in rows if matches(one, wanted)), key=lambda one: place(one, sort))
            offset = chance.randint(0, 5)
            found, total = side.findings.page(side.owner, wanted, sort=sort, limit=50, offset=offset)
            assert total == len(expected), wanted
            assert [one["id"] for one in found] == [one["id"] for one in expected[offset : offset + 50]], wanted
            told = {one["id"]: (one["status"], one["outcome"], one["overdue"]) for one in found}
            assert told == {one["id"]: (one["status"], one["outcome"], one["overdue"]) for one in expected[offset : offset + 50]}


@pytest.mark.parametrize("repository", [None, *REPOSITORIES, 660_003])
def test_figures_are_the_oracles_and_the_lists(sides: tuple[Side, Side], repository: int | None) -> None:
    for side in sides:
        now = side.database.clock.now()
        rows = [one for one in side.rows() if repository in (None, one["repository_id"])]
        found = side.findings.summary(side.owner, repository)
        parts = {"overall": rows, **{name: [one for one in rows if one["severity"] == name] for name in SEVERITIES}}
        for name, part in parts.items():
            counted = found["overall"] if name == "overall" else found["by_severity"][name]
            opened = [one for one in part if one["status"] == "open"]
            soon = [one for one in opened if one["due_at"] and now < one["due_at"] <= now + timedelta(days=7)]
            took = [
                (one["fixed_at"] - one["detected_at"]).total_seconds() / 86_400
                for one in part
                if one["status"] == "fixed" and one["fixed_at"]
            ]
            assert counted["findings"] == len(part)
            statuses = Counter(one["status"] for one in part)
            assert [counted[one] for one in ("open", "fixed", "ignored")] == [
                statuses[one] for one in ("open", "fixed", "ignored")
            ]
            assert counted["overdue"] == sum(one["overdue"] for one in opened)
            assert counted["untracked"] == sum(one["due_at"] is None for one in opened)
            assert counted["within_due"] == len(opened) - counted["overdue"] - counted["untracked"]
            assert counted["due_soon"] == len(soon)
            assert counted["due_soon_exploitable"] == sum(one["outcome"] == "exploitable" for one in soon)
            buckets = Counter(one["outcome"] for one in opened)
            assert {one: counted[one] for one in OUTCOMES[:8]} == {one: buckets[one] for one in OUTCOMES[:8]}
            assert sum(counted[one] for one in OUTCOMES[:8]) == len(opened)
            assert counted["fixed_dated"] == len(took)
            if took:
                assert float(counted["mean_days"]) == pytest.approx(statistics.mean(took))
                assert float(counted["median_days"]) == pytest.approx(statistics.median(took))
            for bucket in OUTCOMES[:8]:
                wanted = Wanted("open", None if name == "overall" else name, repository, bucket)
                assert counted[bucket] == side.findings.page(side.owner, wanted, sort="severity_asc", limit=1, offset=0)[1]
        late = sorted((one for one in rows if one["overdue"]), key=lambda one: (one["due_at"], one["id"]))[:10]
        assert [(one["id"], one["days_overdue"]) for one in found["overdue"]] == [
            (one["id"], (now - one["due_at"]).days) for one in late
        ]
        health = {one["repository_id"]: one for one in found["repositories"]}
        opened = [one for one in rows if one["status"] == "open"]
        assert set(health) == {one["repository_id"] for one in opened} and found["repositories_open"] == len(health)
        for number, one in health.items():
            own = [row for row in opened if row["repository_id"] == number]
            assert (one["open"], one["overdue"]) == (len(own), sum(row["overdue"] for row in own))
            assert one["needs_action"] == sum(row["outcome"] in NEEDS_ACTION for row in own)


def test_the_worst_repository_comes_first(sides: tuple[Side, Side]) -> None:
    for side in sides:
        told = side.findings.summary(side.owner)["repositories"]
        keys = [(-one["critical"], -one["overdue"], -one["needs_action"], one["repository"]) for one in told]
        assert keys == sorted(keys)


def test_work_of_a_finding_is_its_own(sides: tuple[Side, Side]) -> None:
    a, b = sides
    (row, *_) = [one for one in a.rows() if one["outcome"] in ANALYZED]
    told = a.findings.work(a.owner, row["id"])
    assert told and {one["service"] for one in told} == {"security_analysis"} and json.dumps(told, default=str)
    assert b.findings.work(b.owner, row["id"]) == []
