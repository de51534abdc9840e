"""Data whose exact denoiser is known: what everything else is checked against. float64 throughout.

For x_0 ~ N(0, v) the marginal of x_t is N(0, vᾱ_t + 1−ᾱ_t) and the best denoiser is linear,
E[x_0|x_t] = g_t x_t. So every sampler without clipping is a linear recursion whose variance has a
closed form, and so has every term of the bound. For a mixture of Gaussians the score is closed
form too, and the reverse conditional q(x_{t−1}|x_t) is no longer Gaussian.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffusion.bound import BoundTable, bound_table
from diffusion.schedule import Float64, Schedule
from diffusion.table import COLUMNS, SamplerTable


def marginal_variance(schedule: Schedule, v: float) -> Float64:
    """Var x_t = vᾱ_t + 1−ᾱ_t, [T]."""
    return v * schedule.alphas_cumprod + schedule.one_minus_alphas_cumprod


def eps_gain(schedule: Schedule, v: float) -> Float64:
    """[T], with E[ε|x_t] = gain·x_t: √(1−ᾱ_t)/(vᾱ_t + 1−ᾱ_t)."""
    return np.sqrt(schedule.one_minus_alphas_cumprod) / marginal_variance(schedule, v)


def x_start_gain(schedule: Schedule, v: float) -> Float64:
    """[T], with E[x_0|x_t] = gain·x_t: v√ᾱ_t/(vᾱ_t + 1−ᾱ_t)."""
    return v * np.sqrt(schedule.alphas_cumprod) / marginal_variance(schedule, v)


def x_start_error(schedule: Schedule, v: float) -> Float64:
    """E(x_0 − E[x_0|x_t])² = v(1−ᾱ_t)/(vᾱ_t + 1−ᾱ_t), [T]."""
    return v * schedule.one_minus_alphas_cumprod / marginal_variance(schedule, v)


def gaussian_terms(schedule: Schedule, table: BoundTable, v: float, variance: str) -> Float64:
    """Expected terms of the bound a dimension, [R] nats, row 0 by the density of the decoder."""
    log_variance = table.log_variance(variance)
    square = table.coef_x_start**2 * x_start_error(schedule, v)[table.t] * np.exp(-log_variance)
    log_ratio = table.log_beta_tilde - log_variance
    terms: Float64 = 0.5 * (np.expm1(log_ratio) - log_ratio + square)
    terms[0] = 0.5 * (math.log(2 * math.pi) + log_variance[0] + square[0])
    return terms


def gaussian_entropy(v: float) -> float:
    """Entropy of N(0, v) in nats: the least a code can cost a dimension."""
    return 0.5 * math.log(2 * math.pi * math.e * v)


def gaussian_gap(schedule: Schedule, table: BoundTable, v: float, variance: str) -> Float64:
    """KL of the true reverse conditional to the model's, a row and a dimension, [R] nats.

    Both are Gaussian with the same mean; the true variance is β̃ + coef²·E(x_0 − x̂_0)². With
    KL(q(x_T) ‖ N(0, 1)) these sum to bound − entropy.
    """
    beta_tilde = np.append(0.0, np.exp(table.log_beta_tilde[1:]))
    true = beta_tilde + table.coef_x_start**2 * x_start_error(schedule, v)[table.t]
    ratio = true * np.exp(-table.log_variance(variance))
    gap: Float64 = 0.5 * (ratio - 1 - np.log(ratio))
    return gap


def prior_gap(schedule: Schedule, v: float) -> float:
    """KL(N(0, Var x_T) ‖ N(0, 1)), a dimension."""
    variance = float(marginal_variance(schedule, v)[-1])
    return 0.5 * (variance - 1 - math.log(variance))


def output_variance(table: SamplerTable, schedule: Schedule, v: float) -> float:
    """Variance of what a sampler puts out from x_T ~ N(0, 1), for data N(0, v), no clipping.

    The covariance of (x, x̂_0,prev, x̂_0,older) goes through the rows; ε̂ = gain·x, x̂_0 =
    (x − √(1−ᾱ) ε̂)/√ᾱ.
    """
    covariance = np.diag([1.0, 0.0, 0.0])
    for t, row in zip(table.time, table.coefficients, strict=True):
        a, b, d, c, e, f = (row[COLUMNS.index(name)] for name in "abdcef")
        alpha_bar, rest = schedule.alpha_bar(t), schedule.one_minus_alpha_bar(t)
        gain = math.sqrt(rest) / (alpha_bar * v + rest)
        x_start = (1 - math.sqrt(rest) * gain) / math.sqrt(alpha_bar)
        step = np.array([[a * x_start + b + e * gain, d, f], [x_start, 0.0, 0.0], [0.0, 1.0, 0.0]])
        covariance = step @ covariance @ step.T
        covariance[0, 0] += c**2
    return float(covariance[0, 0])


@dataclass(frozen=True, eq=False)
class Mixture:
    """Σ weights·N(means, variances) in one dimension; arrays [K]."""

    weights: Float64
    means: Float64
    variances: Float64

    def diffused(self, alpha_bar: float) -> Mixture:
        """The marginal of √ᾱ x + √(1−ᾱ) ε."""
        variances = alpha_bar * self.variances + 1 - alpha_bar
        return Mixture(self.weights, math.sqrt(alpha_bar) * self.means, variances)

    def density(self, x: Float64) -> Float64:
        """p(x), any shape."""
        total: Float64 = self._parts(x).sum(-1)
        return total

    def score(self, x: Float64) -> Float64:
        """∇ ln p(x), any shape."""
        parts = self._parts(x)
        pull = (self.means - x[..., None]) / self.variances
        score: Float64 = (parts * pull).sum(-1) / parts.sum(-1)
        return score

    def sample(self, n: int, generator: np.random.Generator) -> Float64:
        """n draws."""
        k = generator.choice(len(self.weights), size=n, p=self.weights)
        return generator.normal(self.means[k], np.sqrt(self.variances[k]))

    def _parts(self, x: Float64) -> Float64:
        square = (x[..., None] - self.means) ** 2 / self.variances
        parts: Float64 = self.weights * np.exp(-0.5 * square)
        return parts / np.sqrt(2 * math.pi * self.variances)


def mixture_x_start(mixture: Mixture, x_t: Float64, alpha_bar: float) -> Float64:
    """E[x_0|x_t] = (x_t + (1−ᾱ_t) ∇ln q(x_t))/√ᾱ_t (Tweedie's formula)."""
    score = mixture.diffused(alpha_bar).score(x_t)
    x_start: Float64 = (x_t + (1 - alpha_bar) * score) / math.sqrt(alpha_bar)
    return x_start


def reverse_conditional(previous: Mixture, x_t: float, beta: float, x: Float64) -> Float64:
    """q(x_{t−1}|x_t) on a grid x by quadrature: q(x_{t−1}) N(x_t; √(1−β) x_{t−1}, β), scaled.

    previous: the marginal of x_{t−1}; the grid must cover the conditional.
    """
    likelihood = np.exp(-0.5 * (x_t - math.sqrt(1 - beta) * x) ** 2 / beta)
    joint = previous.density(x) * likelihood
    conditional: Float64 = joint / np.trapezoid(joint, x)
    return conditional


def distance_to_gaussian(
    density: Float64, x: Float64, variance: float | None = None
) -> tuple[float, float]:
    """(KL, total variation) of a density on a grid to a Gaussian of the same mean.

    variance: of the Gaussian; default that of the density, so the nearest Gaussian.
    """
    mean = np.trapezoid(x * density, x)
    if variance is None:
        variance = float(np.trapezoid((x - mean) ** 2 * density, x))
    log_normal = -0.5 * ((x - mean) ** 2 / variance + math.log(2 * math.pi * variance))
    inside: NDArray[np.bool_] = density > 0
    log_ratio = np.log(np.where(inside, density, 1.0)) - log_normal
    kl = np.trapezoid(np.where(inside, density * log_ratio, 0.0), x)
    total_variation = 0.5 * np.trapezoid(np.abs(density - np.exp(log_normal)), x)
    return float(kl), float(total_variation)


def gaussian_bound(schedule: Schedule, v: float, variance: str = "small") -> float:
    """The whole bound on N(0, v) with its exact denoiser: nats a dimension, density L_0."""
    alpha_bar = schedule.alpha_bar(schedule.T - 1)
    rest = schedule.one_minus_alpha_bar(schedule.T - 1)
    prior = 0.5 * (alpha_bar * (v - 1) - math.log(rest))
    return prior + float(gaussian_terms(schedule, bound_table(schedule), v, variance).sum())
