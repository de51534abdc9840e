"""Ids and headers that are none: an answer that says so, never an error of ours."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from jobs.outputs import image_name
from jobs.store import keys
from jobs.store.hub import order
from jobs.store.writer import JobStore
from tests.app.conftest import Worker

ROUTES = [
    ("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/events"), ("GET", "/images.zip"),
    ("GET", "/images/0.png"), ("GET", "/grid.png"), ("GET", "/snapshots.gif"),
    ("GET", "/snapshots/1/0.png"),
]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["a b", "é", "*", "%00", "x" * 5000, "{id}:events", "{id}:index", "{ID}", "{id}0"],
)
@pytest.mark.parametrize(("method", "rest"), ROUTES)
def test_an_id_that_is_none_is_not_found(
    client: httpx.Client, method: str, rest: str, name: str
) -> None:
    job_id = client.post("/generate", json={}).json()["id"]
    path = name.replace("{id}", job_id).replace("{ID}", job_id.upper())
    if path == job_id:  # it has no letters
        return
    reply = client.request(method, f"/jobs/{path}{rest}")
    assert reply.status_code == 404 and reply.json()["code"] == "not_found", reply.text
    assert len(reply.content) < 6000
    assert client.get(f"/jobs/{job_id}").status_code == 200


def test_a_source_that_is_no_id_is_not_found(client: httpx.Client) -> None:
    source = {"job": "x:events", "t": 1, "index": 0}
    reply = client.post("/reconstruct", json={"source": source})
    assert reply.status_code in (404, 422)


@pytest.mark.parametrize("digits", ["9" * 5000, "0" * 5000, '"' + "1" * 4400 + '"', "99999999999"])
def test_a_wait_of_many_digits_is_the_longest(
    client: httpx.Client, worker: Worker, digits: str
) -> None:
    job_id = client.post("/generate", json={}, headers={"Idempotency-Key": "k"}).json()["id"]
    worker.finish(job_id)
    headers = {"Prefer": f"wait={digits}", "Idempotency-Key": "k"}
    reply = client.post("/generate", json={}, headers=headers)
    assert reply.status_code == 200 and reply.headers["preference-applied"] == "wait=60"


@pytest.mark.parametrize(
    "last", ["1_0-0", "1-1_0", f"{2**64}-0", f"0-{2**64}", "9" * 5000, "²-0", "-1", "-", "+", "$",
             "1-", "1-1-1", "x"]
)  # fmt: skip
def test_a_last_event_id_that_is_none_begins_with_a_reset(
    client: httpx.Client, worker: Worker, last: str
) -> None:
    job_id = client.post("/generate", json={}).json()["id"]
    worker.finish(job_id)
    headers = {"Last-Event-ID": last.encode("latin-1")}
    with client.stream("GET", f"/jobs/{job_id}/events", headers=headers) as reply:  # type: ignore[arg-type]
        text = reply.read().decode()
    assert "event: reset" in text
    assert "event: done" in text and '"code":"internal"' not in text


def test_what_an_entry_id_is() -> None:
    assert order("5") == (5, 0) and order(f"{2**64 - 1}-{2**64 - 1}") == (2**64 - 1, 2**64 - 1)
    for text in ("1_0-0", f"{2**64}-0", "", "٣-0"):
        with pytest.raises(ValueError, match="no id"):
            order(text)


@pytest.mark.parametrize("damage", [b"three", None])
def test_a_stream_that_cannot_go_on_ends_with_an_error(
    client: httpx.Client, store: JobStore, worker: Worker, damage: Any
) -> None:
    """An output of another length than it should have; an index of another type."""
    job_id = client.post("/generate", json={}).json()["id"]
    worker.finish(job_id)
    if damage:
        store.redis.hset(keys.outputs(job_id), image_name(0), damage)
    else:
        store.redis.delete(keys.outputs(job_id))
        store.redis.set(keys.outputs(job_id), "text")
    with client.stream("GET", f"/jobs/{job_id}/events?inline=true") as reply:
        assert reply.status_code == 200
        text = reply.read().decode()
    assert text.count("event: error") == 1 and text.endswith("\n\n")
    last = text.strip().split("\n\n")[-1]
    assert last.startswith("event: error") and reply.headers["x-request-id"] in last
