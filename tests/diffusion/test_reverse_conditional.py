"""The reverse conditional q(x_{t−1}|x_t) becomes Gaussian as β → 0; exact mixtures."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from diffusion.multistep import dpmpp_2m
from diffusion.samplers import ancestral, ddim
from diffusion.schedule import linear_schedule
from diffusion.theory.exact import (
    Mixture,
    distance_to_gaussian,
    eps_gain,
    mixture_x_start,
    output_variance,
    reverse_conditional,
)

PREVIOUS = Mixture(np.array([0.6, 0.4]), np.array([-0.7, 0.8]), np.array([0.08, 0.12]))
BETAS = (0.2, 0.05, 0.0125, 0.003125, 0.00078125)


def conditional(x_t: float, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Grid and density of q(x_{t−1}|x_t), on 14 deviations of either factor."""
    width = 14 * math.sqrt(beta / (1 - beta))
    centre = x_t / math.sqrt(1 - beta)
    x = np.linspace(centre - width, centre + width, 40_001)
    return x, reverse_conditional(PREVIOUS, x_t, beta, x)


def test_distance_to_the_nearest_gaussian_vanishes_with_beta() -> None:
    for x_t in (-0.5, 0.05, 0.6):
        found = []
        for beta in BETAS:
            x, density = conditional(x_t, beta)
            found.append(distance_to_gaussian(density, x))
        kls, variations = zip(*found, strict=True)
        assert all(a > b for a, b in pairwise(kls))
        assert all(a > b for a, b in pairwise(variations))
        # The skewness is of order β^{3/2}, so the KL falls as β³.
        assert math.log(kls[-2] / kls[-1]) / math.log(4) == pytest.approx(3, abs=0.6)


def test_large_steps_are_far_from_gaussian() -> None:
    x, density = conditional(0.05, BETAS[0])
    assert distance_to_gaussian(density, x)[1] > 0.2
    x, density = conditional(0.05, BETAS[-1])
    assert distance_to_gaussian(density, x)[1] < 0.002


def test_the_reverse_step_has_the_conditional_mean_and_nearly_its_variance() -> None:
    """μ_θ with the exact score is the mean (Tweedie); N(μ_θ, β) errs by the variance alone."""
    for x_t in (-0.5, 0.6):
        kls = []
        for beta in BETAS:
            x, density = conditional(x_t, beta)
            score = PREVIOUS.diffused(1 - beta).score(np.array([x_t]))[0]
            mean = (x_t + beta * score) / math.sqrt(1 - beta)
            assert np.trapezoid(x * density, x) == pytest.approx(mean, abs=1e-6)
            kls.append(distance_to_gaussian(density, x, variance=beta)[0])
        assert all(a > b for a, b in pairwise(kls))
        assert math.log(kls[-2] / kls[-1]) / math.log(4) == pytest.approx(2, abs=0.3)


def test_the_mixture_denoiser_is_the_conditional_mean() -> None:
    """E[x_0|x_t] against the ratio of two integrals over x_0."""
    alpha_bar = 0.4
    x = np.linspace(-4, 4, 200_001)
    for x_t in (-0.8, 0.0, 0.5):
        joint = PREVIOUS.density(x) * np.exp(
            -0.5 * (x_t - math.sqrt(alpha_bar) * x) ** 2 / (1 - alpha_bar)
        )
        wanted = np.trapezoid(x * joint, x) / np.trapezoid(joint, x)
        got = mixture_x_start(PREVIOUS, np.array([x_t]), alpha_bar)[0]
        assert got == pytest.approx(wanted, rel=1e-6)


def test_mixture_samples_have_its_moments() -> None:
    n = 100_000
    draws = PREVIOUS.sample(n, np.random.Generator(np.random.Philox(key=1)))
    mean = float(PREVIOUS.weights @ PREVIOUS.means)
    second = float(PREVIOUS.weights @ (PREVIOUS.variances + PREVIOUS.means**2))
    variance = second - mean**2
    assert abs(draws.mean() - mean) < 4.5 * math.sqrt(variance / n)
    # For this two-humped density the fourth moment is below a Gaussian's, so this bound is loose.
    assert abs(draws.var() / variance - 1) < 4.5 * math.sqrt(2 / n)


def test_output_variances_at_1000_steps() -> None:
    """σ² small 0.985 v, large 1.003 v, DDIM 0.994 v for v = 0.25; 0.963, 1.009, 0.985 for 0.04."""
    schedule = linear_schedule()
    ts = list(range(999, -1, -1))
    for v, wanted in ((0.25, (0.985, 1.003, 0.994)), (0.04, (0.963, 1.009, 0.985))):
        tables = (
            ancestral(schedule, ts, variance="small", clip=False),
            ancestral(schedule, ts, variance="large", clip=False),
            ddim(schedule, ts, clip=False),
        )
        found = [output_variance(table, schedule, v) / v for table in tables]
        assert found == pytest.approx(list(wanted), abs=6e-4)
        second_order = output_variance(dpmpp_2m(schedule, ts, clip=False), schedule, v) / v
        assert abs(second_order - 1) < abs(found[2] - 1)
    assert eps_gain(schedule, 1.0) == pytest.approx(np.sqrt(schedule.one_minus_alphas_cumprod))
