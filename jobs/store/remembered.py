"""What many requests ask Redis for, and need not know to the second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

_FRESH_S = 1.0
T = TypeVar("T")


class Remembered(Generic[T]):
    """A value that is at most a second old. One request asks for it, and those beside it wait."""

    def __init__(self, ask: Callable[[], Awaitable[T]]) -> None:
        self._ask = ask
        self._asking = asyncio.Lock()
        self._found: tuple[float, T] | None = None

    async def get(self) -> T:
        """The value. Raises what asking raises, which is not remembered."""
        fresh = self._fresh()
        if fresh is None:
            async with self._asking:
                fresh = self._fresh()
                if fresh is None:
                    fresh = self._found = (time.monotonic(), await self._ask())
        return fresh[1]

    def _fresh(self) -> tuple[float, T] | None:
        found = self._found
        return found if found and time.monotonic() - found[0] < _FRESH_S else None
