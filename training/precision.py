"""What a network's number format costs in bits/dim, measured before a whole data set is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from diffusion.likelihood import likelihood
from diffusion.model import Model
from diffusion.speed import prepare
from training.bits import Chosen, mean_and_error

IMAGES = 16
SAMPLES = 20  # evaluations of each: the same noise in both formats, so that few tell the difference
ALLOWED = 0.1  # of the standard error to come


@dataclass(frozen=True)
class DtypeCost:
    """Bits/dim in `dtype` less those in float32, mean over `images`, and its standard error.

    allowed: a tenth of the standard error of the evaluation to come.
    """

    dtype: str
    images: int
    bits_per_dim: float
    standard_error: float
    allowed: float

    @property
    def too_much(self) -> bool:
        """Whether the format would be seen in the result."""
        return not abs(self.bits_per_dim) <= self.allowed

    def __str__(self) -> str:
        found = f"{self.bits_per_dim:+.5f} ± {self.standard_error:.5f}"
        return (
            f"{self.dtype} moves bits/dim by {found} ({self.images} images); "
            f"a tenth of the standard error to come is {self.allowed:.5f}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def dtype_cost(
    model: Model,
    dtype: torch.dtype,
    chosen: Chosen,
    *,
    seed: int,
    variance: str,
    batch_size: int = 64,
) -> DtypeCost:
    """Measure on the first of the chosen images; all of them are what is to come."""
    few = np.arange(min(IMAGES, len(chosen)))
    x_start, labels = chosen.batch(few)
    found = [
        likelihood(
            prepare(model, dtype=each),
            x_start,
            samples=min(SAMPLES, model.schedule.T),
            seed=seed,
            indices=torch.from_numpy(chosen.indices[few]),
            variance=variance,
            class_label=labels,
            batch_size=batch_size,
        ).bits_per_dim.numpy()
        for each in (torch.float32, dtype)
    ]
    mean, error = mean_and_error(found[1] - found[0])
    spread = float(found[0].std(ddof=1)) if len(few) > 1 else float("inf")
    allowed = ALLOWED * spread / len(chosen) ** 0.5
    return DtypeCost(str(dtype).removeprefix("torch."), len(few), mean, error, allowed)
