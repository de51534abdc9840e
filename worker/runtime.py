"""A worker without its queue: models, engine and outputs, put together.

The RQ adapter begins jobs here and hears how they end; `worker.run.run_job` does the same for a
single job on a stock RQ worker. Nothing here knows of RQ.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from diffusion import cores
from jobs.observed import Batches
from jobs.settings import Settings
from jobs.store.batch import InBatch
from jobs.store.records import JobRecord
from jobs.store.started import Started
from jobs.store.trouble import passes
from jobs.store.workers import WorkerInfo
from jobs.store.writer import JobStore
from worker.engine.lane import EngineOptions
from worker.engine.loop import Engine
from worker.engine.tasks import Canceled, EngineError, EngineStopped, Event, Failed, Finished
from worker.flights import AnyFlight, Ending, Intent, Outcome
from worker.joblog import log_job
from worker.loader import Loader
from worker.models import ModelFolder
from worker.network.compiling import Compiler
from worker.outputs import Outputs, OutputsThread
from worker.roster import Roster
from worker.starting import Starter

log = logging.getLogger("ddpm.worker")
DUTIES_S = 3.0  # between two looks at the model folder
SLOTS_A_ROW = 4  # slots for samples set aside, besides those of one batch
THREADS_BESIDE = 2  # for jobs that are not the engine's work
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


class Runtime:
    """Runs jobs of the store.

    threads: run the engine and the outputs on threads of their own; else `run_to_end` runs them
    on the caller's. outcomes: the end of each flight that `begin` returned, once.
    """

    def __init__(
        self, settings: Settings, store: JobStore, folder: ModelFolder, *, threads: bool = True
    ) -> None:
        self.settings = settings
        self.store = store
        self.folder = folder
        # Not a SimpleQueue: its get() never ends if a signal is heard past the end of its timeout.
        self.outcomes: queue.Queue[Outcome] = queue.Queue()
        self.flights: dict[str, AnyFlight] = {}  # by execution
        self.outputs = Outputs(store, cancel=self._cancel_task, outcome=self.outcomes.put)
        self._writer = OutputsThread(self.outputs) if threads else None
        options = EngineOptions(
            capacity=SLOTS_A_ROW * max(settings.slots, 8),
            max_rows=max(settings.slots, 8),
            dtype=DTYPES[settings.dtype],
            checkpoint_every=settings.checkpoint_s,
        )
        self.roster = Roster(store, threads=threads, single=not threads)
        self.engine = Engine(self._tell, options, book=self.roster)
        self.roster.engine = self.engine
        self._compiler = Compiler(
            self.engine.networks,
            settings.cache_dir.expanduser() / "compiled",
            enabled=settings.compile and threads,
        )
        self._beside = ThreadPoolExecutor(THREADS_BESIDE, "beside", initializer=cores.keep_to_one)
        self._beside_failure: BaseException | None = None
        self._threads = threads
        self._loader = Loader(self)
        self._starter = Starter(self)
        self._duties_at = 0.0
        # A heartbeat makes known what is served; held so that it is not what was just retired.
        self._telling = threading.Lock()
        self._gone: set[str] = set()  # models that are no longer served, but still known
        self._kept: set[str] | None = None  # digests of what the engine was told to keep
        self._made_at = time.monotonic()
        self._saw_all = False  # all of a folder that holds models
        self._looked_for_strangers = False

    def start(self) -> None:
        """Load a model and start the threads, one of which loads all others."""
        if self._writer is None:
            self.rescan()
            return
        self.rescan(only_first=True)
        self._writer.start()
        self.roster.start()
        self.engine.start()
        self._loader.scan()

    def close(self) -> None:
        """Stop; what is in flight stays as its last checkpoint left it."""
        self.outputs.closing.set()
        self._compiler.close()
        self._loader.close()
        self._beside.shutdown(wait=False, cancel_futures=True)
        self.engine.stop()
        self.roster.stop()
        if self._writer is not None:
            self._writer.stop()

    @property
    def failure(self) -> BaseException | None:
        """What broke the engine or the outputs down, if anything did."""
        writing = self._writer.failure if self._writer else None
        return self.engine.failure or self.roster.failure or writing or self._beside_failure

    def _tell(self, events: list[Event]) -> None:
        """Hand on what the engine says."""
        if self._writer is not None:
            self._writer.put(events)
        else:
            self.outputs.handle(events)
        self.roster.see(events)

    # Models

    def rescan(self, *, only_first: bool = False) -> None:
        """Look at the model folder, and publish what changed; takes as long as loading does.

        only_first: see `ModelFolder.rescan`.
        """
        changes = self.folder.rescan(
            prepare=lambda served: self.engine.networks.prepare(served.model),
            publish=lambda served: self.store.publish_card(served.card),
            only_first=only_first,
        )
        for name in changes.gone:
            log.info("model %s is gone", name)
        self._gone.update(changes.gone)
        self._gone.difference_update(self.folder.served)
        for name in sorted(self._gone):
            with self._telling:
                self.store.retire_card(name)
            self._gone.remove(name)  # only now: if Redis could not serve, it is retired next time
        if only_first:
            return
        self._saw_all = self._saw_all or bool(self.folder.served)
        digests = {served.model.digest for served in self.folder.served.values()}
        if digests != self._kept:
            self.engine.keep_only(digests)
            self._kept = digests

    def duties(self, worker: str) -> bool:
        """What is due every few seconds, busy or not: rescan, and say that this worker lives and
        what it serves. False: it was not due.

        Returns at once: a heartbeat must not wait for a model that loads.
        """
        if time.monotonic() < self._duties_at:
            return False
        self._duties_at = time.monotonic() + DUTIES_S
        self._loader.scan()
        self._retire_strangers()
        self._compiler.poll(self.folder.served.values(), busy=bool(self.flights))
        with self._telling:
            served = self.folder.served
            by_digest = self.engine.rates()
            leaves = self._compiler.leaves
            rates = {
                name: by_digest.get(s.model.digest, 0.0) * leaves for name, s in served.items()
            }
            info = WorkerInfo(
                name=worker,
                queue=self.settings.queue,
                models=tuple(served),
                device=next((s.model.device.type for s in served.values()), "cpu"),
                active=sum(flight.record.images for flight in list(self.flights.values())),
            )
            cards = [s.card for s in served.values()]
            rates = {name: rate for name, rate in rates.items() if rate}
            self.store.heartbeat(info, rates, cards=cards, slots=self.engine.options.max_rows)
        self._tell_batches()
        return True

    def _tell_batches(self) -> None:
        names = {served.model.digest: name for name, served in self.folder.served.items()}
        batches = Batches()
        for (digest, rows), steps in self.engine.stepped().items():
            if digest in names:
                batches.add(names[digest], rows, steps)
        if batches.counts:
            self.store.tell_batches(batches)

    def _retire_strangers(self) -> None:
        """Once: models that were taken away while no worker looked are unknown from now on; but an
        empty folder may be one that is mounted late."""
        late = time.monotonic() - self._made_at > self.settings.model_wait_s
        if not self._looked_for_strangers and (self._saw_all or late):
            self.store.retire_strangers(self.settings.queue, self.folder.served)
            self._looked_for_strangers = True

    # Jobs

    def begin(self, job_id: str, execution: str, worker: str) -> AnyFlight | Ending | None:
        """Start a job, or say how it stands already: see `Starter.begin`."""
        begun = self._starter.begin(job_id, execution, worker)
        if begun is not None:
            self.forget(job_id)
        return begun

    def forget(self, job_id: str) -> None:
        """A job that could not be begun yet is not asked for again."""
        self._loader.forget(job_id)

    def is_ready(self, record: JobRecord) -> bool:
        """Whether a job need not wait for its model: see `Loader.is_ready`; without threads none is
        loaded beside the work."""
        return not self._threads or self._loader.is_ready(record)

    def fly(self, flight: AnyFlight, started: Started) -> None:
        """Launch a flight; a suspect once it can be alone."""
        self._register(flight)
        if started.crashes and not self.roster.single:
            self.roster.isolate(flight, lambda: self._launch_suspect(flight))
            return
        try:
            self._launch(flight, held=started.in_batch is InBatch.NO)
        except Exception:
            self._strike(flight)
            raise

    def _launch(self, flight: AnyFlight, *, held: bool) -> None:
        task = flight.task()
        if task is not None:
            self.engine.submit(task, held=held)
        else:
            beside = self._beside
            self.roster.beside(flight, lambda: beside.submit(self._run_beside, flight))

    def _launch_suspect(self, flight: AnyFlight) -> None:
        """Once it is alone; on the roster's thread."""
        try:
            self._launch(flight, held=False)
        except EngineStopped:
            raise
        except Exception as error:  # one job must not end the worker
            log.exception("job %s cannot be started", flight.id)
            self._tell([Failed(flight.execution, error)])
        if flight.intent is not Intent.RUN:  # a cancel may have come before the task
            self._cancel_task(flight.execution)

    def _register(self, flight: AnyFlight) -> None:
        self.flights[flight.execution] = flight
        self.roster.add(flight)
        self.outputs.add(flight)

    def landed(self, outcome: Outcome) -> AnyFlight | None:
        """Take the flight of an outcome off the list."""
        flight = self.flights.pop(outcome.execution, None)
        if flight is not None:
            self.roster.landed(flight)
            seconds = time.monotonic() - flight.began
            log_job(flight.record, str(outcome.ending.value), seconds, outcome.error)
        return flight

    def _strike(self, flight: AnyFlight) -> None:
        """Take a flight that was never launched off all lists."""
        self.flights.pop(flight.execution, None)
        self.roster.landed(flight)
        self.outputs.remove(flight)

    def end(self, flight: AnyFlight, intent: Intent) -> None:
        """Ask a flight to end; it is answered by an outcome."""
        if flight.intent in (Intent.RUN, intent) or intent is Intent.LOSE:
            flight.intent = intent
            if intent is Intent.LOSE:
                self.outputs.drop(flight)
            if self.roster.forget(flight):
                self._tell([Canceled(flight.execution, None)])
            else:
                self._cancel_task(flight.execution)

    def excuse(self, worker: str) -> None:
        """This worker is being ended from outside: should it be killed, no job is to blame."""
        self.roster.excuse()
        self.store.excuse(worker)

    def look_for_cancels(self) -> None:
        """End the flights that users have canceled, where no write has said so yet."""
        by_id = {flight.id: flight for flight in list(self.flights.values())}
        for job_id in self.store.cancel_requested(by_id):
            if by_id[job_id].intent is Intent.RUN:
                self.end(by_id[job_id], Intent.CANCEL)

    def run_to_end(self, flight: AnyFlight) -> Outcome:
        """Run one flight on this thread (without `start`). Raises what breaks its work down."""
        while self.outcomes.empty():
            if self.failure is not None:
                raise self.failure
            if time.monotonic() > flight.deadline:
                self.end(flight, Intent.TIME_OUT)
            if not self.engine.tick():
                time.sleep(0.01)  # a noise job runs on a thread of its own
        outcome = self.outcomes.get()
        self.landed(outcome)
        return outcome

    def _cancel_task(self, execution: str) -> None:
        try:
            self.engine.cancel(execution)
        except EngineError:
            log.debug("the engine has stopped; %s needs no cancel", execution)

    def _run_beside(self, flight: AnyFlight) -> None:
        """Do the work of a flight that gives the engine nothing to do."""
        try:
            self._work_beside(flight)
        except BaseException as error:  # not even its end can be written
            log.exception("job %s could not be written", flight.id)
            self._beside_failure = error

    def _work_beside(self, flight: AnyFlight) -> None:
        try:
            flight.run(self.outputs.handle, lambda: _goes_on(flight))
            ran = flight.intent is Intent.RUN
            end = Finished(flight.execution) if ran else Canceled(flight.execution, None)
            self.outputs.handle([end])
        except Exception as error:
            if passes(error):  # Redis is away, and this worker ends: the job goes on elsewhere
                return
            log.exception("job %s failed", flight.id)
            self.outputs.handle([Failed(flight.execution, error)])


def _goes_on(flight: AnyFlight) -> bool:
    if flight.intent is Intent.RUN and time.monotonic() > flight.deadline:
        flight.intent = Intent.TIME_OUT
    return flight.intent is Intent.RUN
