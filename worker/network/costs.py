"""Which batch size to run next: measured, not configured.

On a CPU the time of a forward grows with its batch, so a small batch costs little throughput and
lets short jobs overtake; on a GPU it hardly grows, so a large one is nearly free. The engine
measures each shape as it runs it and takes the smallest that comes close to the best rate.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

NEARLY_BEST = 0.95  # of the best rate: the smallest such shape wins
RECENT = 8  # steps of a shape that are remembered; the quickest of them counts
TRIALS = 3  # steps of a shape before it is judged
EXPLORE = 8  # shapes down to this fraction of what waits are tried
FORGET_AFTER = 120.0  # seconds; a shape that was slow while the machine was busy gets new trials
RATE_HALF_LIFE = 10.0  # seconds of work


@dataclass(frozen=True)
class Shape:
    """A batch shape that the network can run: its rows, and whether compiled code is there.

    to_fit: only worth a thought where no smaller one holds all rows that wait.
    """

    rows: int
    compiled: bool = False
    to_fit: bool = field(default=False, compare=False)


class CostModel:
    """Seconds of a step for each shape that was run; guesses for the others."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps: dict[Shape, deque[tuple[float, float]]] = {}  # (seconds, when)
        self.spent: dict[int, float] = {}  # seconds of uncompiled steps by their rows

    def record(self, shape: Shape, seconds: float) -> None:
        """One step took so long. The first of each shape is not counted: it also prepares it."""
        if not shape.compiled:
            self.spent[shape.rows] = self.spent.get(shape.rows, 0.0) + seconds
        if shape not in self._steps:
            self._steps[shape] = deque(maxlen=RECENT)
            return
        self._steps[shape].append((seconds, self._clock()))

    def _fresh(self, shape: Shape) -> list[float]:
        limit = self._clock() - FORGET_AFTER
        steps = list(self._steps.get(shape, ()))  # at once: another thread may be asking
        return [seconds for seconds, when in steps if when > limit]

    def seconds(self, shape: Shape) -> float:
        """The quickest recent step: one that waited for the processor says nothing of a shape.

        Between two measured shapes linear; beyond them in proportion.
        """
        measured = self._fresh(shape)
        if measured:
            return min(measured)
        points = sorted(
            (other.rows, min(fresh))
            for other in list(self._steps)
            if other.compiled == shape.compiled and (fresh := self._fresh(other))
        )
        if not points:
            return float(shape.rows)
        rows = [rows for rows, _ in points]
        at = min(max(shape.rows, rows[0]), rows[-1])
        return float(np.interp(at, rows, [s for _, s in points])) * shape.rows / at

    @property
    def fastest(self) -> float:
        """Rows a second of the best shape, as last measured, however long ago; 0 if none was.

        What a queue is worked off at: it fills the batches that a few samples leave half empty.
        """
        known = [
            (shape.rows, [s for s, _ in list(steps)]) for shape, steps in list(self._steps.items())
        ]
        return max((rows / min(seconds) for rows, seconds in known if seconds), default=0.0)

    def best(self, waiting: int, shapes: Iterable[Shape], at_least: int = 1) -> Shape:
        """The smallest shape whose rate for `waiting` rows is nearly the best of all.

        A shape larger than `waiting` is padded; a smaller one leaves rows for the next step.
        Shapes that were not lately measured are tried first.
        """
        candidates = _candidates(waiting, [shape for shape in shapes if shape.rows >= at_least])
        for shape in candidates:
            if shape.rows <= waiting and len(self._fresh(shape)) < TRIALS and not shape.to_fit:
                return shape
        rates = [min(waiting, shape.rows) / self.seconds(shape) for shape in candidates]
        enough = NEARLY_BEST * max(rates)
        good = [
            (shape.rows, -rate, i)
            for i, (shape, rate) in enumerate(zip(candidates, rates, strict=True))
            if rate >= enough
        ]
        return candidates[min(good)[2]]


def _candidates(waiting: int, shapes: Iterable[Shape]) -> list[Shape]:
    """Shapes worth a thought, by size, up to the first that holds all that waits."""
    by_size = sorted(shapes, key=lambda shape: shape.rows)
    enough = next((shape.rows for shape in by_size if shape.rows >= waiting), by_size[-1].rows)
    least = min(waiting / EXPLORE, enough)
    return [
        shape
        for shape in by_size
        if least <= shape.rows <= enough and (not shape.to_fit or shape.rows == enough)
    ]


class RateMeter:
    """Rows a second of busy time, over an exponential window."""

    def __init__(self) -> None:
        self._rows = 0.0
        self._seconds = 0.0

    def add(self, rows: int, seconds: float) -> None:
        """So many rows took so long."""
        keep = 0.5 ** (seconds / RATE_HALF_LIFE)
        self._rows = keep * self._rows + rows
        self._seconds = keep * self._seconds + seconds

    @property
    def value(self) -> float:
        """Rows a second; 0 before the first."""
        return self._rows / self._seconds if self._seconds else 0.0
