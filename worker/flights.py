"""A job in flight: what it asks of the engine, what it writes, and how it is to end.

Each kind of job has a flight of its own (`worker.kinds`); what they share is here.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

import numpy as np
from torch import Tensor

from jobs.kinds.common import JobSpec
from jobs.pictures import Float32
from jobs.store.batch import WriteBatch
from jobs.store.started import Started
from worker.engine.tasks import Advanced, Event, Snapshot, Work
from worker.models import Served
from worker.network.networks import Mode

PACE_S = 10.0  # the time over which a job's own pace is taken
PACES = 20


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


SpecT = TypeVar("SpecT", bound=JobSpec)


class Flight(Generic[SpecT]):
    """One execution of one job, from the store's start to its end.

    deadline: time.monotonic(). done_before: image-steps of earlier executions;
    best: the most they ever came to. A kind that runs
    the network says what the engine is to do (`task`); any other does its work in `run`.
    """

    def __init__(
        self, started: Started, execution: str, served: Served, *, spec: SpecT, deadline: float
    ) -> None:
        self.record = started.record
        self.spec = spec
        self.execution = execution
        self.served = served
        self.deadline = deadline
        self.done_before = 0
        self.best = started.best
        self.intent = Intent.RUN
        self.began = time.monotonic()
        self.untold: Advanced | None = None  # what has been done since it was last written
        self.told_at = -math.inf
        self._marks: deque[tuple[float, int]] = deque(maxlen=PACES)  # when how much was done
        assert spec.seed is not None  # filled at admission
        self.seed = spec.seed

    @property
    def id(self) -> str:
        """The job's id."""
        return self.record.id

    def eta_s(self, done: int) -> float | None:
        """Seconds left at this execution's own pace of late; None before it has one: what it waited
        for its first step, or behind others long ago, says nothing of what is left."""
        now = time.monotonic()
        if not self._marks or now - self._marks[-1][0] >= PACE_S / PACES:
            self._marks.append((now, done))
        then, before = self._marks[0]
        made = done - before
        return (now - then) * (self.record.work - done) / made if made > 0 else None

    def told(self, now: float) -> None:
        """All that was done is written."""
        self.untold, self.told_at = None, now

    # What a kind fills in

    @classmethod
    def mode(cls, spec: SpecT) -> Mode:
        """What its task uses the network for."""
        return "chains"

    @classmethod
    def provenance(cls, served: Served, spec: SpecT) -> dict[str, Any]:
        """What made the outputs, beyond what is told of every job."""
        return {}

    def task(self) -> Work | None:
        """What the engine is to do, named by the execution; None: `run` does the work."""
        return None

    def run(self, emit: Callable[[list[Event]], None], going: Callable[[], bool]) -> None:
        """Do the work on a thread of its own, and emit what is found, but for the end.

        going: asked between two events; False: stop, somebody wants an end.
        """
        raise NotImplementedError

    def write(self, event: Event, batch: WriteBatch) -> None:
        """Put the outputs of an event into a batch."""
        if isinstance(event, Snapshot):
            found = {"x_t": event.x_t, "x_start": event.x_start, "eps": event.eps}
            for kind in self.spec.snapshot_kinds:
                for index, x in zip(event.indices, on_host(found[kind]), strict=True):
                    batch.snapshot(
                        self.record, self.execution, t=event.t + 1, kind=kind, index=index, x=x
                    )

    def save(self, batch: WriteBatch, *, every: float) -> Callable[[], None] | None:
        """Put what is not saved yet into a batch, if `every` seconds have passed.

        Returns what to call once the batch is written. For kinds to which the engine gives no
        checkpoints.
        """
        return None

    def result(self) -> dict[str, Any] | None:
        """The numbers found, JSON, once the task has finished."""
        return None


AnyFlight = Flight[Any]


def on_host(x: Tensor) -> Float32:
    """The tensor as a float32 array."""
    return np.asarray(x.detach().to("cpu").float().numpy(), dtype=np.float32)
