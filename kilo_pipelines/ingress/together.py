"""Carrying together what arrives together: one look-up or one commit for every request that waits at the moment.

There is no window: whatever waits when the previous call returns goes with the next one, so a lone request never waits for
company. Does not belong here: what is looked up or stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import anyio

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")

# More in one transaction makes the first of them wait without making the commit cheaper.
MOST = 64


class Together(Generic[Asked, Answer]):
    """Calls `work` in a thread, one call at a time, with everything that waits; each caller gets its own answer or exception."""

    def __init__(self, work: Callable[[Sequence[Asked]], Sequence[Answer | Exception]]) -> None:
        self._work = work
        self._waiting: list[tuple[Asked, asyncio.Future[Answer]]] = []
        self._carrier: asyncio.Task[None] | None = None

    async def __call__(self, asked: Asked) -> Answer:
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, answer))
        if self._carrier is None:
            self._carrier = asyncio.create_task(self._carry())
        return await answer

    async def _carry(self) -> None:
        """Until nothing waits. Not tied to any request: one that is given up must not take its neighbours along."""
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
                answers: Sequence[Answer | Exception]
                try:
                    answers = await anyio.to_thread.run_sync(self._work, [asked for asked, _ in batch])
                except Exception as failure:  # noqa: BLE001  # it is every caller's answer
                    answers = [failure] * len(batch)
                for (_, waiting), answer in zip(batch, answers, strict=True):
                    if waiting.done():  # its client went away
                        continue
                    if isinstance(answer, Exception):
                        waiting.set_exception(answer)
                    else:
                        waiting.set_result(answer)
        finally:
            self._carrier = None
