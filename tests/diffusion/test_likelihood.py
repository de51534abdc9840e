"""Estimates of the bound with a network: the plans, their noise, and agreement between them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from diffusion import Model, ModelConfig, Schedule, ScheduleConfig
from diffusion.bound import BoundError, bound_table
from diffusion.checks import ImagesError
from diffusion.likelihood import likelihood, likelihood_x_t
from diffusion.noise import Purpose, image_normals
from diffusion.schedule import linear_schedule
from diffusion.term_plan import (
    full_plan,
    measured_proposal,
    monte_carlo_plan,
    pairs,
    schedule_proposal,
)
from tests.diffusion.gaussian import GaussianDenoiser
from tests.diffusion.networks import TINY, build_model

N = 6


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    levels = torch.randint(0, 256, (N, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    return levels / 127.5 - 1


def quiet_model(**config: Any) -> Model:
    """Random weights, a small output: predictions of about the right size."""
    model = build_model(**config)
    model.network.conv_out.weight.mul_(0.1)
    return model


def test_terms_of_the_full_sum_are_those_of_a_loop_by_hand(images: torch.Tensor) -> None:
    model = quiet_model()
    found = likelihood(model, images, seed=5, batch_size=7, variance="large")
    schedule, k = model.schedule, 37
    eps = image_normals(5, torch.arange(N), row=k, purpose=Purpose.LIKELIHOOD, shape=model.shape)
    signal, noise = math.sqrt(schedule.alpha_bar(k)), math.sqrt(schedule.one_minus_alpha_bar(k))
    x_t = signal * images + noise * eps
    with torch.inference_mode():
        eps_hat = model.eps(x_t, torch.full((N,), k))
    x_start = ((x_t - noise * eps_hat) / signal).clamp(-1, 1).double()
    jump = schedule.jump(k, k - 1)
    square = (jump.coef_x_start * (images - x_start)).square().flatten(1).sum(1)
    ratio = jump.variance / jump.beta
    wanted = 0.5 * (64 * (ratio - 1 - math.log(ratio)) + square / jump.beta)
    torch.testing.assert_close(found.nats[:, k], wanted, rtol=1e-4, atol=1e-6)
    mse = (images - x_start).square().flatten(1).mean(1)
    torch.testing.assert_close(found.squared_error[:, k], mse, rtol=1e-4, atol=1e-7)
    total = found.prior + found.nats.sum(1)
    torch.testing.assert_close(found.bits_per_dim, total / (64 * math.log(2)))
    torch.testing.assert_close(found.decoder, found.nats[:, 0])


def test_numbers_do_not_depend_on_batch_or_company(images: torch.Tensor) -> None:
    model = quiet_model()
    for samples in (None, 5):
        whole = likelihood(model, images, samples=samples, seed=3, batch_size=64)
        parts = [
            likelihood(
                model,
                images[i : i + 1],
                samples=samples,
                seed=3,
                indices=torch.tensor([i]),
                batch_size=9,
            )
            for i in range(N)
        ]
        alone = torch.cat([part.bits_per_dim for part in parts])
        torch.testing.assert_close(whole.bits_per_dim, alone, rtol=0, atol=1e-5)
    other = likelihood(model, images, samples=5, seed=4).bits_per_dim
    assert not torch.allclose(other, whole.bits_per_dim, atol=1e-4)


def test_monte_carlo_agrees_with_the_full_sum(images: torch.Tensor) -> None:
    """The mean over many seeds is the full sum's, within 4 standard errors of both."""
    model = quiet_model(schedule=ScheduleConfig(T=40, beta_end=0.3))
    x = images[:1].expand(300, -1, -1, -1)
    indices = torch.arange(300)
    full = likelihood(model, x, seed=1, indices=indices, batch_size=500).bits_per_dim
    drawn = likelihood(model, x, samples=5, seed=2, indices=indices, batch_size=500).bits_per_dim
    spread = math.sqrt(float(full.var() + drawn.var()) / 300)
    assert abs(float(full.mean() - drawn.mean())) < 4 * spread
    assert spread < 0.02 * float(full.mean())


def test_full_plan_visits_every_term_and_repeats_with_new_noise() -> None:
    table = bound_table(build_model().schedule)
    plan = full_plan(table, 2, repeats=3)
    assert plan.row.shape == (2, 300)
    keys = {(int(r), int(k)) for r, k in zip(plan.row[0], plan.repeat[0], strict=True)}
    assert len(keys) == 300
    np.testing.assert_allclose(plan.weight.sum(1), 100)


def test_monte_carlo_plan_is_unbiased_and_stratified() -> None:
    table = bound_table(build_model().schedule)
    n, samples, m = 2000, 12, 3
    plan = monte_carlo_plan(
        table, seed=1, indices=torch.arange(n), samples=samples, decoder_draws=m
    )
    assert np.all(plan.row[:, :m] == 0) and np.all(plan.weight[:, :m] == 1 / m)
    assert np.all(np.diff(plan.row[:, m:], axis=1) >= 0) and np.all(plan.row[:, m:] > 0)
    # The expected weight of each row is 1: that is what makes every estimate unbiased.
    totals = np.zeros((n, len(table)))
    np.add.at(totals, (np.arange(n)[:, None], plan.row), plan.weight)
    error = totals.std(0)[1:] / math.sqrt(n)
    assert np.all(np.abs(totals.mean(0)[1:] - 1) < 5 * error)
    again = monte_carlo_plan(
        table, seed=1, indices=torch.arange(5, 8), samples=samples, decoder_draws=m
    )
    np.testing.assert_array_equal(again.row, plan.row[5:8])
    # Draws of one row by one image differ in `repeat`.
    keyed = np.stack([plan.row, plan.repeat], -1)
    assert all(len({tuple(pair) for pair in line}) == samples for line in keyed[:50].tolist())


@pytest.mark.parametrize(
    ("samples", "draws"), [(2, 1), (3, 2), (9, 2), (18, 3), (20, 3), (60, 10), (200, 33)]
)
def test_a_sixth_of_the_evaluations_is_of_the_decoder(samples: int, draws: int) -> None:
    table = bound_table(build_model().schedule)
    plan = monte_carlo_plan(table, seed=1, indices=torch.arange(3), samples=samples)
    assert np.all((plan.row == 0).sum(1) == draws)
    with pytest.raises(BoundError, match=f"decoder_draws = {samples}: must be 1..{samples - 1}"):
        monte_carlo_plan(
            table, seed=1, indices=torch.arange(3), samples=samples, decoder_draws=samples
        )


def test_proposals_follow_the_terms() -> None:
    table = bound_table(build_model(schedule=ScheduleConfig()).schedule)
    p = schedule_proposal(table)
    assert p.shape == (1000,) and p[1:].sum() == pytest.approx(1)
    assert p[1:].min() >= 0.1 / 999
    nats = np.tile(np.arange(1.0, 11.0), (4, 1))
    q = measured_proposal(nats)
    np.testing.assert_allclose(q[1:], 0.9 * np.arange(2, 11) + 0.1 * 6)
    plan = monte_carlo_plan(
        bound_table(build_model(schedule=ScheduleConfig(T=10)).schedule),
        seed=0,
        indices=torch.arange(3000),
        samples=2,
        proposal=q,
    )
    share = np.bincount(plan.row[:, 1], minlength=10)[1:] / 3000
    expected = q[1:] / q[1:].sum()
    assert np.all(np.abs(share - expected) < 4.5 * np.sqrt(expected / 3000))


def test_pairs_cover_the_plan_once() -> None:
    plan = full_plan(bound_table(build_model().schedule), 3)
    seen = [
        (i, j)
        for image, draw in pairs(plan, 64)
        for i, j in zip(image.tolist(), draw.tolist(), strict=True)
    ]
    assert seen == [(i, j) for i in range(3) for j in range(100)]


def test_noise_of_a_repeat_is_fresh(images: torch.Tensor) -> None:
    schedule = build_model().schedule
    t = torch.full((N,), 50)
    seeds, indices = torch.zeros(N, dtype=torch.long), torch.arange(N)
    first, second = (
        likelihood_x_t(
            schedule, images, t, seeds=seeds, indices=indices, repeat=torch.full((N,), r)
        )
        for r in (0, 1)
    )
    assert not torch.allclose(first, second)


def test_learned_variance_enters_through_the_second_half(images: torch.Tensor) -> None:
    network = dataclasses.replace(TINY, learned_variance=True)
    model = quiet_model(network=network)
    model.network.conv_out.weight[1:].zero_()
    results = {}
    for v, variance in ((-1.0, "small"), (1.0, "large")):
        model.network.conv_out.bias[1:] = v
        learned = likelihood(model, images, batch_size=500)
        fixed = likelihood(model, images, variance=variance, batch_size=500)
        torch.testing.assert_close(learned.nats[:, 1:], fixed.nats[:, 1:], rtol=1e-3, atol=1e-4)
        results[variance] = learned.bits_per_dim
    assert not torch.allclose(results["small"], results["large"], rtol=1e-3)


def test_labels_matter_and_bad_options_are_refused(images: torch.Tensor) -> None:
    model = quiet_model()
    labelled = likelihood(model, images, samples=4, class_label=torch.ones(N, dtype=torch.long))
    assert not torch.equal(labelled.bits_per_dim, likelihood(model, images, samples=4).bits_per_dim)
    for label in (1, [1] * N):
        found = likelihood(model, images, samples=4, class_label=label)
        assert torch.equal(found.bits_per_dim, labelled.bits_per_dim)
    with pytest.raises(ValueError, match=f"class_label: 2 labels for {N} images"):
        likelihood(model, images, samples=4, class_label=[0, 1])
    with pytest.raises(BoundError, match="samples = 1"):
        likelihood(model, images, samples=1)
    with pytest.raises(BoundError, match="variance = 'learned'"):
        likelihood(model, images, samples=4, variance="learned")
    with pytest.raises(BoundError, match="proposal"):
        likelihood(model, images, samples=4, proposal=np.ones(3))
    with pytest.raises(BoundError, match="proposal"):
        likelihood(model, images, samples=4, proposal=np.full(model.schedule.T, np.inf))
    for samples in (2.5, "5", True):
        with pytest.raises(BoundError, match=rf"samples = {samples!r}: must be 2 or more"):
            likelihood(model, images, samples=samples)  # type: ignore[arg-type]
    for size in (0, -1):
        with pytest.raises(BoundError, match=f"batch_size = {size}: must be 1 or more"):
            likelihood(model, images, batch_size=size)
    with pytest.raises(BoundError, match=rf"indices: \[5\]; must be \[{N}\]"):
        likelihood(model, images, indices=torch.arange(5))
    with pytest.raises(ImagesError, match="x_start: holds no image"):
        likelihood(model, images[:0])


def test_the_error_of_an_estimate_is_told_by_its_own_draws(images: torch.Tensor) -> None:
    """Against the spread of the transitions over 200 seeds; the sampling error of that is 5 %."""
    model = quiet_model()
    drawn = [likelihood(model, images[:2], samples=12, seed=seed) for seed in range(200)]
    spread = torch.stack([found.transitions for found in drawn]).std(0)
    told = torch.stack([found.transitions_error for found in drawn]).square().mean(0).sqrt()
    ratio = told / spread
    assert ((ratio > 0.8) & (ratio < 1.5)).all(), ratio
    assert likelihood(model, images[:2], samples=2).transitions_error.isnan().all()
    assert likelihood(model, images[:2], samples=2).decoder_error.isnan().all()


@dataclasses.dataclass(frozen=True)
class Exact:
    """The denoiser of independent Gaussian pixels, as `likelihood` wants its models."""

    denoiser: GaussianDenoiser
    config = ModelConfig()
    device = torch.device("cpu")
    shape = (1, 8, 8)

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    def output(self, x_t: torch.Tensor, t: torch.Tensor, label: None = None) -> torch.Tensor:
        return self.denoiser.eps(x_t, t)


@pytest.mark.parametrize("samples", [20, 60, 200])
def test_the_standard_error_of_an_image_covers_its_bits_per_dim(samples: int) -> None:
    """Of 400 estimates of one image, 95 % lie within 1.96 standard errors of its bound."""
    levels = 127.5 + 40 * torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    image = (levels.round().clamp(0, 255) / 127.5 - 1).expand(1600, -1, -1, -1)
    model: Any = Exact(GaussianDenoiser(linear_schedule(), variance=0.1))
    many = likelihood(model, image, samples=100, seed=1, batch_size=4000).bits_per_dim
    drawn = likelihood(model, image[:400], samples=samples, seed=3, batch_size=4000)
    assert float(many.std()) / 1600**0.5 < 0.05 * float(drawn.standard_error.mean())
    close = (drawn.bits_per_dim - many.mean()).abs() < 1.96 * drawn.standard_error
    assert 0.93 <= float(close.double().mean()) <= 0.97
