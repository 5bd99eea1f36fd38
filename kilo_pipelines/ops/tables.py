"""Rows as the small tables and plots of a run's metadata."""

from collections.abc import Iterable, Mapping
from typing import Any

from dagster import MarkdownMetadataValue, MetadataValue, TableMetadataValue, TableRecord

from kilo_pipelines.core.text import one_line

# Columns of a plot's labels and bars: with its number a line fits the metadata column of the UI.
LABEL, BAR = 24, 40


def plain(row: Mapping[str, Any]) -> dict[str, str | int]:
    """A row as a table's record: numbers stay, everything else is text."""
    return {name: value if isinstance(value, int) else "" if value is None else str(value) for name, value in row.items()}


def table(rows: Iterable[Mapping[str, Any]]) -> TableMetadataValue:
    """A table of rows, each cell a number or text."""
    return MetadataValue.table(records=[TableRecord(plain(row)) for row in rows])


def bars(counts: Mapping[str, int]) -> MarkdownMetadataValue:
    """A plot in text, a bar for each count, the longest one `BAR` wide: the UI shows no picture of ours, and only one number at a time.

    Labels may be outside text: a fence of backticks, which no label holds, keeps them plain.
    """
    most = max(counts.values(), default=0)
    lines = []
    for label, count in counts.items():
        length = -(-count * BAR // most) if most else 0  # what is there is seen: rounded up
        lines.append(f"{one_line(label, LABEL).replace('`', ' '):<{LABEL}} {'█' * length:<{BAR}} {count}")
    return MetadataValue.md("```\n" + "\n".join(lines) + "\n```")
