"""POST /encode, and /interpolate between encodings: what is taken in, and what is refused."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import pytest

from tests.app.conftest import Worker, X, png

P = base64.b64encode(png()).decode()


def encoded(client: httpx.Client, worker: Worker) -> str:
    """A finished encoding of two pictures."""
    job_id: str = client.post("/encode", json={"images": [P, P], "steps": 5}).json()["id"]
    started = worker.start(job_id)
    for index in range(2):
        worker.snapshot(started, 1000, "x_t", index)
    assert worker.store.succeed(job_id, "e")
    return job_id


def test_cost_and_defaults_are_known_at_once(client: httpx.Client, worker: Worker) -> None:
    job = client.post("/encode", json={"images": [P, P]}).json()
    asked = job["request"]
    assert (asked["t"], asked["steps"], asked["order"], asked["iterations"]) == (1000, 100, 1, 1)
    started = worker.start(job["id"])
    assert started.record.work == 2 * 100 * 2 and started.record.images == 2
    assert "images" not in job["urls"] and job["urls"]["grid"]
    partly = client.post("/encode", json={"images": [P], "t": 30, "order": 2}).json()["request"]
    assert (partly["steps"], partly["iterations"]) == (30, 0)


def test_its_x_T_is_a_source_at_once(client: httpx.Client, worker: Worker) -> None:
    job = encoded(client, worker)
    body = {"source": {"job": job, "t": 1000, "index": 1}, "sampler": "ddim", "steps": 5}
    made = client.post("/reconstruct", json=body).json()
    assert made["request"]["clip"] is False  # it would spoil the way back
    asked = client.post("/reconstruct", json={**body, "clip": True}).json()["request"]
    assert asked["clip"] is True
    started = worker.start(made["id"])
    assert started.array is not None
    np.testing.assert_allclose(started.array, X)
    pair = {"path": "sphere", "source": {"job": job}, "t": 1000, "lambdas": [0, 0.5, 1]}
    reply = client.post("/interpolate", json=pair)
    assert reply.status_code == 202, reply.text
    assert reply.json()["request"]["sampler"] == "ddim"
    started = worker.start(reply.json()["id"])
    assert started.array is not None and started.array.shape == (2, 8, 8)


@pytest.mark.parametrize(
    ("path", "body", "pointer", "says"),
    [
        ("/encode", {"images": []}, "/images", "at least one"),
        ("/encode", {"steps": 1001}, "/steps", "T = 1000"),
        ("/encode", {"t": 9, "steps": 10}, "/steps", "10: the chain ends at t = 9"),
        ("/encode", {"t": 1001}, "/t", "must be 1..1000"),
        ("/encode", {"order": 3}, "/order", "1 or 2"),
        ("/encode", {"order": 2, "iterations": 1}, "/iterations", "are for order 1"),
        ("/encode", {"iterations": 21}, "/iterations", "less than or equal to 20"),
        ("/encode", {"guidance": 2}, "/guidance", "needs a class_label"),
        ("/encode", {"class_label": 10}, "/class_label", "10"),
        ("/encode", {"sampler": "ddim"}, "/sampler", "no such field"),
        ("/interpolate", {"path": "sphere"}, "/source", "POST /encode"),
        ("/interpolate", {"source": "JOB"}, "/source", "image and job came"),
        (
            "/interpolate",
            {"source": "JOB", "images": [], "path": "sphere", "t": 999},
            "/t",
            "image 0 has x_t at 1000",
        ),
    ],
)
def test_what_is_refused(
    client: httpx.Client, worker: Worker, path: str, body: dict[str, Any], pointer: str, says: str
) -> None:
    asked = {"images": [P, P], **body}
    if path == "/interpolate":
        asked = {"t": 1000, "lambdas": [0.5], **asked}
    if asked.get("source") == "JOB":
        asked["source"] = {"job": encoded(client, worker)}
    reply = client.post(path, json=asked)
    assert reply.status_code == 422, reply.text
    [error] = reply.json()["errors"]
    assert error["pointer"] == pointer and says in error["detail"]
