"""The terms of likelihoods of one model, stepped together like the chains of a `Pool`.

A strand has no state on the device: x_t comes anew from the image and counter-based noise in each
row. So there are no slots, and nothing to park or export.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion.bound import bound_table
from diffusion.likelihood import evaluate_output, likelihood_x_t
from worker.engine.pool import Batch, Int64, Step, without_slots
from worker.engine.runs import Run, Sample
from worker.engine.tasks import Event, States, Terms
from worker.engine.terms import TermTask
from worker.network.costs import Shape
from worker.network.network import Network


@dataclass(frozen=True, eq=False)
class TermStep(Step):
    """One term of each strand. places, images: [M]; nats, squared_error: float64 [M]."""

    places: Int64
    images: Int64
    nats: Tensor
    squared_error: Tensor

    def image(self, i: int) -> int:
        """The image whose term sample i of the batch was."""
        return int(self.images[i])

    def events(self) -> list[Event]:
        """One event for the terms of a task."""
        nats, squares = self.nats.cpu().numpy(), self.squared_error.cpu().numpy()
        by_run: dict[Run, list[int]] = {}
        for i, sample in enumerate(self.batch.samples):
            if not sample.run.over:
                by_run.setdefault(sample.run, []).append(i)
        for i in self.due:
            self.batch.samples[i].run.untold -= 1
        return [
            Terms(run.task.id, self.places[at], nats[at], squares[at]) for run, at in by_run.items()
        ]


class TermPool:
    """A `Pool` without slots."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.device = network.model.device
        self._bound = bound_table(network.model.schedule)

    def hold(self, runs: Collection[Run]) -> None:
        """Nothing to be made ready."""

    def seat(self, samples: Sequence[Sample], evict: Iterable[Sample]) -> bool:
        """There is always room."""
        return False

    def release(self, sample: Sample) -> None:
        """Nothing was held."""

    def states(self, samples: Sequence[Sample]) -> States | None:
        """None: what was found is told in each step."""
        return None

    def batch(self, samples: list[Sample]) -> Batch:
        """Strands to be stepped together, again and again."""
        return without_slots(self.network.model, samples)

    def step(self, batch: Batch, shape: Shape) -> TermStep:
        """Evaluate one term of every strand of the batch.

        An exception leaves the state of all samples as it was.
        """
        samples, model = batch.samples, self.network.model
        tasks = [_task_of(sample) for sample in samples]
        strand_rows = np.array([sample.row for sample in samples], np.int64)
        places = np.array([t.place(s.index, s.row) for t, s in zip(tasks, samples, strict=True)])
        images, draws = np.divmod(places, [task.plan.row.shape[1] for task in tasks])
        spots = list(zip(tasks, images, draws, strict=True))
        keys = [
            (
                task.plan.row[image, draw],
                task.plan.repeat[image, draw],
                task.seed,
                task.indices[image],
            )
            for task, image, draw in spots
        ]
        packed = np.array(keys, np.int64).T
        t = self._bound.t[packed[0]]
        row, repeat, seeds, indices = torch.from_numpy(packed.copy()).to(self.device)
        x_start = torch.stack([task.x_start[image] for task, image, _ in spots])
        on_device = torch.from_numpy(t).to(self.device)
        x_t = likelihood_x_t(
            model.schedule, x_start, on_device, seeds=seeds, indices=indices, repeat=repeat
        )
        out = self.network.output(x_t, on_device, batch.labels, shape)
        nats = torch.empty(len(samples), dtype=torch.float64, device=self.device)
        squared_error = torch.empty_like(nats)
        for variance in dict.fromkeys(task.variance for task in tasks):
            at = torch.tensor([i for i, task in enumerate(tasks) if task.variance == variance])
            at = at.to(self.device)
            found = evaluate_output(
                model,
                self._bound,
                row=row[at],
                x_start=x_start[at],
                x_t=x_t[at],
                out=out[at],
                variance=variance,
            )
            nats[at], squared_error[at] = found.nats, found.squared_error
        last = [i for i, task in enumerate(tasks) if strand_rows[i] == task.rows - 1]
        finite = torch.isfinite(nats) & torch.isfinite(squared_error)
        for sample in samples:  # only now, when nothing can fail for want of memory any more
            sample.row += 1
        return TermStep(batch, strand_rows, t, finite, last, places, images, nats, squared_error)


def _task_of(sample: Sample) -> TermTask:
    task = sample.run.task
    assert isinstance(task, TermTask)
    return task
