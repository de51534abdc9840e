"""The variational bound L = L_T + L_{T−1} + … + L_0, term by term, in nats.

Ho, Jain, Abbeel 2020: the KL form (eq. 5), whose term L_{t−1} compares two Gaussians (eq. 7, 8);
the log-ratio form (eq. 3), of equal mean and larger variance; L_0 by a discretised decoder
(eq. 13). The term L_k needs the network at index k (the paper's t = k+1), so an array over k has
one entry a network evaluation. Everything holds for any sub-sequence of timesteps: a term then
belongs to a jump t → s, with ᾱ_s for ᾱ_{t−1} and 1 − ᾱ_t/ᾱ_s for β_t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.decoder import decoder_nats
from diffusion.forward import gather
from diffusion.schedule import Float64, Schedule, read_only

Decoder = Callable[[Tensor, Tensor, Tensor], Tensor]


class BoundError(ValueError):
    """Options for which there is no bound; the message names the field."""


@dataclass(frozen=True, eq=False)
class BoundTable:
    """The terms below L_T of a chain, lowest first: row 0 is L_0. Arrays [R], float64.

    t, s: indices of the jump t → s (s = −1 in row 0). coef_x_start, coef_x_t: of its posterior
    mean μ̃. log_beta, log_beta_tilde: ln of 1 − ᾱ_t/ᾱ_s and of the posterior's variance; in row
    0, where that variance is 0, ln β̃ is that of row 1, as in the paper's code. snr: SNR_t.
    """

    t: NDArray[np.int64]
    s: NDArray[np.int64]
    coef_x_start: Float64
    coef_x_t: Float64
    log_beta: Float64
    log_beta_tilde: Float64
    snr: Float64

    def __post_init__(self) -> None:
        for table in (self.coef_x_start, self.coef_x_t, self.log_beta, self.log_beta_tilde):
            read_only(table)

    def __len__(self) -> int:
        return int(self.t.size)

    def log_variance(self, variance: str) -> Float64:
        """ln σ² [R] of a fixed choice, large or small, with ln σ_1² := ln β̃_2 in both."""
        if variance == "small":
            return self.log_beta_tilde
        if variance == "large":
            return self._log_beta_large
        raise BoundError(f"variance = {variance!r}: a table holds large or small")

    @cached_property
    def _log_beta_large(self) -> Float64:
        return read_only(np.append(self.log_beta_tilde[:1], self.log_beta[1:]))


def bound_table(schedule: Schedule, timesteps: Sequence[int] | None = None) -> BoundTable:
    """The table of a descending sub-sequence of indices (default: all of T−1..0).

    The bound is that of the chain with these steps only; its x_T is the first of them. Raises
    BoundError unless the indices are strictly descending within 0..T−1.
    """
    ts = [int(t) for t in (range(schedule.T - 1, -1, -1) if timesteps is None else timesteps)]
    if not ts or ts[0] >= schedule.T or ts[-1] < 0 or np.any(np.diff(ts) >= 0):
        raise BoundError(f"timesteps = {ts}: must be strictly descending in 0..{schedule.T - 1}")
    t = np.array(ts[::-1], dtype=np.int64)
    s = np.append(-1, t[:-1])
    jumps = [schedule.jump(int(high), int(low)) for high, low in zip(t, s, strict=True)]
    beta = np.array([jump.beta for jump in jumps])
    beta_tilde = np.array([jump.variance for jump in jumps])
    beta_tilde[0] = beta_tilde[1] if len(t) > 1 else beta[0]
    return BoundTable(
        t=t,
        s=s,
        coef_x_start=np.array([jump.coef_x_start for jump in jumps]),
        coef_x_t=np.array([jump.coef_x_t for jump in jumps]),
        log_beta=np.log(beta),
        log_beta_tilde=np.log(beta_tilde),
        snr=schedule.snr[t],
    )


def learned_log_variance(table: BoundTable, row: Tensor, v: Tensor) -> Tensor:
    """ln Σ = f ln β + (1−f) ln β̃ with f = (v+1)/2, elementwise (Improved DDPM, eq. 15).

    row: [N]; v: the second half of the network's output, [N, ...].
    """
    f = (v + 1) / 2
    return f * gather(table.log_beta, row, v) + (1 - f) * gather(table.log_beta_tilde, row, v)


def prior_nats(schedule: Schedule, x_start: Tensor, t: int | None = None) -> Tensor:
    """L_T = KL(q(x_T|x_0) ‖ N(0, I)) [N] = ½ Σ (ᾱ_T x_0² − ᾱ_T − ln(1−ᾱ_T)); t: other index."""
    t = schedule.T - 1 if t is None else t
    alpha_bar, rest = schedule.alpha_bar(t), schedule.one_minus_alpha_bar(t)
    square = x_start.double().square().flatten(1)
    return 0.5 * (alpha_bar * (square - 1) - math.log(rest)).sum(1)


def gaussian_kl(difference: Tensor, log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(N(μ, e^log_q) ‖ N(μ', e^log_p)) of each element, with difference = μ − μ'."""
    log_ratio = log_q - log_p
    return 0.5 * (torch.expm1(log_ratio) - log_ratio + difference.square() * torch.exp(-log_p))


def transition_nats(
    table: BoundTable,
    row: Tensor,
    *,
    x_start: Tensor,
    x_start_hat: Tensor,
    log_variance: Tensor,
    decoder: Decoder = decoder_nats,
) -> Tensor:
    """The term of each row, [N] nats: L_0 where row = 0, else the KL of two Gaussians.

    row: [N]; x_start and the network's x̂_0: [N, ...]; log_variance: ln σ² of the reverse step,
    broadcasts. Both means hold the same multiple of x_t, so only x_0 − x̂_0 enters.
    """
    difference = gather(table.coef_x_start, row, x_start) * (x_start - x_start_hat)
    kl = gaussian_kl(difference, gather(table.log_beta_tilde, row, x_start), log_variance)
    first = (row == 0).view(-1, *([1] * (x_start.ndim - 1)))
    nats = torch.where(first, decoder(x_start, x_start_hat, log_variance), kl)
    return nats.flatten(1).sum(1)


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Draws of the whole forward chain, and what the network made of them.

    xs: [T+1, N, ...], x_0 … x_T of each; x_start_hats: [T, N, ...], x̂_0 of entry k at x_{k+1};
    variance: the choice of σ².
    """

    schedule: Schedule
    xs: Tensor
    x_start_hats: Tensor
    variance: str = "small"
    decoder: Decoder = decoder_nats


def kl_terms(chain: Trajectories) -> Tensor:
    """The terms of equation 5 at x_1 … x_T of each trajectory, [T+1, N] nats: L_0 … L_T."""
    table, xs = bound_table(chain.schedule), chain.xs
    log_variance = table.log_variance(chain.variance)
    terms = []
    for k, x_start_hat in enumerate(chain.x_start_hats):
        row = torch.full((xs.shape[1],), k, device=xs.device)
        terms.append(
            transition_nats(
                table,
                row,
                x_start=xs[0],
                x_start_hat=x_start_hat,
                log_variance=gather(log_variance, row, xs[0]),
                decoder=chain.decoder,
            )
        )
    return torch.stack([*terms, prior_nats(chain.schedule, xs[0]).to(xs.dtype)])


def log_ratio_terms(chain: Trajectories) -> Tensor:
    """What the terms of equation 5 are the means of, [T+1, N] nats.

    ln q(x_{t−1}|x_t,x_0) − ln p_θ(x_{t−1}|x_t), for L_0 and L_T what their definitions say. A
    term's variance exceeds that of `kl_terms`, which takes the mean over x_{t−1}.
    """
    table, schedule, xs = bound_table(chain.schedule), chain.schedule, chain.xs
    log_variance = table.log_variance(chain.variance)
    terms = [_decoded(chain, float(log_variance[0]))]
    for k in range(1, schedule.T):
        base = table.coef_x_t[k] * xs[k + 1]
        q = _nats(xs[k] - base - table.coef_x_start[k] * xs[0], table.log_beta_tilde[k])
        p = _nats(xs[k] - base - table.coef_x_start[k] * chain.x_start_hats[k], log_variance[k])
        terms.append(p - q)
    last = schedule.T - 1
    noise = xs[-1] - math.sqrt(schedule.alpha_bar(last)) * xs[0]
    q = _nats(noise, math.log(schedule.one_minus_alpha_bar(last)))
    return torch.stack([*terms, _nats(xs[-1], 0.0) - q])


def log_ratio_form(chain: Trajectories) -> Tensor:
    """L by equation 3, [N] nats: −ln p(x_T) − Σ_t ln [p_θ(x_{t−1}|x_t) / q(x_t|x_{t−1})].

    Equals the sum of `log_ratio_terms` on every trajectory (equation 22).
    """
    table, schedule, xs = bound_table(chain.schedule), chain.schedule, chain.xs
    log_variance = table.log_variance(chain.variance)
    total = _nats(xs[-1], 0.0) + _decoded(chain, float(log_variance[0]))
    for k in range(schedule.T):
        forward = xs[k + 1] - math.sqrt(schedule.alphas[k]) * xs[k]
        total = total - _nats(forward, math.log(schedule.betas[k]))
        if k:
            mean = table.coef_x_start[k] * chain.x_start_hats[k] + table.coef_x_t[k] * xs[k + 1]
            total = total + _nats(xs[k] - mean, log_variance[k])
    return total


def _decoded(chain: Trajectories, log_variance: float) -> Tensor:
    x_start = chain.xs[0]
    nats = chain.decoder(x_start, chain.x_start_hats[0], torch.full_like(x_start, log_variance))
    return nats.flatten(1).sum(1)


def _nats(difference: Tensor, log_variance: float) -> Tensor:
    """−ln N(difference; 0, e^log_variance · I), [N]."""
    square = difference.square() * math.exp(-log_variance)
    return 0.5 * (math.log(2 * math.pi) + log_variance + square).flatten(1).sum(1)


def bits_per_dim(nats: Tensor, dims: int) -> Tensor:
    """nats / (D ln 2)."""
    return nats / (dims * math.log(2))
