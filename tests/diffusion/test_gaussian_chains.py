"""Whole chains on Gaussian data, where the exact denoiser gives a closed form for what comes out.

The closed form is not the data's own variance: a finite chain misses it, by a known amount.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from diffusion.multistep import dpmpp_2m, dpmpp_3m, unipc
from diffusion.noise import Purpose, image_normals
from diffusion.samplers import build_table, ddim
from diffusion.sampling import chain
from diffusion.schedule import Schedule, linear_schedule
from diffusion.table import SamplerTable
from tests.diffusion.gaussian import GaussianDenoiser, assert_normal, output_moments, run_chain

PAPER = linear_schedule()
SAMPLERS = {
    "small": {"sampler": "ddpm", "variance": "small"},
    "large": {"sampler": "ddpm", "variance": "large"},
    "ddim": {"sampler": "ddim"},
    "ddim-eta-1": {"sampler": "ddim", "eta": 1.0},
    "dpmpp_2m": {"sampler": "dpmpp_2m"},
    "dpmpp_3m": {"sampler": "dpmpp_3m"},
    "unipc": {"sampler": "unipc"},
    "dpmpp_3m-lambda": {"sampler": "dpmpp_3m", "spacing": "lambda"},
    "unipc-karras": {"sampler": "unipc", "spacing": "karras"},
}


def table_of(name: str, steps: int, schedule: Schedule = PAPER) -> SamplerTable:
    return build_table(schedule, steps=steps, clip=False, **SAMPLERS[name])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variance", "name", "ratio"),
    [
        (0.25, "small", 0.985),
        (0.25, "large", 1.003),
        (0.25, "ddim", 0.994),
        (0.04, "small", 0.963),
        (0.04, "large", 1.009),
        (0.04, "ddim", 0.985),
    ],
)
def test_variance_of_the_full_chain(variance: float, name: str, ratio: float) -> None:
    mean, found = output_moments(table_of(name, 1000), GaussianDenoiser(PAPER, variance))
    assert mean == 0
    assert found / variance == pytest.approx(ratio, abs=5e-4)


def variance_error(name: str, T: int) -> float:
    """Relative error of the output's variance, the same process being cut into T steps."""
    schedule = linear_schedule(T, 0.1 / T, 20 / T)
    _, variance = output_moments(table_of(name, T, schedule), GaussianDenoiser(schedule, 0.25))
    return abs(variance / 0.25 - 1)


@pytest.mark.parametrize("name", ["small", "large", "ddim", "ddim-eta-1"])
def test_the_error_of_first_order_samplers_falls_like_1_over_T(name: str) -> None:
    errors = [variance_error(name, T) for T in (1000, 2000, 4000)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)


def test_the_second_order_sampler_is_far_closer() -> None:
    for T in (500, 1000, 2000):
        assert variance_error("dpmpp_2m", T) < 0.05 * variance_error("ddim", T)


@pytest.mark.parametrize(("solver", "order"), [(ddim, 1), (dpmpp_2m, 2), (unipc, 3), (dpmpp_3m, 3)])
def test_the_order_of_a_solver(solver: Callable[..., SamplerTable], order: int) -> None:
    """How the error along the flow falls, from t = 900 to t = 100, begun with what is exact there.

    The corrector lifts UniPC's predictor of order 2 to order 3 (Zhao et al. 2023, theorem 3.1).
    """
    errors = [flow_error(solver, steps) for steps in (40, 80, 160)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.3)


def flow_error(solver: Callable[..., SamplerTable], steps: int) -> float:
    """Of x at t = 100, relative, for N(0, 0.25): the flow scales x as the marginal's deviation."""
    first, last = PAPER.lambda_at(900), PAPER.lambda_at(100)
    levels, indices = PAPER.half_log_snr[::-1], np.arange(PAPER.T)[::-1]
    ts = np.interp(np.linspace(first, last, steps + 1), levels, indices).tolist()
    table = solver(PAPER, ts, clip=False)
    signal = np.sqrt([PAPER.alpha_bar(t) for t in ts])
    deviation = np.sqrt(1 - 0.75 * signal**2)
    gain = 0.25 * signal / deviation**2  # x̂_0 = gain·x
    older, prev = gain[:2] * deviation[:2]
    x = deviation[2]
    for i in range(2, steps):
        _, a, b, d, _, e, f = table.coefficients[i]
        x_start = gain[i] * x
        eps = (x - signal[i] * x_start) / math.sqrt(1 - signal[i] ** 2)
        x = a * x_start + b * x + d * prev + f * older + e * eps
        older, prev = prev, x_start
    return abs(float(x) / float(deviation[-1]) - 1)


@pytest.mark.parametrize(("name", "other"), [("small", "large"), ("large", "small")])
def test_the_1000_step_chain_returns_its_closed_form(name: str, other: str) -> None:
    denoiser = GaussianDenoiser(PAPER, variance=0.04, mean=0.3)
    table = table_of(name, 1000)
    x = run_chain(denoiser, table, images=2)
    assert_normal(x, *output_moments(table, denoiser))
    # Tight enough to tell the two choices of σ² apart.
    with pytest.raises(AssertionError):
        assert_normal(x, *output_moments(table_of(other, 1000), denoiser))


@pytest.mark.parametrize("spread", [0.04, 0.25])
@pytest.mark.parametrize("name", SAMPLERS)
def test_50_step_chains_return_their_closed_form(name: str, spread: float) -> None:
    denoiser = GaussianDenoiser(PAPER, variance=spread, mean=-0.2)
    table = table_of(name, 50)
    mean, variance = output_moments(table, denoiser)
    x = run_chain(denoiser, table, seed=1)
    assert_normal(x, mean, variance)
    assert stats.kstest(x.flatten().numpy(), "norm", (mean, variance**0.5)).pvalue > 1e-3


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_chain_is_replayed_element_for_element(name: str) -> None:
    """In float64, from the documented noise: row 0 of x_T, then row t of step at index t."""
    denoiser = GaussianDenoiser(PAPER, variance=0.1, mean=0.2, shape=(1, 8, 8))
    table, indices = table_of(name, 50), torch.arange(2)

    def noise(row: int, purpose: Purpose) -> Tensor:
        return image_normals(3, indices, row=row, purpose=purpose, shape=denoiser.shape).double()

    x, prev = noise(0, Purpose.X_T), torch.zeros(2, *denoiser.shape, dtype=torch.float64)
    older = prev
    for t, time, columns in zip(table.t, table.time, table.coefficients, strict=True):
        _, a, b, d, c, e, f = columns
        found = denoiser.estimate(x, torch.tensor([time, time]))
        x = a * found.x_start + b * x + d * prev + f * older + c * noise(int(t), Purpose.STEP)
        x, prev, older = x + e * found.eps, found.x_start, prev
    drawn = run_chain(denoiser, table, images=2, seed=3)
    torch.testing.assert_close(drawn.double(), x, rtol=0, atol=2e-5)


# Branches


BRANCHED = {
    **{name: SAMPLERS[name] for name in ("small", "large", "ddim-eta-1")},
    "correctors": {"sampler": "ddpm", "variance": "small", "corrector_steps": 2},
    "langevin": {"sampler": "langevin", "corrector_steps": 3},
}


def joined(trunk: SamplerTable, rows: int, branch: SamplerTable) -> SamplerTable:
    """The first rows of one table and then another: refused if any noise is drawn twice."""
    names = ("t", "coefficients", "purpose", "spread", "noise", "memory")
    parts = {n: np.concatenate([getattr(trunk, n)[:rows], getattr(branch, n)]) for n in names}
    return SamplerTable(**parts)


def branches(name: str, other: str) -> Iterator[tuple[SamplerTable, int, SamplerTable]]:
    """A chain, and for each row a chain of another sampler that starts there."""
    trunk = build_table(PAPER, steps=20, clip=False, **BRANCHED[name])  # type: ignore[arg-type]
    for row in range(1, len(trunk)):
        t = int(trunk.t[row])
        branch = build_table(PAPER, steps=min(20, t + 1), start=t, clip=False, **BRANCHED[other])  # type: ignore[arg-type]
        yield trunk, row, branch


@pytest.mark.parametrize("other", BRANCHED)
@pytest.mark.parametrize("name", BRANCHED)
def test_a_branch_never_draws_what_its_trunk_drew(name: str, other: str) -> None:
    for trunk, row, branch in branches(name, other):
        assert len(joined(trunk, row, branch)) == row + len(branch)


@pytest.mark.parametrize("name", BRANCHED)
def test_a_branch_has_the_variance_of_an_unbroken_chain(name: str) -> None:
    """With the trunk's own seed and image indices; what is drawn twice would add up in x."""
    denoiser = GaussianDenoiser(PAPER, variance=0.25, shape=(1, 64, 64))
    indices = torch.arange(4)
    x_T = image_normals(0, indices, row=0, purpose=Purpose.X_T, shape=denoiser.shape)
    made = list(branches(name, name))
    walked = list(chain(denoiser, made[0][0], x_T, seed=0, indices=indices))  # type: ignore[arg-type]
    for trunk, row, branch in made[:: max(1, len(made) // 10)]:
        *_, last = chain(denoiser, branch, walked[row].x_t, seed=0, indices=indices)  # type: ignore[arg-type]
        assert_normal(last.x_next, *output_moments(joined(trunk, row, branch), denoiser))
