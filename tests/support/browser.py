"""A real browser, headless, told what to do by its own debugging protocol: what a person's browser sends, no client of ours does."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from tests.support.http import HTTP

# Without the last ones it looks up hosts of its maker at every start.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Page:
    """One page."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._number = 0

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol and its answer."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            answer: dict[str, Any] = json.loads(self._socket.recv(timeout=30))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def run(self, script: str) -> Any:
        """The value of an expression in the page; None while another page is being loaded."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        return answer["result"].get("value")

    def go(self, address: str, until: str) -> None:
        """Opens an address and waits until an expression holds."""
        self.call("Page.navigate", url=address)
        self.wait(until)

    def wait(self, until: str, seconds: float = 30) -> None:
        """Waits until an expression holds in the page."""
        deadline = time.monotonic() + seconds
        while not self.run(until):
            assert time.monotonic() < deadline, f"{until}: not on {self.run('location.href + document.body.innerText')}"
            time.sleep(0.1)


@contextmanager
def browser() -> Iterator[Page]:
    """Debian's Chromium with an empty profile; the test is skipped where there is none."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    profile = Path(tempfile.mkdtemp(prefix="kilo-c-"))
    process = subprocess.Popen(
        [program, *FLAGS, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        port = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 30
        while not port.is_file() or not port.read_text().strip():
            assert time.monotonic() < deadline and process.poll() is None, "the browser didn't start"
            time.sleep(0.1)
        address = f"http://127.0.0.1:{port.read_text().splitlines()[0]}/json"
        (page,) = [one for one in HTTP.get(address).json() if one["type"] == "page"]
        with connect(page["webSocketDebuggerUrl"], max_size=2**24) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(profile, ignore_errors=True)
