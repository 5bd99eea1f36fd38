"""A collector that takes every batch of spans and keeps none: `python -m benchmarks.otlp_sink PORT`."""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Sink(BaseHTTPRequestHandler):
    """Reads and answers."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """For the harness, which waits for it."""
        self._answer()

    def do_POST(self) -> None:
        """One batch."""
        self.rfile.read(int(self.headers["content-length"]))
        self._answer()

    def _answer(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Sink).serve_forever()
