"""Forward variances and every table derived from them, in float64.

Glossary (arrays of length T; index i holds the paper's t = i + 1):

    betas            β_t            variance of a forward step
    alphas           α_t = 1 − β_t
    alphas_cumprod   ᾱ_t = ∏ α_s    (and ᾱ_0 = 1, the image: `alpha_bar(-1)`)
    snr              ᾱ_t / (1 − ᾱ_t)
    half_log_snr     λ_t = ½ ln SNR_t
    posterior_variance   β̃_t = β_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t), variance of q(x_{t−1} | x_t, x_0)
    x_start, x_t     the image x_0 and its noised form; eps is the noise ε

Between two indices λ is linear: so ᾱ, 1 − ᾱ and jumps are defined at every real t in 0..T−1.

Source: Ho, Jain, Abbeel 2020, sections 2 and 3; cosine: Nichol, Dhariwal 2021, eq. 17.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion.checks import as_tuple, check_real

Float64 = NDArray[np.float64]
MAX_T = 10_000  # ten times the paper's


class ScheduleError(ValueError):
    """A schedule that is no schedule; the message names the field."""


def read_only(table: Float64) -> Float64:
    """The array, which nobody may write to any more: so a copy on a device stays true."""
    table.setflags(write=False)
    return table


@dataclass(frozen=True, eq=False)
class Schedule:
    """A forward process, given by its betas [T], 0 < β_t < 1 (β_T = 1 is allowed).

    Raises ScheduleError also where ᾱ_t is 0 for more than the last t, by rounding.
    """

    betas: Float64

    def __post_init__(self) -> None:
        betas = np.array(self.betas, dtype=np.float64)
        if betas.ndim != 1 or betas.size == 0:
            raise ScheduleError(f"betas: must be a non-empty list, not of shape {betas.shape}")
        bad = np.flatnonzero(~((betas > 0) & (betas < 1)))
        if bad.size and not (bad.tolist() == [betas.size - 1] and betas[-1] == 1):
            i = int(bad[0])
            raise ScheduleError(f"betas[{i}] = {betas[i]}: must lie between 0 and 1")
        betas.setflags(write=False)
        object.__setattr__(self, "betas", betas)
        if lost := int((self.alphas_cumprod[:-1] == 0).sum()):
            raise ScheduleError(
                f"betas: ᾱ_t is 0 from t = {self.T - lost} on, in double precision: "
                f"the data must be lost at t = T = {self.T} at the earliest"
            )

    @property
    def T(self) -> int:
        """Number of diffusion steps."""
        return int(self.betas.size)

    @cached_property
    def alphas(self) -> Float64:
        """α_t = 1 − β_t."""
        return read_only(1.0 - self.betas)

    @cached_property
    def alphas_cumprod(self) -> Float64:
        """ᾱ_t."""
        return read_only(np.cumprod(self.alphas, dtype=np.float64))

    @cached_property
    def alphas_cumprod_prev(self) -> Float64:
        """ᾱ_{t−1}, with ᾱ_0 = 1."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def one_minus_alphas_cumprod(self) -> Float64:
        """1 − ᾱ_t without cancellation: −expm1(Σ ln α_s)."""
        with np.errstate(divide="ignore"):  # β_T = 1 gives ln 0 = −∞ and rightly 1 − ᾱ_T = 1
            return read_only(-np.expm1(np.cumsum(np.log1p(-self.betas))))

    @cached_property
    def sqrt_alphas_cumprod(self) -> Float64:
        """√ᾱ_t."""
        return read_only(np.sqrt(self.alphas_cumprod))

    @cached_property
    def sqrt_one_minus_alphas_cumprod(self) -> Float64:
        """√(1 − ᾱ_t)."""
        return read_only(np.sqrt(self.one_minus_alphas_cumprod))

    @cached_property
    def sqrt_alphas(self) -> Float64:
        """√α_t."""
        return read_only(np.sqrt(self.alphas))

    @cached_property
    def sqrt_betas(self) -> Float64:
        """√β_t."""
        return read_only(np.sqrt(self.betas))

    @cached_property
    def snr(self) -> Float64:
        """SNR_t = ᾱ_t / (1 − ᾱ_t)."""
        return self.alphas_cumprod / self.one_minus_alphas_cumprod

    @cached_property
    def half_log_snr(self) -> Float64:
        """λ_t = ½ ln SNR_t = ln(√ᾱ_t/√(1−ᾱ_t)), descending; −∞ where no signal is left."""
        with np.errstate(divide="ignore"):
            return read_only(0.5 * np.log(self.snr))

    @cached_property
    def posterior_variance(self) -> Float64:
        """β̃_t; β̃_1 = 0."""
        one_minus_prev = np.append(0.0, self.one_minus_alphas_cumprod[:-1])
        variance: Float64 = self.betas * one_minus_prev / self.one_minus_alphas_cumprod
        return variance

    @cached_property
    def posterior_log_variance_clipped(self) -> Float64:
        """ln β̃_t with ln β̃_1 := ln β̃_2, as in the paper's code (T = 1: ln β_1)."""
        first = self.posterior_variance[1] if self.T > 1 else self.betas[0]
        clipped: Float64 = np.log(np.append(first, self.posterior_variance[1:]))
        return clipped

    def alpha_bar(self, t: float) -> float:
        """ᾱ at index t, where t = −1 is the image (ᾱ_0 = 1)."""
        if (at := self._index(t)) is None:
            return 1 / (1 + math.exp(-2 * self.lambda_at(t)))
        return 1.0 if at == -1 else float(self.alphas_cumprod[at])

    def one_minus_alpha_bar(self, t: float) -> float:
        """1 − ᾱ at index t, to full relative accuracy."""
        if (at := self._index(t)) is None:
            return 1 / (1 + math.exp(2 * self.lambda_at(t)))
        return 0.0 if at == -1 else float(self.one_minus_alphas_cumprod[at])

    def lambda_at(self, t: float) -> float:
        """λ at index t: ∞ at the image, −∞ where no signal is left."""
        if self._index(t) == -1:
            return math.inf
        return float(np.interp(t, np.arange(self.T), self.half_log_snr))

    def _index(self, t: float) -> int | None:
        """t as an index, −1 for the image; None between two indices. Raises ScheduleError."""
        if not (0 <= t <= self.T - 1 or t == -1):
            raise ScheduleError(f"t = {t}: must be an index −1..{self.T - 1} (−1 is the image)")
        return int(t) if t == int(t) else None

    def jump(self, t: float, s: float) -> Jump:
        """The posterior q(x_s | x_t, x_0) for any −1 ≤ s < t < T; s = t − 1 is one step."""
        if not s < t:
            raise ScheduleError(f"jump from t = {t} to s = {s}: s must be smaller than t")
        alpha_bar_t, alpha_bar_s = self.alpha_bar(t), self.alpha_bar(s)
        rest_t, rest_s = self.one_minus_alpha_bar(t), self.one_minus_alpha_bar(s)
        alpha = alpha_bar_t / alpha_bar_s
        beta = self._forward_variance(t, s) if alpha else 1.0
        return Jump(
            beta=beta,
            coef_x_start=math.sqrt(alpha_bar_s) * beta / rest_t,
            coef_x_t=math.sqrt(alpha) * rest_s / rest_t,
            variance=beta * rest_s / rest_t,
        )

    def _forward_variance(self, t: float, s: float) -> float:
        """1 − ᾱ_t/ᾱ_s, to full relative accuracy, where x_t has a signal."""
        at, to = self._index(t), self._index(s)
        if at is not None and to is not None:
            return float(-np.expm1(np.log1p(-self.betas[to + 1 : at + 1]).sum()))
        high, low = (np.logaddexp(0.0, -2 * self.lambda_at(k)) for k in (t, s))  # −ln ᾱ
        return float(-np.expm1(low - high))


@dataclass(frozen=True)
class Jump:
    """q(x_s | x_t, x_0) = N(coef_x_start·x_0 + coef_x_t·x_t, variance·I).

    beta is 1 − ᾱ_t/ᾱ_s, the variance of the forward jump ("fixed large");
    variance is β̃ of the jump ("fixed small").
    """

    beta: float
    coef_x_start: float
    coef_x_t: float
    variance: float


def linear_schedule(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """The paper's schedule: β_t linear from 1e−4 to 0.02."""
    return Schedule(np.linspace(beta_start, beta_end, _positive(T), dtype=np.float64))


def cosine_schedule(T: int = 1000, offset: float = 0.008, beta_max: float = 0.999) -> Schedule:
    """ᾱ_t = f(t)/f(0), f(t) = cos²((t/T + s)/(1 + s)·π/2), β_t at most `beta_max`."""
    u = np.arange(_positive(T) + 1, dtype=np.float64) / T
    f = np.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
    return Schedule(np.minimum(1.0 - f[1:] / f[:-1], beta_max))


def _positive(T: int) -> int:
    if T < 1:
        raise ScheduleError(f"T = {T}: must be 1 or more")
    return T


@dataclass(frozen=True)
class ScheduleConfig:
    """What a checkpoint says of its schedule: `kind` linear, cosine or betas (an explicit list).

    A training may also say `learned`: linear at first, then trained; its checkpoints list betas.
    """

    kind: str = "linear"
    T: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    betas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in _BUILDERS:
            raise ScheduleError(f"kind = {self.kind!r}: must be one of {', '.join(_BUILDERS)}")
        if not isinstance(self.T, int) or isinstance(self.T, bool) or not 1 <= self.T <= MAX_T:
            raise ScheduleError(f"T = {self.T!r:.200}: must be an integer 1..{MAX_T}")
        for name in ("beta_start", "beta_end"):
            check_real(name, getattr(self, name), least=0, most=1, error=ScheduleError)
        if self.betas is not None:
            betas = as_tuple("betas", self.betas, error=ScheduleError)
            for i, beta in enumerate(betas):
                check_real(f"betas[{i}]", beta, error=ScheduleError)
            object.__setattr__(self, "betas", tuple(float(beta) for beta in betas))
        if (self.kind == "betas") != (self.betas is not None):
            raise ScheduleError("betas: must be given with kind = 'betas', and only then")
        if self.betas is not None and len(self.betas) != self.T:
            raise ScheduleError(f"T = {self.T}: must be the number of betas, {len(self.betas)}")

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Float64) -> ScheduleConfig:
        """A config that lists its betas."""
        return cls(kind="betas", T=len(betas), betas=tuple(float(b) for b in betas))

    def build(self) -> Schedule:
        """The tables."""
        return _BUILDERS[self.kind](self)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: only the fields that the kind uses."""
        if self.kind in ("linear", "learned"):
            ends = {"beta_start": self.beta_start, "beta_end": self.beta_end}
            return {"kind": self.kind, "T": self.T, **ends}
        if self.kind == "cosine":
            return {"kind": self.kind, "T": self.T}
        return {"kind": self.kind, "T": self.T, "betas": list(self.betas or ())}


_BUILDERS = {
    "linear": lambda c: linear_schedule(c.T, c.beta_start, c.beta_end),
    "cosine": lambda c: cosine_schedule(c.T),
    "betas": lambda c: Schedule(np.asarray(c.betas, dtype=np.float64)),
    "learned": lambda c: linear_schedule(c.T, c.beta_start, c.beta_end),
}
