"""When to put back the jobs that only another version can run.

A worker holds them for a while: one that put them back at once would be the next to take them, at
full speed and for ever. All go back together, at the end of the queue, and the worker then takes
nothing for a moment, so that one that can run them is there first. The whiles grow as long as
the same jobs come again.
"""

from __future__ import annotations

import time

SHORTEST_S = 1.0
LONGEST_S = 16.0
PAUSE_S = 0.5
MOST = 1000  # held at once: each costs a heartbeat every few seconds


class Patience:
    """The times of one worker."""

    def __init__(self) -> None:
        self._hold = SHORTEST_S
        self._since: float | None = None  # the oldest that is held
        self._released_at = -LONGEST_S

    def hold(self) -> None:
        """A job is held from now on."""
        if self._since is None:
            self._since = time.monotonic()
            again = self._since - self._released_at < 2 * PAUSE_S + SHORTEST_S
            self._hold = min(2 * self._hold, LONGEST_S) if again else SHORTEST_S

    def over(self, held: int) -> bool:
        """Whether those that are held are to go back; if so, a pause begins."""
        if self._since is None:
            return False
        if held < MOST and time.monotonic() - self._since < self._hold:
            return False
        self._since, self._released_at = None, time.monotonic()
        return True

    @property
    def pausing(self) -> bool:
        """Whether others are to take jobs before this worker does."""
        return time.monotonic() - self._released_at < PAUSE_S
