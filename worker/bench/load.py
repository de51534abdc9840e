"""The engine and the whole service under full load."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusion.model import Model
from diffusion.samplers import build_table
from jobs.processes import command_of, environment
from worker.engine.loop import Engine
from worker.engine.tasks import Advanced, Event, Finished, Start, Task
from worker.network.networks import Networks

IMAGES, STEPS, CLIENTS = 16, 50, 8  # a job, and how many are under way: 128 chains
_READY_S = 120.0
_NOT_OURS = {"REDIS_URL", "DDPM_API_KEYS", "DDPM_API_KEYS_FILE"}  # of the service that is run here


class LoadError(RuntimeError):
    """The service did not start, or does not answer; the message says why."""


class EngineLoad:
    """The engine alone, its batch held full."""

    def __init__(self, model: Model, networks: Networks) -> None:
        self._model = model
        self._table = build_table(model.schedule, sampler="ddim", steps=STEPS)
        self._engine = Engine(self._take)
        self._engine.networks = networks
        self._numbers = itertools.count()
        self._done: dict[str, int] = {}
        self._feeding = True

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Advanced):
                self._done[event.task_id] = event.done
            elif isinstance(event, Finished) and self._feeding:
                self._feed()

    def _feed(self) -> None:
        number = next(self._numbers)
        labelled = self._model.config.network.num_classes
        starts = tuple(
            Start(i, class_label=i % labelled if labelled else None) for i in range(IMAGES)
        )
        self._engine.submit(Task(str(number), self._model, self._table, number, starts))

    def rate(self, seconds: float) -> float:
        """Image-steps/s, after a quarter of the time; may be asked once."""
        self._engine.start()
        for _ in range(CLIENTS):
            self._feed()
        time.sleep(seconds / 4)
        before, began = sum(self._done.values()), time.perf_counter()
        time.sleep(seconds)
        rate = (sum(self._done.values()) - before) / (time.perf_counter() - began)
        self._feeding = False
        self._engine.stop()
        return rate


@contextmanager
def service(
    folder: Path, models: Path, *, threads: int | None = None, workers: int = 1
) -> Iterator[str]:
    """A `ddpm up` of its own, its files in the folder; gives its address. Raises LoadError."""
    log = folder / "up.log"
    command = command_of("ddpm", "up", "--port", "0", "--data", str(folder / "data"))
    command += ["--workers", str(workers)]
    command += [] if threads is None else ["--threads", str(threads)]
    kept = {name: value for name, value in environment().items() if name not in _NOT_OURS}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**kept, "DDPM_MODELS": str(models)}
        )
    try:
        yield _address(process, log)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        said = log.read_text(encoding="utf-8")
        if found := re.search(r"^ddpm serves .* on (http://\S+)", said, re.MULTILINE):
            return found[1]
        if process.poll() is not None:
            raise LoadError(f"`ddpm up` ended: {said.strip()}")
        time.sleep(0.05)
    raise LoadError(f"`ddpm up` is not ready after {_READY_S:.0f} s: {said.strip()}")


def service_rate(url: str, model: str, seconds: float) -> float:
    """Image-steps/s of a service under full load, after a quarter of the time. Raises LoadError."""
    running = threading.Event()
    running.set()
    errors: list[BaseException] = []

    def client() -> None:
        body = {"model": model, "num_images": IMAGES, "steps": STEPS, "sampler": "ddim"}
        try:
            while running.is_set():
                job = ask(f"{url}/generate", body)
                while job["status"] in ("queued", "running") and running.is_set():
                    job = ask(f"{url}/jobs/{job['id']}?wait=2")
        except (OSError, ValueError, KeyError) as error:
            errors.append(error)

    clients = [threading.Thread(target=client, daemon=True) for _ in range(CLIENTS)]
    for thread in clients:
        thread.start()
    time.sleep(seconds / 4)
    before, began = image_steps(url), time.perf_counter()
    time.sleep(seconds)
    rate = (image_steps(url) - before) / (time.perf_counter() - began)
    running.clear()
    for thread in clients:
        thread.join(30)
    if errors:
        raise LoadError(f"the service does not answer: {errors[0]}")
    return rate


def first_picture(url: str, model: str) -> float:
    """Seconds of the default request, from asking to the picture. Raises LoadError."""
    headers = {"Content-Type": "application/json", "Prefer": "wait=60", "Accept": "image/png"}
    data = json.dumps({"model": model, "seed": 1}).encode()
    request = urllib.request.Request(f"{url}/generate", data=data, headers=headers)
    began = time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=90) as answer:
            answer.read()
    except OSError as error:
        raise LoadError(f"no picture: {error}") from error
    return time.perf_counter() - began


def ask(url: str, body: dict[str, object] | None = None) -> dict[str, str]:
    """The JSON that a GET, or a POST of this body, is answered with. Raises OSError, ValueError."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data=data, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, str] = json.load(answer)
    return found


def image_steps(url: str) -> float:
    """The service's own count of image-steps done."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = re.search(r"^ddpm_image_steps_total (\S+)", text, re.MULTILINE)
    return float(found[1]) if found else 0.0
