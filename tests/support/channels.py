"""A mail server, a Slack and a webhook receiver on this machine, which keep what they get and fail when told to."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Channels:
    """What arrived, and what goes wrong: `drop` (after DATA), `refuse` (the address), `grey` and `reject` (what came after DATA),
    `busy` (DATA itself), an HTTP status, or Slack's error code; the last two once.
    """

    def __init__(self) -> None:
        self.mails: list[str] = []
        self.posts: list[tuple[str, dict[str, str], bytes]] = []
        self.smtp_fault: str | None = None
        self.http_fault: int | None = None
        self.slack_error: str | None = None
        channels = self

        class Smtp(socketserver.StreamRequestHandler):
            def say(self, line: str) -> None:
                self.wfile.write(line.encode() + b"\r\n")

            def handle(self) -> None:
                self.say("220 test")
                while line := self.rfile.readline():
                    word = line.split()[0].upper() if line.split() else b""
                    if word == b"DATA" and channels.smtp_fault == "busy":
                        self.say("452 not now")
                    elif word == b"DATA":
                        self.say("354 go on")
                        body = b""
                        while (part := self.rfile.readline()) not in (b".\r\n", b""):
                            body += part
                        channels.mails.append(body.decode())
                        if channels.smtp_fault == "drop":
                            return
                        self.say({"grey": "451 later", "reject": "554 no"}.get(channels.smtp_fault or "", "250 taken"))
                    elif word == b"RCPT" and channels.smtp_fault == "refuse":
                        self.say("550 nobody")
                    elif word == b"QUIT":
                        self.say("221 bye")
                        return
                    else:
                        self.say("250 fine")

        class Http(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                channels.posts.append((self.path, dict(self.headers.items()), body))
                status, channels.http_fault = channels.http_fault or 200, None
                error, channels.slack_error = channels.slack_error, None
                self.send_response(status)
                if status == 429:
                    self.send_header("retry-after", "60")
                self.end_headers()
                self.wfile.write(json.dumps({"ok": error is None, "error": error, "ts": "1.2"}).encode())

            def log_message(self, *_words: Any) -> None:
                """Quiet."""

        self._servers = [socketserver.ThreadingTCPServer(("127.0.0.1", 0), Smtp), ThreadingHTTPServer(("127.0.0.1", 0), Http)]
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
        self.smtp = f"smtp://127.0.0.1:{self._servers[0].server_address[1]}"
        self.http = f"http://127.0.0.1:{self._servers[1].server_address[1]}"

    def stop(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


@contextmanager
def channels() -> Iterator[Channels]:
    """They, as long as the block lasts."""
    found = Channels()
    yield found
    found.stop()
