"""A task in flight and its chains, as the engine keeps them on the host."""

from __future__ import annotations

import bisect

import numpy as np
from torch import Tensor

from worker.engine.tasks import Start, Work

NEVER = int(np.iinfo(np.int64).max)


class Run:
    """A task in flight, and what of it is left to do."""

    def __init__(self, task: Work, arrival: int, *, admitted: bool = True) -> None:
        self.task = task
        self.arrival = arrival
        self.admitted = admitted  # to the batch: else the book has to hold it first
        self.called = False  # the book was told to
        self.turn = 0  # of its lane, when it was last stepped
        self.urgent, self.client = task.urgent, task.client
        self.remaining = self.total = task.evaluations
        self.samples = [Sample(self, start) for start in task.starts]  # not yet ended
        self.untold = len(task.starts)  # chains whose end was not yet reported
        last = task.rows - 1
        self._due_rows = sorted({row for row in task.snapshot_rows if 0 <= row < last} | {last})
        self.checkpoint_at = 0.0
        self.over = False

    @property
    def rows(self) -> int:
        """Network rows of one step of all its chains."""
        return sum(sample.cost for sample in self.samples)

    @property
    def done(self) -> int:
        """Network evaluations made."""
        return self.total - self.remaining

    def next_due(self, row: int) -> int:
        """The first row from `row` on with a snapshot or the chain's end; NEVER past the end."""
        at = bisect.bisect_left(self._due_rows, row)
        return self._due_rows[at] if at < len(self._due_rows) else NEVER


class Sample:
    """One chain: in a slot, or parked with its state, or not yet begun."""

    __slots__ = (
        "cost",
        "evaluations",
        "guided",
        "index",
        "label",
        "noise_index",
        "parked",
        "row",
        "run",
        "slot",
    )

    def __init__(self, run: Run, start: Start) -> None:
        self.run = run
        self.index = start.index
        self.noise_index = start.index if start.noise_index is None else start.noise_index
        self.label = start.class_label
        self.guided = run.task.guidance != 1.0 and start.class_label is not None
        self.cost = 2 if self.guided else 1  # rows of a network batch
        self.evaluations = self.cost * run.task.price
        self.row = start.row  # kept up to date only outside a slot; see Pool.row_of
        self.slot = -1
        # x_t and what of earlier rows goes with it.
        self.parked: tuple[Tensor, Tensor | None, Tensor | None] | None = None
        if start.x_t is not None:
            self.parked = (start.x_t, start.x_start_prev, start.x_start_older)
