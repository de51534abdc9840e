"""Which terms of the bound to evaluate for an image: all of them, or a Monte Carlo choice.

full sum      L_k at every k, weight 1
Monte Carlo   L_0 m times, weight 1/m, and n = K−m draws of k ≥ 1 by probabilities p_k, weight
              1/(n p_k); stratified: draw j falls into the j-th of n equal parts of p
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.bound import BoundError, BoundTable
from diffusion.checks import check_whole
from diffusion.noise import Purpose, check_seed, uniform_words
from diffusion.schedule import Float64
from diffusion.weights import x_start_weight

_UNIFORM_SHARE = 0.1  # of the proposal: bounds every weight
# Of the evaluations, for L_0: of a trained network one draw of it scatters by about a sixth of
# what n draws of the other terms scatter by, times √n, so this is near the best division.
_DECODER_SHARE = 6


@dataclass(frozen=True, eq=False)
class Plan:
    """Which terms to evaluate for each image. Arrays [N, K].

    row: of the table, so the term L_row; repeat: 0, 1, … among the draws of the same row of an
    image (it keys the noise); weight: what the term counts in the estimate of L_0 + … + L_{T−1}.
    """

    row: NDArray[np.int64]
    repeat: NDArray[np.int64]
    weight: Float64


def full_plan(table: BoundTable, n: int, repeats: int = 1) -> Plan:
    """Every term of every image, `repeats` times with fresh noise."""
    rows = np.tile(np.arange(len(table)), repeats)
    repeat = np.repeat(np.arange(repeats), len(table))
    shape = (n, len(rows))
    return Plan(
        np.broadcast_to(rows, shape),
        np.broadcast_to(repeat, shape),
        np.full(shape, 1 / repeats),
    )


def monte_carlo_plan(
    table: BoundTable,
    *,
    seed: int,
    indices: Tensor,
    samples: int,
    decoder_draws: int | None = None,
    proposal: Float64 | None = None,
) -> Plan:
    """`samples` evaluations an image: draws of L_0, and stratified ones of the terms above it.

    indices: [N] int64, the images' keys. decoder_draws: of L_0, default `default_decoder_draws`.
    proposal: [R] relative probabilities of the rows (row 0 is ignored); default
    `schedule_proposal`. Raises BoundError: fewer than 2 samples, none for L_0 or for the rest, a
    proposal that is not positive.
    """
    check_whole("samples", samples, least=2, error=BoundError)
    if len(table) < 2:
        raise BoundError(f"T = {len(table)}: must be 2 or more, L_0 and one term")
    m = default_decoder_draws(samples) if decoder_draws is None else decoder_draws
    if not 1 <= m < samples:
        raise BoundError(f"decoder_draws = {m}: must be 1..{samples - 1} of {samples} samples")
    p = (schedule_proposal(table) if proposal is None else np.asarray(proposal))[1:]
    if p.shape != (len(table) - 1,) or not np.all((p > 0) & np.isfinite(p)):
        raise BoundError(f"proposal: must be {len(table)} positive values, one a term")
    p = p / p.sum()
    draws = samples - m
    uniform = _uniforms(seed, indices, draws)  # [N, draws]
    edges = np.cumsum(p)
    drawn = np.searchsorted(edges / edges[-1], (np.arange(draws) + uniform) / draws, side="right")
    drawn = np.minimum(drawn, len(p) - 1)
    row = np.concatenate([np.zeros((len(indices), m), np.int64), drawn + 1], axis=1)
    weight = np.full(row.shape, 1 / m)
    weight[:, m:] = 1 / (draws * p[drawn])
    return Plan(row, _occurrence(row), weight)


def default_decoder_draws(samples: int) -> int:
    """How often L_0 is drawn: a sixth of the evaluations, at least twice if there are three."""
    return min(max(2, samples // _DECODER_SHARE), samples - 1)


def _uniforms(seed: int, indices: Tensor, draws: int) -> Float64:
    """[N, draws] in (0, 1), keyed by (seed, image index, draw)."""
    keys = indices.cpu().repeat_interleave(draws)
    rows = torch.arange(draws).repeat(len(indices))
    seeds = torch.full_like(keys, check_seed(seed))
    words = uniform_words(seeds, keys, rows=rows, purpose=Purpose.LIKELIHOOD_DRAWS)[:, 0]
    uniform: Float64 = (words.numpy().reshape(len(indices), draws) + 0.5) / 2**32
    return uniform


def _occurrence(row: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many equal entries stand before each in its line; lines are sorted."""
    start = np.ones(row.shape, dtype=bool)
    start[:, 1:] = row[:, 1:] != row[:, :-1]
    position = np.broadcast_to(np.arange(row.shape[1]), row.shape)
    first = np.maximum.accumulate(np.where(start, position, 0), axis=1)
    return position - first


def schedule_proposal(table: BoundTable) -> Float64:
    """Relative probabilities [R] of the terms: the schedule's own guess of their root mean squares.

    The terms of Gaussian data with the exact denoiser, averaged over variances from 1e-4 to 1
    (images have power at all scales), plus a tenth spread evenly. No statistics of a model
    enter, so every program draws the same t.
    """
    weight = x_start_weight(table, "small")
    v = np.logspace(-4, 0, 9)[:, None]
    terms = (weight * v / (1 + v * table.snr)).mean(0)  # E(x_0 − E[x_0|x_t])² = v/(1 + v·SNR)
    terms[0] = 0.0
    p = (1 - _UNIFORM_SHARE) * terms / terms.sum() + _UNIFORM_SHARE / max(len(table) - 1, 1)
    return np.append(1.0, p[1:])


def measured_proposal(nats: Float64) -> Float64:
    """√E[L_k²] of measured terms [N, R] (Improved DDPM, eq. 18), with a tenth spread evenly."""
    root = np.sqrt(np.mean(np.square(nats), axis=0))
    rest = root[1:].mean()
    return np.append(1.0, (1 - _UNIFORM_SHARE) * root[1:] + _UNIFORM_SHARE * rest)


def pairs(plan: Plan, batch_size: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(image, draw) positions of a plan in batches, image by image."""
    n, k = plan.row.shape
    for first in range(0, n * k, batch_size):
        flat = np.arange(first, min(first + batch_size, n * k), dtype=np.int64)
        yield flat // k, flat % k
