"""Which timesteps a chain of few steps visits: indices, or real numbers between them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diffusion.checks import check_whole
from diffusion.schedule import Float64, Schedule
from diffusion.table import SamplerError, check_name

KARRAS_RHO = 7.0


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


def _lambda(first: float, last: float, steps: int) -> Float64:
    """Even in λ, ends included (Lu et al. 2022)."""
    return np.linspace(first, last, steps)


def _karras(first: float, last: float, steps: int) -> Float64:
    """σ = e^−λ, even in σ^(1/ρ), ends included (Karras et al. 2022, eq. 5)."""
    roots = np.linspace(np.exp(-first / KARRAS_RHO), np.exp(-last / KARRAS_RHO), steps)
    return -KARRAS_RHO * np.log(roots)


# Name → `steps` indices out of 0..T−1, descending.
INDEX_SPACINGS: dict[str, Callable[[int, int], Float64]] = {
    "uniform": _uniform,
    "quadratic": _quadratic,
    "leading": _leading,
    "trailing": _trailing,
}
# Name → `steps` values of λ from the first to the last, ascending; they lie between the indices.
LEVEL_SPACINGS: dict[str, Callable[[float, float, int], Float64]] = {
    "lambda": _lambda,
    "karras": _karras,
}
SPACINGS = (*INDEX_SPACINGS, *LEVEL_SPACINGS)


def spaced_timesteps(T: int, steps: int, spacing: str = "uniform") -> list[int]:
    """`steps` indices out of 0..T−1, descending.

    spacing: uniform, or quadratic (denser near the image): the first is T−1 and, if steps > 1,
    the last 0. leading counts every (T // steps)-th from 0, trailing every (T/steps)-th from T−1:
    they leave out one of the two ends. uniform (diffusers' linspace), leading and trailing are
    rounded as in diffusers; not so its one step of linspace, at 0, and the row of index −1 that
    its trailing adds where T, T − T/steps, … misses 0 by rounding. Raises SamplerError.
    """
    _check_steps(T, steps)
    check_name("spacing", spacing, INDEX_SPACINGS)
    if steps == 1 and spacing in ("uniform", "quadratic"):
        return [T - 1]
    return [int(t) for t in INDEX_SPACINGS[spacing](T, steps)]


def spaced_times(
    schedule: Schedule, steps: int, spacing: str = "uniform", *, T: int | None = None
) -> list[float]:
    """`steps` timesteps within 0..T−1 (default: all of the schedule's), descending.

    spacing: also lambda, even in λ, and karras, even in σ^(1/7) with σ = e^−λ: real numbers, the
    first T−1 and the last 0. From a T−1 without signal, λ = −∞, they go on at the index below.
    Raises SamplerError.
    """
    T = schedule.T if T is None else T
    check_name("spacing", spacing, SPACINGS)
    if spacing in INDEX_SPACINGS:
        return list(map(float, spaced_timesteps(T, steps, spacing)))
    _check_steps(T, steps)
    levels = schedule.half_log_snr[:T]
    lost = int(np.isinf(levels[-1]))
    if steps <= 1 + lost:
        return [T - 1.0, 0.0][:steps]
    found = LEVEL_SPACINGS[spacing](levels[T - 1 - lost], levels[0], steps - lost)
    between = np.interp(found[1:-1], levels[::-1], np.arange(T)[::-1]).tolist()
    return [T - 1.0, *[T - 2.0] * lost, *between, 0.0]


def _check_steps(T: int, steps: int) -> None:
    check_whole("steps", steps, least=1, most=T, error=SamplerError)
