"""Data x_0 ~ N(mean, variance): the exact denoiser is linear, so every chain has a closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion.forward import alpha_bars, gather
from diffusion.model import Estimate
from diffusion.noise import Purpose, image_normals
from diffusion.parameterization import coefficients_at
from diffusion.sampling import chain
from diffusion.schedule import Schedule
from diffusion.table import SamplerTable


@dataclass(frozen=True)
class GaussianDenoiser:
    """E[ε | x_t] of pixels drawn independently from N(mean, variance); stands for a Model."""

    schedule: Schedule
    variance: float
    mean: float = 0.0
    shape: tuple[int, int, int] = (1, 128, 128)

    def eps(self, x_t: Tensor, t: Tensor, class_label: Tensor | None = None) -> Tensor:
        """√(1−ᾱ)(x_t − √ᾱ m)/(ᾱ v + 1 − ᾱ)."""
        alpha_bar, rest = (v.view(-1, 1, 1, 1) for v in alpha_bars(self.schedule, t, t.double()))
        gain = rest.sqrt() / (alpha_bar * self.variance + rest)
        return gain.to(x_t.dtype) * (x_t - (alpha_bar.sqrt() * self.mean).to(x_t.dtype))

    def estimate(self, x_t: Tensor, t: Tensor, class_label: Tensor | None = None) -> Estimate:
        """ε̂ and the x̂_0 that goes with it."""
        eps = self.eps(x_t, t)
        r_x, r_out, *_ = coefficients_at(self.schedule, "epsilon", t.double())[
            ..., None, None, None
        ]
        return Estimate(r_x.to(x_t.dtype) * x_t + r_out.to(x_t.dtype) * eps, eps)


def output_moments(table: SamplerTable, denoiser: GaussianDenoiser) -> tuple[float, float]:
    """Mean and variance of what an unclipped table makes of x_T ~ N(0, 1), in float64.

    (x, x̂_0 of the row before, and of the one before that) is a linear-Gaussian Markov chain.
    """
    mean, covariance = np.zeros(3), np.diag([1.0, 0.0, 0.0])
    for t, (_, a, b, d, c, e, f) in zip(table.time, table.coefficients, strict=True):
        alpha_bar = denoiser.schedule.alpha_bar(t)
        rest = denoiser.schedule.one_minus_alpha_bar(t)
        slope = math.sqrt(rest) / (alpha_bar * denoiser.variance + rest)  # of ε̂ in x
        shift = -slope * math.sqrt(alpha_bar) * denoiser.mean  # ε̂ = slope x + shift
        k = (1 - math.sqrt(rest) * slope) / math.sqrt(alpha_bar)  # x̂_0 = k x + offset
        offset = -math.sqrt(rest / alpha_bar) * shift
        step = np.array([[a * k + b + e * slope, d, f], [k, 0.0, 0.0], [0.0, 1.0, 0.0]])
        mean = step @ mean + np.array([a * offset + e * shift, offset, 0.0])
        covariance = step @ covariance @ step.T + np.diag([c**2, 0.0, 0.0])
    return float(mean[0]), float(covariance[0, 0])


def run_chain(
    denoiser: GaussianDenoiser, table: SamplerTable, *, images: int = 4, seed: int = 0
) -> Tensor:
    """The last x of the chain, [images, *shape]."""
    indices = torch.arange(images)
    x = image_normals(seed, indices, row=0, purpose=Purpose.X_T, shape=denoiser.shape)
    for step in chain(denoiser, table, x, seed=seed):  # type: ignore[arg-type]
        x = step.x_next
    return x


def assert_normal(x: Tensor, mean: float, variance: float) -> None:
    """Sample mean and variance within 4 standard errors of those of N(mean, variance)."""
    n = x.numel()
    found = x.double()
    assert abs(found.mean().item() - mean) < 4 * math.sqrt(variance / n)
    assert abs(found.var().item() / variance - 1) < 4 * math.sqrt(2 / n)


@dataclass(frozen=True, eq=False)
class CorrelatedDenoiser:
    """E[x_0 | x_t] of pixels drawn together from N(0, covariance), [D, D]; stands for a Model."""

    schedule: Schedule
    covariance: Tensor
    shape: tuple[int, int, int]

    def estimate(self, x_t: Tensor, t: Tensor, class_label: Tensor | None = None) -> Estimate:
        """x̂_0 = √ᾱ Σ(ᾱΣ + (1−ᾱ)I)⁻¹ x_t, in the precision of x_t, and the ε̂ that goes with it."""
        signal = gather(np.sqrt(self.schedule.alphas_cumprod), t, x_t).flatten()
        rest = gather(self.schedule.one_minus_alphas_cumprod, t, x_t).flatten()
        values, vectors = (v.to(x_t.dtype) for v in torch.linalg.eigh(self.covariance))
        along = x_t.flatten(1) @ vectors
        gain = signal[:, None] * values / (signal[:, None] ** 2 * values + rest[:, None])
        x_start = ((gain * along) @ vectors.T).view_as(x_t)
        eps = (x_t - signal.view(-1, 1, 1, 1) * x_start) / rest.sqrt().view(-1, 1, 1, 1)
        return Estimate(x_start, eps)


def ar1_covariance(D: int, correlation: float) -> Tensor:
    """correlation^|i−j|, float64 [D, D]."""
    at = torch.arange(D, dtype=torch.float64)
    return torch.as_tensor(correlation, dtype=torch.float64) ** (at[:, None] - at).abs()
