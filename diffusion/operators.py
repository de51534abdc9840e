"""What a measurement y = A x_0 + σ_y n keeps of an image: linear operators A, each with Aᵀ.

All work on batches: x is [N, C, H, W], y what A makes of it. `solve` is (r² AAᵀ + σ²)⁻¹, in closed
form wherever AAᵀ is a multiple of the identity or diagonal in the Fourier domain. What A loses (a
pixel that is not known, a frequency that is blurred away) is no part of y: there `solve` gives 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.conjugate import conjugate_gradients

# Of red, green and blue: those of BT.601, with which pictures are made grey.
GREY_WEIGHTS = (0.299, 0.587, 0.114)
FAINTEST = 1e-3  # a frequency that is blurred to less of itself counts as lost
_USER_STEPS = 50  # of conjugate gradients, for an operator of which only A and Aᵀ are known


class OperatorError(ValueError):
    """An operator that does not exist, or does not fit an image; the message names the field."""


class Operator(Protocol):
    """A linear map from images to measurements."""

    def forward(self, x: Tensor) -> Tensor:
        """A x."""

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y."""

    def solve(self, y: Tensor, *, r2: Tensor, sigma2: float) -> Tensor:
        """(r² AAᵀ + σ²)⁻¹ y, with r² of each sample, [N]; y within what A can give."""


def measured_shape(operator: Operator, shape: Sequence[int]) -> tuple[int, ...]:
    """What A makes of an image [C, H, W]. Raises OperatorError if it does not fit one."""
    return tuple(operator.forward(torch.zeros(1, *shape)).shape[1:])


def measured_values(operator: Operator, y: Tensor) -> int:
    """How many numbers of each y [N, ...] were measured: all, but of a mask those that it knows."""
    if isinstance(operator, Mask):
        return int(operator.known.expand(y.shape[1:]).count_nonzero())
    return y[0].numel()


def _each(r2: Tensor, like: Tensor) -> Tensor:
    """[N] as [N, 1, …], in the dtype of `like`."""
    return r2.to(like.dtype).view(-1, *([1] * (like.ndim - 1)))


@dataclass(frozen=True, eq=False)
class Mask:
    """Keeps the pixels where `known` is true, and has 0 for the rest. known: [H, W] or [C, H, W].

    AAᵀ is the identity on what is known. Raises OperatorError where nothing is.
    """

    known: Tensor

    def __post_init__(self) -> None:
        if not self.known.any():
            raise OperatorError("mask: no pixel is known")

    def forward(self, x: Tensor) -> Tensor:
        """A x."""
        known = self.known.to(x.device, x.dtype)
        if known.shape[-2:] != x.shape[-2:] or known.ndim not in (2, 3):
            raise OperatorError(
                f"mask: its shape is {tuple(known.shape)}, and that of an image {tuple(x.shape)}"
            )
        return x * known

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y."""
        return self.forward(y)

    def solve(self, y: Tensor, *, r2: Tensor, sigma2: float) -> Tensor:
        """y/(r² + σ²)."""
        return y / (_each(r2, y) + sigma2)


@dataclass(frozen=True, eq=False)
class AveragePool:
    """The mean of each block of factor × factor pixels: AAᵀ = I/factor². For super-resolution."""

    factor: int

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise OperatorError(f"factor = {self.factor}: must be 1 or more")

    def forward(self, x: Tensor) -> Tensor:
        """A x: [N, C, H/factor, W/factor]."""
        if any(side % self.factor for side in x.shape[-2:]):
            sides = " × ".join(str(side) for side in x.shape[-2:])
            raise OperatorError(f"factor = {self.factor}: does not divide {sides}")
        return F.avg_pool2d(x, self.factor)

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y: each value spread over its block."""
        spread = y.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1)
        return spread / self.factor**2

    def solve(self, y: Tensor, *, r2: Tensor, sigma2: float) -> Tensor:
        """y/(r²/factor² + σ²)."""
        return y / (_each(r2, y) / self.factor**2 + sigma2)


@dataclass(frozen=True, eq=False)
class Grey:
    """One weighted mean of the channels: AAᵀ = ‖w‖² I. For colouring."""

    weights: tuple[float, ...] = GREY_WEIGHTS

    def __post_init__(self) -> None:
        if len(self.weights) < 2:
            raise OperatorError(f"weights = {self.weights}: gray needs an image of many channels")
        if not any(self.weights):
            raise OperatorError(f"weights = {self.weights}: one must differ from 0")

    def forward(self, x: Tensor) -> Tensor:
        """A x: [N, 1, H, W]."""
        if x.shape[-3] != len(self.weights):
            channels = x.shape[-3]
            raise OperatorError(f"weights: {len(self.weights)} for an image of {channels} channels")
        return (x * self._weights(x)).sum(-3, keepdim=True)

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y: w y."""
        return y * self._weights(y)

    def solve(self, y: Tensor, *, r2: Tensor, sigma2: float) -> Tensor:
        """y/(r²‖w‖² + σ²)."""
        square = math.fsum(weight**2 for weight in self.weights)
        return y / (_each(r2, y) * square + sigma2)

    def _weights(self, like: Tensor) -> Tensor:
        return torch.tensor(self.weights, dtype=like.dtype, device=like.device).view(-1, 1, 1)


@dataclass(frozen=True, eq=False)
class Blur:
    """Convolution with a kernel [h, w] of odd sides around its middle; an image's ends meet.

    AAᵀ is diagonal in the Fourier domain. A frequency of which less than FAINTEST is left counts as
    lost, unless σ says how well it is known.
    """

    kernel: Tensor

    def __post_init__(self) -> None:
        if self.kernel.ndim != 2 or any(side % 2 == 0 for side in self.kernel.shape):
            shape = tuple(self.kernel.shape)
            raise OperatorError(f"kernel: its shape is {shape}, and must be two odd numbers")

    @classmethod
    def gaussian(cls, deviation: float, side: int) -> Blur:
        """A Gaussian of this deviation in pixels, for images of this side."""
        if not deviation > 0:
            raise OperatorError(f"deviation = {deviation}: must be greater than 0")
        reach = min(math.ceil(4 * deviation), (side - 1) // 2)
        at = torch.arange(-reach, reach + 1, dtype=torch.float64)
        line = torch.exp(-0.5 * (at / deviation) ** 2)
        line /= line.sum()
        return cls(line[:, None] * line)

    @cached_property
    def _spectra(self) -> dict[tuple[int, int, torch.dtype, torch.device], Tensor]:
        return {}

    def _spectrum(self, like: Tensor) -> Tensor:
        """The kernel's, [H, W/2 + 1]."""
        height, width = like.shape[-2:]
        key = (height, width, like.dtype, like.device)
        if key not in self._spectra:
            rows, columns = self.kernel.shape
            if rows > height or columns > width:
                size = f"{rows} × {columns}"
                raise OperatorError(f"kernel: {size} is larger than an image, {height} × {width}")
            plane = torch.zeros(height, width, dtype=torch.float64)
            plane[:rows, :columns] = self.kernel
            plane = plane.roll((-(rows // 2), -(columns // 2)), (0, 1))
            spectrum = torch.fft.rfft2(plane)
            wanted = torch.complex128 if like.dtype == torch.float64 else torch.complex64
            self._spectra[key] = spectrum.to(like.device, wanted)
        return self._spectra[key]

    def _times(self, x: Tensor, factor: Tensor) -> Tensor:
        made: Tensor = torch.fft.irfft2(torch.fft.rfft2(x) * factor, s=x.shape[-2:])
        return made

    def forward(self, x: Tensor) -> Tensor:
        """A x."""
        return self._times(x, self._spectrum(x))

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y: the convolution with the kernel turned round."""
        return self._times(y, self._spectrum(y).conj())

    def solve(self, y: Tensor, *, r2: Tensor, sigma2: float) -> Tensor:
        """ŷ/(r²|k̂|² + σ²), a frequency at a time."""
        power = self._spectrum(y).abs().square()
        bracket = _each(r2, y) * power + sigma2
        heard = (power >= FAINTEST**2) if sigma2 == 0 else torch.ones_like(power, dtype=torch.bool)
        return self._times(y, torch.where(heard, 1 / bracket.clamp_min(1e-30), 0.0))


@dataclass(frozen=True, eq=False)
class Identity:
    """The image itself: denoising at a known σ_y."""

    def forward(self, x: Tensor) -> Tensor:
        """x."""
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        """y."""
        return y

    def solve(self, y: Tensor, *, r2: Tensor, sigma2: float) -> Tensor:
        """y/(r² + σ²)."""
        return y / (_each(r2, y) + sigma2)


@dataclass(frozen=True, eq=False)
class Linear:
    """Any linear map by its A and its Aᵀ; systems are solved by conjugate gradients.

    A and Aᵀ take and give batches, and must be differentiable for the correction by moments.
    """

    a: Callable[[Tensor], Tensor]
    a_transposed: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """A x."""
        return self.a(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y."""
        return self.a_transposed(y)

    def solve(self, y: Tensor, *, r2: Tensor, sigma2: float) -> Tensor:
        """By conjugate gradients, to rounding wherever AAᵀ is well conditioned."""

        def bracket(v: Tensor) -> tuple[Tensor, Tensor]:
            return _each(r2, v) * self.forward(self.adjoint(v)) + sigma2 * v, v

        return conjugate_gradients(bracket, y, steps=_USER_STEPS)


def identity_of(operator: Operator) -> Hashable:
    """Equal for operators that do the same; of one's own, only for the very same object."""
    match operator:
        case Mask(known=values) | Blur(kernel=values):
            held = values.cpu().contiguous()
            return type(operator), held.dtype, tuple(held.shape), held.numpy().tobytes()
        case AveragePool(factor=factor):
            return AveragePool, factor
        case Grey(weights=weights):
            return Grey, weights
        case Identity():
            return Identity
        case _:
            return id(operator)


def furthest(operator: Operator) -> float:
    """How far from 0 a value of A x can lie, x in [−1, 1]; ∞ where only A and Aᵀ are known."""
    match operator:
        case Grey():
            return math.fsum(abs(weight) for weight in operator.weights)
        case Blur():
            return float(operator.kernel.abs().sum())
        case Mask() | AveragePool() | Identity():
            return 1.0
        case _:
            return math.inf


def adjoint_error(operator: Operator, shape: Sequence[int], *, seed: int = 0) -> float:
    """|⟨A v, u⟩ − ⟨v, Aᵀ u⟩|/(‖A v‖‖u‖) for random v and u in float64: 0 but for rounding.

    What to ask of an operator of one's own.
    """
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(1, *shape, dtype=torch.float64, generator=generator)
    a_v = operator.forward(v)
    u = torch.randn(a_v.shape, dtype=torch.float64, generator=generator)
    difference = (a_v * u).sum() - (v * operator.adjoint(u)).sum()
    return float(difference.abs() / (a_v.norm() * u.norm()))
