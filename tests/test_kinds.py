"""The kinds that work on what a client sends, through the whole stack: API, Redis and worker."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import diffusion
from diffusion import ScheduleConfig
from diffusion.bound import bits_per_dim
from diffusion.likelihood import likelihood
from tests.app.test_up import up
from tests.diffusion.networks import build_model
from training.bits import choose
from training.evaluate_command import evaluate

WAIT = {"Prefer": "wait=60"}
N, SEED = 5, 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models/tiny, whose predictions are of about the right size."""
    folder = tmp_path_factory.mktemp("kinds")
    model = build_model(schedule=ScheduleConfig(T=1000), crop=(6, 6))
    model.network.conv_out.weight.mul_(0.1)
    diffusion.save(model, folder / "models" / "tiny")
    return folder


@pytest.fixture(scope="module")
def client(place: Path) -> Iterator[httpx.Client]:
    with up(place) as (_, client):
        yield client


@pytest.fixture(scope="module")
def pictures(place: Path) -> list[bytes]:
    """Blobs of 8×8, also in files for `ddpm evaluate`."""
    generator = np.random.default_rng(1)
    y, x = np.mgrid[:8, :8]
    files = []
    folder = place / "data" / "test" / "blobs"
    folder.mkdir(parents=True)
    for i in range(N):
        cy, cx = generator.uniform(1, 7, 2)
        blob = 255 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 4)
        Image.fromarray(blob.astype(np.uint8)).save(folder / f"{i}.png")
        files.append((folder / f"{i}.png").read_bytes())
    return files


def post(client: httpx.Client, path: str, files: list[bytes], /, **request: Any) -> dict[str, Any]:
    """A job with pictures, as it ended."""
    parts: list[Any] = [("image", ("a.png", file)) for file in files]
    parts.append(("request", (None, json.dumps(request), "application/json")))
    reply = client.post(path, files=parts, headers=WAIT)
    assert reply.status_code == 200, reply.text
    job: dict[str, Any] = reply.json()
    assert job["status"] == "succeeded", job
    return job


def npy(client: httpx.Client, url: str) -> np.ndarray:
    content = client.get(url.replace(".png", ".npy")).content
    return np.asarray(np.load(io.BytesIO(content)))


class Sized:
    def __len__(self) -> int:
        return N


def test_the_service_the_command_and_the_library_say_the_same(
    place: Path,
    client: httpx.Client,
    pictures: list[bytes],
    tmp_path: Path,
) -> None:
    folder = place / "models" / "tiny"
    command = [str(folder), str(place / "data"), "--out", str(tmp_path), "--splits", "test"]
    options = ["--images", "3", "--monte-carlo", str(N), "--samples", "9", "--variance", "large"]
    more = ["--seed", str(SEED), "--dtype", "fp32", "--pictures", "0", "--quiet"]
    ran = CliRunner().invoke(evaluate, [*command, *options, *more])
    assert ran.exit_code == 0, ran.output
    by_command = json.loads((tmp_path / "results.json").read_text())["splits"]["test"]
    model = diffusion.load(folder)
    arrays = [np.asarray(Image.open(io.BytesIO(raw)), np.float32) for raw in pictures]
    x_start = torch.from_numpy(np.stack(arrays)[:, None]) / 127.5 - 1
    part = choose(Sized(), 3, seed=SEED).indices  # type: ignore[arg-type]
    which = {
        "monte_carlo": (pictures, {"samples": 9}),
        "full": ([pictures[i] for i in part], {"mode": "full", "indices": part.tolist()}),
    }
    for mode, (files, fields) in which.items():
        job = post(client, "/likelihood", files, seed=SEED, variance="large", **fields)
        assert job["progress"]["step"] == job["progress"]["total"]
        result, told = job["result"], by_command[mode]
        assert told["images"] == len(files) == len(result["images"])
        assert result["L_T"] == pytest.approx(told["L_T"], abs=1e-4)
        for name, theirs in (
            ("bits_per_dim", "bits_per_dim"),
            ("bits_per_unpadded_dim", "bits_per_unpadded_dim"),
            ("standard_error", "standard_error"),
            ("L_0", "L_0"),
            ("L_t", "L_1_to_T-1"),
        ):
            assert result[name] == pytest.approx(told["large"][theirs], abs=1e-4)
        indices = torch.arange(N) if mode == "monte_carlo" else torch.from_numpy(part)
        bound = likelihood(
            model,
            x_start[indices],
            samples=fields.get("samples"),
            seed=SEED,
            indices=indices,
            variance="large",
        )
        for i, image in enumerate(result["images"]):
            assert image["bits_per_dim"] == pytest.approx(float(bound.bits_per_dim[i]), abs=1e-4)
            decoder = bits_per_dim(bound.decoder, 64)
            assert image["L_0"] == pytest.approx(float(decoder[i]), abs=1e-4)


def test_a_chain_branches_at_a_snapshot(client: httpx.Client) -> None:
    options = {"sampler": "ddim", "steps": 1000, "deterministic": True}
    asked = {**options, "seed": 2, "snapshots": {"at": [60], "kinds": ["x_t", "eps"]}}
    first = client.post("/generate", json=asked, headers=WAIT).json()
    source = {"job": first["id"], "t": 60}
    body = {**options, "steps": 60, "source": source, "snapshots": {"every": 20}}
    same = client.post("/reconstruct", json=body, headers=WAIT).json()
    found, expected = (npy(client, job["images"][0]["url"]) for job in (same, first))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    x_t = npy(client, first["snapshots"][1]["url"])
    assert first["snapshots"][1]["kind"] == "x_t"
    buffer = io.BytesIO()
    np.save(buffer, x_t)
    uploaded = {"t": 60, "x_t": base64.b64encode(buffer.getvalue()).decode(), **options}
    again = client.post("/reconstruct", json={**uploaded, "steps": 60}, headers=WAIT).json()
    assert again["images"][0]["sha256"] == same["images"][0]["sha256"]
    film = client.get(f"/jobs/{same['id']}/snapshots.gif")
    assert getattr(Image.open(io.BytesIO(film.content)), "n_frames", 1) >= 3
    # Where noise is drawn, every sample of p(x_0|x_t) is another.
    branch = {"source": source, "num_images": 3, "steps": 60, "seed": 9}
    three = client.post("/reconstruct", json=branch, headers=WAIT).json()
    assert len({image["sha256"] for image in three["images"]}) == 3


def test_a_canceled_chain_goes_on_where_it_stood(client: httpx.Client) -> None:
    job = client.post("/generate", json={"steps": 1000, "num_images": 40}).json()
    while client.get(job["urls"]["self"]).json().get("progress", {}).get("step", 0) < 100:
        pass
    client.post(job["urls"]["cancel"])
    canceled = client.get(job["urls"]["self"], params={"wait": 30}).json()
    latest = next(s for s in canceled["snapshots"] if s["kind"] == "x_t" and s["index"] == 0)
    body = {"source": {"job": job["id"], "t": latest["t"]}, "steps": 3}
    goes_on = client.post("/reconstruct", json=body, headers=WAIT).json()
    assert goes_on["status"] == "succeeded" and goes_on["request"]["t"] == latest["t"]


def test_noise_and_reconstruct_speak_of_the_same_x_t(
    client: httpx.Client, pictures: list[bytes]
) -> None:
    noise = post(client, "/noise", pictures[:1], t=[300], seed=11)
    asked = {"t": 300, "seed": 11, "steps": 5, "snapshots": {"at": [300]}}
    from_image = post(client, "/reconstruct", pictures[:1], **asked)
    from_noise = client.post(
        "/reconstruct",
        json={**asked, "source": {"job": noise["id"], "t": 300}, "t": 300},
        headers=WAIT,
    ).json()
    planes = [npy(client, job["snapshots"][0]["url"]) for job in (noise, from_image, from_noise)]
    np.testing.assert_array_equal(planes[0], planes[1])
    np.testing.assert_array_equal(planes[0], planes[2])


def test_a_manifest_with_its_pictures_makes_the_same_images(
    client: httpx.Client, pictures: list[bytes]
) -> None:
    for path, files, fields in (
        ("/reconstruct", pictures[:1], {"num_images": 2}),
        ("/interpolate", pictures[:2], {"lambdas": [0.0, 0.3, 1.0]}),
    ):
        asked = {"t": 200, "steps": 8, "deterministic": True, **fields}
        first = post(client, path, files, **asked)
        again = post(client, path, files, **first["manifest"])
        digests = [[image["sha256"] for image in job["images"]] for job in (first, again)]
        assert digests[0] == digests[1] and first["id"] != again["id"]
        assert first["manifest"]["provenance"]["versions"]["torch"] == torch.__version__
    full = {"mode": "full", "terms": [1, 1000], "deterministic": True}
    first = post(client, "/likelihood", pictures[:1], **full)
    again = post(client, "/likelihood", pictures[:1], **first["manifest"])
    assert first["result"] == again["result"]
    assert "standard_error" not in first["result"]


def test_a_picture_or_a_stream_in_one_call(client: httpx.Client, pictures: list[bytes]) -> None:
    images = [base64.b64encode(raw).decode() for raw in pictures[:2]]
    body = {"images": images, "t": 100, "steps": 5, "lambdas": [0, 0.5, 1]}
    grid = client.post("/interpolate", json=body, headers={"Accept": "image/png"})
    assert Image.open(io.BytesIO(grid.content)).size == (28, 8)  # one row
    # A likelihood has no picture: who takes nothing else is told so, and gets no job.
    alone = client.post("/likelihood", json={"images": images}, headers={"Accept": "image/png"})
    assert alone.status_code == 406
    either = {**WAIT, "Accept": "image/png, application/json;q=0.5"}
    numbers = client.post("/likelihood", json={"images": images}, headers=either).json()
    assert numbers["result"]["images"][1]["standard_error"] > 0
    assert client.get(f"{numbers['urls']['self']}/grid.png").status_code == 404
    stream = client.post(
        "/likelihood", json={"images": images}, headers={"Accept": "text/event-stream"}
    )
    assert "event: progress" in stream.text and stream.text.rstrip().endswith('"succeeded"}')


def test_a_picture_is_restored_with_what_is_known_of_it(
    client: httpx.Client, pictures: list[bytes]
) -> None:
    operator = {"name": "mask", "boxes": [[0, 4, 8, 8]]}
    job = post(
        client, "/restore", pictures[:1], operator=operator, num_images=3, steps=6, travel=2, seed=1
    )
    assert job["progress"]["step"] == job["progress"]["total"] == 3 * 11
    assert all(image["residual"] < 0.01 for image in job["images"])
    images = np.stack([npy(client, image["url"]) for image in job["images"]])
    known = np.asarray(Image.open(io.BytesIO(pictures[0])), np.float32)[:4] / 127.5 - 1
    np.testing.assert_allclose(images[:, 0, :4], np.broadcast_to(known, (3, 4, 8)), atol=1e-5)
    np.testing.assert_allclose(npy(client, job["urls"]["mean"]), images.mean(0), atol=1e-6)
    std = npy(client, job["urls"]["std"])
    np.testing.assert_allclose(std, images.std(0, ddof=1), atol=1e-6)
    assert std[0, :4].max() < 1e-5 < std[0, 4:].max()
    again = post(client, "/restore", pictures[:1], **job["manifest"])
    found = np.stack([npy(client, image["url"]) for image in again["images"]])
    np.testing.assert_allclose(found, images, atol=1e-2)


def test_an_image_goes_to_its_x_T_and_on(
    place: Path, client: httpx.Client, pictures: list[bytes]
) -> None:
    job = post(client, "/encode", pictures[:2], steps=50, iterations=5)
    x_T = [snapshot for snapshot in job["snapshots"] if snapshot["t"] == 1000]
    assert [snapshot["index"] for snapshot in x_T] == [0, 1]
    back = client.post(
        "/reconstruct",
        json={"source": {"job": job["id"], "t": 1000}, "sampler": "ddim", "steps": 50},
        headers=WAIT,
    ).json()
    model = diffusion.load(place / "models" / "tiny")
    original = np.asarray(Image.open(io.BytesIO(pictures[0])), np.float32) / 127.5 - 1
    assert np.abs(npy(client, back["images"][0]["url"])[0] - original).max() < 0.1
    x_start = torch.from_numpy(original)[None, None]
    expected = diffusion.encode(model, x_start, steps=50, iterations=5, dtype=torch.float32)
    np.testing.assert_allclose(npy(client, x_T[0]["url"]), expected[0], atol=2e-2)
    pair = {"path": "sphere", "source": {"job": job["id"]}, "t": 1000, "steps": 50}
    row = client.post("/interpolate", json={**pair, "lambdas": [0, 0.5, 1]}, headers=WAIT).json()
    first = npy(client, row["images"][0]["url"])
    np.testing.assert_allclose(first, npy(client, back["images"][0]["url"]), atol=2e-2)
