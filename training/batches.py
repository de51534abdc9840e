"""Training batches as a pure function of (seed, position): nothing to restore on a resume.

Position p counts images since the start of the run. Its image, flip, label dropout, timestep and
noise depend on (seed, p) alone, so they are the same whatever the number of processes, the
gradient accumulation, or how often the run was interrupted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion.noise import Purpose, normals, uniform_words
from training.consistency import Stages
from training.data import Images, InMemoryImages
from training.dropout import dropout_seeds
from training.timesteps import Timesteps, UniformTimesteps

_TWO32 = 2**32


@dataclass(frozen=True)
class Batch:
    """x_start [N, C, H, W] in [−1, 1]; t [N] index; eps like x_start; class_label [N] or None.

    r: [N], the index −1..t−1 whose x̂_0 teaches that of t, in consistency tuning; else None.
    dropping: [N], a seed 0..2³²−1 for what the network drops of each image, or None.
    """

    x_start: Tensor
    t: Tensor
    eps: Tensor
    class_label: Tensor | None
    r: Tensor | None = None
    dropping: Tensor | None = None


class Order:
    """The shuffled order of the images, a fresh permutation an epoch."""

    def __init__(self, seed: int, length: int) -> None:
        self.seed, self.length = seed, length
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def __call__(self, positions: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Tensor:
        """Image index of each position."""
        picked = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(positions // self.length):
            here = positions // self.length == epoch
            picked[here] = self._of(int(epoch))[positions[here] % self.length]
        return torch.from_numpy(picked)

    def _of(self, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._epoch, self._permutation = epoch, generator.permutation(self.length)
        return self._permutation


class Batches:
    """Makes the batch of any positions, on the device."""

    def __init__(
        self,
        images: Images,
        *,
        seed: int,
        T: int,
        flips: bool,
        null_label: int | None,
        label_dropout: float,
        labelled: bool,
        device: torch.device,
        timesteps: Timesteps | None = None,
        stages: Stages | None = None,
        drops: bool = False,
    ) -> None:
        self.images = images.to(device) if isinstance(images, InMemoryImages) else images
        self.seed, self.device = seed, device
        self.timesteps = UniformTimesteps(T) if timesteps is None else timesteps
        self.stages, self.drops = stages, drops
        self.flips, self.labelled = flips, labelled
        self.null_label, self.label_dropout = null_label, label_dropout
        self.order = Order(seed, len(images))

    def at(self, first: int, count: int) -> Batch:
        """The batch of positions first..first+count−1."""
        positions = np.arange(first, first + count, dtype=np.int64)
        pixels, labels = self.images.batch(self.order(positions).to(self.device))
        x_start = pixels.to(self.device).float() / 127.5 - 1
        labels = labels.to(self.device)

        p = torch.from_numpy(positions).to(self.device)
        seeds = torch.full_like(p, self.seed)
        index, row = p % _TWO32, p // _TWO32
        words = uniform_words(seeds, index, rows=row, purpose=Purpose.TRAINING_DRAWS)
        t = self.timesteps.draw(words[:, 0])
        if self.flips:
            flip = (words[:, 1] & 1).bool().view(-1, 1, 1, 1)
            x_start = torch.where(flip, x_start.flip(-1), x_start)
        if self.null_label is not None:
            drop = words[:, 2] < int(self.label_dropout * _TWO32)
            labels = torch.where(drop, self.null_label, labels)
        eps = normals(
            seeds, index, rows=row, purpose=Purpose.TRAINING, shape=tuple(x_start.shape[1:])
        )
        r = None if self.stages is None else self.stages.earlier(t, p)
        dropping = dropout_seeds(self.seed, p) if self.drops else None
        return Batch(x_start, t, eps, labels if self.labelled else None, r, dropping)
