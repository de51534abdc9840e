"""The service's use of RQ: enqueue, cancel, delete, look. Public names of RQ only.

Workers import JOB_FUNCTION and `Queues.cancel`; the private half of RQ is their business.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import redis
from rq import Queue, Retry
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.executions import Execution
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job
from rq.registry import clean_registries
from rq.serializers import JSONSerializer

JOB_FUNCTION = "worker.run.run_job"  # args: [job_id]; stock RQ workers call it too
LOOKS = 5  # at a job whose executions change under RQ's hands
ENDED = frozenset({"finished", "failed", "stopped", "canceled"})


class Queues:
    """RQ queues by name, kept so that each asks for the server's version only once."""

    def __init__(self, connection: redis.Redis) -> None:
        self._redis = connection
        self._queues: dict[str, Queue] = {}

    def get(self, name: str) -> Queue:
        """The queue, with the JSON serializer."""
        if name not in self._queues:
            queue = Queue(name, connection=self._redis, serializer=JSONSerializer)
            queue.get_redis_server_version()  # now: inside a MULTI it could not be asked
            self._queues[name] = queue
        return self._queues[name]

    def enqueue(
        self,
        name: str,
        job_id: str,
        *,
        pipeline: Any,
        description: str,
        at_front: bool,
        ttl_s: int,
    ) -> None:
        """Add RQ's own enqueue commands to a pipeline (which enters MULTI if it has not).

        ttl_s: how long RQ shows the job once it has ended; ours to keep are the outputs.
        """
        self.get(name).enqueue_call(
            JOB_FUNCTION,
            args=(job_id,),
            job_id=job_id,
            timeout=-1,  # the worker keeps its own deadline; RQ's default ends long jobs
            result_ttl=ttl_s,
            failure_ttl=ttl_s,
            description=description,
            at_front=at_front,
            # A worker killed again and again must not fail a job that makes progress.
            retry=Retry(max=1000, enqueue_at_front=True),
            pipeline=pipeline,
        )

    def cancel(self, job_id: str) -> None:
        """Take a job off its queue. A job that has already left it is left alone."""

        def cancel(job: Job) -> None:
            if job.get_status(refresh=False) not in ENDED:
                with contextlib.suppress(InvalidJobOperation):  # canceled in between
                    job.cancel()

        self._on(job_id, cancel)

    def delete(self, job_id: str) -> None:
        """Remove a job and all that RQ keeps of it."""
        self._on(job_id, lambda job: job.delete())

    def forget(self, job_ids: Sequence[str]) -> None:
        """Delete those of the jobs that have ended with RQ: it keeps canceled ones for ever.

        For a day it keeps when it first saw a job on its way to a worker.
        """
        ways = [IntermediateQueue(queue.key, self._redis) for queue in self._queues.values()]
        seen = [way.get_first_seen_key(job_id) for way in ways for job_id in job_ids]
        if seen:
            self._redis.unlink(*seen)
        for job_id, status in zip(job_ids, self.statuses(job_ids), strict=True):
            if status in ENDED:
                self.delete(job_id)

    def statuses(self, job_ids: Sequence[str]) -> list[str | None]:
        """RQ's status of each job, None where RQ has no such job."""
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hget(Job.key_for(job_id), "status")
            return [None if status is None else status.decode() for status in pipe.execute()]

    def clean(self, name: str) -> None:
        """Requeue the jobs of dead workers. Only under the store's lock: two at once would
        requeue a job twice."""
        clean_registries(self.get(name))

    def _on(self, job_id: str, act: Callable[[Job], None]) -> None:
        """Do something to a job, if there is one.

        RQ lists the executions of a job and then reads each; one that a worker ends in between
        is a ValueError, and gone at the next look, as is one of a dead worker, which RQ lists for a
        minute longer than it keeps it. So is a job that expires in between, of which RQ says
        InvalidJobOperation.
        """
        for attempt in range(LOOKS):
            job = self._fetch(job_id)
            if job is None:
                return
            try:
                return act(job)
            except (ValueError, InvalidJobOperation, NoSuchJobError):
                if attempt == LOOKS - 1:
                    raise
                self._strike_lost(job)

    def _strike_lost(self, job: Job) -> None:
        """Take executions off the list of a job that RQ no longer has."""
        registry = job.execution_registry
        for execution_id in registry.get_execution_ids():
            execution = Execution(execution_id, job_id=job.id, connection=self._redis)
            if not self._redis.exists(execution.key):
                self._redis.zrem(registry.key, execution_id)

    def _fetch(self, job_id: str) -> Job | None:
        try:
            return Job.fetch(job_id, connection=self._redis, serializer=JSONSerializer)
        except NoSuchJobError:
            return None


def queue_key(name: str) -> str:
    """RQ's list of waiting ids. Only its order is ours to change: see `lua/next.lua`."""
    return f"{Queue.redis_queue_namespace_prefix}{name}"
