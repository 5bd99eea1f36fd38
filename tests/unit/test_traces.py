"""Spans: what may stand in them, whose child they are, and that nothing about them can hold up or fail the work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kilo_pipelines.settings import Settings
from kilo_pipelines.telemetry import traces
from kilo_pipelines.telemetry.facts import _SHAPES, Facts, told

CANARY = "canary-of-a-title-4b"


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    found = InMemorySpanExporter()
    traces.send_to(SimpleSpanProcessor(found), "test")
    yield found
    traces.disarm()


def _by_name(spans: InMemorySpanExporter) -> dict[str, Any]:
    return {one.name: one for one in spans.get_finished_spans()}


def test_a_stored_place_joins_what_two_processes_did(spans: InMemorySpanExporter) -> None:
    with traces.span("delivery"), traces.span("store"):
        place = traces.here()
    with traces.following(place, "admit"), traces.span("open"):
        assert (traces.here() or "")[3:35] == (place or "")[3:35]
    found = _by_name(spans)
    assert len({one.context.trace_id for one in found.values()}) == 1
    assert found["store"].parent.span_id == found["delivery"].context.span_id
    assert found["admit"].parent.span_id == found["store"].context.span_id
    assert found["open"].parent.span_id == found["admit"].context.span_id


@pytest.mark.parametrize("place", [None, "", "00-" + "0" * 31 + "-x-01", f"01-{'a' * 32}-{'b' * 16}-01", CANARY])
def test_what_is_no_place_of_ours_begins_a_new_trace(spans: InMemorySpanExporter, place: str | None) -> None:
    with traces.span("other"), traces.following(place, "new"):
        pass
    assert _by_name(spans)["new"].parent is None


@given(st.dictionaries(st.sampled_from([*_SHAPES, "title", "prompt", "url"]), st.text() | st.integers() | st.uuids() | st.none()))
def test_only_ids_words_and_numbers_by_a_known_name_are_told(facts: dict[str, Any]) -> None:
    for name, value in told(facts).items():
        assert name in _SHAPES and (isinstance(value, int) or (value.isascii() and len(value) <= 64 and " " not in value))


def test_every_name_has_a_shape() -> None:
    assert set(Facts.__annotations__) == set(_SHAPES)


def test_a_failure_tells_its_type_and_no_text(spans: InMemorySpanExporter) -> None:
    with pytest.raises(ValueError, match=CANARY), traces.span("x", reason=f"not a word: {CANARY}"):
        raise ValueError(CANARY)
    found = _by_name(spans)["x"]
    assert found.attributes == {"error.type": "ValueError"} and found.status.description is None and not found.events
    assert CANARY not in found.to_json()


def test_a_wait_that_is_over_is_told_with_its_own_times(spans: InMemorySpanExporter) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    with traces.span("claim"):
        place = traces.here()
    traces.past("wait", start, start + timedelta(seconds=3), parent=place, attempt=1)
    found = _by_name(spans)
    assert found["wait"].end_time - found["wait"].start_time == 3_000_000_000
    assert found["wait"].parent.span_id == found["claim"].context.span_id


def test_off_there_is_no_place_and_nothing_of_opentelemetry_is_loaded() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from kilo_pipelines.telemetry import traces, logs\n"
        "with traces.span('x', owner='y') as s: s.set(item=None); assert traces.here() is None\n"
        "assert not [one for one in sys.modules if one.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_collector_that_is_away_costs_the_work_nothing(tmp_path: Path) -> None:
    """Far more spans than the queue holds, to an address where nobody listens: none waits, none raises."""
    traces.arm(Settings(home=tmp_path, otlp_endpoint="http://127.0.0.1:9"), "test")
    try:
        began = time.monotonic()
        for _ in range(traces.QUEUE_SPANS + 2_000):
            with traces.span("x", item=uuid4()):
                pass
        assert time.monotonic() - began < 10
    finally:
        traces.disarm()
