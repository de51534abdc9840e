"""A lane: the tasks of one model in one mode, and the choice of which samples step next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from worker.engine.fairness import deal, fill, is_patient, oldest_first, shortest_first
from worker.engine.pool import Batch, Pool
from worker.engine.runs import Run, Sample
from worker.network.costs import RateMeter, Shape
from worker.network.network import EXACT_SIZES

SOON = 8  # steps: a task that ends within so many makes room for which others can be called
CALL_EVERY = 4  # turns between two looks at who comes next
LOOK_EVERY = 16  # turns between two looks at who is in the batch no more
GROW_EVERY = 500  # turns after which a batch that found no memory is tried again


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

    def __init__(self, pool: Pool, options: EngineOptions) -> None:
        self.pool = pool
        self.runs: dict[str, Run] = {}
        self.rate = RateMeter()
        self._waiting_rows = self._ready_rows = 0
        self._weights: Counter[str] = Counter()
        self._need = 1  # rows of the most demanding sample
        self._counted = True  # whether these four are of the samples as they are
        self._max_rows = self._most_rows = options.max_rows
        self._turn = self._call_at = self._grow_at = 0
        self._batches: dict[tuple[bool, int], Batch] = {}

    @property
    def turn(self) -> int:
        """How many batches were asked for."""
        return self._turn

    def join(self, run: Run) -> None:
        """Take a task in."""
        self.pool.hold([*self.runs.values(), run])
        self.runs[run.task.id] = run
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
        self._call_at = self._turn
        self._counted = False

    @property
    def waiting_rows(self) -> int:
        """Network rows that could run now."""
        self._count()
        return self._waiting_rows

    @property
    def ready_rows(self) -> int:
        """Of these, rows of tasks that are admitted to the batch."""
        self._count()
        return self._ready_rows

    @property
    def weights(self) -> Counter[str]:
        """Client → images that wait, against other lanes'."""
        self._count()
        return self._weights

    def _count(self) -> None:
        """Once a step, and not for each of the many chains that end in it."""
        if self._counted:
            return
        self._counted = True
        costs = [sample.cost for run in self.runs.values() for sample in run.samples]
        self._waiting_rows, self._need = sum(costs), max(costs, default=1)
        self._ready_rows = sum(run.rows for run in self.runs.values() if run.admitted)
        self._weights.clear()
        for run in (run for run in self.runs.values() if run.samples):
            self._weights[run.client] += run.task.weight(len(run.samples))

    def next_batch(self) -> tuple[Batch, Shape]:
        """The samples to step next, and the shape to do it in. There must be some."""
        if self._turn >= self._grow_at:
            self._grow_at = self._turn + GROW_EVERY
            self._max_rows = min(2 * self._max_rows, self._most_rows)
        rows = min(self.ready_rows, self._max_rows)
        shape = self.pool.network.costs.best(rows, self.pool.network.shapes, at_least=self._need)
        key = (is_patient(self._turn), shape.rows)
        self._turn += 1
        if key not in self._batches:
            batch = self._choose(*key)
            self._batches[key] = batch
        return self._batches[key], shape

    def shrink(self, rows: int) -> None:
        """There was no memory for a batch of so many rows: take half as many for some time."""
        self._max_rows = max(rows // 2, 1)
        self._grow_at = self._turn + GROW_EVERY
        self._batches.clear()

    # The book: tasks are stepped only after it is written that they are in the batch

    def to_call(self) -> list[Run]:
        """Tasks that come into the batch now or within a few steps, and were not yet called."""
        if self._turn < self._call_at:
            return []
        self._call_at = self._turn + CALL_EVERY
        if all(run.admitted or run.called for run in self.runs.values()):
            return []
        soon = [r for r in self.runs.values() if r.admitted and r.remaining <= SOON * r.rows]
        room = self._max_rows + sum(run.rows for run in soon)
        found: dict[Run, None] = {}
        for patient in (False, True):
            for sample in fill(_dealt(self.runs.values(), patient=patient), room, _cost):
                if not sample.run.admitted and not sample.run.called:
                    found[sample.run] = None
        for run in found:
            run.called = True
        return list(found)

    def admit(self, run: Run) -> None:
        """The book holds a task: it may be stepped."""
        run.admitted, run.called, run.turn = True, False, self._turn
        self.changed()

    def dismiss(self, runs: list[Run]) -> None:
        """These tasks are not to be stepped before they are called again."""
        for run in runs:
            run.admitted = run.called = False
        if runs:
            self.changed()

    def displaced(self) -> list[Run]:
        """Tasks that others have displaced from the batch for many turns."""
        if self._turn % LOOK_EVERY:
            return []
        runs = self.runs.values()
        return [run for run in runs if run.admitted and self._turn - run.turn > LOOK_EVERY]

    def _choose(self, patient: bool, rows: int) -> Batch:
        admitted = [run for run in self.runs.values() if run.admitted]
        samples = fill(_dealt(admitted, patient=patient), rows, _cost)
        chosen = set(samples)
        everyone = (oldest_first if patient else shortest_first)(self.runs.values())
        last_first = (s for run in reversed(everyone) for s in reversed(run.samples))
        if self.pool.seat(samples, (s for s in last_first if s.slot >= 0 and s not in chosen)):
            self._batches.clear()  # an older choice may have lost a slot
        return self.pool.batch(samples)


def _dealt(runs: Iterable[Run], *, patient: bool) -> Iterator[Sample]:
    return deal(runs, lambda run: run.samples, _cost, patient=patient)


def _cost(sample: Sample) -> int:
    return sample.cost
