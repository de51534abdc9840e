"""The discretised Gaussian decoder p_θ(x_0 | x_1): Ho et al. 2020, equation 13."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF_BIN = 1 / 255  # of 256 grey levels laid out from −1 to 1
PROBABILITY_FLOOR = 1e-12  # as in the paper's code: one pixel never costs more than 40 bits


def decoder_nats(x_start: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """−ln ∫_{δ−}^{δ+} N(x; μ, σ²) dx of each element, [N, ...] nats.

    x_start: grey levels k/127.5 − 1; mean: like it; log_variance: ln σ², broadcasts. The bins
    are x ± 1/255, open to ±∞ at x = ±1; a bin's probability is at least 1e-12.
    """
    inv_std = torch.exp(-0.5 * log_variance)
    lower = (x_start - HALF_BIN - mean) * inv_std
    upper = (x_start + HALF_BIN - mean) * inv_std
    lower = torch.where(x_start < -1 + HALF_BIN, -math.inf, lower)
    upper = torch.where(x_start > 1 - HALF_BIN, math.inf, upper)
    return -normal_mass(lower, upper).clamp(min=PROBABILITY_FLOOR).log()


def density_nats(x_start: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """−ln N(x_0; μ, σ²) of each element, [N, ...] nats: L_0 for data that are not discrete."""
    square = (x_start - mean).square() * torch.exp(-log_variance)
    return 0.5 * (math.log(2 * math.pi) + log_variance + square)


def normal_mass(lower: Tensor, upper: Tensor) -> Tensor:
    """Φ(upper) − Φ(lower) for lower ≤ upper, to relative accuracy in both tails."""
    # Mirrored to the lower tail, where erfc of a large argument keeps its digits.
    mirrored = lower + upper > 0
    low = torch.where(mirrored, -upper, lower)
    high = torch.where(mirrored, -lower, upper)
    root = -math.sqrt(0.5)
    mass: Tensor = 0.5 * (torch.special.erfc(high * root) - torch.special.erfc(low * root))
    return mass
