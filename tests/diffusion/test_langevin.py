"""Scores, Langevin dynamics, predictor–corrector: identities, closed forms, convergence."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from diffusion import sample
from diffusion.forward import q_sample
from diffusion.langevin import (
    annealed_langevin,
    conditional_score,
    langevin_row,
    reverse_step_as_langevin,
    score,
    score_matching_loss,
    with_correctors,
)
from diffusion.multistep import dpmpp_2m
from diffusion.noise import Purpose
from diffusion.samplers import ancestral, build_table, ddim
from diffusion.schedule import Schedule, linear_schedule
from diffusion.spacings import spaced_timesteps
from diffusion.table import COLUMNS, SamplerError, SamplerTable
from diffusion.theory.exact import eps_gain, marginal_variance, output_variance
from tests.diffusion.gaussian import GaussianDenoiser, assert_normal, output_moments, run_chain
from tests.diffusion.networks import build_model
from tests.diffusion.steps import one_step

PAPER = linear_schedule()
N = 5


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def apply(
    table: SamplerTable,
    row: int,
    x: torch.Tensor,
    eps: torch.Tensor,
    schedule: Schedule = PAPER,
) -> torch.Tensor:
    """One row with z = 1."""
    return one_step(schedule, table, row, x, eps, z=torch.ones_like(x))[1]


def test_denoising_score_matching_is_l_simple_sample_by_sample() -> None:
    x_start, eps, eps_hat = (draws(N, 3, 4, 4, seed=k) for k in range(3))
    t = torch.tensor([0, 1, 20, 500, 999])
    x_t = q_sample(PAPER, x_start, t, eps)
    target = conditional_score(PAPER, x_start, x_t, t)
    torch.testing.assert_close(target, score(PAPER, eps, t), rtol=1e-6, atol=1e-9)
    loss = score_matching_loss(PAPER, score(PAPER, eps_hat, t), target, t)
    torch.testing.assert_close(loss, (eps - eps_hat).square().flatten(1).sum(1), rtol=1e-7, atol=0)


def test_the_exact_score_is_the_gradient_of_the_log_density() -> None:
    """Gaussian data: s = −x_t/Var x_t."""
    v, t = 0.25, torch.tensor([3, 300, 900])
    x_t = draws(3, 2)
    eps = torch.from_numpy(eps_gain(PAPER, v))[t][:, None] * x_t
    wanted = -x_t / torch.from_numpy(marginal_variance(PAPER, v))[t][:, None]
    torch.testing.assert_close(score(PAPER, eps, t), wanted)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("ts", [[999, 998, 997], [999, 400, 20, 19, 0]])
def test_a_reverse_step_is_a_langevin_step_in_scaled_coordinates(
    variance: str, ts: list[int]
) -> None:
    table = ancestral(PAPER, ts, variance=variance, clip=False)
    x, eps = draws(N, 6), draws(N, 6, seed=1)
    for row, (t, s) in enumerate(pairwise(ts)):
        jump = PAPER.jump(t, s)
        sigma2 = jump.beta if variance == "large" else jump.variance
        drift, noise = reverse_step_as_langevin(PAPER, t, s, sigma2)
        level = math.sqrt(PAPER.one_minus_alpha_bar(t) / PAPER.alpha_bar(t))  # σ̃_t
        x_tilde = x / math.sqrt(PAPER.alpha_bar(t)) + drift * (-eps / level) + noise
        got = apply(table, row, x, eps) / math.sqrt(PAPER.alpha_bar(s))
        torch.testing.assert_close(got, x_tilde, rtol=1e-9, atol=1e-9)


def test_to_first_order_a_step_is_probability_flow_plus_langevin() -> None:
    """(x + βs)/√(1−β) = [x + (β/2)(x + s)] + (β/2)s + O(β²)."""
    errors = []
    for T in (1000, 2000, 4000):
        schedule = linear_schedule(T, 0.1 / T, 20 / T)
        t = T // 2
        beta, rest = schedule.betas[t], schedule.one_minus_alphas_cumprod[t]
        table = ancestral(schedule, [t, t - 1, 0], variance="large", clip=False)
        x, eps = draws(N, 6), draws(N, 6, seed=1)
        s = -eps / math.sqrt(rest)
        flow_and_langevin = x + beta / 2 * (x + s) + beta / 2 * s + math.sqrt(beta)
        errors.append(float((apply(table, 0, x, eps, schedule) - flow_and_langevin).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("t", [0, 100, 999])
def test_a_row_is_the_langevin_step(t: int) -> None:
    c = 0.3
    table = SamplerTable(np.array([t]), langevin_row(PAPER, t, c)[None], np.zeros(1, np.int64))
    x, eps = draws(N, 6), draws(N, 6, seed=1)
    rest = PAPER.one_minus_alpha_bar(t)
    a = c * rest
    wanted = x + a / 2 * (-eps / math.sqrt(rest)) + math.sqrt(a)
    torch.testing.assert_close(apply(table, 0, x, eps), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("c", [0.05, 0.5, 2.0])
def test_at_one_level_the_variance_settles_where_the_bias_says(c: float) -> None:
    """v_t/(1 − a/4v_t), as a fixed point of the recursion, and run as a chain."""
    v, t, steps = 0.04, 200, 1500
    a = c * PAPER.one_minus_alpha_bar(t)
    v_t = float(marginal_variance(PAPER, v)[t])
    row = langevin_row(PAPER, t, c)
    rows = np.tile(row, (steps, 1))
    places = np.arange(steps)
    table = SamplerTable(np.full(steps, t), rows, np.full(steps, Purpose.CORRECTOR), noise=places)
    settled = v_t / (1 - a / (4 * v_t))
    assert output_variance(table, PAPER, v) == pytest.approx(settled, rel=1e-9)
    short = SamplerTable(
        table.t[:40], table.coefficients[:40], table.purpose[:40], noise=places[:40]
    )
    denoiser = GaussianDenoiser(PAPER, v, shape=(1, 64, 64))
    assert_normal(run_chain(denoiser, short), 0.0, output_variance(short, PAPER, v))


@pytest.mark.parametrize("steps", [1, 3])
def test_annealed_langevin_returns_its_closed_form(steps: int) -> None:
    v = 0.25
    table = annealed_langevin(
        PAPER, spaced_timesteps(1000, 40, "quadratic"), corrector_steps=steps, c=0.5
    )
    table.coefficients[:, COLUMNS.index("clip")] = math.inf
    denoiser = GaussianDenoiser(PAPER, v, mean=0.1, shape=(1, 64, 64))
    mean, variance = output_moments(table, denoiser)
    assert variance == pytest.approx(output_variance(table, PAPER, v), rel=1e-9)
    assert_normal(run_chain(denoiser, table), mean, variance)


def test_annealed_langevin_converges_to_the_data() -> None:
    """As the step c → 0 with the time c·K at each level growing."""
    levels = spaced_timesteps(1000, 250, "quadratic")
    for v in (0.25, 0.04):
        errors = []
        for c, K in ((0.4, 1), (0.2, 12), (0.1, 96)):
            table = annealed_langevin(PAPER, levels, corrector_steps=K, c=c, clip=False)
            errors.append(output_variance(table, PAPER, v) / v - 1)
        assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0
        assert errors[2] < 0.03


@pytest.mark.parametrize("name", ["small", "large", "ddim", "dpmpp_2m"])
def test_predictor_corrector_returns_its_closed_form(name: str) -> None:
    v = 0.25
    ts = spaced_timesteps(1000, 20, "uniform")
    base = {
        "small": lambda: ancestral(PAPER, ts, variance="small", clip=False),
        "large": lambda: ancestral(PAPER, ts, variance="large", clip=False),
        "ddim": lambda: ddim(PAPER, ts, clip=False),
        "dpmpp_2m": lambda: dpmpp_2m(PAPER, ts, clip=False),
    }[name]()
    table = with_correctors(base, PAPER, steps=2)
    assert len(table) == 20 + 19 * 2
    denoiser = GaussianDenoiser(PAPER, v, mean=-0.2, shape=(1, 64, 64))
    assert_normal(run_chain(denoiser, table), *output_moments(table, denoiser))


def test_correctors_repair_what_the_predictor_got_wrong() -> None:
    """50 steps with σ² small lose variance at every level; correctors bring it back.

    Slowly where 1−ᾱ_t is small beside the variance, since their steps are: hence K up to 50.
    """
    v, ts = 0.25, spaced_timesteps(1000, 50, "quadratic")
    base = ancestral(PAPER, ts, variance="small", clip=False)
    errors = [
        1 - output_variance(with_correctors(base, PAPER, steps=K), PAPER, v) / v for K in (0, 5, 50)
    ]
    assert errors[0] > errors[1] > errors[2] > 0
    assert errors[2] < 0.2 * errors[0]


def test_corrector_rows_stand_where_the_predictor_lands() -> None:
    ts = [900, 300, 5]
    base = ancestral(PAPER, ts, variance="small")
    table = with_correctors(base, PAPER, steps=2, c=0.2)
    assert table.t.tolist() == [900, 300, 300, 300, 5, 5, 5]
    corrector = table.purpose == Purpose.CORRECTOR
    assert corrector.tolist() == [False, True, True, False, True, True, False]
    np.testing.assert_array_equal(table.coefficients[~corrector], base.coefficients)
    np.testing.assert_array_equal(table.coefficients[1], langevin_row(PAPER, 300, 0.2))
    np.testing.assert_array_equal(table.coefficients[5], langevin_row(PAPER, 5, 0.2))
    assert np.all(np.isinf(table.coefficients[corrector, COLUMNS.index("clip")]))
    assert with_correctors(base, PAPER, steps=0) is base
    one = with_correctors(ancestral(PAPER, [5]), PAPER, steps=3)
    assert one.t.tolist() == [5]


def test_memory_ends_where_a_corrector_moves_x() -> None:
    ts = spaced_timesteps(1000, 10)
    base = dpmpp_2m(PAPER, ts, clip=False)
    assert base.depth == 1
    table = with_correctors(base, PAPER, steps=1)
    assert table.depth == 0
    predictors = table.coefficients[table.purpose == Purpose.STEP]
    np.testing.assert_allclose(  # first order is DDIM
        predictors[:, 1:], ddim(PAPER, ts, clip=False).coefficients[:, 1:], rtol=1e-7, atol=1e-9
    )


def test_rows_a_sampler_takes() -> None:
    assert len(build_table(PAPER, sampler="langevin", steps=30)) == 30
    assert len(build_table(PAPER, sampler="langevin", steps=30, corrector_steps=4)) == 120
    for sampler in ("ddpm", "ddim", "dpmpp_2m"):
        assert len(build_table(PAPER, sampler=sampler, steps=30)) == 30
        assert len(build_table(PAPER, sampler=sampler, steps=30, corrector_steps=4)) == 30 + 29 * 4


def test_bad_steps_are_refused() -> None:
    with pytest.raises(SamplerError, match="corrector_steps = 0"):
        build_table(PAPER, sampler="langevin", corrector_steps=0)
    with pytest.raises(SamplerError, match="corrector_steps = -1"):
        build_table(PAPER, corrector_steps=-1)
    with pytest.raises(SamplerError, match="c = 4"):
        langevin_row(PAPER, 3, 4.0)


@pytest.mark.parametrize("options", [{"sampler": "langevin"}, {"corrector_steps": 2}])
def test_an_image_does_not_depend_on_its_batch(options: dict[str, Any]) -> None:
    model = build_model()
    model.network.conv_out.weight.mul_(0.1)
    settings: dict[str, Any] = {
        "steps": 6,
        "seed": 3,
        "class_label": 1,
        "dtype": torch.float32,
        **options,
    }
    together = sample(model, 5, **settings)
    apart = sample(model, 5, batch_size=1, **settings)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    assert together.std() > 0.01
