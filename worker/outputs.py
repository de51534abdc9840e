"""What the engine says, written to the store: off the tick thread, one pipeline for all jobs.

Events of one job are written in the order they happened, so a checkpoint is never ahead of the
images and snapshots before it. The store's answer to each write says whether the job is still
ours and whether it was asked to stop.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import redis
import torch
from torch import Tensor

from jobs.pictures import Float32
from jobs.store.batch import Fate, WriteBatch
from jobs.store.writer import JobStore
from worker.engine.tasks import (
    Advanced,
    Canceled,
    Checkpoint,
    Event,
    Failed,
    Finished,
    Images,
    NotFinite,
    Snapshot,
    States,
    Terms,
)
from worker.flights import Ending, Flight, Intent, Outcome
from worker.kinds.chain_state import pack
from worker.network.threads import keep_to_one

log = logging.getLogger("ddpm.worker")
T = TypeVar("T")
RETRY_S = 0.5
PACE_S = 0.01  # between two pipelines: a fast device makes steps faster than anyone can watch


class Outputs:
    """Writes events of the engine for the flights it is told of.

    cancel: takes a task, named by its execution, out of the engine. outcome: is told the end of
    each flight, once.
    """

    def __init__(
        self,
        store: JobStore,
        *,
        cancel: Callable[[str], None],
        outcome: Callable[[Outcome], None],
    ) -> None:
        self._store = store
        self._cancel = cancel
        self._outcome = outcome
        self._flights: dict[str, Flight] = {}  # by execution, which names the engine's task too
        self._lock = threading.Lock()
        self.closing = threading.Event()

    def add(self, flight: Flight) -> None:
        """Events of this job are to be written from now on."""
        self._flights[flight.execution] = flight

    def drop(self, flight: Flight) -> None:
        """The job is not ours any more: write nothing further."""
        flight.intent = Intent.LOSE
        if self._flights.pop(flight.execution, None) is not None:
            self._outcome(Outcome(flight.id, flight.execution, Ending.LOST))

    def handle(self, events: Iterable[Event]) -> None:
        """Write events, in one round trip but for the ends of jobs."""
        known = [(self._flights.get(event.task_id), event) for event in events]
        pairs = [(flight, event) for flight, event in known if flight is not None]
        with self._lock:
            fates = self._until_written(lambda: self._write(pairs))
            by_job = {flight.id: flight for flight, _ in pairs}
            for job_id, fate in fates.items():
                self._obey(by_job[job_id], fate)
            for flight, event in pairs:
                if isinstance(event, Finished | Failed | Canceled) and self._is_ours(flight):
                    self._end(flight, event)

    def _is_ours(self, flight: Flight) -> bool:
        return flight.execution in self._flights

    def _until_written(self, write: Callable[[], T]) -> T:
        """Try again for as long as Redis is away: it may come back, and nothing is lost."""
        while True:
            try:
                return write()
            except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
                if self.closing.is_set():
                    raise
                log.warning("Redis is away (%s); the work goes on, writing waits", error)
                time.sleep(RETRY_S)

    def _write(self, pairs: list[tuple[Flight, Event]]) -> dict[str, Fate]:
        batch = self._store.batch()
        progress: dict[str, tuple[Flight, Advanced]] = {}
        for flight, event in pairs:
            match event:
                case Terms():
                    assert flight.numbers is not None
                    flight.numbers.take(event)
                case Advanced():
                    progress[flight.id] = (flight, event)
                case Snapshot():
                    _add_snapshots(batch, flight, event)
                case Images():
                    for index, x in zip(event.indices, _host(event.x), strict=True):
                        image = np.clip(x, -1, 1)
                        batch.image(flight.record, flight.execution, index=index, x=image)
                case Checkpoint():
                    _add_checkpoints(batch, flight, event.states)
                case Canceled(states=States() as states):
                    _add_last_state(batch, flight, states)
                case _:
                    pass
        for flight, event in progress.values():
            done = flight.done_before + event.done
            eta = flight.eta_s(done)
            batch.progress(flight.record, flight.execution, done=done, t=event.t + 1, eta_s=eta)
        saved = {flight: self._save_numbers(batch, flight) for flight, _ in pairs}
        fates = batch.send()
        for flight, images in saved.items():
            if flight.numbers is not None and images:
                flight.numbers.saved(images)
        return fates

    def _save_numbers(self, batch: WriteBatch, flight: Flight) -> list[int]:
        """Checkpoint what a likelihood job has found, if it is time; the images it is about."""
        if flight.numbers is None:
            return []
        released = flight.intent is Intent.RELEASE
        states = flight.numbers.unsaved(0 if released else self._store.settings.checkpoint_s)
        for index, state in states.items():
            batch.checkpoint(flight.record, flight.execution, index=index, state=state)
        return list(states)

    def _obey(self, flight: Flight, fate: Fate) -> None:
        if fate is Fate.LOST:
            self.drop(flight)
            self._cancel(flight.execution)
        elif fate is Fate.CANCEL and flight.intent is Intent.RUN:
            flight.intent = Intent.CANCEL
            self._cancel(flight.execution)

    def _end(self, flight: Flight, event: Finished | Failed | Canceled) -> None:
        """Close the job in the store, then say so."""
        error: BaseException | None = None
        if isinstance(event, Failed):
            error = event.error
            ours = self.fail(flight, error)
            ending = Ending.FAILED
        elif isinstance(event, Finished):
            ours = self._until_written(lambda: self._succeed(flight))
            ending = Ending.SUCCEEDED
        else:
            ours, ending, error = self._end_canceled(flight)
        self._flights.pop(flight.execution, None)
        if not ours:
            ending = Ending.LOST
        self._outcome(Outcome(flight.id, flight.execution, ending, error))

    def _succeed(self, flight: Flight) -> bool:
        result = None if flight.numbers is None else flight.numbers.result()
        return self._store.succeed(flight.id, flight.execution, result=result)

    def _end_canceled(self, flight: Flight) -> tuple[bool, Ending, BaseException | None]:
        match flight.intent:
            case Intent.RELEASE:
                return True, Ending.RELEASED, None
            case Intent.LOSE:
                return False, Ending.LOST, None
            case Intent.TIME_OUT:
                seconds = flight.deadline - flight.began
                error = TimeoutError(f"the job ran for more than {seconds:.0f} s")
                return self.fail(flight, error), Ending.FAILED, error
            case intent:
                ending = Ending.STOPPED if intent is Intent.STOP else Ending.CANCELED
                return self._until_written(lambda: self._canceled(flight)), ending, None

    def _canceled(self, flight: Flight) -> bool:
        return self._store.canceled(flight.id, flight.execution)

    def fail(self, flight: Flight, error: BaseException) -> bool:
        """Close a job as failed, with a reason that a user can read."""
        code = _fault_code(error)
        detail = str(error) or type(error).__name__
        return self._until_written(
            lambda: self._store.fail(flight.id, flight.execution, code=code, detail=detail)
        )


class OutputsThread:
    """Runs `Outputs.handle` on a thread of its own; events are handed over by `put`."""

    def __init__(self, outputs: Outputs) -> None:
        self.outputs = outputs
        self._queue: queue.SimpleQueue[list[Event] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="outputs", daemon=True)
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def put(self, events: list[Event]) -> None:
        """Take events and return at once."""
        self._queue.put(events)

    def stop(self) -> None:
        """Write what was put, and end."""
        self._queue.put(None)
        self._thread.join()

    def _loop(self) -> None:
        keep_to_one()
        try:
            going = True
            while going:
                taken = [self._queue.get()]
                while not self._queue.empty():
                    taken.append(self._queue.get())
                began = time.monotonic()
                self.outputs.handle([event for events in taken if events for event in events])
                going = None not in taken
                if going:
                    time.sleep(max(0.0, began + PACE_S - time.monotonic()))
        except BaseException as error:
            log.exception("the outputs thread broke down")
            self.failure = error


def _host(x: Tensor) -> Float32:
    return np.asarray(x.detach().to("cpu", torch.float32).numpy(), dtype=np.float32)


def _add_snapshots(batch: WriteBatch, flight: Flight, event: Snapshot) -> None:
    found = {"x_t": event.x_t, "x_start": event.x_start, "eps": event.eps}
    for kind in flight.kinds:
        for index, x in zip(event.indices, _host(found[kind]), strict=True):
            batch.snapshot(
                flight.record, flight.execution, t=event.t + 1, kind=kind, index=index, x=x
            )


def _add_checkpoints(batch: WriteBatch, flight: Flight, states: States) -> None:
    assert flight.table is not None
    memory = flight.table.has_memory
    x_t, x_start = states.x_t.cpu(), states.x_start_prev.cpu()
    for i, (index, row) in enumerate(zip(states.indices, states.rows, strict=True)):
        state = pack(int(row), x_t[i], x_start[i] if memory else None)
        batch.checkpoint(flight.record, flight.execution, index=int(index), state=state)


def _add_last_state(batch: WriteBatch, flight: Flight, states: States) -> None:
    """What a chain taken out in mid-way leaves: for the next worker, or for the user."""
    if flight.intent is Intent.RELEASE:
        _add_checkpoints(batch, flight, states)
    if flight.intent not in (Intent.CANCEL, Intent.STOP):
        return
    x_t, x_start = _host(states.x_t), _host(states.x_start_prev)
    for i, (index, row) in enumerate(
        zip(states.indices.tolist(), states.rows.tolist(), strict=True)
    ):
        put = {"record": flight.record, "execution": flight.execution, "index": index}
        batch.snapshot(t=flight.paper_t(row), kind="x_t", x=x_t[i], **put)
        if row > 0:
            batch.snapshot(t=flight.paper_t(row - 1), kind="x_start", x=x_start[i], **put)


def _fault_code(error: BaseException) -> str:
    if isinstance(error, NotFinite):
        return "not_finite"
    if isinstance(error, TimeoutError):
        return "deadline_exceeded"
    return "worker_error"
