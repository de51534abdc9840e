from __future__ import annotations

import dataclasses
import json
import math
from fractions import Fraction

import numpy as np
import pytest

from diffusion.schedule import (
    Schedule,
    ScheduleConfig,
    ScheduleError,
    cosine_schedule,
    linear_schedule,
)

SCHEDULES = {
    "linear": linear_schedule(),
    "cosine": cosine_schedule(),
    "short": linear_schedule(7, 0.01, 0.6),
    "listed": Schedule(np.array([0.3, 0.01, 0.5, 0.2])),
}
JUMPS = [(1, 0), (3, 2), (3, 0), (2, -1), (0, -1)]


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return SCHEDULES[request.param]


def test_the_papers_schedule_in_exact_arithmetic() -> None:
    schedule = linear_schedule()
    assert (schedule.T, schedule.betas[0], schedule.betas[-1]) == (1000, 1e-4, 0.02)
    np.testing.assert_allclose(np.diff(schedule.betas), (0.02 - 1e-4) / 999, rtol=1e-9)
    exact, wanted = Fraction(1), {}
    for i, beta in enumerate(schedule.betas[:200]):
        exact *= 1 - Fraction(float(beta))
        wanted[i] = exact
    for i in (0, 1, 99, 199):
        assert schedule.alphas_cumprod[i] == pytest.approx(float(wanted[i]), rel=1e-13)
        # Relative accuracy where 1 − ᾱ is small is what a plain subtraction would lose.
        rest = schedule.one_minus_alphas_cumprod[i]
        assert rest == pytest.approx(float(1 - wanted[i]), rel=1e-13)
    final = math.exp(math.fsum(math.log1p(-b) for b in schedule.betas))
    assert schedule.alphas_cumprod[-1] == pytest.approx(final, rel=1e-12)
    assert final == pytest.approx(4.036e-5, rel=1e-3)


def test_the_cosine_schedule_follows_its_formula() -> None:
    schedule = cosine_schedule(1000)

    def f(t: int) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (1, 10, 500, 990):
        assert schedule.alphas_cumprod[t - 1] == pytest.approx(f(t) / f(0), rel=1e-9)
    assert schedule.betas[-1] == 0.999  # where the formula says 1
    assert schedule.betas[-2] == pytest.approx(1 - f(999) / f(998), rel=1e-9)


def test_tables_are_monotone_and_agree(schedule: Schedule) -> None:
    assert np.all(np.diff(schedule.alphas_cumprod) < 0)
    assert np.all(np.diff(schedule.snr) < 0)
    assert np.all(schedule.posterior_variance <= schedule.betas)
    assert np.all(schedule.posterior_variance[1:] > 0)
    assert schedule.posterior_variance[0] == 0
    np.testing.assert_allclose(schedule.alphas_cumprod + schedule.one_minus_alphas_cumprod, 1)
    np.testing.assert_array_equal(schedule.alphas_cumprod_prev[1:], schedule.alphas_cumprod[:-1])
    assert schedule.alphas_cumprod_prev[0] == schedule.alpha_bar(-1) == 1
    assert schedule.one_minus_alpha_bar(-1) == 0


def test_the_clipped_log_variance_repeats_its_second_value(schedule: Schedule) -> None:
    clipped = schedule.posterior_log_variance_clipped
    np.testing.assert_allclose(np.exp(clipped[1:]), schedule.posterior_variance[1:])
    assert clipped[0] == clipped[1]
    assert Schedule(np.array([0.2])).posterior_log_variance_clipped == math.log(0.2)


def test_a_jump_of_one_step_is_the_papers_posterior(schedule: Schedule) -> None:
    for t in range(1, schedule.T, max(1, schedule.T // 20)):
        jump = schedule.jump(t, t - 1)
        beta, rest = schedule.betas[t], schedule.one_minus_alphas_cumprod[t]
        rest_prev = schedule.one_minus_alphas_cumprod[t - 1]
        assert jump.beta == pytest.approx(beta, rel=1e-12)
        assert jump.variance == pytest.approx(schedule.posterior_variance[t], rel=1e-12)
        signal_prev = math.sqrt(schedule.alphas_cumprod[t - 1])
        assert jump.coef_x_start == pytest.approx(signal_prev * beta / rest, rel=1e-12)
        assert jump.coef_x_t == pytest.approx(math.sqrt(1 - beta) * rest_prev / rest, rel=1e-12)


@pytest.mark.parametrize(("t", "s"), JUMPS)
def test_a_jump_keeps_the_marginals(schedule: Schedule, t: int, s: int) -> None:
    """x_t ~ q(x_t | x_0) followed by x_s ~ q(x_s | x_t, x_0) must be x_s ~ q(x_s | x_0)."""
    jump = schedule.jump(t, s)
    signal_t, signal_s = math.sqrt(schedule.alpha_bar(t)), math.sqrt(schedule.alpha_bar(s))
    assert jump.coef_x_start + jump.coef_x_t * signal_t == pytest.approx(signal_s, rel=1e-12)
    variance = jump.coef_x_t**2 * schedule.one_minus_alpha_bar(t) + jump.variance
    assert variance == pytest.approx(schedule.one_minus_alpha_bar(s), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("t", "s"), [(1, 0), (3, 2), (3, 0)])
def test_a_jump_is_bayes_rule(schedule: Schedule, t: int, s: int) -> None:
    """q(x_s | x_t, x_0) ∝ q(x_t | x_s) q(x_s | x_0): precisions and weighted means add."""
    jump = schedule.jump(t, s)
    alpha = schedule.alpha_bar(t) / schedule.alpha_bar(s)
    rest_s = schedule.one_minus_alpha_bar(s)
    precision = alpha / (1 - alpha) + 1 / rest_s
    assert jump.beta == pytest.approx(1 - alpha, rel=1e-9)
    assert jump.variance == pytest.approx(1 / precision, rel=1e-9)
    coef_x_t = math.sqrt(alpha) / (1 - alpha) / precision
    assert jump.coef_x_t == pytest.approx(coef_x_t, rel=1e-9)
    coef_x_start = math.sqrt(schedule.alpha_bar(s)) / rest_s / precision
    assert jump.coef_x_start == pytest.approx(coef_x_start, rel=1e-9)


@pytest.mark.parametrize(("t", "s"), [(2, 2), (1, 3), (4, 0), (0, -2)])
def test_impossible_jumps_are_refused(t: int, s: int) -> None:
    with pytest.raises(ScheduleError, match=r"t = |s = "):
        SCHEDULES["listed"].jump(t, s)


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([], r"betas: must be a non-empty list"),
        ([[0.1]], r"betas: .* shape \(1, 1\)"),
        ([0.1, 0.0], r"betas\[1\] = 0.0: must lie between 0 and 1"),
        ([0.1, -0.2, 0.1], r"betas\[1\] = -0.2"),
        ([1.0, 0.5], r"betas\[0\] = 1.0"),
        ([0.5, math.nan], r"betas\[1\] = nan"),
    ],
)
def test_betas_that_are_none_are_refused(betas: list[float], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule(np.array(betas))


def test_the_last_beta_may_be_one() -> None:
    schedule = Schedule(np.array([0.1, 0.5, 1.0]))
    assert schedule.alphas_cumprod[-1] == 0
    assert schedule.one_minus_alphas_cumprod[-1] == 1
    assert schedule.jump(2, 0).beta == 1


def test_betas_are_a_private_read_only_copy() -> None:
    betas = np.array([0.1, 0.2])
    schedule = Schedule(betas)
    betas[0] = 0.9
    assert schedule.betas[0] == 0.1
    with pytest.raises(ValueError, match="read-only"):
        schedule.betas[0] = 0.5


@pytest.mark.parametrize(
    "config",
    [
        ScheduleConfig(),
        ScheduleConfig(T=10, beta_start=0.01, beta_end=0.3),
        ScheduleConfig("cosine", T=20),
        ScheduleConfig.from_betas([0.1, 0.2, 0.3]),
    ],
)
def test_a_config_survives_json(config: ScheduleConfig) -> None:
    back = ScheduleConfig(**json.loads(json.dumps(config.to_dict())))
    assert back == config
    np.testing.assert_array_equal(back.build().betas, config.build().betas)
    assert config.build().T == config.T


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "sigmoid"}, "kind = 'sigmoid': must be one of linear, cosine, betas"),
        ({"kind": "betas"}, "betas: must be given with kind = 'betas'"),
        ({"kind": "linear", "betas": (0.1,)}, "betas: must be given with kind = 'betas'"),
        ({"kind": "betas", "T": 3, "betas": (0.1, 0.2)}, "T = 3: must be the number of betas, 2"),
    ],
)
def test_contradictory_configs_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        ScheduleConfig(**fields)  # type: ignore[arg-type]


def test_only_the_last_step_may_leave_no_signal() -> None:
    assert Schedule(np.array([0.5, 0.5, 1.0])).alphas_cumprod[-1] == 0
    with pytest.raises(ScheduleError, match="betas: ᾱ_t is 0 from t = 108 on, in double precision"):
        Schedule(np.full(200, 0.999))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_schedule_has_at_least_one_step(kind: str) -> None:
    with pytest.raises(ScheduleError, match=r"T = 0: must be an integer 1\.\.10000"):
        dataclasses.replace(ScheduleConfig(kind), T=0).build()


def test_betas_may_be_an_array() -> None:
    betas = np.linspace(1e-3, 0.2, 10)
    assert ScheduleConfig(kind="betas", T=10, betas=betas).betas == tuple(betas.tolist())  # type: ignore[arg-type]
