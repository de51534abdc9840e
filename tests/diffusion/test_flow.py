"""Log-likelihood by the flow, against the exact density of Gaussian data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from diffusion import ImagesError, ScheduleConfig
from diffusion.flow import BIN, flow_likelihood, flow_table
from diffusion.schedule import linear_schedule
from diffusion.spacings import spaced_timesteps
from diffusion.table import SamplerError
from tests.diffusion.gaussian import CorrelatedDenoiser, ar1_covariance
from tests.diffusion.networks import build_model

D, REPEATS, DRAWS = 16, 200, 8


def denoiser(correlation: float) -> CorrelatedDenoiser:
    covariance = 0.25 * ar1_covariance(D, correlation)
    return CorrelatedDenoiser(linear_schedule(), covariance, (1, 1, D))


def exact(model: CorrelatedDenoiser, x: Tensor) -> Tensor:
    normal = torch.distributions.MultivariateNormal(torch.zeros(D).double(), model.covariance)
    density: Tensor = normal.log_prob(x.flatten(1))
    return density


def images(model: CorrelatedDenoiser, n: int) -> Tensor:
    root = torch.linalg.cholesky(model.covariance)
    z = torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (z @ root.T)[:, None, None]


def test_white_data_need_no_luck_and_converge_by_the_second_order() -> None:
    """Of a Jacobian that is a multiple of the identity every probe tells the trace."""
    model = denoiser(0.0)
    x = images(model, 5)
    errors = []
    for steps in (50, 100, 200):
        found = flow_likelihood(model, x, draws=2, steps=steps, dequantise=False)  # type: ignore[arg-type]
        assert found.standard_error.max() < 1e-6
        errors.append(float((found.mean - exact(model, x)).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.2)
    assert errors[2] < 0.1


def test_the_standard_error_is_right() -> None:
    """Of 200 repeats about 95 % of the intervals hold the truth, and the mean of all is there."""
    model = denoiser(0.6)
    x = images(model, 1).expand(REPEATS, -1, -1, -1)
    found = flow_likelihood(model, x, draws=DRAWS, steps=200, dequantise=False)  # type: ignore[arg-type]
    away = (found.mean - exact(model, x)).abs() / found.standard_error
    inside = int((away < stats.t.ppf(0.975, DRAWS - 1)).sum())
    low, high = stats.binom.interval(0.999, REPEATS, 0.95)
    assert low <= inside <= high
    pooled = found.mean.std() / REPEATS**0.5
    assert (found.mean.mean() - exact(model, x)[0]).abs() < 3 * pooled


def test_dequantised_by_noise_of_the_width_of_a_grey_level() -> None:
    model = denoiser(0.0)
    x = images(model, 1).expand(50, -1, -1, -1)
    found = flow_likelihood(model, x, draws=1, steps=100)  # type: ignore[arg-type]
    spread = (BIN**2 / 12 * x[0].square().sum()).sqrt() / 0.25  # of x·u/v, to first order
    assert found.log_density.std() == pytest.approx(float(spread), rel=0.5)
    plain = -(found.mean / D + math.log(BIN)) / math.log(2)
    torch.testing.assert_close(found.bits_per_dim, plain)


def test_on_a_network_and_what_is_refused() -> None:
    model = build_model()
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    both = flow_likelihood(model, x, draws=2, steps=5, seed=3, class_label=1)
    assert both.log_density.isfinite().all() and both.log_density.shape == (2, 2)
    second = flow_likelihood(
        model, x[1:], draws=2, steps=5, seed=3, class_label=1, indices=torch.tensor([1])
    )
    torch.testing.assert_close(second.log_density[0], both.log_density[1], rtol=1e-4, atol=1e-2)
    with pytest.raises(SamplerError, match="draws = 0"):
        flow_likelihood(model, x, draws=0)
    with pytest.raises(ImagesError, match="x_start: holds no image"):
        flow_likelihood(model, x[:0])
    with pytest.raises(ValueError, match="dequantise = 'no': must be true or false"):
        flow_likelihood(model, x, dequantise="no")  # type: ignore[arg-type]
    no_signal = build_model(schedule=ScheduleConfig.from_betas([0.1, 0.2, 1.0]), prediction="v")
    with pytest.raises(SamplerError, match="no end at t = 3, where x_t holds no signal"):
        flow_likelihood(no_signal, x, class_label=1)


def test_the_divergence_is_integrated_where_it_is_smooth() -> None:
    # Near data of one point the divergence is D/τ, whose integral is D ln τ.
    schedule = linear_schedule(1000, 1e-4, 0.02)
    few = flow_table(schedule, spaced_timesteps(1000, 10))
    signal = few.numbers[0]
    tau = np.arcsinh(np.sqrt(1 / signal**2 - 1))
    found = float((few.numbers[3] / tau)[1:].sum() - few.numbers[3][0] / tau[0])
    assert found == pytest.approx(math.log(tau[-1] / tau[1]), rel=1e-9)
