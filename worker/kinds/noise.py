"""Noise jobs: the forward process of uploaded images. No network, so not the engine's work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.forward import q_samples_at, q_trajectory
from diffusion.noise import Purpose, check_seed, image_normals
from diffusion.schedule import Schedule
from jobs.kinds.noise import NoiseSpec
from jobs.store.started import Started
from worker.engine.tasks import Event, Snapshot
from worker.flights import Flight
from worker.kinds.inputs import uploaded
from worker.models import Served


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


class NoiseFlight(Flight[NoiseSpec]):
    """x_t of uploaded images at many t."""

    def __init__(
        self, started: Started, execution: str, served: Served, *, spec: NoiseSpec, deadline: float
    ) -> None:
        super().__init__(started, execution, served, spec=spec, deadline=deadline)
        self._x_start = uploaded(started)

    def run(self, emit: Callable[[list[Event]], None], going: Callable[[], bool]) -> None:
        """One event a t."""
        x_start, spec = self._x_start, self.spec
        indices = tuple(range(x_start.shape[0]))
        ts = [t - 1 for t in spec.t]
        for found in MODES[spec.mode](self.served.model.schedule, x_start, ts, seed=self.seed):
            if not going():
                return
            planes = (found.x_t, x_start, found.eps)
            emit([Snapshot(self.execution, indices, 0, found.t, *planes)])
