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
from functools import partial
from typing import TypeVar

import redis

from diffusion import cores
from jobs.store.batch import Fate, WriteBatch
from jobs.store.trouble import passes
from jobs.store.writer import JobStore
from worker.engine.tasks import (
    Advanced,
    Canceled,
    Event,
    Failed,
    Finished,
    NotFinite,
)
from worker.flights import AnyFlight, Ending, Intent, Outcome
from worker.network.out_of_memory import is_out_of_memory

log = logging.getLogger("ddpm.worker")
T = TypeVar("T")
RETRY_S = 0.5
PACE_S = 0.01  # between two pipelines: a fast device makes steps faster than anyone can watch
TELL_S = 0.2  # between two words of the progress of a job that has nothing else to tell


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
        self._flights: dict[str, AnyFlight] = {}  # by execution, which names the engine's task too
        self._lock = threading.Lock()
        self.closing = threading.Event()

    def add(self, flight: AnyFlight) -> None:
        """Events of this job are to be written from now on."""
        self._flights[flight.execution] = flight

    def remove(self, flight: AnyFlight) -> None:
        """A flight that was added was never launched."""
        self._flights.pop(flight.execution, None)

    def drop(self, flight: AnyFlight) -> None:
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

    def _is_ours(self, flight: AnyFlight) -> bool:
        return flight.execution in self._flights

    def _until_written(self, write: Callable[[], T]) -> T:
        """Try again for as long as Redis is away: it may come back, and nothing is lost."""
        while True:
            try:
                return write()
            except redis.exceptions.RedisError as error:
                if self.closing.is_set() or not passes(error):
                    raise
                log.warning("Redis cannot serve (%s); the work goes on, writing waits", error)
                time.sleep(RETRY_S)

    def _write(self, pairs: list[tuple[AnyFlight, Event]]) -> dict[str, Fate]:
        batch = self._store.batch()
        advanced, wrote = dict[AnyFlight, Advanced](), set[AnyFlight]()
        for flight, event in pairs:
            if isinstance(event, Advanced):
                advanced[flight] = event
            else:
                flight.write(event, batch)
                wrote.add(flight)
        flights = dict.fromkeys(flight for flight, _ in pairs)
        told = [self._tell(batch, f, advanced.get(f), beside=f in wrote) for f in flights]
        saved = [self._save(batch, flight) for flight in flights]
        fates = batch.send()
        for written in [*told, *saved]:
            if written is not None:
                written()
        return fates

    def _tell(
        self, batch: WriteBatch, flight: AnyFlight, advanced: Advanced | None, *, beside: bool
    ) -> Callable[[], None] | None:
        """The progress of a job, if it is time, or beside something else that is written of it."""
        advanced, now = advanced or flight.untold, time.monotonic()
        if advanced is None:
            return None
        if not beside and now < flight.told_at + TELL_S:
            flight.untold = advanced
            return None
        done = flight.done_before + advanced.done
        eta = flight.eta_s(done)
        batch.progress(flight.record, flight.execution, done=done, t=advanced.t + 1, eta_s=eta)
        return partial(flight.told, now)

    def _save(self, batch: WriteBatch, flight: AnyFlight) -> Callable[[], None] | None:
        released = flight.intent is Intent.RELEASE
        return flight.save(batch, every=0 if released else self._store.settings.checkpoint_s)

    def _obey(self, flight: AnyFlight, fate: Fate) -> None:
        if fate is Fate.LOST:
            self.drop(flight)
            self._cancel(flight.execution)
        elif fate is Fate.CANCEL and flight.intent is Intent.RUN:
            flight.intent = Intent.CANCEL
            self._cancel(flight.execution)

    def _end(self, flight: AnyFlight, event: Finished | Failed | Canceled) -> None:
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

    def _succeed(self, flight: AnyFlight) -> bool:
        return self._store.succeed(flight.id, flight.execution, result=flight.result())

    def _end_canceled(self, flight: AnyFlight) -> tuple[bool, Ending, BaseException | None]:
        match flight.intent:
            case Intent.RELEASE:
                return True, Ending.RELEASED, None
            case Intent.LOSE:
                return False, Ending.LOST, None
            case Intent.TIME_OUT:
                error = _time_out(flight)
                return self.fail(flight, error), Ending.FAILED, error
            case intent:
                ending = Ending.STOPPED if intent is Intent.STOP else Ending.CANCELED
                return self._until_written(lambda: self._canceled(flight)), ending, None

    def _canceled(self, flight: AnyFlight) -> bool:
        return self._store.canceled(flight.id, flight.execution)

    def fail(self, flight: AnyFlight, error: BaseException) -> bool:
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
        cores.keep_to_one()
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


def _time_out(flight: AnyFlight) -> TimeoutError:
    """Whether it came too late for the request or ran too long for the service."""
    record = flight.record
    if record.deadline is not None and time.time() >= record.deadline - 1.0:
        return TimeoutError(record.late.detail)
    seconds = flight.deadline - flight.began
    return TimeoutError(f"the job ran for more than {seconds:.0f} s")


def _fault_code(error: BaseException) -> str:
    if isinstance(error, NotFinite):
        return "not_finite"
    if isinstance(error, TimeoutError):
        return "deadline_exceeded"
    if is_out_of_memory(error):
        return "out_of_memory"
    return "worker_error"
