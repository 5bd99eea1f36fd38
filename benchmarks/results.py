"""Rows, the conditions under which they were measured, results.json, raw samples, and the table in docs/performance.md."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import psycopg

from benchmarks.registry import FIGURES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results.json"
RAW = ROOT / "benchmarks" / "raw"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- figures: written by `python -m benchmarks` -->", "<!-- /figures -->"

# What decides about the speed of a commit; a benchmark with a cheaper commit than the platform's would be a lie.
PG_SETTINGS = ("synchronous_commit", "fsync", "full_page_writes", "wal_sync_method", "shared_buffers", "max_connections")


@dataclass(frozen=True)
class Row:
    """One measured figure beside its baseline of the same run."""

    name: str
    value: float
    baseline: float
    conditions: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As it stands in results.json; the ratio is value / baseline."""
        ratio = self.value / self.baseline if self.baseline else None
        return {
            "name": self.name,
            "value": _short(self.value),
            "unit": FIGURES[self.name].unit,
            "baseline": _short(self.baseline),
            "ratio": _short(ratio) if ratio is not None else None,
            "conditions": self.conditions,
        }


def _short(value: float) -> float:
    """Four significant digits: more would claim a precision that no run has."""
    return float(f"{value:.4g}") if math.isfinite(value) else value


def percentile(samples: Sequence[float], share: float) -> float:
    """Nearest rank: always a value that was seen. ValueError without samples."""
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def spread(samples: Sequence[float]) -> dict[str, float]:
    """What a distribution looks like, in a line."""
    marks = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    return {"n": len(samples), **{name: _short(percentile(samples, share)) for name, share in marks.items()}}


def median(samples: Sequence[float]) -> float:
    """The middle of a few rounds."""
    return statistics.median(samples)


class Machine:
    """The state of the host before a group starts, so that its own load isn't taken for a noisy neighbour's."""

    def __init__(self) -> None:
        self.at = datetime.now(UTC)
        self.load = os.getloadavg()
        self.busy = psutil.cpu_percent(interval=1.0)

    def conditions(self, database: dict[str, Any], **more: Any) -> dict[str, Any]:
        """The part of `conditions` that every row carries, and what the benchmark adds."""
        return {
            "at": self.at.isoformat(timespec="seconds"),
            "commit": _commit(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
            "python": platform.python_version(),
            "load_average_before": [round(one, 2) for one in self.load],
            "cpu_percent_before": self.busy,
            "load_average_after": [round(one, 2) for one in os.getloadavg()],  # its own load is in it
            **database,
            **more,
        }


def _commit() -> str:
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def database_conditions(url: str) -> dict[str, Any]:
    """Version and settings of the server; RuntimeError when its commits are not durable."""
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:

        def show(name: str) -> str:
            row = connection.execute(f"show {name}".encode()).fetchone()
            return str(row[0]) if row else ""

        settings = {name: show(name) for name in PG_SETTINGS}
        version = show("server_version")
    if settings["synchronous_commit"] != "on" or settings["fsync"] != "on":
        raise RuntimeError(f"commits are not durable here: {settings}; no figure of that would count")
    return {"postgresql": version, "postgresql_settings": settings}


def keep_raw(name: str, samples: Any) -> None:
    """Raw samples of the last run (not in git: they are large)."""
    RAW.mkdir(exist_ok=True)
    (RAW / f"{name}.json").write_text(json.dumps({"at": time.time(), "samples": samples}))


def load() -> list[dict[str, Any]]:
    """results.json."""
    found: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return found


def merge(rows: Sequence[Row]) -> None:
    """Replaces rows of the same names, keeps the others, in the order of the registry; the page follows."""
    known = {one["name"]: one for one in load()} | {row.name: row.plain() for row in rows}
    ordered = [known[name] for name in FIGURES if name in known]
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(json.dumps(ordered, indent=2) + "\n")
    partial.replace(RESULTS)
    if PAGE.exists():
        PAGE.write_text(with_table(PAGE.read_text(), ordered))


def with_table(page: str, found: Sequence[dict[str, Any]]) -> str:
    """The page with the table of these results between its marks."""
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n{table(found)}\n{END}{rest.split(END)[1]}"


def table(found: Sequence[dict[str, Any]]) -> str:
    """Results for people; every figure comes from results.json."""
    lines = ["| figure | value | our target | baseline | value : baseline |", "|---|---|---|---|---|"]
    for one in found:
        figure = FIGURES[one["name"]]
        ratio = f"{one['ratio']:g}" if one["ratio"] is not None else ""
        lines.append(
            f"| `{one['name']}` | {one['value']:g} {one['unit']} | {figure.target} | {one['baseline']:g} ({figure.baseline}) | {ratio} |"
        )
    measured = {one["name"] for one in found}
    lines += [
        f"| `{name}` | not measured yet | {figure.target} | | |" for name, figure in FIGURES.items() if name not in measured
    ]
    taken = sorted(
        {(one["conditions"]["at"], one["conditions"]["cores"], one["conditions"]["load_average_before"][0]) for one in found}
    )
    lines += ["", *(f"Measured {at} on {cores} cores, load before {load:g}." for at, cores, load in taken)]
    return "\n".join(lines)
