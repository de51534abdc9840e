"""From many requests at once to few transactions: what arrives while one runs shares the next."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from jobs.store.admission import Admission, Admitted, Order

_MOST_TOGETHER = 64
T = TypeVar("T")


class Admitter:
    """Asynchronous admission in one thread of its own: RQ has no asyncio."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="admission")
        self._waiting: list[tuple[Order, asyncio.Future[Admitted]]] = []
        self._flushing: asyncio.Task[None] | None = None

    async def admit(self, order: Order) -> Admitted:
        """Take a job in. Raises what Admission.admit raises."""
        future: asyncio.Future[Admitted] = asyncio.get_running_loop().create_future()
        self._waiting.append((order, future))
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush(), name="admission")
        return await future

    async def call(self, function: Callable[[], T]) -> T:
        """Run something else of the admission in its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    async def _flush(self) -> None:
        while self._waiting:
            batch = self._waiting[:_MOST_TOGETHER]
            del self._waiting[:_MOST_TOGETHER]
            orders = [order for order, _ in batch]
            try:
                outcomes = await self.call(functools.partial(self._admission.admit_all, orders))
            except Exception as error:
                for _, future in batch:
                    if not future.done():  # its client may have gone
                        future.set_exception(error)
                continue
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                if future.done():
                    continue
                if isinstance(outcome, Admitted):
                    future.set_result(outcome)
                else:
                    future.set_exception(outcome)
        self._flushing = None
