"""A forward process that is trained with the network: Kingma et al. 2021 (VDM), in discrete time.

γ_t = γ_1 + Σ softplus(δ_i) is the monotone −ln SNR_t; ᾱ_t = sigmoid(−γ_t) for t ≥ 1 and ᾱ_0 = 1.
The bound depends on γ through x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε, so its gradient reaches γ by
reparameterisation; L_T is no constant any more and belongs to the loss. With Δ = γ_t − γ_{t−1} and
ρ = β̃_t/σ_t² (1 for σ² small, (1−ᾱ_{t−1})/(1−ᾱ_t) for large)

    L_{t−1} = ½ Σ_i [ρ − 1 − ln ρ + ρ (e^Δ − 1) (ε − ε_θ)²].
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.decoder import decoder_nats
from diffusion.schedule import Float64, Schedule


class LearnedSchedule(nn.Module):
    """The parameters γ_1 and δ [T−1], started at a given schedule of T ≥ 2 steps."""

    def __init__(self, start: Schedule) -> None:
        super().__init__()
        gamma = -np.log(start.snr)
        rise = np.diff(gamma)
        self.gamma_1 = nn.Parameter(torch.tensor(gamma[0], dtype=torch.float32))
        # softplus(δ) = rise
        self.delta = nn.Parameter(torch.from_numpy(rise + np.log(-np.expm1(-rise))).float())

    @property
    def T(self) -> int:
        """Number of diffusion steps."""
        return self.delta.numel() + 1

    def rises(self) -> Tensor:
        """γ_t − γ_{t−1} for t = 2..T, float64 [T−1]."""
        return F.softplus(self.delta.double())

    def gammas(self) -> Tensor:
        """γ_1 … γ_T, float64 [T]."""
        first = self.gamma_1.double()[None]
        return torch.cat([first, first + torch.cumsum(self.rises(), 0)])

    @torch.no_grad()
    def betas(self) -> Float64:
        """β_t = 1 − ᾱ_t/ᾱ_{t−1}: what a checkpoint keeps, float64 [T]."""
        log_alpha_bar = F.logsigmoid(-self.gammas())
        steps = torch.diff(log_alpha_bar, prepend=torch.zeros(1, device=log_alpha_bar.device))
        betas: Float64 = -torch.expm1(steps.double()).cpu().numpy()
        return betas

    def q_sample(self, x_start: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t ~ q(x_t|x_0), with gradients to γ. x_start, eps: [N, ...]; t: [N], index 0..T−1."""
        gamma = _like(self.gammas()[t], x_start)
        return torch.sigmoid(-gamma).sqrt() * x_start + torch.sigmoid(gamma).sqrt() * eps

    def x_start(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x̂_0 = (x_t − √(1−ᾱ_t) ε_θ)/√ᾱ_t."""
        gamma = _like(self.gammas()[t], x_t)
        return (x_t - torch.sigmoid(gamma).sqrt() * eps) / torch.sigmoid(-gamma).sqrt()

    def terms(
        self,
        *,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        eps: Tensor,
        eps_hat: Tensor,
        large: Tensor | float = 0.0,
    ) -> Tensor:
        """L_{t−1} of each image, [N] nats; L_0 where t = 0.

        large: f in ln σ² = f ln β + (1−f) ln β̃: 0 for σ² small, 1 for large, or elementwise,
        (v+1)/2, for a learned Σ. In L_0 fixed choices have ln σ_1² := ln β̃_2.
        """
        gammas = self.gammas()
        previous = (t - 1).clamp(min=0)
        rise = _like(self.rises()[previous], x_start)
        log_rest = -F.softplus(-gammas)  # ln(1 − ᾱ)
        log_rho = large * _like((log_rest[previous] - log_rest[t]), x_start)
        square = torch.exp(log_rho) * torch.expm1(rise) * (eps - eps_hat).square()
        kl = 0.5 * (torch.expm1(log_rho) - log_rho + square)
        x_start_hat = self.x_start(x_t, t, eps_hat)
        decoder = decoder_nats(x_start, x_start_hat, self._log_variance_1(large, x_start))
        first = (t == 0).view(-1, *([1] * (x_start.ndim - 1)))
        return torch.where(first, decoder, kl).flatten(1).sum(1)

    def _log_variance_1(self, large: Tensor | float, like: Tensor) -> Tensor:
        """ln σ_1² of the decoder, from ln β̃_2 = ln β_2 + ln(1−ᾱ_1) − ln(1−ᾱ_2) and ln β_1."""
        gammas = self.gammas()[:2]
        log_rest, log_alpha_bar = -F.softplus(-gammas), F.logsigmoid(-gammas)
        log_beta_2 = torch.log(-torch.expm1(log_alpha_bar[1] - log_alpha_bar[0]))
        log_beta_tilde_2 = (log_beta_2 + log_rest[0] - log_rest[1]).to(like.dtype)
        if isinstance(large, float):
            return log_beta_tilde_2
        return large * log_rest[0].to(like.dtype) + (1 - large) * log_beta_tilde_2

    def prior(self, x_start: Tensor) -> Tensor:
        """L_T of each image, [N] nats, with gradients to γ_T."""
        last = self.gammas()[-1]
        alpha_bar = torch.sigmoid(-last).to(x_start.dtype)
        log_rest = (-F.softplus(-last)).to(x_start.dtype)
        return 0.5 * (alpha_bar * (x_start.square() - 1) - log_rest).flatten(1).sum(1)


def _like(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(-1, *([1] * (like.ndim - 1)))
