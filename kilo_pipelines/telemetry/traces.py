"""Spans from a delivery to its effects, over all processes that it passes.

A span's place is stored with the row whose work goes on elsewhere (`trace` of deliveries, work items, sessions and effects), and
whoever takes that row up opens its span below it. What a sender claims about traces in its headers is data and is not read.

Off without `KILO_OTLP_ENDPOINT`: then a span costs a dictionary, and nothing of OpenTelemetry is imported. On, spans go into a bounded
queue that a thread empties; a collector that is slow, away or full loses spans and nothing else.
"""

from __future__ import annotations

import atexit
import logging
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Unpack

from kilo_pipelines import __version__
from kilo_pipelines.telemetry.facts import TRACE_PATTERN, Facts, speak_of, speaking_of, told

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span as OtelSpan
    from opentelemetry.trace import Tracer

    from kilo_pipelines.settings import Settings

# A burst of 2,000 deliveries has some ten spans each within seconds; what is beyond is dropped, at about 1 KB a span.
QUEUE_SPANS = 8_192
BATCH_SPANS = 512
# A killed process loses this much at most.
EXPORT_EVERY_SECONDS = 1.0
# A collector that takes longer is away; the spans of the batch are lost.
EXPORT_SECONDS = 5.0
# A stop has two seconds for each process (cli/supervisor.py).
LAST_EXPORT_SECONDS = 1.0
# A collector that is away would fill the log with one line a batch.
COMPLAINT_SECONDS = 60.0
PREFIX = "kilo."

_tracer: Tracer | None = None
_armed: tuple[str, str] | None = None


class Span:
    """One piece of work, as its own code speaks of it."""

    def __init__(self, span: OtelSpan | None) -> None:
        self._span = span

    def set(self, **facts: Unpack[Facts]) -> None:
        """Adds what became known."""
        speak_of(facts)
        if self._span is not None:
            self._span.set_attributes({PREFIX + name: value for name, value in told(facts).items()})


def arm(settings: Settings, process: str) -> None:
    """Sends this process's spans to the collector of the settings from now on; once, and only with an address."""
    global _armed  # one switch a process, as failpoints have
    if settings.otlp_endpoint is None or _armed == (settings.otlp_endpoint, process):
        return
    import requests
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    session = requests.Session()
    session.trust_env = False  # no proxy and no .netrc of whoever started the platform
    exporter = OTLPSpanExporter(
        endpoint=f"{settings.otlp_endpoint}/v1/traces", headers=settings.otlp_headers(), timeout=EXPORT_SECONDS, session=session
    )
    logging.getLogger("opentelemetry.exporter.otlp.proto.http.trace_exporter").addFilter(_Seldom())
    processor = BatchSpanProcessor(
        exporter,
        max_queue_size=QUEUE_SPANS,
        max_export_batch_size=BATCH_SPANS,
        schedule_delay_millis=EXPORT_EVERY_SECONDS * 1000,
        export_timeout_millis=EXPORT_SECONDS * 1000,
    )
    send_to(processor, process)
    _armed = (settings.otlp_endpoint, process)
    atexit.register(_last_export, processor)


def send_to(processor: SpanProcessor, process: str) -> None:
    """Hands every span of this process to this processor from now on."""
    global _tracer
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON

    # Made without the library's own detectors and variables: what is told of this machine is told here.
    resource = Resource({"service.name": "kilo-pipelines", "service.version": __version__, "kilo.process": process})
    resource = resource.merge(Resource({"host.name": socket.gethostname()}))
    provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(processor)
    _tracer = provider.get_tracer("kilo_pipelines", __version__)


def disarm() -> None:
    """No spans any more."""
    global _tracer, _armed
    _tracer = _armed = None


def armed() -> bool:
    """Whether spans are made: for what would cost something to find out for them."""
    return _tracer is not None


def _last_export(processor: Any) -> None:
    processor._batch_processor.shutdown(timeout_millis=LAST_EXPORT_SECONDS * 1000)


class _Seldom(logging.Filter):
    """One complaint a minute."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + COMPLAINT_SECONDS
        return True


def _context(parent: str | None) -> Any:
    """A stored place as OpenTelemetry's context; an empty one, hence a new trace, for None and for what isn't of our making."""
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    if parent is None or not re.match(TRACE_PATTERN, parent):
        return Context()
    _, trace, span, flags = parent.split("-")
    place = SpanContext(int(trace, 16), int(span, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))
    return set_span_in_context(NonRecordingSpan(place), Context())


def here() -> str | None:
    """The present span's place, to be stored with a row whose work goes on elsewhere; None without one."""
    if _tracer is None:
        return None
    from opentelemetry.trace import get_current_span

    place = get_current_span().get_span_context()
    # Of the flags only `sampled` is of version 00.
    return f"00-{place.trace_id:032x}-{place.span_id:016x}-{place.trace_flags & 1:02x}" if place.is_valid else None


def ids() -> tuple[str, str] | None:
    """Trace and span id of now, for log lines."""
    place = here()
    return (place[3:35], place[36:52]) if place else None


@contextmanager
def span(name: str, *, since_ns: int | None = None, **facts: Unpack[Facts]) -> Iterator[Span]:
    """A piece of work below the one around it (a new trace where there is none); its log lines carry its ids.

    `since_ns` is when it began, in nanoseconds of the epoch, where that is known only afterwards. What is raised within ends the span
    as failed with the exception's type: its text may be anybody's.
    """
    if _tracer is None:
        with speaking_of(facts):
            yield Span(None)
        return
    with _recorded(name, None, since_ns, facts) as found:
        yield found


@contextmanager
def following(parent: str | None, name: str, **facts: Unpack[Facts]) -> Iterator[Span]:
    """The same below a stored place: work that another process began."""
    if _tracer is None:
        with speaking_of(facts):
            yield Span(None)
        return
    with _recorded(name, _context(parent), None, facts) as found:
        yield found


@contextmanager
def _recorded(name: str, context: Any, since_ns: int | None, facts: Facts) -> Iterator[Span]:
    from opentelemetry.trace import Status, StatusCode

    assert _tracer is not None  # noqa: S101  # asked by the callers
    attributes = {PREFIX + key: value for key, value in told(facts).items()}
    with (
        speaking_of(facts),
        _tracer.start_as_current_span(
            name, context, attributes=attributes, start_time=since_ns, record_exception=False, set_status_on_exception=False
        ) as found,
    ):
        try:
            yield Span(found)
        except BaseException as failure:
            found.set_status(Status(StatusCode.ERROR))
            found.set_attribute("error.type", type(failure).__name__)
            raise


def past(name: str, start: datetime | int, end: datetime | int, *, parent: str | None = None, **facts: Unpack[Facts]) -> None:
    """A piece of work that is over already, below a stored place or else the present span.

    Times are UTC or nanoseconds of the epoch.
    """
    if _tracer is not None:
        attributes = {PREFIX + key: value for key, value in told(facts).items()}
        begun, over = (at if isinstance(at, int) else int(at.timestamp() * 1e9) for at in (start, end))
        context = _context(parent) if parent is not None else None
        _tracer.start_span(name, context, attributes=attributes, start_time=min(begun, over)).end(over)
