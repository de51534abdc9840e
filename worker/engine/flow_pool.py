"""Likelihoods by the flow of one model, stepped together in float32 with autograd on.

The state of a strand is x̃ and a number, kept beside it: there are no slots to run out of, since
strands are stepped to their end in the order of the images, and few are under way at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion.flow import dequantised, flow_row, gathered, log_prior, probes
from diffusion.model import Estimate
from worker.engine.flows import FlowTask
from worker.engine.pool import Batch, Int64, Step, without_slots
from worker.engine.runs import Run, Sample
from worker.engine.tasks import Densities, Event, States
from worker.network.costs import Shape
from worker.network.network import Network


@dataclass(frozen=True, eq=False)
class FlowStep(Step):
    """One row of each strand. images: [M]; nats: ln p_0 of those in `due`, float64 [D]."""

    images: Int64
    nats: Tensor

    def image(self, i: int) -> int:
        """The image whose strand sample i of the batch is."""
        return int(self.images[i])

    def events(self) -> list[Event]:
        """One event for the strands of a task that ended."""
        ended: dict[Run, list[int]] = {}
        for k, i in enumerate(self.due):
            run = self.batch.samples[i].run
            run.untold -= 1
            if not run.over:
                ended.setdefault(run, []).append(k)
        nats = self.nats.numpy()
        strands = np.array([self.batch.samples[i].index for i in self.due], np.int64)
        return [Densities(run.task.id, strands[at], nats[at]) for run, at in ended.items()]


class FlowPool:
    """A `Pool` without slots."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.device = network.model.device
        self._under_way: dict[Sample, tuple[Tensor, float]] = {}  # x̃, and nats so far

    def hold(self, runs: Collection[Run]) -> None:
        """Nothing to be made ready."""

    def seat(self, samples: Sequence[Sample], evict: Iterable[Sample]) -> bool:
        """Begin those that have not begun: there is always room."""
        self._begin([sample for sample in samples if sample not in self._under_way])
        return False

    def release(self, sample: Sample) -> None:
        """Forget it."""
        self._under_way.pop(sample, None)

    def states(self, samples: Sequence[Sample]) -> States | None:
        """Of those that are under way; None if none is."""
        begun = [sample for sample in samples if sample in self._under_way]
        if not begun:
            return None
        x, nats = zip(*(self._under_way[sample] for sample in begun), strict=True)
        return States(
            indices=np.array([sample.index for sample in begun], np.int64),
            rows=np.array([sample.row for sample in begun], np.int64),
            x_t=torch.stack(x),
            x_start_prev=torch.empty(0),
            nats=np.array(nats, np.float64),
        )

    def batch(self, samples: list[Sample]) -> Batch:
        """Strands to be stepped together, again and again."""
        return without_slots(self.network.model, samples)

    def step(self, batch: Batch, shape: Shape) -> FlowStep:
        """Step every strand of the batch a row further.

        An exception leaves the state of all samples as it was.
        """
        samples, schedule = batch.samples, self.network.model.schedule
        tasks = [_task_of(sample) for sample in samples]
        strand_rows = np.array([sample.row for sample in samples], np.int64)
        x = torch.stack([self._under_way[sample][0] for sample in samples])
        rows = gathered([(t.table, s.row) for t, s in zip(tasks, samples, strict=True)], x)
        eager = Shape(shape.rows if self.network.exact else len(samples))

        def evaluate(x: Tensor, t: Tensor) -> Estimate:
            return self.network.model.read(self.network.output(x, t, batch.labels, eager), x, t)

        x, found = flow_row(evaluate, x, probes(x, **self._keys(samples)), rows)
        finite = torch.isfinite(x).flatten(1).all(1) & torch.isfinite(found)
        nats = torch.tensor([self._under_way[sample][1] for sample in samples]).double()
        nats += found.double().cpu()
        due = [i for i, task in enumerate(tasks) if strand_rows[i] == task.rows - 1]
        ended = [log_prior(schedule, tasks[i].table, x[i : i + 1]) for i in due]
        images = np.array([s.index // t.draws for t, s in zip(tasks, samples, strict=True)])
        step = FlowStep(
            batch=batch,
            rows=strand_rows,
            t=rows.t.cpu().numpy(),
            finite=finite,
            due=due,
            images=images,
            nats=nats[due] + torch.cat(ended) if due else nats[due],
        )
        # Only now, when nothing can fail for want of memory any more.
        for sample, state, so_far in zip(samples, x, nats.tolist(), strict=True):
            sample.row += 1
            self._under_way[sample] = (state, so_far)
        return step

    def _begin(self, samples: list[Sample]) -> None:
        fresh = [sample for sample in samples if sample.parked is None]
        for sample in samples:
            if sample.parked is not None:
                x = sample.parked[0].to(self.device)
                self._under_way[sample] = (x, _task_of(sample).nats[sample.index])
                sample.parked = None
        if fresh:
            tasks = [_task_of(sample) for sample in fresh]
            images = [s.index // t.draws for s, t in zip(fresh, tasks, strict=True)]
            x_start = torch.stack([t.x_start[i] for t, i in zip(tasks, images, strict=True)])
            for sample, x in zip(fresh, dequantised(x_start, **self._keys(fresh)), strict=True):
                self._under_way[sample] = (x, 0.0)

    def _keys(self, samples: list[Sample]) -> dict[str, Tensor]:
        """What keys the noise of each strand."""
        tasks = [_task_of(sample) for sample in samples]
        spots = [divmod(s.index, t.draws) for s, t in zip(samples, tasks, strict=True)]
        keys = [
            (task.seed, int(task.indices[image]), draw)
            for task, (image, draw) in zip(tasks, spots, strict=True)
        ]
        seeds, indices, draws = torch.tensor(keys, device=self.device).T
        return {"seeds": seeds, "indices": indices, "draws": draws}


def _task_of(sample: Sample) -> FlowTask:
    task = sample.run.task
    assert isinstance(task, FlowTask)
    return task
