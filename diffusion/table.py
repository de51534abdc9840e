"""A sampler as a table: one row a network evaluation, one fused update for a mixed batch.

A row evaluates the network at its time t, which gives x̂_0 and ε̂ (`Model.read`), and then updates

    x̂_0 ← clip(x̂_0)
    x   ← a·x̂_0 + b·x + d·x̂_0,prev + f·x̂_0,older + c·z + e·ε̂

so rows of different samplers, at different timesteps, step together in one batch. A learned
variance scales z first, by exp(spread·v) with v the second half of the network's output. What
x̂_0,prev is, the row before says: its x̂_0, or something else (`Memory`); x̂_0,older is what the row
before read as x̂_0,prev.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.noise import Purpose
from diffusion.schedule import Float64

COLUMNS = ("clip", "a", "b", "d", "c", "e", "f")


class Memory(IntEnum):
    """What a row leaves for the next to read as x̂_0,prev."""

    X_START = 0  # its x̂_0
    X_T = 1  # the x that entered it
    KEEP = 2  # what it read itself


class SamplerError(ValueError):
    """Sampler options that make no table; the message names the field."""


def check_name(field: str, value: object, allowed: Collection[str]) -> None:
    """Raise SamplerError, naming the field, for a value that is not allowed."""
    if value not in allowed:
        raise SamplerError(f"{field} = {value!r}: must be one of {', '.join(allowed)}")


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """Rows of one sampler.

    t: [R] int64, index 0..T−1 that names each evaluation. time: [R] float64, where it takes place
    (default t): a real number, of which t is the nearest index, or a neighbour of that where other
    rows are as near. coefficients: [R, 7] float64, see COLUMNS (clip is the bound on |x̂_0|, ∞ for
    none). purpose: [R], the stream of each row's noise, and noise:
    [R], its place there (default t; see `Purpose`). spread: [R], ¼ ln(β/β̃) of a row with a
    learned variance, else 0 (default). memory: [R], see `Memory`. Raises
    SamplerError where two rows would draw the same.
    """

    t: NDArray[np.int64]
    coefficients: Float64
    purpose: NDArray[np.int64]
    spread: Float64 = field(default_factory=lambda: np.zeros(0))
    noise: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    memory: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    time: Float64 = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        if not self.spread.size:
            object.__setattr__(self, "spread", np.zeros(len(self)))
        if not self.noise.size:
            object.__setattr__(self, "noise", self.t)
        if not self.memory.size:
            object.__setattr__(self, "memory", np.zeros_like(self.t))
        if not self.time.size:
            object.__setattr__(self, "time", self.t.astype(np.float64))
        lengths = {len(getattr(self, column.name)) for column in fields(self)}
        if len(lengths) > 1:
            raise SamplerError(f"columns of a table have different lengths: {sorted(lengths)}")
        noisy = self.coefficients[:, COLUMNS.index("c")] != 0
        streams = [*zip(self.purpose[noisy].tolist(), self.noise[noisy].tolist(), strict=True)]
        if len({*streams}) < len(streams):
            raise SamplerError("noise: two rows of a table have the same purpose and place")

    def __len__(self) -> int:
        return int(self.t.size)

    @property
    def depth(self) -> int:
        """How many rows back the x̂_0 lies that a row reads: 0, 1 or 2."""
        if np.any(self.coefficients[:, COLUMNS.index("f")]):
            return 2
        return int(np.any(self.coefficients[:, COLUMNS.index("d")]))

    @property
    def between(self) -> NDArray[np.bool_]:
        """Rows whose time lies between two indices, [R]."""
        found: NDArray[np.bool_] = self.time != self.t
        return found

    @property
    def learned_variance(self) -> bool:
        """Whether a row reads v, the second half of the network's output."""
        return bool(np.any(self.spread))


def checked_timesteps(T: int, timesteps: Sequence[float]) -> list[float]:
    """The timesteps as a list, or SamplerError unless strictly descending within 0..T−1."""
    ts = [float(t) for t in timesteps]
    if not ts or not ts[0] <= T - 1 or not ts[-1] >= 0 or _rises(ts):
        raise SamplerError(f"timesteps = {ts}: must be strictly descending within 0..{T - 1}")
    return ts


def _rises(ts: list[float]) -> bool:
    return any(not a > b for a, b in pairwise(ts))


def own_indices(times: Sequence[float]) -> list[int]:
    """Indices for descending times, each its own: the nearest, or next to that where taken."""
    ts: list[int] = []
    for time in times:
        ts.append(min(round(time), ts[-1] - 1) if ts else round(time))
    for i in range(1, len(ts) + 1):  # no room was left below
        ts[-i] = max(ts[-i], i - 1)
    return ts


def empty_rows(n: int, clip: bool) -> Float64:
    """Rows [n, 7] with clip filled in, and the rest 0."""
    rows = np.zeros((n, len(COLUMNS)))
    rows[:, 0] = 1.0 if clip else math.inf
    return rows


def put(rows: Float64, i: int, **columns: float) -> None:
    """Fill in columns of row i, by name; those that are not named stay as they are."""
    for name, value in columns.items():
        rows[i, COLUMNS.index(name)] = value


def first_order(rows: Float64) -> Float64:
    """The rows with all that they read of earlier x̂_0 read of their own instead."""
    own, earlier = COLUMNS.index("a"), [COLUMNS.index(name) for name in "df"]
    found = rows.copy()
    found[:, own] += found[:, earlier].sum(1)
    found[:, earlier] = 0.0
    return found


def stepping(times: Sequence[float], rows: Float64) -> SamplerTable:
    """The table of rows at descending times that draw the noise of plain steps."""
    purpose = np.full(len(times), Purpose.STEP, dtype=np.int64)
    t = np.array(own_indices(times), dtype=np.int64)
    return SamplerTable(t, rows, purpose, time=np.array(times, dtype=np.float64))


@dataclass(frozen=True, eq=False)
class DeviceTable:
    """Tables laid end to end on a device: a row index is all a sample has to carry.

    t, purpose, noise, memory: [R] int64; time: [R] float64; coefficients: [R, 7] float32; spread:
    [R] float32.
    """

    t: Tensor
    coefficients: Tensor
    purpose: Tensor
    spread: Tensor
    noise: Tensor
    memory: Tensor
    time: Tensor

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
            torch.from_numpy(np.concatenate([table.memory for table in tables])).to(device),
            torch.from_numpy(np.concatenate([table.time for table in tables])).to(device),
        )


def clip_x_start(rows: Tensor, x_start: Tensor) -> Tensor:
    """x̂_0 of each sample, clipped as its row says. rows: [N, 7]; x_start: [N, ...]."""
    bound = _column(rows, "clip", x_start)
    return torch.maximum(torch.minimum(x_start, bound), -bound)


def scale_noise(spread: Tensor, v: Tensor, z: Tensor) -> Tensor:
    """z·exp(spread·v), the noise of a learned variance; z itself where spread = 0.

    spread: [N], gathered at each sample's row; v, z: [N, ...].
    """
    return z * torch.exp(spread.view(-1, *([1] * (z.ndim - 1))) * v)


def update(
    rows: Tensor,
    x: Tensor,
    *,
    x_start: Tensor,
    eps: Tensor,
    x_start_prev: Tensor,
    z: Tensor,
    x_start_older: Tensor | None = None,
) -> Tensor:
    """The next x of each sample: a·x̂_0 + b·x + d·x̂_0,prev + c·z + e·ε̂ (+ f·x̂_0,older).

    rows: [N, 7], the table's coefficients gathered at each sample's row; the rest [N, ...].
    """
    a, b, d, c, e, f = (_column(rows, name, x) for name in COLUMNS[1:])
    x_next = a * x_start + b * x + d * x_start_prev + c * z + e * eps
    return x_next if x_start_older is None else x_next + f * x_start_older


def remember(memory: Tensor, *, x_start: Tensor, x: Tensor, x_start_prev: Tensor) -> Tensor:
    """What each sample's row leaves for the next as x̂_0,prev. memory: [N]; the rest [N, ...]."""
    said = memory.view(-1, *([1] * (x.ndim - 1)))
    kept = torch.where(said == Memory.X_T, x, x_start)
    return torch.where(said == Memory.KEEP, x_start_prev, kept)


def _column(rows: Tensor, name: str, like: Tensor) -> Tensor:
    return rows[:, COLUMNS.index(name)].view(-1, *([1] * (like.ndim - 1)))
