"""Names and figures of the benchmarks agree in the registry, results.json and docs/performance.md. Nothing is measured here."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest

from benchmarks import results
from benchmarks.registry import FIGURES, GROUPS, group_of

FOUND = json.loads(results.RESULTS.read_text())
PAGE = results.PAGE.read_text()


def test_every_figure_is_measured_by_one_group_and_every_group_exists() -> None:
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(FIGURES)
    assert all(importlib.util.find_spec(f"benchmarks.{group}") for group in GROUPS)
    assert [group_of(name) for name in ("ingress_p99_ms", "idle")] == ["ingress", "idle"]
    with pytest.raises(KeyError, match="no benchmark 'speed'"):
        group_of("speed")


def test_results_hold_known_figures_once_and_the_page_names_the_missing_ones() -> None:
    names = [one["name"] for one in FOUND]
    assert names == [name for name in FIGURES if name in names]
    assert all(f"| `{name}` | not measured yet |" in PAGE for name in FIGURES if name not in names)


@pytest.mark.parametrize("one", FOUND, ids=lambda one: one["name"])
def test_a_result_says_what_it_is_and_under_which_conditions(one: dict[str, object]) -> None:
    assert set(one) == {"name", "value", "unit", "baseline", "ratio", "conditions"}
    assert one["unit"] == FIGURES[str(one["name"])].unit
    assert float(str(one["ratio"])) == pytest.approx(float(str(one["value"])) / float(str(one["baseline"])), rel=0.01)
    conditions = one["conditions"]
    assert isinstance(conditions, dict)
    assert {"cores", "memory_gb", "load_average_before", "postgresql", "postgresql_settings", "samples"} <= set(conditions)
    assert conditions["postgresql_settings"]["synchronous_commit"] == "on"


def test_the_page_shows_the_results_and_explains_each() -> None:
    assert results.with_table(PAGE, FOUND) == PAGE, "run `python -m benchmarks`: it writes the table"
    text = PAGE.split(results.END)[1]
    assert set(re.findall(r"`([a-z]+_[a-z0-9_]+)`", "".join(re.findall(r"\*\*.*?\*\*", text)))) == set(FIGURES)


def test_percentiles_are_values_that_were_seen() -> None:
    assert [results.percentile([4, 1, 3, 2], share) for share in (0.0, 0.5, 0.95, 1.0)] == [1, 2, 4, 4]
    with pytest.raises(ValueError, match="no samples"):
        results.percentile([], 0.5)
