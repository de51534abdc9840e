"""A trained forward process: its tables, its terms, and gradients that reach γ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from diffusion.bound import bound_table, learned_log_variance, prior_nats, transition_nats
from diffusion.forward import gather, q_sample
from diffusion.learned_schedule import LearnedSchedule
from diffusion.parameterization import to_x_start
from diffusion.schedule import Schedule, cosine_schedule, linear_schedule


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "start", [linear_schedule(), linear_schedule(30, 1e-3, 0.3), cosine_schedule(100)]
)
def test_it_starts_at_the_schedule_it_is_given(start: Schedule) -> None:
    process = LearnedSchedule(start)
    assert process.T == start.T
    np.testing.assert_allclose(process.betas(), start.betas, rtol=2e-4)
    np.testing.assert_allclose(
        process.gammas().detach().numpy(), -np.log(start.snr), rtol=1e-4, atol=1e-4
    )
    Schedule(process.betas())


def test_any_parameters_make_a_schedule() -> None:
    process = LearnedSchedule(linear_schedule(40, 1e-3, 0.3))
    with torch.no_grad():
        process.delta.copy_(draws(39) * 3)
        process.gamma_1.fill_(-4.0)
    schedule = Schedule(process.betas())
    assert np.all(np.diff(schedule.alphas_cumprod) < 0)
    assert schedule.alphas_cumprod[0] == pytest.approx(1 / (1 + np.exp(-4.0)), rel=1e-6)
    np.testing.assert_allclose(
        np.diff(-np.log(schedule.snr)), process.rises().detach().numpy(), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_terms_are_those_of_the_fixed_schedule_with_its_betas(variance: str) -> None:
    process = LearnedSchedule(linear_schedule(50, 1e-3, 0.2))
    with torch.no_grad():
        process.delta.add_(0.3 * draws(49))
    schedule = Schedule(process.betas())
    table = bound_table(schedule)
    t = torch.tensor([0, 1, 2, 25, 48, 49])
    x_start = (
        torch.randint(0, 256, (6, 1, 4, 4), generator=torch.Generator().manual_seed(1)) / 127.5 - 1
    )
    eps, v = draws(6, 1, 4, 4, seed=2), 0.5 * draws(6, 1, 4, 4, seed=4)
    eps_hat = eps + 0.2 * draws(6, 1, 4, 4, seed=3)
    x_t = process.q_sample(x_start, t, eps)
    torch.testing.assert_close(x_t, q_sample(schedule, x_start, t, eps), rtol=1e-5, atol=1e-6)
    ends: dict[str, Any] = {"small": 0.0, "large": 1.0, "learned": (v + 1) / 2}
    large = ends[variance]
    got = process.terms(x_start=x_start, x_t=x_t, t=t, eps=eps, eps_hat=eps_hat, large=large)
    if variance == "learned":
        log_variance = learned_log_variance(table, t, v)
    else:
        log_variance = gather(table.log_variance(variance), t, x_start)
    wanted = transition_nats(
        table,
        t,
        x_start=x_start,
        x_start_hat=to_x_start(schedule, "epsilon", x_t=x_t, t=t, out=eps_hat),
        log_variance=log_variance,
    )
    torch.testing.assert_close(got, wanted, rtol=2e-4, atol=1e-4)
    torch.testing.assert_close(
        process.prior(x_start), prior_nats(schedule, x_start).float(), rtol=1e-4, atol=1e-5
    )


def test_gradients_reach_gamma_by_reparameterisation() -> None:
    """Against finite differences of the whole loss, with a denoiser that depends on x_t."""
    start = linear_schedule(12, 0.02, 0.4)
    x_start = (
        torch.randint(0, 256, (12, 1, 3, 3), generator=torch.Generator().manual_seed(1)) / 127.5 - 1
    )
    x_start, eps, t = x_start.double(), draws(12, 1, 3, 3).double(), torch.arange(12)

    def loss(process: LearnedSchedule) -> torch.Tensor:
        x_t = process.q_sample(x_start, t, eps)
        terms = process.terms(
            x_start=x_start, x_t=x_t, t=t, eps=eps, eps_hat=torch.tanh(x_t), large=1.0
        )
        return terms.sum() + process.prior(x_start).sum()

    process = LearnedSchedule(start).double()
    loss(process).backward()
    for parameter, i in ((process.gamma_1, None), (process.delta, 0), (process.delta, 10)):
        found = []
        for shift in (1e-6, -1e-6):
            with torch.no_grad():
                where = parameter if i is None else parameter[i]
                before = where.clone()
                where.add_(shift)
                found.append(float(loss(process)))
                where.copy_(before)
        assert parameter.grad is not None
        slope = float(parameter.grad if i is None else parameter.grad[i])
        assert slope == pytest.approx((found[0] - found[1]) / 2e-6, rel=1e-4)
        assert abs(slope) > 1e-3
