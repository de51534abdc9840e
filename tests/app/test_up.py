"""`ddpm up` whole: Redis, worker and API as processes, a picture, Ctrl-C, and what is kept."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

ROOT = Path(__file__).parents[2]
READY_S = 90.0
MAKE_MODEL = """
import sys, torch, diffusion
from diffusion import Model, ModelConfig, ScheduleConfig, UNet, UNetConfig
network = UNetConfig(image_size=8, in_channels=1, channels=(8, 8), attention=(False, False),
                     res_blocks=1, groups=4, num_classes=2, null_class=True)
config = ModelConfig(network=network, schedule=ScheduleConfig(T=1000))
torch.manual_seed(0)
diffusion.save(Model(config, UNet(network)), sys.argv[1])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models/tiny, made in a process of its own: torch stays out of this one."""
    folder = tmp_path_factory.mktemp("up")
    subprocess.run(
        [sys.executable, "-c", MAKE_MODEL, str(folder / "models" / "tiny")], cwd=ROOT, check=True
    )
    return folder


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def up(place: Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A running `ddpm up`, ready; killed at the end if it still lives."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "DDPM_COMPILE": "0",
        "DDPM_DRAIN_S": "0.5",
    }
    environment.pop("REDIS_URL", None)
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "ddpm", "up", "--port", str(port)],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()  # the test's own timeout guards this
        assert line == (
            f"ddpm serves tiny on http://localhost:{port} (Ctrl-C stops; nothing is lost)\n"
        )
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            yield process, client
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def stop(process: subprocess.Popen[str]) -> None:
    """Ctrl-C; every process of it must be gone, and it must say nothing of errors."""
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 3
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=40)
    assert process.returncode == 0 and "Error" not in output and "Traceback" not in output
    gone, alive = psutil.wait_procs(family, timeout=5)
    assert not alive and len(gone) == 3


@pytest.mark.timeout(180)
def test_up_serves_stops_and_forgets_nothing(place: Path) -> None:
    with up(place) as (process, client):
        body = {"class_label": 1, "steps": 10, "seed": 4}
        headers = {"Prefer": "wait=30", "Accept": "image/png"}
        png = client.post("/generate", json=body, headers=headers)
        assert png.status_code == 200 and png.content.startswith(b"\x89PNG")
        done = png.headers["location"]
        long = client.post("/generate", json={"steps": 1000, "num_images": 32}).json()["id"]
        wait_for_status(client, long, "running")
        second = up_in_same_folder(place)
        assert second.returncode == 1 and "uses .ddpm already" in second.stderr
        stop(process)
    with up(place) as (process, client):
        assert client.get(f"{done}/images/0.png").content == png.content
        assert client.get(f"/jobs/{long}").json()["status"] in ("queued", "running")
        worker = next(p for p in psutil.Process(process.pid).children() if "worker" in p.cmdline())
        worker.kill()  # soon after its start: not replaced, but said in a sentence
        output, _ = process.communicate(timeout=40)
        assert process.returncode == 1
        assert output.startswith("Error: worker 1 stopped (signal SIGKILL); see ")


def up_in_same_folder(place: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("REDIS_URL", None)
    return subprocess.run(
        [sys.executable, "-m", "ddpm", "up", "--port", str(free_port())],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def wait_for_status(client: httpx.Client, job_id: str, status: str) -> None:
    deadline = time.monotonic() + 20
    while client.get(f"/jobs/{job_id}").json()["status"] != status:
        assert time.monotonic() < deadline
        time.sleep(0.05)
