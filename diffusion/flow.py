"""Log-likelihood by the probability flow (Song et al. 2021, arXiv 2011.13456, section 4.3).

With x̃ = x/√ᾱ and σ̃ = √((1−ᾱ)/ᾱ) the flow is dx̃/dσ̃ = ε̂. In τ = arsinh σ̃, where dσ̃ = dτ/√ᾱ,

    dx̃/dτ = ε̂/√ᾱ,    ln p_0(x_0) = ln N(x_T; 0, I) + (D/2) ln ᾱ_T + ∫ div_x ε̂ dτ

from the image (τ = 0) to T; D/2 ln ᾱ_T is the change of coordinates at T. At indices of the table
and of second order: x̃ by Heun's rule, the integral by trapezoids of ln τ; the divergence by
Hutchinson's estimator, e·(∂ε̂/∂x)e with e of ±1. It is an estimate of the model's density, no bound.

Each draw is a strand of rows (`flow_table`), whose state between two rows is x̃ and what of the sum
is there: rows of different strands can be evaluated together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.checks import check_flags, check_images, check_range, check_whole
from diffusion.condition import PRODUCT_COST
from diffusion.model import Estimate, Model, check_model
from diffusion.noise import Purpose, check_seed, normals
from diffusion.sampling import ClassLabel, class_labels
from diffusion.schedule import Schedule
from diffusion.spacings import spaced_timesteps
from diffusion.table import SamplerError

BIN = 1 / 127.5  # of 8 bits, where images lie in [−1, 1]
STEPS = 100
ROW_COST = 2 + PRODUCT_COST  # of a row, in network evaluations
_SLACK = 9.0  # data that are no pictures have a density too

Int64 = NDArray[np.int64]
Evaluate = Callable[[Tensor, Tensor], Estimate]


@dataclass(frozen=True, eq=False)
class FlowLikelihood:
    """log_density: float64 [N, draws], nats: one estimate a draw, of ln p_0 of the image,
    with noise of the width of a grey level where it was dequantised. dims: D."""

    log_density: Tensor
    dims: int

    @property
    def mean(self) -> Tensor:
        """[N], nats."""
        return self.log_density.mean(1)

    @property
    def standard_error(self) -> Tensor:
        """Of the mean, over probes and dequantisations, [N], nats; NaN of one draw."""
        draws = self.log_density.shape[1]
        return self.log_density.std(1) / math.sqrt(draws)

    @property
    def bits_per_dim(self) -> Tensor:
        """−log₂ of the mass of a grey level at that density, a dimension, [N]."""
        return -(self.mean / self.dims + math.log(BIN)) / math.log(2)


def flow_likelihood(
    model: Model,
    x_start: Tensor,
    *,
    draws: int = 4,
    steps: int | None = None,
    seed: int = 0,
    indices: Tensor | None = None,
    dequantise: bool = True,
    class_label: ClassLabel = None,
) -> FlowLikelihood:
    """Estimates of ln p_0 of images [N, C, H, W] in [−1, 1], in the precision of x_start.

    draws: of a probe, and of uniform noise within each grey level if `dequantise`; each is
    `steps` + 1 rows of 2 evaluations and a product with the Jacobian. steps: timesteps, by default
    100, or all where there are fewer. indices: int64 [N], the keys of the noise (default 0..N−1).
    Raises ImagesError, SamplerError or ValueError naming the bad argument.
    """
    check_model(model)
    check_images("x_start", x_start, model.shape, bounded=False)
    check_range("x_start", x_start, slack=_SLACK)
    check_whole("draws", draws, least=1, error=SamplerError)
    check_flags(dequantise=dequantise)
    T = model.schedule.T
    table = flow_table(
        model.schedule, spaced_timesteps(T, min(STEPS, T) if steps is None else steps)
    )
    n = len(x_start)
    keys = (torch.arange(n) if indices is None else indices).to(x_start.device)
    seeds = torch.full_like(keys, check_seed(seed))
    labels = class_labels(model, class_label, n) if class_label is not None else None

    def evaluate(x: Tensor, t: Tensor) -> Estimate:
        return model.estimate(x, t, labels)

    found = []
    for draw in range(draws):
        which = {"seeds": seeds, "indices": keys, "draws": torch.full_like(keys, draw)}
        x = dequantised(x_start, **which) if dequantise else x_start
        probe = probes(x_start, **which)
        total = torch.zeros(n, dtype=torch.float64)
        for row in range(len(table)):
            rows = table.at(np.full(n, row), like=x_start)
            x, nats = flow_row(evaluate, x, probe, rows)
            total += nats.double().cpu()
        found.append(total + log_prior(model.schedule, table, x))
    return FlowLikelihood(torch.stack(found, dim=1), x_start[0].numel())


@dataclass(frozen=True, eq=False)
class FlowRows:
    """Rows of strands, each [N]. t, ahead: indices at both ends of a step, where ε̂ is asked for;
    signal, signal_ahead: √ᾱ there; step: in τ; weight: of the divergence at t."""

    t: Tensor
    ahead: Tensor
    signal: Tensor
    signal_ahead: Tensor
    step: Tensor
    weight: Tensor


@dataclass(frozen=True, eq=False)
class FlowTable:
    """The rows of one draw, [R]; see `FlowRows`. The last goes nowhere: it ends the sum, and its
    second evaluation says nothing.

    t, ahead: int64; numbers: float64 [4, R], of signal, signal_ahead, step and weight.
    """

    t: Int64
    ahead: Int64
    numbers: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.t)

    def at(self, rows: Int64, like: Tensor) -> FlowRows:
        """These rows, in dtype and on device of `like`."""
        return gathered([(self, int(row)) for row in rows], like)


def gathered(places: Sequence[tuple[FlowTable, int]], like: Tensor) -> FlowRows:
    """A row of each strand, in dtype and on device of `like`."""
    ends = np.array([(table.t[row], table.ahead[row]) for table, row in places], np.int64)
    numbers = np.stack([table.numbers[:, row] for table, row in places], axis=1)
    t, ahead = torch.from_numpy(ends.T.copy()).to(like.device)
    return FlowRows(t, ahead, *torch.from_numpy(numbers).to(like))


def flow_table(schedule: Schedule, timesteps: Sequence[int]) -> FlowTable:
    """len(timesteps) + 1 rows from the image to the largest of the timesteps, indices 0..T−1.

    Raises SamplerError where x_t of one holds no signal: there τ has no end.
    """
    ends = np.sort(np.array(timesteps, np.int64))
    if not schedule.alpha_bar(int(ends[-1])):
        raise SamplerError(f"the flow has no end at t = {ends[-1] + 1}, where x_t holds no signal")
    # There is no network at the image: the first stretch has the slope at the first index.
    t, ahead = np.insert(ends, 0, ends[0]), np.append(ends, ends[-1])
    tau = np.array([_tau(schedule, int(s)) for s in ends])
    step = np.append(np.diff([0.0, *tau]), 0.0)
    # The divergence grows as 1/τ towards the image: the trapezoids are those of ln τ, where it
    # times τ is smooth. In τ itself, 50 steps of a digit are off by three bits a dimension.
    half = np.diff(np.log(tau)) / 2
    weight = np.insert(tau * (np.append(half, 0.0) + np.insert(half, 0, 0.0)), 0, 0.0)
    weight[:2] += step[0] / 2
    signal, signal_ahead = (
        np.sqrt([schedule.alpha_bar(int(s)) for s in indices]) for indices in (t, ahead)
    )
    return FlowTable(t, ahead, np.stack([signal, signal_ahead, step, weight]))


def flow_row(evaluate: Evaluate, x: Tensor, probe: Tensor, rows: FlowRows) -> tuple[Tensor, Tensor]:
    """x̃ [N, ...] a row further, and what the row adds to ln p_0 in nats, [N].

    evaluate: x, t → what the network finds there; called with gradients, then without. x: x̃.
    probe: e.
    """
    signal, signal_ahead, step = (_wide(v, x) for v in (rows.signal, rows.signal_ahead, rows.step))
    with torch.inference_mode(False), torch.enable_grad():
        # Copies, since autograd takes no tensor that was made in inference mode.
        at = (signal * x).clone().requires_grad_()
        eps = evaluate(at, rows.t.clone()).eps
        [product] = torch.autograd.grad(eps, at, probe.clone())
    slope = eps.detach() / signal
    guess = signal_ahead * (x + step * slope)
    with torch.no_grad():
        there = evaluate(guess, rows.ahead).eps / signal_ahead
    nats = rows.weight * (product * probe).flatten(1).sum(1)
    return x + step / 2 * (slope + there), nats


def log_prior(schedule: Schedule, table: FlowTable, x: Tensor) -> Tensor:
    """Of the last x̃ [N, ...]: what is left to add to ln p_0, float64 [N] on the host."""
    alpha_bar = schedule.alpha_bar(int(table.t[-1]))
    x_T = (math.sqrt(alpha_bar) * x).flatten(1).double().cpu()
    dims = x_T.shape[1]
    normal = -0.5 * (x_T.square().sum(1) + dims * math.log(2 * math.pi))
    return normal + dims / 2 * math.log(alpha_bar)


def dequantised(x_start: Tensor, *, seeds: Tensor, indices: Tensor, draws: Tensor) -> Tensor:
    """Images [N, ...] with uniform noise within a grey level, keyed by int64 [N] each."""
    z = _normals(x_start, Purpose.DEQUANTISE, seeds=seeds, indices=indices, draws=draws)
    uniform: Tensor = torch.special.ndtr(z)
    return x_start + (uniform - 0.5) * BIN


def probes(like: Tensor, *, seeds: Tensor, indices: Tensor, draws: Tensor) -> Tensor:
    """e of ±1, [N, ...] as `like`."""
    z = _normals(like, Purpose.PROBE, seeds=seeds, indices=indices, draws=draws)
    return torch.where(z < 0, -1.0, 1.0).to(like.dtype)


def _normals(like: Tensor, purpose: Purpose, *, draws: Tensor, **keys: Any) -> Tensor:
    shape = tuple(like.shape[1:])
    return normals(keys["seeds"], keys["indices"], rows=draws, purpose=purpose, shape=shape).to(
        like.dtype
    )


def _wide(v: Tensor, like: Tensor) -> Tensor:
    return v.view(-1, *([1] * (like.ndim - 1)))


def _tau(schedule: Schedule, t: int) -> float:
    """arsinh of the noise-to-signal ratio."""
    return float(np.arcsinh(math.sqrt(schedule.one_minus_alpha_bar(t) / schedule.alpha_bar(t))))
