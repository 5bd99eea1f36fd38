"""Plots in the metadata: every count is seen, lengths keep their order, and no label leaves its line."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kilo_pipelines.ops.tables import BAR, LABEL, bars


@given(st.dictionaries(st.text(max_size=60), st.integers(0, 10**6), max_size=6))
def test_every_count_has_its_bar_on_its_own_line(counts: dict[str, int]) -> None:
    told = bars(counts).md_str or ""
    lines = told.split("\n")
    assert lines[0] == lines[-1] == "```" and told.count("```") == 2
    shown = lines[1:-1] if counts else []
    assert len(shown) == len(counts)
    for line, count in zip(shown, counts.values(), strict=True):
        assert line.endswith(f" {count}") and len(line) == LABEL + BAR + 2 + len(str(count))
        assert (line.count("█") > 0) == (count > 0) and line.count("█") <= BAR


def test_the_longest_bar_is_the_largest_count() -> None:
    lengths = [line.count("█") for line in (bars({"a": 200, "b": 100, "c": 1, "d": 0}).md_str or "").split("\n")[1:-1]]
    assert lengths == [BAR, BAR // 2, 1, 0]
