"""Ending a run by a signal, after the step in hand."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Whether SIGINT or SIGTERM came."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM ask for the end; a second one kills."""

        def stop(signum: int, _: FrameType | None) -> None:
            self.asked = True
            signal.signal(signum, signal.SIG_DFL)

        before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
