"""Workers that are killed, and jobs that kill them: who is suspected, run alone, and failed."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import pytest
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer

from jobs.states import ACTIVE, Status
from jobs.store import keys
from jobs.store.janitor import Janitor

Service = Any  # of conftest.py; tests cannot import it

# A worker that dies for good as soon as a chain of seed 666 has made so many steps.
POISON = """
import os, signal
from worker.engine.chain_pool import ChainPool, task_of
step = ChainPool.step
def poisoned(self, batch, shape):
    if any(task_of(s).seed == 666 and self.row_of(s) >= 7 for s in batch.samples):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, shape)
ChainPool.step = poisoned
"""
# What is silent for a second is dead.
HASTY = """
from jobs.store import writer
writer.SILENT_S = 1.0
"""
# One that needs so long for a step that it can be stopped before it has made two.
SLOW = """
import time
from worker.engine.chain_pool import ChainPool
step = ChainPool.step
def slow(self, batch, shape):
    time.sleep(0.5)
    return step(self, batch, shape)
ChainPool.step = slow
"""


# One that is told to stop so late in a wait that the wait is over once it has heard: on a busy
# machine that is one stop in thirty.
LATE = """
import time
from worker.rq.adapter import ROUND_S, EngineWorker
hear = EngineWorker.request_stop
def hear_late(self, signum, frame):
    hear(self, signum, frame)
    time.sleep(3 * ROUND_S)
EngineWorker.request_stop = hear_late
"""


# One that is stopped as it is about to begin its first job.
STOPPED = """
import os, signal
from worker.runtime import Runtime
begin = Runtime.begin
def stop_first(self, *job):
    Runtime.begin = begin
    os.kill(os.getpid(), signal.SIGSTOP)
    return begin(self, *job)
Runtime.begin = stop_first
"""


def find_abandoned(service: Service, *, seconds: float = 60) -> None:
    """What RQ's cleaners do once the heartbeats of a dead worker have lapsed, at once."""
    registry = StartedJobRegistry("ddpm", connection=service.redis, serializer=JSONSerializer)
    registry.cleanup(timestamp=time.time() + seconds)


def test_a_job_that_kills_workers_fails_alone(service: Service, nursery: Any) -> None:
    before = [service.admit(steps=150, num_images=2) for _ in range(4)]
    poison = service.admit(steps=50, seed=666)
    after = [service.admit(steps=150, num_images=2) for _ in range(4)]
    deaths = 0
    while service.record(poison).status in ACTIVE:
        worker = nursery.worker(service, fault=POISON + HASTY, DDPM_CHECKPOINT_S="0.1")
        service.until(
            lambda worker=worker: not worker.alive() or service.record(poison).status not in ACTIVE
        )
        if not worker.alive():
            deaths += 1
            find_abandoned(service)
    fault = service.record(poison).fault
    assert fault.code == "gave_up", fault
    assert "3 workers died while they ran this job and no other" in fault.detail
    assert deaths == 4  # once with its neighbours, and then alone
    for job_id in before + after:
        assert service.ended(job_id).crashes <= 1


def test_a_job_that_kills_stock_workers_fails_too(service: Service) -> None:
    """They have no names that tell one from the next."""
    poison = service.admit(steps=50, seed=666)
    command = ["worker", "--burst", "-S", "rq.serializers.JSONSerializer", "--url", service.url]
    command += ["-w", "rq.worker.SimpleWorker", "ddpm"]
    code = f"{POISON}{HASTY}\nfrom rq.cli import main\nmain({command!r})"
    ends = []
    while service.record(poison).status in ACTIVE:
        ends.append(service.run(sys.executable, "-c", code).wait(timeout=60))
        find_abandoned(service, seconds=600)  # theirs lapse later
    assert ends == [-signal.SIGKILL] * 3 + [0]
    fault = service.record(poison).fault
    assert fault.code == "gave_up", fault
    assert "3 workers died while they ran this job and no other" in fault.detail
    Janitor(service.store).forget_workers()
    assert service.redis.hlen(keys.BEGUN) == 0


@pytest.mark.slow
def test_a_job_that_workers_froze_over_goes_on_when_they_do(service: Service, nursery: Any) -> None:
    job_id = service.admit(steps=3)
    frozen = []
    for how in (b"shared", b"alone", b"alone", b"alone"):
        frozen.append(nursery.worker(service, fault=SLOW))
        service.until(lambda how=how: holder(service, job_id) == (frozen[-1].pid, how))
        os.kill(frozen[-1].pid, signal.SIGSTOP)
        find_abandoned(service)
    heir = nursery.worker(service)
    service.until(lambda: "4 3" in counts(service, job_id))
    time.sleep(1)  # it could have been given up many times
    assert service.record(job_id).status is Status.QUEUED
    for worker in frozen:
        os.kill(worker.pid, signal.SIGCONT)
    record = service.ended(job_id)
    assert f".{heir.pid}." in record.worker
    service.until(lambda: counts(service, job_id) == "0 0")


def test_a_worker_frozen_as_it_begins_a_job_takes_it_from_nobody(
    service: Service, nursery: Any
) -> None:
    """The simulation stops it between any two of its commands; here one is stopped for real."""
    job_id = service.admit(steps=1000)
    frozen = nursery.worker(service, fault=STOPPED)
    service.until(lambda: service.rq_status(job_id) == "started")
    find_abandoned(service)
    heir = nursery.worker(service)
    service.until(lambda: service.record(job_id).done > 0)
    os.kill(frozen.pid, signal.SIGCONT)
    service.ended(job_id)
    assert frozen.alive() and heir.alive()
    service.until(lambda: counts(service, job_id) == "0 0")


def holder(service: Service, job_id: str) -> tuple[int, bytes]:
    """The process that has a job, and how it is in its batch."""
    name, how = service.redis.hmget(keys.job(job_id), "worker", "in_batch")
    return int(name.split(b".")[-2]) if name else 0, how


def counts(service: Service, job_id: str) -> str:
    found = service.redis.hmget(keys.job(job_id), "crashes", "lone_crashes")
    return " ".join((value or b"0").decode() for value in found)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_workers_cost_no_job(service: Service, nursery: Any) -> None:
    jobs = [service.admit(steps=100, num_images=8, seed=i) for i in range(40)]
    workers = [nursery.worker(service, DDPM_CHECKPOINT_S="0.2") for _ in range(2)]
    kills = 0
    while kills < 12 and any(service.record(job_id).status in ACTIVE for job_id in jobs):
        time.sleep(0.3)
        workers[kills % 2].kill()
        find_abandoned(service)
        workers[kills % 2] = nursery.worker(service, DDPM_CHECKPOINT_S="0.2")
        kills += 1
    assert kills >= 3, "the jobs were done too soon to show anything"
    for job_id in jobs:
        service.ended(job_id, seconds=300)


@pytest.mark.parametrize("fault", ["", LATE], ids=["at once", "late"])
def test_a_deploy_makes_no_suspects(service: Service, nursery: Any, fault: str) -> None:
    """Not even if the worker is killed before it has given its jobs back."""
    long = {"steps": 1000, "num_images": 2, "corrector_steps": 9}  # none ends by itself
    jobs = [service.admit(**long) for _ in range(3)]
    worker = nursery.worker(service, fault=fault, DDPM_DRAIN_S="60")
    # Which of them are stepped first is the engine's affair.
    service.until(lambda: any(service.record(job_id).done for job_id in jobs))
    os.kill(worker.pid, signal.SIGTERM)
    service.until(
        lambda: not any(service.redis.hget(keys.job(job_id), "in_batch") for job_id in jobs)
    )
    worker.kill()
    find_abandoned(service)
    executions = {service.record(job_id).execution for job_id in jobs}
    nursery.worker(service)
    service.until(lambda: not executions & {service.record(job_id).execution for job_id in jobs})
    assert [service.record(job_id).crashes for job_id in jobs] == [0, 0, 0]
