"""Gradients of a batch whose rows are dealt to the cores: see `diffusion.cores`.

Each core runs its rows forwards and backwards on a thread without a team, and the gradients are
summed in the order of the rows. So a run is the same to the bit on as many cores, whatever else
the machine does; on another number of cores it is the same to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from diffusion import cores
from training.batches import Batch

Losses = Callable[[Batch], Tensor]
Found = tuple[Tensor, tuple[Tensor | None, ...]]


class Dealt:
    """Adds to the gradients of parameters, each batch in so many parts.

    compiled: by torch.compile.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, parts: int, threads: int, compiled: bool
    ) -> None:
        self._parameters = parameters
        self.parts, self.threads = parts, threads
        self._first_times = cores.FirstTimes() if compiled else None

    def backward(self, losses: Losses, batch: Batch, scale: Tensor) -> Tensor:
        """Add the gradient of Σ scale·losses(batch); returns the losses, [N].

        losses: of some rows, [n], whatever the other rows are. scale: [N].
        """
        n, first = len(batch.t), self._first_times
        calls = [
            partial(self._part, losses, rows(batch, *ends), scale[slice(*ends)])
            for ends in pairwise(cores.cuts(n, self.parts))
        ]
        in_turn = first is not None and first.any_new(cores.sizes(n, self.parts))
        found = cores.together(calls, threads=self.threads, in_turn=in_turn)
        for parameter, *gradients in zip(self._parameters, *(g for _, g in found), strict=True):
            for gradient in gradients:
                _add(parameter, gradient)
        return torch.cat([each for each, _ in found])

    def _part(self, losses: Losses, batch: Batch, scale: Tensor) -> Found:
        each = losses(batch)
        total = (scale * each).sum()
        gradients = torch.autograd.grad(total, self._parameters, allow_unused=True)
        return each.detach(), gradients


def average(parameters: Sequence[nn.Parameter], reduce: Callable[..., Tensor]) -> None:
    """Let every process have the mean of all processes' gradients, which reduce(values, "mean")
    gives. Each must have made gradients of the same parameters."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    mean = reduce(torch.cat([g.flatten() for g in gradients]), "mean")
    parts = torch.split(mean, [g.numel() for g in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view(gradient.shape))


def rows(batch: Batch, first: int, last: int) -> Batch:
    """Some rows of a batch."""
    whole = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{n: v[first:last] for n, v in whole.items() if v is not None})


def _add(parameter: nn.Parameter, gradient: Tensor | None) -> None:
    if gradient is None:
        return
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
