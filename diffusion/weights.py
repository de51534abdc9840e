"""The weights that turn one loss into another: arrays [T] over the index.

With e_ε = ‖ε − ε_θ‖² and e_x = ‖x_0 − x̂_0‖² = e_ε/SNR_t, the terms of the bound are weighted
squares (Ho et al. 2020, eq. 12; Kingma et al. 2021, eq. 14), and L_simple is the one with weight
1 on e_ε. At index 0 the weight is what a decoder with a density would give (σ_1² as in `bound`).
"""

from __future__ import annotations

import numpy as np

from diffusion.bound import BoundTable, bound_table
from diffusion.parameterization import x_start_coefficients
from diffusion.schedule import Float64, Schedule


def eps_weight(schedule: Schedule, variance: str = "small") -> Float64:
    """β_t²/(2σ_t² α_t (1−ᾱ_t)): L_{t−1} = weight·‖ε − ε_θ‖² + constant (equation 12)."""
    sigma2 = np.exp(bound_table(schedule).log_variance(variance))
    rest = schedule.one_minus_alphas_cumprod
    weight: Float64 = schedule.betas**2 / (2 * sigma2 * schedule.alphas * rest)
    return weight


def x_start_weight(table: BoundTable, variance: str = "small") -> Float64:
    """The weight of ‖x_0 − x̂_0‖² in each row of any chain: coef_x_start²/(2σ²)."""
    weight: Float64 = 0.5 * table.coef_x_start**2 * np.exp(-table.log_variance(variance))
    return weight


def snr_weight(schedule: Schedule, t: int, s: int) -> float:
    """½(SNR_s − SNR_t): what `x_start_weight` is with σ² = β̃, for a jump t → s ≥ 0."""
    beta = schedule.jump(t, s).beta
    rest = schedule.one_minus_alpha_bar(t) * schedule.one_minus_alpha_bar(s)
    return 0.5 * schedule.alpha_bar(s) * beta / rest  # the difference, without cancellation


def min_snr_weight(schedule: Schedule, gamma: float = 5.0) -> Float64:
    """min(SNR_t, γ), the weight of ‖x_0 − x̂_0‖² (Hang et al. 2023)."""
    return np.minimum(schedule.snr, gamma)


def balanced_weight(schedule: Schedule) -> Float64:
    """max(SNR_t, √SNR_t), the weight of ‖x_0 − x̂_0‖².

    L_simple while there is more signal than noise; from there the geometric mean √(e_ε e_x), whose
    size hardly depends on t: e_ε falls with SNR_t, e_x grows, and L_simple forgets the last t.
    """
    return np.maximum(schedule.snr, np.sqrt(schedule.snr))


def output_weight(schedule: Schedule, prediction: str) -> Float64:
    """‖x_0 − x̂_0‖² = weight·‖target − output‖² for a network of this parameterisation."""
    _, r_out = x_start_coefficients(schedule, prediction)
    return r_out**2
