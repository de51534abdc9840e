"""The slots of one model: the state of its samples on the device, and one step of some of them.

A sample's whole state is x_t and x̂_0 of the row before (of the last two rows, where a table reads
them) on the device, and (table row, seed, image index, label, guidance) on the host. Nothing is
read back from the device to choose a batch, so a GPU never waits for the host.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.condition import Condition, Projection, together
from diffusion.forward import alpha_bars
from diffusion.model import Estimate
from diffusion.noise import Purpose, image_normals, normals
from diffusion.table import (
    COLUMNS,
    DeviceTable,
    Memory,
    SamplerTable,
    clip_x_start,
    remember,
    scale_noise,
    update,
)
from worker.engine.pool import Batch, Int64, Step, labels_of
from worker.engine.runs import NEVER, Run, Sample
from worker.engine.tasks import Event, Images, Snapshot, States, Task
from worker.network.costs import Shape
from worker.network.network import Inputs, Network


class TableBank:
    """All sampler tables in use, end to end on the device; a sample carries a row index only."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._offsets: dict[SamplerTable, int] = {}
        self.rows: DeviceTable | None = None
        self.t: Int64 = np.zeros(0, np.int64)
        self.noisy: NDArray[np.bool_] = np.zeros(0, bool)
        self.learned: NDArray[np.bool_] = np.zeros(0, bool)
        self.remembers: NDArray[np.bool_] = np.zeros(0, bool)  # something else than x̂_0
        self.deep: NDArray[np.bool_] = np.zeros(0, bool)  # of a table that looks two rows back
        self.between: NDArray[np.bool_] = np.zeros(0, bool)  # at a time that is no index

    def __contains__(self, table: SamplerTable) -> bool:
        return table in self._offsets

    def hold(self, tables: Iterable[SamplerTable]) -> None:
        """Hold these tables, and no others. An exception leaves all as it was."""
        distinct = list(dict.fromkeys(tables))
        self.rows = DeviceTable.of(distinct, self._device)  # first: nothing else may fail
        starts = np.cumsum([0, *(len(table) for table in distinct)])
        self._offsets = dict(zip(distinct, starts.tolist(), strict=False))
        self.t = np.concatenate([table.t for table in distinct])
        noise = COLUMNS.index("c")
        self.noisy = np.concatenate([table.coefficients[:, noise] != 0 for table in distinct])
        self.learned = np.concatenate([table.spread != 0 for table in distinct])
        self.remembers = np.concatenate([table.memory != Memory.X_START for table in distinct])
        self.deep = np.concatenate([np.full(len(table), table.depth > 1) for table in distinct])
        self.between = np.concatenate([table.between for table in distinct])

    def offset(self, table: SamplerTable) -> int:
        """Where the rows of a table begin."""
        return self._offsets[table]


@dataclass(frozen=True, eq=False)
class ChainStep(Step):
    """One row of each chain. x_t, x_start, eps, x_next: float32 [M, C, H, W]."""

    x_t: Tensor
    x_start: Tensor
    eps: Tensor
    x_next: Tensor

    def events(self) -> list[Event]:
        """Snapshots, then images, one event for the chains of a task that are at the same row."""
        snapshots: dict[tuple[Run, int], list[int]] = {}
        images: dict[Run, list[int]] = {}
        for i in self.due:
            run, row = self.batch.samples[i].run, int(self.rows[i])
            if run.over:
                continue
            if row in run.task.snapshot_rows:
                snapshots.setdefault((run, row), []).append(i)
            if row == run.task.rows - 1:
                images.setdefault(run, []).append(i)
        events: list[Event] = []
        for (run, row), at in snapshots.items():
            found = (self.x_t[at], self.x_start[at], self.eps[at])
            events.append(Snapshot(run.task.id, self._indices(at), row, int(self.t[at[0]]), *found))
        for run, at in images.items():
            run.untold -= len(at)
            events.append(Images(run.task.id, self._indices(at), self.x_next[at]))
        return events

    def _indices(self, at: list[int]) -> tuple[int, ...]:
        return tuple(self.batch.samples[i].index for i in at)


def task_of(sample: Sample) -> Task:
    """The task of a chain."""
    task = sample.run.task
    assert isinstance(task, Task)
    return task


class ChainPool:
    """A fixed number of slots for samples of one model."""

    def __init__(self, network: Network, capacity: int) -> None:
        self.network = network
        self.capacity = capacity
        self.device = network.model.device
        self.bank = TableBank(self.device)
        self.x = torch.zeros(capacity, *network.model.shape, device=self.device)
        self.x_start = torch.zeros_like(self.x)
        self.older: Tensor | None = None  # made for the first table that looks two rows back
        self.resident: list[Sample | None] = [None] * capacity
        self._free = list(range(capacity))[::-1]
        self._offset = np.zeros(capacity, np.int64)
        self._row = np.zeros(capacity, np.int64)
        self._due = np.full(capacity, NEVER, np.int64)
        self._seed = np.zeros(capacity, np.int64)
        self._image = np.zeros(capacity, np.int64)

    def row_of(self, sample: Sample) -> int:
        """The next row of the sample's table."""
        return sample.row if sample.slot < 0 else int(self._row[sample.slot])

    # Slots

    def hold(self, runs: Collection[Run]) -> None:
        """Be ready for these tasks, among them all of resident samples."""
        tables = [run.task.table for run in runs if isinstance(run.task, Task)]
        if all(table in self.bank for table in tables):
            return
        if self.older is None and any(table.depth > 1 for table in tables):
            self.older = torch.zeros_like(self.x)
        self.bank.hold(tables)
        for sample in self.resident:
            if sample is not None:
                self._offset[sample.slot] = self.bank.offset(task_of(sample).table)

    def seat(self, samples: Sequence[Sample], evict: Iterable[Sample]) -> bool:
        """Give each sample a slot, parking samples of `evict` (not among them) where needed.

        Whether any slot changed hands.
        """
        newcomers = [sample for sample in samples if sample.slot < 0]
        victims = iter(evict)
        while len(self._free) < len(newcomers):
            self.park(next(victims))
        if not newcomers:
            return False
        fresh = [sample for sample in newcomers if sample.parked is None]
        for sample in newcomers:
            self._take_slot(sample)
        self._draw(fresh)
        return True

    def park(self, sample: Sample) -> None:
        """Take a sample out of its slot; its state goes with it."""
        slot = sample.slot
        sample.row = int(self._row[slot])
        older = None if self.older is None else self.older[slot].clone()
        sample.parked = (self.x[slot].clone(), self.x_start[slot].clone(), older)
        self.release(sample)

    def release(self, sample: Sample) -> None:
        """Free the slot of a sample."""
        if sample.slot < 0:
            return
        sample.row = int(self._row[sample.slot])
        self.resident[sample.slot] = None
        self._due[sample.slot] = NEVER
        self._free.append(sample.slot)
        sample.slot = -1

    def _take_slot(self, sample: Sample) -> None:
        slot = sample.slot = self._free.pop()
        self.resident[slot] = sample
        self._offset[slot] = self.bank.offset(task_of(sample).table)
        self._row[slot] = sample.row
        self._seed[slot] = task_of(sample).seed
        self._image[slot] = sample.noise_index
        self._due[slot] = sample.run.next_due(sample.row)
        if sample.parked is not None:
            x, *planes = sample.parked
            self.x[slot] = x.to(self.device)
            for held, plane in zip((self.x_start, self.older), planes, strict=True):
                if held is not None:
                    held[slot] = 0.0 if plane is None else plane.to(self.device)
            sample.parked = None

    def _draw(self, samples: list[Sample]) -> None:
        """x_T of samples that start from noise."""
        by_seed: dict[int, list[Sample]] = {}
        for sample in samples:
            by_seed.setdefault(task_of(sample).seed, []).append(sample)
        for seed, group in by_seed.items():
            slots = torch.tensor([sample.slot for sample in group], device=self.device)
            indices = torch.tensor([sample.noise_index for sample in group], device=self.device)
            shape = self.network.model.shape
            self.x[slots] = image_normals(seed, indices, row=0, purpose=Purpose.X_T, shape=shape)
            self.x_start[slots] = 0.0
            if self.older is not None:
                self.older[slots] = 0.0

    # Steps

    def batch(self, samples: list[Sample]) -> Batch:
        """Samples in slots, made ready to be stepped together, again and again."""
        guided = [i for i, sample in enumerate(samples) if sample.guided]
        weights = [samples[i].run.task.guidance for i in guided]
        return Batch(
            samples=samples,
            slots=np.array([sample.slot for sample in samples], np.int64),
            network_rows=len(samples) + len(guided),
            labels=labels_of(self.network.model, samples, len(guided)),
            guided=torch.tensor(guided, device=self.device) if guided else None,
            guidance=torch.tensor(weights, device=self.device) if guided else None,
            corrections=self._corrections(samples),
        )

    def _corrections(self, samples: list[Sample]) -> tuple[tuple[Condition, Tensor], ...]:
        """What corrects which samples: together all that differ in y alone, of whatever tasks;
        where mates must not matter, each by itself."""
        groups: dict[Hashable, list[tuple[int, Condition]]] = {}
        for i, sample in enumerate(samples):
            if (found := task_of(sample).condition) is not None:
                key: Hashable = i if self.network.exact else found.alike
                groups.setdefault(key, []).append((i, found))
        return tuple(
            (
                together([condition for _, condition in group]),
                torch.tensor([i for i, _ in group], device=self.device),
            )
            for group in groups.values()
        )

    def step(self, batch: Batch, shape: Shape) -> ChainStep:
        """Evaluate one row of every sample of the batch.

        An exception leaves the state of all samples as it was.
        """
        slots = batch.slots
        rows = self._row[slots]
        table_rows = self._offset[slots] + rows
        # One small copy to the device: [4, M] int64.
        packed = torch.from_numpy(
            np.stack([slots, table_rows, self._seed[slots], self._image[slots]])
        ).to(self.device, non_blocking=True)
        assert self.bank.rows is not None
        x, x_start_prev = self.x[packed[0]], self.x_start[packed[0]]
        deep = self.older is not None and bool(self.bank.deep[table_rows].any())
        older = self.older[packed[0]] if self.older is not None and deep else None
        times = self.bank.rows.time if self.bank.between[table_rows].any() else self.bank.rows.t
        t, coefficients = times[packed[1]], self.bank.rows.coefficients[packed[1]]
        found, x_start = self._estimate(batch, x, t, rows=coefficients, shape=shape)
        z = self._noise(packed, self.bank.noisy[table_rows], like=x)
        if found.v is not None and self.bank.learned[table_rows].any():
            z = scale_noise(self.bank.rows.spread[packed[1]], found.v, z)
        x_next = update(
            coefficients,
            x,
            x_start=x_start,
            eps=found.eps,
            x_start_prev=x_start_prev,
            z=z,
            x_start_older=older,
        )
        # Of ε̂ as well, since clipping hides an infinite x̂_0.
        finite = found.finite & torch.isfinite(x_next).flatten(1).all(dim=1)
        kept = x_start
        if self.bank.remembers[table_rows].any():
            memory = self.bank.rows.memory[packed[1]]
            kept = remember(memory, x_start=x_start, x=x, x_start_prev=x_start_prev)
        # Nothing from here on takes memory.
        self.x.index_copy_(0, packed[0], x_next)
        self.x_start.index_copy_(0, packed[0], kept)
        if self.older is not None and older is not None:
            self.older.index_copy_(0, packed[0], x_start_prev)
        self._row[slots] += 1
        due = np.flatnonzero(self._due[slots] == rows).tolist()
        for i in due:
            sample = batch.samples[i]
            self._due[sample.slot] = sample.run.next_due(int(rows[i]) + 1)
        t_of = self.bank.t[table_rows]
        return ChainStep(batch, rows, t_of, finite, due, x, x_start, found.eps, x_next)

    def _estimate(
        self, batch: Batch, x: Tensor, t: Tensor, *, rows: Tensor, shape: Shape
    ) -> tuple[Estimate, Tensor]:
        """What the network finds in x [M, C, H, W] at t [M], and x̂_0 clipped and corrected."""
        inputs = Inputs(x, t, batch.labels, batch.guided, batch.guidance)
        found = self.network.evaluate(inputs, shape)
        x_start = clip_x_start(rows, found.x_start)
        if not batch.corrections:
            return found, x_start
        _, r2 = alpha_bars(self.network.model.schedule, t, x_start)
        for correction, at in batch.corrections:
            assert isinstance(correction, Projection)
            x_start[at] = correction.correct(x_start[at], r2[at])
        return found, x_start

    def _noise(self, packed: Tensor, noisy: NDArray[np.bool_], like: Tensor) -> Tensor:
        """z of every sample; drawn only where its row uses it."""
        if not noisy.any():
            return torch.zeros_like(like)
        assert self.bank.rows is not None
        picked = slice(None) if noisy.all() else torch.from_numpy(np.flatnonzero(noisy))
        chosen = packed[:, picked]
        z = normals(
            chosen[2],
            chosen[3],
            rows=self.bank.rows.noise[chosen[1]],
            purpose=self.bank.rows.purpose[chosen[1]],
            shape=self.network.model.shape,
        )
        if noisy.all():
            return z
        out = torch.zeros_like(like)
        out[picked] = z
        return out

    def states(self, samples: Sequence[Sample]) -> States | None:
        """A copy of the state of those samples that have begun; None if none has."""
        begun = [s for s in samples if s.slot >= 0 or s.parked is not None]
        if not begun:
            return None
        blank = torch.zeros(self.network.model.shape, device=self.device)
        held = (self.x, self.x_start, self.older)
        x_t, x_start_prev, x_start_older = (
            torch.stack([blank if x is None else x.to(self.device) for x in column])
            for column in zip(
                *(
                    [None if plane is None else plane[s.slot] for plane in held]
                    if s.parked is None
                    else s.parked
                    for s in begun
                ),
                strict=True,
            )
        )
        return States(
            indices=np.array([s.index for s in begun], np.int64),
            rows=np.array([self.row_of(s) for s in begun], np.int64),
            x_t=x_t,
            x_start_prev=x_start_prev,
            x_start_older=x_start_older,
        )
