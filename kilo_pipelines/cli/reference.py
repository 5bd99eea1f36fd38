"""The tables of the documentation that come from the code: `python -m kilo_pipelines.cli.reference` (or `make docs`) writes them.

A table stands between two markers, `<!-- generated: NAME -->` and `<!-- end -->`; what is written around them stays. A test fails when a
page is not as this would write it. Does not belong here: the words, which are the descriptions in the models themselves.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from kilo_pipelines.core.reasons import MEANING
from kilo_pipelines.services.code_review.config import CodeReviewConfig
from kilo_pipelines.services.security.config import SecurityConfig
from kilo_pipelines.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
# What a default is that depends on who asks.
BY_USER = {"home": "`~/.kilo-pipelines`"}


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _default(name: str, field: FieldInfo) -> str:
    if name in BY_USER:
        return BY_USER[name]
    value = field.default
    if value is None or value == [] or value is PydanticUndefined:
        return "none"
    return f"`{json.dumps(value) if not isinstance(value, str) else value}`"


def _alternatives(kind: Any) -> Iterator[Any]:
    if get_origin(kind) is Literal:
        yield from get_args(kind)
    elif get_origin(kind) in (list, Union) or type(kind).__name__ == "UnionType":
        for one in get_args(kind):
            yield from _alternatives(one)


def _values(field: FieldInfo) -> str:
    """The words that are allowed, or the bounds of a number."""
    words = [f"`{one}`" for one in _alternatives(field.annotation)]
    if words:
        return ", ".join(words)
    bounds = {name: getattr(one, name) for one in field.metadata for name in ("gt", "ge", "lt", "le") if hasattr(one, name)}
    signs = {"gt": "over", "ge": "at least", "lt": "under", "le": "at most"}
    return " and ".join(f"{signs[name]} {bound}" for name, bound in bounds.items() if bound is not None)


def settings_table(model: type[BaseModel], named: Callable[[str], str]) -> list[str]:
    """One row a field."""
    rows = [
        f"| `{named(name)}` | {_default(name, field)} | {_values(field)} | {_cell(field.description or '')} |"
        for name, field in model.model_fields.items()
    ]
    return ["| setting | default | values | meaning |", "|---|---|---|---|", *rows]


def reasons_table() -> list[str]:
    """One row a reason code, in the order of the list."""
    rows = [f"| `{reason}` | {_cell(meaning)} | {_cell(remedy)} |" for reason, (meaning, remedy) in MEANING.items()]
    return ["| code | meaning | what to do |", "|---|---|---|", *rows]


# By page and marker.
TABLES: dict[tuple[str, str], Callable[[], list[str]]] = {
    ("docs/settings.md", "settings"): lambda: settings_table(Settings, lambda name: f"KILO_{name.upper()}"),
    ("docs/services/code-review.md", "owner settings"): lambda: settings_table(CodeReviewConfig, str),
    ("docs/services/security.md", "owner settings"): lambda: settings_table(SecurityConfig, str),
    ("docs/reasons.md", "reasons"): reasons_table,
}


def written(page: str, text: str) -> str:
    """The page with its tables as the code has them; ValueError when a marker is missing or there twice."""
    for (where, name), table in TABLES.items():
        if where == page:
            begin, end = f"<!-- generated: {name} -->", "<!-- end -->"
            pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
            if len(pattern.findall(text)) != 1:
                raise ValueError(f"{page}: `{begin}` … `{end}` must stand there once")
            lines = "\n".join([begin, *table(), end])
            text = pattern.sub(lines.replace("\\", r"\\"), text)
    return text


def pages() -> list[str]:
    """Every page with generated tables."""
    return sorted({page for page, _ in TABLES})


def main() -> None:
    """Writes every page that differs, and says which."""
    for page in pages():
        path = ROOT / page
        before = path.read_text()
        after = written(page, before)
        if after != before:
            path.write_text(after)
            sys.stdout.write(f"{page}\n")


if __name__ == "__main__":
    main()
