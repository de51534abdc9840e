"""RQ's side of the jobs that a worker holds: whose they are, how each is ended or given back."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from rq.callbacks import execute_stopped_callback
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.timeouts import JobTimeoutException
from rq.utils import as_text, now
from rq.worker import WorkerStatus

from jobs.store.rq_queue import JOB_FUNCTION
from worker.flights import AnyFlight
from worker.rq.waiting import WaitingWorker

log = logging.getLogger("ddpm.worker")


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


class HoldingWorker(WaitingWorker):
    """What RQ lets a worker do with one job, for jobs that are many at once."""

    def _take(self, job: Job, queue: Queue) -> Execution:
        """Have RQ write down that a popped job runs here. All of it at once: RQ itself writes the
        execution, and then the rest; of a worker that is silent in between the execution lapses,
        and what it goes on to write says that the job runs, without one that could lapse."""
        ttl = self.get_heartbeat_ttl(job)
        with self.connection.pipeline() as pipeline:
            execution = Execution.create(job, ttl, pipeline=pipeline, worker_name=self.name)
            self.set_state(WorkerStatus.BUSY, pipeline=pipeline)
            self.heartbeat(ttl, pipeline=pipeline)
            job.prepare_for_execution(self.name, pipeline=pipeline)
            pipeline.persist(job.key)
            pipeline.lrem(queue.intermediate_queue_key, 1, job.id)
            pipeline.execute()
        self.executions[execution.id] = execution
        return execution

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


def job_id_of(job: Job) -> str:
    """The argument of our job function. Raises TypeError for any other job."""
    if job.func_name != JOB_FUNCTION or len(job.args) != 1:
        raise TypeError(f"this queue takes {JOB_FUNCTION}(job_id), not {job.get_call_string()}")
    return str(job.args[0])
