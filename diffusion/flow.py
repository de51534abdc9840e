"""Log-likelihood by the probability flow (Song et al. 2021, arXiv 2011.13456, section 4.3).

With x̃ = x/√ᾱ and σ̃ = √((1−ᾱ)/ᾱ) the flow is dx̃/dσ̃ = ε̂. In τ = arsinh σ̃, where dσ̃ = dτ/√ᾱ,

    dx̃/dτ = ε̂/√ᾱ,    ln p_0(x_0) = ln N(x_T; 0, I) + (D/2) ln ᾱ_T + ∫ div_x ε̂ dτ

from the image (τ = 0) to T; D/2 ln ᾱ_T is the change of coordinates at T. Both by Heun's rule, at
indices of the table, so of second order; the divergence by Hutchinson's estimator, e·(∂ε̂/∂x)e with
e of ±1. It is an estimate of the model's density, no bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from diffusion.checks import check_images, check_range, check_whole
from diffusion.model import Model, check_model
from diffusion.noise import Purpose, check_seed, normals
from diffusion.sampling import ClassLabel, class_labels
from diffusion.schedule import Schedule
from diffusion.spacings import spaced_timesteps
from diffusion.table import SamplerError

BIN = 1 / 127.5  # of 8 bits, where images lie in [−1, 1]
STEPS = 100
_SLACK = 9.0  # data that are no pictures have a density too


@dataclass(frozen=True, eq=False)
class FlowLikelihood:
    """log_density: float64 [N, draws], nats: one estimate a draw, of ln p_0 of the image,
    with noise of the width of a grey level where it was dequantised. dims: D."""

    log_density: Tensor
    dims: int

    @property
    def mean(self) -> Tensor:
        """[N], nats."""
        return self.log_density.mean(1)

    @property
    def standard_error(self) -> Tensor:
        """Of the mean, over probes and dequantisations, [N], nats; NaN of one draw."""
        draws = self.log_density.shape[1]
        return self.log_density.std(1) / math.sqrt(draws)

    @property
    def bits_per_dim(self) -> Tensor:
        """−log₂ of the mass of a grey level at that density, a dimension, [N]."""
        return -(self.mean / self.dims + math.log(BIN)) / math.log(2)


def flow_likelihood(
    model: Model,
    x_start: Tensor,
    *,
    draws: int = 4,
    steps: int | None = None,
    seed: int = 0,
    indices: Tensor | None = None,
    dequantise: bool = True,
    class_label: ClassLabel = None,
) -> FlowLikelihood:
    """Estimates of ln p_0 of images [N, C, H, W] in [−1, 1], in the precision of x_start.

    draws: of a probe, and of uniform noise within each grey level if `dequantise`; each costs 2
    evaluations and a product with the Jacobian a step. steps: timesteps, by default 100, or all
    where there are fewer. indices: int64 [N], the keys of the noise (default 0..N−1). Raises
    ImagesError, SamplerError or ValueError naming the bad argument.
    """
    check_model(model)
    check_images("x_start", x_start, model.shape, bounded=False)
    check_range("x_start", x_start, slack=_SLACK)
    check_whole("draws", draws, least=1, error=SamplerError)
    T = model.schedule.T
    ts = spaced_timesteps(T, min(STEPS, T) if steps is None else steps)[::-1]
    n = len(x_start)
    keys = torch.arange(n) if indices is None else indices
    labels = class_labels(model, class_label, n) if class_label is not None else None
    found = []
    for draw in range(draws):
        noise = partial(_noise, seed=seed, keys=keys.to(x_start.device), row=draw, like=x_start)
        x = x_start
        if dequantise:
            uniform = torch.special.ndtr(noise(Purpose.DEQUANTISE))
            x = x + (uniform - 0.5) * BIN
        probe = torch.where(noise(Purpose.PROBE) < 0, -1.0, 1.0).to(x_start.dtype)
        found.append(_log_density(model, x, probe, ts=ts, labels=labels))
    return FlowLikelihood(torch.stack(found, dim=1), x_start[0].numel())


def _noise(purpose: Purpose, *, seed: int, keys: Tensor, row: int, like: Tensor) -> Tensor:
    """Standard normals [N, ...] of this purpose and row."""
    seeds, rows = torch.full_like(keys, check_seed(seed)), torch.full_like(keys, row)
    shape = tuple(like.shape[1:])
    return normals(seeds, keys, rows=rows, purpose=purpose, shape=shape).to(like.dtype)


def _log_density(
    model: Model, x_start: Tensor, probe: Tensor, *, ts: list[int], labels: Tensor | None
) -> Tensor:
    """One estimate of ln p_0 of each image, float64 [N]."""
    schedule = model.schedule
    scaled, tau, total = x_start, 0.0, torch.zeros(len(x_start), dtype=torch.float64)
    # There is no network at the image: the first stretch has the slope at the first index.
    slope, divergence = _slope(model, scaled, ts[0], probe=probe, labels=labels)
    for t in ts:
        step = _tau(schedule, t) - tau
        guess = scaled + step * slope
        there, _ = _slope(model, guess, t, probe=None, labels=labels)
        scaled = scaled + step / 2 * (slope + there)
        slope, ahead = _slope(model, scaled, t, probe=probe, labels=labels)
        total += step / 2 * (divergence + ahead).double().cpu()
        tau, divergence = tau + step, ahead
    alpha_bar = schedule.alpha_bar(ts[-1])
    x_T = (math.sqrt(alpha_bar) * scaled).flatten(1).double().cpu()
    dims = x_T.shape[1]
    normal = -0.5 * (x_T.square().sum(1) + dims * math.log(2 * math.pi))
    return total + normal + dims / 2 * math.log(alpha_bar)


def _slope(
    model: Model, scaled: Tensor, t: int, *, probe: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dx̃/dτ at x̃ [N, ...] and index t, and e·(∂ε̂/∂x)e, [N] (0 without a probe)."""
    signal = math.sqrt(model.schedule.alpha_bar(t))
    at = torch.full((len(scaled),), t, device=scaled.device)
    with torch.inference_mode(False), torch.set_grad_enabled(probe is not None):
        x = (signal * scaled).clone().requires_grad_(probe is not None)
        eps = model.estimate(x, at, labels).eps
        if probe is None:
            return eps / signal, torch.zeros(len(scaled))
        [product] = torch.autograd.grad(eps, x, probe.clone())
    return eps.detach() / signal, (product * probe).flatten(1).sum(1)


def _tau(schedule: Schedule, t: int) -> float:
    """arsinh of the noise-to-signal ratio."""
    return float(np.arcsinh(math.sqrt(schedule.one_minus_alpha_bar(t) / schedule.alpha_bar(t))))
