"""Progressive lossy coding: Ho et al. 2020, section 4.3, from the terms of the bound.

Sending x_T, …, x_t costs L_T + … + L_t; who holds x_t can show x̂_0(x_t). The paper's table counts
the reverse steps done, n = T + 1 − t, so that its last line, n = T, is at t = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffusion.schedule import Float64
from training.bits import Measured


@dataclass(frozen=True, eq=False)
class Curve:
    """Arrays [T], by falling t: reverse steps n, t = T+1−n (1..T), bits/dim, RMSE on 0..255."""

    steps: NDArray[np.int64]
    t: NDArray[np.int64]
    rate: Float64
    rmse: Float64

    def at(self, steps: Sequence[int]) -> list[dict[str, float]]:
        """The rows of these numbers of reverse steps."""
        picked = [int(np.flatnonzero(self.steps == n)[0]) for n in steps]
        return [
            {
                "reverse_steps": int(self.steps[i]),
                "t": int(self.t[i]),
                "rate_bits_per_dim": float(self.rate[i]),
                "rmse": float(self.rmse[i]),
            }
            for i in picked
        ]


def rate_distortion(full: Measured, variance: str) -> Curve:
    """The curve of a full sum: mean rate, and the root of the mean square over all images."""
    terms = full.term_bits(variance).mean(0)
    T = len(terms)
    rate = rate_of(terms, float(full.prior_bits().mean()))
    t = np.arange(T, 0, -1)
    # x̂_0(x_t) is found by the network call of index t−1.
    rmse = 127.5 * np.sqrt(full.squared_error.mean(0)[t - 1])
    return Curve(T + 1 - t, t, rate, rmse)


def rate_of(terms: Float64, prior: float) -> Float64:
    """L_T + … + L_t for t = T, …, 1, [T], from the terms L_0 … L_{T−1} and L_T."""
    rate: Float64 = prior + np.append(0.0, np.cumsum(terms[:0:-1]))
    return rate


def paper_steps(T: int) -> list[int]:
    """The lines of the paper's table, T, 0.9 T, …, 0.1 T (those that are whole, at least 1)."""
    return sorted({max(1, T * tenth // 10) for tenth in range(1, 11)}, reverse=True)


def markdown(rows: list[dict[str, float]]) -> str:
    """The rows as a table, with the paper's columns."""
    lines = [
        "| reverse steps (T−t+1) | rate (bits/dim) | distortion (RMSE [0, 255]) |",
        "|---|---|---|",
    ]
    lines += [
        f"| {row['reverse_steps']} | {row['rate_bits_per_dim']:.5f} | {row['rmse']:.5f} |"
        for row in rows
    ]
    return "\n".join(lines)
