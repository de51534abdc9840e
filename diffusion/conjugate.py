"""Conjugate gradients (Hestenes, Stiefel 1952) for a batch of systems that only products know."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SMALL = 1e-6  # share of the right-hand side at which a residual is small enough


def conjugate_gradients(
    product: Callable[[Tensor], tuple[Tensor, Tensor]], b: Tensor, *, steps: int
) -> Tensor:
    """L M⁻¹ b of each system after at most `steps` products. b: [N, ...].

    product: v → (M v, L v), M symmetric and positive, L linear: so what M⁻¹ b is wanted for costs
    nothing more. A system stops, and stays where it is, once its residual is small, and where
    vᵀMv ≤ 0 shows that its M is not positive after all, as the Jacobian of a network may be.
    """
    residual = direction = b
    square = _dot(b, b)
    enough = square * SMALL**2
    going = square > 0
    found: Tensor | None = None
    for _ in range(steps):
        along, wanted = product(direction)
        curvature = _dot(direction, along)
        going = going & (square > enough) & (curvature > 0)
        step = torch.where(going, square / torch.where(going, curvature, 1.0), 0.0)
        part = torch.where(_wide(going, wanted), _wide(step, wanted) * wanted, 0.0)
        found = part if found is None else found + part
        residual = torch.where(_wide(going, b), residual - _wide(step, b) * along, residual)
        before, square = square, _dot(residual, residual)
        turn = torch.where(going, square / torch.where(going, before, 1.0), 0.0)
        direction = residual + _wide(turn, b) * direction
    assert found is not None, "at least one step"
    return found


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of each pair, [N]."""
    return (a * b).flatten(1).sum(1)


def _wide(v: Tensor, like: Tensor) -> Tensor:
    return v.view(-1, *([1] * (like.ndim - 1)))
