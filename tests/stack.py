"""Workers and APIs as processes of their own, of this version or of another, on one Redis."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from jobs.settings import Settings
from jobs.store.writer import JobStore
from tests.house import ROOT

PATIENCE_S = 120.0


@dataclass(frozen=True)
class Version:
    """What runs: an interpreter, the folder of the code that it finds first, and the module."""

    python: str
    tree: Path
    module: str = "ddpm"


TODAY = Version(sys.executable, ROOT)


class Stack:
    """Processes on one Redis; `close` ends those that still run."""

    def __init__(self, url: str, models: Path, log: Path) -> None:
        self.url, self.models, self.log = url, models, log
        self.settings = Settings(redis_url=url, models=models)
        self.store = JobStore.connect(self.settings)
        self.redis = self.store.redis
        self._processes: list[subprocess.Popen[bytes]] = []
        self._clients: list[httpx.Client] = []

    def run(self, version: Version, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """`ddpm …` of a version."""
        given = {
            **os.environ,
            "REDIS_URL": self.url,
            "DDPM_MODELS": str(self.models),
            "DDPM_COMPILE": "0",
            "DDPM_DTYPE": "float32",
            "OMP_NUM_THREADS": "1",
            "DDPM_JANITOR_S": "0.5",
            **environment,
        }
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [version.python, "-m", version.module, *arguments],
                env=given, stdout=log, stderr=log, cwd=version.tree,
            )  # fmt: skip
        self._processes.append(process)
        return process

    def api(self, version: Version = TODAY, **environment: str) -> httpx.Client:
        """A client of an API that answers."""
        before = len(self.log.read_bytes()) if self.log.exists() else 0
        process = self.run(version, "api", "--port", "0", **environment)

        def address() -> str | None:
            found = re.search(rb"ddpm api: (http://[^,\s]+)", self.log.read_bytes()[before:])
            return found[1].decode() if found else None

        self.until(address, process)
        client = httpx.Client(base_url=address() or "", timeout=60, trust_env=False)
        self._clients.append(client)

        def answers() -> bool:
            try:
                return client.get("/healthz").status_code == 200
            except httpx.HTTPError:
                return False

        self.until(answers, process)
        return client

    def worker(self, version: Version = TODAY, **environment: str) -> subprocess.Popen[bytes]:
        """A worker that has said that it lives."""
        before = {info.name for info in self.store.workers()}
        process = self.run(version, "worker", "--verbose", **environment)
        self.until(lambda: {i.name for i in self.store.workers()} - before, process)
        return process

    def stop(self, process: subprocess.Popen[bytes]) -> int:
        """SIGTERM, and the exit status."""
        process.send_signal(signal.SIGTERM)
        return process.wait(timeout=PATIENCE_S)

    def until(
        self,
        condition: Callable[[], Any],
        process: subprocess.Popen[bytes] | None = None,
        *,
        seconds: float = PATIENCE_S,
    ) -> None:
        """Wait for something to become true; fails if the process ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = process is not None and process.poll() is not None
            if ended or time.monotonic() > deadline:
                said = self.log.read_text(errors="replace")[-4000:]
                pytest.fail(f"waited in vain; the log says:\n{said}")
            time.sleep(0.05)

    def close(self) -> None:
        """End everything."""
        for client in self._clients:
            client.close()
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        self.redis.close()
