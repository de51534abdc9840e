"""Consistency tuning: what the network says of x_0 at t is taught by what it says earlier, at r.

x_t and x_r share x_0 and ε. At the image, r = −1, what is said is x_0 itself. Over the stages of a
run r goes from there towards t, and x̂_0 from the mean of all images that x_t may come from to one
of them: the end of the path that the flow of probability takes from x_t. Geng et al. 2024 (Easy
Consistency Tuning), in the terms of a variance-preserving process: σ = √(1−ᾱ)/√ᾱ.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.forward import gather
from diffusion.schedule import Float64, Schedule, read_only
from training.config import ConsistencyConfig


class Stages:
    """The r of every t, in each stage of a run; batch_size: images an optimizer step."""

    def __init__(self, config: ConsistencyConfig, schedule: Schedule, batch_size: int) -> None:
        self._images = config.stage_steps * batch_size  # of a stage
        self._earlier = torch.from_numpy(np.stack([earlier(schedule, gap) for gap in config.gaps]))

    def earlier(self, t: Tensor, positions: Tensor) -> Tensor:
        """r of each t, [N], index −1..t−1; positions: [N], images since the start of the run."""
        if self._earlier.device != t.device:  # once: each copy would wait for the device
            self._earlier = self._earlier.to(t.device)
        stage = (positions // self._images).clamp(max=len(self._earlier) - 1)
        return self._earlier[stage, t]


def earlier(schedule: Schedule, gap: float) -> NDArray[np.int64]:
    """The r of every t, [T]: the last index, −1..t−1, with σ_r ≤ (1 − gap) σ_t; σ is 0 at −1."""
    sigma = sigmas(schedule)
    wanted = (1 - gap) * sigma[:-1]
    r = np.searchsorted(sigma[:-1], wanted * (1 + 1e-12), side="right") - 1
    return np.minimum(r, np.arange(schedule.T) - 1)


@lru_cache(maxsize=64)
def sigmas(schedule: Schedule) -> Float64:
    """σ of every index, and in the end, where −1 finds it, that of the image: 0. [T + 1]."""
    with np.errstate(over="ignore"):
        return read_only(np.append(np.exp(-schedule.half_log_snr), 0.0))


def gap_weight(schedule: Schedule, t: Tensor, r: Tensor, *, power: float) -> Tensor:
    """σ_t^−p/(1 − σ_r/σ_t), float64 [N]: the distance of x̂_0 at t and r falls with their gap."""
    like = torch.empty(len(t), dtype=torch.float64, device=t.device)
    sigma_t, sigma_r = (gather(sigmas(schedule), at, like) for at in (t, r))
    return sigma_t**-power / (1 - sigma_r / sigma_t)
