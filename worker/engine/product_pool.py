"""Chains whose x̂_0 is corrected by products with the network's Jacobian.

Slots, rows and noise are those of all chains. The network runs in float32 with autograd on, the
chains of one operator at a time, of all jobs that have it: each has a system of its own to solve.
Deterministic ones are solved each by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from diffusion import cores
from diffusion.condition import Condition
from diffusion.forward import alpha_bars
from diffusion.model import Estimate
from diffusion.table import clip_x_start
from worker.engine.chain_pool import ChainPool
from worker.engine.pool import Batch, labels_of
from worker.network.costs import Shape
from worker.network.network import Inputs

T = TypeVar("T")


class ProductPool(ChainPool):
    """A `ChainPool` of chains that are all conditioned so."""

    def _estimate(
        self, batch: Batch, x: Tensor, t: Tensor, *, rows: Tensor, shape: Shape
    ) -> tuple[Estimate, Tensor]:
        alpha_bar, r2 = alpha_bars(self.network.model.schedule, t, x)

        def solve(correction: Condition, at: Tensor) -> tuple[Estimate, Tensor]:
            return correction.estimate(
                partial(self._evaluate, batch, at, t[at]),
                x[at],
                alpha_bar=alpha_bar[at],
                r2=r2[at],
                clip=partial(clip_x_start, rows[at]),
            )

        solved = self._each([partial(solve, *group) for group in batch.corrections])
        eps, x_start, corrected = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        v: Tensor | None = None
        for (_, at), (found, better) in zip(batch.corrections, solved, strict=True):
            eps[at], x_start[at], corrected[at] = found.eps, found.x_start, better
            if found.v is not None:
                v = torch.empty_like(x) if v is None else v
                v[at] = found.v
        return Estimate(x_start, eps, v), corrected

    def _each(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """What calls return. Those of exact chains have one each, and one core each: a team's sums
        depend on its size, and that on how many rows there are beside."""
        network = self.network
        if not network.exact or network.model.is_large or self.device.type != "cpu":
            return [call() for call in calls]
        return cores.together(calls, at_once=cores.count())

    def _evaluate(self, batch: Batch, at: Tensor, t: Tensor, x: Tensor) -> Estimate:
        """The network on samples `at` of a batch."""
        samples = [batch.samples[i] for i in at.tolist()]
        guided = [i for i, sample in enumerate(samples) if sample.guided]
        weights = [samples[i].run.task.guidance for i in guided]
        inputs = Inputs(
            x,
            t.clone(),
            labels_of(self.network.model, samples, len(guided)),
            torch.tensor(guided, device=self.device) if guided else None,
            torch.tensor(weights, device=self.device) if guided else None,
        )
        return self.network.evaluate(inputs, Shape(len(samples) + len(guided)))
