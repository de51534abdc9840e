"""POST /likelihood: what is taken in, what is refused, and how its numbers are answered."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from jobs.kinds.common import PRODUCT_COST
from jobs.store.writer import JobStore
from tests.app.conftest import Worker, png

PICTURE = base64.b64encode(png()).decode()
RESULT = {
    "bits_per_dim": 3.0,
    "L_T": 0.5,
    "L_t": 1.5,
    "L_0": 1.0,
    "dims": 64,
    "images": [{"index": 0, "bits_per_dim": 3.0, "L_T": 0.5, "L_t": 1.5, "L_0": 1.0}],
}


def test_cost_and_defaults_are_known_at_once(client: httpx.Client, worker: Worker) -> None:
    job = client.post("/likelihood", json={"images": [PICTURE] * 3}).json()
    asked = job["request"]
    assert (asked["mode"], asked["samples"], asked["variance"]) == ("monte_carlo", 20, "small")
    assert 0 <= asked["seed"] < 2**53 and "images" not in asked
    started = worker.start(job["id"])
    assert started.record.work == 60 and started.record.images == 3
    full = client.post("/likelihood", json={"images": [PICTURE], "mode": "full"}).json()
    assert worker.start(full["id"]).record.work == 1000
    flow = client.post("/likelihood", json={"images": [PICTURE] * 2, "mode": "flow"}).json()
    asked = flow["request"]
    assert (asked["draws"], asked["steps"]) == (4, 100)
    assert asked["samples"] is None and asked["variance"] is None
    assert worker.start(flow["id"]).record.work == 2 * 4 * 101 * (2 + PRODUCT_COST)


def test_the_numbers_are_in_the_job_but_not_in_listings(
    client: httpx.Client, worker: Worker
) -> None:
    job = client.post("/likelihood", json={"images": [PICTURE]}).json()
    worker.start(job["id"])
    assert worker.store.succeed(job["id"], "e", result=RESULT)
    assert client.get(job["urls"]["self"]).json()["result"] == RESULT
    assert not {"images", "grid"} & set(job["urls"])
    [listed] = client.get("/jobs").json()["data"]
    assert "result" not in listed and listed["kind"] == "likelihood"


@pytest.mark.parametrize(
    ("body", "pointer", "says"),
    [
        ({"images": []}, "/images", "at least one picture"),
        ({"images": [PICTURE] * 65}, "/images", "at most 64"),
        ({"mode": "exact"}, "/mode", "'full', 'monte_carlo' or 'flow'"),
        ({"samples": 1}, "/samples", "greater than or equal to 2"),
        ({"mode": "full", "samples": 10}, "/samples", "monte_carlo"),
        ({"terms": [1]}, "/terms", "full"),
        ({"mode": "full", "terms": [1001]}, "/terms/0", "1..1000"),
        ({"variance": "learned"}, "/variance", "no learned variance"),
        ({"class_label": 10}, "/class_label", "0..9"),
        ({"indices": [0, 1]}, "/indices", "2 for 1 pictures"),
        ({"indices": [-1]}, "/indices/0", "greater than or equal to 0"),
        ({"sigma": "small"}, "/sigma", "no such field"),
        ({"steps": 10}, "/steps", "is for mode flow, not monte_carlo"),
        ({"mode": "full", "draws": 2}, "/draws", "is for mode flow, not full"),
        ({"mode": "flow", "samples": 10}, "/samples", "is for mode monte_carlo, not flow"),
        ({"mode": "flow", "variance": "small"}, "/variance", "the flow has none"),
        ({"mode": "flow", "draws": 0}, "/draws", "greater than or equal to 1"),
        ({"mode": "flow", "steps": 1001}, "/steps", "1001: model mnist has T = 1000"),
    ],
)
def test_what_is_refused(
    client: httpx.Client, body: dict[str, Any], pointer: str, says: str
) -> None:
    reply = client.post("/likelihood", json={"images": [PICTURE], **body})
    assert reply.status_code == 422
    [error] = reply.json()["errors"]
    assert error["pointer"] == pointer and says in error["detail"]


def test_who_takes_a_picture_alone_is_told_that_there_is_none(client: httpx.Client) -> None:
    body, alone = {"images": [PICTURE]}, {"Accept": "image/webp"}
    reply = client.post("/likelihood", json=body, headers=alone)
    assert reply.status_code == 406 and reply.json()["code"] == "not_acceptable"
    assert reply.json()["detail"].startswith("Accept: image/webp: a likelihood job gives numbers")
    assert client.get("/jobs").json()["data"] == []
    either = {"Accept": "image/webp, application/json;q=0.5", "Prefer": "wait=0"}
    key = {"Idempotency-Key": "one"}
    assert client.post("/likelihood", json=body, headers={**either, **key}).status_code == 202
    began = time.monotonic()  # it is told at once, and not when the job has ended
    assert client.post("/likelihood", json=body, headers={**alone, **key}).status_code == 406
    assert time.monotonic() - began < 10


def test_work_is_limited_by_the_field_that_makes_it(
    store: JobStore, serve: Callable[..., httpx.Client]
) -> None:
    client = serve(max_job_evaluations=100, client_quota=90)
    for body, pointer in (
        ({"mode": "full"}, "/mode"),
        ({"samples": 101}, "/samples"),
        ({"samples": 95}, "/samples"),  # over the quota alone
    ):
        reply = client.post("/likelihood", json={"images": [PICTURE], **body})
        assert reply.status_code == 422 and reply.json()["errors"][0]["pointer"] == pointer
    assert client.post("/likelihood", json={"images": [PICTURE] * 4}).status_code == 202
    busy = client.post("/likelihood", json={"images": [PICTURE]})
    assert busy.status_code == 429 and "retry-after" in busy.headers
