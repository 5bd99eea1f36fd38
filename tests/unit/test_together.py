"""What is carried together is answered one by one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from kilo_pipelines.ingress.together import MOST, Together


class Work:
    """Notes its calls; the first one lasts until it is let go. Odd numbers are refused."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.go = threading.Event()
        self.at_once = 0

    def __call__(self, asked: Sequence[int]) -> list[str | Exception]:
        self.at_once += 1
        assert self.at_once == 1
        self.calls.append(list(asked))
        assert self.go.wait(10)
        self.at_once -= 1
        if 666 in asked:
            raise RuntimeError("the database went away")
        return [ValueError(f"odd: {one}") if one % 2 else str(one) for one in asked]


def test_what_waits_goes_with_the_next_call_and_each_gets_its_own_answer() -> None:
    async def scene() -> None:
        work = Work()
        together = Together(work)
        first = asyncio.create_task(together(0))
        while not work.calls:
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(together(number)) for number in range(1, 5)]
        await asyncio.sleep(0.01)
        assert not first.done()  # nobody is answered before the call that carries it returns
        work.go.set()
        answers = await asyncio.gather(first, *others, return_exceptions=True)
        assert [str(one) for one in answers] == ["0", "odd: 1", "2", "odd: 3", "4"]
        assert work.calls == [[0], [1, 2, 3, 4]]

    asyncio.run(scene())


def test_who_goes_away_takes_nobody_along() -> None:
    async def scene() -> None:
        work = Work()
        together = Together(work)
        tasks = [asyncio.create_task(together(number)) for number in (0, 2, 4)]
        while not work.calls:
            await asyncio.sleep(0.001)
        tasks[0].cancel()
        tasks[1].cancel()
        await asyncio.sleep(0)
        work.go.set()
        assert await tasks[2] == "4"
        assert await together(6) == "6"

    asyncio.run(scene())


def test_a_failed_call_is_everybodys_failure_and_the_next_one_works() -> None:
    async def scene() -> None:
        work = Work()
        work.go.set()
        together = Together(work)
        failed = await asyncio.gather(together(666), together(2), return_exceptions=True)
        assert [type(one) for one in failed] == [RuntimeError, RuntimeError]
        assert await together(2) == "2"

    asyncio.run(scene())


@pytest.mark.parametrize("count", [MOST, MOST + 1])
def test_a_call_is_bounded(count: int) -> None:
    async def scene() -> None:
        work = Work()
        work.go.set()
        together = Together(work)
        await asyncio.gather(*(together(2 * number) for number in range(count)))
        assert max(map(len, work.calls)) == MOST
        assert [one for call in work.calls for one in call] == [2 * number for number in range(count)]

    asyncio.run(scene())
