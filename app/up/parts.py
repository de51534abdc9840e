"""The parts that `ddpm up` keeps alive: one that ends is started again, with back-off."""

from __future__ import annotations

import time
from collections.abc import Callable

from app.up.children import Child

_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 30.0
_STEADY_S = 20.0  # a child that lived for so long had no trouble with its start


class Part:
    """One of Redis, the API, the workers: the process that plays it, and what comes after.

    start: starts a process. say: prints a line.
    """

    def __init__(self, start: Callable[[], Child], say: Callable[[str], None]) -> None:
        self._start = start
        self._say = say
        self._ends = 0  # in a row, each soon after its start
        self._start_at: float | None = None  # when the next one is due, once one has ended
        self.child = start()

    def keep(self) -> None:
        """Call often: says it when the child has ended, and starts another when that is due."""
        if self.child.running:
            self.child.turn_log()
        elif self._start_at is None:
            self._say_the_end()
        elif time.monotonic() >= self._start_at:
            self._start_at = None
            self._restart()

    def _say_the_end(self) -> None:
        steady = time.monotonic() - self.child.started >= _STEADY_S
        self._ends = 1 if steady else self._ends + 1
        wait = self._wait()
        self._say(f"{self.child.epitaph()}\n  starting another in {wait:g} s")

    def _restart(self) -> None:
        try:
            self.child = self._start()
        except (OSError, RuntimeError) as error:  # no memory, or no redis-server any more
            self._ends += 1
            self._say(f"{self.child.name} cannot be started: {error}; again in {self._wait():g} s")

    def _wait(self) -> float:
        """Put the next start off, twice as long each time. Returns by how much."""
        wait = min(_FIRST_WAIT_S * 2.0 ** min(self._ends - 1, 30), _LONGEST_WAIT_S)
        self._start_at = time.monotonic() + wait
        return wait
