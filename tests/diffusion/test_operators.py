"""Operators of a measurement: each is linear, has its adjoint, and solves its own systems."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffusion.operators import (
    AveragePool,
    Blur,
    Grey,
    Identity,
    Linear,
    Mask,
    Operator,
    OperatorError,
    adjoint_error,
    measured_shape,
)

SHAPE = (3, 8, 8)
UNEVEN = torch.tensor([[0.0, 0.1, 0.0], [0.3, 0.4, 0.1], [0.0, 0.0, 0.1]])


def left_half() -> Mask:
    known = torch.zeros(8, 8, dtype=torch.bool)
    known[:, :4] = True
    return Mask(known)


def own() -> Linear:
    """Every second row, by its A and Aᵀ alone."""

    def back(y: torch.Tensor) -> torch.Tensor:
        x = torch.zeros(*y.shape[:-2], 8, 8, dtype=y.dtype)
        x[..., ::2, :] = y
        return x

    return Linear(lambda x: x[..., ::2, :], back)


OPERATORS: dict[str, Operator] = {
    "mask": left_half(),
    "average_pool": AveragePool(4),
    "gray": Grey(),
    "blur": Blur.gaussian(0.8, 8),
    "uneven": Blur(UNEVEN),
    "identity": Identity(),
    "own": own(),
}


def draw(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(
        2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_the_adjoint_is_the_adjoint(name: str) -> None:
    assert adjoint_error(OPERATORS[name], SHAPE) < 1e-14


def test_a_false_adjoint_is_noticed() -> None:
    halved = Linear(lambda x: x, lambda y: 0.5 * y)
    assert adjoint_error(halved, SHAPE) > 1e-3


@pytest.mark.parametrize("sigma2", [0.0, 0.3])
@pytest.mark.parametrize("name", OPERATORS)
def test_solve_inverts_the_bracket(name: str, sigma2: float) -> None:
    operator, r2 = OPERATORS[name], torch.tensor([0.7, 0.02], dtype=torch.float64)
    y = operator.forward(draw(SHAPE, 1))
    solved = operator.solve(y, r2=r2, sigma2=sigma2)
    bracket = r2.view(-1, 1, 1, 1) * operator.forward(operator.adjoint(solved)) + sigma2 * solved
    torch.testing.assert_close(bracket, y, rtol=1e-4, atol=1e-5)


def test_what_each_makes_of_an_image() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert AveragePool(2).forward(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    colours = torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1)
    assert float(Grey().forward(colours)) == pytest.approx(0.299 - 0.114)
    shifted = Blur(torch.tensor([[0.0, 0.0, 1.0]])).forward(x)  # the pixel to the left
    torch.testing.assert_close(shifted, x.roll(1, -1))
    flat = Blur.gaussian(1.5, 4).forward(torch.full((1, 1, 4, 4), 0.5))
    torch.testing.assert_close(flat, torch.full((1, 1, 4, 4), 0.5))
    sizes = {name: measured_shape(operator, SHAPE) for name, operator in OPERATORS.items()}
    assert sizes["average_pool"] == (3, 2, 2) and sizes["gray"] == (1, 8, 8)
    assert sizes["own"] == (3, 4, 8) and sizes["mask"] == SHAPE


def test_what_is_blurred_away_is_not_made_up() -> None:
    """An image that A turns to nothing is answered by nothing, not by rounding."""
    stripes = torch.ones(1, 1, 8, 8).cumsum(-1) % 2 * 2 - 1
    pair = Blur(torch.tensor([[0.0, 0.5, 0.5]]))
    y = pair.forward(stripes)
    assert y.abs().max() < 1e-6
    assert pair.solve(y + 1e-7 * stripes, r2=torch.ones(1), sigma2=0.0).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Mask(torch.zeros(8, 8, dtype=torch.bool)), "mask: no pixel is known"),
        (lambda: Mask(torch.ones(4, 8)), r"mask: its shape is \(4, 8\)"),
        (lambda: AveragePool(3), "factor = 3: does not divide 8 × 8"),
        (lambda: AveragePool(0), "factor = 0: must be 1 or more"),
        (lambda: Grey((0.5, 0.5)), "weights: 2 for an image of 3 channels"),
        (lambda: Grey((1.0,)), "gray needs an image of many channels"),
        (lambda: Grey((0.0, 0.0, 0.0)), "one must differ from 0"),
        (lambda: Blur(torch.ones(2, 3)), "must be two odd numbers"),
        (lambda: Blur(torch.ones(9, 1)), "9 × 1 is larger than an image, 8 × 8"),
        (lambda: Blur.gaussian(0.0, 8), "deviation = 0.0: must be greater than 0"),
    ],
)
def test_what_does_not_fit_is_named(make: Any, says: str) -> None:
    with pytest.raises(OperatorError, match=says):
        measured_shape(make(), SHAPE)
