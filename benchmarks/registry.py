"""The figures by name: unit, what is better, our own target, and which group measures them together.

Plain data, so that a test can hold it against results.json and docs/performance.md without starting anything.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One figure; `target` is the absolute goal on two quiet cores, in words because some have more than one part."""

    unit: str
    target: str
    baseline: str


# Group -> its module in this package; a group starts its processes once and yields all its figures.
GROUPS: dict[str, tuple[str, ...]] = {
    "ingress": ("ingress_rps", "ingress_p99_ms"),
    "delivery": ("delivery_to_op_p50_s", "delivery_to_op_p95_s", "delivery_to_op_p95_s_at_8"),
    "runs": ("runs_per_minute", "cpu_s_per_run", "burst_2000_s"),
    "reviews": ("reviews_20_launch_s",),
    "fairness": ("fairness_wait_ratio",),
    "idle": ("idle_core_percent", "idle_core_percent_2_shards", "ingress_rss_mb"),
    "traces": ("ingress_traced_rps", "span_off_us"),
    "security": (
        "alerts_10000_upsert_s",
        "resync_10000_rows_written",
        "sla_1000000_s",
        "sla_1000000_mb",
        "sync_1000_owners_runs",
    ),
}

FIGURES: dict[str, Figure] = {
    "ingress_rps": Figure("req/s", ">= 2,500, >= 1.4 x direct insert, >= 0.5 x HMAC alone", "direct insert, req/s"),
    "ingress_p99_ms": Figure("ms", "<= 30", "direct insert, p99"),
    "delivery_to_op_p50_s": Figure("s", "<= 0.25", "stock Dagster, p50 at 2/s"),
    "delivery_to_op_p95_s": Figure("s", "<= 0.5", "stock Dagster, p95 at 2/s"),
    "delivery_to_op_p95_s_at_8": Figure("s", "<= 1", "stock Dagster, p95 at 8/s"),
    "runs_per_minute": Figure("runs/min", ">= 700", "stock Dagster"),
    "cpu_s_per_run": Figure("CPU-s", "<= 0.15", "stock Dagster"),
    "burst_2000_s": Figure("s", "<= 15", "stock Dagster, extrapolated from its runs a minute"),
    "reviews_20_launch_s": Figure("s", "<= 2", "stock Dagster, 20 rows at once to the last op"),
    "fairness_wait_ratio": Figure(
        "p95/p95", "the others' p95 rises by <= max(10 %, 0.3 s)", "1: the same owners without the hog"
    ),
    "idle_core_percent": Figure("% of a core", "<= 20", "stock daemon and its code server with one polling sensor"),
    "idle_core_percent_2_shards": Figure("% of a core", "<= 10", "stock daemon and its code server with one polling sensor"),
    "ingress_rss_mb": Figure("MB", "<= 120", "HMAC-only application under the same server"),
    "ingress_traced_rps": Figure("req/s", ">= 0.85 x without traces", "the same ingress without traces, req/s"),
    "span_off_us": Figure("us", "<= 5: three of them are 1 % of a webhook", "a block that does nothing"),
    "alerts_10000_upsert_s": Figure("s", "<= 5", "the alerts' JSON copied into one plain column, a page a commit"),
    "resync_10000_rows_written": Figure("rows", "0", "rows of the first sync"),
    "sla_1000000_s": Figure("s", "<= 30", "PostgreSQL's own pass over findings and deadlines"),
    "sla_1000000_mb": Figure("MB", "<= 300", "the goal"),
    "sync_1000_owners_runs": Figure("runs", "<= 20", "one run an owner"),
}


def group_of(name: str) -> str:
    """The group that measures a figure; a group's own name is taken too. KeyError for anything else."""
    if name in GROUPS:
        return name
    return next((group for group, names in GROUPS.items() if name in names), "") or _unknown(name)


def _unknown(name: str) -> str:
    raise KeyError(f"no benchmark {name!r}; there are {', '.join(FIGURES)} and the groups {', '.join(GROUPS)}")
