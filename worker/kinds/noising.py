"""Noise jobs: the forward process of uploaded images. No network, so not the engine's work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.forward import q_samples_at, q_trajectory
from diffusion.noise import Purpose, check_seed, image_normals
from diffusion.schedule import Schedule
from jobs.store.writer import Started


@dataclass(frozen=True, eq=False)
class Noised:
    """x_t of all images at index t, and the ε that makes it from x_0: float32 [N, C, H, W]."""

    t: int
    x_t: Tensor
    eps: Tensor


Noising = Callable[..., Iterator[Noised]]


def closed(
    schedule: Schedule, x_start: Tensor, ts: Iterable[int], *, seed: int
) -> Iterator[Noised]:
    """q(x_t|x_0) at the indices ts, in one step each, with one ε an image for all of them."""
    indices = torch.arange(x_start.shape[0], device=x_start.device)
    shape = tuple(x_start.shape[1:])
    eps = image_normals(seed, indices, row=0, purpose=Purpose.Q_SAMPLE, shape=shape)
    for t, x_t in q_samples_at(schedule, x_start, sorted(set(ts)), eps):
        yield Noised(t, x_t, eps)


def stepwise(
    schedule: Schedule, x_start: Tensor, ts: Iterable[int], *, seed: int
) -> Iterator[Noised]:
    """The Markov chain x_1, x_2, …, reported at the indices ts; ε is then that of the closed form,
    (x_t − √ᾱ_t x_0)/√(1−ᾱ_t)."""
    wanted = set(ts)
    indices = torch.arange(x_start.shape[0], device=x_start.device)
    seeds = torch.full_like(indices, check_seed(seed))
    stop = max(wanted) + 1
    for t, x_t in q_trajectory(schedule, x_start, seeds=seeds, indices=indices, stop=stop):
        if t in wanted:
            signal, noise = schedule.alpha_bar(t) ** 0.5, schedule.one_minus_alpha_bar(t) ** 0.5
            yield Noised(t, x_t, (x_t - signal * x_start) / noise)


MODES: dict[str, Noising] = {"closed": closed, "stepwise": stepwise}


class MissingInput(Exception):
    """What a client sent for the job is no longer in the store."""


def uploaded(started: Started) -> Tensor:
    """The images a client sent, float32 [N, C, H, W] in [−1, 1]. Raises MissingInput."""
    if started.inputs is None:
        raise MissingInput("the uploaded images are gone")
    return x_start_of(started.inputs)


def x_start_of(inputs: NDArray[np.uint8]) -> Tensor:
    """float32 [N, C, H, W] in [−1, 1] of uint8 [N, H, W, C]."""
    pixels = np.moveaxis(inputs, -1, 1).astype(np.float32, order="C")
    return torch.from_numpy(pixels) / 127.5 - 1.0
