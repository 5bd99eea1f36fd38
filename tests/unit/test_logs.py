"""A log line is one line, tells no secret and obeys no terminal, whichever library wrote it and whatever it was given."""

from __future__ import annotations

import json
import logging
import logging.config
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilo_pipelines.core.redact import BLACK, redact_line
from kilo_pipelines.settings import Settings, SettingsError, write_secret
from kilo_pipelines.telemetry import logs, traces

CANARY = "Zx9canaryZx9canaryZx9"


class Stderr:
    """What the process has written to stderr."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys, self._seen = capsys, ""

    def getvalue(self) -> str:
        self._seen += self._capsys.readouterr().err
        return self._seen


@pytest.fixture
def stderr(capsys: pytest.CaptureFixture[str]) -> Iterator[Stderr]:
    """The test run's own logging stands again afterwards."""
    root, loggers = logging.root, list(logging.root.manager.loggerDict)
    before = [(one, one.handlers[:], one.level, one.propagate) for one in [root, *map(logging.getLogger, loggers)]]
    kept = (logging.config.dictConfigClass, logging.getLoggerClass(), sys.excepthook, threading.excepthook)
    yield Stderr(capsys)
    logging.config.dictConfigClass, loggers_class, sys.excepthook, threading.excepthook = kept
    logging.setLoggerClass(loggers_class)
    logging.captureWarnings(False)
    for one, handlers, level, propagate in before:
        one.handlers[:], one.propagate = handlers, propagate
        one.setLevel(level)


def _settings(tmp_path: Path, **more: object) -> Settings:
    return Settings(home=tmp_path, log_format="json", **more)  # type: ignore[arg-type]


def _events(stream: Stderr) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_carries_its_process_its_time_and_whose_work_it_was(stderr: Stderr, tmp_path: Path) -> None:
    logs.set_up(_settings(tmp_path, process="worker-dispatch"), "worker")
    owner, item = uuid4(), uuid4()
    with traces.span("x", owner=owner, service="code_review") as span:
        span.set(item=item, outcome="claimed")
        logging.getLogger("kilo_pipelines.x").info("n %d", 1)
    logging.getLogger("kilo_pipelines.x").info("outside")
    inside, outside = _events(stderr)
    assert (inside["process"], inside["level"], inside["message"]) == ("worker-dispatch", "INFO", "n 1")
    assert str(inside["time"]).endswith("Z") and len(str(inside["time"])) == 27
    assert (inside["owner"], inside["item"], inside["service"]) == (str(owner), str(item), "code_review")
    assert "outcome" not in inside and not {"owner", "item"} & set(outside)


@pytest.mark.parametrize("form", ["json", "text"])
def test_secrets_in_arguments_headers_and_exceptions_leave_no_process(form: str, stderr: Stderr, tmp_path: Path) -> None:
    """The canary has no shape of its own: the names beside it give it away."""
    logs.set_up(Settings(home=tmp_path, log_format=form), "t")  # type: ignore[arg-type]
    log = logging.getLogger("kilo_pipelines.x")
    log.warning("asked with %s", {"Authorization": f"Bearer {CANARY}", "Cookie": f"a=1; kilo={CANARY}"})
    log.warning("headers: %r", [(b"x-hub-signature-256", CANARY.encode()), (b"x-callback-token", CANARY.encode())])
    log.warning("connecting to redis+socket://:%s@/tmp/x and postgresql://kilo:%s@db/kilo", CANARY, CANARY)
    try:
        try:
            raise RuntimeError("KILO_PASSWORD", f"password={CANARY}")
        except RuntimeError as failure:
            raise ValueError(f"api_key: {CANARY}\nat github ghs_{'a1' * 20}") from failure
    except ValueError:
        log.exception("failed with token ghp_%s", "b2" * 20)
    shown = stderr.getvalue()
    assert CANARY not in shown and "a1a1" not in shown and "b2b2" not in shown and shown.count(BLACK) >= 8
    assert "ValueError" in shown and "RuntimeError" in shown


@given(st.text(), st.text())
def test_no_text_ends_a_line_or_steers_a_terminal(message: str, failure: str) -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, message, None, None)
    try:
        raise ValueError(failure)
    except ValueError:
        record.exc_info = sys.exc_info()
    (line,) = logs.JsonFormat("t").format(record).splitlines()
    assert line.isascii() and line.isprintable() and "message" in json.loads(line)
    first, *rest = logs.TextFormat("t").format(record).split("\n")
    assert all(logs.visible(one) == one for one in (first, *rest)) and all(one.startswith("    ") for one in rest)
    shown = logs.visible(message)
    assert "\n" not in shown and "\x1b" not in shown and isinstance(shown.encode(), bytes)


def test_a_library_that_brings_a_handler_or_a_configuration_writes_in_the_same_format(stderr: Stderr, tmp_path: Path) -> None:
    logging.getLogger("of.before").addHandler(logging.StreamHandler(sys.stderr))
    logs.set_up(_settings(tmp_path, log_level="WARNING"), "t")
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "handlers": {"h": {"class": "logging.StreamHandler", "stream": "ext://sys.stderr"}},
            "loggers": {"dagster": {"handlers": ["h"], "level": "DEBUG"}},
        }
    )
    alone = logging.getLoggerClass()("dagster", level=logging.DEBUG)  # as Dagster makes one for each run
    alone.addHandler(logging.StreamHandler(sys.stderr))
    for logger in (logging.getLogger("of.before"), logging.getLogger("dagster.daemon"), alone):
        logger.info("too little")
        logger.warning("enough, with password=%s", CANARY)
    assert [one["level"] for one in _events(stderr)] == ["WARNING"] * 3 and CANARY not in stderr.getvalue()


def test_a_broken_format_of_a_caller_ends_nothing(stderr: Stderr, tmp_path: Path) -> None:
    logs.set_up(_settings(tmp_path), "t")
    logging.getLogger("kilo_pipelines.x").info("%d of %s", "three")
    assert [one["message"] for one in _events(stderr)] == ["%d of %s"]


def test_what_nobody_caught_is_told_in_the_format_too(stderr: Stderr, tmp_path: Path) -> None:
    logs.set_up(_settings(tmp_path), "t")
    thread = threading.Thread(target=lambda: 1 // 0)
    thread.start()
    thread.join()
    (event,) = _events(stderr)
    assert event["exception"]["type"] == "builtins.ZeroDivisionError"  # type: ignore[index]


def test_the_merged_log_is_for_people() -> None:
    line = json.dumps(
        {"time": "2026-01-01T00:00:00.000000Z", "level": "INFO", "logger": "a.b", "message": "one\ntwo \x1b[31mred"}
    )
    assert logs.readable(line) == "INFO a.b one\\ntwo \\x1b[31mred"
    assert logs.readable('{"time": "of another program"}') == '{"time": "of another program"}'
    assert logs.readable("plain \x1b]0;title\x07 line") == "plain \\x1b]0;title\\x07 line"


def test_words_that_only_name_a_secret_stay() -> None:
    for text in (
        "webhook_secret_missing: refused",
        "the password of the mail server",
        "password reset: done",
        "x-request-id: 77",
    ):
        assert redact_line(text) == text


@pytest.mark.parametrize(
    ("endpoint", "fits"),
    [
        ("https://collector.example:4318", True),
        ("http://127.0.0.1:4318/", True),
        ("http://localhost:4318", True),
        ("http://collector.example:4318", False),
        ("https://user:pw@collector.example", False),
        ("https://collector.example/?token=x", False),
        ("ftp://localhost", False),
    ],
)
def test_traces_leave_this_machine_over_https_only_and_the_address_holds_no_secret(
    endpoint: str, fits: bool, tmp_path: Path
) -> None:
    if fits:
        assert Settings(home=tmp_path, otlp_endpoint=endpoint).otlp_endpoint == endpoint.rstrip("/")
    else:
        with pytest.raises(ValueError, match="otlp_endpoint"):
            Settings(home=tmp_path, otlp_endpoint=endpoint)


def test_a_line_of_the_headers_file_that_is_none_is_named_by_its_number_alone(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    write_secret(settings.otlp_headers_file, f"X-Token: {CANARY}\n\n")
    assert settings.otlp_headers() == {"x-token": CANARY}
    write_secret(settings.otlp_headers_file, f"a: b\n{CANARY}\n")
    with pytest.raises(SettingsError, match="line 2") as refused:
        settings.otlp_headers()
    assert CANARY not in str(refused.value)
