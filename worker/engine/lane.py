"""A lane: the tasks of one model in one mode, and the choice of which samples step next."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from worker.engine.fairness import fill, is_patient, oldest_first, shortest_first
from worker.engine.pool import Batch, Pool
from worker.engine.runs import Run, Sample
from worker.engine.term_pool import TermPool
from worker.engine.terms import TermTask
from worker.network.costs import RateMeter, Shape
from worker.network.network import EXACT_SIZES


@dataclass(frozen=True)
class EngineOptions:
    """How much an engine takes on.

    capacity: slots a model. max_rows: the largest batch. dtype: of the networks (None: as a
    probe of the device advises). checkpoint_every: seconds between two exports of a task's state.
    steps_behind: how many steps may be in flight on the device before the host looks at the
    oldest (None: 0 on a CPU, 1 on a GPU).
    """

    capacity: int = 256
    max_rows: int = 64
    dtype: torch.dtype | None = None
    checkpoint_every: float = 5.0
    steps_behind: int | None = None

    def __post_init__(self) -> None:
        # The batch of deterministic samples must be the same in every worker.
        if self.max_rows < EXACT_SIZES[0]:
            raise ValueError(f"max_rows = {self.max_rows}: must be {EXACT_SIZES[0]} or more")
        if self.capacity < self.max_rows:
            raise ValueError(
                f"capacity = {self.capacity}: must be max_rows = {self.max_rows} or more"
            )


class Lane:
    """The pool of one model in one mode, with the tasks in it."""

    def __init__(self, pool: Pool | TermPool, options: EngineOptions) -> None:
        self.pool = pool
        self.runs: dict[str, Run] = {}
        self.rate = RateMeter()
        self.waiting_rows = 0  # network rows that could run now
        self.weight = 0.0  # images that wait, against those of other lanes
        self._need = 1  # rows of the most demanding sample
        self._max_rows = options.max_rows
        self._turn = 0
        self._batches: dict[tuple[bool, int], Batch] = {}

    def join(self, run: Run) -> None:
        """Take a task in."""
        self.runs[run.task.id] = run
        self.pool.hold(self.runs.values())
        self.changed()

    def leave(self, run: Run) -> None:
        """Let a task go, and free its slots."""
        run.over = True
        for sample in run.samples:
            self.pool.release(sample)
        self.runs.pop(run.task.id, None)
        self.changed()

    def end(self, sample: Sample) -> None:
        """A chain came to its end: free its slot."""
        self.pool.release(sample)
        sample.run.samples.remove(sample)
        self.changed()

    def changed(self) -> None:
        """Samples came or went: choose anew."""
        self._batches.clear()
        costs = [sample.cost for run in self.runs.values() for sample in run.samples]
        self.waiting_rows = sum(costs)
        # The strands of a likelihood are there to fill a batch: its images count, as others do.
        self.weight = float(sum(_images(run) for run in self.runs.values()))
        self._need = max(costs, default=1)

    def next_batch(self) -> tuple[Batch, Shape]:
        """The samples to step next, and the shape to do it in. There must be some."""
        rows = min(self.waiting_rows, self._max_rows)
        shape = self.pool.network.costs.best(rows, self.pool.network.shapes, at_least=self._need)
        key = (is_patient(self._turn), shape.rows)
        self._turn += 1
        if key not in self._batches:
            batch = self._choose(*key)
            self._batches[key] = batch
        return self._batches[key], shape

    def _choose(self, patient: bool, rows: int) -> Batch:
        order = oldest_first if patient else shortest_first
        runs = order(self.runs.values())
        samples = fill((s for run in runs for s in run.samples), rows, lambda s: s.cost)
        chosen = set(samples)
        last_first = (s for run in reversed(runs) for s in reversed(run.samples))
        if self.pool.seat(samples, (s for s in last_first if s.slot >= 0 and s not in chosen)):
            self._batches.clear()  # an older choice may have lost a slot
        return self.pool.batch(samples)


def _images(run: Run) -> int:
    task = run.task
    if isinstance(task, TermTask):
        return min(len(task.x_start), len(run.samples))
    return sum(sample.cost for sample in run.samples)
