"""Conditional chains on Gaussian data, propagated exactly: what they make of y, and how surely."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from diffusion.condition import Condition, Measurement
from diffusion.forward import gather
from diffusion.operators import Mask
from diffusion.schedule import linear_schedule
from diffusion.table import COLUMNS, SamplerTable, clip_x_start, update
from tests.diffusion.gaussian import CorrelatedDenoiser, ar1_covariance

PAPER = linear_schedule()
D = 16
KNOWN = [0, 1, 2, 3, 8, 9, 10, 15]
UNKNOWN = [i for i in range(D) if i not in KNOWN]


@dataclass(frozen=True)
class Moments:
    """x = mean_map y + N(0, covariance). mean_map: [D, known]; covariance: [D, D]."""

    mean_map: Tensor
    covariance: Tensor


def denoiser(correlation: float) -> CorrelatedDenoiser:
    """Of a row of D pixels."""
    return CorrelatedDenoiser(PAPER, ar1_covariance(D, correlation), (1, 1, D))


def known_pixels() -> Mask:
    """Keeps KNOWN."""
    known = torch.zeros(1, D, dtype=torch.bool)
    known[0, KNOWN] = True
    return Mask(known)


def in_place(y: Tensor) -> Tensor:
    """Known values [N, known] as measurements [N, 1, 1, D]."""
    out = torch.zeros(len(y), D, dtype=y.dtype)
    out[:, KNOWN] = y
    return out[:, None, None]


def posterior(correlation: float) -> Moments:
    """The truth: x_0 given its known pixels."""
    covariance = ar1_covariance(D, correlation)
    gain = covariance[:, KNOWN] @ torch.linalg.inv(covariance[KNOWN][:, KNOWN])
    return Moments(gain, covariance - gain @ covariance[KNOWN])


def propagated(
    table: SamplerTable, correlation: float, make: Callable[[Measurement], Condition]
) -> Moments:
    """What a conditional chain makes of x_T ~ N(0, I): each row is an affine map of (x, y).

    The maps are those of the code: every row of every unit vector, as one mixed batch.
    """
    units, R = D + len(KNOWN), len(table)
    x = torch.eye(units, D, dtype=torch.float64)[:, None, None].repeat(R, 1, 1, 1)
    values = torch.zeros(units, len(KNOWN), dtype=torch.float64)
    values[D:] = torch.eye(len(KNOWN), dtype=torch.float64)
    condition = make(Measurement(known_pixels(), in_place(values).repeat(R, 1, 1, 1)))
    at = torch.arange(R).repeat_interleave(units)
    t = torch.from_numpy(table.t)[at]
    rows = torch.from_numpy(table.coefficients)[at]
    alpha_bar = gather(PAPER.alphas_cumprod, t, x).flatten()
    found, x_start = condition.estimate(
        lambda v: denoiser(correlation).estimate(v, t),
        x,
        alpha_bar=alpha_bar,
        r2=gather(PAPER.one_minus_alphas_cumprod, t, x).flatten(),
        clip=partial(clip_x_start, rows),
    )
    nothing = torch.zeros_like(x)
    moved = update(rows, x, x_start=x_start, eps=found.eps, x_start_prev=nothing, z=nothing).view(
        R, units, D
    )
    mean, covariance = torch.zeros(D, len(KNOWN)).double(), torch.eye(D).double()
    for maps, c in zip(moved, table.coefficients[:, COLUMNS.index("c")], strict=True):
        of_x, of_y = maps[:D].T, maps[D:].T
        mean = of_x @ mean + of_y
        covariance = of_x @ covariance @ of_x.T + c**2 * torch.eye(D)
    return Moments(mean, covariance)


def errors(found: Moments, truth: Moments) -> tuple[float, float]:
    """Relative error of the mean map, and the ratio of the variances of what was not known."""
    error = torch.linalg.norm(found.mean_map - truth.mean_map)
    variances = [np.trace(m.covariance.numpy()[np.ix_(UNKNOWN, UNKNOWN)]) for m in (found, truth)]
    return float(error / torch.linalg.norm(truth.mean_map)), float(variances[0] / variances[1])
