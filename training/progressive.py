"""Progressive reconstruction: what can be shown of an image once x_T, …, x_t are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion.likelihood import likelihood_x_t
from diffusion.model import Model
from diffusion.noise import check_seed
from diffusion.samplers import build_table
from diffusion.sampling import chain
from training.bits import Chosen


@dataclass(frozen=True, eq=False)
class Reconstructions:
    """Of N images, for each t (1..T, falling): x̂_0(x_t) and one draw of p_θ(x_0|x_t)."""

    images: Tensor
    ts: tuple[int, ...]
    x_starts: tuple[Tensor, ...]
    samples: tuple[Tensor, ...]


def shown_timesteps(T: int) -> list[int]:
    """t of the picture: the whole chain, denser near the image."""
    shares = (1, 0.9, 0.75, 0.6, 0.45, 0.3, 0.2, 0.1, 0.05, 0.01)
    return sorted({max(1, round(T * share)) for share in shares}, reverse=True)


@torch.inference_mode()
def progressive_reconstructions(
    model: Model,
    chosen: Chosen,
    *,
    seed: int,
    ts: Sequence[int] | None = None,
    steps: int = 30,
) -> Reconstructions:
    """Noise the chosen images to each t, then decode: x̂_0 at once, and by at most `steps` steps.

    The noise is that of the likelihood at the same seed and t.
    """
    ts = shown_timesteps(model.schedule.T) if ts is None else list(ts)
    x_start, labels = chosen.batch(np.arange(len(chosen)))
    x_start = x_start.to(model.device)
    indices = torch.from_numpy(chosen.indices).to(model.device)
    seeds = torch.full_like(indices, check_seed(seed))
    labels = None if labels is None else labels.to(model.device)
    x_starts, samples = [], []
    for t in ts:
        at = torch.full_like(indices, t - 1)
        x_t = likelihood_x_t(model.schedule, x_start, at, seeds=seeds, indices=indices)
        table = build_table(
            model.schedule,
            steps=min(steps, t),
            variance="small",
            clip=model.config.sampling.clip,
            start=t - 1,
        )
        walked = list(chain(model, table, x_t, seed=seed, indices=indices, class_label=labels))
        x_starts.append(walked[0].x_start.cpu())
        samples.append(walked[-1].x_next.clamp(-1, 1).cpu())
    return Reconstructions(x_start.cpu(), tuple(ts), tuple(x_starts), tuple(samples))
