"""POST /restore: what is taken in, what is refused, and what samples say together."""

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

HALF = {"name": "mask", "boxes": [[0, 4, 8, 8]]}


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def mask_png(*, unknown: int = 32, side: int = 8) -> str:
    """White pixels first."""
    pixels = np.zeros(side * side, np.uint8)
    pixels[:unknown] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels.reshape(side, side)).save(buffer, "PNG")
    return b64(buffer.getvalue())


@pytest.fixture
def colour(store: JobStore, serve: Callable[..., httpx.Client]) -> httpx.Client:
    """A server that knows a second model, of three channels."""
    store.publish_card(CARD.model_copy(update={"name": "colour", "shape": (3, 8, 8)}))
    return serve()


def test_a_mask_by_boxes_and_what_it_costs(client: httpx.Client, worker: Worker) -> None:
    request = {"operator": HALF, "num_images": 3, "seed": 5}
    files: Any = {
        "image": ("a.png", png()),
        "request": (None, json.dumps(request), "application/json"),
    }
    job = client.post("/restore", files=files).json()
    asked = job["request"]
    assert (job["kind"], asked["source"], asked["method"]) == ("restore", "image", "projection")
    assert (asked["sampler"], asked["eta"], asked["steps"], asked["travel"], asked["noise"]) == (
        "ddim", 1.0, 50, 5, 0.0,
    )  # fmt: skip
    assert job["urls"]["mean"].endswith("/mean.png") and job["urls"]["std"].endswith("/std.png")
    started = worker.start(job["id"])
    assert started.inputs is not None and started.inputs.shape == (1, 8, 8, 1)
    assert started.record.work == 3 * (49 * 5 + 1) and started.record.images == 3
    guided = {**request, "class_label": 1, "guidance": 2, "travel": 2, "steps": 10}
    body = {**guided, "images": [b64(png())]}
    assert worker.start(client.post("/restore", json=body).json()["id"]).record.work == 3 * 19 * 2


def test_the_measurement_has_the_shape_that_the_operator_gives(
    colour: httpx.Client, worker: Worker
) -> None:
    for model, operator, size, mode, shape in (
        ("mnist", {"name": "average_pool", "factor": 4}, (2, 2), "L", (1, 2, 2, 1)),
        ("mnist", {"name": "blur", "deviation": 1.5}, (8, 8), "L", (1, 8, 8, 1)),
        ("mnist", {"name": "mask", "mask": mask_png()}, (8, 8), "L", (1, 8, 8, 1)),
        ("colour", {"name": "gray"}, (8, 8), "L", (1, 8, 8, 1)),
        ("colour", {"name": "average_pool", "factor": 2}, (4, 4), "RGB", (1, 4, 4, 3)),
        ("colour", {"name": "identity"}, (8, 8), "RGB", (1, 8, 8, 3)),
    ):
        body = {"model": model, "operator": operator, "images": [b64(png(*size, mode))]}
        reply = colour.post("/restore", json=body)
        assert reply.status_code == 202, reply.text
        inputs = worker.start(reply.json()["id"]).inputs
        assert inputs is not None and inputs.shape == shape
    for weights, says in (
        ([1, 1], "must be one for each of 3 channels"),
        ([0, 0, 0], "nothing is"),
    ):
        grey = {"name": "gray", "weights": weights}
        asked = {"model": "colour", "operator": grey, "images": [b64(png())]}
        [error] = colour.post("/restore", json=asked).json()["errors"]
        assert error["pointer"] == "/operator/weights" and says in error["detail"]
    blurred = colour.get("/jobs").json()["data"][4]["request"]
    assert blurred["operator"]["name"] == "blur" and blurred["noise"] == 0.3


def test_a_measurement_as_an_array(client: httpx.Client, worker: Worker) -> None:
    """Noise may lead out of [−1, 1]; what it cannot explain is refused."""
    y = X * 1.3
    body = {"operator": {"name": "identity"}, "noise": 25.5, "y": b64(npy(y))}
    started = worker.start(client.post("/restore", json=body).json()["id"])
    assert started.array is not None and started.inputs is None
    np.testing.assert_allclose(started.array, y)
    files: Any = {"y": ("y.npy", npy(X[:, :2, :2])), "request": (None, json.dumps(
        {"operator": {"name": "average_pool", "factor": 4}}
    ))}  # fmt: skip
    assert client.post("/restore", files=files).status_code == 202
    refused = client.post("/restore", json={**body, "noise": 1})
    [error] = refused.json()["errors"]
    assert error["pointer"] == "/y" and "a value of 1.3" in error["detail"]
    hidden = np.where(np.arange(8)[:, None] < 4, X, 7.0)  # in what is filled in anyway
    assert client.post(
        "/restore", json={"operator": HALF, "y": b64(npy(hidden))}
    ).status_code == 202  # fmt: skip


KERNEL = {"name": "blur", "kernel": [[0.1, 0.2, 0.1]]}


@pytest.mark.parametrize(
    ("body", "pointer", "says"),
    [
        ({}, "/operator", "Field required"),
        ({"operator": {}}, "/operator/name", "Field required"),
        ({"operator": {"name": "warp"}}, "/operator/name", "'mask'"),
        ({"operator": HALF, "noise": -1}, "/noise", "greater than or equal to 0"),
        ({"operator": HALF, "travel": 0}, "/travel", "greater than or equal to 1"),
        ({"operator": HALF, "steps": 1001}, "/steps", "has T = 1000"),
        ({"operator": HALF, "solver_steps": 1}, "/solver_steps", "is for method moment"),
        ({"operator": HALF, "method": "moment", "solver_steps": 6}, "/solver_steps", "equal to 5"),
        ({"operator": HALF, "method": "magic"}, "/method", "projection"),
        ({"operator": HALF, "num_images": 65}, "/num_images", "at most 64"),
        ({"operator": {"name": "mask"}}, "/operator/boxes", "nothing: give one of the two"),
        (
            {"operator": {**HALF, "mask": "MASK"}},
            "/operator/mask",
            "boxes and mask: give one of the two",
        ),
        (
            {"operator": {"name": "mask", "boxes": [[0, 0, 8, 4], [0, 4, 9, 8]]}},
            "/operator/boxes/1",
            "x1 ≤ 8",
        ),
        (
            {"operator": {"name": "mask", "boxes": [[0, 0, 8, 8]]}},
            "/operator/boxes",
            "nothing is known",
        ),
        ({"operator": {"name": "mask", "mask": "FULL"}}, "/operator/mask", "nothing is known"),
        ({"operator": {"name": "mask", "mask": "BIG"}}, "/operator/mask", "9 × 9: must be 8 × 8"),
        ({"operator": {"name": "mask", "mask": "*"}}, "/operator/mask", "is not base64"),
        ({"operator": {"name": "mask", "mask": "cGFkZGVk"}}, "/operator/mask", "not a PNG"),
        ({"operator": {"name": "mask", "boxes": []}}, "/operator/boxes", "at least 1"),
        ({"operator": {**HALF, "factor": 2}}, "/operator/factor", "is for average_pool, not mask"),
        ({"operator": {"name": "average_pool"}}, "/operator/factor", "is needed"),
        (
            {"operator": {"name": "average_pool", "factor": 3}},
            "/operator/factor",
            "3: does not divide 8 × 8",
        ),
        (
            {"operator": {"name": "average_pool", "factor": 4}},
            "/images/0",
            "8 × 8: must be 2 × 2",
        ),
        ({"operator": {"name": "gray"}}, "/operator/name", "one channel alone"),
        ({"operator": {"name": "blur"}}, "/operator/deviation", "give one of the two"),
        ({"operator": {**KERNEL, "deviation": 1.0}}, "/operator/kernel", "give one of the two"),
        ({"operator": {"name": "blur", "deviation": 0}}, "/operator/deviation", "greater than 0"),
        (
            {"operator": {"name": "blur", "kernel": [[1, 2]]}},
            "/operator/kernel",
            "odd in number and length",
        ),
        ({"operator": {"name": "blur", "kernel": [[0]]}}, "/operator/kernel", "all is 0"),
        (
            {"operator": {"name": "blur", "kernel": [[9e5, -2e5, 1]]}},
            "/operator/kernel",
            "its values sum to 1.1e+06: must be at most 1e+06",
        ),
        ({"operator": KERNEL}, "/images/0", "a value of 1: of images in [−1, 1]"),
        ({"operator": HALF, "images": ["P", "P"]}, "/images", "at most 1"),
        ({"operator": HALF, "images": []}, "/source", "nothing came"),
        ({"operator": HALF, "y": "Y"}, "/source", "image and y came"),
        ({"operator": HALF, "images": [], "y": "Y2"}, "/y", "must be (1, 8, 8)"),
        ({"operator": HALF, "source": "y"}, "/source", "y: but image came"),
        ({"operator": HALF, "corrector_steps": 1}, "/corrector_steps", "do not travel"),
        ({"operator": HALF, "sampler": "langevin"}, "/sampler", "do not travel"),
        ({"operator": HALF, "t": 5}, "/t", "no such field"),
    ],
)
def test_what_is_refused(
    client: httpx.Client, body: dict[str, Any], pointer: str, says: str
) -> None:
    stand_ins = {
        "P": b64(png()),
        "Y": b64(npy(X)),
        "Y2": b64(npy(X[:, :4])),
        "MASK": mask_png(),
        "FULL": mask_png(unknown=64),
        "BIG": mask_png(side=9),
    }

    def real(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: real(v) for name, v in value.items()}
        if isinstance(value, list):
            return [real(v) for v in value]
        return stand_ins.get(value, value) if isinstance(value, str) else value

    asked = {"images": ["P"], "model": "mnist", **body}
    reply = client.post("/restore", json=real(asked))
    assert reply.status_code == 422, reply.text
    [error] = reply.json()["errors"]
    assert error["pointer"] == pointer and says in error["detail"]
    assert client.get("/jobs").json()["data"] == []


def test_samples_have_a_mean_and_a_deviation(client: httpx.Client, worker: Worker) -> None:
    body = {"operator": HALF, "images": [b64(png())], "num_images": 2}
    job = client.post("/restore", json=body).json()
    early = client.get(job["urls"]["mean"])
    assert early.status_code == 404 and early.json()["code"] == "not_ready"
    started = worker.start(job["id"])
    batch = worker.store.batch()
    for index, x in enumerate((X, -X)):
        batch.image(started.record, "e", index=index, x=x, residual=0.25 * index)
    batch.send()
    assert worker.store.succeed(job["id"], "e")
    ended = client.get(job["urls"]["self"]).json()
    assert [image["residual"] for image in ended["images"]] == [0.0, 0.25]

    def array(name: str) -> Any:
        content = client.get(job["urls"][name].replace(".png", ".npy")).content
        return np.load(io.BytesIO(content))

    def picture(name: str) -> Any:
        return np.asarray(Image.open(io.BytesIO(client.get(job["urls"][name]).content)))

    np.testing.assert_allclose(array("mean"), 0 * X, atol=1e-7)
    np.testing.assert_allclose(array("std"), np.abs(X) * 2**0.5, rtol=1e-6)
    assert (picture("mean") == 128).all()
    expected = np.clip(np.rint(255 * np.abs(X[0]) * 2**0.5), 0, 255)
    np.testing.assert_array_equal(picture("std"), expected)
    enlarged = client.get(job["urls"]["std"], params={"px": 64})
    assert Image.open(io.BytesIO(enlarged.content)).size == (64, 64)
    noise = client.post("/noise", json={"images": [b64(png())], "t": [5]}).json()
    worker.start(noise["id"])
    assert "mean" not in noise["urls"]
    assert client.get(f"/jobs/{noise['id']}/mean.png").status_code == 404


def test_the_manifest_with_the_measurement_makes_the_job_again(
    client: httpx.Client, worker: Worker
) -> None:
    operator = {"name": "mask", "mask": mask_png()}
    first = client.post("/restore", json={"operator": operator, "images": [b64(png())]}).json()
    worker.finish(first["id"])
    manifest = client.get(first["urls"]["self"]).json()["manifest"]
    parts: Any = {
        "image": ("a.png", png()),
        "request": (None, json.dumps(manifest), "application/json"),
    }
    again = client.post("/restore", files=parts).json()
    ours, theirs = dict(again["request"]), dict(first["request"])
    assert ours.pop("model_digest") == CARD.digest and theirs.pop("model_digest") is None
    assert ours == theirs
