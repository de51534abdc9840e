from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.forward import q_posterior, q_sample
from diffusion.parameterization import (
    PREDICTIONS,
    PredictionError,
    eps_coefficients,
    target,
    to_eps,
    to_x_start,
    x_start_coefficients,
)
from diffusion.schedule import Schedule, cosine_schedule, linear_schedule

SCHEDULES = [linear_schedule(), cosine_schedule(40)]


def draw(schedule: Schedule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_0, ε, t and x_t at every tenth index, in float64."""
    t = torch.arange(0, schedule.T, 10)
    generator = torch.Generator().manual_seed(0)
    x_start, eps = torch.randn(2, len(t), 1, 3, 3, dtype=torch.float64, generator=generator)
    return x_start, eps, t, q_sample(schedule, x_start, t, eps)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_output_gives_back_image_and_noise(schedule: Schedule, prediction: str) -> None:
    x_start, eps, t, x_t = draw(schedule)
    out = target(schedule, prediction, x_start=x_start, x_t=x_t, t=t)
    found = to_x_start(schedule, prediction, x_t=x_t, t=t, out=out)
    torch.testing.assert_close(found, x_start, rtol=1e-8, atol=1e-8)
    found = to_eps(schedule, prediction, x_t=x_t, t=t, out=out)
    torch.testing.assert_close(found, eps, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_any_output_gives_an_image_and_a_noise_that_make_x_t(prediction: str) -> None:
    schedule = SCHEDULES[0]
    _, out, t, x_t = draw(schedule)
    x_start = to_x_start(schedule, prediction, x_t=x_t, t=t, out=out)
    eps = to_eps(schedule, prediction, x_t=x_t, t=t, out=out)
    torch.testing.assert_close(q_sample(schedule, x_start, t, eps), x_t, rtol=1e-9, atol=1e-9)


def test_targets_are_the_papers_quantities() -> None:
    schedule = SCHEDULES[0]
    x_start, eps, t, x_t = draw(schedule)
    for i, index in enumerate(t.tolist()):
        one = {"x_start": x_start[i : i + 1], "x_t": x_t[i : i + 1], "t": t[i : i + 1]}
        bar = schedule.alphas_cumprod[index]
        mean, _ = q_posterior(schedule, x_start[i], x_t[i], t=index, s=index - 1)
        wanted = {
            "epsilon": eps[i],
            "sample": x_start[i],
            "v": math.sqrt(bar) * eps[i] - math.sqrt(1 - bar) * x_start[i],
            "mean": mean,
        }
        for prediction, value in wanted.items():
            found = target(schedule, prediction, **one)[0]
            torch.testing.assert_close(found, value, rtol=1e-7, atol=1e-7)


def test_an_eps_output_is_not_touched() -> None:
    e_x, e_out = eps_coefficients(SCHEDULES[0], "epsilon")
    assert np.all(e_x == 0)
    assert np.all(e_out == 1)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(PredictionError, match="prediction = 'x0': must be one of epsilon, sample"):
        x_start_coefficients(SCHEDULES[0], "x0")


def test_eps_is_refused_where_the_last_step_leaves_no_signal() -> None:
    schedule = Schedule(np.array([0.1, 1.0]))
    with pytest.raises(PredictionError, match="prediction = 'epsilon'"):
        x_start_coefficients(schedule, "epsilon")
    for prediction in ("sample", "v", "mean"):
        assert np.isfinite(x_start_coefficients(schedule, prediction)).all()
