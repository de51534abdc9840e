from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from diffusion import forward
from diffusion.forward import gather, q_posterior, q_sample, q_samples_at, q_step, q_trajectory
from diffusion.noise import Purpose, image_normals, normals
from diffusion.schedule import Schedule, linear_schedule

SCHEDULE = linear_schedule(50, 0.001, 0.2)


def test_gather_picks_a_value_for_each_image() -> None:
    like = torch.zeros(3, 2, 4, 4)
    out = gather(np.array([1.0, 2.0, 3.0]), torch.tensor([2, 0, 2]), like)
    assert out.shape == (3, 1, 1, 1)
    assert out.dtype == like.dtype
    assert out.flatten().tolist() == [3.0, 1.0, 3.0]
    assert gather(SCHEDULE.betas, torch.tensor([49]), like).item() == pytest.approx(0.2)


def test_q_sample_mixes_signal_and_noise() -> None:
    x_start, eps = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64).unbind(0)
    t = torch.tensor([0, 49, 7])
    x_t = q_sample(SCHEDULE, x_start, t, eps)
    for i, index in enumerate(t.tolist()):
        alpha_bar = math.prod(1 - b for b in SCHEDULE.betas[: index + 1])
        wanted = math.sqrt(alpha_bar) * x_start[i] + math.sqrt(1 - alpha_bar) * eps[i]
        torch.testing.assert_close(x_t[i], wanted, rtol=1e-12, atol=1e-12)


def test_q_samples_at_shares_one_noise() -> None:
    x_start, eps = torch.randn(2, 2, 1, 4, 4).unbind(0)
    for t, x_t in q_samples_at(SCHEDULE, x_start, [3, 40], eps):
        assert torch.equal(x_t, q_sample(SCHEDULE, x_start, torch.tensor([t, t]), eps))


def test_q_step_is_one_step_of_the_chain() -> None:
    x, z = torch.randn(2, 2, 1, 2, 2, dtype=torch.float64).unbind(0)
    out = q_step(SCHEDULE, x, torch.tensor([0, 30]), z)
    for i, index in enumerate((0, 30)):
        beta = SCHEDULE.betas[index]
        torch.testing.assert_close(out[i], math.sqrt(1 - beta) * x[i] + math.sqrt(beta) * z[i])


def test_the_trajectory_takes_its_noise_from_seed_image_and_step() -> None:
    x_start = torch.randn(2, 1, 4, 4)
    seeds, indices = torch.tensor([5, 6]), torch.tensor([0, 9])
    chain = dict(q_trajectory(SCHEDULE, x_start, seeds=seeds, indices=indices, stop=3))
    assert list(chain) == [0, 1, 2]
    rows = torch.tensor([1, 1])
    z = normals(seeds, indices, rows=rows, purpose=Purpose.Q_SAMPLE, shape=(1, 4, 4))
    assert torch.equal(chain[1], q_step(SCHEDULE, chain[0], rows, z))
    alone = dict(q_trajectory(SCHEDULE, x_start[1:], seeds=seeds[1:], indices=indices[1:], stop=3))
    assert torch.equal(chain[2][1:], alone[2])


def test_the_whole_trajectory_has_T_steps() -> None:
    x = torch.zeros(1, 1, 2, 2)
    zero = torch.zeros(1, dtype=torch.long)
    assert [t for t, _ in q_trajectory(SCHEDULE, x, seeds=zero, indices=zero)] == list(range(50))


@pytest.mark.parametrize("t", [0, 9, 49])
def test_stepwise_chain_and_closed_form_agree_in_distribution(t: int) -> None:
    x_0, shape = 0.7, (1, 128, 128)
    zero = torch.zeros(1, dtype=torch.long)
    x_start = torch.full((1, *shape), x_0)
    *_, (_, stepwise) = q_trajectory(SCHEDULE, x_start, seeds=zero, indices=zero, stop=t + 1)
    eps = image_normals(1, zero, row=0, purpose=Purpose.Q_SAMPLE, shape=shape)
    closed = q_sample(SCHEDULE, x_start, torch.tensor([t]), eps)
    alpha_bar = SCHEDULE.alphas_cumprod[t]
    wanted = stats.norm(math.sqrt(alpha_bar) * x_0, math.sqrt(1 - alpha_bar))
    for x_t in (stepwise, closed):
        assert stats.kstest(x_t.flatten().numpy(), wanted.cdf).pvalue > 1e-3
    assert stats.ks_2samp(stepwise.flatten().numpy(), closed.flatten().numpy()).pvalue > 1e-3


def test_the_chain_is_markov_with_the_right_correlation() -> None:
    """cov(x_s, x_t | x_0) = √(ᾱ_t/ᾱ_s)(1 − ᾱ_s), which no two closed-form draws would have."""
    shape, zero = (1, 128, 128), torch.zeros(1, dtype=torch.long)
    chain = dict(q_trajectory(SCHEDULE, torch.zeros(1, *shape), seeds=zero, indices=zero, stop=30))
    early, late = chain[9].double().flatten(), chain[29].double().flatten()
    bar_s, bar_t = SCHEDULE.alphas_cumprod[9], SCHEDULE.alphas_cumprod[29]
    wanted = math.sqrt(bar_t / bar_s) * (1 - bar_s)
    error = math.sqrt(((1 - bar_s) * (1 - bar_t) + wanted**2) / early.numel())
    assert abs((early * late).mean().item() - wanted) < 4 * error


@pytest.mark.parametrize(("t", "s"), [(30, 29), (30, 4), (12, -1)])
def test_the_posterior_is_what_the_forward_chain_leaves(t: int, s: int) -> None:
    """Regress x_s on x_t over forward draws from one x_0: slope, offset and residual variance."""
    n, x_0 = 200_000, -0.6
    rng = np.random.default_rng(0)
    bar_s, bar_t = SCHEDULE.alpha_bar(s), SCHEDULE.alpha_bar(t)
    x_s = math.sqrt(bar_s) * x_0 + math.sqrt(1 - bar_s) * rng.standard_normal(n)
    ratio = bar_t / bar_s
    x_t = math.sqrt(ratio) * x_s + math.sqrt(1 - ratio) * rng.standard_normal(n)
    image = torch.full((1, 1), x_0, dtype=torch.float64)
    mean, variance = q_posterior(SCHEDULE, image, torch.from_numpy(x_t)[:, None], t=t, s=s)
    residual = x_s - mean[:, 0].numpy()
    assert abs(residual.mean()) <= 4 * math.sqrt(variance / n) + 1e-12
    assert abs(np.dot(residual, x_t - x_t.mean())) <= 4 * math.sqrt(n * variance) + 1e-9
    assert residual.var() == pytest.approx(variance, rel=4 * math.sqrt(2 / n), abs=1e-20)


def test_the_posterior_mean_at_the_image_is_the_image() -> None:
    x_start, x_t = torch.randn(2, 1, 1, 4, 4, dtype=torch.float64).unbind(0)
    mean, variance = q_posterior(Schedule(np.array([0.1, 0.4])), x_start, x_t, t=1, s=-1)
    torch.testing.assert_close(mean, x_start)
    assert variance == 0


def test_a_table_that_nobody_can_write_to_is_sent_to_a_device_once() -> None:
    like, t = torch.zeros(1, 1), torch.tensor([1])
    schedule = linear_schedule(5)
    kept = len(forward._on_devices)
    for _ in range(3):
        gather(schedule.alphas_cumprod, t, like)
    assert len(forward._on_devices) == kept + 1
    free = np.array([1.0, 2.0])
    assert gather(free, t, like).item() == 2.0
    free[1] = 3.0
    assert gather(free, t, like).item() == 3.0 and len(forward._on_devices) == kept + 1
    with pytest.raises(ValueError, match="read-only"):
        schedule.alphas_cumprod[0] = 0.5
    del schedule
    assert len(forward._on_devices) == kept
