"""Which t to train at: uniform, or by importance (Nichol, Dhariwal 2021, section 3.3)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

_TWO32 = 2**32
_UNIFORM_SHARE = 1e-3
_SMOOTHING = 0.1  # about the last ten losses of each t


class Timesteps(Protocol):
    """Draws t from uniform words, and weighs its losses so that their mean stays that of all t."""

    def draw(self, words: Tensor) -> Tensor:
        """Indices 0..T−1, int64 [N], from words 0..2³²−1."""

    def weight(self, t: Tensor) -> Tensor:
        """1/(T p_t), float32 [N]."""

    def record(self, t: Tensor, losses: Tensor) -> None:
        """Learn from losses [N] found at t [N]."""

    def state(self) -> dict[str, Tensor]:
        """What a resume needs."""

    def load(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`."""


class UniformTimesteps:
    """Every t alike."""

    def __init__(self, T: int) -> None:
        self.T = T

    def draw(self, words: Tensor) -> Tensor:
        return (words * self.T) >> 32

    def weight(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float32)

    def record(self, t: Tensor, losses: Tensor) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        pass


class ImportanceTimesteps:
    """p_t ∝ √E[L_t²] over the latest losses of each t; uniform until each was seen ten times."""

    def __init__(self, T: int, device: torch.device) -> None:
        self.T = T
        self.square = torch.zeros(T, dtype=torch.float64, device=device)
        self.count = torch.zeros(T, dtype=torch.float64, device=device)

    def probabilities(self) -> Tensor:
        """p_t, float64 [T]."""
        if self.count.min() < 10:
            return torch.full_like(self.square, 1 / self.T)
        root = self.square.sqrt()
        return (1 - _UNIFORM_SHARE) * root / root.sum() + _UNIFORM_SHARE / self.T

    def draw(self, words: Tensor) -> Tensor:
        edges = self.probabilities().cumsum(0)
        uniform = (words.double() + 0.5) / _TWO32
        return torch.searchsorted(edges / edges[-1], uniform, right=True).clamp(max=self.T - 1)

    def weight(self, t: Tensor) -> Tensor:
        return (1 / (self.T * self.probabilities()[t])).float()

    def record(self, t: Tensor, losses: Tensor) -> None:
        # One after the other in effect: the mean of a t's losses of this batch enters as one.
        square = losses.detach().double().square()
        seen = torch.zeros_like(self.count).index_add_(0, t, torch.ones_like(square))
        mean = torch.zeros_like(self.square).index_add_(0, t, square) / seen.clamp(min=1)
        keep = (1 - _SMOOTHING) ** seen
        # The first losses are averaged evenly, so that the start does not linger.
        keep = torch.where(self.count < 10, self.count / (self.count + seen).clamp(min=1), keep)
        self.square = torch.where(seen > 0, keep * self.square + (1 - keep) * mean, self.square)
        self.count = self.count + seen

    def state(self) -> dict[str, Tensor]:
        return {"importance.square": self.square, "importance.count": self.count}

    def load(self, state: dict[str, Tensor]) -> None:
        for name, value in (("square", self.square), ("count", self.count)):
            saved = state.get(f"importance.{name}")
            if saved is not None:
                value.copy_(saved)
