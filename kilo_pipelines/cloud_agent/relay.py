"""Runs inside the sandbox: a loopback port in front of the one socket, then the agent's program.

Usage: relay.py PORT SOCKET -- PROGRAM ARGUMENTS...   Standard library only; it shares nothing with the platform.
The relay ends with the program and passes its exit status on.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading


def pump(source, target):
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def serve(listener, path):
    while True:
        client, _ = listener.accept()
        upstream = socket.socket(socket.AF_UNIX)
        try:
            upstream.connect(path)
        except OSError:
            client.close()
            continue
        for pair in ((client, upstream), (upstream, client)):
            threading.Thread(target=pump, args=pair, daemon=True).start()


if __name__ == "__main__":
    port, path = int(sys.argv[1]), sys.argv[2]
    listener = socket.create_server(("127.0.0.1", port))
    threading.Thread(target=serve, args=(listener, path), daemon=True).start()
    status = subprocess.run(sys.argv[4:], check=False).returncode
    os._exit(status if status >= 0 else 128 - status)
