"""`ddpm doctor`: with nothing there, with everything there, and with what is wrong."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result
from redis import Redis

from app.commands import doctor
from jobs.store.workers import WorkerInfo
from jobs.store.writer import JobStore
from jobs.version import VERSION
from tests.house import ROOT


def run(tmp_path: Path, port: int = 1) -> Result:
    return CliRunner().invoke(doctor, ["--data", str(tmp_path / ".ddpm"), "--port", str(port)])


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_MODELS", str(ROOT / "models"))


def test_with_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("REDIS_URL", f"redis://:secret@127.0.0.1:{port}/0")
    monkeypatch.setenv("DDPM_MODELS", str(tmp_path / "none"))
    result = run(tmp_path, port)
    assert result.exit_code == 1
    assert f"ok       ddpm-serve: {VERSION}, Python 3." in result.output
    assert f"WRONG    Redis: redis://:***@127.0.0.1:{port}/0 (REDIS_URL): " in result.output
    assert "`ddpm up` starts one" in result.output and "secret" not in result.output
    assert "none: no such folder (DDPM_MODELS)" in result.output
    assert f"ok       port: {port} is free" in result.output
    assert "GiB free for data" in result.output and "cores, load" in result.output


def test_with_everything_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    redis_url: str,
    serve: Callable[..., httpx.Client],
    store: JobStore,
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    store.heartbeat(WorkerInfo("ddpm.one", "ddpm", ("mnist",)), {"mnist": 100.0})
    url = serve().base_url
    result = run(tmp_path, url.port or 0)
    assert result.exit_code == 0, result.output
    assert "ok       worker: ddpm.one on cpu, queue ddpm: mnist" in result.output
    assert f"ok       API: {VERSION} answers on http://127.0.0.1:{url.port} and is ready" in (
        result.output
    )
    assert "appendonly is off" in result.output  # the Redis of these tests keeps nothing
    assert "ok       models: " in result.output and "mnist" in result.output


def test_what_waits_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redis_url: str, store: JobStore
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    old = WorkerInfo("ddpm.dead", "ddpm", ("mnist",), at=time.time() - 1000)
    store.heartbeat(old, {})
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    assert "workers: none lives: jobs are taken in and wait" in result.output
    assert "mnist was published, and no worker that lives has it" in result.output
    with Redis.from_url(redis_url) as redis:
        redis.config_set("maxmemory", 10**9)
        redis.config_set("maxmemory-policy", "allkeys-lru")
        try:
            assert "WRONG    Redis memory: maxmemory-policy allkeys-lru" in run(tmp_path).output
        finally:
            redis.config_set("maxmemory", 0)
            redis.config_set("maxmemory-policy", "noeviction")


def test_a_port_that_something_else_has(tmp_path: Path, redis_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(30)

        def answer() -> None:
            near, _ = other.accept()
            near.recv(4096)
            near.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            near.close()

        thread = threading.Thread(target=answer)
        thread.start()
        port = other.getsockname()[1]
        result = run(tmp_path, port)
        thread.join()
    assert f"warning  port: {port} is taken by something else" in result.output


def test_a_service_that_does_not_say_whether_it_is_ready(tmp_path: Path, redis_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)

        def answer() -> None:
            said = b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{"version": "1"}'
            for reply in (said, b""):
                near, _ = server.accept()
                near.recv(4096)
                near.sendall(reply)
                near.close()

        thread = threading.Thread(target=answer)
        thread.start()
        result = run(tmp_path, server.getsockname()[1])
        thread.join()
    assert "WRONG    API: 1 answers on" in result.output
    assert "but not whether it is ready" in result.output
