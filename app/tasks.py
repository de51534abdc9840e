"""Racing tasks, and really ending the losers."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

_PATIENCE_S = 0.2


async def reap(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until each has ended; their results and errors stay in them.

    Cancels again where that was not enough: a client library may lose a cancellation that comes
    just when its reply does.
    """
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_PATIENCE_S)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # looked at, so that asyncio does not complain
