"""The threat model names files and tests that exist, and says of every rule what holds it or that it is open."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "threat-model.md").read_text()
ROWS = {int(row[1]): row[0] for row in re.finditer(r"^\| (\d+) \|.*$", PAGE, re.MULTILINE)}


@cache
def names_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {one.name for one in ast.walk(tree) if isinstance(one, ast.FunctionDef) and one.name.startswith("test_")}


def test_every_rule_has_its_row() -> None:
    assert sorted(ROWS) == list(range(1, 26))


@pytest.mark.parametrize("number", sorted(ROWS))
def test_what_holds_a_rule_and_what_attacks_it_exists(number: int) -> None:
    files = re.findall(r"`(kilo_[a-z_/]+(?:\.py)?)`", ROWS[number])
    attacks = re.findall(r"`(tests/[a-z_/]+\.py)::(test_\w+)`", ROWS[number])
    assert files and attacks
    assert [one for one in files if not (ROOT / one).exists()] == []
    assert [f"{path}::{name}" for path, name in attacks if name not in names_in(path)] == []


def test_every_test_that_the_page_names_is_read_by_this_one() -> None:
    """A name in another form would be checked by nobody."""
    everywhere = re.findall(r"(tests/[a-z_/]+\.py)::(test_\w+)", PAGE)
    assert len(everywhere) == PAGE.count("::") and all(name in names_in(path) for path, name in everywhere)


def test_links_of_the_page_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert links and [one for one in links if not (ROOT / "docs" / one).exists()] == []
