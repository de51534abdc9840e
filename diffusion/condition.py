"""Conditioning a chain on a measurement y = A x_0 + σ_y n: x̂_0 is corrected before each update.

The table, the noise and the state of a chain stay as they are. Two corrections, by what each takes
for the covariance of x_0 given x_t:

    projection   r² I, r² = 1 − ᾱ_t: no backward pass (Wang et al. 2022, DDNM; Zhu et al. 2023)
    moment       ((1−ᾱ_t)/√ᾱ_t) ∂x̂_0/∂x_t, which is the true one of an exact denoiser (Rozet et al.
                 2024), in products with the network's Jacobian; where ᾱ_t = 0, r² I
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from diffusion.conjugate import conjugate_gradients
from diffusion.model import Estimate
from diffusion.operators import Operator, identity_of, measured_values

METHODS = ("projection", "moment")
FLOOR = 1e-4  # share of r² below which moment takes no σ_y²: no Jacobian is known any better
PRODUCT_COST = 1  # of a product with the Jacobian, in evaluations: `benchmarks/products.py`

Evaluate = Callable[[Tensor], Estimate]
Clip = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Measurement:
    """y = A x_0 + σ_y n, n ~ N(0, I), in the model's units, where images lie in [−1, 1].

    y: [1, ...] for all samples, or [N, ...]. sigma: σ_y.
    """

    operator: Operator
    y: Tensor
    sigma: float = 0.0

    def to(self, device: torch.device) -> Measurement:
        """With y on a device."""
        return replace(self, y=self.y.to(device))

    def residual(self, x_start: Tensor) -> Tensor:
        """y − A x."""
        return self.y.to(x_start.dtype) - self.operator.forward(x_start)

    def distance(self, x: Tensor) -> Tensor:
        """How far A x is from y, [N]: root of the mean square over what was measured."""
        residual = self.residual(x)
        squares = residual.square().flatten(1).sum(1)
        return (squares / measured_values(self.operator, residual)).sqrt()


class Condition(Protocol):
    """How a chain heeds a measurement."""

    @property
    def measurement(self) -> Measurement:
        """What it is."""

    @property
    def cost(self) -> int:
        """Network evaluations that a row takes, in all."""

    @property
    def alike(self) -> Hashable:
        """Equal for those that differ in y alone: see `together`."""

    def estimate(
        self, evaluate: Evaluate, x: Tensor, *, alpha_bar: Tensor, r2: Tensor, clip: Clip
    ) -> tuple[Estimate, Tensor]:
        """What the network finds in x [N, C, H, W], and x̂_0 corrected.

        alpha_bar, r2: ᾱ_t and 1 − ᾱ_t of each sample, [N]. clip: what is done to an x̂_0.
        """


def project(measurement: Measurement, x_start: Tensor, r2: Tensor) -> Tensor:
    """x̂_0 + r² Aᵀ(r² AAᵀ + σ_y²)⁻¹(y − A x̂_0): the nearest to x̂_0, weighed by both variances.

    With σ_y = 0 what comes out satisfies A x = y exactly.
    """
    operator, sigma2 = measurement.operator, measurement.sigma**2
    solved = operator.solve(measurement.residual(x_start), r2=r2, sigma2=sigma2)
    return x_start + _wide(r2, x_start) * operator.adjoint(solved)


@dataclass(frozen=True, eq=False)
class Projection:
    """The clipped x̂_0 projected: one evaluation a row, shared with all other chains."""

    measurement: Measurement

    @property
    def cost(self) -> int:
        """One."""
        return 1

    @cached_property
    def alike(self) -> Hashable:
        """See Condition."""
        return Projection, identity_of(self.measurement.operator), self.measurement.sigma

    def correct(self, x_start: Tensor, r2: Tensor) -> Tensor:
        """The corrected x̂_0."""
        return project(self.measurement, x_start, r2)

    def estimate(
        self, evaluate: Evaluate, x: Tensor, *, alpha_bar: Tensor, r2: Tensor, clip: Clip
    ) -> tuple[Estimate, Tensor]:
        """See Condition."""
        found = evaluate(x)
        return found, self.correct(clip(found.x_start), r2)


@dataclass(frozen=True, eq=False)
class Moment:
    """x̂_0 + C Aᵀ(A C Aᵀ + σ_y²)⁻¹(y − A x̂_0), C = ((1−ᾱ_t)/√ᾱ_t) ∂x̂_0/∂x_t, then clipped.

    steps: of conjugate gradients, each one product with the Jacobian. 0 takes r² I for C within the
    bracket alone (ΠGDM, Song et al. 2023), which is one product too. floor: the least σ_y², as a
    share of r².
    """

    measurement: Measurement
    steps: int = 1
    floor: float = FLOOR

    @property
    def cost(self) -> int:
        """One, and the products."""
        return 1 + PRODUCT_COST * max(self.steps, 1)

    @cached_property
    def alike(self) -> Hashable:
        """See Condition."""
        measurement = self.measurement
        operator = identity_of(measurement.operator)
        return Moment, operator, measurement.sigma, self.steps, self.floor

    def estimate(
        self, evaluate: Evaluate, x: Tensor, *, alpha_bar: Tensor, r2: Tensor, clip: Clip
    ) -> tuple[Estimate, Tensor]:
        """See Condition."""
        with torch.inference_mode(False), torch.enable_grad():
            # Copies, since autograd takes no tensor that was made in inference mode.
            x, alpha_bar, r2 = x.clone().requires_grad_(), alpha_bar.clone(), r2.clone()
            found = evaluate(x)
            # Where x_t has no signal the factor is infinite, and the Jacobian should be 0.
            signal, rest = _wide(alpha_bar, x), _wide(r2, x)
            lost = signal == 0
            scale = rest / torch.where(lost, 1.0, signal).sqrt()

            def covariance(v: Tensor) -> Tensor:
                [product] = torch.autograd.grad(found.x_start, x, v.clone(), retain_graph=True)
                return torch.where(lost, rest * v, scale * product)

            corrected = self._corrected(covariance, found.x_start.detach(), r2)
        v = None if found.v is None else found.v.detach()
        found = Estimate(found.x_start.detach(), found.eps.detach(), v)
        return found, clip(corrected)

    def _corrected(
        self, covariance: Callable[[Tensor], Tensor], x_start: Tensor, r2: Tensor
    ) -> Tensor:
        measurement, operator = self.measurement, self.measurement.operator
        residual = measurement.residual(x_start)
        if self.steps == 0:
            solved = operator.solve(residual, r2=r2, sigma2=measurement.sigma**2)
            return x_start + covariance(operator.adjoint(solved))
        sigma2 = (self.floor * r2).clamp_min(measurement.sigma**2)

        def bracket(v: Tensor) -> tuple[Tensor, Tensor]:
            moved = covariance(operator.adjoint(v))
            return operator.forward(moved) + _wide(sigma2, v) * v, moved

        return x_start + conjugate_gradients(bracket, residual, steps=self.steps)


def together(conditions: Sequence[Condition]) -> Condition:
    """One that heeds a measurement of each of its samples: conditions that are alike, of one y."""
    first = conditions[0]
    if all(each is first for each in conditions):
        return first
    y = torch.cat([each.measurement.y for each in conditions])
    assert isinstance(first, Projection | Moment)
    return replace(first, measurement=replace(first.measurement, y=y))


def condition(
    measurement: Measurement, method: str = "projection", *, solver_steps: int = 1
) -> Condition:
    """The correction of this name. Raises ValueError for another."""
    if method not in METHODS:
        raise ValueError(f"method = {method!r}: must be one of {', '.join(METHODS)}")
    if method == "projection":
        return Projection(measurement)
    return Moment(measurement, solver_steps)


def _wide(v: Tensor, like: Tensor) -> Tensor:
    return v.to(like.dtype).view(-1, *([1] * (like.ndim - 1)))
