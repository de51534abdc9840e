"""Jobs that run reverse chains as tasks of the engine: by which table, and what they leave."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffusion.condition import Condition
from diffusion.forward import q_samples_at
from diffusion.noise import Purpose, image_normals
from diffusion.schedule import Schedule
from diffusion.table import SamplerTable
from diffusion.tuned import TUNED, table_digest
from jobs.kinds.chain import ChainSpec, PathSpec, Snapshots
from jobs.pictures import GREY_LEVELS
from jobs.store.batch import WriteBatch
from jobs.store.started import Started
from worker.engine.tasks import Canceled, Checkpoint, Event, Images, Start, States, Task
from worker.flights import Flight, Intent, on_host
from worker.kinds.chain_state import StateError, pack, unpack
from worker.models import Served

log = logging.getLogger("ddpm.worker")
ChainT = TypeVar("ChainT", bound=PathSpec)


class ChainFlight(Flight[ChainT]):
    """A job that runs reverse chains; each kind says where they begin."""

    from_noise: ClassVar[bool] = False  # else at the t of the spec
    # Options of the table that are this kind's own, and no choice of model or request.
    own_options: ClassVar[Mapping[str, object]] = {}

    def __init__(
        self, started: Started, execution: str, served: Served, *, spec: ChainT, deadline: float
    ) -> None:
        super().__init__(started, execution, served, spec=spec, deadline=deadline)
        self.table = self.table_for(served, spec)
        self.condition = self.condition_on(started)
        self._task = self._rest(started)
        self.done_before = self.record.work - self._task.evaluations

    @classmethod
    def provenance(cls, served: Served, spec: ChainT) -> dict[str, Any]:
        """How x̂_0 and ε̂ are treated: the model's own choice, and no field of a request."""
        sampling = served.model.config.sampling
        made: dict[str, Any] = {"clip": sampling.clip}
        if isinstance(spec, ChainSpec) and spec.clip is not None:
            made["clip"] = spec.clip
        if isinstance(spec, ChainSpec) and spec.sampler == "ddim":
            made |= {"rederive_eps": sampling.rederive_eps, "landing": sampling.landing}
            made |= cls.own_options
        if (
            isinstance(spec, ChainSpec)
            and spec.steps in served.model.tuned
            and spec.sampler == TUNED
        ):
            made["table"] = table_digest(served.model.tuned[spec.steps])
        return made

    def fresh_starts(self, started: Started) -> list[Start]:
        """Where the chains begin, in the order of the images. Raises MissingInput."""
        raise NotImplementedError

    def table_for(self, served: Served, spec: ChainT) -> SamplerTable:
        """The rows of the chains."""
        assert isinstance(spec, ChainSpec)
        return spec_table(served, spec, from_noise=self.from_noise, **self.own_options)

    @property
    def up_to(self) -> int | None:
        """The paper's t that they lead to, where they begin in an image."""
        return None

    def condition_on(self, started: Started) -> Condition | None:
        """What the chains are conditioned on. Raises MissingInput."""
        return None

    def task(self) -> Task:
        """The chains, or what earlier executions left of them."""
        return self._task

    def _rest(self, started: Started) -> Task:
        """Images and states of another version of the model, or of its table, do not count."""
        spec, model = self.spec, self.served.model
        table = self.provenance(self.served, spec).get("table")
        same = started.earlier_digest in (None, model.digest)
        same &= started.earlier_table in (None, table)
        starts = []
        for fresh in self.fresh_starts(started):
            if same and fresh.index in started.finished:
                continue
            state = started.states.get(fresh.index) if same else None
            starts.append(fresh if state is None else _resumed(fresh, state, model.shape))
        return Task(
            id=self.execution,
            model=model,
            table=self.table,
            seed=self.seed,
            starts=tuple(starts),
            guidance=spec.guidance,
            deterministic=spec.deterministic,
            urgent=spec.priority == "high",
            client=started.record.client,
            snapshot_rows=snapshot_rows(self.table, spec.snapshots, up_to=self.up_to),
            condition=self.condition,
        )

    def write(self, event: Event, batch: WriteBatch) -> None:
        """Images, snapshots and states of the chains."""
        match event:
            case Images():
                images = event.x.clamp(-1, 1)
                found = zip(event.indices, on_host(images), self._residuals(images), strict=True)
                for index, x, residual in found:
                    batch.image(self.record, self.execution, index=index, x=x, residual=residual)
            case Checkpoint():
                self._save_states(event.states, batch)
            case Canceled(states=States() as states):
                if self.intent is Intent.RELEASE:  # for the next worker
                    self._save_states(states, batch)
                elif self.intent in (Intent.CANCEL, Intent.STOP):  # for the user
                    self._show_states(states, batch)
            case _:
                super().write(event, batch)

    def _residuals(self, images: Tensor) -> list[float] | list[None]:
        """How far each image is from what was measured, in grey levels."""
        if self.condition is None:
            return [None] * len(images)
        distance = self.condition.measurement.distance(images)
        return [round(value, 4) for value in (distance * GREY_LEVELS).tolist()]

    def _save_states(self, states: States, batch: WriteBatch) -> None:
        planes = (states.x_t, states.x_start_prev, states.x_start_older)[: 1 + self.table.depth]
        held = [plane.cpu() for plane in planes if plane is not None]
        for i, (index, row) in enumerate(zip(states.indices, states.rows, strict=True)):
            state = pack(int(row), *(plane[i] for plane in held))
            batch.checkpoint(self.record, self.execution, index=int(index), state=state)

    def _show_states(self, states: States, batch: WriteBatch) -> None:
        x_t, x_start = on_host(states.x_t), on_host(states.x_start_prev)
        for i, (index, row) in enumerate(
            zip(states.indices.tolist(), states.rows.tolist(), strict=True)
        ):
            put = {"record": self.record, "execution": self.execution, "index": index}
            batch.snapshot(t=self._paper_t(row), kind="x_t", x=x_t[i], **put)
            if row > 0:
                batch.snapshot(t=self._paper_t(row - 1), kind="x_start", x=x_start[i], **put)

    def _paper_t(self, row: int) -> int:
        """The paper's t (1..T) of a row of the table."""
        return int(self.table.t[row]) + 1


def _resumed(fresh: Start, state: bytes, shape: tuple[int, int, int]) -> Start:
    try:
        row, (x_t, x_start_prev, x_start_older) = unpack(state, shape)
    except StateError as error:  # of another version: the chain begins again, and ends alike
        log.warning("image %d starts over: %s", fresh.index, error)
        return fresh
    return replace(fresh, row=row, x_t=x_t, x_start_prev=x_start_prev, x_start_older=x_start_older)


def noised(schedule: Schedule, x_start: Tensor, *, t: int, seed: int) -> Tensor:
    """x_t of images [N, C, H, W] at the paper's t with one ε for all, that of (seed, image 0)."""
    shape = tuple(x_start.shape[1:])
    index = torch.zeros(1, dtype=torch.long)
    eps = image_normals(seed, index, row=0, purpose=Purpose.Q_SAMPLE, shape=shape)
    [(_, x_t)] = q_samples_at(schedule, x_start, [t - 1], eps)
    return x_t


def spec_table(served: Served, spec: ChainSpec, *, from_noise: bool, **own: object) -> SamplerTable:
    """The sampler table of a filled spec; equal requests share one. own: further options."""
    given: dict[str, object] = {name: getattr(spec, name) for name in spec.table_fields} | own
    given["start"] = None if from_noise else spec.first_t(served.card) - 1
    return served.table(tuple((name, v) for name, v in given.items() if v is not None))


def snapshot_rows(
    table: SamplerTable, wanted: Snapshots | None, *, up_to: int | None = None
) -> frozenset[int]:
    """The rows of a table at which a request wants to see the chain.

    up_to: of one that rises, the paper's t that it leads to, whose state is what comes of it all.
    """
    if wanted is None:
        return frozenset()
    if wanted.every is not None:
        rows = [*range(0, len(table), wanted.every)]
    else:
        rows = [int(np.abs(table.t + 1 - t).argmin()) for t in wanted.at or ()]
    if up_to is None:
        return frozenset(rows)
    # On the way up a row enters with the x of the t before: the first with the image, then those
    # that mend the step to t, and with x_t itself the last of this t.
    last = {t: row for row, t in enumerate(table.t.tolist())}
    entered = {last[int(table.t[row])] for row in rows}
    return frozenset(row for row in entered if row > 0 and table.t[row] + 1 != up_to)
