"""What is minimised: one function an objective, each giving one loss an image.

    simple    L_simple, the mean square of the network's target      (Ho et al. 2020, eq. 14)
    vlb       L, the weighted variational bound                      (eq. 5; Σ fixed or learned)
    hybrid    L_simple + λ L, with Σ learned by L alone              (Nichol, Dhariwal 2021, eq. 16)
    min_snr   the square of x_0 − x̂_0, weighted min(SNR_t, γ)        (Hang et al. 2023, in x_0)
    balanced  the same, weighted max(SNR_t, √SNR_t): L_simple, and where noise prevails the
              geometric mean of the errors of ε and x_0
    consistency  the distance of x̂_0 at t to that at r < t    (Song et al. 2023; Geng et al. 2024)

A loss is a mean over the dimensions; of L it is the one term of index t in bits/dim, so that T
times its mean, and L_T, is the bound. x̂_0 is never clipped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from diffusion.bound import BoundTable, learned_log_variance, transition_nats
from diffusion.forward import gather
from diffusion.learned_schedule import LearnedSchedule
from diffusion.parameterization import target, to_x_start
from diffusion.schedule import Float64, Schedule
from diffusion.weights import balanced_weight, min_snr_weight, output_weight
from training.consistency import gap_weight


@dataclass(frozen=True, eq=False)
class Pass:
    """One evaluation of the network on a batch, and what the objective may read of it.

    x_start, x_t, eps: [N, C, H, W]; t: [N], index; out: float32 [N, C or 2C, H, W], the second
    half v of a learned Σ; table: the bound's, for all T steps; process: the forward process in
    training, or None. r, target: of consistency tuning, index −1..t−1 [N] and the x̂_0 there.
    """

    schedule: Schedule
    table: BoundTable
    prediction: str
    variance: str
    x_start: Tensor
    x_t: Tensor
    t: Tensor
    eps: Tensor
    out: Tensor
    gamma: float = 5.0
    hybrid_weight: float = 1e-3
    process: LearnedSchedule | None = None
    r: Tensor | None = None
    target: Tensor | None = None
    huber: float = 5.4e-4
    sigma_power: float = 0.5

    @cached_property
    def x_start_hat(self) -> Tensor:
        """x̂_0, [N, C, H, W]."""
        return to_x_start(
            self.schedule, self.prediction, x_t=self.x_t, t=self.t, out=self.predicted
        )

    @cached_property
    def predicted(self) -> Tensor:
        """The network's ε, x_0, v or μ̃: the first C channels."""
        return self.out[:, : self.x_start.shape[1]]

    @cached_property
    def v(self) -> Tensor:
        """What interpolates a learned Σ: the other C channels."""
        return self.out[:, self.x_start.shape[1] :]

    @cached_property
    def square(self) -> Tensor:
        """(target − output)² of each element."""
        wanted = self.eps
        if self.prediction != "epsilon":
            wanted = target(
                self.schedule, self.prediction, x_start=self.x_start, x_t=self.x_t, t=self.t
            )
        return (self.predicted - wanted).square()

    def bits(self, *, stop_mean: bool = False) -> Tensor:
        """The term of index t of L, [N], in bits/dim; stop_mean: gradients reach Σ alone."""
        nats = transition_nats(
            self.table,
            self.t,
            x_start=self.x_start,
            x_start_hat=self.x_start_hat.detach() if stop_mean else self.x_start_hat,
            log_variance=self.log_variance,
        )
        return nats / (self.x_start[0].numel() * math.log(2))

    @property
    def log_variance(self) -> Tensor:
        """ln σ_t², fixed or learned."""
        if self.variance == "learned":
            return learned_log_variance(self.table, self.t, self.v)
        return gather(self.table.log_variance(self.variance), self.t, self.x_start)


Objective = Callable[[Pass], Tensor]


def simple(found: Pass) -> Tensor:
    """L_simple: ‖target − output‖²/D of each image, [N]."""
    return found.square.flatten(1).mean(1)


def vlb(found: Pass) -> Tensor:
    """The term of L at each image's t, bits/dim, [N]."""
    return found.bits()


def hybrid(found: Pass) -> Tensor:
    """L_simple + λ T L_{t−1}, the second with no gradient to the mean, [N]."""
    bits = found.bits(stop_mean=True)
    return simple(found) + found.hybrid_weight * found.schedule.T * bits


def min_snr(found: Pass) -> Tensor:
    """min(SNR_t, γ) ‖x_0 − x̂_0‖²/D, [N]."""
    return _weighted_x_start(found, min_snr_weight(found.schedule, found.gamma))


def balanced(found: Pass) -> Tensor:
    """max(SNR_t, √SNR_t) ‖x_0 − x̂_0‖²/D, [N]."""
    return _weighted_x_start(found, balanced_weight(found.schedule))


def _weighted_x_start(found: Pass, weight: Float64) -> Tensor:
    """weight_t ‖x_0 − x̂_0‖²/D, [N], from the error of what the network gives."""
    weight = weight * output_weight(found.schedule, found.prediction)
    return gather(weight, found.t, found.square[:, 0, 0, 0]) * simple(found)


def learned_forward(found: Pass) -> Tensor:
    """`vlb` of a forward process that is trained too: its term and L_T/T, bits/dim, [N]."""
    process = found.process
    assert process is not None
    fixed = {"small": 0.0, "large": 1.0}
    large = (found.v + 1) / 2 if found.variance == "learned" else fixed[found.variance]
    nats = process.terms(
        x_start=found.x_start,
        x_t=found.x_t,
        t=found.t,
        eps=found.eps,
        eps_hat=found.predicted,
        large=large,
    )
    nats = nats + process.prior(found.x_start) / process.T
    return nats / (found.x_start[0].numel() * math.log(2))


def consistency(found: Pass) -> Tensor:
    """w (√(Δ² + c²) − c), [N]: Δ is the root mean square of x̂_0 − target.

    Pseudo-Huber (Song, Dhariwal 2023, section 3.3).
    """
    assert found.r is not None and found.target is not None
    square = (found.x_start_hat - found.target).square().flatten(1).mean(1)
    weight = gap_weight(found.schedule, found.t, found.r, power=found.sigma_power)
    return weight.to(square.dtype) * ((square + found.huber**2).sqrt() - found.huber)


OBJECTIVES: dict[str, Objective] = {
    "simple": simple,
    "vlb": vlb,
    "hybrid": hybrid,
    "min_snr": min_snr,
    "balanced": balanced,
    "consistency": consistency,
}
