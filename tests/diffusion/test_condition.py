"""Corrections of x̂_0 against the true posterior of Gaussian data, and travel as rows of a table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from diffusion.condition import Condition, Measurement, Moment, Projection, condition
from diffusion.diffusers.scheduler import zero_terminal_snr
from diffusion.forward import alpha_bars
from diffusion.noise import Purpose
from diffusion.operators import AveragePool, Blur, Grey, Identity, Linear, Mask, Operator
from diffusion.restoring import restore
from diffusion.samplers import SamplingDefaults, build_table
from diffusion.sampling import chain
from diffusion.schedule import ScheduleConfig, linear_schedule
from diffusion.table import COLUMNS, SamplerError, SamplerTable
from diffusion.theory.exact import output_variance
from tests.diffusion.conditional import (
    KNOWN,
    UNKNOWN,
    D,
    denoiser,
    errors,
    in_place,
    known_pixels,
    posterior,
    propagated,
)
from tests.diffusion.networks import build_model

PAPER = linear_schedule()
WAYS: dict[str, Callable[[Measurement], Condition]] = {
    "projection": Projection,
    "pigdm": partial(Moment, steps=0),
    "moment": partial(Moment, steps=D, floor=0.0),
}


def table_of(steps: int, travel: int = 1) -> SamplerTable:
    return build_table(PAPER, sampler="ddim", eta=1.0, steps=steps, clip=False, travel=travel)


@pytest.mark.parametrize(
    ("way", "steps", "travel", "mean", "variance"),
    [
        ("projection", 50, 1, 0.347, 1.64),
        ("projection", 250, 1, 0.335, 1.79),
        ("projection", 250, 5, 0.160, 1.03),
        ("pigdm", 50, 1, 0.252, 0.90),
        ("pigdm", 250, 1, 0.243, 1.06),
        ("pigdm", 250, 5, 0.106, 0.92),
        ("moment", 50, 1, 0.000, 0.79),
        ("moment", 250, 1, 0.000, 0.95),
        ("projection", 1000, 1, 0.333, 1.83),
        ("pigdm", 1000, 1, 0.241, 1.10),
        ("moment", 1000, 1, 0.000, 0.98),
        ("moment", 250, 5, 0.000, 0.89),
    ],
)
def test_what_each_correction_gets_wrong(
    way: str, steps: int, travel: int, mean: float, variance: float
) -> None:
    """Error of the mean map and ratio of the variances; correlation 0.9, half of 16 known."""
    found = errors(propagated(table_of(steps, travel), 0.9, WAYS[way]), posterior(0.9))
    assert found[0] == pytest.approx(mean, abs=6e-4)
    assert found[1] == pytest.approx(variance, abs=6e-3)


@pytest.mark.parametrize("way", WAYS)
def test_white_data_are_restored_alike_by_all(way: str) -> None:
    for steps, ratio in ((50, 0.855), (250, 0.966), (1000, 0.991)):
        mean, variance = errors(propagated(table_of(steps), 0.0, WAYS[way]), posterior(0.0))
        assert mean < 1e-6 and variance == pytest.approx(ratio, abs=6e-4)


def test_the_floor_of_moment_costs_little() -> None:
    way = partial(Moment, steps=D)
    mean, variance = errors(propagated(table_of(50), 0.9, way), posterior(0.9))
    assert mean < 2e-3 and variance == pytest.approx(0.79, abs=6e-3)


@pytest.mark.parametrize("way", ["projection", "moment"])
def test_samples_of_the_whole_chain_have_the_propagated_moments(way: str) -> None:
    n, table = 4000, table_of(20, travel=2)
    y = torch.linspace(-1, 1, len(KNOWN)).double()
    expected = propagated(table, 0.9, WAYS[way])
    x = torch.randn(n, 1, 1, D, generator=torch.Generator().manual_seed(0))
    conditioned = WAYS[way](Measurement(known_pixels(), in_place(y[None].float())))
    for step in chain(denoiser(0.9), table, x, condition=conditioned):  # type: ignore[arg-type]
        x = step.x_next
    found = x.view(n, D).double()
    mean, covariance = expected.mean_map @ y, expected.covariance
    deviation = covariance.diagonal().clamp_min(0).sqrt()
    assert ((found.mean(0) - mean).abs() <= 4.5 * deviation / n**0.5 + 1e-3).all()
    ratio = found.var(0)[UNKNOWN] / covariance.diagonal()[UNKNOWN]
    assert (ratio - 1).abs().max() < 4.5 * (2 / n) ** 0.5
    torch.testing.assert_close(found[:, KNOWN].mean(0), y, rtol=0, atol=2e-2)


# On a network


def random_y(operator: object, seed: int = 0) -> torch.Tensor:
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return operator.forward(x)  # type: ignore[attr-defined, no-any-return]


def test_projection_ends_in_what_was_measured() -> None:
    model = build_model()
    known = torch.zeros(8, 8, dtype=torch.bool)
    known[:4] = True
    for operator in (Mask(known), AveragePool(4), Identity()):
        measurement = Measurement(operator, random_y(operator))
        table = build_table(model.schedule, sampler="ddim", eta=1.0, steps=5, travel=2)
        x = torch.randn(3, *model.shape, generator=torch.Generator().manual_seed(1))
        *_, last = chain(model, table, x, condition=Projection(measurement))
        assert measurement.distance(last.x_next).max() < 1e-5


COLOURED = torch.tensor([True, False, True]).view(3, 1, 1).expand(3, 8, 8)
LAPLACIAN = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    "operator",
    [
        Mask(torch.arange(64).view(8, 8) < 24),
        Mask(COLOURED),
        AveragePool(4),
        Grey(),
        Grey((1.0, -1.0, 0.0)),  # the two below send a constant to 0
        Grey((0.1, 0.2, -0.3)),
        Blur(LAPLACIAN),
        Blur(torch.tensor([[0.3, -0.2, -0.1]])),
        Identity(),
        Linear(lambda x: x - x.mean((-1, -2), keepdim=True), lambda y: y),
    ],
    ids=lambda operator: type(operator).__name__,
)
def test_the_distance_is_a_mean_over_what_was_measured(operator: Operator) -> None:
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    kept = operator.forward(x)
    off = torch.full_like(kept, 0.1)
    if isinstance(operator, Mask):
        off = operator.forward(off)
    found = Measurement(operator, kept + off).distance(x)
    torch.testing.assert_close(found, torch.full((2,), 0.1))


def test_moment_on_a_network_is_what_its_formula_says() -> None:
    """One product, with the Jacobian of the guided x̂_0; and inference mode is no obstacle."""
    model, labels = build_model(), torch.tensor([0, 2])
    measurement = Measurement(Identity(), random_y(Identity()), sigma=1.0)
    x = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(1))
    table = build_table(model.schedule, sampler="ddim", steps=1, start=60, clip=False)
    given = {"class_label": labels, "guidance": 2.0}
    way = Moment(measurement, 1)
    with torch.inference_mode():
        [step] = chain(model, table, x, condition=way, **given)  # type: ignore[arg-type]
    alpha_bar, t = model.schedule.alpha_bar(60), torch.tensor([60, 60])

    def x_start_of(v: torch.Tensor) -> torch.Tensor:
        null, labelled = (model.eps(v, t, c) for c in (torch.full_like(labels, 3), labels))
        eps = null + 2.0 * (labelled - null)
        return (v - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5

    whole = torch.autograd.functional.jacobian(x_start_of, x)
    for i, x_start in enumerate(x_start_of(x).flatten(1)):
        covariance = (1 - alpha_bar) / alpha_bar**0.5 * whole[i].reshape(64, 2, 64)[:, i].T
        residual = measurement.y.flatten() - x_start
        curvature = residual @ covariance @ residual + residual @ residual
        assert curvature > 0
        expected = x_start + residual @ residual / curvature * (covariance @ residual)
        torch.testing.assert_close(step.x_start[i].flatten(), expected, rtol=1e-3, atol=1e-3)


def test_moment_leaves_alone_what_it_cannot_solve() -> None:
    """A Jacobian that is not positive: no correction, and no number that is not finite."""
    model = build_model()
    model.network.conv_out.weight.mul_(100)
    measurement = Measurement(Identity(), random_y(Identity()))
    x = torch.randn(6, *model.shape, generator=torch.Generator().manual_seed(1))
    table = build_table(model.schedule, sampler="ddim", steps=10)
    for step in chain(model, table, x, condition=Moment(measurement, 5)):
        assert step.x_start.isfinite().all() and step.x_next.isfinite().all()
    exact = Measurement(Identity(), step.x_start[:1])  # of the first image, at the end
    [again] = chain(
        model, build_table(model.schedule, steps=1, start=0), x, condition=Moment(exact, 5)
    )
    assert again.x_next.isfinite().all()


@pytest.mark.parametrize("solver_steps", [0, 1, 2])
def test_moment_projects_where_no_signal_is_left(solver_steps: int) -> None:
    """At ᾱ = 0 there is no factor of the Jacobian; the samples beside it take theirs."""
    betas = zero_terminal_snr(linear_schedule(100, 1e-4, 0.1).betas)
    model = build_model(schedule=ScheduleConfig.from_betas(betas), prediction="v")
    assert model.schedule.alpha_bar(99) == 0
    known = torch.arange(64).view(8, 8) < 32
    measurement = Measurement(Mask(known), random_y(Mask(known)))
    x = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(1))

    def corrected(way: Condition, t: list[int]) -> torch.Tensor:
        at = torch.tensor(t)
        alpha_bar, r2 = alpha_bars(model.schedule, at, x)
        evaluate = partial(model.estimate, t=at)
        _, x_start = way.estimate(evaluate, x, alpha_bar=alpha_bar, r2=r2, clip=lambda v: v)
        return x_start

    by_moment = Moment(measurement, solver_steps, floor=0.0)
    mixed, projected = corrected(by_moment, [99, 60]), corrected(Projection(measurement), [99, 60])
    torch.testing.assert_close(mixed[0], projected[0], rtol=0, atol=1e-5)
    assert (mixed[1] - projected[1]).abs().max() > 1e-3
    torch.testing.assert_close(mixed[1], corrected(by_moment, [60, 60])[1], rtol=0, atol=1e-5)


# restore


def test_restore_fills_in_and_keeps_what_is_known() -> None:
    model = build_model()
    known = torch.zeros(8, 8, dtype=torch.bool)
    known[:4] = True
    operator = Mask(known)
    y = random_y(operator)[0]
    steps = []
    images = restore(
        model, y, operator, 3, steps=6, seed=5, on_step=lambda *step: steps.append(step[1])
    )
    assert images.shape == (3, 1, 8, 8) and steps == [*range(1, 5 * 5 + 2)]
    torch.testing.assert_close(images[:, :, :4], y[:, :4].expand(3, -1, -1, -1))
    assert (images[0] - images[1])[:, 4:].abs().max() > 0.01
    alone = restore(model, y, operator, 1, steps=6, seed=5)
    torch.testing.assert_close(alone, images[:1], rtol=0, atol=1e-5)
    by_moment = restore(model, y, operator, 2, steps=6, method="moment", solver_steps=2)
    assert by_moment.isfinite().all()


def test_restore_lands_on_the_next_timestep_whatever_the_model_does() -> None:
    """Each jump is walked to where the next row begins, and ε̂ is that of the corrected x̂_0."""
    found = []
    for sampling in (SamplingDefaults(), SamplingDefaults("ddim", "large", True, "uniform", False)):
        for landing in ("next", "stride"):
            model = build_model(sampling=replace(sampling, landing=landing))
            found.append(restore(model, random_y(Identity())[0], Identity(), sigma=0.5, steps=30))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)
    assert restore(model, random_y(Identity())[0], Identity(), sampler="ddpm").isfinite().all()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"y": torch.zeros(1, 4, 8)}, r"y: its shape is \(1, 4, 8\), and A gives \(1, 8, 8\)"),
        ({"y": torch.full((1, 8, 8), math.nan)}, "y: not all of its numbers are finite"),
        ({"sigma": -0.1}, "sigma = -0.1: must be 0 or more"),
        ({"solver_steps": -1}, "solver_steps = -1: must be 0 or more"),
        ({"method": "magic"}, "method = 'magic'"),
        ({"travel": 0}, "travel = 0"),
        ({"num_images": 0}, "num_images = 0"),
    ],
)
def test_what_restore_refuses(given: dict[str, object], says: str) -> None:
    asked = {"y": torch.zeros(1, 8, 8), "operator": Identity(), **given}
    with pytest.raises(ValueError, match=says):
        restore(build_model(), **asked)  # type: ignore[arg-type]


def test_what_a_row_costs() -> None:
    measurement = Measurement(Identity(), torch.zeros(1, 1, 8, 8))
    costs = [condition(measurement, "projection").cost]
    costs += [condition(measurement, "moment", solver_steps=k).cost for k in (0, 1, 3)]
    assert costs == [1, 2, 2, 4]
    with pytest.raises(ValueError, match="method = 'magic': must be one of projection, moment"):
        condition(measurement, "magic")


# Travel


def test_a_table_with_travel_goes_down_and_up_and_down() -> None:
    plain, table = table_of(10), table_of(10, travel=3)
    assert len(table) == 9 * 3 + 1
    assert table.t.tolist() == [*np.repeat(plain.t[:-1], 3), 0]
    np.testing.assert_array_equal(table.coefficients[2::3], plain.coefficients[:-1])
    travels = table.purpose == Purpose.TRAVEL
    assert travels.tolist() == [*np.tile([True, True, False], 9), False]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_travel_is_the_same_chain_walked_more_often(sampler: str) -> None:
    """The variance that comes out is that of the steps one by one: down, up, down again."""
    options = {"sampler": sampler, "steps": 12, "clip": False}
    plain = build_table(PAPER, **options)  # type: ignore[arg-type]
    c, b = (COLUMNS.index(name) for name in "cb")
    rows, ts = [], []
    for i, (t, row) in enumerate(zip(plain.t, plain.coefficients, strict=True)):
        rows.append(row)
        ts.append(t)
        if i < len(plain) - 1:
            up = np.zeros_like(row)
            up[0] = np.inf
            ratio = PAPER.alpha_bar(int(t)) / PAPER.alpha_bar(int(plain.t[i + 1]))
            up[[b, c]] = ratio**0.5, (1 - ratio) ** 0.5
            rows += [up, row]
            ts += [t, t]
    purpose, places = np.zeros(len(ts), np.int64), np.arange(len(ts))
    stepwise = SamplerTable(np.array(ts), np.stack(rows), purpose, noise=places)
    table = build_table(PAPER, **options, travel=2)  # type: ignore[arg-type]
    assert output_variance(table, PAPER, 0.25) == pytest.approx(
        output_variance(stepwise, PAPER, 0.25), rel=1e-12
    )


def test_where_travel_makes_no_sense() -> None:
    for options, says in (
        ({"travel": 0}, "travel = 0: must be 1..100"),
        ({"travel": 101}, "travel = 101"),
        ({"travel": 2, "variance": "learned"}, "not with variance = 'learned'"),
        ({"travel": 2, "corrector_steps": 1}, "not with Langevin steps"),
        ({"travel": 2, "sampler": "langevin"}, "not with Langevin steps"),
        ({"travel": 2, "sampler": "langevin", "corrector_steps": 2}, "not with Langevin steps"),
        ({"travel": 2, "sampler": "langevin", "start": 9, "steps": 2}, "not with Langevin steps"),
        ({"travel": 2, "sampler": "langevin", "steps": 1}, "not with Langevin steps"),
    ):
        with pytest.raises(SamplerError, match=says):
            build_table(PAPER, **{"steps": 5, **options})  # type: ignore[arg-type]
