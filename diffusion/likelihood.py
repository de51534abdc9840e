"""Estimates of the bound for images, term by term.

One evaluation is (image, t): noise x_0 to x_t, run the network once, compute one term. Its noise
is counter-based, keyed by (seed, image index, t), so the same images, seed and t give the same
number in any batch, on any device, and whichever program asks. Which t: see `term_plan`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.bound import (
    BoundError,
    BoundTable,
    bits_per_dim,
    bound_table,
    learned_log_variance,
    prior_nats,
    transition_nats,
)
from diffusion.checks import check_images, check_whole
from diffusion.forward import gather, q_sample
from diffusion.model import Model, check_model
from diffusion.noise import Purpose, check_seed, normals
from diffusion.parameterization import to_x_start
from diffusion.sampling import ClassLabel, class_labels
from diffusion.schedule import Float64, Schedule
from diffusion.term_plan import Plan, full_plan, monte_carlo_plan, pairs

_Z = 1.96  # of the normal distribution, at 97.5 %
_SECOND_DIFFERENCES = 18 / 35  # degrees of freedom that they leave of each draw


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One term for each of N (image, t) pairs.

    nats: [N] float64; squared_error: mean square of x_0 − x̂_0 over the dimensions, [N] float64.
    """

    nats: Tensor
    squared_error: Tensor


@dataclass(frozen=True, eq=False)
class Likelihood:
    """The bound of N images, by term. nats and squared_error: [N, K] as planned; prior: L_T [N]."""

    plan: Plan
    prior: Tensor
    nats: Tensor
    squared_error: Tensor
    dims: int

    @property
    def decoder(self) -> Tensor:
        """L_0 [N], nats."""
        return self._sum(self.plan.row == 0)

    @property
    def transitions(self) -> Tensor:
        """L_1 + … + L_{T−1} [N], nats; an unbiased estimate for a Monte Carlo plan."""
        return self._sum(self.plan.row > 0)

    @property
    def transitions_error(self) -> Tensor:
        """Standard error [N] of a Monte Carlo estimate's `transitions`, nats.

        From the second differences of neighbouring draws, since these fall into neighbouring
        strata and any trend from one to the next is no error (Wolter, Introduction to Variance
        Estimation, 2007, section 8.2): the variance of a sum of n draws v_j is about
        ⅙ n/(n−2) Σ (v_{j+1} − 2v_j + v_{j−1})². Of two draws, ½ n/(n−1) (v_2 − v_1)²; NaN for one.
        """
        draws = (self.nats * torch.from_numpy(self.plan.weight))[:, self._decoder_draws :]
        n = draws.shape[1]
        if n < 2:
            return torch.full((len(draws),), math.nan, dtype=draws.dtype)
        order = min(n - 1, 2)
        squares = draws.diff(n=order, dim=1).square().sum(1)
        return (n / (n - order) / math.comb(2 * order, order) * squares).sqrt()

    @property
    def decoder_error(self) -> Tensor:
        """Standard error [N] of a Monte Carlo estimate's `decoder`, nats; NaN for one draw."""
        draws = self.nats[:, : self._decoder_draws]
        if draws.shape[1] < 2:
            return torch.full((len(draws),), math.nan, dtype=draws.dtype)
        return draws.std(1) / math.sqrt(draws.shape[1])

    @property
    def standard_error(self) -> Tensor:
        """Of a Monte Carlo estimate's `bits_per_dim`, [N], all that was drawn being in it.

        Widened as Student's t is against the normal distribution, for the ν degrees of freedom
        that the draws leave (Welch, Satterthwaite), so that 1.96 of it hold 95 % of the estimates
        even where a few draws tell their own spread badly.
        """
        parts = torch.stack([self.transitions_error, self.decoder_error]).square()  # [2, N]
        m = self._decoder_draws
        n = self.plan.row.shape[1] - m
        freedom = torch.tensor([max(1.0, _SECOND_DIFFERENCES * n), m - 1.0])[:, None]
        total = parts.sum(0)
        nu = total.square() / (parts.square() / freedom).sum(0)
        widened = total.sqrt() * (1 + (_Z**2 + 1) / (4 * nu))
        return bits_per_dim(widened, self.dims)

    @property
    def _decoder_draws(self) -> int:
        return int((self.plan.row[0] == 0).sum())

    @property
    def bits_per_dim(self) -> Tensor:
        """(L_T + … + L_0)/(D ln 2), [N]."""
        return bits_per_dim(self.prior + self.transitions + self.decoder, self.dims)

    def _sum(self, chosen: NDArray[np.bool_]) -> Tensor:
        weight = torch.from_numpy(np.where(chosen, self.plan.weight, 0.0))
        return (self.nats * weight).sum(1)


def likelihood_x_t(
    schedule: Schedule,
    x_start: Tensor,
    t: Tensor,
    *,
    seeds: Tensor,
    indices: Tensor,
    repeat: Tensor | int = 0,
) -> Tensor:
    """x_t ~ q(x_t|x_0) with the noise of (seed, image index, row = t + T·repeat).

    x_start: [N, ...]; t, seeds, indices, repeat: int64 [N].
    """
    rows = t + schedule.T * repeat
    shape = tuple(x_start.shape[1:])
    eps = normals(seeds, indices, rows=rows, purpose=Purpose.LIKELIHOOD, shape=shape)
    return q_sample(schedule, x_start, t, eps.to(x_start.dtype))


def evaluate_output(
    model: Model,
    table: BoundTable,
    *,
    row: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    out: Tensor,
    variance: str,
    clip: bool = True,
) -> Evaluation:
    """The terms of rows [N] from the network's raw output [N, C or 2C, H, W] at x_t.

    variance: large, small or learned (`check_variance`); clip: x̂_0 to [−1, 1], as for the paper's
    bits/dim.
    """
    t = torch.from_numpy(table.t).to(row.device)[row]
    channels = x_start.shape[1]
    prediction = model.config.prediction
    x_start_hat = to_x_start(model.schedule, prediction, x_t=x_t, t=t, out=out[:, :channels])
    if clip:  # but never so that an infinite x̂_0 passes for ±1
        x_start_hat = torch.where(x_start_hat.isfinite(), x_start_hat.clamp(-1, 1), math.nan)
    if variance == "learned":
        log_variance = learned_log_variance(table, row, out[:, channels:])
    else:
        log_variance = gather(table.log_variance(variance), row, x_start)
    nats = transition_nats(
        table, row, x_start=x_start, x_start_hat=x_start_hat, log_variance=log_variance
    )
    square = (x_start - x_start_hat).square().flatten(1).mean(1)
    return Evaluation(nats.double(), square.double())


def check_variance(model: Model, variance: str | None) -> str:
    """The choice of σ²: by default the network's own where it has one, else small.

    Raises BoundError for a name that is none, or learned without a learned variance.
    """
    learned = model.config.network.learned_variance
    allowed = ("large", "small", "learned") if learned else ("large", "small")
    if variance is None:
        return "learned" if learned else "small"
    if variance not in allowed:
        known = ", ".join(allowed)
        raise BoundError(f"variance = {variance!r}: must be one of {known} for this model")
    return variance


def noised_output(
    model: Model,
    table: BoundTable,
    *,
    row: Tensor,
    x_start: Tensor,
    seed: int,
    indices: Tensor,
    repeat: Tensor | int = 0,
    class_label: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x_t, the network's raw output there) for the term of each row.

    All arguments are one entry an evaluation: x_start [N, C, H, W], the rest int64 [N].
    """
    t = torch.from_numpy(table.t).to(row.device)[row]
    seeds = torch.full_like(indices, check_seed(seed))
    x_t = likelihood_x_t(model.schedule, x_start, t, seeds=seeds, indices=indices, repeat=repeat)
    return x_t, model.output(x_t, t, class_label)


@torch.inference_mode()
def likelihood(
    model: Model,
    x_start: Tensor,
    *,
    samples: int | None = None,
    decoder_draws: int | None = None,
    seed: int = 0,
    indices: Tensor | None = None,
    variance: str | None = None,
    class_label: ClassLabel = None,
    proposal: Float64 | None = None,
    batch_size: int = 64,
    clip: bool = True,
    on_batch: Callable[[int], None] | None = None,
) -> Likelihood:
    """The bound of images [N, C, H, W] in [−1, 1] (grey levels k/127.5 − 1), term by term.

    samples: None for the full sum of T evaluations an image, else the evaluations of a Monte
    Carlo estimate, decoder_draws of them for L_0 (see `monte_carlo_plan`). indices: [N], what
    keys each image's noise (default 0..N−1). variance: σ², see `check_variance`. class_label:
    one of all images, or one each, or None. on_batch(evaluations) after every network call. Raises
    BoundError, ImagesError or ValueError naming the bad argument.
    """
    check_model(model)
    check_images("x_start", x_start, model.shape)
    n = len(x_start)
    check_whole("batch_size", batch_size, least=1, error=BoundError)
    indices = torch.arange(n) if indices is None else indices
    if tuple(indices.shape) != (n,):
        raise BoundError(f"indices: {[*indices.shape]}; must be [{n}], one an image")
    labels = None if class_label is None else class_labels(model, class_label, len(x_start))
    table = bound_table(model.schedule)
    plan = (
        full_plan(table, len(x_start))
        if samples is None
        else monte_carlo_plan(
            table,
            seed=seed,
            indices=indices,
            samples=samples,
            decoder_draws=decoder_draws,
            proposal=proposal,
        )
    )
    nats = torch.empty(plan.row.shape, dtype=torch.float64)
    squared_error = torch.empty_like(nats)
    variance = check_variance(model, variance)
    for image, draw in pairs(plan, batch_size):
        pick, device = torch.from_numpy(image), model.device
        row = torch.from_numpy(plan.row[image, draw]).to(device)
        x = x_start[pick.to(x_start.device)].to(device)
        x_t, out = noised_output(
            model,
            table,
            row=row,
            x_start=x,
            seed=seed,
            indices=indices[pick.to(indices.device)].to(device),
            repeat=torch.from_numpy(plan.repeat[image, draw]).to(device),
            class_label=None if labels is None else labels[pick.to(device)],
        )
        found = evaluate_output(
            model, table, row=row, x_start=x, x_t=x_t, out=out, variance=variance, clip=clip
        )
        nats[image, draw] = found.nats.cpu()
        squared_error[image, draw] = found.squared_error.cpu()
        if on_batch is not None:
            on_batch(len(image))
    return Likelihood(
        plan, prior_nats(model.schedule, x_start).cpu(), nats, squared_error, x_start[0].numel()
    )
