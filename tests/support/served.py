"""The real admin application over HTTP in a thread of this process, for commands that speak to it."""

from __future__ import annotations

import gc
import os
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from click.testing import CliRunner, Result

from kilo_pipelines.cli.main import main
from kilo_pipelines.cli.world import free_ports
from kilo_pipelines.ingress.application import Ingress, admin_application
from tests.conftest import Database
from tests.support.ingress import OneSecret


@contextmanager
def served(database: Database) -> Iterator[str]:
    """The address of an admin listener over a database, under its clock, for as long as the block lasts."""
    port = free_ports(1)[0]
    application = admin_application(
        Ingress(database.store, OneSecret(None), frozenset({"localhost", "127.0.0.1"}), database.clock)
    )
    server = uvicorn.Server(uvicorn.Config(application, host="127.0.0.1", port=port, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive() and time.monotonic() < until, "the listener didn't start"
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


def alone(monkeypatch: pytest.MonkeyPatch, home: Path, **settings: str) -> None:
    """An environment whose only settings are these, with a home of its own."""
    for name in [one for one in os.environ if one.startswith("KILO_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KILO_HOME", str(home))
    for name, value in settings.items():
        monkeypatch.setenv(f"KILO_{name.upper()}", value)


def invoked(*arguments: str) -> Result:
    """A command in this process; connections, which end with a process of their own, are collected here."""
    gc.freeze()  # of all that was there before nothing is the command's: looking through it takes a fifth of a second
    try:
        done = CliRunner().invoke(main, list(arguments))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
    finally:
        gc.unfreeze()
    return done
