"""How long one turn of a server's event loop takes, in processor time of its thread."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import Iterator


class Turns:
    """longest: seconds of processor time of the longest callback since `forget`."""

    def __init__(self) -> None:
        self.longest = 0.0
        self.what = ""

    def forget(self) -> None:
        self.longest, self.what = 0.0, ""


@contextlib.contextmanager
def measured() -> Iterator[Turns]:
    """Measures every callback of asyncio's own event loops that run in other threads than ours.

    Processor time: a machine that is busy with other things makes no turn longer. What the tests
    before have left in memory is frozen, since a server of its own would not have to look it over.
    """
    gc.collect()
    gc.freeze()
    turns, ours = Turns(), threading.get_ident()
    plain = asyncio.events.Handle._run

    def run(handle: asyncio.events.Handle) -> None:
        began = time.thread_time()
        plain(handle)
        took = time.thread_time() - began
        if threading.get_ident() != ours and took > turns.longest:
            turns.longest, turns.what = took, repr(handle)[:500]

    asyncio.events.Handle._run = run  # type: ignore[method-assign,assignment]
    try:
        yield turns
    finally:
        asyncio.events.Handle._run = plain  # type: ignore[method-assign]
        gc.unfreeze()
