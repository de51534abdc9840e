"""Threads by purpose: what is slow for one purpose makes no other one wait."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Pool:
    """A few threads for calls that would hold the event loop."""

    def __init__(self, name: str, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a call in one of the threads; a call that no one awaits never starts."""
        bound = functools.partial(call, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, bound)

    def close(self) -> None:
        """Take no more calls, and forget those that have not begun."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class Pools:
    """decoding: request bodies. encoding: pictures and archives. store: short calls of Redis
    where RQ has no asyncio; a cancel goes this way, and waits for no picture."""

    def __init__(self) -> None:
        cores = min(8, max(2, os.cpu_count() or 2))
        self.decoding = Pool("decoding", cores)
        self.encoding = Pool("encoding", cores)
        self.store = Pool("store", 4)

    def close(self) -> None:
        """Close all of them."""
        for pool in (self.decoding, self.encoding, self.store):
            pool.close()
