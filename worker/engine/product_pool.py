"""Chains whose x̂_0 is corrected by products with the network's Jacobian.

Slots, rows and noise are those of all chains. The network runs in float32 with autograd on, the
chains of one operator at a time, of all jobs that have it: each has a system of its own to solve.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from diffusion.forward import alpha_bars
from diffusion.model import Estimate
from diffusion.table import clip_x_start
from worker.engine.chain_pool import ChainPool
from worker.engine.pool import Batch, labels_of
from worker.network.costs import Shape
from worker.network.network import Inputs


class ProductPool(ChainPool):
    """A `ChainPool` of chains that are all conditioned so."""

    def _estimate(
        self, batch: Batch, x: Tensor, t: Tensor, *, rows: Tensor, shape: Shape
    ) -> tuple[Estimate, Tensor]:
        alpha_bar, r2 = alpha_bars(self.network.model.schedule, t, x)
        eps, x_start, corrected = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        v: Tensor | None = None
        for correction, at in batch.corrections:
            found, better = correction.estimate(
                partial(self._evaluate, batch, at, t[at]),
                x[at],
                alpha_bar=alpha_bar[at],
                r2=r2[at],
                clip=partial(clip_x_start, rows[at]),
            )
            eps[at], x_start[at], corrected[at] = found.eps, found.x_start, better
            if found.v is not None:
                v = torch.empty_like(x) if v is None else v
                v[at] = found.v
        return Estimate(x_start, eps, v), corrected

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
