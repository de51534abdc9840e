"""Which batch size to run next: measured, not configured.

On a CPU the time of a forward grows with its batch, so a small batch costs little throughput and
lets short jobs overtake; on a GPU it hardly grows, so a large one is nearly free. The engine
measures each shape as it runs it and takes the smallest that comes close to the best rate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

NEARLY_BEST = 0.95  # of the best rate: the smallest such shape wins
SMOOTHING = 0.2
FORGET_AFTER = 120.0  # seconds; a shape that was slow while the machine was busy gets a new trial
RATE_HALF_LIFE = 10.0  # seconds of work
COMPILED_GUESS = 0.7  # of the eager time, until it is measured


@dataclass(frozen=True)
class Shape:
    """A batch shape that the network can run: its rows, and whether compiled code is there."""

    rows: int
    compiled: bool = False


class CostModel:
    """Seconds of a step for each shape, smoothed; guesses for shapes not yet seen."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: dict[Shape, tuple[float, float]] = {}  # shape: (seconds, when)
        self._seen: set[Shape] = set()

    def record(self, shape: Shape, seconds: float) -> None:
        """One step took so long. The first of each shape is not counted: it also prepares it."""
        if shape not in self._seen:
            self._seen.add(shape)
            return
        old = self._seconds.get(shape, (seconds, 0.0))[0]
        # One step that waited for the processor says nothing of the shape.
        seconds = min(seconds, 4 * old)
        self._seconds[shape] = (old + SMOOTHING * (seconds - old), self._clock())

    def seconds(self, shape: Shape) -> float:
        """The estimate for a shape; in arbitrary units while nothing was measured."""
        known = self._seconds.get(shape)
        if known is not None and self._clock() - known[1] < FORGET_AFTER:
            return known[0]
        if shape.compiled:
            return COMPILED_GUESS * self.seconds(Shape(shape.rows))
        return self._guess(shape.rows)

    @property
    def fastest(self) -> float:
        """Rows a second of the best shape measured; 0 if none was."""
        return max((s.rows / seconds for s, (seconds, _) in self._seconds.items()), default=0.0)

    def _guess(self, rows: int) -> float:
        """Between two measured eager shapes linear; above the largest hopeful, so it is tried."""
        now = self._clock()
        points = sorted(
            (shape.rows, seconds)
            for shape, (seconds, when) in self._seconds.items()
            if not shape.compiled and now - when < FORGET_AFTER
        )
        if not points:
            return math.sqrt(rows)
        below = [point for point in points if point[0] <= rows]
        above = [point for point in points if point[0] >= rows]
        if not below:
            return above[0][1]
        if not above:
            return below[-1][1] * math.sqrt(rows / below[-1][0])
        (low, low_s), (high, high_s) = below[-1], above[0]
        share = (rows - low) / (high - low) if high > low else 0.0
        return low_s + share * (high_s - low_s)

    def best(self, waiting: int, shapes: Iterable[Shape], at_least: int = 1) -> Shape:
        """The smallest shape whose rate for `waiting` rows is nearly the best of all.

        A shape larger than `waiting` is padded; a smaller one leaves rows for the next step.
        """
        candidates = [shape for shape in shapes if shape.rows >= at_least]
        rates = [min(waiting, shape.rows) / self.seconds(shape) for shape in candidates]
        enough = NEARLY_BEST * max(rates)
        good = [
            (shape.rows, -rate, shape)
            for shape, rate in zip(candidates, rates, strict=True)
            if rate >= enough
        ]
        return min(good, key=lambda entry: entry[:2])[2]


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
