"""Autoregressive decoding as a diffusion: Ho et al. 2020, section 4.3, on small discrete data.

T = D steps. The forward process erases one coordinate a step, x_t = x_0 with its first t
coordinates masked; p(x_T) is all masks; the reverse step p_θ(x_{t−1}|x_t) fills in coordinate t
given the later ones, with any distribution. L_T is then 0, each KL is −ln of one conditional, and
the bound is the autoregressive log-likelihood exactly. So a Gaussian diffusion is autoregressive
decoding with a generalised bit ordering.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from diffusion.schedule import Float64

Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class MaskingChain:
    """The chain whose reverse steps are the conditionals of p_θ.

    joint: p_θ(x_0), [K] * D, positive, sums to 1; axis i is coordinate i+1. States are [N, D]
    integers 0..K−1, or K for a mask. Raises ValueError for a joint that is no distribution.
    """

    joint: Float64

    def __post_init__(self) -> None:
        joint = self.joint
        if len(set(joint.shape)) != 1 or np.any(joint <= 0) or not np.isclose(joint.sum(), 1):
            raise ValueError(
                f"joint: must be positive, of equal sides and sum to 1; it has shape "
                f"{joint.shape}, minimum {joint.min()}, sum {joint.sum()}"
            )

    @property
    def D(self) -> int:
        """Dimensions, and steps."""
        return self.joint.ndim

    @property
    def mask(self) -> int:
        """The value that stands for "erased"."""
        return int(self.joint.shape[0])

    @cached_property
    def _suffixes(self) -> list[Float64]:
        """p_θ of coordinates t+1..D, for t = 0..D."""
        tables = [self.joint]
        for _ in range(self.D):
            tables.append(tables[-1].sum(0))
        return tables

    def q_sample(self, x_start: Integers, t: int) -> Integers:
        """x_t: the first t coordinates masked. q(x_t|x_0) is this one point."""
        x_t = x_start.copy()
        x_t[:, :t] = self.mask
        return x_t

    def p_step(self, x_t: Integers, t: int) -> Float64:
        """p_θ(x_{t−1}|x_t) as the distribution of coordinate t (1..D), [N, K]."""
        rest = tuple(x_t[:, t:].T)
        chosen = self._suffixes[t - 1][(slice(None), *rest)]
        table = chosen.T if rest else np.broadcast_to(chosen, (len(x_t), self.mask))
        conditional: Float64 = table / table.sum(1, keepdims=True)
        return conditional

    def terms(self, x_start: Integers) -> Float64:
        """L_0 … L_D of each x_0, [N, D+1] nats.

        q(x_{t−1}|x_t,x_0) is the point x_{t−1}, so L_{t−1} = −ln p_θ(x_{t−1}|x_t); L_D = 0.
        """
        terms = np.zeros((len(x_start), self.D + 1))
        for t in range(1, self.D + 1):
            p = self.p_step(self.q_sample(x_start, t), t)
            terms[:, t - 1] = -np.log(np.take_along_axis(p, x_start[:, t - 1 : t], 1)[:, 0])
        return terms

    def log_likelihood(self, x_start: Integers) -> Float64:
        """ln p_θ(x_0), [N]: what the autoregressive model says."""
        found: Float64 = np.log(self.joint[tuple(x_start.T)])
        return found

    def sample(self, uniforms: Float64) -> Integers:
        """The reverse chain from all masks. uniforms: [N, D] in (0, 1); [D+1, N, D], x_T first."""
        x = np.full(uniforms.shape, self.mask, dtype=np.int64)
        chain = [x]
        for t in range(self.D, 0, -1):
            edges = np.cumsum(self.p_step(x, t), axis=1)
            x = x.copy()
            x[:, t - 1] = (uniforms[:, t - 1 : t] > edges[:, :-1]).sum(1)
            chain.append(x)
        return np.stack(chain)
