"""A job in flight: its record, what it needs of its task, and how it is to end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum

from diffusion.samplers import SamplerTable
from jobs.kinds.chain import ChainSpec
from jobs.kinds.noise import NoiseSpec
from jobs.store.records import JobRecord
from worker.kinds.likelihoods import Numbers
from worker.models import Served


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
    UNREAD = "unread"  # not begun: another version must run it


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
    numbers: Numbers | None = None  # of a likelihood job
    done_before: int = 0  # image-steps of earlier executions
    best: int = 0  # the most image-steps that earlier executions ever came to
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
        if isinstance(spec, ChainSpec) and spec.snapshots is not None:
            return tuple(dict.fromkeys(spec.snapshots.kinds))
        return ()

    def paper_t(self, row: int) -> int:
        """The paper's t (1..T) of a row of the table."""
        assert self.table is not None
        return int(self.table.t[row]) + 1

    def eta_s(self, done: int) -> float | None:
        """Seconds left at this execution's own pace; None before it has one."""
        seconds = time.monotonic() - self.began
        made = done - self.done_before
        return seconds * (self.record.work - done) / made if made > 0 else None
