"""`ddpm up`: Redis, workers and the API as children, started together and stopped in order.

Stopping loses nothing: the API takes no more in, workers hand their jobs back with their state,
and Redis has everything on disk.
"""

from __future__ import annotations

import fcntl
import http.client
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from app.up import embedded_redis
from app.up.children import Child
from app.up.embedded_redis import RedisUnavailable
from jobs.settings import Settings

_READY_S = 180.0  # a large model on a slow disk
_POLL_S = 0.1
_SOON_S = 20.0  # a child that lives no longer than this after a restart is not restarted again
_API_GRACE_S = 8.0
_REDIS_GRACE_S = 30.0


class StartFailed(RuntimeError):
    """Something that `ddpm up` needs is not there; the message is one clear sentence."""


class Supervisor:
    """Runs the parts until a signal comes or one of them cannot be kept alive.

    folder: data, logs and sockets (.ddpm). say: prints one line.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        address: tuple[str, int],
        workers: int,
        folder: Path,
        say: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._host, self._port = address
        self._count = workers
        self._folder = folder
        self._say = say
        self._lock: IO[bytes] | None = None
        self._redis: Child | None = None
        self._api: Child | None = None
        self._workers: list[Child] = []
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
        except RedisUnavailable as error:
            raise StartFailed(str(error)) from error
        finally:
            self._stop()

    def _on_signal(self, number: int, frame: object) -> None:
        self._stops += 1
        if self._stops > 1:  # impatience: jobs of killed workers go back to the queue by themselves
            for worker in self._workers:
                worker.kill()

    def _start(self) -> None:
        check_models(self._settings.models)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self._folder)
        url = self._settings.redis_url
        if "REDIS_URL" not in os.environ:
            self._redis, url = embedded_redis.start(self._folder)
        elif not embedded_redis.answers(url):
            raise StartFailed(f"REDIS_URL = {url}: no Redis answers there")
        self._env = {"REDIS_URL": url}
        self._settings = self._settings.model_copy(update={"redis_url": url})
        self._api = self._start_api()
        self._workers = [self._start_worker(i) for i in range(self._count)]

    def _start_api(self) -> Child:
        address = ["--host", self._host, "--port", str(self._port)]
        return self._child("the API", "api", ["api", *address])

    def _start_worker(self, i: int) -> Child:
        return self._child(f"worker {i + 1}", f"worker-{i + 1}", ["worker"])

    def _child(self, name: str, log: str, arguments: list[str]) -> Child:
        command = [sys.executable, "-m", "ddpm", *arguments]
        return Child(name, command, log=self._folder / f"{log}.log", env=self._env)

    def _wait_until_ready(self) -> bool:
        """True when everything answers (and was said to), False when a signal came first."""
        deadline = time.monotonic() + _READY_S
        from jobs.store.writer import JobStore  # here: the children load meanwhile

        store = JobStore.connect(self._settings)
        while not self._stops:
            for child in self._children():
                if not child.running:
                    raise StartFailed(child.epitaph())
            alive = [info for info in store.workers() if info.at >= self._began]
            served = sorted({name for info in alive for name in info.models})
            if len(alive) >= self._count and not served:
                raise StartFailed(
                    f"DDPM_MODELS = {self._settings.models}: no model in it can be served; "
                    + self._workers[0].last_words()
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
            for child in self._children():
                if not child.running and not self._stops:
                    self._replace(child)

    def _replace(self, child: Child) -> None:
        """Start a dead child again; StartFailed where that will not help."""
        if child is self._redis or time.monotonic() - child.started < _SOON_S:
            raise StartFailed(child.epitaph())
        self._say(f"{child.epitaph()}\n  starting another")
        if child is self._api:
            self._api = self._start_api()
        else:
            i = self._workers.index(child)
            self._workers[i] = self._start_worker(i)

    def _children(self) -> list[Child]:
        return [child for child in (self._redis, self._api, *self._workers) if child is not None]

    def _stop(self) -> None:
        if self._api is not None:
            self._api.stop(_API_GRACE_S)
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            worker.wait(self._settings.drain_s + _API_GRACE_S)
        if self._redis is not None:
            self._redis.stop(_REDIS_GRACE_S)
        if self._lock is not None:
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


def lock(folder: Path) -> IO[bytes]:
    """Hold the folder for this process. Raises StartFailed if another has it."""
    held = (folder / "lock").open("wb")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        held.close()
        raise StartFailed(f"another `ddpm up` uses {folder} already") from error
    return held
