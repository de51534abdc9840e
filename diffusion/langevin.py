"""Scores and Langevin dynamics: Ho et al. 2020, section 3.2; Song, Ermon 2019; Song et al. 2021.

ε_θ is a score: s_θ(x_t, t) = −ε_θ/√(1−ᾱ_t), trained by denoising score matching over the noise
levels. A Langevin step of size a at level t, x ← x + (a/2) s_θ + √a z, leaves q(x_t) nearly as it
is: for Gaussian data it keeps the variance v_t/(1 − a/4v_t) in place of v_t. The steps here are
a = c(1−ᾱ_t), the same for every image whatever is beside it in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from torch import Tensor

from diffusion.forward import gather
from diffusion.noise import Purpose
from diffusion.schedule import Float64, Schedule
from diffusion.table import (
    COLUMNS,
    SamplerError,
    SamplerTable,
    checked_timesteps,
    empty_rows,
    first_order,
    own_indices,
)

LEVEL_STEP = 0.4  # c of annealed Langevin: its only means to follow the levels, so it must stride
CORRECTOR_STEP = 0.1  # c of a corrector: a = 4(r‖z‖/‖s‖)² of Song et al. with r = 0.16
_A, _B, _C = (COLUMNS.index(name) for name in "abc")


def score(schedule: Schedule, eps: Tensor, t: Tensor) -> Tensor:
    """s_θ(x_t, t) = −ε_θ/√(1−ᾱ_t). eps: [N, ...]; t: [N], index 0..T−1."""
    return -eps / gather(schedule.sqrt_one_minus_alphas_cumprod, t, eps)


def conditional_score(schedule: Schedule, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """∇ ln q(x_t|x_0) = −(x_t − √ᾱ_t x_0)/(1−ᾱ_t), the target of denoising score matching."""
    mean = gather(schedule.sqrt_alphas_cumprod, t, x_start) * x_start
    return (mean - x_t) / gather(schedule.one_minus_alphas_cumprod, t, x_start)


def score_matching_loss(schedule: Schedule, score: Tensor, target: Tensor, t: Tensor) -> Tensor:
    """(1−ᾱ_t)‖s − ∇ln q(x_t|x_0)‖², [N]: equal to ‖ε − ε_θ‖², so L_simple is its mean."""
    square = (score - target).square().flatten(1).sum(1)
    return gather(schedule.one_minus_alphas_cumprod, t, square) * square


def reverse_step_as_langevin(schedule: Schedule, t: int, s: int, sigma2: float) -> Float64:
    """[drift, noise] of a reverse step t → s in the coordinates x̃ = x/√ᾱ (section 3.2).

    x̃_s = x̃_t + drift·s̃_θ + noise·z, with σ̃² = (1−ᾱ)/ᾱ, s̃_θ = −ε_θ/σ̃_t the score of x̃_t,
    drift = σ̃_t² − σ̃_s² and noise = σ/√ᾱ_s: a Langevin step whose two sizes differ.
    """
    level = [schedule.one_minus_alpha_bar(k) / schedule.alpha_bar(k) for k in (t, s)]
    return np.array([level[0] - level[1], math.sqrt(sigma2 / schedule.alpha_bar(s))])


def langevin_row(schedule: Schedule, t: float, c: float) -> Float64:
    """A row of a sampler table, [7]: one Langevin step of size c(1−ᾱ_t) at t, no clipping.

    With s = (√ᾱ x̂_0 − x)/(1−ᾱ) the step is (c/2)√ᾱ x̂_0 + (1 − c/2) x + √(c(1−ᾱ)) z.
    Raises SamplerError unless 0 < c < 4, beyond which the steps diverge.
    """
    if not 0 < c < 4:
        raise SamplerError(f"step size c = {c}: must lie between 0 and 4")
    row: Float64 = empty_rows(1, clip=False)[0]
    row[_A] = c / 2 * math.sqrt(schedule.alpha_bar(t))
    row[_B] = 1 - c / 2
    row[_C] = math.sqrt(c * schedule.one_minus_alpha_bar(t))
    return row


def annealed_langevin(
    schedule: Schedule,
    timesteps: Sequence[float],
    *,
    corrector_steps: int = 1,
    c: float = LEVEL_STEP,
    clip: bool = True,
    branch: bool = False,
) -> SamplerTable:
    """Langevin steps at each level, x ← x√(ᾱ_s/ᾱ_t) between levels (Song, Ermon 2019).

    corrector_steps: how many a level. From a level without signal (ᾱ_t = 0) there is none to
    scale, and x stays. The last of all rows lands on x̂_0, clipped if asked, instead of a last
    noisy step. branch: the first level's x_t may come from a chain that has taken Langevin steps
    there already. Raises SamplerError for fewer than one step a level, or timesteps that do not
    descend.
    """
    steps = corrector_steps
    if steps < 1:
        raise SamplerError(f"corrector_steps = {steps}: langevin needs 1 or more a level")
    ts = checked_timesteps(schedule.T, timesteps)
    t = np.repeat(np.array(own_indices(ts), dtype=np.int64), steps)
    time = np.repeat(np.array(ts), steps)
    rows = np.stack([langevin_row(schedule, level, c) for level in time.tolist()])
    for i, (high, low) in enumerate(pairwise(ts)):
        if schedule.alpha_bar(high):
            scale = math.sqrt(schedule.alpha_bar(low) / schedule.alpha_bar(high))
            rows[(i + 1) * steps - 1, [_A, _B, _C]] *= scale
    rows[-1] = empty_rows(1, clip=clip)[0]
    rows[-1, _A] = 1.0
    purpose = np.full(len(t), Purpose.CORRECTOR, dtype=np.int64)
    if branch:
        purpose[:steps] = Purpose.BRANCH
    number = np.tile(np.arange(steps), len(ts))
    return SamplerTable(t, rows, purpose, noise=t + schedule.T * number, time=time)


def with_correctors(
    table: SamplerTable, schedule: Schedule, *, steps: int, c: float = CORRECTOR_STEP
) -> SamplerTable:
    """Predictor–corrector: `steps` Langevin steps after each row but the last (Song et al. 2021).

    A row with memory becomes first order: the corrector has moved x since x̂_0,prev was found.
    Raises SamplerError for a negative number of steps.
    """
    if steps < 0:
        raise SamplerError(f"corrector_steps = {steps}: must be 0 or more")
    if steps == 0:
        return table
    predictors = first_order(table.coefficients)
    # A corrector works at the level where its predictor lands: the t of the row after it.
    row = np.append(0, np.repeat(np.arange(1, len(table)), steps + 1))
    is_corrector = np.append(False, np.tile([True] * steps + [False], len(table) - 1))
    number = np.append(0, np.tile([*range(steps), 0], len(table) - 1))
    coefficients = predictors[row]
    for i in np.flatnonzero(is_corrector):
        coefficients[i] = langevin_row(schedule, float(table.time[row[i]]), c)
    return replace(
        table,
        t=table.t[row],
        coefficients=coefficients,
        purpose=np.where(is_corrector, Purpose.CORRECTOR, table.purpose[row]),
        spread=np.where(is_corrector, 0.0, table.spread[row]),
        noise=table.noise[row] + schedule.T * number,
        memory=table.memory[row],
        time=table.time[row],
    )
