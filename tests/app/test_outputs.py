from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import zipfile
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from jobs.formats import FORMATS
from tests.app.conftest import CARD, PROVENANCE, Worker, X, png


@pytest.fixture
def job(client: httpx.Client, worker: Worker) -> dict[str, object]:
    """A finished job of three images with two snapshots of each."""
    body = {"num_images": 3, "seed": 11, "steps": 2, "snapshots": {"every": 1}, "ttl_s": 60}
    job_id = client.post("/generate", json=body).json()["id"]
    started = worker.start(job_id)
    for index in range(3):
        for t in (1000, 500):
            worker.snapshot(started, t, index=index)
        worker.image(started, index, X * ((index + 1) / 3))
    worker.store.succeed(job_id, "e")
    found: dict[str, object] = client.get(f"/jobs/{job_id}").json()
    return found


def test_images_in_three_formats(client: httpx.Client, job: dict[str, object]) -> None:
    root = f"/jobs/{job['id']}/images"
    expected = np.rint((X[0] + 1) * 127.5).astype(np.uint8)
    for suffix, media in (("png", "image/png"), ("webp", "image/webp")):
        reply = client.get(f"{root}/2.{suffix}")
        assert reply.headers["content-type"] == media
        picture = Image.open(io.BytesIO(reply.content)).convert("L")
        np.testing.assert_array_equal(np.asarray(picture), expected)
    npy = np.load(io.BytesIO(client.get(f"{root}/2.npy").content))
    np.testing.assert_array_equal(npy, X)
    listed: dict[str, Any] = job["images"][-1]
    assert listed["sha256"] == hashlib.sha256(expected.tobytes()).hexdigest()
    assert listed["url"] == f"{root}/2.png" and listed["seed"] == 11
    large = Image.open(io.BytesIO(client.get(f"{root}/2.png", params={"px": 64}).content))
    assert large.size == (64, 64)


def test_a_copy_is_good_for_as_long_as_the_output_is(
    client: httpx.Client, worker: Worker, job: dict[str, object]
) -> None:
    """A film that grows is not to be kept."""

    def kept(url: str) -> str:
        reply = client.get(url)
        assert reply.status_code == 200
        return str(reply.headers["cache-control"])

    for path in ("images/0.png", "grid.png", "images.zip", "snapshots.gif"):
        found = re.fullmatch(r"private, max-age=(\d+)", kept(f"/jobs/{job['id']}/{path}"))
        assert found is not None and 30 < int(found[1]) <= 60  # its ttl_s
    body = {"snapshots": {"every": 50}}
    running = client.post("/generate", json=body).json()["id"]
    started = worker.start(running)
    worker.snapshot(started, 500)
    assert kept(f"/jobs/{running}/snapshots.gif") == "no-store"
    worker.image(started)
    assert worker.store.succeed(running, "e")
    assert kept(f"/jobs/{running}/snapshots.gif") == "private, max-age=3600"


def test_an_array_has_no_size_to_choose(client: httpx.Client, job: dict[str, object]) -> None:
    for path in ("images/0.npy", "snapshots/500/0.npy"):
        reply = client.get(f"/jobs/{job['id']}/{path}", params={"px": 64})
        assert reply.status_code == 422 and reply.json()["errors"][0]["pointer"] == "/query/px"


def test_head_gives_the_headers_of_get(client: httpx.Client, job: dict[str, object]) -> None:
    for path in ("images/2.png", "grid.png", "images.zip", "snapshots.gif", ""):
        url = f"/jobs/{job['id']}/{path}".rstrip("/")
        head, get = client.head(url), client.get(url)
        assert head.status_code == 200 and head.content == b""
        for name in ("content-type", "content-length", "etag"):
            assert head.headers.get(name) == get.headers.get(name), (url, name)


def test_a_png_carries_what_makes_it_again(client: httpx.Client, job: dict[str, object]) -> None:
    reply = client.get(f"/jobs/{job['id']}/images/1.png")
    manifest = json.loads(Image.open(io.BytesIO(reply.content)).info["ddpm"])
    assert manifest["seed"] == 11 and manifest["num_images"] == 3
    assert manifest["model_digest"] == CARD.digest
    assert manifest["provenance"] == {**PROVENANCE, "index": 1}
    assert not {"webhook_url", "ttl_s", "priority"} & set(manifest)
    again = client.post("/generate", json=manifest).json()["request"]
    assert {k: again[k] for k in manifest if k != "provenance"} == {
        k: v for k, v in manifest.items() if k != "provenance"
    } | {"snapshots": {**manifest["snapshots"], "at": None, "preview_px": None}}
    changed = client.post("/generate", json={**manifest, "model_digest": "e" * 64})
    assert changed.status_code == 422


def test_archive_grid_and_film(client: httpx.Client, job: dict[str, object]) -> None:
    archive = zipfile.ZipFile(io.BytesIO(client.get(f"/jobs/{job['id']}/images.zip").content))
    assert archive.namelist() == ["0000.png", "0001.png", "0002.png", "manifest.json"]
    assert json.loads(archive.read("manifest.json"))["seed"] == 11
    npy = client.get(f"/jobs/{job['id']}/images.zip", params={"format": "npy"})
    assert zipfile.ZipFile(io.BytesIO(npy.content)).namelist()[0] == "0000.npy"
    grid = Image.open(io.BytesIO(client.get(f"/jobs/{job['id']}/grid.png").content))
    assert grid.size == (18, 18)
    for suffix in ("gif", "webp"):
        reply = client.get(f"/jobs/{job['id']}/snapshots.{suffix}", params={"px": 36})
        film = Image.open(io.BytesIO(reply.content))
        assert getattr(film, "n_frames", 1) == 3 and film.size == (
            36,
            36,
        )  # two snapshots and the images
    one = client.get(f"/jobs/{job['id']}/snapshots.gif", params={"index": 1, "px": 8})
    assert Image.open(io.BytesIO(one.content)).size == (8, 8)
    none = client.get(f"/jobs/{job['id']}/snapshots.gif", params={"kind": "eps"})
    assert none.status_code == 404


def test_a_grid_that_its_format_cannot_hold_is_refused(
    client: httpx.Client, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "webp", replace(FORMATS["webp"], most=100))
    body = {"images": [base64.b64encode(png()).decode()], "t": [*range(1, 21)]}
    job_id = client.post("/noise", json=body).json()["id"]
    started = worker.start(job_id)
    for t in body["t"]:
        worker.snapshot(started, int(t))
    assert worker.store.succeed(job_id, "e")
    refused = client.get(f"/jobs/{job_id}/grid.webp")
    assert refused.status_code == 422
    assert "198 × 8 pixels: webp holds at most 100 a side" in refused.json()["detail"]
    assert client.get(f"/jobs/{job_id}/grid.png").status_code == 200


def test_a_film_that_memory_could_not_hold_is_refused(client: httpx.Client, worker: Worker) -> None:
    job_id = client.post("/generate", json={"steps": 1000, "snapshots": {"every": 1}}).json()["id"]
    started = worker.start(job_id)
    for t in range(1, 101):
        worker.snapshot(started, t)
    worker.image(started)
    assert worker.store.succeed(job_id, "e")
    film = f"/jobs/{job_id}/snapshots.webp"
    refused = client.get(film, params={"px": 2048})
    assert refused.status_code == 422
    [error] = refused.json()["errors"]
    assert error["pointer"] == "/query/px"
    most = int(error["detail"].rpartition(" ")[2])
    assert "2048: too large for a film of 101 frames" in error["detail"] and 700 < most < 900
    assert client.get(film, params={"px": most}).status_code == 200


def test_snapshots(client: httpx.Client, job: dict[str, object]) -> None:
    urls = [snapshot["url"] for snapshot in job["snapshots"]]  # type: ignore[attr-defined]
    assert len(urls) == 6 and urls[0] == f"/jobs/{job['id']}/snapshots/1000/0.png?kind=x_t"
    assert all(client.get(url).status_code == 200 for url in urls)
    root = f"/jobs/{job['id']}/snapshots"
    assert client.get(f"{root}/999/0.png").status_code == 404
    assert client.get(f"{root}/1000/0.png", params={"kind": "y"}).status_code == 422
    assert client.get(f"{root}/1000/0.jpg").status_code == 422


def test_an_early_image_carries_all_that_a_late_one_does(
    client: httpx.Client, worker: Worker
) -> None:
    """A client that fetches at the `image` event may keep the file: it never changes."""
    job_id = client.post("/generate", json={"seed": 1}).json()["id"]
    started = worker.start(job_id)
    worker.image(started)
    early = client.get(f"/jobs/{job_id}/images/0.png").content
    worker.store.succeed(job_id, "e")
    assert client.get(f"/jobs/{job_id}/images/0.png").content == early
    manifest = json.loads(Image.open(io.BytesIO(early)).info["ddpm"])
    assert manifest["provenance"] == {**PROVENANCE, "index": 0}


def test_a_film_of_an_image_that_is_not_there(client: httpx.Client, job: dict[str, object]) -> None:
    reply = client.get(f"/jobs/{job['id']}/snapshots.gif", params={"index": 99})
    assert reply.status_code == 404 and reply.json()["detail"].endswith("of x_t of image 99")


def test_numbers_have_no_grid(client: httpx.Client, worker: Worker) -> None:
    body = {"images": [base64.b64encode(png()).decode()]}
    job_id = client.post("/likelihood", json=body).json()["id"]
    assert client.get(f"/jobs/{job_id}/grid.png").status_code == 404
    worker.start(job_id)
    assert worker.store.succeed(job_id, "e")
    for suffix in ("png", "webp"):
        assert client.get(f"/jobs/{job_id}/grid.{suffix}").status_code == 404


def test_what_is_not_there_yet(client: httpx.Client, worker: Worker) -> None:
    job_id = client.post("/generate", json={"num_images": 2}).json()["id"]
    early = client.get(f"/jobs/{job_id}/images/0.png")
    assert early.status_code == 404 and early.json()["code"] == "not_ready"
    started = worker.start(job_id)
    worker.image(started, 0)
    assert client.get(f"/jobs/{job_id}/images/0.png").status_code == 200
    assert client.get(f"/jobs/{job_id}/images.zip").json()["code"] == "not_ready"
    worker.store.fail(job_id, "e", code="worker_error", detail="it broke")
    assert client.get(f"/jobs/{job_id}/images/0.png").status_code == 200
    assert client.get(f"/jobs/{job_id}/images/1.png").json()["code"] == "not_found"
