"""`ddpm up` whole: Redis, worker and API as processes, a picture, Ctrl-C, and what is kept."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

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
    deadline = time.monotonic() + 60
    while len(family := psutil.Process(process.pid).children(recursive=True)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(family) == 3
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0 and "Error" not in output and "Traceback" not in output
    gone, alive = psutil.wait_procs(family, timeout=30)
    assert not alive and len(gone) == 3


@pytest.mark.timeout(180)
def test_up_serves_stops_and_forgets_nothing(place: Path) -> None:
    with up(place) as (process, client):
        body = {"class_label": 1, "steps": 10, "seed": 4}
        headers = {"Prefer": "wait=30", "Accept": "image/png"}
        png = client.post("/generate", json=body, headers=headers)
        assert png.status_code == 200 and png.content.startswith(b"\x89PNG")
        done = png.headers["location"]
        noise_follows_the_closed_form(client)
        a_running_job_can_be_canceled(client)
        a_stream_can_be_resumed(client)
        long = client.post("/generate", json={"steps": 1000, "num_images": 32}).json()["id"]
        wait_for_status(client, long, "running")
        second = up_in_same_folder(place)
        assert second.returncode == 1 and "uses .ddpm already" in second.stderr
        stop(process)
    with up(place) as (process, client):
        assert client.get(f"{done}/images/0.png").content == png.content
        assert client.post(f"/jobs/{long}/cancel").json()["status"] in ("canceled", "running")
        a_killed_worker_is_started_again(process, client)
        the_api_says_that_redis_is_away_until_it_is_back(process, client)
        a_killed_api_is_started_again(process, client)
        stop(process)
    log = (place / ".ddpm" / "worker-1.log").read_text()
    assert log.count("--- worker 1, ") >= 3  # of both lives of `ddpm up`, nothing cut off


def kill(process: subprocess.Popen[str], part: str, name: str) -> str:
    """kill -9 a part, as early in its life as may be. Returns what `ddpm up` says of it."""
    for child in psutil.Process(process.pid).children():
        if part in " ".join(child.cmdline()):
            child.kill()
    assert process.stdout is not None
    said = ""
    while not said.startswith(f"{name} stopped"):
        said = process.stdout.readline()  # the test's own timeout guards this
    while "starting another" not in said:
        said += process.stdout.readline()
    return said


def a_killed_worker_is_started_again(process: subprocess.Popen[str], client: httpx.Client) -> None:
    said = kill(process, "-m ddpm worker", "worker 1")
    assert said.startswith("worker 1 stopped (signal SIGKILL); see .ddpm/worker-1.log\n")
    assert said.endswith("\n  starting another in 0.5 s\n")
    job = client.post("/generate", json={"steps": 5}).json()["id"]
    wait_for_status(client, job, "succeeded")


def the_api_says_that_redis_is_away_until_it_is_back(
    process: subprocess.Popen[str], client: httpx.Client
) -> None:
    job = client.post("/generate", json={"steps": 300}).json()["id"]
    wait = 0.25
    while True:  # at first it is back before anybody can see that it was away
        said = kill(process, "redis-server", "Redis")
        assert said.startswith("Redis stopped (signal SIGKILL); see .ddpm/redis.log\n")
        wait *= 2
        assert said.endswith(f"\n  starting another in {wait:g} s\n")
        assert client.get("/healthz").status_code == 200
        reply = client.get("/readyz")
        if reply.status_code == 503:
            break
        assert wait < 16
        wait_for_status(client, job, "queued", "running", "succeeded")
    assert reply.json()["code"] == "store_unavailable"
    wait_for_status(client, job, "succeeded")


def a_killed_api_is_started_again(process: subprocess.Popen[str], client: httpx.Client) -> None:
    said = kill(process, "-m ddpm api", "the API")
    assert said.startswith("the API stopped (signal SIGKILL); see .ddpm/api.log\n")
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/readyz").status_code == 200:
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


def noise_follows_the_closed_form(client: httpx.Client) -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    request = {"t": [1, 300, 1000], "kinds": ["x_t", "eps"], "seed": 2}
    files: Any = {"image": ("a.png", buffer.getvalue()), "request": (None, json.dumps(request))}
    job = client.post("/noise", files=files, headers={"Prefer": "wait=30"}).json()
    assert job["status"] == "succeeded" and len(job["snapshots"]) == 6
    x_start = pixels / 127.5 - 1
    arrays = {}
    for snapshot in job["snapshots"]:
        npy = client.get(snapshot["url"].replace(".png", ".npy")).content
        arrays[snapshot["t"], snapshot["kind"]] = np.load(io.BytesIO(npy))[0]
        bar = snapshot["alpha_bar"]
        assert snapshot["snr"] == pytest.approx(bar / (1 - bar))
        if snapshot["kind"] == "x_t":
            expected = np.sqrt(bar) * x_start + np.sqrt(1 - bar) * arrays[snapshot["t"], "eps"]
            np.testing.assert_allclose(arrays[snapshot["t"], "x_t"], expected, atol=1e-5)
    np.testing.assert_array_equal(arrays[1, "eps"], arrays[1000, "eps"])


def a_running_job_can_be_canceled(client: httpx.Client) -> None:
    job_id = client.post("/generate", json={"steps": 1000, "num_images": 32}).json()["id"]
    wait_for_status(client, job_id, "running")
    assert client.post(f"/jobs/{job_id}/cancel").status_code == 200
    job = client.get(f"/jobs/{job_id}", params={"wait": 30}).json()
    assert job["status"] == "canceled"
    assert {snapshot["kind"] for snapshot in job["snapshots"]} == {"x_t", "x_start"}
    assert client.get(job["snapshots"][0]["url"]).status_code == 200


def a_stream_can_be_resumed(client: httpx.Client) -> None:
    body = {"steps": 200, "snapshots": {"every": 50}}
    job_id = client.post("/generate", json=body).json()["id"]
    ids: list[str] = []
    names: list[str] = []
    while not names or names[-1] != "done":
        headers = {"Last-Event-ID": ids[-1]} if ids else {}
        with client.stream("GET", f"/jobs/{job_id}/events", headers=headers) as reply:
            for line in reply.iter_lines():
                field, _, value = line.partition(": ")
                if field == "id":
                    ids.append(value)
                elif field == "event":
                    names.append(value)
                if field == "data" and len(ids) % 20 == 0:
                    break  # the connection is closed with the block
    assert len(set(ids)) == len(ids) == len(names)
    assert names.count("snapshot") == 4 and names.count("image") == 1
    assert "reset" not in names


def up_in_same_folder(place: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("REDIS_URL", None)
    return subprocess.run(
        [sys.executable, "-m", "ddpm", "up", "--port", str(free_port())],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def wait_for_status(client: httpx.Client, job_id: str, *statuses: str) -> None:
    deadline = time.monotonic() + 90
    while client.get(f"/jobs/{job_id}").json()["status"] not in statuses:
        assert time.monotonic() < deadline
        time.sleep(0.05)
