"""Rows as the small tables of a run's metadata."""

from collections.abc import Iterable, Mapping
from typing import Any

from dagster import MetadataValue, TableMetadataValue, TableRecord


def plain(row: Mapping[str, Any]) -> dict[str, str | int]:
    """A row as a table's record: numbers stay, everything else is text."""
    return {name: value if isinstance(value, int) else "" if value is None else str(value) for name, value in row.items()}


def table(rows: Iterable[Mapping[str, Any]]) -> TableMetadataValue:
    """A table of rows, each cell a number or text."""
    return MetadataValue.table(records=[TableRecord(plain(row)) for row in rows])
