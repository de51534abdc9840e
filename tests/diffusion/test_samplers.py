from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.multistep import dpmpp_2m, dpmpp_3m, unipc
from diffusion.noise import Purpose, image_normals, normals
from diffusion.samplers import SamplingDefaults, ancestral, build_table, ddim
from diffusion.sampling import chain
from diffusion.schedule import Schedule, cosine_schedule, linear_schedule
from diffusion.spacings import INDEX_SPACINGS, LEVEL_SPACINGS, spaced_times, spaced_timesteps
from diffusion.table import (
    COLUMNS,
    DeviceTable,
    SamplerError,
    SamplerTable,
    checked_timesteps,
    clip_x_start,
    own_indices,
    update,
)
from tests.diffusion.gaussian import GaussianDenoiser
from tests.diffusion.steps import one_step

SCHEDULE = linear_schedule()
SHORT = linear_schedule(40, 0.002, 0.3)
ENDS_IN_NOISE = Schedule(np.append(SHORT.betas[:-1], 1.0))
SUBSEQUENCES = [list(range(999, -1, -1)), spaced_timesteps(1000, 10), [900, 420, 30, 3], [999]]
MULTISTEP = (dpmpp_2m, dpmpp_3m, unipc)
DETERMINISTIC = [partial(build, clip=False) for build in (ddim, *MULTISTEP)]


def column(table: SamplerTable, name: str) -> np.ndarray:
    return table.coefficients[:, COLUMNS.index(name)]


# Which timesteps


@pytest.mark.parametrize("spacing", INDEX_SPACINGS)
@pytest.mark.parametrize("T", [1, 7, 100])
def test_spaced_timesteps_descend_within_the_schedule(T: int, spacing: str) -> None:
    for steps in range(1, T + 1):
        ts = spaced_timesteps(T, steps, spacing)
        assert len(ts) == steps
        assert checked_timesteps(T, ts) == ts
        if spacing in ("uniform", "quadratic", "trailing"):
            assert ts[0] == T - 1
        if spacing == "leading" or (spacing in ("uniform", "quadratic") and steps > 1):
            assert ts[-1] == 0


def test_all_steps_are_the_papers_chain() -> None:
    for spacing in INDEX_SPACINGS:
        assert spaced_timesteps(1000, 1000, spacing) == list(range(999, -1, -1))


def test_spacings_by_hand() -> None:
    assert spaced_timesteps(1000, 5, "uniform") == [999, 749, 500, 250, 0]
    assert spaced_timesteps(1000, 5, "quadratic") == [999, 562, 250, 62, 0]
    assert spaced_timesteps(1000, 5, "leading") == [800, 600, 400, 200, 0]
    assert spaced_timesteps(1000, 5, "trailing") == [999, 799, 599, 399, 199]


@pytest.mark.parametrize("spacing", LEVEL_SPACINGS)
@pytest.mark.parametrize("schedule", [SCHEDULE, SHORT, ENDS_IN_NOISE], ids=["paper", "40", "lost"])
def test_spacings_by_level_are_real_numbers_with_both_ends(
    schedule: Schedule, spacing: str
) -> None:
    for steps in range(1, schedule.T + 1, 1 + schedule.T // 50):
        times = spaced_times(schedule, steps, spacing)
        assert len(times) == steps
        assert checked_timesteps(schedule.T, times) == times
        assert times[0] == schedule.T - 1
        assert steps == 1 or times[-1] == 0
        indices = own_indices(times)
        assert checked_timesteps(schedule.T, indices) == indices


def test_spacings_by_level_are_even_in_what_they_say() -> None:
    levels = [SCHEDULE.lambda_at(t) for t in spaced_times(SCHEDULE, 12, "lambda")]
    np.testing.assert_allclose(np.diff(levels), np.diff(levels)[0], rtol=1e-9)
    roots = np.exp([-SCHEDULE.lambda_at(t) / 7 for t in spaced_times(SCHEDULE, 12, "karras")])
    np.testing.assert_allclose(np.diff(roots), np.diff(roots)[0], rtol=1e-9)
    # Below the t of another chain's state the rule is the same.
    assert spaced_times(SCHEDULE, 5, "lambda", T=400)[0] == 399
    # From no signal at all there is no way by equal parts.
    lost = spaced_times(ENDS_IN_NOISE, 5, "lambda")
    assert lost[:2] == [39, 38]
    levels = [ENDS_IN_NOISE.lambda_at(t) for t in lost[1:]]
    np.testing.assert_allclose(np.diff(levels, 2), 0, atol=1e-9)


def test_each_time_has_an_index_of_its_own_the_nearest_if_it_is_free() -> None:
    assert own_indices([999.0, 30.2, 0.0]) == [999, 30, 0]
    assert own_indices([7.4, 6.6, 6.5, 0.9, 0.6, 0.1]) == [7, 6, 5, 2, 1, 0]
    table = dpmpp_2m(SCHEDULE, [7.5, 3.0, 2.8])
    assert table.t.tolist() == [8, 3, 2]
    assert table.time.tolist() == [7.5, 3.0, 2.8]
    assert table.between.tolist() == [True, False, True]


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(SamplerError, match=rf"steps = {steps}: must be 1\.\.1000"):
        spaced_timesteps(1000, steps)


@pytest.mark.parametrize("ts", [[], [3, 3], [1, 2], [1000], [5, -1]])
def test_timesteps_that_do_not_descend_within_the_schedule_are_refused(ts: list[int]) -> None:
    for build in (ancestral, ddim, *MULTISTEP):
        with pytest.raises(SamplerError, match=r"strictly descending within 0\.\.999"):
            build(SCHEDULE, ts)


# Ancestral sampling


@pytest.mark.parametrize("variance", ["large", "small"])
def test_the_full_ancestral_chain_is_algorithm_2(variance: str) -> None:
    table = ancestral(SCHEDULE, range(999, -1, -1), variance=variance, clip=False)
    x, eps, z = torch.randn(3, 1000, 5, dtype=torch.float64).unbind(0)
    _, found = one_step(SCHEDULE, table, torch.arange(1000), x, eps, z=z)
    for i, t in enumerate(range(999, -1, -1)):
        beta, rest = SCHEDULE.betas[t], SCHEDULE.one_minus_alphas_cumprod[t]
        mean = (x[i] - beta / math.sqrt(rest) * eps[i]) / math.sqrt(1 - beta)
        sigma2 = beta if variance == "large" else SCHEDULE.posterior_variance[t]
        wanted = mean + (math.sqrt(sigma2) * z[i] if t > 0 else 0)
        torch.testing.assert_close(found[i], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ts", SUBSEQUENCES, ids=len)
def test_ancestral_rows_are_posteriors_of_the_jumps(ts: list[int]) -> None:
    large, small = (ancestral(SCHEDULE, ts, variance=v) for v in ("large", "small"))
    assert large.t.tolist() == ts
    for i, (t, s) in enumerate(pairwise(ts)):
        jump = SCHEDULE.jump(t, s)
        assert column(large, "a")[i] == column(small, "a")[i] == jump.coef_x_start
        assert column(large, "b")[i] == jump.coef_x_t
        assert column(large, "c")[i] ** 2 == pytest.approx(jump.beta)
        assert column(small, "c")[i] ** 2 == pytest.approx(jump.variance)
    assert np.all(column(small, "c") <= column(large, "c"))


@pytest.mark.parametrize("ts", SUBSEQUENCES, ids=len)
def test_every_last_row_lands_on_the_image_without_noise(ts: list[int]) -> None:
    tables = [ancestral(SCHEDULE, ts), ddim(SCHEDULE, ts, eta=1.0)]
    tables += [build(SCHEDULE, ts) for build in MULTISTEP]
    for table in tables:
        a, *others = table.coefficients[-1, 1:]
        assert a == pytest.approx(1, abs=1e-12)
        assert others == pytest.approx([0, 0, 0, 0, 0], abs=1e-12)


def test_how_far_back_the_samplers_look() -> None:
    ts = spaced_timesteps(1000, 10)
    assert ancestral(SCHEDULE, ts).depth == ddim(SCHEDULE, ts).depth == 0
    assert dpmpp_2m(SCHEDULE, ts).depth == 1
    assert dpmpp_3m(SCHEDULE, ts).depth == unipc(SCHEDULE, ts).depth == 2


# DDIM and DPM-Solver++


@pytest.mark.parametrize("ts", SUBSEQUENCES, ids=len)
def test_ddim_with_eta_1_is_ancestral_sampling_with_the_small_variance(ts: list[int]) -> None:
    wanted = ancestral(SCHEDULE, ts, variance="small").coefficients
    found = ddim(SCHEDULE, ts, eta=1.0).coefficients
    np.testing.assert_allclose(found, wanted, rtol=1e-7, atol=1e-9)


def test_the_noise_of_ddim_grows_with_eta() -> None:
    ts = spaced_timesteps(1000, 20)
    none, half, full = (column(ddim(SCHEDULE, ts, eta=eta), "c") for eta in (0.0, 0.5, 1.0))
    assert not none.any()
    np.testing.assert_allclose(half, full / 2)


def test_first_order_dpm_solver_is_ddim() -> None:
    ts = [800, 500, 100]
    np.testing.assert_allclose(
        dpmpp_2m(SCHEDULE, ts).coefficients[0], ddim(SCHEDULE, ts).coefficients[0], atol=1e-12
    )


def test_dpm_solver_extrapolates_in_log_snr() -> None:
    """Algorithm 2 of its paper, written out for the second row."""
    ts = [800, 500, 100]
    bars = [SCHEDULE.alphas_cumprod[t] for t in ts]
    lam = [math.log(math.sqrt(b) / math.sqrt(1 - b)) for b in bars]
    h, r = lam[2] - lam[1], (lam[1] - lam[0]) / (lam[2] - lam[1])
    gain = -math.sqrt(bars[2]) * (math.exp(-h) - 1)
    a, b, d, c, e, f = dpmpp_2m(SCHEDULE, ts).coefficients[1, 1:]
    assert a == pytest.approx(gain * (1 + 1 / (2 * r)), rel=1e-9)
    assert d == pytest.approx(-gain / (2 * r), rel=1e-9)
    assert b == pytest.approx(math.sqrt((1 - bars[2]) / (1 - bars[1])), rel=1e-9)
    assert c == e == f == 0


@pytest.mark.parametrize("schedule", [SCHEDULE, cosine_schedule()], ids=["linear", "cosine"])
@pytest.mark.parametrize("ts", SUBSEQUENCES, ids=len)
@pytest.mark.parametrize("build", DETERMINISTIC, ids=["ddim", "dpmpp_2m", "dpmpp_3m", "unipc"])
def test_deterministic_samplers_are_exact_for_a_single_image(
    build: object, ts: list[int], schedule: Schedule
) -> None:
    """With data at one point the path is √ᾱ x_0 + √(1−ᾱ) ε with one ε, whatever the steps."""
    table = build(schedule, ts)  # type: ignore[operator]
    x_0, eps = torch.randn(2, 1, 6, dtype=torch.float64).unbind(0)

    def on_path(t: int) -> Tensor:
        return (
            math.sqrt(schedule.alpha_bar(t)) * x_0
            + math.sqrt(schedule.one_minus_alpha_bar(t)) * eps
        )

    x, found = on_path(ts[0]), [torch.zeros_like(x_0)] * 2
    for i, s in enumerate([*ts[1:], -1]):
        earlier = {"x_start_prev": found[-1], "x_start_older": found[-2]}
        x_start, x = one_step(schedule, table, i, x, eps, **earlier)
        found.append(x_start)
        torch.testing.assert_close(x, on_path(s), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("eta", [-0.1, 1.5, math.nan])
def test_eta_out_of_range_is_refused(eta: float) -> None:
    with pytest.raises(SamplerError, match=r"eta = .*: must be 0..1"):
        ddim(SCHEDULE, [5, 0], eta=eta)


def test_unknown_variances_are_refused() -> None:
    with pytest.raises(SamplerError, match="variance = 'medium': must be one of large, small"):
        ancestral(SCHEDULE, [5, 0], variance="medium")


# Clipping


def test_clipping_bounds_the_image_and_redirects_ddim() -> None:
    ts = [600, 300]
    x, eps = torch.tensor([[1.5, -0.2]]), torch.tensor([[-2.0, 0.1]])
    x_start, found = one_step(SCHEDULE, ddim(SCHEDULE, ts), 0, x, eps)
    unclipped, _ = one_step(SCHEDULE, ddim(SCHEDULE, ts, clip=False), 0, x, eps)
    assert unclipped[0, 0] > 1
    assert torch.equal(x_start, unclipped.clamp(-1, 1))
    bar_t, bar_s = SCHEDULE.alphas_cumprod[ts]
    eps_clipped = (x - math.sqrt(bar_t) * x_start) / math.sqrt(1 - bar_t)
    wanted = math.sqrt(bar_s) * x_start + math.sqrt(1 - bar_s) * eps_clipped
    torch.testing.assert_close(found, wanted)
    # By diffusers' convention ε̂ stays the network's own.
    x_start, found = one_step(SCHEDULE, ddim(SCHEDULE, ts, rederive_eps=False), 0, x, eps)
    wanted = math.sqrt(bar_s) * x_start + math.sqrt(1 - bar_s) * eps
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_without_clipping_the_two_conventions_of_ddim_agree(eta: float) -> None:
    ts = [900, 600, 300, 0]
    x, eps = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tables = [ddim(SCHEDULE, ts, eta=eta, clip=False, rederive_eps=r) for r in (True, False)]
    for row in range(4):
        found = [one_step(SCHEDULE, table, row, x, eps, z=x)[1] for table in tables]
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_a_ddim_step_lands_where_it_is_told() -> None:
    table = ddim(SCHEDULE, [900, 600, 300], clip=False, landing="stride", stride=250)
    x_0, eps = torch.randn(2, 1, 6, dtype=torch.float64).unbind(0)
    for row, (t, s) in enumerate([(900, 650), (600, 350), (300, 50)]):
        bars = [SCHEDULE.alphas_cumprod[k] for k in (t, s)]
        x, wanted = (math.sqrt(bar) * x_0 + math.sqrt(1 - bar) * eps for bar in bars)
        torch.testing.assert_close(one_step(SCHEDULE, table, row, x, eps)[1], wanted)


@pytest.mark.parametrize("spacing", [*INDEX_SPACINGS, *LEVEL_SPACINGS])
@pytest.mark.parametrize(("start", "steps"), [(999, 20), (700, 7), (500, 1)])
def test_a_chain_from_an_x_t_leaves_it_for_its_second_timestep(
    start: int, steps: int, spacing: str
) -> None:
    """The t of an x_t is not of the spacing: a stride from there would miss what is read next."""
    options: dict[str, Any] = {"spacing": spacing, "steps": steps, "start": start, "clip": False}
    stride = build_table(SCHEDULE, sampler="ddim", landing="stride", **options)
    following = build_table(SCHEDULE, sampler="ddim", landing="next", **options)
    np.testing.assert_array_equal(stride.coefficients[0], following.coefficients[0])
    if spacing == "leading":  # then every stride leads to the next
        np.testing.assert_array_equal(stride.coefficients, following.coefficients)


# One fused update for a mixed batch


def test_a_mixed_batch_steps_like_separate_chains() -> None:
    """Samples of four samplers, seeds and starts share each network call; nothing else changes."""
    ts = spaced_timesteps(SHORT.T, 12)
    tables = [
        ancestral(SHORT, spaced_timesteps(SHORT.T, SHORT.T), variance="small"),
        ancestral(SHORT, ts, variance="large", clip=False),
        ddim(SHORT, spaced_timesteps(SHORT.T, 7, "quadratic"), eta=0.5),
        dpmpp_2m(SHORT, ts),
    ]
    denoiser = GaussianDenoiser(SHORT, variance=0.2, mean=0.3, shape=(1, 4, 4))
    seeds, joins = [5, 2**50, 5, 1], [0, 3, 1, 10]  # the tick at which each joins
    wanted = []
    for table, seed in zip(tables, seeds, strict=True):
        x = image_normals(seed, torch.tensor([2]), row=0, purpose=Purpose.X_T, shape=(1, 4, 4))
        *_, last = chain(denoiser, table, x, seed=seed, indices=torch.tensor([2]))  # type: ignore[arg-type]
        wanted.append(last.x_next)

    device = DeviceTable.of(tables, "cpu")
    starts = np.cumsum([0, *map(len, tables)])
    x = normals(
        torch.tensor(seeds),
        torch.full((4,), 2),
        rows=torch.zeros(4, dtype=torch.long),
        purpose=Purpose.X_T,
        shape=(1, 4, 4),
    )
    x_start_prev, row = torch.zeros_like(x), torch.zeros(4, dtype=torch.long)
    lengths = torch.tensor([len(table) for table in tables])
    for tick in range(60):
        active = torch.tensor([tick >= j for j in joins]) & (row < lengths)
        at = torch.nonzero(active)[:, 0]
        if at.numel() == 0:
            continue
        in_table = torch.from_numpy(starts[:-1])[at] + row[at]
        rows = device.coefficients[in_table]
        found = denoiser.estimate(x[at], device.t[in_table])
        z = normals(
            torch.tensor(seeds)[at],
            torch.full((len(at),), 2),
            rows=device.noise[in_table],
            purpose=device.purpose[in_table],
            shape=(1, 4, 4),
        )
        x_start = clip_x_start(rows, found.x_start)
        x[at] = update(
            rows, x[at], x_start=x_start, eps=found.eps, x_start_prev=x_start_prev[at], z=z
        )
        x_start_prev[at] = x_start
        row[at] += 1
    assert torch.equal(row, lengths)
    assert torch.equal(x, torch.cat(wanted))


# What a model's config may ask for


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampler": "euler"}, "sampler = 'euler': must be one of ddpm, ddim, dpmpp_2m"),
        ({"variance": "medium"}, "variance = 'medium': must be one of large, small, learned"),
        ({"spacing": "log"}, "spacing = 'log': must be one of uniform, quadratic"),
        ({"landing": "far"}, "landing = 'far': must be one of next, stride"),
        ({"clip": "no"}, "clip = 'no': must be true or false"),
        ({"rederive_eps": 1}, "rederive_eps = 1: must be true or false"),
    ],
)
def test_unknown_defaults_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(SamplerError, match=message):
        SamplingDefaults(**fields)  # type: ignore[arg-type]
