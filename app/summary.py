"""What the images of a job are together: their mean, and where they differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jobs.formats import FORMATS
from jobs.pictures import Float32, to_uint8


@dataclass(frozen=True)
class Statistic:
    """x: float64 [C,H,W]; black and white: the values that a picture shows so."""

    x: NDArray[np.float64]
    black: float
    white: float


Summary = Callable[[Sequence[Float32]], Statistic]


def mean(planes: Sequence[Float32]) -> Statistic:
    """Of images in [−1, 1]."""
    return Statistic(np.mean(np.stack(planes), axis=0, dtype=np.float64), -1.0, 1.0)


def std(planes: Sequence[Float32]) -> Statistic:
    """Root of the unbiased variance; of one image 0. At most about 1: half of them −1, half 1."""
    ddof = min(1, len(planes) - 1)
    return Statistic(np.std(np.stack(planes), axis=0, dtype=np.float64, ddof=ddof), 0.0, 1.0)


def encode(planes: Sequence[Float32], of: Summary, *, suffix: str, px: int = 0) -> bytes:
    """The statistic as an array, or as a picture."""
    found = of(planes)
    chosen = FORMATS[suffix]
    if chosen.array is not None:
        return chosen.array(found.x.astype(np.float32))
    assert chosen.picture is not None
    shown = 2.0 * (found.x - found.black) / (found.white - found.black) - 1.0
    return chosen.picture(to_uint8(shown.astype(np.float32)), None, px=px)
