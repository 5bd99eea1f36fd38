"""Carries TCP between network namespaces over a unix socket, as the internet carries GitHub to machines that don't see each other.

`python -m tests.support.bridge FROM TO`, each `tcp:PORT` (of the own loopback) or `unix:PATH`.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _main(source: str, target: str) -> None:
    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kind, _, where = target.partition(":")
        try:
            far = asyncio.open_connection("127.0.0.1", int(where)) if kind == "tcp" else asyncio.open_unix_connection(where)
            far_reader, far_writer = await far
        except OSError:
            writer.close()
            return
        await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))

    kind, _, where = source.partition(":")
    server = await (
        asyncio.start_server(carry, "127.0.0.1", int(where)) if kind == "tcp" else asyncio.start_unix_server(carry, where)
    )
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
