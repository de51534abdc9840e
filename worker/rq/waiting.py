"""A worker of RQ between two jobs: it waits in short slices, lives through any absence of Redis,
and does what is due every few seconds, busy or not."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import redis
from rq import worker_registration
from rq.exceptions import DequeueTimeout
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job
from rq.queue import Queue
from rq.registry import clean_registries
from rq.serializers import JSONSerializer
from rq.suspension import is_suspended
from rq.utils import get_version, now
from rq.worker import BaseWorker, WorkerStatus

from jobs.store.trouble import passes
from worker.rq.check import check_rq
from worker.runtime import Runtime

log = logging.getLogger("ddpm.worker")

MONITOR_S = 5  # between two heartbeats of a job
SLACK_S = 15  # a heartbeat may be this late before the job is taken for abandoned
WORKER_TTL_S = 30
MAINTENANCE_S = 10
IDLE_SLICE_S = 1
POPPED_S = 5  # a job that was popped, and not begun since it was seen so, has been left
POLL_S = 0.5  # between two looks, and between two tries while Redis is away
SOCKET_S = 5  # for an answer, beyond what a blocking call waits by itself


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


class WaitingWorker(BaseWorker):
    """Pops the jobs of one queue, one at a time; what becomes of them is for `EngineWorker`."""

    def __init__(self, runtime: Runtime, connection: redis.Redis, *, name: str = "") -> None:
        check_rq()
        super().__init__(
            [runtime.settings.queue],
            # Unique: after kill -9 a worker of the same name could not register for minutes.
            name=f"{name or socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}",
            connection=connection,
            serializer=JSONSerializer,
            worker_ttl=WORKER_TTL_S,
            maintenance_interval=MAINTENANCE_S,
            job_monitoring_interval=MONITOR_S,
            log_job_description=False,
        )
        self.log_result_lifespan = False
        self.runtime = runtime

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[Job, Queue] | None:
        """Wait for a job in short slices, so that a stop and the duties are never far off.

        A job that comes after a pause is never taken, one that came before it perhaps.
        """
        idle_since = time.monotonic()
        while not self._stop_requested:
            try:
                paused = self._is_paused()
                self._idle_round(WorkerStatus.SUSPENDED if paused else WorkerStatus.IDLE)
                if paused:
                    time.sleep(POLL_S)
                    continue
                self._next()
                found = self._dequeue(None if timeout is None else IDLE_SLICE_S)
                # None: it was put back, since a pause came; RQ's loop would end at that.
                if found is not None or timeout is None:
                    return found
            except DequeueTimeout:
                if max_idle_time is not None and time.monotonic() - idle_since > max_idle_time:
                    return None
            except redis.exceptions.RedisError as error:
                if not passes(error):
                    raise
                log.warning("Redis cannot serve (%s)", error)
                time.sleep(POLL_S)
        return None

    def check_for_suspension(self, burst: bool) -> None:
        """Nothing: RQ would wait here, and a worker that is silent for so long counts as dead."""

    # RQ's loop ends at an error of either of these

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """Say that this worker lives, if Redis is there to hear it."""
        with self._patiently():
            super().heartbeat(timeout, pipeline)

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

    def _idle_round(self, state: WorkerStatus) -> None:
        if self.get_state() != state:
            self.set_state(state)
        self.heartbeat()
        self._maintain()
        self._check_engine()

    def _is_paused(self) -> bool:
        """Whether no job is to be taken: from this queue, or by any worker of RQ."""
        paused = self.runtime.store.is_paused(self.runtime.settings.queue)
        return paused or bool(is_suspended(self.connection, self))

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
        if self._is_paused():  # since the pop began: it waits, and what comes then is popped
            self._put_to_head(job, queue)
            return None
        job.redis_server_version = get_version(self.connection)
        return job, queue

    def _put_to_head(self, job: Job, queue: Queue) -> None:
        """Undo a pop."""
        popped = Popped(queue.key, self.connection)
        with self.connection.pipeline() as pipe:
            pipe.lrem(popped.key, 1, job.id)
            pipe.lpush(queue.key, job.id)
            pipe.delete(popped.get_first_seen_key(job.id))
            pipe.execute()

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

    def _next(self) -> str | None:
        """Whose turn it is among those that wait; None: nobody waits."""
        return self.runtime.store.next_turn(self.runtime.settings.queue)

    def _check_engine(self) -> None:
        """End this worker if its engine has failed."""
        raise NotImplementedError

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
