"""The twin's alerts without a server: the seeded world, how an alert moves, lists and cursors, lock files and ranges."""

from __future__ import annotations

import json
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kilo_twin import npm, world_alerts
from kilo_twin.dependabot import AlertError, Dependabot
from kilo_twin.shapes import Shapes
from kilo_twin.state import Twin
from kilo_twin.webhooks import Webhooks

UNTIL = datetime(2026, 11, 1, tzinfo=UTC)
DISMISSAL = ("dismissed_at", "dismissed_by", "dismissed_reason", "dismissed_comment")


@pytest.fixture(scope="module")
def seeded() -> world_alerts.Seeded:
    return world_alerts.alerts("acme/shop", 800, 3, UNTIL)


def test_the_same_seed_is_the_same_world_and_another_one_is_not(seeded: world_alerts.Seeded) -> None:
    assert world_alerts.alerts("acme/shop", 800, 3, UNTIL) == seeded
    assert world_alerts.alerts("acme/other", 800, 3, UNTIL).alerts != seeded.alerts
    assert world_alerts.alerts("acme/shop", 800, 4, UNTIL).alerts != seeded.alerts


def test_the_world_has_what_a_sync_has_to_cope_with(seeded: world_alerts.Seeded) -> None:
    """Every state, severity and ecosystem in sound shares; duplicates; missing patches, CVEs, scores and weaknesses."""
    named = [seeded.advisories[one["ghsa_id"]] for one in seeded.alerts]
    states = Counter(one["state"] for one in seeded.alerts)
    assert {state: round(share / 800, 1) for state, share in states.items()} == pytest.approx(
        {"open": 0.45, "fixed": 0.33, "dismissed": 0.13, "auto_dismissed": 0.09}, abs=0.11
    )
    severities = Counter(one["severity"] for one in named)
    assert min(severities.values()) > 25 and severities["medium"] > severities["critical"] and len(severities) == 4
    assert {one["vulnerabilities"][0]["ecosystem"] for one in named} == {"npm", "pip"}
    packages = Counter(one["vulnerabilities"][0]["name"] for one in seeded.advisories.values())
    assert max(packages.values()) > 3
    places = Counter((one["ghsa_id"], one["manifest_path"]) for one in seeded.alerts)
    assert sum(1 for times in places.values() if times > 1) > 20
    for missing in (
        lambda one: one["vulnerabilities"][0]["patched"] is None,
        lambda one: one["cve_id"] is None,
        lambda one: one["cvss"]["vector_string"] is None,
        lambda one: one["cwes"] == [],
    ):
        assert 10 < sum(1 for one in named if missing(one)) < 200
    assert {one["scope"] for one in seeded.alerts} == {"runtime", "development", None}


def test_no_alert_is_older_than_its_advisory_or_younger_than_the_world(seeded: world_alerts.Seeded) -> None:
    assert [one["number"] for one in seeded.alerts] == list(range(1, 801))
    assert [one["created_at"] for one in seeded.alerts] == sorted(one["created_at"] for one in seeded.alerts)
    for one in seeded.alerts:
        published = seeded.advisories[one["ghsa_id"]]["published_at"]
        assert published <= one["created_at"] <= one["updated_at"] <= "2026-11-01T00:00:00Z"
    ages = [UNTIL - datetime.fromisoformat(one["created_at"]) for one in seeded.alerts]
    assert min(ages) < timedelta(days=20) and max(ages) > timedelta(days=700)


def test_three_thousand_alerts_are_made_in_no_time() -> None:
    started = time.process_time()
    world_alerts.alerts("acme/large", 3_000, 1, UNTIL)
    assert time.process_time() - started < 0.5


# -- how an alert moves -----------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(sorted(world_alerts.MOVES)), max_size=12))
@settings(max_examples=80, deadline=None)
def test_an_alert_says_the_same_in_its_state_and_in_its_times(actions: list[str]) -> None:
    """A move that isn't one changes nothing; every other one leaves exactly the times of its state."""
    alert = world_alerts.new_alert(1, "GHSA-x", "package-lock.json", "2026-01-01T00:00:00Z", "runtime")
    for step, action in enumerate(actions):
        before, at = dict(alert), f"2026-02-01T00:00:{step:02}Z"
        allowed = alert["state"] in world_alerts.MOVES[action][0]
        try:
            world_alerts.move(alert, action, at, by="grace", reason="not_used", comment="c")
        except ValueError:
            assert not allowed and alert == before
            continue
        assert allowed and alert["state"] == world_alerts.MOVES[action][1] and alert["updated_at"] == at
        assert (alert["fixed_at"] is not None) == (alert["state"] == "fixed")
        assert (alert["auto_dismissed_at"] is not None) == (alert["state"] == "auto_dismissed")
        assert all((alert[name] is not None) == (alert["state"] == "dismissed") for name in DISMISSAL)
        assert alert["created_at"] == before["created_at"]


# -- the store of alerts ----------------------------------------------------------------------------------------------


class World:
    """A twin with one repository, whose webhooks are looked at where they are recorded."""

    def __init__(self, home: Path, alerts: int = 60) -> None:
        self.twin = Twin(home, "http://localhost:1")
        self.repository: dict[str, Any] = {"id": 7, "name": "shop", "full_name": "acme/shop", "installed": False}
        self.dependabot = self.opened()
        self.dependabot.add(self.repository, world_alerts.alerts("acme/shop", alerts, 3, UNTIL))

    def opened(self) -> Dependabot:
        shapes = Shapes(self.twin)
        return Dependabot(self.twin, shapes, Webhooks(self.twin, "http://localhost:9/nobody"))

    def numbers(self, **query: str) -> list[int]:
        return [one["number"] for one in self.dependabot.page(self.repository, query)[0]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@given(
    size=st.integers(1, 40),
    sort=st.sampled_from(["created", "updated"]),
    direction=st.sampled_from(["asc", "desc"]),
    state=st.sampled_from(["open", "fixed,dismissed", "auto_dismissed,open,fixed,dismissed"]),
)
@settings(max_examples=40, deadline=None)
def test_pages_forward_and_back_hold_every_alert_once(world: World, size: int, sort: str, direction: str, state: str) -> None:
    query = {"per_page": str(size), "sort": sort, "direction": direction, "state": state}
    pages, links = [], {"next": query}
    while "next" in links:
        found, links = world.dependabot.page(world.repository, links["next"])
        pages.append([one["number"] for one in found])
        assert len(pages) <= 61, "a page leads to itself"
    seen = [number for page in pages for number in page]
    wanted = [one for one in world.dependabot.alerts(world.repository).values() if one["state"] in state.split(",")]
    key = "created_at" if sort == "created" else "updated_at"
    ordered = sorted(wanted, key=lambda one: (one[key], one["number"]), reverse=direction == "desc")
    assert seen == [one["number"] for one in ordered]
    back = []
    while "prev" in links:
        found, links = world.dependabot.page(world.repository, links["prev"])
        back.append([one["number"] for one in found])
        assert len(back) <= 61, "a page leads to itself"
    # The last page may be short, so that going back cuts elsewhere; nothing is left out all the same.
    assert [number for page in reversed(back) for number in page] == seen[: len(seen) - len(pages[-1])]


def test_filters_leave_what_they_name(world: World) -> None:
    shapes, _ = world.dependabot.page(world.repository, {"per_page": "100"})
    package = shapes[0]["dependency"]["package"]["name"]
    expectations = {
        "severity": ("high,critical", lambda one: one["security_advisory"]["severity"] in ("high", "critical")),
        "ecosystem": ("pip", lambda one: one["dependency"]["package"]["ecosystem"] == "pip"),
        "package": (package, lambda one: one["dependency"]["package"]["name"] == package),
        "manifest": ("requirements.txt", lambda one: one["dependency"]["manifest_path"] == "requirements.txt"),
        "scope": ("development", lambda one: one["dependency"]["scope"] == "development"),
    }
    for name, (value, meets) in expectations.items():
        expected = [one["number"] for one in shapes if meets(one)]
        assert 0 < len(expected) < 60 and world.numbers(per_page="100", **{name: value}) == expected


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ({"page": "1"}, 400),
        ({"after": "x", "before": "y"}, 422),
        ({"after": "Y3Vyc29yOnYyOlsxLDJd"}, 422),
        ({"before": "\x00"}, 422),
        ({"state": "open,snoozed"}, 422),
        ({"scope": "both"}, 422),
        ({"sort": "epss_percentage"}, 422),
        ({"direction": "up"}, 422),
        ({"per_page": "0"}, 422),
        ({"per_page": "many"}, 422),
        ({"has": "patch"}, 422),
    ],
)
def test_parameters_that_are_none_are_refused(world: World, query: dict[str, str], status: int) -> None:
    with pytest.raises(AlertError) as refused:
        world.dependabot.page(world.repository, query)
    assert refused.value.status == status


def test_a_page_holds_a_hundred_at_most(tmp_path: Path) -> None:
    large = World(tmp_path, 120)
    assert (len(large.numbers(per_page="1000")), len(large.numbers())) == (100, 30)


def test_the_world_goes_on_the_same_way_from_the_same_alerts(tmp_path: Path) -> None:
    """Everything that a service has to notice happens: new ones, fixes, people's dismissals, severities raised."""
    one, two = World(tmp_path / "one"), World(tmp_path / "two")
    happened = one.dependabot.change(one.repository, 60, 5)
    assert two.dependabot.change(two.repository, 60, 5) == happened
    actions = Counter(each["action"] for each in happened)
    assert {"created", "fixed", "dismissed", "severity_raised", "reopened", "reintroduced"} <= actions.keys()
    assert len(one.dependabot.alerts(one.repository)) == 60 + actions["created"]


def test_a_raised_severity_moves_no_alert(world: World) -> None:
    """GitHub: an alert's `updated_at` is when its state last changed, so that only the advisory shows this."""
    number = next(one for one in world.numbers(per_page="100", severity="low"))
    before = dict(world.dependabot.alert(world.repository, number))
    world.dependabot.raise_severity(world.repository, number)
    assert world.dependabot.alert(world.repository, number) == before
    assert number in world.numbers(per_page="100", severity="medium")


def test_alerts_are_kept_in_a_file_of_their_own(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.dependabot.save()
    assert "alerts" not in json.dumps(world.twin.data)
    again = world.opened()
    assert again.alerts(world.repository) == world.dependabot.alerts(world.repository)


@pytest.mark.parametrize("kind", sorted(world_alerts.SPOILED))
def test_every_kind_of_broken_alert_is_json_and_leaves_the_stored_one_alone(world: World, kind: str) -> None:
    alert = world.dependabot.alert(world.repository, 1)
    sound = world.dependabot.shape(world.repository, alert)
    alert["spoiled"] = kind
    spoiled = json.loads(json.dumps(world.dependabot.shape(world.repository, alert)))
    alert["spoiled"] = None
    assert spoiled != sound == world.dependabot.shape(world.repository, alert)


# -- lock files and versions ------------------------------------------------------------------------------------------

_versions = st.tuples(*[st.integers(0, 30)] * 3)


@given(_versions, _versions, st.sampled_from(["<", "<=", ">", ">=", "="]))
def test_a_version_is_in_a_range_as_its_numbers_are(left: tuple[int, ...], right: tuple[int, ...], sign: str) -> None:
    text, bound = (".".join(map(str, one)) for one in (left, right))
    expected = {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right, "=": left == right}[sign]
    assert npm.in_range(text, f"{sign} {bound}") == expected
    assert npm.in_range(text, f">= 0.0.0, {sign} {bound}") == expected


@pytest.mark.parametrize(("version", "conditions"), [("1.x", "< 2"), ("1.0.0", "^2.0"), ("1.0.0", ""), ("1.0.0", "< latest")])
def test_what_is_no_version_or_range_is_an_error(version: str, conditions: str) -> None:
    with pytest.raises(ValueError, match="not a version"):
        npm.in_range(version, conditions)


_json = st.recursive(
    st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(
    _json
    | st.fixed_dictionaries({"packages": st.dictionaries(st.sampled_from(["", "node_modules/a", "x/node_modules/@s/b"]), _json)})
)
@settings(max_examples=60, deadline=None)
def test_any_json_is_read_as_a_lock_file_without_an_error(lock: object) -> None:
    for name, versions in npm.locked_versions(lock).items():
        assert name in ("a", "@s/b") or "node_modules/" not in name
        assert all(isinstance(one, str) for one in versions)


def test_every_copy_of_a_package_counts() -> None:
    lock = {
        "packages": {
            "": {"version": "1.0.0"},
            "node_modules/twin-unpack": {"version": "1.4.3"},
            "node_modules/twin-tables/node_modules/twin-unpack": {"version": "1.4.2"},
            "packages/own": {"version": "1.0.0"},
        }
    }
    assert npm.locked_versions(lock) == {"twin-unpack": ["1.4.3", "1.4.2"]}


def test_tarballs_are_the_same_bytes_at_every_start() -> None:
    """Lock files in git name their hashes."""
    assert npm.integrity("twin-unpack", "1.4.2") == (
        "sha512-tkhNwpEFUobCl9JpK+frvTiuBgUs/EMZaSLNybyzYg8WAAjr6eYy+3n3kqdxbzkITrx+VFrJB5TUG2y36b5IKw=="
    )
