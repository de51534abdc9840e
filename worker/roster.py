"""Which jobs are in the batch: written down before they are stepped, so that the death of this
worker casts suspicion on them and on no other. And suspects: each is run alone.

A job is marked when it is begun, where it is to be stepped at once; else the engine calls it a few
steps before its turn. Both cost no step a moment. A suspect waits until nothing else is stepped;
when it has lived through more than it ever did before, it joins the others again.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

import redis

from diffusion import cores
from jobs.store.batch import InBatch
from jobs.store.trouble import passes
from jobs.store.writer import JobStore
from worker.engine.loop import Engine
from worker.engine.tasks import Advanced, EngineStopped, Event
from worker.flights import AnyFlight

log = logging.getLogger("ddpm.worker")
# A suspect that lives so long past its furthest point is cleared: longer than progress takes to be
# written, else a job that always dies at one step would seem to come a step further each time.
CLEAR_S = 0.25
RETRY_S = 0.5


@dataclass(frozen=True, eq=False)
class Held:
    """A flight that is not yet launched."""

    flight: AnyFlight
    launch: Callable[[], object]


class Roster:
    """The engine's book. threads: write on a thread of its own, else where it is called. single:
    this process runs one job and no other, so there is nothing to arrange.

    `isolate`, `beside`, `turn`, `forget` and `landed` are for the thread that begins the jobs.
    """

    def __init__(self, store: JobStore, *, threads: bool, single: bool) -> None:
        self.single = single
        self.engine: Engine | None = None
        self.failure: BaseException | None = None
        self.closing = threading.Event()
        self._store = store
        self._flights: dict[str, AnyFlight] = {}  # by execution
        self._suspects: deque[Held] = deque()
        self._later: list[Held] = []  # work beside the engine that waits for a suspect to end
        self._beside: set[str] = set()  # executions that work beside the engine
        self._alone: Held | None = None
        self._launched = False  # whether the one that is alone has been launched
        self._ahead_since: float | None = None  # since when it is past its furthest point
        self._excused = False
        self._lock = threading.RLock()
        self._writes: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="roster", daemon=True)
        self._threads = threads

    def start(self) -> None:
        """Begin."""
        if self._threads:
            self._thread.start()

    def stop(self) -> None:
        """Write what was asked for, and end."""
        self.closing.set()
        if self._threads and self._thread.is_alive():
            self._writes.put(None)
            self._thread.join()

    @property
    def busy(self) -> bool:
        """Whether a suspect is alone or waits to be: no time to take more jobs."""
        return self._alone is not None or bool(self._suspects)

    def at_start(self, *, room: bool) -> InBatch:
        """How a job is marked as it is begun. room: it would be stepped at once."""
        if self.single:
            return InBatch.ALONE
        return InBatch.SHARED if room and not self.busy and not self._excused else InBatch.NO

    def add(self, flight: AnyFlight) -> None:
        """A flight began."""
        self._flights[flight.execution] = flight
        if self.single:
            self._alone, self._launched = Held(flight, _nothing), True

    # Suspects, one after the other

    def isolate(self, flight: AnyFlight, launch: Callable[[], None]) -> None:
        """Launch a suspect once nothing else is stepped."""
        with self._lock:
            self._suspects.append(Held(flight, launch))
        self.turn()

    def beside(self, flight: AnyFlight, launch: Callable[[], object]) -> None:
        """Launch what works beside the engine, but not while a suspect is alone."""
        with self._lock:
            if self.busy and not self.single and self._alone_execution() != flight.execution:
                self._later.append(Held(flight, launch))
                return
            self._beside.add(flight.execution)
        launch()

    def turn(self) -> None:
        """Let the next suspect be alone, if it can be."""
        with self._lock:
            if self._excused or self._alone or self._beside or not self._suspects:
                return
            self._alone, self._launched = self._suspects.popleft(), False
            self._ahead_since = None
            log.info("job %s runs alone", self._alone.flight.id)
            self._command(lambda engine: engine.only(self._alone_execution()))

    def forget(self, flight: AnyFlight) -> bool:
        """Drop a flight that was not launched; False: it was."""
        with self._lock:
            held = self._alone
            if held is not None and held.flight is flight and not self._launched:
                self._end_solitude()
                return True
            for waiting in (self._suspects, self._later):
                for entry in list(waiting):
                    if entry.flight is flight:
                        waiting.remove(entry)
                        return True
        return False

    def landed(self, flight: AnyFlight) -> None:
        """A flight is over."""
        with self._lock:
            self._flights.pop(flight.execution, None)
            self._beside.discard(flight.execution)
            self.forget(flight)
            if self._alone is not None and self._alone.flight is flight:
                self._end_solitude()

    def see(self, events: Iterable[Event]) -> None:
        """Events of the engine: a suspect that goes on past its furthest point is cleared."""
        held = self._alone
        if held is None or not self._launched:
            return
        flight = held.flight
        for event in events:
            if not isinstance(event, Advanced) or event.task_id != flight.execution:
                continue
            if flight.done_before + event.done <= flight.best:
                continue
            now = time.monotonic()
            if self._ahead_since is None:
                self._ahead_since = now
            elif now - self._ahead_since >= CLEAR_S:
                self._ahead_since = now
                self._do(lambda: self._clear(held))
                return

    def excuse(self) -> None:
        """This worker is about to be ended from outside: nobody is to be blamed for that."""
        with self._lock:
            if self._excused:
                return
            self._excused = True
        self._do(lambda: self._note(list(self._flights), InBatch.NO, always=True))

    # The engine's book, on its thread

    def called(self, task_ids: list[str]) -> None:
        """These are to be stepped soon."""

        def call() -> None:
            self._note(task_ids, InBatch.SHARED)
            self._command(lambda engine: engine.admit(task_ids))

        self._do(call)

    def left(self, task_ids: list[str]) -> None:
        """These are not being stepped any more."""
        self._do(lambda: self._note(task_ids, InBatch.NO))

    def alone(self, task_id: str) -> None:
        """Nothing but this is stepped."""
        self._do(lambda: self._launch_alone(task_id))

    # Writing

    def _launch_alone(self, execution: str) -> None:
        self._note([execution], InBatch.ALONE)
        with self._lock:
            if self._alone_execution() != execution:
                return  # it was dropped meanwhile
            held, self._launched = self._alone, True
        assert held is not None
        held.launch()

    def _clear(self, held: Held) -> None:
        self._note([held.flight.execution], InBatch.CLEARED)
        with self._lock:
            if self._alone is held:
                log.info("job %s is not to blame", held.flight.id)
                self._end_solitude()

    def _end_solitude(self) -> None:
        self._alone, self._launched = None, False
        later, self._later = self._later, []
        self._beside.update(held.flight.execution for held in later)
        if not self.single:
            self._command(lambda engine: engine.only(None))
        for held in later:
            self._do(lambda held=held: self._launch_later(held))  # type: ignore[misc]

    def _launch_later(self, held: Held) -> None:
        self._note([held.flight.execution], InBatch.SHARED)
        held.launch()

    def _alone_execution(self) -> str | None:
        return None if self._alone is None else self._alone.flight.execution

    def _note(self, executions: list[str], how: InBatch, *, always: bool = False) -> None:
        """Write it for those that are still in flight; waits for as long as Redis is away."""
        if self._excused and not always:
            return
        while True:
            batch = self._store.batch()
            for execution in executions:
                flight = self._flights.get(execution)
                if flight is not None:
                    batch.in_batch(flight.id, execution, how)
            try:
                batch.send()
                return
            except redis.exceptions.RedisError as error:
                if self.closing.is_set():
                    return
                if not passes(error):
                    raise
                log.warning("Redis cannot serve (%s); who is in the batch is not written", error)
                time.sleep(RETRY_S)

    def _command(self, command: Callable[[Engine], None]) -> None:
        if self.engine is not None:
            with suppress(EngineStopped):
                command(self.engine)

    def _do(self, write: Callable[[], None]) -> None:
        if self._threads:
            self._writes.put(write)
        else:
            write()

    def _loop(self) -> None:
        cores.keep_to_one()
        try:
            while (write := self._writes.get()) is not None:
                write()
        except BaseException as error:
            log.exception("the roster broke down")
            self.failure = error


def _nothing() -> None:
    """Launched already."""
