"""Which timesteps a chain of few steps visits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diffusion.checks import check_whole
from diffusion.schedule import Float64
from diffusion.table import SamplerError, check_name


def _uniform(T: int, steps: int) -> Float64:
    """Even, ends included."""
    return np.linspace(0, T - 1, steps).round()[::-1]


def _quadratic(T: int, steps: int) -> Float64:
    """(T−1)u² for even u; those that round to one index are pushed apart, keeping both ends."""
    ts: Float64 = np.rint((T - 1) * np.linspace(0, 1, steps) ** 2)
    for i in range(1, steps):
        ts[i] = max(ts[i], ts[i - 1] + 1)
    return ts[::-1]


def _leading(T: int, steps: int) -> Float64:
    """Every (T // steps)-th from 0."""
    return np.arange(steps, dtype=np.float64)[::-1] * (T // steps)


def _trailing(T: int, steps: int) -> Float64:
    """Every (T/steps)-th from T−1."""
    return np.arange(T, 0, -T / steps).round()[:steps] - 1


# Name → `steps` indices out of 0..T−1, descending.
SPACINGS: dict[str, Callable[[int, int], Float64]] = {
    "uniform": _uniform,
    "quadratic": _quadratic,
    "leading": _leading,
    "trailing": _trailing,
}


def spaced_timesteps(T: int, steps: int, spacing: str = "uniform") -> list[int]:
    """`steps` indices out of 0..T−1, descending.

    spacing: uniform, or quadratic (denser near the image): the first is T−1 and, if steps > 1,
    the last 0. leading counts every (T // steps)-th from 0, trailing every (T/steps)-th from T−1:
    they leave out one of the two ends. uniform (diffusers' linspace), leading and trailing are
    rounded as in diffusers; not so its one step of linspace, at 0, and the row of index −1 that
    its trailing adds where T, T − T/steps, … misses 0 by rounding. Raises SamplerError.
    """
    check_whole("steps", steps, least=1, most=T, error=SamplerError)
    check_name("spacing", spacing, SPACINGS)
    if steps == 1 and spacing in ("uniform", "quadratic"):
        return [T - 1]
    return [int(t) for t in SPACINGS[spacing](T, steps)]
