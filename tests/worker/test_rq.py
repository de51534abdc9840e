"""The worker as RQ sees it: a real Redis, real worker processes."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rq import Queue, Worker
from rq.command import PUBSUB_CHANNEL_TEMPLATE, send_shutdown_command, send_stop_job_command
from rq.intermediate_queue import IntermediateQueue
from rq.job import JobStatus
from rq.registry import FinishedJobRegistry, StartedJobRegistry
from rq.serializers import JSONSerializer

import diffusion
from diffusion.noise import VERSION
from jobs.pictures import from_bytes
from jobs.settings import Settings
from jobs.store.batch import InBatch
from jobs.store.janitor import Janitor
from jobs.store.rq_queue import Queues, queue_key
from tests.app.conftest import serving
from worker.models import card_of

Service = Any  # of conftest.py; tests cannot import it


def started(service: Service, job_id: str, done: int = 1) -> None:
    """Wait until a job has made some steps."""
    service.until(lambda: service.record(job_id).done >= done)


def test_a_job_from_end_to_end(running: Service) -> None:
    job_id = running.admit(num_images=3, steps=20, seed=5, class_label=1, snapshots={"every": 10})
    record = running.ended(job_id)
    assert running.rq_status(job_id) == "finished"
    assert record.done == record.work == 60
    model = diffusion.load(running.models / "tiny")
    expected = diffusion.sample(
        model, 3, steps=20, seed=5, class_label=1, dtype=torch.float32, variance="large"
    )
    outputs = running.outputs(job_id)
    for i in range(3):
        image = from_bytes(outputs[f"i:{i}"], record.shape)
        np.testing.assert_allclose(image, expected[i].numpy(), atol=1e-3)
    ts = sorted({int(name.split(":")[1]) for name in outputs if name.startswith("s:")})
    assert len(ts) == 2 and ts[-1] == 1000
    assert record.provenance is not None
    assert record.provenance["model_digest"] == model.digest
    assert record.provenance["versions"]["torch"] == torch.__version__
    assert record.provenance["noise"] == VERSION == running.card.noise
    asked = {name: record.provenance[name] for name in ("dtype", "code", "threads")}
    assert asked["dtype"] in ("float32", "bfloat16") and asked["code"] == "eager"
    assert asked["threads"] >= 1


def test_jobs_of_every_kind_share_the_worker(running: Service) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), dtype=np.uint8)
    noise = {"kind": "noise", "inputs": pictures, "seed": 1, "kinds": ("x_t", "eps")}
    ids = [running.admit(steps=5 + i, seed=i, sampler="ddim") for i in range(12)]
    closed = running.admit(t=(1, 500, 1000), **noise)
    stepwise = running.admit(t=(500,), mode="stepwise", **noise)
    for job_id in [*ids, closed, stepwise]:
        running.ended(job_id)
    outputs = running.outputs(closed)
    x, eps = (from_bytes(outputs[f"s:500:{kind}:1"], (1, 8, 8)) for kind in ("x_t", "eps"))
    bar = np.prod(1 - np.asarray(running.card.betas)[:500])
    x_start = np.moveaxis(pictures[1].astype(np.float64) / 127.5 - 1, -1, 0)
    np.testing.assert_allclose(x, bar**0.5 * x_start + (1 - bar) ** 0.5 * eps, atol=1e-5)
    assert len(outputs) == 3 * 2 * 2
    assert set(running.outputs(stepwise)) == {
        f"s:500:{kind}:{i}" for kind in ("x_t", "eps") for i in range(2)
    }


def test_rq_shows_the_truth(running: Service) -> None:
    job_id = running.admit(num_images=64, steps=1000)
    started(running, job_id)
    (name,) = [info.name for info in running.store.workers()]
    job = running.rq_job(job_id)
    assert job.get_status() == JobStatus.STARTED and job.worker_name == name
    (worker,) = Worker.all(connection=running.redis, serializer=JSONSerializer)
    assert worker.get_state() == "busy"
    assert job_id in [execution.job_id for execution in worker.get_current_executions()]
    registry = StartedJobRegistry("ddpm", connection=running.redis, serializer=JSONSerializer)
    assert job_id in registry.get_job_ids(cleanup=False)
    shown = subprocess.run(
        [sys.executable, "-m", "rq.cli", "info", "--url", running.url, "--raw"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "queue ddpm 0, 1 executing" in shown.stdout
    (line,) = [line for line in shown.stdout.splitlines() if line.startswith(f"worker {name} ")]
    assert ") busy ddpm." in line
    running.store.cancel(job_id)
    running.ended(job_id, "canceled")
    assert job_id not in registry.get_job_ids(cleanup=False)


def test_a_paused_queue_gives_no_job_away(running: Service) -> None:
    """To a worker that is idle or one that is busy; what runs goes on, what comes waits."""
    with serving(Settings(redis_url=running.url)) as client:
        assert client.post("/queue/nowhere/pause").status_code == 404
        busy = running.admit(steps=1000, num_images=16)
        started(running, busy)
        assert client.post("/queue/ddpm/pause").json()["paused"] is True
        time.sleep(1.5)  # it looks every half a second
        waiting = running.admit(steps=2)
        done = running.record(busy).done
        started(running, busy, done + 1)
        running.store.cancel(busy)
        running.ended(busy, "canceled")
        time.sleep(1.5)  # now it is idle
        assert running.record(waiting).status == running.rq_status(waiting) == "queued"
        [queue] = client.get("/queue").json()["queues"]
        assert queue["paused"] is True and queue["queued"] == 1
        assert client.get("/readyz").json()["paused"] == ["ddpm"]
        assert client.post("/queue/ddpm/resume").json()["paused"] is False
        assert "paused" not in client.get("/readyz").json()
        running.ended(waiting)


# What is due every few seconds is due at once.
DUTIFUL = """
from worker import runtime
runtime.DUTIES_S = 0.0
"""


def test_an_idle_worker_that_takes_no_jobs_lives_on(service: Service, nursery: Any) -> None:
    """Else its models would be unknown to all before it is resumed."""
    worker = nursery.worker(service, fault=DUTIFUL)
    for pause in (service.suspended, service.paused):
        with pause():
            service.until(lambda: [w.get_state() for w in service.rq_workers()] == ["suspended"])
            for _ in range(2):
                before = time.time()
                service.until(lambda before=before: service.store.workers()[0].at > before)
            waiting = service.admit(steps=2)
        service.ended(waiting)
    with service.suspended():
        worker.kill(signal.SIGTERM)  # it hears that too
    assert service.store.workers() == []


def test_a_job_that_comes_right_after_a_pause_waits(running: Service) -> None:
    """The idle worker is in the middle of a pop when the queue is paused."""
    for how in ("pause", "suspend"):
        running.ended(running.admit(steps=2))
        time.sleep(0.7)  # it is idle again, and asks Redis for the next one
        with running.paused() if how == "pause" else running.suspended(wait=False):
            job_id = running.admit(steps=2)
            time.sleep(1.5)  # longer than one pop lasts
            assert running.record(job_id).status == running.rq_status(job_id) == "queued"
            assert Queue("ddpm", connection=running.redis).job_ids == [job_id]
        running.ended(job_id)


# A pause that is seen once, right after the first job was popped, and is over at the next look.
PAUSED_ONCE = """
from worker.rq.waiting import WaitingWorker
is_paused, put_to_head = WaitingWorker._is_paused, WaitingWorker._put_to_head
dequeue = WaitingWorker._dequeue
def first(self, timeout):
    WaitingWorker._is_paused = lambda self: True
    return dequeue(self, timeout)
def put_back(self, *popped):
    WaitingWorker._is_paused, WaitingWorker._dequeue = is_paused, dequeue
    put_to_head(self, *popped)
    print("put back", flush=True)
WaitingWorker._dequeue, WaitingWorker._put_to_head = first, put_back
"""


def test_a_pause_of_a_moment_ends_no_worker(service: Service, nursery: Any) -> None:
    job_id = service.admit(steps=2)
    worker = nursery.worker(service, fault=PAUSED_ONCE)
    service.until(lambda: not worker.alive() or service.rq_status(job_id) == "finished")
    assert worker.alive() and "put back" in service.log.read_text()
    service.ended(job_id)


def test_cancel_a_running_job_keeps_its_latest_state(running: Service) -> None:
    job_id = running.admit(num_images=64, steps=1000, seed=1)
    started(running, job_id)
    assert running.record(job_id).provenance is not None
    assert running.store.cancel(job_id) == "requested"
    record = running.ended(job_id, "canceled")
    assert 0 < record.done < record.work
    assert running.rq_status(job_id) == "canceled"
    kinds = {name.split(":")[2] for name in running.outputs(job_id) if name.startswith("s:")}
    assert kinds == {"x_t", "x_start"}


def test_cancel_a_waiting_job_that_rq_still_hands_out(running: Service) -> None:
    with running.suspended():
        job_id = running.admit(steps=5)
        assert running.store.cancel(job_id) == "canceled"  # and no word to RQ
    running.until(lambda: running.rq_status(job_id) == "canceled")
    assert running.outputs(job_id) == {}


def test_rq_can_cancel_too(running: Service) -> None:
    job_id = running.admit(steps=1000, num_images=64)
    started(running, job_id)
    running.rq_job(job_id).cancel()
    running.ended(job_id, "canceled")


def test_the_stop_command_stops_one_of_many(running: Service) -> None:
    others = [running.admit(steps=300) for _ in range(3)]
    job_id = running.admit(num_images=64, steps=1000)
    started(running, job_id)
    send_stop_job_command(running.redis, job_id, serializer=JSONSerializer)
    running.ended(job_id, "canceled")
    assert running.rq_status(job_id) == "stopped"
    for other in others:
        running.ended(other)


def test_a_deleted_job_is_dropped(running: Service) -> None:
    job_id = running.admit(num_images=64, steps=1000)
    started(running, job_id)
    running.store.purge(job_id)
    Queues(running.redis).delete(job_id)  # while the worker drops its execution
    running.until(lambda: not Worker.all(connection=running.redis)[0].get_current_executions(True))
    assert running.store.record(job_id) is None
    assert not [key for key in running.redis.keys("*") if job_id.encode() in key]


def test_rq_keeps_nothing_longer_than_we_do(running: Service) -> None:
    """RQ's keys of a job: its hash, its result, its executions, its place in a registry, and when
    RQ saw it on its way to a worker."""
    job_id = running.admit(steps=2, ttl_s=1)
    assert IntermediateQueue("rq:queue:ddpm", running.redis).set_first_seen(job_id)
    running.ended(job_id)
    registry = FinishedJobRegistry("ddpm", connection=running.redis, serializer=JSONSerializer)
    janitor = Janitor(running.store)  # as the API runs it

    def left() -> list[bytes]:
        janitor.run()
        return list(running.redis.scan_iter(f"rq:*{job_id}*"))

    running.until(lambda: left() == [])
    running.until(lambda: job_id not in registry.get_job_ids(cleanup=False))


def test_a_foreign_job_fails_with_a_reason_and_harms_nobody(running: Service) -> None:
    queue = Queue("ddpm", connection=running.redis, serializer=JSONSerializer)
    foreign = queue.enqueue("os.getcwd")
    pickled = Queue("ddpm", connection=running.redis).enqueue("worker.run.run_job", "x")
    job_id = running.admit(steps=5)
    running.ended(job_id)
    running.until(lambda: running.rq_status(foreign.id) == "failed")
    running.until(lambda: Queue("ddpm", connection=running.redis).failed_job_registry.count >= 2)
    assert "takes worker.run.run_job" in (running.rq_job(foreign.id).latest_result().exc_string)
    assert pickled.get_status() == JobStatus.FAILED


@pytest.mark.slow
def test_the_same_request_gives_the_same_bytes_after_another_model_came(
    running: Service, make_model: Any
) -> None:
    """Where it is deterministic; else its batches may be others meanwhile."""
    request = {"num_images": 4, "steps": 30, "seed": 5, "deterministic": True}
    jobs = [running.admit(**request)]
    running.ended(jobs[0])
    diffusion.save(make_model(seed=9, T=1000), running.models / "second")
    try:
        running.until(lambda: "second" in running.store.cards())
        jobs += [running.admit(**request)]
        busy = [running.admit(steps=50, seed=i) for i in range(3)]
        other = running.admit(steps=5, deterministic=True)
        running.redis.hset(f"ddpm:job:{other}", "model", "second")
        jobs += [running.admit(**request)]
        for job_id in (*jobs, *busy, other):
            running.ended(job_id)
    finally:
        shutil.rmtree(running.models / "second")
    running.until(lambda: set(running.store.cards()) == {"tiny"})
    jobs += [running.admit(**request)]
    running.ended(jobs[-1])
    first, *others = [running.outputs(job_id) for job_id in jobs]
    assert all(outputs == first for outputs in others)
    assert running.record(jobs[0]).provenance["dtype"] == "float32"


def test_a_model_put_into_the_folder_serves_without_a_restart(
    running: Service, make_model: Any, tmp_path: Path
) -> None:
    """And its first jobs wait until it is loaded, while the others go on."""
    card = card_of(make_model(seed=9, T=1000), "new", "ddpm")
    running.store.publish_card(card)  # as another worker would, that has found it first
    with running.suspended():
        waiting = [running.admit(steps=4, deterministic=flag) for flag in (True, False)]
        for job_id in waiting:
            running.redis.hset(f"ddpm:job:{job_id}", "model", "new")
        diffusion.save(make_model(seed=9, T=1000), running.models / "new")
    try:
        for job_id in waiting:
            assert running.ended(job_id).provenance["model"] == "new"
    finally:
        shutil.rmtree(running.models / "new")
    running.until(lambda: set(running.store.cards()) == {"tiny"})


@pytest.mark.slow
def test_a_job_waits_for_a_folder_that_is_mounted_late(
    service: Service, nursery: Any, tmp_path: Path
) -> None:
    """Its model stays known meanwhile; one that does not come in time is a reason to fail."""
    service.store.publish_card(service.card)
    waiting, lost = service.admit(steps=5), service.admit(steps=5)
    service.redis.hset(f"ddpm:job:{lost}", "model", "absent")
    mounted, service.models = service.models, tmp_path / "mount"
    nursery.worker(service, DDPM_MODEL_WAIT_S="10")
    service.until(lambda: service.rq_status(waiting) == service.rq_status(lost) == "started")
    time.sleep(1)
    assert "tiny" in service.store.cards()
    assert service.record(waiting).status == service.record(lost).status == "queued"
    (tmp_path / "mount").symlink_to(mounted)
    service.ended(waiting)
    record = service.ended(lost, "failed")
    assert record.fault is not None and record.fault.code == "model_unavailable"
    assert service.rq_status(lost) == "failed"


def test_a_model_taken_away_while_no_worker_looked_is_unknown(service: Service) -> None:
    service.store.publish_card(service.card.model_copy(update={"name": "gone"}))
    service.worker()
    assert set(service.store.cards()) == {"tiny"}


LONG = {"num_images": 3, "steps": 200, "seed": 11, "deterministic": True, "class_label": 2}


@pytest.fixture(scope="module")
def undisturbed(running: Service) -> dict[str, bytes]:
    """The outputs of LONG where nothing happens to it."""
    job_id = running.admit(**LONG)
    running.ended(job_id)
    return dict(running.outputs(job_id))


def killed_and_found(service: Service, job_id: str) -> None:
    """What RQ's cleaners do when the heartbeats of a dead worker have lapsed, at once."""
    registry = StartedJobRegistry("ddpm", connection=service.redis, serializer=JSONSerializer)
    registry.cleanup(timestamp=time.time() + 60)
    assert service.rq_status(job_id) == "queued"


@pytest.mark.slow
def test_a_stop_and_a_crash_later_the_images_are_the_same(
    service: Service, undisturbed: dict[str, bytes]
) -> None:
    first = service.worker(DDPM_DRAIN_S="0")
    job_id = service.admit(**LONG)
    started(service, job_id, 150)
    assert service.kill(first) == 0
    record = service.record(job_id)
    assert record.status == "queued" and record.crashes == 0
    assert service.rq_status(job_id) == "queued"
    assert service.store.workers() == [] and Worker.all(connection=service.redis) == []
    second = service.worker(DDPM_CHECKPOINT_S="0.2")
    started(service, job_id, 350)
    service.kill(second, signal.SIGKILL)
    assert service.redis.hlen(f"ddpm:job:{job_id}:state") > 0
    killed_and_found(service, job_id)
    service.worker()
    record = service.ended(job_id)
    assert service.outputs(job_id) == undisturbed
    # After the crash some steps were made twice, but not all.
    steps = int(service.redis.hget("ddpm:totals", "image_steps") or 0)
    assert record.work <= steps < record.work + 250


def test_a_frozen_worker_that_thaws_writes_nothing(
    service: Service, undisturbed: dict[str, bytes]
) -> None:
    first = service.worker()
    frozen = service.store.workers()[0].name
    job_id = service.admit(**LONG)
    started(service, job_id, 100)
    first.send_signal(signal.SIGSTOP)
    killed_and_found(service, job_id)
    service.worker()
    record = service.ended(job_id)
    events = service.redis.xlen(f"ddpm:job:{job_id}:events")
    assert service.outputs(job_id) == undisturbed
    first.send_signal(signal.SIGCONT)
    time.sleep(1.5)
    assert service.redis.xlen(f"ddpm:job:{job_id}:events") == events
    assert service.outputs(job_id) == undisturbed
    assert service.record(job_id).execution == record.execution
    assert service.rq_status(job_id) == "finished"
    assert frozen != record.worker
    assert first.poll() is None  # and goes on to serve
    service.kill(service.processes[-1])
    service.ended(service.admit(steps=3))


# The times between which a worker that died is noticed, a tenth of what they are.
QUICK = """
from worker.rq import waiting
waiting.MONITOR_S, waiting.SLACK_S, waiting.MAINTENANCE_S = 1, 2, 1
"""


@pytest.mark.parametrize(
    ("times", "limit", "size"),
    [
        pytest.param(QUICK, 15, {"num_images": 4, "steps": 400}, id="quick"),
        pytest.param(
            "", 35, {"num_images": 16, "steps": 1000}, id="as it is", marks=pytest.mark.slow
        ),
    ],
)
def test_a_killed_workers_job_is_back_within_half_a_minute(
    service: Service, times: str, limit: float, size: dict[str, int]
) -> None:
    """By the other worker's own maintenance; the API's janitor does the same."""
    workers = [service.worker(fault=times), service.worker(fault=times)]
    job_id = service.admit(**size)
    started(service, job_id, 100)
    before = service.record(job_id)
    (holder,) = [w for w in workers if f".{w.pid}." in before.worker]
    service.kill(holder, signal.SIGKILL)
    killed = time.monotonic()
    service.until(lambda: service.record(job_id).execution not in (None, before.execution))
    assert time.monotonic() - killed < limit
    assert service.record(job_id).worker != before.worker
    service.ended(job_id, seconds=200)


def test_a_job_that_was_popped_and_never_begun_is_back_soon(service: Service) -> None:
    """As one is whose worker died in between, or whose Redis died as it answered."""
    job_id = service.admit(steps=2)
    queue = queue_key("ddpm")
    assert service.redis.lmove(queue, f"{queue}:intermediate") == job_id.encode()
    service.worker(fault=f"{QUICK}waiting.POPPED_S = 1\n")
    service.ended(job_id, seconds=60)  # stock RQ would only then begin to think of it
    assert not service.redis.keys("rq:*first_seen*")


HANGS = """
import time
from worker.engine.chain_pool import ChainPool
step, steps = ChainPool.step, []
def hang(self, batch, shape):
    steps.append(1)
    return step(self, batch, shape) if len(steps) < 80 else time.sleep(10_000)
ChainPool.step = hang
"""
LOST = (
    HANGS.replace("time.sleep(10_000)", "lost()")
    + """
import torch
def lost():
    raise torch.AcceleratorError("the device was lost")
"""
)


@pytest.mark.parametrize(("fault", "status"), [(HANGS, 75), (LOST, 1)], ids=["hangs", "lost"])
def test_a_device_that_fails_takes_no_job_with_it(
    service: Service, undisturbed: dict[str, bytes], fault: str, status: int
) -> None:
    broken = service.worker(fault=fault, DDPM_STALL_LIMIT_S="3", DDPM_CHECKPOINT_S="0.1")
    job_id = service.admit(**LONG)
    assert broken.wait(timeout=60) == status
    assert service.rq_status(job_id) == "queued"
    service.worker()
    service.ended(job_id)
    assert service.outputs(job_id) == undisturbed


def test_a_stock_rq_worker_runs_the_same_job(
    service: Service, undisturbed: dict[str, bytes]
) -> None:
    job_id = service.admit(**LONG)
    stock = service.run(
        sys.executable, "-m", "rq.cli", "worker", "ddpm", "--burst", "--url", service.url,
        "-S", "rq.serializers.JSONSerializer",
    )  # fmt: skip
    assert stock.wait(timeout=120) == 0
    service.ended(job_id)
    assert service.outputs(job_id) == undisturbed
    assert service.rq_status(job_id) == "finished"


def test_a_stock_rq_worker_whose_job_was_taken_hands_it_on(service: Service) -> None:
    """As it is after it was silent for long: RQ would take the job for done."""
    job_id = service.admit(**LONG)
    stock = service.run(
        sys.executable, "-m", "rq.cli", "worker", "ddpm", "--burst", "--url", service.url,
        "-S", "rq.serializers.JSONSerializer",
    )  # fmt: skip
    started(service, job_id)
    taken = service.store.start(
        job_id, "another", worker="another", digest="", provenance=None, in_batch=InBatch.NO
    )
    assert taken is not None
    assert stock.wait(timeout=120) == 0
    service.ended(job_id)
    assert service.rq_status(job_id) == "finished"


def test_redis_restarts_under_a_running_job(
    own_redis: Any,
    model_folder: Path,
    tmp_path: Path,
    running: Service,
    undisturbed: dict[str, bytes],
) -> None:
    persistent = ("--appendonly", "yes", "--appendfsync", "always")
    url, server = own_redis("restarted", *persistent)
    service = type(running)(url, model_folder, tmp_path / "log")
    try:
        worker = service.worker(DDPM_DRAIN_S="30")
        job_id = service.admit(**LONG)
        started(service, job_id, 100)
        server.terminate()
        server.wait(timeout=20)
        time.sleep(1)
        own_redis("restarted", *persistent)
        service.ended(job_id)
        assert service.outputs(job_id) == undisturbed
        # And it still hears RQ: told to stop, it lets short work end.
        last = service.admit(steps=100)
        started(service, last)
        (name,) = [info.name for info in service.store.workers()]
        channel = PUBSUB_CHANNEL_TEMPLATE % name
        service.until(lambda: service.redis.pubsub_numsub(channel)[0][1] > 0)
        send_shutdown_command(service.redis, name)
        assert worker.wait(timeout=60) == 0
        service.ended(last)
    finally:
        service.close()
