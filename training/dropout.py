"""What dropout draws: of the seed and the position of the images alone, as the batches are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diffusion.noise import Purpose, uniform_words

_TWO32 = 2**32


@contextmanager
def seeded(device: torch.device, seed: int, position: int) -> Iterator[None]:
    """Let the device's own generator begin anew for the pass that begins with this image, and
    leave it as it was."""
    generator = _generator(device)
    before = generator.get_state()
    generator.manual_seed(dropout_seed(seed, position))
    try:
        yield
    finally:
        generator.set_state(before)


def dropout_seed(seed: int, position: int) -> int:
    """A seed, 0..2³²−1, for what a network drops in the pass that begins with this image."""
    seeds, index, row = (torch.tensor([v]) for v in (seed, position % _TWO32, position // _TWO32))
    return int(uniform_words(seeds, index, rows=row, purpose=Purpose.DROPOUT)[0, 0])


def _generator(device: torch.device) -> torch.Generator:
    """Torch's own of this device alone: `torch.manual_seed` asks every sort of device there is, and
    keeps a traceback for each that is not in use, which takes 10 ms."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[device.index or 0]
