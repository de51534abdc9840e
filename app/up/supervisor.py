"""`ddpm up`: Redis, workers and the API as children, started together and stopped in order.

Before all of it is ready, a child that ends is a fault of the installation: one sentence, and out.
Afterwards each is started again whenever it ends, Redis too, while the others stay: the API says
in the meantime what is away, and jobs wait. Stopping loses nothing: the API takes no more in,
workers hand their jobs back with their state, and Redis has everything on disk.
"""

from __future__ import annotations

import http.client
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO

import redis

from app.up import embedded_redis, running
from app.up.children import Child
from app.up.embedded_redis import RedisUnavailable
from app.up.parts import Part
from jobs.processes import command_of
from jobs.settings import Settings, shown

_READY_S = 180.0  # a large model on a slow disk
_POLL_S = 0.1
_API_GRACE_S = 8.0
_REDIS_GRACE_S = 30.0


class StartFailed(RuntimeError):
    """Something that `ddpm up` needs is not there; the message is one clear sentence."""


class Supervisor:
    """Runs the parts until a signal comes.

    threads: of each worker; None: as many as there are cores. folder: data, logs and sockets
    (.ddpm). say: prints one line.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        address: tuple[str, int],
        workers: int,
        threads: int | None = None,
        folder: Path,
        say: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._host, self._port = address
        self._count = workers
        self._threads = [] if threads is None else ["--threads", str(threads)]
        self._folder = folder
        self._say = say
        self._lock: IO[bytes] | None = None
        self._redis: Part | None = None
        self._api: Part | None = None
        self._workers: list[Part] = []
        self._env: dict[str, str] = {}
        self._stops = 0
        self._began = time.time()

    def run(self) -> None:
        """Start, watch, stop. Raises StartFailed with what went wrong."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        try:
            self._start()
            if self._wait_until_ready():
                self._watch()
        except (RedisUnavailable, running.InUse) as error:
            raise StartFailed(str(error)) from error
        finally:
            self._stop()

    def _on_signal(self, number: int, frame: object) -> None:
        self._stops += 1
        if self._stops > 1:  # impatience: jobs of killed workers go back to the queue by themselves
            for worker in self._workers:
                worker.child.kill()

    def _start(self) -> None:
        check_models(self._settings.models)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = running.hold(self._folder)
        url = self._settings.redis_url
        if "REDIS_URL" not in os.environ:
            socket = embedded_redis.socket_path(self._folder)
            url = f"unix://{socket}"
            self._redis = Part(partial(embedded_redis.spawn, self._folder, socket), self._say)
            embedded_redis.wait_for(self._redis.child, url)
        elif not embedded_redis.answers(url):
            raise StartFailed(f"REDIS_URL = {shown(url)}: no Redis answers there")
        running.write(self._folder, url)
        self._env = {"REDIS_URL": url}
        self._settings = self._settings.model_copy(update={"redis_url": url})
        address = ["--host", self._host, "--port", str(self._port)]
        self._api = self._part("the API", "api", ["api", *address])
        worker = ["worker", *self._threads]
        for i in range(1, self._count + 1):
            self._workers.append(self._part(f"worker {i}", f"worker-{i}", worker))

    def _part(self, name: str, log: str, arguments: list[str]) -> Part:
        def start() -> Child:
            command = command_of("ddpm", *arguments)
            return Child(name, command, log=self._folder / f"{log}.log", env=self._env)

        return Part(start, self._say)

    def _wait_until_ready(self) -> bool:
        """True when everything answers (and was said to), False when a signal came first."""
        deadline = time.monotonic() + _READY_S
        from jobs.store.writer import JobStore  # here: the children load meanwhile

        store = JobStore.connect(self._settings)
        while not self._stops:
            for part in self._parts():
                if not part.child.running:
                    raise StartFailed(part.child.epitaph())
            try:
                alive = [info for info in store.workers() if info.at >= self._began]
            except redis.RedisError:  # one of our own that has just ended is told of above
                alive = []
            served = sorted({name for info in alive for name in info.models})
            if len(alive) >= self._count and not served:
                raise StartFailed(
                    f"DDPM_MODELS = {self._settings.models}: no model in it can be served; "
                    + self._workers[0].child.last_words()
                )
            if len(alive) >= self._count and self._api_answers():
                self._say(self._ready_line(served))
                return True
            if time.monotonic() > deadline:
                raise StartFailed(
                    f"not ready after {_READY_S:.0f} s; the logs are in {self._folder}"
                )
            time.sleep(_POLL_S)
        return False

    def _api_answers(self) -> bool:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)
        connection = http.client.HTTPConnection(host, self._port, timeout=2)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _ready_line(self, names: list[str]) -> str:
        host = "localhost" if self._host in ("127.0.0.1", "0.0.0.0", "::1", "::") else self._host
        where = f"http://{host}:{self._port}"
        return f"ddpm serves {', '.join(names)} on {where} (Ctrl-C stops; nothing is lost)"

    def _watch(self) -> None:
        while not self._stops:
            time.sleep(_POLL_S)
            for part in self._parts():
                if not self._stops:
                    part.keep()

    def _parts(self) -> list[Part]:
        return [part for part in (self._redis, self._api, *self._workers) if part is not None]

    def _stop(self) -> None:
        if self._api is not None:
            self._api.child.stop(_API_GRACE_S)
        for worker in self._workers:
            worker.child.terminate()
        for worker in self._workers:
            worker.child.wait(self._settings.drain_s + _API_GRACE_S)
        if self._redis is not None:
            self._redis.child.stop(_REDIS_GRACE_S)
        if self._lock is not None:
            running.forget(self._folder)
            self._lock.close()


def check_models(folder: Path) -> None:
    """Raise StartFailed unless the folder has at least one checkpoint folder."""
    if not folder.is_dir():
        raise StartFailed(f"DDPM_MODELS = {folder}: there is no such folder")
    marks = ("config.json", "model_index.json")
    if not any((entry / mark).is_file() for entry in folder.iterdir() for mark in marks):
        raise StartFailed(
            f"DDPM_MODELS = {folder}: no model in it (a folder with config.json and weights)"
        )
