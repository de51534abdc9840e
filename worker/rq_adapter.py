"""The engine as an RQ worker: many jobs in flight in one process. Every private name of RQ is here.

RQ stays on the main thread: it pops jobs, keeps their executions alive and ends them. The engine
steps on its own thread and the outputs are written on a third. `BaseWorker.work()` is left alone:
`execute_job` becomes a busy period that returns when nothing is in flight.

The order at each end is: first the store, then RQ. A worker that dies in between leaves a job
that RQ starts again elsewhere, where the store says that there is nothing left to do.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import queue as queues
import socket
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import FrameType
from typing import Any

import redis
from rq import worker_registration
from rq.callbacks import execute_stopped_callback
from rq.command import handle_command, parse_payload
from rq.exceptions import DequeueTimeout, InvalidJobOperation
from rq.executions import Execution
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.registry import clean_registries
from rq.serializers import JSONSerializer
from rq.suspension import is_suspended
from rq.timeouts import JobTimeoutException
from rq.utils import as_text, get_version, now
from rq.version import VERSION
from rq.worker import BaseWorker, WorkerStatus

from jobs.store.rq_queue import JOB_FUNCTION
from jobs.store.trouble import passes
from worker.engine.tasks import EngineStopped
from worker.flights import AnyFlight, Ending, Flight, Intent, Outcome
from worker.patience import Patience
from worker.runtime import Runtime

log = logging.getLogger("ddpm.worker")

MONITOR_S = 5  # between two heartbeats of a job
SLACK_S = 15  # a heartbeat may be this late before the job is taken for abandoned
WORKER_TTL_S = 30
MAINTENANCE_S = 10
IDLE_SLICE_S = 1
ROUND_S = 0.02  # between two looks at the queue while busy
POPPED_S = 5  # a job that was popped, and not begun since it was seen so, has been left
POLL_S = 0.5  # between two looks at whether the jobs are still ours
AT_ONCE = 8  # jobs taken a round while the batch is not full, else one
RELEASE_S = 10.0  # for the state of a job to be written at a stop
ENDED = (JobStatus.FINISHED, JobStatus.FAILED, JobStatus.STOPPED, JobStatus.CANCELED)
SOCKET_S = 5  # for an answer, beyond what a blocking call waits by itself
EXIT_HUNG = 75


class RQMismatch(RuntimeError):
    """The installed RQ is not the one that this adapter was written for."""


# What is overridden or called, with its parameters.
_SIGNATURES: dict[Any, str] = {
    BaseWorker.execute_job: "self job queue",
    BaseWorker.dequeue_job_and_maintain_ttl: "self timeout max_idle_time",
    BaseWorker.prepare_execution: "self job",
    BaseWorker.prepare_job_execution: "self job remove_from_intermediate_queue",
    BaseWorker.cleanup_execution: "self job pipeline execution",
    BaseWorker._finalize_success: "self job queue execution return_value",
    BaseWorker._finalize_failure: "self job queue execution exc_info",
    BaseWorker.handle_job_failure: "self job queue started_job_registry exc_string execution",
    BaseWorker.maintain_heartbeats: "self job execution",
    BaseWorker.get_heartbeat_ttl: "self job working_time",
    BaseWorker.heartbeat: "self timeout pipeline",
    BaseWorker.handle_payload: "self message",
    BaseWorker._pubsub_exception_handler: "self exc pubsub pubsub_thread",
    BaseWorker.request_stop: "self signum frame",
    BaseWorker.request_stop_execution: "self execution_id",
    BaseWorker.check_for_suspension: "self burst",
    BaseWorker.clean_registries: "self",
    BaseWorker.run_maintenance_tasks: "self",
    BaseWorker.register_death: "self",
    BaseWorker.teardown: "self",
    BaseWorker.set_state: "self state pipeline",
    Queue.dequeue_any: "queues timeout connection job_class serializer death_penalty_class",
    Queue.enqueue_job: "self job pipeline at_front unique",
    IntermediateQueue.cleanup: "self worker queue",
    IntermediateQueue.should_be_cleaned_up: "self job_id",
    IntermediateQueue.remove: "self job_id",
    Job.cancel: "self pipeline enqueue_dependents remove_from_dependencies",
    clean_registries: "queue exception_handlers",
    worker_registration.clean_worker_registry: "queue",
    execute_stopped_callback: "job death_penalty_class",
    is_suspended: "connection worker",
}
_ATTRIBUTES = ("_stop_requested", "_stopped_job_id", "_shutdown_requested_date", "_ordered_queues")


def check_rq() -> None:
    """Raise RQMismatch, naming what differs, unless RQ has every part as it is used here."""
    if VERSION.split(".")[:2] != ["3", "0"]:
        raise RQMismatch(f"RQ {VERSION} is installed; this worker needs rq>=3.0,<3.1")
    for function, expected in _SIGNATURES.items():
        found = " ".join(inspect.signature(function).parameters)
        if found != expected:
            name = function.__qualname__
            raise RQMismatch(f"RQ's {name} takes ({found}); this worker expects ({expected})")
    source = inspect.getsource(BaseWorker.__init__)
    missing = [name for name in _ATTRIBUTES if f"self.{name}" not in source]
    if missing:
        raise RQMismatch(f"RQ's worker has no {', '.join(missing)}")


@dataclass(eq=False)
class Boarded:
    """RQ's side of a flight. left: RQ has taken the job from us: it is not ours to end.

    unread: held for a while, then put back for a worker of another version.
    """

    job: Job
    queue: Queue
    execution: Execution
    flight: AnyFlight | None = None
    left: bool = False
    unread: bool = False


class Popped(IntermediateQueue):
    """The jobs that were popped and not yet begun. RQ waits a minute before it takes one for
    abandoned; here no live worker is between the two for longer than a moment, and one that was
    frozen there looks again whether its job is to run."""

    def should_be_cleaned_up(self, job_id: str) -> bool:
        """Whether its worker has died, or an answer with it was lost on the way."""
        first_seen = self.get_first_seen(job_id)
        return first_seen is not None and now() - first_seen > timedelta(seconds=POPPED_S)

    def remove(self, job_id: str) -> None:
        """Take it off, and forget when it was seen: it may be popped again."""
        super().remove(job_id)
        self.connection.delete(self.get_first_seen_key(job_id))


class EngineWorker(BaseWorker):
    """One process, one device, many jobs. Listens to one queue."""

    def __init__(self, runtime: Runtime, connection: redis.Redis, *, name: str = "") -> None:
        check_rq()
        super().__init__(
            [runtime.settings.queue],
            # Unique: after kill -9 a worker of the same name could not register for minutes.
            name=name or f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}",
            connection=connection,
            serializer=JSONSerializer,
            worker_ttl=WORKER_TTL_S,
            maintenance_interval=MAINTENANCE_S,
            job_monitoring_interval=MONITOR_S,
            log_job_description=False,
        )
        self.log_result_lifespan = False
        self.runtime = runtime
        self._boarded: dict[str, Boarded] = {}  # by execution
        self._orders: deque[dict[str, Any]] = deque()  # from the pub/sub thread
        self._ends: deque[Outcome] = deque()  # of flights, not yet told to RQ
        self._stop_at: float | None = None
        self._impatient = self._excused = False
        self._released_at: float | None = None
        self._heartbeat_at = self._poll_at = 0.0
        self._suspended = False
        self._patience = Patience()

    # Idle

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[Job, Queue] | None:
        """Wait for a job in short slices, so that a stop and the duties are never far off."""
        idle_since = time.monotonic()
        while not self._stop_requested:
            try:
                self._idle_round()
                if self._is_paused():
                    time.sleep(POLL_S)
                    continue
                self._next()
                return self._dequeue(None if timeout is None else IDLE_SLICE_S)
            except DequeueTimeout:
                if max_idle_time is not None and time.monotonic() - idle_since > max_idle_time:
                    return None
            except redis.exceptions.RedisError as error:
                if not passes(error):
                    raise
                log.warning("Redis cannot serve (%s)", error)
                time.sleep(POLL_S)
        return None

    # RQ's loop ends at an error of any of these three

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """Say that this worker lives, if Redis is there to hear it."""
        with self._patiently():
            super().heartbeat(timeout, pipeline)

    def check_for_suspension(self, burst: bool) -> None:
        """Wait while all workers are suspended."""
        with self._patiently():
            super().check_for_suspension(burst)

    def run_maintenance_tasks(self) -> None:
        """Clean up after dead workers; what cannot be done now is done next time."""
        with self._patiently():
            super().run_maintenance_tasks()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def _patiently(self) -> Iterator[None]:
        try:
            yield
        except redis.exceptions.RedisError as error:
            if not passes(error):
                raise
            log.warning("Redis cannot serve (%s)", error)
            time.sleep(POLL_S)

    @property
    def connection_timeout(self) -> int:
        """Seconds until a dropped connection is noticed."""
        return IDLE_SLICE_S + SOCKET_S

    def _idle_round(self) -> None:
        if self.get_state() != WorkerStatus.IDLE:
            self.set_state(WorkerStatus.IDLE)
        self.heartbeat()
        self.check_for_suspension(burst=False)
        self._maintain()
        self._check_engine()

    def _is_paused(self) -> bool:
        return self.runtime.store.is_paused(self.runtime.settings.queue)

    def _dequeue(self, timeout: int | None) -> tuple[Job, Queue] | None:
        while True:
            try:
                found = self.queue_class.dequeue_any(
                    self._ordered_queues,
                    timeout,
                    connection=self.connection,
                    job_class=self.job_class,
                    serializer=self.serializer,
                    death_penalty_class=self.death_penalty_class,
                )
                break
            except Exception as error:  # RQ names the job that it has popped and cannot read
                if passes(error) or not hasattr(error, "job_id"):
                    raise
                self._drop(str(error.job_id), error)
        if found is None:
            return None
        job, queue = found
        job.redis_server_version = get_version(self.connection)
        return job, queue

    def _drop(self, job_id: str, error: Exception) -> None:
        """Take a job out of RQ that RQ itself cannot read; nobody else could either."""
        log.error("job %s: RQ's own record of it cannot be read: %s", job_id, error)
        self.runtime.store.refuse(job_id, f"RQ cannot read its record of it: {error}")
        for queue in self.queues:
            queue.intermediate_queue.remove(job_id)
        self.connection.delete(Job.key_for(job_id))

    def _maintain(self) -> None:
        if self.runtime.duties(self.name):
            self._stay_registered()
        if self.should_run_maintenance_tasks:
            self.run_maintenance_tasks()

    def _stay_registered(self) -> None:
        """RQ knows this worker again, if Redis came back empty or took it for dead."""
        if not self.connection.sismember(self.redis_workers_keys, self.key):
            log.warning("RQ does not know this worker any more; registering anew")
            self.connection.delete(self.key)
            self.register_birth()  # type: ignore[no-untyped-call]

    def clean_registries(self) -> None:
        """RQ's cleaning, under the one lock that the API's janitor takes too: two at once would
        requeue a job twice."""
        with self.runtime.store.lock("registries") as ours:
            if ours:
                for queue in self.queues:
                    clean_registries(queue, self._exc_handlers)
                    worker_registration.clean_worker_registry(queue)
                    Popped(queue.key, self.connection).cleanup(self, queue)
        self.last_cleaned_at = now()  # type: ignore[assignment]

    # Busy

    def execute_job(self, job: Job, queue: Queue) -> None:
        """A busy period: begins with one job and ends when none is in flight."""
        work: Callable[[], None] = partial(self._board, job, queue)
        while True:
            try:
                work()
            except Exception as error:
                if not passes(error):
                    log.exception("a fault of this worker; handing the jobs on")
                    self._abandon()
                    raise
                if self._stop_at is not None and self._late(self._stop_at, RELEASE_S):
                    log.error("Redis is away (%s) at the end; RQ will hand the jobs on", error)
                    self._boarded.clear()
                log.warning("Redis cannot serve (%s); the jobs in flight go on", error)
                time.sleep(POLL_S)
            if not self._boarded and not self._patience.pausing:
                return
            work = self._busy_round

    def _busy_round(self) -> None:
        self._land_ended()
        self._obey_orders()
        self.runtime.roster.turn()
        if self._late(self._poll_at, POLL_S):
            self._poll_at = time.monotonic()
            self._poll()
        if self._late(self._heartbeat_at, MONITOR_S):
            self._heartbeat_at = time.monotonic()
            for boarded in list(self._boarded.values()):
                self.maintain_heartbeats(boarded.job, boarded.execution)
        self._maintain()
        self._check_engine()
        if self._stop_requested:
            self._drain()
        elif not self._suspended and not self._patience.pausing:
            self._join()

    def _join(self) -> None:
        """Take more jobs; few of them while the batch is full, so that other workers get some."""
        engine = self.runtime.engine
        full = engine.waiting_rows >= engine.options.max_rows
        for _ in range(1 if full else AT_ONCE):
            if self.runtime.roster.busy:
                return
            client = self._next()
            if client is None or not self._has_seat(client):
                return
            found = self._dequeue(None)
            if found is None:  # another worker was quicker
                return
            self._board(*found)

    def _next(self) -> str | None:
        """Whose turn it is among those that wait; None: nobody waits."""
        return self.runtime.store.next_turn(self.runtime.settings.queue)

    def _has_seat(self, client: str) -> bool:
        """Whether a job of this client can come aboard: even if one with many has filled it up."""
        capacity = self.runtime.engine.options.capacity
        aboard = [boarded for boarded in self._boarded.values() if not boarded.unread]
        if len(aboard) < capacity:
            return True
        flights = [boarded.flight for boarded in aboard]
        known = any(flight is not None and flight.record.client == client for flight in flights)
        return not known and len(aboard) < 2 * capacity

    def _board(self, job: Job, queue: Queue) -> None:
        if not self._is_to_run(job, queue):
            queue.intermediate_queue.remove(job.id)
            return
        boarded = Boarded(job, queue, self.prepare_execution(job))
        try:
            job_id = _job_id(job)
        except Exception as error:  # not one of ours, or of another serializer
            queue.intermediate_queue.remove(job.id)
            self._fail(boarded, error)
            return
        self.prepare_job_execution(job, True)
        self._boarded[boarded.execution.id] = boarded
        self._begin(boarded, job_id)

    def _begin(self, boarded: Boarded, job_id: str) -> None:
        """Start the flight, or end it at once; while its model loads, neither."""
        try:
            begun = self.runtime.begin(job_id, boarded.execution.id, self.name)
        except EngineStopped:  # the next look at the engine gives every job back
            return
        if isinstance(begun, Flight):
            boarded.flight = begun
        elif begun is Ending.UNREAD:
            boarded.unread = True
            self._patience.hold()
        elif begun is not None:
            self._land(boarded, Outcome(job_id, boarded.execution.id, begun))

    def _unread(self) -> list[Boarded]:
        return [b for b in self._boarded.values() if b.unread]

    def _put_back(self) -> None:
        """Leave what cannot be read here to other workers, when its time has come."""
        unread = self._unread()
        if self._patience.over(len(unread)):
            for boarded, ours in zip(unread, self._ours(unread), strict=True):
                if ours:
                    self._requeue(boarded, at_front=False)
                self._boarded.pop(boarded.execution.id, None)

    def _is_to_run(self, job: Job, queue: Queue) -> bool:
        """Whether a popped job is waiting; two cleaners may have put it into the queue twice."""
        for boarded in list(self._boarded.values()):
            if boarded.job.id == job.id:
                if self._ours([boarded])[0]:
                    return False
                self._leave(boarded)  # we were thought dead: this is a new start
        status = job.get_status(refresh=False)
        return status not in ENDED and not (
            status == JobStatus.STARTED and job.id in queue.started_job_registry
        )

    def _land_ended(self) -> None:
        """End, with RQ, the jobs that have ended; waits a moment for the first."""
        with contextlib.suppress(queues.Empty):
            self._ends.append(self.runtime.outcomes.get(timeout=ROUND_S))
            while True:
                self._ends.append(self.runtime.outcomes.get_nowait())
        while self._ends:
            outcome = self._ends[0]
            self.runtime.landed(outcome)
            boarded = self._boarded.get(outcome.execution)
            if boarded is not None:
                self._land(boarded, outcome)
            self._ends.popleft()  # only now: if Redis could not serve, this comes again

    def _land(self, boarded: Boarded, outcome: Outcome) -> None:
        job, queue, execution = boarded.job, boarded.queue, boarded.execution
        if boarded.left or not self._ours([boarded])[0]:
            self._clean_up(boarded)
        elif outcome.ending is Ending.SUCCEEDED:
            self._finalize_success(job, queue, execution, None)
        elif outcome.ending is Ending.FAILED:
            self._fail(boarded, outcome.error or RuntimeError("see the job's record"))
        elif outcome.ending is Ending.CANCELED:
            self._clean_up(boarded)
            with contextlib.suppress(InvalidJobOperation):  # canceled in RQ as well
                job.cancel()
        elif outcome.ending is Ending.STOPPED:
            self._stop_job(boarded)
        elif outcome.ending is Ending.RELEASED:
            self.runtime.store.requeue(outcome.job_id, execution.id)
            self._requeue(boarded)
        else:  # RQ thinks it ours, and the store does not: nobody else will end it
            self._fail(boarded, RuntimeError("the job is gone from the store, or ended there"))
        self._boarded.pop(execution.id, None)

    def _fail(self, boarded: Boarded, error: BaseException) -> None:
        """The job's own error is final: only a lost worker is a reason to try again."""
        job = boarded.job
        job.retries_left = 0
        if isinstance(error, TimeoutError):
            error = JobTimeoutException(str(error))
        info = (type(error), error, error.__traceback__)
        self._finalize_failure(job, boarded.queue, boarded.execution, info)

    def _stop_job(self, boarded: Boarded) -> None:
        """RQ's way to end a job that its stop command ended."""
        job = boarded.job
        self._stopped_job_id = job.id
        job.ended_at = now()
        try:
            execute_stopped_callback(job, self.death_penalty_class)
        except Exception:
            log.exception("the stopped callback of job %s raised", job.id)
        self.handle_job_failure(
            job, boarded.queue, exc_string="Job stopped by user.", execution=boarded.execution
        )

    def _requeue(self, boarded: Boarded, *, at_front: bool = True) -> None:
        job = boarded.job
        job.worker_name = None
        job.started_at = None
        with self.connection.pipeline() as pipeline:
            # First: it may read, and a pipeline that holds a command no longer can.
            boarded.queue.enqueue_job(job, pipeline=pipeline, at_front=at_front)
            self.cleanup_execution(job, pipeline, boarded.execution)
            pipeline.execute()

    def _clean_up(self, boarded: Boarded) -> None:
        with self.connection.pipeline() as pipeline:
            self.cleanup_execution(boarded.job, pipeline, boarded.execution)
            pipeline.execute()

    # Whose job it is

    def _ours(self, boarded: list[Boarded]) -> list[bool]:
        return [status == JobStatus.STARTED for status in self._statuses(boarded)]

    def _statuses(self, boarded: list[Boarded]) -> list[str | None]:
        """RQ's status of each job; None where it has gone to another worker, or altogether."""
        with self.connection.pipeline(transaction=False) as pipeline:
            for b in boarded:
                pipeline.hmget(b.job.key, "status", "worker_name")
                pipeline.zscore(b.queue.started_job_registry.key, b.execution.composite_key)
            replies = pipeline.execute()
        statuses: list[str | None] = []
        for (status, worker), score in zip(replies[::2], replies[1::2], strict=True):
            text = None if status is None else str(as_text(status))
            held = worker is not None and as_text(worker) == self.name and score is not None
            statuses.append(text if held or text == JobStatus.CANCELED else None)
        return statuses

    def _poll(self) -> None:
        """RQ sends no word when a job is canceled, deleted or taken over: look."""
        self._suspended = self._is_paused() or bool(is_suspended(self.connection, self))
        boarded = [b for b in self._boarded.values() if not b.left]
        for b, status in zip(boarded, self._statuses(boarded), strict=True):
            if status == JobStatus.CANCELED:
                b.left = True
                self._end(b, Intent.CANCEL)
            elif status != JobStatus.STARTED:
                self._leave(b)
            elif b.unread:
                continue
            elif b.flight is None:
                self._begin(b, _job_id(b.job))
            elif time.monotonic() > b.flight.deadline:
                self._end(b, Intent.TIME_OUT)
        self._put_back()
        self.runtime.look_for_cancels()

    def _leave(self, boarded: Boarded) -> None:
        boarded.left = True
        self._end(boarded, Intent.LOSE)

    def _end(self, boarded: Boarded, intent: Intent) -> None:
        if boarded.flight is not None:
            self.runtime.end(boarded.flight, intent)
            return
        self._boarded.pop(boarded.execution.id, None)  # its model still loads: nothing runs
        if intent is Intent.RELEASE:
            self._requeue(boarded)
        elif intent is Intent.STOP:
            self._stop_job(boarded)
        else:
            self._clean_up(boarded)

    # Orders from RQ and from the system

    def handle_payload(self, message: Any) -> None:
        """On the pub/sub thread: only note what is to be stopped."""
        payload = parse_payload(message)
        if payload.get("command") in ("stop-job", "stop-execution"):
            self._orders.append(payload)
        else:
            handle_command(self, payload)

    def _pubsub_exception_handler(self, exc: Exception, pubsub: Any, pubsub_thread: Any) -> None:
        """Hear RQ again after any absence of Redis: stock RQ goes deaf at a time-out."""
        if not passes(exc):
            raise exc
        log.warning("Redis cannot serve (%s); subscribing again", exc)
        time.sleep(POLL_S)

    def request_stop_execution(self, execution_id: str) -> None:
        """On the pub/sub thread: only note it."""
        self._orders.append({"execution_id": execution_id})

    def _obey_orders(self) -> None:
        while self._orders:
            order = self._orders.popleft()
            wanted = {order.get("job_id"), order.get("execution_id")} - {None}
            for b in list(self._boarded.values()):
                if b.execution.id in wanted or ("execution_id" not in order and b.job.id in wanted):
                    self._end(b, Intent.STOP)

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """SIGTERM, SIGINT: stop taking jobs. A second one, later than a moment: do not drain."""
        if self._stop_at is None:
            self._stop_at = time.monotonic()
            self._shutdown_requested_date = now()
            self._stop_requested = True
        elif self._late(self._stop_at, 1.0):
            self._impatient = True

    def _drain(self) -> None:
        """Let short work end; then give the rest back to the front of the queue, with its state."""
        assert self._stop_at is not None
        if not self._excused:
            self.runtime.excuse(self.name)
            self._excused = True
        if self._released_at is None:
            if not self._impatient and not self._late(self._stop_at, self.runtime.settings.drain_s):
                return
            self._released_at = time.monotonic()
            log.info("giving %d jobs back to the queue", len(self._boarded))
            for boarded in list(self._boarded.values()):
                self._end(boarded, Intent.RELEASE)
        elif self._late(self._released_at, RELEASE_S):
            self._abandon()

    def _check_engine(self) -> None:
        """A device that hangs or is lost takes no job down with it."""
        began = self.runtime.engine.tick_began
        limit = self.runtime.settings.stall_limit_s
        if began is not None and self._late(began, limit):
            log.critical("no step for %.0f s: the device hangs; handing the jobs on", limit)
            self._abandon()
            self.register_death()  # type: ignore[no-untyped-call]
            os._exit(EXIT_HUNG)  # a thread that hangs in the driver cannot be joined
        failure = self.runtime.failure
        if failure is not None:
            log.critical("the worker broke down (%s); handing the jobs on", failure)
            self._abandon()
            raise SystemExit(1)

    def _abandon(self) -> None:
        """Requeue everything as its last checkpoint left it. To the store that is a death: those in
        the batch are suspects, so that a job that breaks workers does not do so for ever."""
        for boarded in list(self._boarded.values()):
            if not boarded.left and self._ours([boarded])[0]:
                self._requeue(boarded)
            self._boarded.pop(boarded.execution.id, None)

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        """How long a job counts as alive without a word of its worker."""
        return MONITOR_S + SLACK_S

    def teardown(self) -> None:
        """Say goodbye, if Redis is there to hear it."""
        try:
            super().teardown()  # type: ignore[no-untyped-call]
            self.runtime.store.goodbye(self.name)
        except redis.exceptions.RedisError as error:
            log.warning("Redis cannot serve (%s); this worker's record will lapse", error)

    @staticmethod
    def _late(since: float, seconds: float) -> bool:
        return time.monotonic() - since > seconds


def _job_id(job: Job) -> str:
    """The argument of our job function. Raises TypeError for any other job."""
    if job.func_name != JOB_FUNCTION or len(job.args) != 1:
        raise TypeError(f"this queue takes {JOB_FUNCTION}(job_id), not {job.get_call_string()}")
    return str(job.args[0])
