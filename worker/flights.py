"""A job in flight: its record, the task or noising it stands for, and how it is to end."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache

import numpy as np

from diffusion.samplers import SamplerTable
from diffusion.sampling import build_table
from jobs.records import JobRecord
from jobs.specs import GenerateSpec, NoiseSpec, Snapshots
from jobs.store import Started
from worker.chain_state import StateError, unpack
from worker.models import Served
from worker.tasks import Start, Task

log = logging.getLogger("ddpm.worker")


class Intent(Enum):
    """What is wanted of a flight."""

    RUN = "run"
    CANCEL = "cancel"  # the user asked, through the API
    STOP = "stop"  # RQ's stop command
    TIME_OUT = "time out"
    RELEASE = "release"  # give the job back to the queue, with its state
    LOSE = "lose"  # it is no longer ours: not another word


class Ending(Enum):
    """How a flight ended, for the queue's side. The store already knows."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    STOPPED = "stopped"
    RELEASED = "released"
    LOST = "lost"


@dataclass(frozen=True)
class Outcome:
    """The end of one flight. error: with FAILED."""

    job_id: str
    execution: str
    ending: Ending
    error: BaseException | None = None


@dataclass(eq=False)
class Flight:
    """One execution of one job, from the store's start to its end."""

    record: JobRecord
    execution: str
    served: Served
    deadline: float  # time.monotonic()
    table: SamplerTable | None = None
    done_before: int = 0  # image-steps of earlier executions
    intent: Intent = Intent.RUN
    began: float = field(default_factory=time.monotonic)

    @property
    def id(self) -> str:
        """The job's id."""
        return self.record.id

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of snapshot that were asked for."""
        spec = self.record.spec
        if isinstance(spec, NoiseSpec):
            return tuple(dict.fromkeys(spec.kinds))
        return () if spec.snapshots is None else tuple(dict.fromkeys(spec.snapshots.kinds))

    def paper_t(self, row: int) -> int:
        """The paper's t (1..T) of a row of the table."""
        assert self.table is not None
        return int(self.table.t[row]) + 1

    def eta_s(self, done: int) -> float | None:
        """Seconds left at this execution's own pace; None before it has one."""
        seconds = time.monotonic() - self.began
        made = done - self.done_before
        return seconds * (self.record.work - done) / made if made > 0 else None


def generate_task(served: Served, started: Started, execution: str) -> tuple[Task, int]:
    """The rest of a generate job as a task, and the image-steps that are done already.

    The task is named by the execution: another execution of the same job is another task.

    Images and states of another version of the model do not count.
    """
    record, spec = started.record, started.record.spec
    assert isinstance(spec, GenerateSpec) and spec.seed is not None
    table = spec_table(served, spec)
    same = started.earlier_digest in (None, served.model.digest)
    starts = []
    for index in range(spec.num_images):
        if same and index in started.finished:
            continue
        state = started.states.get(index) if same else None
        starts.append(_start(index, spec.class_label, state, served.model.shape))
    task = Task(
        id=execution,
        model=served.model,
        table=table,
        seed=spec.seed,
        starts=tuple(starts),
        guidance=spec.guidance,
        deterministic=spec.deterministic,
        urgent=spec.priority == "high",
        snapshot_rows=snapshot_rows(table, spec.snapshots),
    )
    return task, record.work - task.evaluations


def _start(
    index: int, label: int | None, state: bytes | None, shape: tuple[int, int, int]
) -> Start:
    if state is not None:
        try:
            row, x_t, x_start_prev = unpack(state, shape)
        except StateError as error:  # of another version: the chain begins again, and ends alike
            log.warning("image %d starts over: %s", index, error)
        else:
            return Start(index, row, x_t, x_start_prev, label)
    return Start(index, class_label=label)


def spec_table(served: Served, spec: GenerateSpec) -> SamplerTable:
    """The sampler table of a filled spec; equal requests share one."""
    names = ("sampler", "steps", "spacing", "eta", "variance", "corrector_steps")
    given = {name: getattr(spec, name) for name in names}
    return _table(served, tuple((name, v) for name, v in given.items() if v is not None))


@lru_cache(maxsize=256)
def _table(served: Served, options: tuple[tuple[str, object], ...]) -> SamplerTable:
    clip = served.model.config.sampling.clip
    return build_table(served.model.schedule, clip=clip, **dict(options))  # type: ignore[arg-type]


def snapshot_rows(table: SamplerTable, wanted: Snapshots | None) -> frozenset[int]:
    """The rows of a table at which a request wants to see the chain."""
    if wanted is None:
        return frozenset()
    if wanted.every is not None:
        return frozenset(range(0, len(table), wanted.every))
    return frozenset(int(np.abs(table.t + 1 - t).argmin()) for t in wanted.at or ())
