from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from PIL import Image
from redis import Redis
from redis.exceptions import BusyLoadingError, ConnectionError

from jobs.settings import Settings
from jobs.store import keys
from jobs.store.hub import EventHub
from jobs.store.writer import JobStore
from tests.app.conftest import CARD, Worker, later, serving, until
from tests.conftest import redis_executable


class Event(NamedTuple):
    id: str | None
    name: str
    data: Any


def read(lines: Iterator[str]) -> Iterator[Event]:
    """Events of a stream; comments as events of that name."""
    fields: dict[str, str] = {}
    for line in lines:
        if line.startswith(":"):
            yield Event(None, "comment", line)
        elif line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "event" in fields:
            yield Event(fields.get("id"), fields["event"], json.loads(fields["data"]))
            fields = {}
        else:
            fields = {}


def stream(client: httpx.Client, job_id: str, after: str | None = None, **params: Any) -> Any:
    headers = {} if after is None else {"Last-Event-ID": after}
    return client.stream("GET", f"/jobs/{job_id}/events", headers=headers, params=params)


def everything(client: httpx.Client, job_id: str, after: str | None = None) -> list[Event]:
    with stream(client, job_id, after) as reply:
        assert reply.status_code == 200
        return [event for event in read(reply.iter_lines()) if event.name != "comment"]


def submit(client: httpx.Client, **body: object) -> str:
    job_id: str = client.post("/generate", json=body).json()["id"]
    return job_id


def test_a_stream_from_beginning_to_end(client: httpx.Client, worker: Worker) -> None:
    job_id = submit(client, steps=4)

    def work() -> None:
        started = worker.start(job_id)
        for done, t in ((1, 1000), (2, 667)):
            worker.progress(started, done, t)
            worker.snapshot(started, t)
        worker.image(started)
        worker.store.succeed(job_id, "e")

    thread = later(0.3, work)
    with stream(client, job_id) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["x-accel-buffering"] == "no"
        assert reply.headers["cache-control"] == "no-store"
        events = list(read(reply.iter_lines()))
    thread.join()
    assert [e.name for e in events] == [
        "status", "status", "progress", "snapshot", "progress", "snapshot", "image",
        "status", "done",
    ]  # fmt: skip
    assert events[2].data == {"step": 1, "total": 4, "t": 1000, "eta_s": 1.0}
    url = f"/jobs/{job_id}/snapshots/667/0.png?kind=x_t"
    assert events[5].data == {"t": 667, "index": 0, "kind": "x_t", "url": url}
    assert client.get(events[6].data["url"]).status_code == 200
    assert events[-1].data == {"status": "succeeded"}
    ids = [e.id for e in events]
    assert len(set(ids)) == len(ids) and None not in ids


def test_reconnecting_loses_and_repeats_nothing(client: httpx.Client, worker: Worker) -> None:
    job_id = submit(client, steps=100)
    started = worker.start(job_id)

    def work() -> None:
        for done in range(1, 101):
            worker.progress(started, done, 1001 - 10 * done)
            time.sleep(0.002)
        worker.store.succeed(job_id, "e")

    thread = later(0.0, work)
    steps: list[int] = []
    last: str | None = None
    ended = False
    while not ended:
        with stream(client, job_id, last) as reply:
            for count, event in enumerate(read(reply.iter_lines())):
                last = event.id or last
                if event.name == "progress":
                    steps.append(event.data["step"])
                ended = event.name == "done"
                if count == 12:
                    break
    thread.join()
    assert steps == list(range(1, 101))
    with stream(client, job_id, last) as reply:
        assert reply.status_code == 204
    with stream(client, job_id, None, lastEventId=last) as reply:
        assert reply.status_code == 204


def test_many_streams_of_many_jobs(client: httpx.Client, worker: Worker) -> None:
    ids = [submit(client, steps=10) for _ in range(3)]
    seen: list[list[str]] = []
    threads = [
        later(0, partial(lambda i: seen.append([e.name for e in everything(client, i)]), job_id))
        for job_id in ids * 4
    ]
    until(lambda: open_streams(client) == 12)
    for job_id in ids:
        worker.finish(job_id)
    for thread in threads:
        thread.join()
    assert seen == [["status", "status", "image", "status", "done"]] * 12


def open_streams(client: httpx.Client) -> float:
    [line] = [
        line
        for line in client.get("/metrics").text.splitlines()
        if line.startswith("ddpm_event_streams ")
    ]
    return float(line.split()[1])


def test_failure_and_cancel_close_a_stream(client: httpx.Client, worker: Worker) -> None:
    failing, canceled = submit(client), submit(client)
    worker.start(failing)
    worker.store.fail(failing, "e", code="worker_error", detail="it broke")
    error = everything(client, failing)[-1]
    assert error.name == "error"
    assert error.data == {"code": "worker_error", "detail": "it broke", "status": "failed"}
    client.post(f"/jobs/{canceled}/cancel")
    assert everything(client, canceled)[-1].data == {"status": "canceled"}


def test_a_trimmed_stream_resets(client: httpx.Client, store: JobStore, worker: Worker) -> None:
    job_id = submit(client, steps=10)
    started = worker.start(job_id)
    first = everything_so_far(store, job_id)[0]
    worker.progress(started, 5, 500)
    worker.image(started)
    store.redis.xtrim(keys.events(job_id), maxlen=1, approximate=False)
    newest = everything_so_far(store, job_id)[-1]
    for after in (first, None, "0-0", "nonsense", "99-0"):
        with stream(client, job_id, after) as reply:
            event = next(read(reply.iter_lines()))
        assert event.name == "reset" and event.id == newest, after
        assert event.data["reason"] == "trimmed"
        job = event.data["job"]
        assert job["id"] == job_id and job["progress"]["step"] == 5 and len(job["images"]) == 1
    with stream(client, job_id, newest) as reply:
        worker.store.succeed(job_id, "e")
        assert [e.name for e in read(reply.iter_lines())] == ["status", "done"]


def everything_so_far(store: JobStore, job_id: str) -> list[str]:
    return [entry_id.decode() for entry_id, _ in store.redis.xrange(keys.events(job_id))]


def test_a_stream_that_has_lapsed_still_ends(
    client: httpx.Client, store: JobStore, worker: Worker
) -> None:
    job_id = submit(client)
    worker.finish(job_id)
    store.redis.delete(keys.events(job_id))
    events = everything(client, job_id)
    assert [e.name for e in events] == ["reset", "done"]
    assert events[0].data["job"]["status"] == "succeeded"


def test_a_deleted_job_ends_its_stream(store: JobStore, serve: Callable[..., httpx.Client]) -> None:
    client = serve(sse_comment_s=0.2)
    job_id = submit(client)
    with stream(client, job_id) as reply:
        events = read(reply.iter_lines())
        assert next(events).name == "status"
        assert next(events).name == "comment"
        client.delete(f"/jobs/{job_id}")
        rest = [e for e in events if e.name != "comment"]
    assert [e.name for e in rest] == ["error"] and rest[0].data["code"] == "not_found"


def test_pictures_inside_events(client: httpx.Client, worker: Worker) -> None:
    body = {"steps": 2, "snapshots": {"every": 1, "preview_px": 32}}
    job_id = submit(client, **body)
    started = worker.start(job_id)
    worker.snapshot(started, 1000)
    worker.image(started)
    worker.store.succeed(job_id, "e")

    def sizes(**params: Any) -> dict[str, tuple[int, int] | None]:
        with stream(client, job_id, None, **params) as reply:
            events = list(read(reply.iter_lines()))
        found: dict[str, tuple[int, int] | None] = {}
        for event in events:
            if event.name in ("snapshot", "image"):
                png = event.data.get("png")
                raw = None if png is None else base64.b64decode(png)
                found[event.name] = raw and Image.open(io.BytesIO(raw)).size  # type: ignore[assignment]
        return found

    assert sizes() == {"snapshot": (32, 32), "image": None}
    assert sizes(inline="true") == {"snapshot": (32, 32), "image": (32, 32)}


def test_a_step_that_is_made_again_ends_no_stream(client: httpx.Client, worker: Worker) -> None:
    """As when a worker dies after its last checkpoint: what was told is told once more."""
    job_id = submit(client, steps=2, snapshots={"every": 1})
    started = worker.start(job_id)
    for _ in range(2):
        worker.snapshot(started, 1000)
    worker.image(started)
    worker.store.succeed(job_id, "e")
    with stream(client, job_id, None, inline="true") as reply:
        events = [event for event in read(reply.iter_lines()) if event.name in ("snapshot", "done")]
    assert [event.name for event in events] == ["snapshot", "snapshot", "done"]
    assert events[0].data["png"] == events[1].data["png"] is not None


@pytest.mark.parametrize("ask", [True, False])
def test_only_who_asked_cancels_by_leaving(client: httpx.Client, ask: bool) -> None:
    job_id = submit(client)
    with stream(client, job_id, None, cancel_on_disconnect=ask) as reply:
        next(read(reply.iter_lines()))

    def status() -> str:
        found: str = client.get(f"/jobs/{job_id}").json()["status"]
        return found

    if ask:
        until(lambda: status() == "canceled")
    until(lambda: open_streams(client) == 0)  # the server has seen that nobody listens
    time.sleep(0.3)
    assert status() == ("canceled" if ask else "queued")


def test_leaving_a_held_request_cancels_where_asked(client: httpx.Client) -> None:
    with pytest.raises(httpx.ReadTimeout):
        client.post(
            "/generate",
            json={},
            params={"cancel_on_disconnect": "true"},
            headers={"Prefer": "wait=30"},
            timeout=0.4,
        )
    until(lambda: [job["status"] for job in client.get("/jobs").json()["data"]] == ["canceled"])


def test_head_of_a_stream_ends_and_cancels_nothing(client: httpx.Client) -> None:
    job_id = client.post("/generate", json={}).json()["id"]
    url = f"/jobs/{job_id}/events"
    head = client.head(url, params={"cancel_on_disconnect": True}, timeout=10)
    assert head.headers["content-type"].startswith("text/event-stream") and head.content == b""
    time.sleep(0.3)
    assert client.get(f"/jobs/{job_id}").json()["status"] == "queued"


def test_post_can_stream(client: httpx.Client, worker: Worker) -> None:
    headers = {"Accept": "text/event-stream"}
    with client.stream("POST", "/generate", json={"steps": 3}, headers=headers) as reply:
        assert reply.status_code == 200
        events = read(reply.iter_lines())
        first = next(events)
        assert first.name == "reset" and first.data["reason"] == "new"
        job_id = first.data["job"]["id"]
        assert reply.headers["location"] == f"/jobs/{job_id}"
        worker.finish(job_id)
        assert [e.name for e in events] == ["status", "status", "image", "status", "done"]


class OwnRedis:
    """A Redis of the test's own, which keeps every write and can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.url = f"unix://{folder}/redis.sock"
        self._command = [
            redis_executable(), "--port", "0", "--unixsocket", f"{folder}/redis.sock",
            "--dir", str(folder), "--appendonly", "yes", "--appendfsync", "always", "--save", "",
            "--logfile", f"{folder}/log",
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command)
        with Redis.from_url(self.url) as client:
            until(lambda: answers(client))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except (ConnectionError, BusyLoadingError):
        return False


@pytest.fixture
def own_redis() -> Iterator[OwnRedis]:
    folder = Path(tempfile.mkdtemp(prefix="ddpm-"))  # short: a socket's path has a limit
    redis = OwnRedis(folder)
    yield redis
    redis.kill()
    shutil.rmtree(folder)


def test_an_end_never_overtakes_what_was_told_before(
    own_redis: OwnRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the reader of all streams is behind, as after it lost its connection."""

    async def behind(self: EventHub) -> None:
        await asyncio.sleep(600)

    monkeypatch.setattr(EventHub, "run", behind)
    settings = Settings(redis_url=own_redis.url, janitor_s=60, sse_comment_s=0.3)
    store = JobStore.connect(settings)
    store.publish_card(CARD)
    worker = Worker(store)
    with serving(settings) as client:
        job_id = submit(client, snapshots={"every": 1})
        started = worker.start(job_id)
        found: list[Event] = []
        watcher = threading.Thread(target=lambda: found.extend(everything(client, job_id)))
        watcher.start()
        until(lambda: open_streams(client) == 1)
        worker.snapshot(started, 901)
        worker.image(started)
        assert store.succeed(job_id, "e")
        watcher.join()
        assert [event.id for event in found] == everything_so_far(store, job_id)
        assert found[-1].name == "done" and len(found) == 6
    store.redis.close()


def test_a_stream_outlives_redis(own_redis: OwnRedis) -> None:
    """Killed and started again under an open stream with pictures: no gap, no repeat, no end."""
    settings = Settings(redis_url=own_redis.url, janitor_s=60, sse_comment_s=0.3)
    store = JobStore.connect(settings)
    store.publish_card(CARD)
    worker = Worker(store)
    with serving(settings) as client:
        job_id = submit(client, snapshots={"every": 1, "preview_px": 8})
        started = worker.start(job_id)
        worker.snapshot(started, 901)
        found: list[Event] = []
        watcher = threading.Thread(target=lambda: found.extend(everything(client, job_id)))
        watcher.start()
        until(lambda: open_streams(client) == 1)
        own_redis.kill()
        time.sleep(2)
        own_redis.start()
        worker.snapshot(started, 801)
        worker.image(started)
        assert store.succeed(job_id, "e")
        watcher.join()
        names = [event.name for event in found]
        assert names == ["status", "status", "snapshot", "snapshot", "image", "status", "done"]
        assert all("png" in event.data for event in found if event.name == "snapshot")
        assert [event.id for event in found] == everything_so_far(store, job_id)
    store.redis.close()
