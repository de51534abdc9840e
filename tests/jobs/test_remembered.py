"""What many requests ask for is asked once."""

from __future__ import annotations

import asyncio

import pytest

from jobs.store import remembered
from jobs.store.remembered import Remembered


def test_one_asks_for_all_who_wait_and_nothing_is_older_than_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    async def ask() -> int:
        await asyncio.sleep(0.01)
        asked.append(len(asked))
        if len(asked) == 1:
            raise ConnectionError("away")
        return asked[-1]

    async def many() -> None:
        value = Remembered(ask)
        first, *others = await asyncio.gather(
            *(value.get() for _ in range(20)), return_exceptions=True
        )
        assert isinstance(first, ConnectionError)  # that of one request; the next asks again
        assert others == [1] * 19 and asked == [0, 1]
        assert await value.get() == 1
        monkeypatch.setattr(remembered, "_FRESH_S", 0.0)
        assert await value.get() == 2

    asyncio.run(many())
