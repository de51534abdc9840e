"""The engine as an RQ worker: many jobs in flight in one process.

RQ stays on the main thread: it pops jobs, keeps their executions alive and ends them. The engine
steps on its own thread and the outputs are written on a third. `BaseWorker.work()` is left alone:
`execute_job` becomes a busy period that returns when nothing is in flight.

The order at each end is: first the store, then RQ. A worker that dies in between leaves a job
that RQ starts again elsewhere, where the store says that there is nothing left to do.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue as queues
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import redis
from rq.command import handle_command, parse_payload
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.utils import now

from jobs.states import ACTIVE
from jobs.store.rq_queue import Queues
from jobs.store.trouble import passes
from worker.engine.tasks import EngineStopped
from worker.flights import Ending, Flight, Intent, Outcome
from worker.patience import Patience
from worker.rq.holding import Boarded, HoldingWorker, job_id_of
from worker.rq.waiting import POLL_S
from worker.runtime import Runtime

log = logging.getLogger("ddpm.worker")

ROUND_S = 0.02  # between two looks at the queue while busy
AT_ONCE = 8  # jobs taken a round while the batch is not full, else one
RELEASE_S = 10.0  # for the state of a job to be written at a stop
ENDED = (JobStatus.FINISHED, JobStatus.FAILED, JobStatus.STOPPED, JobStatus.CANCELED)
EXIT_HUNG = 75


class EngineWorker(HoldingWorker):
    """One process, one device, many jobs. Listens to one queue."""

    def __init__(self, runtime: Runtime, connection: redis.Redis, *, name: str = "") -> None:
        super().__init__(runtime, connection, name=name)
        self._boarded: dict[str, Boarded] = {}  # by execution
        self._queues = Queues(connection)
        self._orders: deque[dict[str, Any]] = deque()  # from the pub/sub thread
        self._ends: deque[Outcome] = deque()  # of flights, not yet told to RQ
        self._stop_at: float | None = None
        self._drain_until = math.inf  # then what still runs at a stop is given back
        self._excused = False
        self._released_at: float | None = None
        self._heartbeat_at = self._poll_at = 0.0
        self._suspended = False
        self._patience = Patience()

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
                if self._late(self._released_at or self._drain_until, RELEASE_S):
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
        if self._late(self._heartbeat_at, self.job_monitoring_interval):
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
        boarded = Boarded(job, queue, self._take(job, queue))
        try:
            job_id = job_id_of(job)
        except Exception as error:  # not one of ours, or of another serializer
            self._fail(boarded, error)
            return
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
            self.runtime.store.returned(outcome.job_id, execution.id, worker=self.name)
            self._clean_up(boarded)
        elif outcome.ending is Ending.SUCCEEDED:
            self._finalize_success(job, queue, execution, None)
        elif outcome.ending is Ending.FAILED:
            self._fail(boarded, outcome.error or RuntimeError("see the job's record"))
        elif outcome.ending is Ending.CANCELED:
            self._clean_up(boarded)
            self._queues.cancel(job.id)  # it may be, there as well, by the API at this moment
        elif outcome.ending is Ending.STOPPED:
            self._stop_job(boarded)
        elif outcome.ending is Ending.RELEASED:
            if self.runtime.store.requeue(outcome.job_id, execution.id):
                self._requeue(boarded)
            else:  # it has been taken from us since we looked
                self._land(boarded, Outcome(outcome.job_id, execution.id, Ending.LOST))
        else:
            self._disagree(boarded, outcome)
        self._boarded.pop(execution.id, None)

    def _disagree(self, boarded: Boarded, outcome: Outcome) -> None:
        """RQ thinks a job ours, and the store does not. If it has not ended, then one that was
        frozen as it began it has taken it from us, and will find that it is not its own."""
        self.runtime.store.returned(outcome.job_id, boarded.execution.id, worker=self.name)
        record = self.runtime.store.record(outcome.job_id)
        if record is not None and record.status in ACTIVE:
            self._requeue(boarded)
        else:  # nobody else will end it
            self._fail(boarded, RuntimeError("the job is gone from the store, or ended there"))

    def _poll(self) -> None:
        """RQ sends no word when a job is canceled, deleted or taken over: look."""
        self._suspended = self._is_paused()
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
                self._begin(b, job_id_of(b.job))
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
        self.runtime.forget(job_id_of(boarded.job))
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
            self._drain_until = self._stop_at + self.runtime.settings.drain_s
            self._shutdown_requested_date = now()
            self._stop_requested = True
        elif self._late(self._stop_at, 1.0):
            self._drain_until = min(self._drain_until, time.monotonic())

    def _drain(self) -> None:
        """Let short work end; then give the rest back to the front of the queue, with its state."""
        if not self._excused:
            self.runtime.excuse(self.name)
            self._excused = True
        if self._released_at is None:
            if time.monotonic() < self._drain_until:
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

    @staticmethod
    def _late(since: float, seconds: float) -> bool:
        return time.monotonic() - since > seconds
