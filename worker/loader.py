"""Loads and prepares models on a thread of its own, so that no heartbeat waits for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from diffusion import Model, cores
from jobs.settings import Settings
from jobs.store.records import JobRecord
from worker.engine.loop import Engine
from worker.kinds.table import FLIGHTS
from worker.models import ModelFolder
from worker.network.networks import Mode

log = logging.getLogger("ddpm.worker")


class Host(Protocol):
    """What the loader works on."""

    engine: Engine
    folder: ModelFolder
    settings: Settings

    def rescan(self) -> None:
        """Look at the folder, load, publish."""


class Loader:
    """Scans of the model folder, one at a time, and the preparation of networks."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._pool = ThreadPoolExecutor(1, "loader", initializer=cores.keep_to_one)
        self._tasks: dict[object, Future[None]] = {}
        self._begun = 0  # scans that have begun
        self._done = 0  # scans that have ended
        self._missed: dict[str, float] = {}  # job → when its model was first missed
        self._last_look: dict[str, int] = {}  # job → scans that had begun when that was too long

    def close(self) -> None:
        """Wait for nothing."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def scan(self) -> None:
        """Look at the folder soon, unless that is under way."""
        self._once("scan", self._scan)

    def is_ready(self, record: JobRecord) -> bool:
        """Whether `begin` need not wait for a model; if it would, what it waits for is under way.

        Also true where it has been waited for as long as `model_wait_s` says. A folder may be
        mounted late: that is not the job's fault.
        """
        served = self._host.folder.served.get(record.model)
        if served is None:
            return self._is_overdue(record.id)
        self.forget(record.id)
        if not record.spec.runs_network:
            return True
        exact, mode = record.spec.deterministic, FLIGHTS[record.spec.kind].mode(record.spec)
        key = (served.model.digest, exact, mode)
        if self._host.engine.networks.is_prepared(served.model, exact=exact, mode=mode):
            self._tasks.pop(key, None)
            return True
        task = self._tasks.get(key)
        if task is not None and task.done():  # it failed: starting the job will say why
            return True
        self._once(key, lambda: self._prepare(served.model, exact=exact, mode=mode))
        return False

    def forget(self, job_id: str) -> None:
        """A job waits no more."""
        self._missed.pop(job_id, None)
        self._last_look.pop(job_id, None)

    def _is_overdue(self, job_id: str) -> bool:
        now = time.monotonic()
        if now - self._missed.setdefault(job_id, now) < self._host.settings.model_wait_s:
            return False
        if self._done <= self._last_look.setdefault(job_id, self._begun):
            self.scan()
            return False
        self.forget(job_id)
        return True

    def _once(self, key: object, work: Callable[[], None]) -> None:
        task = self._tasks.get(key)
        if task is None or task.done():
            self._tasks[key] = self._pool.submit(work)

    def _prepare(self, model: Model, *, exact: bool, mode: Mode) -> None:
        try:
            self._host.engine.networks.prepare(model, exact=exact, mode=mode)
        except Exception:
            log.exception("model %s cannot be prepared", model.digest[:12])

    def _scan(self) -> None:
        self._begun += 1
        try:
            self._host.rescan()
        except Exception:
            log.exception("the model folder cannot be scanned")
        finally:
            self._done = self._begun
