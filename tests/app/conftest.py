"""A real API server in a thread, on a real Redis, spoken to over real HTTP."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from PIL import Image

from app.main import create_app
from app.server import configured
from jobs.cards import ModelCard, Preset, SamplerTraits
from jobs.settings import Settings
from jobs.store import keys
from jobs.store.started import Started
from jobs.store.writer import JobStore

START_TIMEOUT = 60.0
X = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 8, 8)

CARD = ModelCard(
    name="mnist",
    digest="d" * 64,
    queue="ddpm",
    shape=(1, 8, 8),
    betas=tuple(np.linspace(1e-4, 0.02, 1000).tolist()),
    class_names=tuple("0123456789"),
    null_label=10,
    samplers={
        "ddpm": SamplerTraits(options=("variance",)),
        "ddim": SamplerTraits(options=("eta",)),
        "dpmpp_2m": SamplerTraits(),
        "langevin": SamplerTraits(corrector_only=True, least=200),
    },
    presets={"fast": Preset(sampler="ddim", steps=20, spacing="uniform")},
    parameters=1_000,
)


@contextlib.contextmanager
def serving(
    settings: Settings, *, app: FastAPI | None = None, **options: Any
) -> Iterator[httpx.Client]:
    """A client of a server that runs while the block does.

    app: the one to run, else one of these settings. options: uvicorn's.
    """
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = configured(
        app or create_app(settings), log_level="warning", timeout_graceful_shutdown=2, **options
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(START_TIMEOUT)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture
def serve(redis_url: str) -> Iterator[Callable[..., httpx.Client]]:
    """Start a server with settings of the test's own."""
    with contextlib.ExitStack() as stack:

        def start(**settings: Any) -> httpx.Client:
            server: AbstractContextManager[httpx.Client] = serving(
                Settings(redis_url=redis_url, janitor_s=0.5, **settings)
            )
            return stack.enter_context(server)

        yield start


@pytest.fixture
def store(redis_url: str) -> Iterator[JobStore]:
    """The worker's side, with one model known."""
    store = JobStore.connect(Settings(redis_url=redis_url))
    store.publish_card(CARD)
    yield store
    store.redis.close()


@pytest.fixture(scope="module")
def shared_server(redis_server: str) -> Iterator[httpx.Client]:
    """One server with default settings for all tests of a file that need no other.

    It ends with them: its janitor would go on among the records of other tests.
    """
    with serving(Settings(redis_url=redis_server, janitor_s=0.5)) as client:
        yield client


@pytest.fixture
def client(store: JobStore, shared_server: httpx.Client) -> httpx.Client:
    """The shared server, on an empty Redis with one model."""
    return shared_server


PROVENANCE = {"versions": {"torch": "2.13"}}


class Worker:
    """What a worker does to the store, step by step, as a test says."""

    def __init__(self, store: JobStore) -> None:
        self.store = store

    def start(self, job_id: str, execution: str = "e") -> Started:
        started = self.store.start(
            job_id, execution, worker="w", digest=CARD.digest, provenance=PROVENANCE
        )
        assert started is not None
        return started

    def image(self, started: Started, index: int = 0, x: Any = X) -> None:
        batch = self.store.batch()
        batch.image(started.record, "e", index=index, x=x)
        batch.send()

    def snapshot(self, started: Started, t: int, kind: str = "x_t", index: int = 0) -> None:
        batch = self.store.batch()
        batch.snapshot(started.record, "e", t=t, kind=kind, index=index, x=X * (t / 1000))
        batch.send()

    def progress(self, started: Started, done: int, t: int) -> None:
        batch = self.store.batch()
        batch.progress(started.record, "e", done=done, t=t, eta_s=1.0)
        batch.send()

    def finish(self, job_id: str) -> None:
        """Everything from start to success."""
        started = self.start(job_id)
        for index in range(started.record.images):
            self.image(started, index)
        assert self.store.succeed(job_id, "e")


@pytest.fixture
def worker(store: JobStore) -> Worker:
    return Worker(store)


def png(width: int = 8, height: int = 8, mode: str = "L", kind: str = "PNG") -> bytes:
    """A picture file."""
    buffer = io.BytesIO()
    Image.new(mode, (width, height), "white").save(buffer, kind)
    return buffer.getvalue()


def until(condition: Callable[[], Any], *, seconds: float = 60) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def when_queued(client: httpx.Client, call: Callable[[str], object]) -> threading.Thread:
    """Do something to the one job that waits, as soon as there is one, in a thread."""

    def queued() -> list[dict[str, Any]]:
        jobs: list[dict[str, Any]] = client.get("/jobs", params={"status": "queued"}).json()["data"]
        return jobs

    def run() -> None:
        until(queued)
        [job] = queued()
        call(job["id"])

    return later(0, run)


def later(seconds: float, call: Callable[[], object]) -> threading.Thread:
    """Run something a moment later, in a thread that is already started."""

    def run() -> None:
        time.sleep(seconds)
        call()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.fixture
def working(worker: Worker) -> Iterator[None]:
    """A worker that ends every job at once: no stream and no wait lasts."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.005):
            for job_id in worker.store.redis.zrange(keys.by_status("queued"), 0, 50):
                with contextlib.suppress(AssertionError):  # canceled or deleted meanwhile
                    worker.finish(job_id.decode())

    thread = threading.Thread(target=work)
    thread.start()
    yield
    stop.set()
    thread.join()
