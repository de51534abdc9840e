"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class EMA:
    """θ̄ ← d θ̄ + (1−d) θ with d = min(decay, (1+n)/(10+n)) after the n-th update."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.source = list(parameters)
        self.shadow = [p.detach().clone() for p in self.source]

    @torch.no_grad()
    def update(self, n: int) -> None:
        """Average in the present weights; n counts updates from 1."""
        decay = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.source], 1 - decay)

    def state(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The averaged weights by name, in the order of the parameters."""
        return dict(zip(names, self.shadow, strict=True))
