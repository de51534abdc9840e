"""`ddpm api` and `ddpm up` as processes, and the one clear sentence where they cannot start."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.up import embedded_redis, running
from jobs.store.writer import JobStore

ROOT = Path(__file__).parents[2]


def ddpm(*arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ddpm", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def taken() -> Iterator[str]:
    """A port that something listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield str(listener.getsockname()[1])


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """What looks like a folder with a model."""
    (tmp_path / "models" / "m").mkdir(parents=True)
    (tmp_path / "models" / "m" / "config.json").write_text("{}")
    return tmp_path / "models"


@pytest.mark.parametrize("command", ["api", "up"])
def test_a_port_in_use(command: str, taken: str) -> None:
    ended = ddpm(command, "--port", taken)
    assert ended.returncode == 1
    expected = f"Error: port {taken} of 127.0.0.1 is in use: choose another with --port\n"
    assert ended.stderr == expected


@pytest.mark.parametrize("command", ["api", "up"])
def test_a_public_address_without_keys(command: str) -> None:
    ended = ddpm(command, "--host", "0.0.0.0", "--port", "0")
    assert ended.returncode == 1 and "set DDPM_API_KEYS" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_an_address_that_is_not_ours() -> None:
    """Which is not to be called a port in use."""
    ended = ddpm("up", "--host", "203.0.113.1", "--port", "80", DDPM_API_KEYS="k")
    assert ended.returncode == 1
    said = "Error: --host 203.0.113.1 --port 80: Cannot assign requested address\n"
    assert ended.stderr == said


@pytest.mark.parametrize("command", ["api", "up", "worker"])
@pytest.mark.parametrize(
    ("variable", "value"), [("DDPM_MAX_IMAGES", "many"), ("REDIS_URL", "localhost:6379")]
)
def test_a_setting_that_is_wrong(command: str, variable: str, value: str) -> None:
    ended = ddpm(command, cwd=ROOT, **{variable: value})
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"Error: {variable} = {value!r}: ")
    assert len(ended.stderr.splitlines()) == 1


def test_no_models(tmp_path: Path) -> None:
    missing = ddpm("up", "--port", "0", cwd=tmp_path)
    assert missing.returncode == 1 and "there is no such folder" in missing.stderr
    (tmp_path / "models").mkdir()
    empty = ddpm("up", "--port", "0", cwd=tmp_path)
    assert empty.returncode == 1 and "no model in it" in empty.stderr
    assert len(empty.stderr.splitlines()) == 1


def test_models_that_cannot_be_served(models: Path) -> None:
    ended = ddpm("up", "--port", "0", cwd=models.parent)
    assert ended.returncode == 1
    said, *log = ended.stderr.splitlines()
    assert said == (
        "Error: DDPM_MODELS = models: no model in it can be served; see .ddpm/worker-1.log"
    )
    assert any("model m cannot be served" in line for line in log)


def test_env_where_nothing_runs(tmp_path: Path) -> None:
    ended = ddpm("env", cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr == "Error: no `ddpm up` runs with its data in .ddpm\n"
    # What one that was killed has left behind is not taken for one that runs.
    (tmp_path / ".ddpm").mkdir()
    running.write(tmp_path / ".ddpm", "unix:///nowhere.sock")
    (tmp_path / ".ddpm" / "lock").touch()
    assert ddpm("env", cwd=tmp_path).stderr == ended.stderr


def test_a_variable_that_is_no_setting_is_warned_of() -> None:
    ended = ddpm("worker", DDPM_MAX_IMAGE="8", DDPM_MAX_IMAGES="many")
    warning, error = ended.stderr.splitlines()
    assert warning == "warning: DDPM_MAX_IMAGE is no setting; did you mean DDPM_MAX_IMAGES?"
    assert error.startswith("Error: DDPM_MAX_IMAGES = ")


def test_a_redis_url_where_nothing_is(models: Path) -> None:
    url = "redis://127.0.0.1:1/0"
    ended = ddpm("up", "--port", "0", cwd=models.parent, REDIS_URL=url)
    assert ended.returncode == 1
    assert ended.stderr == f"Error: REDIS_URL = {url}: no Redis answers there\n"


@pytest.mark.parametrize("last_line", ["retry: 1000", 'data: {"status":"queued"}'])
def test_api_serves_until_sigterm_and_ends_streams(
    redis_url: str, store: JobStore, last_line: str
) -> None:
    """Told to stop while a stream is just beginning, and while it waits for events."""
    with subprocess.Popen(
        [sys.executable, "-m", "ddpm", "api", "--port", "0"],
        cwd=ROOT,
        env={**os.environ, "REDIS_URL": redis_url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        found = re.search(r"http://\S+:\d+", process.stdout.readline())
        assert found is not None
        try:
            with httpx.Client(base_url=found[0], trust_env=False) as client:
                wait_for(client)
                job_id = client.post("/generate", json={}).json()["id"]
                with client.stream("GET", f"/jobs/{job_id}/events") as stream:
                    lines = stream.iter_lines()
                    assert last_line in lines  # reads up to it
                    began = time.monotonic()
                    process.send_signal(signal.SIGTERM)
                    assert not any("event: error" in line for line in lines)
                    assert time.monotonic() - began < 4  # it did not wait for the grace to pass
            process.wait(60)
            told = [json.loads(line) for line in process.stderr]
            # The log is written a little later than it is said, but not later than the end.
            assert f"/jobs/{job_id}/events" in [line.get("path") for line in told]
        finally:
            process.kill()


def wait_for(client: httpx.Client) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            client.get("/healthz")
            return
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_embedded_redis_keeps_its_data(tmp_path: Path) -> None:
    import redis

    socket = embedded_redis.socket_path(tmp_path)
    url = f"unix://{socket}"
    for expected in (None, b"1"):
        child = embedded_redis.spawn(tmp_path, socket)
        try:
            embedded_redis.wait_for(child, url)
            with redis.Redis.from_url(url) as client:
                assert client.get("kept") == expected
                client.set("kept", "1")
                assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
                assert (tmp_path / "redis.sock").stat().st_mode & 0o077 == 0
        finally:
            child.stop(10)


def test_a_folder_with_a_long_path_gets_a_short_socket(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 120)
    deep.mkdir()
    assert len(str(embedded_redis.socket_path(deep))) < 100
