"""No request holds the event loop: whatever a body of up to the limit holds, others are served."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from jobs.outputs import snapshot_name
from jobs.settings import MIB, Settings
from jobs.store import keys
from jobs.store.records import new_id
from jobs.store.writer import JobStore
from tests.app.conftest import Worker, png, serving
from tests.app.loops import Turns, measured

LIMIT = 16 * MIB
LONGEST_S = 0.1
TRIES = 3  # what others do to the caches and the memory may double a turn, now and then
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "multipart/form-data; boundary=b"}


@pytest.fixture(scope="module")
def watched(redis_server: str) -> Iterator[tuple[httpx.Client, Turns]]:
    """A server whose event loop is measured."""
    settings = Settings(redis_url=redis_server, janitor_s=60)
    with measured() as turns, serving(settings, loop="asyncio") as client:
        yield client, turns


def filled(head: bytes, part: bytes, tail: bytes) -> bytes:
    """A body near the limit: one part again and again."""
    return head + part * ((LIMIT - len(head) - len(tail)) // len(part)) + tail


def unknown_keys(count: int) -> bytes:
    return json.dumps({f"k{i}": 1 for i in range(count)}).encode()


BODIES: dict[str, tuple[str, dict[str, str], Callable[[], bytes]]] = {
    "unknown keys, as many as are looked at": ("/generate", JSON, lambda: unknown_keys(11_900)),
    "unknown keys": ("/generate", JSON, lambda: unknown_keys(300_000)),
    "wrong elements": ("/noise", JSON, lambda: b'{"t":[' + b'"a",' * 11_900 + b"1]}"),
    "elements": ("/noise", JSON, lambda: filled(b'{"t":[', b"1,", b"1]}")),
    "objects": ("/generate", JSON, lambda: filled(b'{"provenance":{"a":[', b"{},", b"1]}}")),
    "depth": ("/generate", JSON, lambda: filled(b"", b'{"a":', b"")),
    "digits": ("/generate", JSON, lambda: filled(b'{"seed":', b"9", b"}")),
    "a long key": ("/generate", JSON, lambda: filled(b'{"', b"~", b'":1}')),
    "a long value": ("/generate", JSON, lambda: filled(b'{"model":"', b"a", b'"}')),
    "escapes": ("/generate", JSON, lambda: filled(b'{"model":"', b"\\u00e9", b'"}')),
    "a long picture": ("/noise", JSON, lambda: filled(b'{"t":[1],"images":["', b"A", b'"]}')),
    "not base64": ("/noise", JSON, lambda: filled(b'{"t":[1],"images":["', b"A\\n", b'"]}')),
    "line ends": ("/noise", FORM, lambda: filled(b"--b\r\n", b"\r\n--", b"")),
    "parts": ("/noise", FORM, lambda: filled(b"", b"--b\r\n\r\n\r\n", b"--b--")),
    "a long part header": ("/noise", FORM, lambda: filled(b"--b\r\nA: ", b"a", b"\r\n\r\n")),
    "a picture's tail": (
        "/noise",
        FORM,
        lambda: filled(
            b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + png(),
            b"\r\n-",
            b"\r\n--b--\r\n",
        ),
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_no_body_holds_the_event_loop(
    name: str, store: JobStore, watched: tuple[httpx.Client, Turns]
) -> None:
    client, turns = watched
    path, headers, make = BODIES[name]
    body = make()
    assert len(body) <= LIMIT
    for more in ({}, {"Idempotency-Key": name}):
        found: list[float] = []
        while len(found) < TRIES and not (found and found[-1] < LONGEST_S):
            turns.forget()
            reply = client.post(path, content=body, headers=headers | more)
            assert 400 <= reply.status_code < 500, reply.text[:500]
            assert len(reply.content) < 20_000
            found.append(turns.longest)
        assert found[-1] < LONGEST_S, (found, turns.what)


def test_no_listing_and_no_large_job_holds_the_event_loop(
    store: JobStore, worker: Worker, watched: tuple[httpx.Client, Turns]
) -> None:
    client, turns = watched
    form = {"request": json.dumps({"t": list(range(1, 1001))})}
    job_id = client.post("/noise", files=[("image", png())], data=form).json()["id"]
    record: Any = store.redis.hgetall(keys.job(job_id))
    with store.redis.pipeline() as pipe:
        for _ in range(199):  # more like it
            other = new_id()
            pipe.hset(keys.job(other), mapping={**record, b"id": other})  # type: ignore[arg-type]
            pipe.zadd(keys.JOBS, {other: 0})
        pipe.execute()
    turns.forget()
    assert len(client.get("/jobs?limit=200").json()["data"]) == 200
    assert turns.longest < LONGEST_S, (turns.longest, turns.what)
    worker.start(job_id)
    with store.redis.pipeline() as pipe:
        for t in range(1, 1001):
            entries = {
                snapshot_name(t, kind, i): "{}" for kind in ("x_t", "eps") for i in range(16)
            }
            pipe.hset(keys.index(job_id), mapping=entries)  # type: ignore[arg-type]
        pipe.execute()
    turns.forget()
    assert len(client.get(f"/jobs/{job_id}").json()["snapshots"]) == 32_000
    assert turns.longest < LONGEST_S, (turns.longest, turns.what)


def test_at_most_twenty_errors_are_told(client: httpx.Client) -> None:
    body = {"num_images": 0, **{f"k{i}": 1 for i in range(99)}}
    problem = client.post("/generate", json=body).json()
    assert len(problem["errors"]) == 20
    assert problem["errors"][0]["pointer"] == "/num_images"
    assert "80 more errors" in problem["detail"]
    few = client.post("/generate", json={"a": 1, "b": 1}).json()
    assert [error["pointer"] for error in few["errors"]] == ["/a", "/b"]
    assert "more" not in few["detail"]


def test_an_element_stands_for_its_list(client: httpx.Client) -> None:
    problem = client.post("/generate", json={"snapshots": {"at": [0]}}).json()
    assert [error["pointer"] for error in problem["errors"]] == ["/snapshots/at/0"]


def test_what_an_error_repeats_is_short(client: httpx.Client) -> None:
    for body in ({"k" * 50_000: 1}, {"model": "m" * 50_000}, {"seed": "s" * 50_000}):
        reply = client.post("/generate", json=body)
        assert reply.status_code == 422 and len(reply.content) < 10_000, body
        assert "…" in reply.json()["errors"][0]["detail" if "k" * 50_000 not in body else "pointer"]
