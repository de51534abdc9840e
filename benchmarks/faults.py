"""The faults of the storm: what is done to a stage, how often, and for how long (`FAULTS`)."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import redis
from followers import Followers
from storm import REQUESTS, Stage, save_model, until

HANGS = """
import time
from worker.engine.chain_pool import ChainPool
step, steps = ChainPool.step, []
def hang(self, batch, shape):
    steps.append(1)
    return step(self, batch, shape) if len(steps) < 200 else time.sleep(10_000)
ChainPool.step = hang
"""
NO_MEMORY = """
import torch
from worker.network.network import Network
output = Network.output
def full(self, x, t, labels, shape):
    if x.shape[0] > 3:
        raise torch.OutOfMemoryError("CUDA out of memory (so it is said here)")
    return output(self, x, t, labels, shape)
"""
NO_MEMORY_SOON = (
    NO_MEMORY
    + """
import threading
threading.Timer(8, lambda: setattr(Network, "output", full)).start()
"""
)
NO_ROOM = "no memory for a batch"  # what a worker says of it


class Skipped(Exception):
    """What this machine lacks for a fault."""


@dataclass(frozen=True)
class Fault:
    """act: does it once. tries: in full. pause: seconds between.

    beside: tries on a stage of many faults; 0: it needs one of its own. in_short: the test that
    does it in little; without one, CI does it on a stage with others.
    """

    act: Callable[[Stage], None]
    tries: int
    pause: float = 5.0
    set_up: Callable[[Stage], contextlib.AbstractContextManager[Any]] | None = None
    requests: Any = REQUESTS
    beside: int = 1
    in_short: str = ""


def nothing(stage: Stage) -> None:
    """For comparison."""


# Workers


def kill_worker(stage: Stage) -> None:
    stage.replace_worker(stage.number % 2)


def kill_workers(stage: Stage) -> None:
    for worker in stage.workers:
        worker.kill()
    for which in range(2):
        stage.replace_worker(which)


def kill_under_up(stage: Stage) -> None:
    """One of all the processes that `ddpm up` keeps, Redis and the API among them."""
    [up] = stage.processes
    children = psutil.Process(up.pid).children()
    if children:
        children[stage.number % len(children)].kill()


def deploy(stage: Stage) -> None:
    """New ones first, then the old ones are told to go; the API too."""
    old = list(stage.workers)
    stage.workers[:] = [stage.start_worker() for _ in old]
    for worker in old:
        stage.end(worker, signal.SIGTERM)
    stage.end(stage.api, signal.SIGTERM)
    stage.api = stage.start_api()


def freeze(stage: Stage) -> None:
    """Longer than a worker may be silent; then it goes on with what was its."""
    worker = stage.workers[stage.number % 2]
    worker.send_signal(signal.SIGSTOP)
    stage.wait(30, brief=8)
    worker.send_signal(signal.SIGCONT)


def hang(stage: Stage) -> None:
    stage.end(stage.workers[stage.number % 2], signal.SIGTERM)
    hanging = stage.start_worker(HANGS, DDPM_STALL_LIMIT_S="3")
    if hanging.wait(timeout=600) != 75:
        raise RuntimeError("the worker did not notice that its device hangs")
    stage.workers[stage.number % 2] = stage.start_worker()


def no_memory(stage: Stage) -> None:
    stage.end(stage.workers[stage.number % 2], signal.SIGTERM)
    before = stage.told(NO_ROOM)
    stage.workers[stage.number % 2] = stage.start_worker(NO_MEMORY_SOON)
    until(lambda: stage.told(NO_ROOM) > before, "a batch that has no memory")


# Redis


def kill_redis(stage: Stage) -> None:
    stage.end(stage.server)
    time.sleep(1)
    stage.start_redis()


def read_only(stage: Stage) -> None:
    stage.redis.replicaof("127.0.0.1", "1")
    stage.wait(5, brief=3)
    stage.redis.replicaof("NO", "ONE")


def fill_disk(stage: Stage) -> None:
    """Until Redis says that it cannot write; then there is room again."""
    filler = stage.data / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(2**16))
            file.flush()
    until(lambda: _refuses(stage.redis), "Redis to notice that the disk is full")
    time.sleep(3)
    filler.unlink()
    until(lambda: not _refuses(stage.redis), "Redis to write again")


def _refuses(connection: redis.Redis) -> bool:
    try:
        connection.set("storm:probe", 1)
    except redis.exceptions.RedisError:
        return True
    return False


@contextlib.contextmanager
def small_disk(stage: Stage) -> Iterator[None]:
    """Redis' folder on a file system of 64 MiB."""
    stage.end(stage.server)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(stage.data)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if mounted.returncode:
        raise Skipped(f"no file system can be mounted here: {mounted.stderr.strip()}")
    stage.start_redis()
    try:
        yield
    finally:
        stage.server.kill()
        stage.server.wait()
        subprocess.run(["umount", str(stage.data)], check=False)


@contextlib.contextmanager
def much_data(stage: Stage) -> Iterator[None]:
    """So much that Redis reads it for seconds as it starts, or for a moment."""
    for _ in range(6 if stage.brief else 30):
        with stage.redis.pipeline(transaction=False) as pipe:
            for _ in range(20):
                pipe.eval(
                    "for i = 1, 2000 do redis.call('INCR', 'storm:' .. math.random(1e9)) end", 0
                )
            pipe.execute()
    yield


# The API, models, the clock


def kill_api(stage: Stage) -> None:
    """While streams are open: see `followers`."""
    stage.end(stage.api)
    stage.api = stage.start_api()


@contextlib.contextmanager
def other_model(stage: Stage) -> Iterator[None]:
    save_model(stage.models / "other", seed=100)
    with httpx.Client(base_url=stage.url, trust_env=False) as client:
        until(lambda: knows(client, "other"), "the other model")
        yield
    shutil.rmtree(stage.models / "other", ignore_errors=True)


def knows(client: httpx.Client, name: str) -> bool:
    """Whether the service serves a model."""
    with contextlib.suppress(httpx.HTTPError):
        return any(model["name"] == name for model in client.get("/models").json()["data"])
    return False


def replace_model(stage: Stage) -> None:
    """By another of the same name, at once; and away altogether for a while."""
    save_model(stage.folder / "new", seed=101 + stage.number)
    os.rename(stage.models / "other", stage.folder / f"old-{stage.number}")
    os.rename(stage.folder / "new", stage.models / "other")
    stage.wait(6, brief=4)
    os.rename(stage.models / "other", stage.folder / "away")
    stage.wait(6, brief=4)
    os.rename(stage.folder / "away", stage.models / "other")


def move_clock(stage: Stage) -> None:
    """An hour on, and back again, for all of it, Redis too."""
    clock = Path(stage.more["FAKETIME_TIMESTAMP_FILE"])
    ahead = 1 - stage.number % 2
    clock.write_text(f"+{ahead}h\n")
    stage.wait(10, brief=4)
    if abs(_seconds_of(stage.redis) - time.time() - 3600 * ahead) > 600:
        raise RuntimeError("the clock was not moved")


def _seconds_of(connection: redis.Redis) -> int:
    now: Any = connection.time()
    return int(now[0])


def faked_clock(folder: Path) -> dict[str, str]:
    """The environment in which a file tells the time. Raises Skipped."""
    # Not Debian's 0.9.10: under it a sleep to a time that has just passed is an error.
    found = importlib.util.find_spec("libfaketime")
    libraries = [] if found is None else sorted(Path(str(found.origin)).parent.rglob("*.so*"))
    if not libraries:
        raise Skipped("libfaketime is not installed (pip install libfaketime)")
    clock = folder / "clock"
    clock.write_text("+1h\n")
    faked = {
        "LD_PRELOAD": str(libraries[0]),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    asked = [sys.executable, "-c", "import time; print(time.time())"]
    told = subprocess.run(asked, env={**os.environ, **faked}, capture_output=True, check=True)
    if float(told.stdout) < time.time() + 1800:
        raise Skipped("libfaketime moves no clock on this machine")
    clock.write_text("+0h\n")
    return faked


ON_OTHER = (
    *REQUESTS[:3],
    *({"deterministic": True, "model": "other", "seed": i, "steps": 50} for i in range(2)),
)
UP = "tests/app/test_up.py::test_up_serves_stops_and_forgets_nothing"
KILLED = "tests/worker/test_rq.py::test_a_killed_workers_job_is_back_within_half_a_minute"
TROUBLED = "tests/worker/test_troubled_redis.py::"
NO_REDIS = TROUBLED + "test_a_redis_that_goes_away_between_two_jobs_is_waited_for"
TROUBLE = TROUBLED + "test_a_worker_waits_for_the_end_of_every_trouble"
DEPLOY = "tests/worker/test_suspects.py::test_a_deploy_makes_no_suspects"
FROZEN = "tests/worker/test_rq.py::test_a_frozen_worker_that_thaws_writes_nothing"
HUNG = "tests/worker/test_rq.py::test_a_device_that_fails_takes_no_job_with_it"
FULL = "tests/worker/test_engine.py::test_a_batch_without_memory_is_halved_and_all_goes_on"
FAULTS: dict[str, Fault] = {
    "kill -9 a worker, every 20 s": Fault(kill_worker, 10, 20.0, in_short=KILLED),
    "kill -9 a worker, every 2 s": Fault(kill_worker, 20, 2.0, in_short=KILLED),
    "kill -9 every worker at once, every 20 s": Fault(kill_workers, 10, 20.0),
    "kill -9 every worker at once, every 2 s": Fault(kill_workers, 10, 2.0),
    "kill -9 under `ddpm up`, every 10 s": Fault(kill_under_up, 20, 10.0, beside=0, in_short=UP),
    "kill -9 under `ddpm up`, every 2 s": Fault(kill_under_up, 20, 2.0, beside=0, in_short=UP),
    "kill -9 Redis": Fault(kill_redis, 10, 8.0, in_short=NO_REDIS),
    "disk full": Fault(fill_disk, 4, 8.0, small_disk),
    "kill -9 Redis with 1.2 million keys": Fault(kill_redis, 3, 10.0, much_data),
    "Redis read-only": Fault(read_only, 4, 8.0, in_short=TROUBLE),
    "kill -9 the API, with streams": Fault(kill_api, 20, 5.0, Followers),
    "deploy": Fault(deploy, 5, 10.0, in_short=DEPLOY),
    "a worker frozen for 30 s": Fault(freeze, 5, 10.0, in_short=FROZEN),
    "the device hangs": Fault(hang, 5, 10.0, in_short=HUNG),
    "no memory in a forward": Fault(no_memory, 5, 5.0, in_short=FULL),
    "model replaced, then away": Fault(replace_model, 5, 5.0, other_model, ON_OTHER),
    "clock an hour on, and back": Fault(move_clock, 6, 5.0, beside=2),
}


def of_one_stage(*parts: str) -> dict[str, Fault]:
    """Those whose name has one of these parts, and that can be on one stage, one after the other;
    where two differ in the pause alone, one."""
    alike = {
        (fault.act, fault.set_up): (name, fault)
        for name, fault in reversed(FAULTS.items())
        if fault.beside and any(part in name for part in parts or ("",))
    }
    return dict(reversed(alike.values()))
