"""The one log format of every process of ours: a line an event, as JSON or for people, scrubbed, on stderr.

Nothing that comes from outside can end a line or steer a terminal: JSON is ASCII with everything else escaped, and in text control
characters are spelled out and what follows the first line is indented. Does not belong here: what is logged.
"""

from __future__ import annotations

import json
import logging
import logging.config
import re
import sys
import threading
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kilo_pipelines.core.redact import RedactingFilter, redact_line, redact_logs
from kilo_pipelines.telemetry import traces
from kilo_pipelines.telemetry.facts import about

if TYPE_CHECKING:
    from kilo_pipelines.settings import Settings

# Our own loggers and Dagster's follow KILO_LOG_LEVEL; other libraries say warnings and worse: at lower levels some of
# them write addresses and headers (httpx: every URL, and a webhook's address is its secret).
OURS = ("kilo_pipelines", "dagster")
# Longer texts are somebody's body or a loop; the beginning tells which.
TEXT_CHARS = 8_192
STACK_CHARS = 16_384
# Control characters, line and paragraph separators, and what turns the direction of writing round.
_UNSEEN = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """One line without anything that a terminal obeys: such characters as their escapes."""
    return _UNSEEN.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


class _Format(logging.Formatter):
    """What both formats take out of a record."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def event(self, record: logging.LogRecord) -> dict[str, Any]:
        """The event's fields in their order; texts are scrubbed and cut."""
        at = datetime.fromtimestamp(record.created, UTC)
        found: dict[str, Any] = {
            "time": f"{at:%Y-%m-%dT%H:%M:%S}.{at.microsecond:06d}Z",
            "level": record.levelname,
            "process": self._process,
            "pid": record.process,
            "logger": record.name,
        }
        run: dict[str, Any] = getattr(record, "dagster_meta", {})
        message = run.get("orig_message") or record.getMessage()
        found["message"] = _cut(redact_line(message), TEXT_CHARS)
        place = traces.ids()
        if place is not None:
            found["trace_id"], found["span_id"] = place
        found |= about()
        found |= {ours: run[theirs] for ours, theirs in (("run", "run_id"), ("op", "op_name")) if run.get(theirs)}
        if record.exc_info and record.exc_info[0] is not None:
            kind, value, trace = record.exc_info
            found["exception"] = {
                "type": f"{kind.__module__}.{kind.__qualname__}",
                "text": _cut(redact_line(str(value)), TEXT_CHARS),
                "stack": _cut(redact_line(self._stack(record, kind, value, trace)), STACK_CHARS),
            }
        return found

    def _stack(
        self,
        record: logging.LogRecord,
        kind: type[BaseException],
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> str:
        return record.exc_text or self.formatException((kind, value or kind(), trace))


class JsonFormat(_Format):
    """One JSON object a line, ASCII only."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(self.event(record), default=str)


class TextFormat(_Format):
    """For people: time, level, logger, message; whose work; a traceback indented below."""

    def format(self, record: logging.LogRecord) -> str:
        event = self.event(record)
        ids = " ".join(f"{name}={event[name]}" for name in ("owner", "item", "session", "delivery", "run") if name in event)
        line = f"{event['time']} {event['level']} {event['logger']} {visible(event['message'])}{f' [{ids}]' if ids else ''}"
        stack = event["exception"]["stack"].splitlines() if "exception" in event else []
        return "\n".join([line, *(f"    {visible(one)}" for one in stack)])


class _OneHandler(logging.config.DictConfigurator):
    """What libraries configure doesn't count: their handlers would write lines past the format and the scrubbing."""

    level = logging.INFO

    def configure(self) -> None:
        super().configure()
        _take_over(self.level)


class _Logger(logging.Logger):
    """Loggers made from now on. Those of the tree write through the root; one that stands alone (Dagster makes one for each run, with
    a coloured handler) keeps its handler, in the platform's format."""

    formatter: logging.Formatter

    def addHandler(self, hdlr: logging.Handler) -> None:
        if type(hdlr).__module__.partition(".")[0] not in ("logging", "coloredlogs"):
            super().addHandler(hdlr)  # no writer of lines: Dagster's, which keeps a run's messages in its database
        elif self.parent is None:
            hdlr.setFormatter(self.formatter)
            hdlr.setLevel(_OneHandler.level)
            hdlr.addFilter(RedactingFilter())
            super().addHandler(hdlr)


def _take_over(level: int) -> None:
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    for name in OURS:
        logging.getLogger(name).setLevel(level)


def set_up(settings: Settings, process: str) -> None:
    """Makes this process log in the platform's format from now on, whatever its libraries had set up or will.

    Called once at a process's start; `KILO_PROCESS` wins over the given name, since one program serves several queues.
    """
    name = settings.process or process
    handler = logging.StreamHandler(sys.stderr)
    formatter = JsonFormat(name) if settings.log_format == "json" else TextFormat(name)
    handler.setFormatter(formatter)
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(logging.WARNING)
    _OneHandler.level = logging.getLevelNamesMapping()[settings.log_level]
    _take_over(_OneHandler.level)
    _Logger.formatter = formatter
    logging.setLoggerClass(_Logger)
    # The standard library's own place for another configurator (logging.config, "dictConfigClass").
    logging.config.dictConfigClass = _OneHandler
    logging.captureWarnings(True)
    sys.excepthook = _uncaught
    threading.excepthook = lambda failure: _uncaught(failure.exc_type, failure.exc_value, failure.exc_traceback)
    redact_logs()


def _uncaught(kind: type[BaseException], value: BaseException | None, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    logging.getLogger("kilo_pipelines").critical("ended by an exception", exc_info=(kind, value or kind(), trace))


def set_up_child(settings: Settings) -> None:
    """The same in a process that is started by somebody else's program on the platform's behalf: known by `KILO_PROCESS`."""
    if settings.process is not None:
        set_up(settings, settings.process)


def readable(line: str) -> str:
    """A line of any process's log as the merged log shows it: ours in JSON for people, all without control characters."""
    if line.startswith('{"time": "'):
        try:
            event = json.loads(line)
            return visible(f"{event['level']} {event['logger']} {event['message']}{_failure(event)}")
        except (ValueError, KeyError, TypeError):
            pass  # somebody else's JSON
    return visible(line)


def _failure(event: dict[str, Any]) -> str:
    return f" ({event['exception']['type']}: {event['exception']['text']})" if "exception" in event else ""
