"""A worker without its queue: models, engine and outputs, put together.

The RQ adapter begins jobs here and hears how they end; `worker.run.run_job` does the same for a
single job on a stock RQ worker. Nothing here knows of RQ.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import redis
import torch

from diffusion import cores
from jobs import logs
from jobs.kinds.stored import Unread
from jobs.observed import Batches
from jobs.settings import Settings
from jobs.states import ACTIVE, Status
from jobs.store.batch import InBatch
from jobs.store.records import JobRecord
from jobs.store.tolerance import is_data_fault, tell_once
from jobs.store.writer import MAX_LONE_CRASHES, JobStore, Started, WorkerInfo
from worker.engine.lane import EngineOptions
from worker.engine.loop import Engine
from worker.engine.tasks import Canceled, EngineError, EngineStopped, Event, Failed, Finished
from worker.flights import AnyFlight, Ending, Intent, Outcome
from worker.kinds.table import FLIGHTS
from worker.loader import Loader
from worker.models import ModelFolder, Served
from worker.network.compiling import Compiler
from worker.outputs import Outputs, OutputsThread
from worker.provenance import provenance
from worker.roster import Roster

log = logging.getLogger("ddpm.worker")
DUTIES_S = 3.0  # between two looks at the model folder
SLOTS_A_ROW = 4  # slots for samples set aside, besides those of one batch
THREADS_BESIDE = 2  # for jobs that are not the engine's work
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
_ENDINGS = {
    Status.SUCCEEDED: Ending.SUCCEEDED,
    Status.EXPIRED: Ending.SUCCEEDED,
    Status.FAILED: Ending.FAILED,
    Status.CANCELED: Ending.CANCELED,
}


class JobRefused(Exception):
    """A job that cannot be run here, with a code for its record."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


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
        self.outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
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
        self._threads = threads
        self._loader = Loader(self)
        self._duties_at = 0.0
        # A heartbeat makes known what is served; held so that it is not what was just retired.
        self._telling = threading.Lock()
        self._made_at = time.monotonic()
        self._looked_for_strangers = False

    def start(self) -> None:
        """Load the models and start the threads."""
        self.rescan()
        if self._writer is not None:
            self._writer.start()
            self.roster.start()
            self.engine.start()

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
        return self.engine.failure or self.roster.failure or writing

    def _tell(self, events: list[Event]) -> None:
        """Hand on what the engine says."""
        if self._writer is not None:
            self._writer.put(events)
        else:
            self.outputs.handle(events)
        self.roster.see(events)

    # Models

    def rescan(self) -> None:
        """Look at the model folder, and publish what changed; takes as long as loading does."""
        changes = self.folder.rescan(
            prepare=lambda served: self.engine.networks.prepare(served.model),
            publish=lambda served: self.store.publish_card(served.card),
        )
        for name in changes.gone:
            log.info("model %s is gone", name)
            with self._telling:
                self.store.retire_card(name)
        if changes.loaded or changes.gone:
            digests = {served.model.digest for served in self.folder.served.values()}
            self.engine.keep_only(digests)

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
        self._compiler.poll(self.folder.served.values())
        with self._telling:
            served = self.folder.served
            by_digest = self.engine.rates()
            rates = {name: by_digest.get(s.model.digest, 0.0) for name, s in served.items()}
            info = WorkerInfo(
                name=worker,
                queue=self.settings.queue,
                models=tuple(served),
                device=next((s.model.device.type for s in served.values()), "cpu"),
                active=sum(flight.record.images for flight in list(self.flights.values())),
            )
            cards = [s.card for s in served.values()]
            self.store.heartbeat(info, {name: r for name, r in rates.items() if r}, cards=cards)
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
        if not self._looked_for_strangers and (self.folder.served or late):
            self.store.retire_strangers(self.settings.queue, self.folder.served)
            self._looked_for_strangers = True

    # Jobs

    def begin(self, job_id: str, execution: str, worker: str) -> AnyFlight | Ending | None:
        """Start a job, or say how it stands already where there is nothing to run.

        None: its model is being loaded; ask again soon (only with threads). One job must not end
        the worker, whatever its record holds.
        """
        record = self.store.record(job_id)
        if record is not None and _is_unread(record):
            return self._unread(record)
        try:
            return self._begin(record, job_id, execution, worker)
        except redis.exceptions.ResponseError as error:
            if not is_data_fault(error):
                raise
            self.store.refuse(job_id, str(error))
            return Ending.FAILED

    def _unread(self, record: JobRecord) -> Ending:
        """What becomes of a job that cannot be read here: another version's is for another."""
        unread = record.unread
        assert unread is not None
        if record.cancel_requested:
            self.store.finish(record.id, "", Status.CANCELED)
            return Ending.CANCELED
        if unread.newer:
            tell_once(f"the record of job {record.id}", f"{unread.why}; left for a newer worker")
            return Ending.UNREAD
        self.store.refuse(record.id, unread.why)
        return Ending.FAILED

    def _begin(
        self, record: JobRecord | None, job_id: str, execution: str, worker: str
    ) -> AnyFlight | Ending | None:
        if record is not None and self._threads and not self._loader.is_ready(record):
            return None
        served = None if record is None else self.folder.served.get(record.model)
        if record is not None and served is not None and record.status in ACTIVE:
            beyond = record.spec.beyond(served.card)
            record = record if beyond is None else replace(record, unread=Unread(True, beyond))
            if record.unread is not None:
                return self._unread(record)
        try:
            made = None if record is None or served is None else self._provenance(record, served)
            started = self.store.start(
                job_id,
                execution,
                worker=worker,
                digest="" if served is None else served.model.digest,
                provenance=made,
                in_batch=self.roster.at_start(room=record is not None and self._has_room(record)),
            )
            if started is None or record is None:
                now = self.store.record(job_id)
                return Ending.LOST if now is None else _ENDINGS.get(now.status, Ending.LOST)
            return self._fly(started, execution, served)
        except redis.exceptions.RedisError:
            raise
        except JobRefused as error:
            self.store.fail(job_id, execution, code=error.code, detail=str(error))
            if record is not None:
                log_job(record, "failed", 0.0, error)
        except EngineStopped:
            raise
        except Exception as error:  # one job must not end the worker
            log.exception("job %s cannot be started", job_id)
            self.store.fail(job_id, execution, code="worker_error", detail=str(error))
        return Ending.FAILED

    def _provenance(self, record: JobRecord, served: Served) -> dict[str, Any]:
        spec, network = record.spec, None
        if spec.runs_network:
            mode = FLIGHTS[spec.kind].mode(spec)
            with contextlib.suppress(Exception):  # to submit the job then says why it cannot be
                network = self.engine.networks.prepare(
                    served.model, exact=spec.deterministic, mode=mode
                )
        return provenance(served, spec, network)

    def _has_room(self, record: JobRecord) -> bool:
        """Whether a job would be stepped at once."""
        if not record.spec.runs_network:  # beside the engine
            return True
        rows = self.engine.options.max_rows
        images = sum(flight.record.images for flight in list(self.flights.values()))
        return self.engine.waiting_rows < rows and images < rows

    def _fly(self, started: Started, execution: str, served: Served | None) -> AnyFlight:
        record = started.record
        flight = FLIGHTS[record.spec.kind](
            started,
            execution,
            _runnable(started, served),
            spec=record.spec,
            deadline=time.monotonic() + self._seconds_for(record),
        )
        self._register(flight)
        if started.crashes and not self.roster.single:
            self.roster.isolate(flight, lambda: self._launch_suspect(flight))
            return flight
        try:
            self._launch(flight, held=started.in_batch is InBatch.NO)
        except Exception:
            self._strike(flight)
            raise
        return flight

    def _seconds_for(self, record: JobRecord) -> float:
        limit = self.settings.job_deadline_s
        if record.deadline is None:
            return limit
        left = record.deadline - time.time()
        if left <= 0:
            raise JobRefused(record.late.code, record.late.detail)
        return min(limit, left)

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
        """Run one flight on this thread (without `start`)."""
        while self.outcomes.empty():
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
            flight.run(self.outputs.handle, lambda: _goes_on(flight))
            ran = flight.intent is Intent.RUN
            end = Finished(flight.execution) if ran else Canceled(flight.execution, None)
            self.outputs.handle([end])
        except redis.exceptions.RedisError:
            log.exception("job %s could not be written", flight.id)
        except Exception as error:
            log.exception("job %s failed", flight.id)
            self.outputs.handle([Failed(flight.execution, error)])


def log_job(record: JobRecord, ending: str, seconds: float, error: BaseException | None) -> None:
    """One line a flight: what it was, how it ended, and how long it took here."""
    fields = {
        "job_id": record.id,
        "request_id": record.request_id or None,
        "kind": record.spec.kind,
        "model": record.model,
        "ending": ending,
        "images": record.images,
        "image_steps": record.work,
        "wait_s": round((record.started_at or record.created_at) - record.created_at, 4),
        "run_s": round(seconds, 4),
        "error": None if error is None else f"{type(error).__name__}: {error}"[:500],
    }
    logs.JOBS.info("job %s %s", record.id, ending, extra={"fields": fields})


def _goes_on(flight: AnyFlight) -> bool:
    if flight.intent is Intent.RUN and time.monotonic() > flight.deadline:
        flight.intent = Intent.TIME_OUT
    return flight.intent is Intent.RUN


def _is_unread(record: JobRecord) -> bool:
    """Whether a job has to be told of; one that has ended well, with another version, has not."""
    unread = record.unread
    return unread is not None and (record.status in ACTIVE or not unread.newer)


def _runnable(started: Started, served: Served | None) -> Served:
    """The model, or JobRefused with the reason why the job cannot run."""
    record: JobRecord = started.record
    if started.lone_crashes >= MAX_LONE_CRASHES:
        raise JobRefused(
            "gave_up", f"{started.lone_crashes} workers died while they ran this job and no other"
        )
    if served is None:
        raise JobRefused("model_unavailable", f"no model {record.model} in this worker's folder")
    pinned = record.spec.model_digest
    if pinned is not None and pinned != served.model.digest:
        digest = served.model.digest
        raise JobRefused("model_changed", f"model {record.model} is {digest} now, not {pinned}")
    if served.model.shape != record.shape:
        shape = served.model.shape
        raise JobRefused("model_changed", f"model {record.model} makes images of shape {shape} now")
    return served
