"""The job function: what RQ's jobs name. Our worker knows it; a stock RQ worker calls it.

On a stock worker (`rq worker -S rq.serializers.JSONSerializer`) a job is a batch of its own, and
loads its model itself; the images are the same.
"""

from __future__ import annotations

import time
import uuid
from contextlib import suppress

import redis
from rq import Retry, get_current_job

from diffusion.device import pick_device
from jobs.settings import Settings
from jobs.states import ACTIVE
from jobs.store.writer import JobStore
from worker.flights import Ending, Flight
from worker.models import ModelFolder
from worker.patience import SHORTEST_S
from worker.runtime import Runtime

_FOR_EVER = 1_000_000_000


class JobFailed(RuntimeError):
    """The job ended badly; its record in the store says why."""


def run_job(job_id: str) -> Retry | None:
    """Run one job to its end. Raises JobFailed, after which RQ will not try it again.

    Returns what makes RQ hand out a job again: one that only another version of us can run, or that
    went on elsewhere while we were silent (else RQ would take it for ended).
    """
    settings = Settings()
    store = JobStore.connect(settings)
    record = store.record(job_id)
    names = () if record is None else (record.model,)
    folder = ModelFolder(settings.models, queue=settings.queue, device=pick_device(), names=names)
    runtime = Runtime(settings, store, folder, threads=False)
    worker = ""
    try:
        runtime.start()
        execution = _execution_id()
        # Named by what it runs: one that goes on itself is not blamed for a death, and of stock
        # workers nothing else is known that tells one from the next.
        worker = f"rq.{execution}"
        while (begun := runtime.begin(job_id, execution, worker)) is None:
            time.sleep(SHORTEST_S)
        error: BaseException | None = None
        if isinstance(begun, Flight):
            outcome = runtime.run_to_end(begun)
            begun, error = outcome.ending, outcome.error
        if begun is Ending.LOST:
            store.returned(job_id, execution, worker=worker)
            record = store.record(job_id)
            if record is not None and record.status in ACTIVE:
                return Retry(max=_FOR_EVER)
        if begun is Ending.UNREAD:
            time.sleep(SHORTEST_S)  # such a worker has nothing else to do, and must not spin
            return Retry(max=_FOR_EVER)
        if begun is Ending.FAILED:
            _do_not_retry()
            raise JobFailed(str(error or "see the job's record"))
    finally:
        runtime.close()
        with suppress(redis.RedisError):
            store.goodbye(worker)
        store.redis.close()
    return None


def _execution_id() -> str:
    """RQ's id of this execution, which fences our writes; any unique one outside a worker."""
    job = get_current_job()
    executions = [] if job is None else job.get_executions()
    if not executions:
        return uuid.uuid4().hex
    return str(max(executions, key=lambda execution: execution.created_at).id)


def _do_not_retry() -> None:
    job = get_current_job()
    if job is not None:
        job.retries_left = 0
