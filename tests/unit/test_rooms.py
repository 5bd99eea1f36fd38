"""What import rules can't say about the rooms (design: time and randomness are injected; a module says what it holds)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The wall clock, chance and the environment, by the name that reads them.
IMPURE = {
    "datetime.now",
    "datetime.utcnow",
    "datetime.today",
    "date.today",
    "time.time",
    "time.monotonic",
    "time.sleep",
    "os.environ",
    "os.getenv",
    "uuid4",
    "uuid.uuid4",
    "random",
    "secrets",
}
ALLOWED = {"core/clock.py": {"datetime.now"}}  # the one clock that is injected


def _modules(*rooms: str) -> Iterator[Path]:
    for room in rooms:
        yield from sorted((ROOT / room).rglob("*.py"))


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


@pytest.mark.parametrize(
    "path", list(_modules("kilo_pipelines/core", "kilo_pipelines/services")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_core_and_services_read_neither_clock_nor_chance_nor_environment(path: Path) -> None:
    allowed = ALLOWED.get(str(path.relative_to(ROOT / "kilo_pipelines")), set())
    assert set(_names(ast.parse(path.read_text()))) & IMPURE <= allowed


def test_every_module_says_what_it_holds() -> None:
    silent = [path for path in _modules("kilo_pipelines", "kilo_twin") if not ast.get_docstring(ast.parse(path.read_text()))]
    assert [str(path.relative_to(ROOT)) for path in silent if "migrations/versions" not in str(path)] == []
