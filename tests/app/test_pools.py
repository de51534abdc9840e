"""What is slow for one purpose makes no other one wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI

from app.main import create_app
from app.pools import Pool
from jobs.settings import Settings
from jobs.store.writer import JobStore
from tests.app.conftest import Worker, png, serving, until

PREVIEWS = {"snapshots": {"every": 10, "preview_px": 128}}


@pytest.fixture
def app(redis_url: str) -> FastAPI:
    return create_app(Settings(redis_url=redis_url, janitor_s=0.5))


@pytest.fixture
def client(app: FastAPI, store: JobStore) -> Iterator[httpx.Client]:
    with serving(store.settings, app=app) as client:
        yield client


class Held:
    """All threads of a pool, and more calls than it has threads, held until `let_go`."""

    def __init__(self, pool: Pool) -> None:
        self._event = threading.Event()
        self._calls = [pool._threads.submit(self._event.wait) for _ in range(40)]

    def let_go(self) -> None:
        self._event.set()
        for call in self._calls:
            call.result()


def test_a_cancel_waits_for_no_picture(app: FastAPI, client: httpx.Client, worker: Worker) -> None:
    done, waiting = (client.post("/generate", json={}).json()["id"] for _ in range(2))
    worker.finish(done)
    pools = app.state.services.pools
    held = [Held(pools.encoding), Held(pools.decoding)]
    try:
        with pytest.raises(httpx.ReadTimeout):
            client.get(f"/jobs/{done}/images/0.png", timeout=0.3)
        with pytest.raises(httpx.ReadTimeout):
            client.post(
                "/noise", files={"image": png()}, data={"request": '{"t":[1]}'}, timeout=0.3
            )
        canceled = client.post(f"/jobs/{waiting}/cancel", timeout=20)
        assert canceled.json()["status"] == "canceled"
        assert client.delete(f"/jobs/{waiting}", timeout=20).status_code == 204
        assert client.post("/generate", json={}, timeout=20).status_code == 202
    finally:
        for pool in held:
            pool.let_go()
    assert client.get(f"/jobs/{done}/images/0.png").status_code == 200


def test_previews_are_encoded_once_for_all_who_watch_and_hold_up_nobody(
    client: httpx.Client, worker: Worker
) -> None:
    job_id = client.post("/generate", json=PREVIEWS).json()["id"]
    started = worker.start(job_id)
    streams: list[list[str]] = [[] for _ in range(40)]

    def watch(lines: list[str]) -> None:
        with client.stream("GET", f"/jobs/{job_id}/events") as reply:
            lines += [line for line in reply.iter_lines() if '"png"' in line]

    viewers = [threading.Thread(target=watch, args=(lines,)) for lines in streams]
    for viewer in viewers:
        viewer.start()
    until(lambda: "ddpm_event_streams 40.0" in client.get("/metrics").text)
    for t in (901, 801, 701):
        worker.snapshot(started, t)
        time.sleep(0.05)
        waiting = client.post("/generate", json={}, timeout=8).json()["id"]
        assert client.post(f"/jobs/{waiting}/cancel", timeout=8).json()["status"] == "canceled"
    worker.store.fail(job_id, "e", code="worker_error", detail="enough")
    for viewer in viewers:
        viewer.join()
    assert all(len(lines) == 3 for lines in streams)
    assert all(lines == streams[0] for lines in streams)
    assert "ddpm_previews_total 3.0" in client.get("/metrics").text
    late: list[str] = []
    watch(late)
    assert late == streams[0]
    assert "ddpm_previews_total 3.0" in client.get("/metrics").text


def test_a_small_picture_waits_for_none_of_many_large_ones(client: httpx.Client) -> None:
    """Requests take turns picture by picture, so the small one is answered before any large one."""
    large = [("image", png(2000, 2000))] * 12
    form = {"request": '{"t": [1], "fit": "resize"}'}
    ended: list[str] = []

    def post(name: str, files: list[tuple[str, bytes]]) -> None:
        assert client.post("/noise", files=files, data=form).status_code == 202
        ended.append(name)

    threads = [threading.Thread(target=post, args=(f"large {i}", large)) for i in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    post("small", [("image", png())])
    for thread in threads:
        thread.join()
    assert ended[0] == "small" and len(ended) == 4
