"""A real Redis that is out of memory, read-only, cannot save, is busy, or comes back empty."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from redis.exceptions import RedisError
from rq import Worker

import jobs.store.connections
from jobs.settings import Settings
from jobs.store.connections import SOCKET_S, connect
from jobs.store.trouble import CODES, trouble_of
from tests.app.conftest import serving
from tests.worker.conftest import Service, redis_process


@contextlib.contextmanager
def out_of_memory(server: redis.Redis, folder: Path) -> Iterator[None]:
    server.config_set("maxmemory", 1)
    yield
    server.config_set("maxmemory", 0)


@contextlib.contextmanager
def read_only(server: redis.Redis, folder: Path) -> Iterator[None]:
    server.replicaof("127.0.0.1", "1")
    yield
    server.replicaof("NO", "ONE")


@contextlib.contextmanager
def unable_to_save(server: redis.Redis, folder: Path) -> Iterator[None]:
    """A folder stands where the file should be: true even for root, unlike permissions."""
    (folder / "dump.rdb").mkdir()
    server.config_set("save", "3600 1")
    server.bgsave()
    deadline = time.monotonic() + 30
    while server.info("persistence")["rdb_last_bgsave_status"] != "err":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield
    server.config_set("save", "")
    (folder / "dump.rdb").rmdir()


@contextlib.contextmanager
def busy(server: redis.Redis, folder: Path) -> Iterator[None]:
    server.config_set("lua-time-limit", 50)

    def spin() -> None:
        with contextlib.suppress(RedisError), connect(Settings(redis_url=url(folder))) as other:
            other.eval("while true do end", 0)

    thread = threading.Thread(target=spin)
    thread.start()
    time.sleep(0.2)
    yield
    server.script_kill()
    thread.join()


TROUBLES = {
    "store_full": out_of_memory,
    "store_read_only": read_only,
    "store_cannot_save": unable_to_save,
    "store_busy": busy,
}


def url(folder: Path) -> str:
    return f"unix://{folder / 'redis.sock'}"


@pytest.fixture(scope="module")
def troubled(
    own_redis: Callable[..., tuple[str, Any]],
    model_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Service]:
    """A worker on a Redis that is about to have troubles."""
    address, _ = own_redis("troubled")
    log = tmp_path_factory.mktemp("log") / "log"
    service = Service(address, model_folder, log)
    service.worker()
    yield service
    service.close()


def folder_of(service: Service) -> Path:
    return Path(service.url.removeprefix("unix://")).parent


def test_every_trouble_is_named(troubled: Service) -> None:
    """By plain commands, scripts and transactions alike."""
    server, folder = troubled.redis, folder_of(troubled)
    card = troubled.card.model_copy(update={"name": "other"})
    acts: list[Callable[[], Any]] = [
        lambda: server.set("x", 1),
        lambda: troubled.admit(steps=2),
        lambda: troubled.store.publish_card(card),
        lambda: server.eval("redis.call('SET', 'x', 1)", 0),
    ]
    for code, trouble in TROUBLES.items():
        with trouble(server, folder):
            for act in acts:
                with pytest.raises(RedisError) as found:
                    act()
                named = trouble_of(found.value)
                assert named is not None and named.code == code, found.value
    assert set(TROUBLES) < set(CODES)
    with pytest.raises(RedisError) as found:
        server.eval("return redis.call('INCR', KEYS[1])", 1, "ddpm:models")
    assert trouble_of(found.value) is None  # of what it holds, not of how it fares


def test_a_worker_waits_for_the_end_of_every_trouble(troubled: Service) -> None:
    server, folder = troubled.redis, folder_of(troubled)
    [worker] = troubled.processes
    for trouble in TROUBLES.values():
        running_job = troubled.admit(steps=1000, num_images=16, corrector_steps=9)
        troubled.until(partial(lambda i: troubled.record(i).done > 0, running_job))
        with trouble(server, folder):
            time.sleep(3.5)  # longer than between two of its duties
            assert worker.poll() is None
        troubled.store.cancel(running_job)
        troubled.ended(running_job, "canceled")
        troubled.ended(troubled.admit(steps=2))
        assert worker.poll() is None


def test_a_worker_that_starts_into_trouble_waits(service: Service, nursery: Any) -> None:
    def relieve() -> None:
        service.until(
            lambda: service.log.exists() and "used all the memory" in service.log.read_text()
        )
        service.redis.config_set("maxmemory", 0)

    with out_of_memory(service.redis, Path()):
        thread = threading.Thread(target=relieve)
        thread.start()
        worker = nursery.worker(service)
        thread.join()
    assert worker.alive()
    service.ended(service.admit(steps=2))


BETWEEN = """
import pathlib, time
from worker.rq.adapter import EngineWorker
execute, dequeue = EngineWorker.execute_job, EngineWorker.dequeue_job_and_maintain_ttl
ended, idle = (pathlib.Path({folder!r}) / name for name in ("ended", "idle"))
def then_wait(self, job, queue):
    execute(self, job, queue)
    ended.touch()
    while ended.exists():
        time.sleep(0.01)
def say_so(self, *waits):
    if not ended.exists():
        idle.touch()
    return dequeue(self, *waits)
EngineWorker.execute_job = then_wait
EngineWorker.dequeue_job_and_maintain_ttl = say_so
"""


def test_a_redis_that_goes_away_between_two_jobs_is_waited_for(
    own_redis: Callable[..., tuple[str, Any]], model_folder: Path, tmp_path: Path, nursery: Any
) -> None:
    """When RQ itself, with nothing in flight, says that the worker lives."""
    persistent = ("--appendonly", "yes", "--appendfsync", "always")
    address, server = own_redis("between", *persistent)
    service = Service(address, model_folder, tmp_path / "log")
    ended, idle = tmp_path / "ended", tmp_path / "idle"
    try:
        worker = nursery.worker(service, fault=BETWEEN.format(folder=str(tmp_path)))
        job_id = service.admit(steps=2)
        service.until(ended.exists)
        service.ended(job_id)
        server.kill()
        server.wait()
        idle.unlink()
        ended.unlink()
        service.until(lambda: idle.exists() or not worker.alive())
        own_redis("between", *persistent)
        assert worker.alive()
        service.ended(service.admit(steps=2))
    finally:
        service.close()


# One answer of Redis is late, long after the stop and long before all is to be given back.
LATE_ANSWER = """
import time
from redis.exceptions import TimeoutError
from worker.rq import adapter
adapter.RELEASE_S = 0.1
look = adapter.EngineWorker._busy_round
def late_once(self):
    if self._stop_requested and time.monotonic() > self._stop_at + 0.5:
        adapter.EngineWorker._busy_round = look
        raise TimeoutError("one answer was late")
    look(self)
adapter.EngineWorker._busy_round = late_once
"""


def test_one_late_answer_while_work_is_let_end_drops_none(service: Service, nursery: Any) -> None:
    worker = nursery.worker(service, fault=LATE_ANSWER, DDPM_DRAIN_S="60")
    job_id = service.admit(steps=1000, num_images=64, corrector_steps=9)  # does not end by itself
    service.until(lambda: service.record(job_id).done > 0)
    os.kill(worker.pid, signal.SIGTERM)
    service.until(lambda: "one answer was late" in service.log.read_text())
    service.store.cancel(job_id)
    service.ended(job_id, "canceled")
    assert service.rq_status(job_id) == "canceled"
    service.until(lambda: not worker.alive())


@pytest.mark.slow
def test_a_redis_that_reads_its_data_is_named_and_waited_for(
    own_redis: Callable[..., tuple[str, Any]], model_folder: Path, tmp_path: Path, nursery: Any
) -> None:
    address, server = own_redis("loading")
    service = Service(address, model_folder, tmp_path / "log")
    try:
        worker = nursery.worker(service)
        service.ended(service.admit(steps=2))
        # It answers every 2 MiB of what it reads, which is every tenth of a second.
        service.redis.mset(dict.fromkeys(map(str, range(1000)), os.urandom(2**16)))
        service.redis.save()
        server.kill()
        server.wait()
        with serving(Settings(redis_url=address, models=model_folder)) as client:
            server = redis_process(folder_of(service), "--key-load-delay", "3000")
            try:
                service.until(lambda: client.get("/readyz").json().get("code") == "store_loading")
                assert_ready(client)
                service.ended(service.admit(steps=2))
                assert worker.alive()
            finally:
                server.kill()
                server.wait()
    finally:
        service.close()


def test_a_redis_that_comes_back_empty_is_filled_again(troubled: Service) -> None:
    lost = troubled.admit(steps=1000, num_images=64)
    troubled.until(lambda: troubled.record(lost).done > 0)
    troubled.redis.flushall()
    troubled.until(lambda: "tiny" in troubled.store.cards())
    troubled.until(lambda: len(Worker.all(connection=troubled.redis)) == 1)
    assert troubled.redis.smembers("ddpm:queues") == {b"ddpm"}
    assert troubled.store.record(lost) is None
    troubled.ended(troubled.admit(steps=2))


def test_the_api_names_the_trouble_and_is_not_ready(troubled: Service) -> None:
    server, folder = troubled.redis, folder_of(troubled)
    with serving(Settings(redis_url=troubled.url, models=troubled.models)) as client:
        job_id = troubled.admit(steps=2)
        troubled.ended(job_id)
        assert client.get("/readyz").status_code == 200
        for code, trouble in TROUBLES.items():
            with trouble(server, folder):
                replies = [client.get("/readyz"), client.post("/generate", json={"steps": 2})]
            for reply in replies:
                assert (reply.status_code, reply.json()["code"]) == (503, code)
                assert reply.headers["retry-after"] == "5"
            assert_ready(client)
        with read_only(server, folder):
            assert client.get(f"/jobs/{job_id}").json()["status"] == "succeeded"
        with out_of_memory(server, folder):  # room can be made
            assert client.delete(f"/jobs/{job_id}").status_code == 204


def assert_ready(client: httpx.Client) -> None:
    deadline = time.monotonic() + 30
    while client.get("/readyz").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_connection_dropped_without_a_word_hangs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts and never answers: what a lost route or a frozen Redis looks like."""
    monkeypatch.setattr(jobs.store.connections, "SOCKET_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        settings = Settings(redis_url=f"redis://127.0.0.1:{port}/0")
        began = time.monotonic()
        with connect(settings) as connection, pytest.raises(redis.exceptions.TimeoutError):
            connection.ping()
        with serving(settings) as client:
            reply = client.get("/readyz")
            assert (reply.status_code, reply.json()["code"]) == (503, "store_unavailable")
        assert time.monotonic() - began < 30


@pytest.mark.parametrize("name", ["unix", "tcp"])
def test_no_connection_waits_for_ever(name: str, redis_url: str) -> None:
    address = redis_url if name == "unix" else "redis://127.0.0.1:1/0"
    with connect(Settings(redis_url=address)) as connection:
        kwargs = connection.connection_pool.connection_kwargs
    assert kwargs["socket_timeout"] == kwargs["socket_connect_timeout"] == SOCKET_S
    assert kwargs.get("socket_keepalive", False) is (name == "tcp")
