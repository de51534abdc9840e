"""The bound, term by term: closed forms, brute-force integration, the two forms of L."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffusion.bound import (
    BoundError,
    Trajectories,
    bits_per_dim,
    bound_table,
    gaussian_kl,
    kl_terms,
    learned_log_variance,
    log_ratio_form,
    log_ratio_terms,
    prior_nats,
    transition_nats,
)
from diffusion.decoder import PROBABILITY_FLOOR, decoder_nats, density_nats, normal_mass
from diffusion.forward import q_posterior, q_trajectory
from diffusion.schedule import Schedule, cosine_schedule, linear_schedule
from diffusion.theory.exact import (
    eps_gain,
    gaussian_bound,
    gaussian_entropy,
    gaussian_gap,
    gaussian_terms,
    marginal_variance,
    prior_gap,
    x_start_error,
    x_start_gain,
)
from diffusion.weights import (
    eps_weight,
    min_snr_weight,
    output_weight,
    snr_weight,
    x_start_weight,
)

SCHEDULE = linear_schedule()
V = 0.25


def normal_density(x: np.ndarray, mean: float, variance: float) -> np.ndarray:
    return np.exp(-0.5 * (x - mean) ** 2 / variance) / math.sqrt(2 * math.pi * variance)


def quadrature_kl(q: tuple[float, float], p: tuple[float, float]) -> float:
    """KL of two (mean, variance) Gaussians by the trapezoidal rule over ±12 deviations."""
    width = 12 * math.sqrt(q[1])
    x = np.linspace(q[0] - width, q[0] + width, 20_001)
    log_ratio = 0.5 * ((x - p[0]) ** 2 / p[1] - (x - q[0]) ** 2 / q[1] + math.log(p[1] / q[1]))
    return float(np.trapezoid(normal_density(x, *q) * log_ratio, x))


@pytest.mark.parametrize("timesteps", [None, [999, 600, 250, 40, 3]])
@pytest.mark.parametrize("variance", ["large", "small"])
def test_terms_equal_the_integral_of_their_definition(
    timesteps: list[int] | None, variance: str
) -> None:
    table = bound_table(SCHEDULE, timesteps)
    x_start, x_start_hat, x_t = 0.4, -0.1, 0.7
    for row in (r for r in range(1, len(table)) if len(table) < 10 or r in (1, 2, 50, 998, 999)):
        t, s = int(table.t[row]), int(table.s[row])
        jump = SCHEDULE.jump(t, s)
        sigma2 = jump.beta if variance == "large" else jump.variance
        mean_q = q_posterior(SCHEDULE, torch.tensor(x_start), torch.tensor(x_t), t=t, s=s)[0]
        mean_p = jump.coef_x_start * x_start_hat + jump.coef_x_t * x_t
        wanted = quadrature_kl((float(mean_q), jump.variance), (mean_p, sigma2))
        got = transition_nats(
            table,
            torch.tensor([row]),
            x_start=torch.full((1, 1), x_start, dtype=torch.float64),
            x_start_hat=torch.full((1, 1), x_start_hat, dtype=torch.float64),
            log_variance=torch.tensor(table.log_variance(variance)[row]),
        )
        assert float(got) == pytest.approx(wanted, rel=2e-6, abs=1e-9)


def test_prior_equals_its_integral() -> None:
    for schedule in (linear_schedule(20), SCHEDULE):
        alpha_bar = schedule.alphas_cumprod[-1]
        wanted = quadrature_kl((math.sqrt(alpha_bar) * 0.9, 1 - alpha_bar), (0.0, 1.0))
        got = prior_nats(schedule, torch.full((1, 1), 0.9))
        assert float(got) == pytest.approx(wanted, rel=1e-6, abs=1e-12)
    # Near 0.02 bit for a CIFAR-10 image with the paper's schedule (E x_0² about a quarter).
    image = torch.full((1, 3, 32, 32), 0.5)
    assert 0.01 < float(prior_nats(SCHEDULE, image)) / math.log(2) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoder_equals_the_integral_over_each_bin(dtype: torch.dtype) -> None:
    mean, deviation = 0.31, 0.02
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    got = decoder_nats(
        levels.to(dtype),
        torch.tensor(mean, dtype=dtype),
        torch.tensor(2 * math.log(deviation), dtype=dtype),
    )
    for level in (0, 100, 160, 167, 170, 180, 255):
        x = float(levels[level])
        low = -3.0 if level == 0 else x - 1 / 255
        high = 3.0 if level == 255 else x + 1 / 255
        # Only where there is mass: far tails would waste the grid.
        grid = np.linspace(max(low, mean - 0.5), min(high, mean + 0.5), 400_001)
        mass = np.trapezoid(normal_density(grid, mean, deviation**2), grid) if low < 0.81 else 0.0
        wanted = -math.log(max(float(mass), PROBABILITY_FLOOR))
        assert float(got[level]) == pytest.approx(wanted, rel=1e-4 if dtype.itemsize == 4 else 1e-6)
    assert float(torch.exp(-got.double()).sum()) == pytest.approx(1, abs=1e-5)


def test_normal_mass_keeps_its_digits_in_both_tails() -> None:
    lower = torch.tensor([-6.1, 6.0, -0.1, -math.inf, 1.0])
    upper = torch.tensor([-6.0, 6.1, 0.1, 1.0, math.inf])
    mass = normal_mass(lower, upper)
    assert torch.allclose(mass[0], mass[1], rtol=1e-6)
    exact = normal_mass(lower.double(), upper.double())
    assert torch.allclose(mass.double(), exact, rtol=3e-5, atol=0)
    assert float(mass[3] + mass[4]) == pytest.approx(1, abs=1e-6)


def test_decoder_gradients_stay_finite_far_from_the_data() -> None:
    mean = torch.tensor([5.0, -5.0, 0.0], requires_grad=True)
    log_variance = torch.full((3,), -12.0, requires_grad=True)
    decoder_nats(torch.tensor([-1.0, 1.0, 0.0]), mean, log_variance).sum().backward()
    assert mean.grad is not None and mean.grad.isfinite().all()
    assert log_variance.grad is not None and log_variance.grad.isfinite().all()


@pytest.mark.parametrize("variance", ["large", "small"])
@pytest.mark.parametrize("timesteps", [None, list(range(998, -1, -37))])
def test_gaussian_data_bound_is_entropy_plus_the_known_gap(
    variance: str, timesteps: list[int] | None
) -> None:
    table = bound_table(SCHEDULE, timesteps)
    top = int(table.t[-1])
    terms = gaussian_terms(SCHEDULE, table, V, variance)
    one = torch.full((1, 1), math.sqrt(V), dtype=torch.float64)  # E x_0² = v is all L_T needs
    bound = float(terms.sum() + prior_nats(SCHEDULE, one, top))
    variance_top = V * SCHEDULE.alpha_bar(top) + SCHEDULE.one_minus_alpha_bar(top)
    gap = gaussian_gap(SCHEDULE, table, V, variance).sum()
    gap += 0.5 * (variance_top - 1 - math.log(variance_top))
    assert bound == pytest.approx(gaussian_entropy(V) + gap, rel=1e-10)
    if timesteps is None:
        assert bound == pytest.approx(gaussian_bound(SCHEDULE, V, variance), rel=1e-12)
        assert gap == pytest.approx(
            gaussian_gap(SCHEDULE, table, V, variance).sum() + prior_gap(SCHEDULE, V), rel=1e-12
        )


def test_gap_closes_as_the_steps_become_many() -> None:
    """Between fixed ends of the log-SNR, in proportion to 1/T: order T terms of order 1/T²."""
    gaps: dict[str, list[float]] = {"large": [], "small": []}
    for T in (250, 500, 1000):
        alpha_bar = 1 / (1 + np.exp(np.linspace(-6, 6, T)))
        schedule = Schedule(1 - alpha_bar / np.append(1.0, alpha_bar[:-1]))
        for variance, found in gaps.items():
            # Without row 0, whose σ_1² is a convention.
            found.append(gaussian_gap(schedule, bound_table(schedule), V, variance)[1:].sum())
    for found in gaps.values():
        assert found[0] / found[1] == pytest.approx(2, rel=0.02)
        assert found[1] / found[2] == pytest.approx(2, rel=0.02)


def test_measured_terms_match_the_closed_form() -> None:
    n, dims = 4000, 4
    generator = torch.Generator().manual_seed(0)
    table = bound_table(SCHEDULE)
    for row in (0, 1, 10, 300, 999):
        alpha_bar = SCHEDULE.alpha_bar(row)
        x_start = math.sqrt(V) * torch.randn(n, dims, dtype=torch.float64, generator=generator)
        eps = torch.randn(n, dims, dtype=torch.float64, generator=generator)
        x_t = math.sqrt(alpha_bar) * x_start + math.sqrt(1 - alpha_bar) * eps
        for variance in ("large", "small"):
            nats = transition_nats(
                table,
                torch.full((n,), row),
                x_start=x_start,
                x_start_hat=float(x_start_gain(SCHEDULE, V)[row]) * x_t,
                log_variance=torch.tensor(table.log_variance(variance)[row]),
                decoder=density_nats,
            )
            wanted = dims * gaussian_terms(SCHEDULE, table, V, variance)[row]
            standard_error = float(nats.std()) / math.sqrt(n)
            assert abs(float(nats.mean()) - wanted) < 4.5 * standard_error


N_TRAJECTORIES = 20_000


def trajectories(quality: float, variance: str) -> Trajectories:
    """Gaussian data, quality·(exact denoiser): quality 1 leaves nothing to learn."""
    schedule = linear_schedule(30, 1e-3, 0.3)
    generator = torch.Generator().manual_seed(1)
    n = N_TRAJECTORIES
    x_start = math.sqrt(V) * torch.randn(n, 1, dtype=torch.float64, generator=generator)
    seeds, indices = torch.full((n,), 7), torch.arange(n)
    chain = [x for _, x in q_trajectory(schedule, x_start, seeds=seeds, indices=indices)]
    xs = torch.stack([x_start, *chain])
    hats = quality * torch.from_numpy(x_start_gain(schedule, V))[:, None, None] * xs[1:]
    return Trajectories(schedule, xs, hats, variance, density_nats)


@pytest.mark.parametrize("variance", ["large", "small"])
def test_the_two_forms_of_the_bound(variance: str) -> None:
    chain = trajectories(0.9, variance)
    kl, ratio = kl_terms(chain), log_ratio_terms(chain)
    torch.testing.assert_close(log_ratio_form(chain), ratio.sum(0))  # equation 3 is equation 22
    # Equal means: of the whole, and term by term.
    for difference in (ratio.sum(0) - kl.sum(0), *(ratio - kl)[1:]):
        assert abs(float(difference.mean())) < 4.5 * float(difference.std()) / N_TRAJECTORIES**0.5
    assert torch.equal(kl[0], ratio[0])
    # The second has less variance in every term, so also as it is used, at one random t. (Terms
    # of one trajectory are correlated, so their sum need not: see the next test.)
    assert torch.all(kl.var(1)[1:] < ratio.var(1)[1:])
    t = torch.randint(1, 31, (N_TRAJECTORIES,), generator=torch.Generator().manual_seed(2))
    pick = torch.arange(N_TRAJECTORIES)
    assert float(kl[t, pick].var()) < float(ratio[t, pick].var())


def test_equation_3_is_exact_on_every_trajectory_for_an_exact_reverse_chain() -> None:
    """Where p_θ is the true reverse chain, eq. 3 is −ln q(x_0) without any noise; eq. 5 is not.

    The true one has the variance of q(x_{t−1}|x_t), so only its variance term is put right here.
    """
    chain = trajectories(1.0, "small")
    schedule, xs = chain.schedule, chain.xs
    table = bound_table(schedule)
    error = x_start_error(schedule, V)
    true = np.append(0.0, np.exp(table.log_beta_tilde[1:])) + table.coef_x_start**2 * error
    exact = replace_log_variance(chain, np.log(true))
    prior = 0.5 * (xs[-1] ** 2 + math.log(2 * math.pi))
    variance_T = float(marginal_variance(schedule, V)[-1])
    true_prior = 0.5 * (xs[-1] ** 2 / variance_T + math.log(2 * math.pi * variance_T))
    got = exact - prior[:, 0] + true_prior[:, 0]
    wanted = 0.5 * (xs[0, :, 0] ** 2 / V + math.log(2 * math.pi * V))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    assert float(kl_terms(chain).sum(0).var()) > float(wanted.var())


def replace_log_variance(chain: Trajectories, log_variance: np.ndarray) -> torch.Tensor:
    """Equation 3 with these ln σ²: what differs is −ln p_θ(x_{t−1}|x_t) of each step."""
    total = log_ratio_form(chain)
    table = bound_table(chain.schedule)
    for k, old in enumerate(table.log_variance(chain.variance)):
        mean = table.coef_x_start[k] * chain.x_start_hats[k] + table.coef_x_t[k] * chain.xs[k + 1]
        square = (chain.xs[k] - mean)[:, 0] ** 2
        new = log_variance[k]
        total = total + 0.5 * (new - old + square * (math.exp(-new) - math.exp(-old)))
    return total


def test_weights_turn_one_loss_into_another() -> None:
    table = bound_table(SCHEDULE)
    per_eps = SCHEDULE.snr  # ‖ε − ε_θ‖² = SNR ‖x_0 − x̂_0‖²
    for variance in ("large", "small"):
        np.testing.assert_allclose(
            eps_weight(SCHEDULE, variance) * per_eps, x_start_weight(table, variance), rtol=1e-9
        )
    jumps = bound_table(SCHEDULE, [999, 500, 100, 20, 0])
    for chain in (table, jumps):
        wanted = [
            snr_weight(SCHEDULE, int(t), int(s))
            for t, s in zip(chain.t[1:], chain.s[1:], strict=True)
        ]
        np.testing.assert_allclose(x_start_weight(chain)[1:], wanted, rtol=1e-9)
    half_snr = 0.5 * (SCHEDULE.snr[100] - SCHEDULE.snr[500])
    assert snr_weight(SCHEDULE, 500, 100) == pytest.approx(half_snr, rel=1e-9)
    # In ε, min-SNR-γ is min(SNR, γ)/SNR: at most 1, and 1 where SNR < γ.
    in_eps = min_snr_weight(SCHEDULE) / per_eps
    assert in_eps.max() == pytest.approx(1) and np.all(np.diff(in_eps) >= -1e-12)
    np.testing.assert_allclose(output_weight(SCHEDULE, "epsilon"), 1 / SCHEDULE.snr, rtol=1e-9)
    np.testing.assert_allclose(output_weight(SCHEDULE, "v"), 1 / (SCHEDULE.snr + 1), rtol=1e-9)
    posterior = SCHEDULE.jump(500, 499)
    assert output_weight(SCHEDULE, "mean")[500] == pytest.approx(posterior.coef_x_start**-2)


def test_eps_weight_is_that_of_the_term() -> None:
    """One term from ε alone: weight·‖ε − ε_θ‖², for the exact ε and a wrong one."""
    table, t = bound_table(SCHEDULE), 250
    x_start, eps, eps_hat = (
        torch.tensor([[value]], dtype=torch.float64) for value in (0.3, 1, 0.4)
    )
    signal, noise = math.sqrt(SCHEDULE.alpha_bar(t)), math.sqrt(SCHEDULE.one_minus_alpha_bar(t))
    x_start_hat = (signal * x_start + noise * eps - noise * eps_hat) / signal
    nats = transition_nats(
        table,
        torch.tensor([t]),
        x_start=x_start,
        x_start_hat=x_start_hat,
        log_variance=torch.tensor(table.log_variance("small")[t]),
    )
    assert float(nats) == pytest.approx(eps_weight(SCHEDULE)[t] * 0.6**2, rel=1e-9)


def test_learned_variance_spans_small_to_large() -> None:
    table = bound_table(SCHEDULE)
    row = torch.tensor([0, 1, 400])
    ends = [learned_log_variance(table, row, torch.full((3, 2), end)) for end in (-1.0, 1.0)]
    rows = row.numpy()
    np.testing.assert_allclose(ends[0][:, 0], table.log_beta_tilde[rows], rtol=1e-6)
    np.testing.assert_allclose(ends[1][:, 1], table.log_beta[rows], rtol=1e-6)
    np.testing.assert_allclose(table.log_beta_tilde, SCHEDULE.posterior_log_variance_clipped)
    assert (
        table.log_variance("large")[0] == table.log_variance("small")[0] == table.log_beta_tilde[1]
    )


def test_the_learned_variance_of_the_best_bound_is_the_true_one() -> None:
    """Gaussian data: no fixed choice beats Σ = variance of q(x_s|x_t), which lies between."""
    table = bound_table(SCHEDULE, list(range(999, -1, -50)))
    row, dims = 12, 2
    alpha_bar = SCHEDULE.alpha_bar(int(table.t[row]))
    error = V * (1 - alpha_bar) / (V * alpha_bar + 1 - alpha_bar)
    true = math.exp(table.log_beta_tilde[row]) + table.coef_x_start[row] ** 2 * error

    def expected(log_variance: float) -> float:
        kl = gaussian_kl(
            torch.tensor(table.coef_x_start[row] * math.sqrt(error)),
            torch.tensor(table.log_beta_tilde[row]),
            torch.tensor(log_variance),
        )
        return dims * float(kl)

    small, large = table.log_beta_tilde[row], table.log_beta[row]
    assert small < math.log(true) < large
    best = expected(math.log(true))
    assert best < min(expected(small), expected(large))
    assert best < min(expected(math.log(true) + 0.01), expected(math.log(true) - 0.01))


def test_single_row_and_bad_options() -> None:
    assert len(bound_table(linear_schedule(1, 0.5, 0.5))) == 1
    with pytest.raises(BoundError, match="strictly descending"):
        bound_table(SCHEDULE, [3, 3])
    with pytest.raises(BoundError, match="strictly descending"):
        bound_table(SCHEDULE, [1000, 3])
    with pytest.raises(BoundError, match="variance = 'tiny'"):
        bound_table(SCHEDULE).log_variance("tiny")
    assert float(bits_per_dim(torch.tensor(math.log(2) * 6), 3)) == pytest.approx(2)


def test_terms_are_the_same_for_cosine_in_float32_and_float64() -> None:
    schedule = cosine_schedule(1000)
    table = bound_table(schedule)
    generator = torch.Generator().manual_seed(3)
    row = torch.tensor([0, 1, 2, 500, 998, 999])
    x_start = (torch.randint(0, 256, (6, 64), generator=generator) / 127.5 - 1).double()
    noise = 0.05 * torch.randn(6, 64, dtype=torch.float64, generator=generator)
    results = []
    for dtype in (torch.float32, torch.float64):
        log_variance = torch.tensor(table.log_variance("large"))[row][:, None].to(dtype)
        results.append(
            transition_nats(
                table,
                row,
                x_start=x_start.to(dtype),
                x_start_hat=(x_start + noise).to(dtype),
                log_variance=log_variance,
            ).double()
        )
    assert torch.allclose(results[0], results[1], rtol=2e-4, atol=2e-5)


def test_eps_gain_and_x_start_gain_agree() -> None:
    signal = np.sqrt(SCHEDULE.alphas_cumprod)
    noise = np.sqrt(SCHEDULE.one_minus_alphas_cumprod)
    np.testing.assert_allclose(
        (1 - noise * eps_gain(SCHEDULE, V)) / signal, x_start_gain(SCHEDULE, V), rtol=1e-6
    )
