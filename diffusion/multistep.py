"""Solvers of the probability flow that go through x̂_0 of the rows before: one evaluation a step.

In λ = ln(√ᾱ/√(1−ᾱ)) the flow from t to s, h = λ_s − λ_t, is

    x_s = √((1−ᾱ_s)/(1−ᾱ_t)) x_t + √(1−ᾱ_s) ∫ e^λ x̂_0(λ) dλ,

and the integral's weight is √ᾱ_s (1 − e^{−h}) in all. Each solver puts a polynomial through some of
the x̂_0 found so far. DPM-Solver++(2M) and (3M): Lu et al. 2022. UniPC: Zhao et al. 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffusion.schedule import Float64, Schedule
from diffusion.table import SamplerTable, checked_timesteps, empty_rows, put, stepping

FEW = 15  # rows; a chain of fewer takes the last but one of order 2


@dataclass(frozen=True)
class _Step:
    """x_s = keep·x_t + gain·(a weighted mean of x̂_0)."""

    h: float
    keep: float
    gain: float


def _steps(schedule: Schedule, ts: list[float]) -> list[_Step]:
    """The last one to the image, λ = ∞, so that it lands on x̂_0 itself."""
    found = []
    for t, s in zip(ts, [*ts[1:], -1], strict=True):
        h = schedule.lambda_at(s) - schedule.lambda_at(t)
        keep = math.sqrt(schedule.one_minus_alpha_bar(s) / schedule.one_minus_alpha_bar(t))
        found.append(_Step(h, keep, -math.sqrt(schedule.alpha_bar(s)) * math.expm1(-h)))
    return found


def dpmpp_2m(schedule: Schedule, timesteps: Sequence[float], *, clip: bool = True) -> SamplerTable:
    """DPM-Solver++(2M), algorithm 2 of its paper; first and last row of first order."""
    return _dpmpp(schedule, timesteps, order=2, clip=clip)


def dpmpp_3m(schedule: Schedule, timesteps: Sequence[float], *, clip: bool = True) -> SamplerTable:
    """DPM-Solver++(3M): rows of order 1, 2, 3, …, and the last of first order.

    Of fewer than 15 rows the last but one is of order 2, as in diffusers.
    """
    return _dpmpp(schedule, timesteps, order=3, clip=clip)


def unipc(schedule: Schedule, timesteps: Sequence[float], *, clip: bool = True) -> SamplerTable:
    """UniPC-2 with B_2(h) = e^h − 1: predictor and corrector of order 2, which share evaluations.

    The x̂_0 found at x_s corrects the step that led to x_s, and the next step goes on from the
    corrected x: both are one row. First and last row are of first order.
    """
    ts = checked_timesteps(schedule.T, timesteps)
    steps, rows = _steps(schedule, ts), empty_rows(len(ts), clip)
    correction = np.zeros(3)
    for i, step in enumerate(steps):
        weights = step.gain * _predictor(_back(steps, i, order=2))
        a, d, f = step.keep * correction + weights
        put(rows, i, a=a, b=step.keep, d=d, f=f)
        correction = step.gain * _corrector(_back(steps, i, order=2)) - np.roll(weights, 1)
    return stepping(ts, rows)


def _dpmpp(
    schedule: Schedule, timesteps: Sequence[float], *, order: int, clip: bool
) -> SamplerTable:
    ts = checked_timesteps(schedule.T, timesteps)
    steps, rows = _steps(schedule, ts), empty_rows(len(ts), clip)
    for i, step in enumerate(steps):
        most = min(order, 2) if len(ts) < FEW and i == len(ts) - 2 else order
        a, d, f = step.gain * _predictor(_back(steps, i, order=most))
        put(rows, i, a=a, b=step.keep, d=d, f=f)
    return stepping(ts, rows)


def _back(steps: list[_Step], i: int, *, order: int) -> list[float]:
    """h of row i and of the rows before it, as many as its order can use.

    One that is infinite joins nothing to the row: the last of a chain, or the first of all, from
    an x_T without signal.
    """
    lengths = [step.h for step in steps[max(0, i + 1 - order) : i + 1]][::-1]
    usable = [k for k, h in enumerate(lengths) if math.isinf(h)]
    return lengths[: max(usable[0], 1)] if usable else lengths


def _predictor(lengths: list[float]) -> Float64:
    """Weights of x̂_0, of x̂_0 of the row before and of the one before that; they sum to 1.

    lengths: h of this row, and of as many rows before it as the order goes beyond 1.
    """
    newest = np.array([1.0, 0.0, 0.0])
    if len(lengths) == 1:
        return newest
    h = lengths[0]
    first = np.array([1.0, -1.0, 0.0]) * h / lengths[1]
    if len(lengths) == 2:
        return newest + first / 2
    r0, r1 = lengths[1] / h, lengths[2] / h
    second = np.array([0.0, 1.0, -1.0]) / r1
    slope = first + r0 / (r0 + r1) * (first - second)
    bend = (first - second) / (r0 + r1)
    whole = -math.expm1(-h)
    weights: Float64 = newest + slope * (1 - whole / h) / whole
    return weights - bend * ((h - whole) / h**2 - 0.5) / whole


def _corrector(lengths: list[float]) -> Float64:
    """Weights of x̂_0 where the step has led, of the step's own x̂_0 and of the one before.

    Of order 1 the mean of both ends; of order 2 the parabola's, equation 9 of the paper.
    """
    h = lengths[0]
    if math.isinf(h):  # what it starts from holds no signal, and bears no mean
        return np.array([0.0, 1.0, 0.0])
    if len(lengths) == 1:
        return np.array([0.5, 0.5, 0.0])
    whole, back = math.expm1(-h), -lengths[1] / h
    phi_2 = whole / -h - 1
    phi_3 = phi_2 / -h - 0.5
    old, new = np.linalg.solve(
        np.array([[1.0, 1.0], [back, 1.0]]), np.array([phi_2, 2 * phi_3]) / whole
    )
    return np.array([new, 1 - new - old / back, old / back])
