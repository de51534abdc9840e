"""What dropout draws: of the seed and the position of the images alone, as the batches are.

On a CPU each image has a seed, so that its draws are the same whichever rows it is computed with,
in whatever thread or process. On a GPU the device's own generator draws for a whole pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from diffusion.noise import Purpose, uniform_words
from diffusion.unet_config import UNetConfig

_TWO32 = 2**32


def dropout_seeds(seed: int, positions: Tensor) -> Tensor:
    """A seed for each position, int64 [N], 0..2³²−1."""
    seeds = torch.full_like(positions, seed)
    index, row = positions % _TWO32, positions // _TWO32
    return uniform_words(seeds, index, rows=row, purpose=Purpose.DROPOUT)[:, 0]


def what_is_kept(config: UNetConfig, seeds: Tensor) -> list[Tensor]:
    """For the network's `kept`: bool [N, C, H, W] each, in memory channels last. seeds: [N]."""
    shapes = config.dropout_shapes
    sizes = [math.prod(shape) for shape in shapes]
    kept = torch.empty(len(seeds), sum(sizes), dtype=torch.bool)
    generator = torch.Generator()
    for row, seed in zip(kept, seeds.tolist(), strict=True):
        row.bernoulli_(1 - config.dropout, generator=generator.manual_seed(seed))
    parts = torch.split(kept, sizes, dim=1)
    return [
        part.view(-1, height, width, channels).permute(0, 3, 1, 2)
        for part, (channels, height, width) in zip(parts, shapes, strict=True)
    ]


@contextmanager
def seeded(device: torch.device, seed: int, position: int) -> Iterator[None]:
    """Let the device's own generator begin anew for the pass that begins with this image, and
    leave it as it was."""
    generator = _generator(device)
    before = generator.get_state()
    generator.manual_seed(int(dropout_seeds(seed, torch.tensor([position]))))
    try:
        yield
    finally:
        generator.set_state(before)


def _generator(device: torch.device) -> torch.Generator:
    """Torch's own of this device alone: `torch.manual_seed` asks every sort of device there is, and
    keeps a traceback for each that is not in use, which takes 10 ms."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[device.index or 0]
