"""What the network's output means, and conversions between the four parameterisations.

All are linear in (x_t, output), so each is a pair of coefficients a step:

    epsilon   x̂_0 = (x_t − √(1−ᾱ_t) out)/√ᾱ_t                        (Ho et al. 2020, eq. 11)
    sample    x̂_0 = out
    v         x̂_0 = √ᾱ_t x_t − √(1−ᾱ_t) out                          (Salimans, Ho 2022)
    mean      out = μ̃_t(x_t, x̂_0)                                    (Ho et al. 2020, eq. 8)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from diffusion.forward import alpha_bars, between, gather
from diffusion.schedule import Float64, Schedule, read_only

Coefficients = tuple[Float64, Float64]


def _epsilon(s: Schedule) -> Coefficients:
    return 1 / np.sqrt(s.alphas_cumprod), -np.sqrt(s.one_minus_alphas_cumprod / s.alphas_cumprod)


def _sample(s: Schedule) -> Coefficients:
    return np.zeros(s.T), np.ones(s.T)


def _v(s: Schedule) -> Coefficients:
    return np.sqrt(s.alphas_cumprod), -np.sqrt(s.one_minus_alphas_cumprod)


def _mean(s: Schedule) -> Coefficients:
    coef_x_start = np.sqrt(s.alphas_cumprod_prev) * s.betas / s.one_minus_alphas_cumprod
    one_minus_prev = np.append(0.0, s.one_minus_alphas_cumprod[:-1])
    coef_x_t = np.sqrt(s.alphas) * one_minus_prev / s.one_minus_alphas_cumprod
    return -coef_x_t / coef_x_start, 1 / coef_x_start


_X_START_FROM: dict[str, Callable[[Schedule], Coefficients]] = {
    "epsilon": _epsilon,
    "sample": _sample,
    "v": _v,
    "mean": _mean,
}
PREDICTIONS = tuple(_X_START_FROM)


class PredictionError(ValueError):
    """A parameterisation that is unknown, or impossible with a schedule."""


@lru_cache(maxsize=64)
def x_start_coefficients(schedule: Schedule, prediction: str) -> Coefficients:
    """(r_x [T], r_out [T]) with x̂_0 = r_x·x_t + r_out·out.

    Raises PredictionError for a name not in PREDICTIONS, and for ε where x_T holds no signal.
    """
    if prediction not in _X_START_FROM:
        raise PredictionError(
            f"prediction = {prediction!r}: must be one of {', '.join(PREDICTIONS)}"
        )
    # 1/√ᾱ_T must be a number in float32 too.
    if prediction == "epsilon" and schedule.alphas_cumprod[-1] < np.finfo(np.float32).tiny:
        raise PredictionError(
            "prediction = 'epsilon': no x̂_0 follows from ε where x_T holds no signal "
            f"(ᾱ_T = {schedule.alphas_cumprod[-1]:.3g}); must be sample, v or mean"
        )
    r_x, r_out = _X_START_FROM[prediction](schedule)
    return read_only(r_x), read_only(r_out)


@lru_cache(maxsize=64)
def eps_coefficients(schedule: Schedule, prediction: str) -> Coefficients:
    """(e_x [T], e_out [T]) with ε = e_x·x_t + e_out·out."""
    r_x, r_out = x_start_coefficients(schedule, prediction)
    signal = np.sqrt(schedule.alphas_cumprod)
    noise = np.sqrt(schedule.one_minus_alphas_cumprod)
    if prediction == "epsilon":  # exactly (0, 1), without rounding
        return read_only(np.zeros(schedule.T)), read_only(np.ones(schedule.T))
    return read_only((1 - signal * r_x) / noise), read_only(-signal * r_out / noise)


def coefficients_at(schedule: Schedule, prediction: str, t: Tensor) -> Tensor:
    """r_x, r_out, e_x and e_out at times t, float64 [N] → [4, N]; at indices those of the tables.

    Between them they follow from ᾱ_t; those of `mean`, which belong to steps, are linear.
    """
    table = reading_table(schedule, prediction)
    found = between(table, t)
    if prediction == "mean":
        return found
    alpha_bar, rest = alpha_bars(schedule, t, t)
    signal, noise = alpha_bar.sqrt(), rest.sqrt()
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    r_x, r_out = {
        "epsilon": (1 / signal, -noise / signal),
        "sample": (zero, one),
        "v": (signal, -noise),
    }[prediction]
    e_x, e_out = (1 - signal * r_x) / noise, -signal * r_out / noise
    return torch.where(t.long() == t, found, torch.stack([r_x, r_out, e_x, e_out]))


@lru_cache(maxsize=64)
def reading_table(schedule: Schedule, prediction: str) -> Float64:
    """[4, T]: x̂_0 = r_x·x_t + r_out·out and ε̂ = e_x·x_t + e_out·out."""
    rows = x_start_coefficients(schedule, prediction), eps_coefficients(schedule, prediction)
    return read_only(np.stack([*rows[0], *rows[1]]))


def to_x_start(
    schedule: Schedule, prediction: str, *, x_t: Tensor, t: Tensor, out: Tensor
) -> Tensor:
    """x̂_0 of a network output. x_t, out: [N, ...]; t: [N], index 0..T−1."""
    r_x, r_out = x_start_coefficients(schedule, prediction)
    return gather(r_x, t, x_t) * x_t + gather(r_out, t, x_t) * out


def to_eps(schedule: Schedule, prediction: str, *, x_t: Tensor, t: Tensor, out: Tensor) -> Tensor:
    """ε̂ of a network output."""
    e_x, e_out = eps_coefficients(schedule, prediction)
    return gather(e_x, t, x_t) * x_t + gather(e_out, t, x_t) * out


def target(
    schedule: Schedule, prediction: str, *, x_start: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """What a network of this parameterisation should put out: the inverse of `to_x_start`."""
    r_x, r_out = x_start_coefficients(schedule, prediction)
    return (x_start - gather(r_x, t, x_t) * x_t) / gather(r_out, t, x_t)
