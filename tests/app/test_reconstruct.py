"""POST /reconstruct and /interpolate: what is taken in, what is refused, and what workers get."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from jobs.store.writer import JobStore
from tests.app.conftest import CARD, Worker, X, png


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


@pytest.fixture
def source(client: httpx.Client, worker: Worker) -> str:
    """A finished job with x_t of image 0 at 900 and 500, of image 1 at 500, and an x̂_0."""
    job_id: str = client.post("/generate", json={"num_images": 2}).json()["id"]
    started = worker.start(job_id)
    for t, kind, index in ((900, "x_t", 0), (500, "x_t", 0), (500, "x_t", 1), (700, "x_start", 0)):
        worker.snapshot(started, t, kind, index)
    for index in range(2):
        worker.image(started, index)
    assert worker.store.succeed(job_id, "e")
    return job_id


def test_an_image_noised_to_t(client: httpx.Client, worker: Worker) -> None:
    request = {"t": 40, "num_images": 3, "seed": 5}
    files: Any = {
        "image": ("a.png", png()),
        "request": (None, json.dumps(request), "application/json"),
    }
    job = client.post("/reconstruct", files=files).json()
    asked = job["request"]
    assert (job["kind"], asked["source"], asked["t"], asked["steps"]) == (
        "reconstruct", "image", 40, 40,
    )  # fmt: skip
    assert "images" not in asked and "x_t" not in asked
    started = worker.start(job["id"])
    assert started.inputs is not None and started.inputs.shape == (1, 8, 8, 1)
    assert started.array is None and started.record.work == 3 * 40 and started.record.images == 3
    worker.image(started, 2)
    as_json = client.post("/reconstruct", json={**request, "images": [b64(png())], "steps": 7})
    assert as_json.status_code == 202 and as_json.json()["request"]["steps"] == 7


def test_an_x_t_of_ones_own(client: httpx.Client, worker: Worker) -> None:
    x = np.asfortranarray(X.astype(np.float64) * 3)
    for sent in (
        {"json": {"t": 9, "x_t": b64(npy(x))}},
        {"files": {"x_t": ("x.npy", npy(x)), "request": (None, '{"t": 9, "source": "x_t"}')}},
    ):
        job = client.post("/reconstruct", **sent).json()  # type: ignore[arg-type]
        assert job["request"]["source"] == "x_t" and job["request"]["steps"] == 9
        started = worker.start(job["id"])
        assert started.inputs is None and started.array is not None
        np.testing.assert_array_equal(started.array, X * 3)


def test_a_snapshot_of_an_earlier_job(client: httpx.Client, worker: Worker, source: str) -> None:
    body = {"source": {"job": source, "t": 500, "index": 1}, "num_images": 2, "guidance": 2.0}
    job = client.post("/reconstruct", json={**body, "class_label": 1}).json()
    assert job["request"]["t"] == 500 and job["request"]["steps"] == 100
    assert job["request"]["source"] == body["source"]
    started = worker.start(job["id"])
    assert started.array is not None
    np.testing.assert_allclose(started.array, X * 0.5)
    assert started.record.work == 2 * 100 * 2  # guided: two evaluations a step
    client.delete(f"/jobs/{source}")  # the x_t was copied
    assert worker.start(job["id"]).array is not None


def test_the_manifest_makes_the_job_again(
    client: httpx.Client, worker: Worker, source: str
) -> None:
    body = {"source": {"job": source, "t": 900}, "steps": 3, "seed": 8}
    first = client.post("/reconstruct", json=body).json()
    worker.finish(first["id"])
    manifest = client.get(first["urls"]["self"]).json()["manifest"]
    again = client.post("/reconstruct", json=manifest).json()
    ours, theirs = dict(again["request"]), dict(first["request"])
    assert ours.pop("model_digest") == CARD.digest and theirs.pop("model_digest") is None
    assert ours == theirs
    lambdas = {"t": 7, "lambdas": [0, 0.5], "seed": 1, "images": [b64(png())] * 2}
    mixed = client.post("/interpolate", json=lambdas).json()
    worker.finish(mixed["id"])
    manifest = client.get(mixed["urls"]["self"]).json()["manifest"]
    parts: list[Any] = [("image", ("a.png", png()))] * 2
    parts.append(("request", (None, json.dumps(manifest), "application/json")))
    assert client.post("/interpolate", files=parts).json()["request"]["lambdas"] == [0.0, 0.5]


@pytest.mark.parametrize(
    ("body", "pointer", "says"),
    [
        ({"t": 5}, "/source", "nothing came"),
        ({"images": ["P"], "x_t": "X", "t": 5}, "/source", "image and x_t came"),
        ({"images": ["P"], "source": "JOB", "t": 500}, "/source", "image and job came"),
        ({"images": ["P"], "source": "x_t", "t": 5}, "/source", "x_t: but image came"),
        ({"images": ["P"]}, "/t", "is needed: where the chain starts, 1..1000"),
        ({"images": ["P"], "t": 1001}, "/t", "1001: must be 1..1000"),
        ({"images": ["P"], "t": 0}, "/t", "greater than or equal to 1"),
        ({"images": ["P"], "t": 9, "steps": 10}, "/steps", "10: the chain starts at t = 9"),
        (
            {"images": ["P"], "t": 9, "snapshots": {"at": [10]}},
            "/snapshots/at/0",
            "10: the chain starts at t = 9",
        ),
        ({"images": ["P", "P"], "t": 9}, "/images", "at most 1"),
        ({"images": ["P"], "t": 9, "num_images": 65}, "/num_images", "at most 64"),
        ({"images": ["P"], "t": 9, "lambda": 1}, "/lambda", "no such field"),
        ({"source": "JOB", "t": 501}, "/t", "501: the source is at t = 500"),
        ({"source": "JOB+index"}, "/source/index", "has x_t of image 0, 1"),
        ({"source": "JOB+t"}, "/source/t", "400: image 0 has x_t at 900, 500"),
        ({"source": "JOB-index"}, "/source/index", "-1: Input should be greater"),
        ({"source": {}}, "/source/job", "Field required"),
        ({"source": "JOB+kind"}, "/source/kind", "no such field"),
        ({"x_t": "X"}, "/t", "is needed"),
        ({"x_t": "*", "t": 9}, "/x_t", "is not base64"),
        ({"x_t": "BIG", "t": 9}, "/x_t", "shape (2, 8, 8): must be (1, 8, 8)"),
        ({"x_t": "INT", "t": 9}, "/x_t", "int64: must be of float32"),
        ({"x_t": "NAN", "t": 9}, "/x_t", "not finite"),
    ],
)
def test_what_is_refused(
    client: httpx.Client, source: str, body: dict[str, Any], pointer: str, says: str
) -> None:
    stand_ins: dict[str, Any] = {
        "P": b64(png()),
        "X": b64(npy(X)),
        "BIG": b64(npy(np.zeros((2, 8, 8)))),
        "INT": b64(npy(np.zeros((1, 8, 8), np.int64))),
        "NAN": b64(npy(np.full((1, 8, 8), np.nan))),
        "JOB": {"job": source, "t": 500},
        "JOB+index": {"job": source, "t": 500, "index": 2},
        "JOB+t": {"job": source, "t": 400},
        "JOB-index": {"job": source, "t": 500, "index": -1},
        "JOB+kind": {"job": source, "t": 500, "kind": "x_t"},
    }

    def real(value: Any) -> Any:
        if isinstance(value, list):
            return [real(v) for v in value]
        return stand_ins.get(value, value) if isinstance(value, str) else value

    before = len(client.get("/jobs").json()["data"])
    reply = client.post("/reconstruct", json={name: real(value) for name, value in body.items()})
    assert reply.status_code == 422, reply.text
    error = reply.json()["errors"][0]
    assert error["pointer"] == pointer and says in error["detail"]
    assert len(client.get("/jobs").json()["data"]) == before


def test_files_that_are_none(client: httpx.Client) -> None:
    header = npy(X)[:128]
    unbalanced = npy(X).replace(b"}", b"(")
    unbalanced_string = npy(X).replace(b"'descr'", b"'descr ")
    version_3 = b"\x93NUMPY\x03" + npy(X)[7:]
    junk = (b"junk", b"", header, header + bytes(8), npy(X) + b"more")
    for raw in (*junk, unbalanced, unbalanced_string, version_3):
        reply = client.post("/reconstruct", json={"t": 9, "x_t": b64(raw)})
        assert reply.status_code == 415, reply.text
        assert reply.json()["errors"][0]["pointer"] == "/x_t"
    picture = client.post("/reconstruct", json={"t": 9, "images": [b64(b"junk")]})
    assert picture.status_code == 415
    wrong_size = client.post("/reconstruct", json={"t": 9, "images": [b64(png(9, 8))]})
    assert wrong_size.status_code == 422
    fits = {"t": 9, "images": [b64(png(9, 8))], "fit": "resize"}
    assert client.post("/reconstruct", json=fits).status_code == 202
    parts: Any = {
        "x_t": ("x.npy", npy(X)),
        "image": ("a.png", png()),
        "request": (None, '{"t": [9]}'),
    }
    refused = client.post("/noise", files=parts)
    assert refused.status_code == 422 and refused.json()["errors"][0]["pointer"] == "/x_t"


def test_sources_that_are_gone(
    store: JobStore, worker: Worker, source: str, serve: Callable[..., httpx.Client]
) -> None:
    client = serve()
    unknown = client.post("/reconstruct", json={"source": {"job": "0" * 28, "t": 5}})
    assert unknown.status_code == 404 and unknown.json()["code"] == "not_found"
    short = client.post("/generate", json={"ttl_s": 1}).json()["id"]
    worker.finish(short)
    store.redis.hset(f"ddpm:job:{short}", "expires_at", 1.0)
    expired = client.post("/reconstruct", json={"source": {"job": short, "t": 5}})
    assert expired.status_code == 410 and expired.json()["code"] == "expired"
    bare = client.post("/generate", json={}).json()["id"]
    none = client.post("/reconstruct", json={"source": {"job": bare, "t": 5}})
    assert none.status_code == 422 and "has no x_t at all" in none.json()["detail"]


def test_a_source_of_another_shape(
    store: JobStore, source: str, serve: Callable[..., httpx.Client]
) -> None:
    client = serve()
    other = CARD.model_copy(update={"name": "wide", "shape": (3, 8, 8)})
    store.publish_card(other)
    body = {"source": {"job": source, "t": 500}, "model": "wide"}
    wrong = client.post("/reconstruct", json=body)
    assert wrong.status_code == 422 and wrong.json()["errors"][0]["pointer"] == "/source/job"


def test_the_source_decides_the_model(
    store: JobStore, source: str, serve: Callable[..., httpx.Client]
) -> None:
    client = serve()
    store.publish_card(CARD.model_copy(update={"name": "another"}))
    job = client.post("/reconstruct", json={"source": {"job": source, "t": 500}}).json()
    assert job["model"] == "mnist"


def test_interpolate(client: httpx.Client, worker: Worker) -> None:
    parts: list[Any] = [("image", (f"{i}.png", png())) for i in range(2)]
    request = {"t": 500, "lambdas": [0.0, 0.25, 0.5, 0.75, 1], "steps": 50}
    parts.append(("request", (None, json.dumps(request), "application/json")))
    job = client.post("/interpolate", files=parts).json()
    started = worker.start(job["id"])
    assert started.record.images == 5 and started.record.work == 250
    assert started.inputs is not None and started.inputs.shape == (2, 8, 8, 1)
    for index in range(5):
        worker.image(started, index)
        worker.snapshot(started, 500, "x_start", index)
    assert worker.store.succeed(job["id"], "e")
    grid = Image.open(io.BytesIO(client.get(job["urls"]["grid"]).content))
    assert grid.size == (5 * 10 - 2, 8)  # one row, from picture to picture
    done = client.get(job["urls"]["self"]).json()
    assert [image["index"] for image in done["images"]] == [0, 1, 2, 3, 4]
    film = client.get(f"/jobs/{job['id']}/snapshots.gif?kind=x_start&px=48")
    assert Image.open(io.BytesIO(film.content)).size == (48, 8)
    assert client.get(f"/jobs/{job['id']}/snapshots.gif?kind=x_start&index=1").status_code == 200


@pytest.mark.parametrize(
    ("body", "pointer", "says"),
    [
        ({"t": 5, "lambdas": [0.5], "n": 1}, "/images", "1 pictures: must be two"),
        ({"t": 5, "lambdas": [0.5], "n": 3}, "/images", "3 pictures: must be two"),
        ({"t": 5, "lambdas": []}, "/lambdas", "at least 1 item"),
        ({"t": 5, "lambdas": [1.5]}, "/lambdas/0", "less than or equal to 1"),
        ({"t": 5, "lambdas": [0.5] * 65}, "/lambdas", "65: must be at most 64"),
        ({"lambdas": [0.5]}, "/t", "required"),
        ({"t": 1001, "lambdas": [0.5]}, "/t", "1..1000"),
        ({"t": 5, "lambdas": [0.5], "num_images": 2}, "/num_images", "no such field"),
    ],
)
def test_interpolate_refuses(
    client: httpx.Client, body: dict[str, Any], pointer: str, says: str
) -> None:
    body = {"images": [b64(png())] * body.pop("n", 2), **body}
    reply = client.post("/interpolate", json=body)
    assert reply.status_code == 422
    [error] = reply.json()["errors"]
    assert error["pointer"] == pointer and says in error["detail"]


@pytest.mark.parametrize(
    ("t", "indices", "pointer", "says"),
    [
        (500, [0, 5], "/source/indices/1", "5: job"),
        (499, [0, 1], "/t", "499: image 0 has x_t at 900, 500"),
        (500, [0], "/source/indices/1", "Field required"),
        (500, "both", "/source/indices", "valid array"),
    ],
)
def test_of_a_pair_the_field_that_is_wrong_is_named(
    client: httpx.Client, source: str, t: int, indices: Any, pointer: str, says: str
) -> None:
    body = {"t": t, "lambdas": [0.5], "source": {"job": source, "indices": indices}}
    reply = client.post("/interpolate", json=body)
    assert reply.status_code == 422
    error = reply.json()["errors"][0]
    assert error["pointer"] == pointer and says in error["detail"]


def test_what_is_no_source_is_none_of_either_kind(client: httpx.Client) -> None:
    reply = client.post("/reconstruct", json={"t": 5, "source": "foo"})
    assert reply.json()["detail"] == "/source: \"foo\": Input should be 'image' or 'x_t'"
    assert {error["pointer"] for error in reply.json()["errors"]} == {"/source"}
    assert "SnapshotSource" not in reply.text


def test_replays_and_limits(store: JobStore, serve: Callable[..., httpx.Client]) -> None:
    client = serve(max_job_evaluations=100, max_upload_bytes=20_000)
    body = {"t": 50, "images": [b64(png())], "num_images": 2}
    headers = {"Idempotency-Key": "k"}
    first = client.post("/reconstruct", json=body, headers=headers)
    again = client.post("/reconstruct", json=body, headers=headers)
    assert again.headers["idempotency-replayed"] == "true"
    assert again.json()["id"] == first.json()["id"]
    for other in ({**body, "t": 49}, {"t": 50, "x_t": b64(npy(X)), "num_images": 2}):
        conflict = client.post("/reconstruct", json=other, headers=headers)
        assert conflict.json()["code"] == "idempotency_conflict"
    long = client.post("/reconstruct", json={**body, "num_images": 3})
    assert long.status_code == 422 and long.json()["errors"][0]["pointer"] == "/steps"
    large = client.post("/reconstruct", json={**body, "x_t": "A" * 20_000})
    assert large.status_code == 413
