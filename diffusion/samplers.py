"""Every sampler as a table: one row a network evaluation, one fused update for a mixed batch.

A row evaluates the network at index t, which gives x̂_0 and ε̂ (`Model.read`), and then updates

    x̂_0 ← clip(x̂_0)
    x   ← a·x̂_0 + b·x + d·x̂_0,prev + c·z + e·ε̂

so rows of different samplers, at different timesteps, step together in one batch. A learned
variance scales z first, by exp(spread·v) with v the second half of the network's output. Ancestral
sampling: Ho et al. 2020, algorithm 2; over a sub-sequence, with the posterior of each jump. DDIM:
Song et al. 2021, eq. 12. DPM-Solver++(2M): Lu et al. 2022, algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.noise import Purpose
from diffusion.schedule import Float64, Schedule

COLUMNS = ("clip", "a", "b", "d", "c", "e")
SAMPLERS = ("ddpm", "ddim", "dpmpp_2m", "langevin")
SPACINGS = ("uniform", "quadratic", "leading", "trailing")
VARIANCES = ("large", "small", "learned")
LANDINGS = ("next", "stride")


class SamplerError(ValueError):
    """Sampler options that make no table; the message names the field."""


@dataclass(frozen=True)
class SamplingDefaults:
    """How a model is meant to be sampled: what holds where the caller says nothing.

    sampler, variance, clip, spacing: as in the functions below. A `learned` variance is that of
    a network with `learned_variance`. Two conventions of ddim: rederive_eps, whether ε̂ is the one
    that agrees with the clipped x̂_0, or the network's own as in diffusers; landing, whether a step
    lands on the `next` timestep, or T // steps lower (`stride`) as in diffusers.
    """

    sampler: str = "ddpm"
    variance: str = "large"
    clip: bool = True
    spacing: str = "uniform"
    rederive_eps: bool = True
    landing: str = "next"

    def __post_init__(self) -> None:
        _check_name("sampler", self.sampler, SAMPLERS)
        _check_name("variance", self.variance, VARIANCES)
        _check_name("spacing", self.spacing, SPACINGS)
        _check_name("landing", self.landing, LANDINGS)
        for name in ("clip", "rederive_eps"):
            if not isinstance(value := getattr(self, name), bool):
                raise SamplerError(f"{name} = {value!r:.200}: must be true or false")


def _check_name(field: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise SamplerError(f"{field} = {value!r}: must be one of {', '.join(allowed)}")


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """Rows of one sampler.

    t: [R] int64, index 0..T−1 of each evaluation. coefficients: [R, 6] float64, see COLUMNS (clip
    is the bound on |x̂_0|, ∞ for none). purpose: [R], the stream of each row's noise, and noise:
    [R], its place there (default t; see `Purpose`). spread: [R], ¼ ln(β/β̃) of a row with a
    learned variance, else 0 (default). Raises SamplerError where two rows would draw the same.
    """

    t: NDArray[np.int64]
    coefficients: Float64
    purpose: NDArray[np.int64]
    spread: Float64 = field(default_factory=lambda: np.zeros(0))
    noise: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        if not self.spread.size:
            object.__setattr__(self, "spread", np.zeros(len(self)))
        if not self.noise.size:
            object.__setattr__(self, "noise", self.t)
        if len({*zip(self.purpose.tolist(), self.noise.tolist(), strict=True)}) < len(self):
            raise SamplerError("noise: two rows of a table have the same purpose and place")

    def __len__(self) -> int:
        return int(self.t.size)

    @property
    def has_memory(self) -> bool:
        """Whether a row reads x̂_0 of the row before it."""
        return bool(np.any(self.coefficients[:, COLUMNS.index("d")]))

    @property
    def learned_variance(self) -> bool:
        """Whether a row reads v, the second half of the network's output."""
        return bool(np.any(self.spread))


def spaced_timesteps(T: int, steps: int, spacing: str = "uniform") -> list[int]:
    """`steps` indices out of 0..T−1, descending.

    spacing: uniform, or quadratic (denser near the image): the first is T−1 and, if steps > 1,
    the last 0. leading counts every (T // steps)-th from 0, trailing every (T/steps)-th from T−1:
    they leave out one of the two ends. uniform (diffusers' linspace), leading and trailing are
    rounded as in diffusers; not so its one step of linspace, at 0, and the row of index −1 that
    its trailing adds where T, T − T/steps, … misses 0 by rounding. Raises SamplerError.
    """
    if not 1 <= steps <= T:
        raise SamplerError(f"steps = {steps}: must be 1..{T}")
    _check_name("spacing", spacing, SPACINGS)
    if spacing == "leading":
        return [i * (T // steps) for i in reversed(range(steps))]
    if spacing == "trailing":
        return [int(t) - 1 for t in np.arange(T, 0, -T / steps).round()[:steps]]
    if steps == 1:
        return [T - 1]
    ts = np.linspace(0, T - 1, steps).round() if spacing == "uniform" else _quadratic(T, steps)
    return [int(t) for t in ts[::-1]]


def _quadratic(T: int, steps: int) -> Float64:
    """(T−1)u² for even u; those that round to one index are pushed apart, keeping both ends."""
    ts: Float64 = np.rint((T - 1) * np.linspace(0, 1, steps) ** 2)
    for i in range(1, steps):
        ts[i] = max(ts[i], ts[i - 1] + 1)
    return ts


def checked_timesteps(T: int, timesteps: Sequence[int]) -> list[int]:
    """The indices as a list, or SamplerError unless strictly descending within 0..T−1."""
    ts = [int(t) for t in timesteps]
    if not ts or ts[0] >= T or ts[-1] < 0 or any(a <= b for a, b in pairwise(ts)):
        raise SamplerError(f"timesteps = {ts}: must be strictly descending within 0..{T - 1}")
    return ts


def empty_rows(n: int, clip: bool) -> Float64:
    """Rows [n, 6] with clip filled in, and the rest 0."""
    rows = np.zeros((n, len(COLUMNS)))
    rows[:, 0] = 1.0 if clip else math.inf
    return rows


def _table(ts: list[int], rows: Float64) -> SamplerTable:
    purpose = np.full(len(ts), Purpose.STEP, dtype=np.int64)
    return SamplerTable(np.array(ts, dtype=np.int64), rows, purpose)


def ancestral(
    schedule: Schedule, timesteps: Sequence[int], *, variance: str = "large", clip: bool = True
) -> SamplerTable:
    """DDPM over any descending sub-sequence; the last row lands on the image, without noise.

    variance: σ² of each jump t→s: large β = 1 − ᾱ_t/ᾱ_s, small β̃, or learned, exp(f ln β +
    (1−f) ln β̃) with f = (v+1)/2 from the network (Nichol, Dhariwal 2021, eq. 15).
    """
    _check_name("variance", variance, VARIANCES)
    ts = checked_timesteps(schedule.T, timesteps)
    rows, spread = empty_rows(len(ts), clip), np.zeros(len(ts))
    for i, (t, s) in enumerate(zip(ts, [*ts[1:], -1], strict=True)):
        jump = schedule.jump(t, s)
        # The learned σ = (β β̃)^¼ exp(spread·v) is their geometric mean at v = 0.
        middle = math.sqrt(jump.beta * jump.variance)
        sigma2 = {"large": jump.beta, "small": jump.variance, "learned": middle}[variance]
        noise = math.sqrt(sigma2) if s >= 0 else 0.0
        rows[i, 1:] = jump.coef_x_start, jump.coef_x_t, 0.0, noise, 0.0
        if variance == "learned" and s >= 0:
            spread[i] = 0.25 * math.log(jump.beta / jump.variance)
    return replace(_table(ts, rows), spread=spread)


def ddim(
    schedule: Schedule,
    timesteps: Sequence[int],
    *,
    eta: float = 0.0,
    clip: bool = True,
    rederive_eps: bool = True,
    landings: Sequence[int] | None = None,
) -> SamplerTable:
    """DDIM: x_s = √ᾱ_s x̂_0 + √(1−ᾱ_s−σ²) ε̂ + σ z with σ² = η² β̃ of the jump.

    rederive_eps: ε̂ is the one that agrees with the clipped x̂_0, else the network's own. η = 1 with
    the first is ancestral sampling with σ² small. landings: the s of each row; default, the t of
    the next row, and −1 (the image) after the last.
    """
    if not 0 <= eta <= 1:
        raise SamplerError(f"eta = {eta}: must lie between 0 and 1")
    ts = checked_timesteps(schedule.T, timesteps)
    rows = empty_rows(len(ts), clip)
    landings = [*ts[1:], -1] if landings is None else landings
    for i, (t, s) in enumerate(zip(ts, landings, strict=True)):
        sigma2 = eta**2 * schedule.jump(t, s).variance
        a = math.sqrt(schedule.alpha_bar(s))
        direction = math.sqrt(max(schedule.one_minus_alpha_bar(s) - sigma2, 0.0))
        if rederive_eps:  # ε̂ = (x − √ᾱ_t x̂_0)/√(1−ᾱ_t)
            b = direction / math.sqrt(schedule.one_minus_alpha_bar(t))
            a -= b * math.sqrt(schedule.alpha_bar(t))
            rows[i, 1:] = a, b, 0.0, math.sqrt(sigma2), 0.0
        else:
            rows[i, 1:] = a, 0.0, 0.0, math.sqrt(sigma2), direction
    return _table(ts, rows)


def dpmpp_2m(schedule: Schedule, timesteps: Sequence[int], *, clip: bool = True) -> SamplerTable:
    """DPM-Solver++(2M), second order through x̂_0 of the row before; first and last row first order.

    With λ = ln(√ᾱ/√(1−ᾱ)), h = λ_s − λ_t and r = h_prev/h:
    x_s = √((1−ᾱ_s)/(1−ᾱ_t)) x_t − √ᾱ_s (e^{−h} − 1) ((1 + 1/2r) x̂_0 − x̂_0,prev/2r).
    """
    ts = checked_timesteps(schedule.T, timesteps)
    rows = empty_rows(len(ts), clip)
    h_prev = 0.0
    for i, (t, s) in enumerate(zip(ts, [*ts[1:], -1], strict=True)):
        if s == -1:  # λ = ∞: the step lands on x̂_0 itself
            rows[i, 1:] = 1.0, 0.0, 0.0, 0.0, 0.0
            continue
        h = _half_log_snr(schedule, s) - _half_log_snr(schedule, t)
        gain = -math.sqrt(schedule.alpha_bar(s)) * math.expm1(-h)
        half = h / (2 * h_prev) if i else 0.0  # 1/2r; 0 also after a row without signal, h = ∞
        b = math.sqrt(schedule.one_minus_alpha_bar(s) / schedule.one_minus_alpha_bar(t))
        rows[i, 1:] = gain * (1 + half), b, -gain * half, 0.0, 0.0
        h_prev = h
    return _table(ts, rows)


def _half_log_snr(schedule: Schedule, t: int) -> float:
    return 0.5 * math.log(schedule.snr[t]) if schedule.snr[t] else -math.inf


@dataclass(frozen=True, eq=False)
class DeviceTable:
    """Tables laid end to end on a device: a row index is all a sample has to carry.

    t, purpose, noise: [R] int64; coefficients: [R, 6] float32; spread: [R] float32.
    """

    t: Tensor
    coefficients: Tensor
    purpose: Tensor
    spread: Tensor
    noise: Tensor

    @classmethod
    def of(cls, tables: Sequence[SamplerTable], device: torch.device | str) -> DeviceTable:
        """Concatenate tables; the rows of table k start at the sum of the lengths before it."""
        return cls(
            torch.from_numpy(np.concatenate([table.t for table in tables])).to(device),
            torch.from_numpy(np.concatenate([table.coefficients for table in tables]))
            .to(torch.float32)
            .to(device),
            torch.from_numpy(np.concatenate([table.purpose for table in tables])).to(device),
            torch.from_numpy(np.concatenate([table.spread for table in tables]))
            .to(torch.float32)
            .to(device),
            torch.from_numpy(np.concatenate([table.noise for table in tables])).to(device),
        )


def clip_x_start(rows: Tensor, x_start: Tensor) -> Tensor:
    """x̂_0 of each sample, clipped as its row says. rows: [N, 6]; x_start: [N, ...]."""
    bound = _column(rows, "clip", x_start)
    return torch.maximum(torch.minimum(x_start, bound), -bound)


def scale_noise(spread: Tensor, v: Tensor, z: Tensor) -> Tensor:
    """z·exp(spread·v), the noise of a learned variance; z itself where spread = 0.

    spread: [N], gathered at each sample's row; v, z: [N, ...].
    """
    return z * torch.exp(spread.view(-1, *([1] * (z.ndim - 1))) * v)


def update(
    rows: Tensor, x: Tensor, *, x_start: Tensor, eps: Tensor, x_start_prev: Tensor, z: Tensor
) -> Tensor:
    """The next x of each sample: a·x̂_0 + b·x + d·x̂_0,prev + c·z + e·ε̂.

    rows: [N, 6], the table's coefficients gathered at each sample's row; the rest [N, ...].
    """
    a, b, d, c, e = (_column(rows, name, x) for name in COLUMNS[1:])
    return a * x_start + b * x + d * x_start_prev + c * z + e * eps


def _column(rows: Tensor, name: str, like: Tensor) -> Tensor:
    return rows[:, COLUMNS.index(name)].view(-1, *([1] * (like.ndim - 1)))
