"""Both clients against the real thing: an API, a worker, a small network."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from redis import Redis

import ddpm_client
import diffusion
from ddpm_client import AsyncClient, Client, DoneEvent, ImageEvent, ProgressEvent, SnapshotEvent
from ddpm_client.pictures import encoded
from diffusion import ScheduleConfig
from jobs.kinds.table import KINDS
from tests.diffusion.networks import build_model
from tests.stack import Stack

GREY = Image.new("L", (8, 8), 90)
# One request a kind; a kind that is not here fails.
REQUESTS: dict[str, dict[str, Any]] = {
    "generate": {"num_images": 2, "steps": 3},
    "noise": {"images": [GREY], "t": [1, 10]},
    "reconstruct": {"images": GREY, "t": 5, "num_images": 2},
    "restore": {
        "images": GREY,
        "operator": {"name": "mask", "mask": np.eye(8, dtype=np.uint8) * 255},
        "steps": 3,
        "num_images": 2,
    },
    "encode": {"images": GREY, "steps": 3},
    "interpolate": {"images": [GREY, GREY], "t": 5, "lambdas": [0, 0.5, 1]},
    "likelihood": {"images": GREY, "mode": "flow", "draws": 2, "steps": 5},
}


@pytest.fixture(scope="module")
def url(redis_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("client")
    model = build_model(schedule=ScheduleConfig(T=10), class_names=("cat", "dog", "owl"))
    diffusion.save(model, folder / "models" / "tiny")
    with Redis.from_url(redis_server) as redis:
        redis.flushall()
    with contextlib.closing(Stack(redis_server, folder / "models", folder / "log")) as stack:
        address = str(stack.api().base_url)
        stack.worker()
        yield address


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(client: Client, kind: str) -> None:
    job = getattr(client, kind)(**REQUESTS[kind], seed=1)
    assert (job.kind, job.status, job.request["seed"]) == (kind, "succeeded", 1)
    gives = KINDS[kind].gives
    if "images" in gives:
        assert len(job.images) == len(job.data.images) >= 2
        assert all(image.size == (8, 8) for image in job.images)
    if kind == "noise":
        assert sorted(one.t for one in job.snapshots) == [1, 10]
    assert (job.result is not None) == ("numbers" in gives)


def test_everything_that_a_job_leaves(client: Client, tmp_path: Path) -> None:
    job = client.generate(
        class_label=1, num_images=3, steps=5, seed=7, deterministic=True, snapshots={"every": 2}
    )
    array = job.array(1)
    assert array.shape == (1, 8, 8) and array.dtype == np.float32
    shown = np.asarray(job.images[1])
    assert np.abs(shown / 127.5 - 1 - array[0]).max() <= 1 / 255 + 1e-6
    assert Image.open(io.BytesIO(job.image(2, format="webp", px=64))).size == (64, 64)
    assert Image.open(io.BytesIO(job.grid())).size == (18, 18)
    assert getattr(Image.open(io.BytesIO(job.film(px=32))), "n_frames", 1) >= 3
    kept = job.snapshots[0]
    assert kept.kind == "x_t" and job.snapshot(kept.t)[:4] == b"\x89PNG"
    assert job.archive()[:2] == b"PK"
    assert job.manifest is not None
    again = client.create(**job.manifest)
    assert job.data.images is not None and again.data.images is not None
    assert [i.sha256 for i in again.data.images] == [i.sha256 for i in job.data.images]
    branch = client.reconstruct(source={"job": job.id, "t": kept.t}, class_label=1)
    assert branch.status == "succeeded"
    y = np.zeros((1, 4, 4), np.float32)
    larger = client.restore(y=y, operator={"name": "average_pool", "factor": 2}, num_images=2)
    assert Image.open(io.BytesIO(larger.mean())).size == (8, 8)
    assert np.load(io.BytesIO(larger.std(format="npy"))).max() > 0
    assert larger.data.images is not None and larger.data.images[0].residual is not None
    (tmp_path / "a.png").write_bytes(job.image())
    for picture in (tmp_path / "a.png", job.image(), np.asarray(job.images[0])):
        assert client.noise(images=picture, t=[3], seed=0).status == "succeeded"
    x_t = np.zeros((1, 8, 8), np.float32)
    assert client.reconstruct(x_t=x_t, t=5).request["source"] == "x_t"
    job.delete()
    with pytest.raises(ddpm_client.NotFound):
        job.refresh()


def test_numbers_of_numpy_go_in_wherever_numbers_do(client: Client) -> None:
    boxes = np.array([[0, 0, 4, 4]])
    for said in (boxes, list(boxes)):
        mask = {"name": "mask", "boxes": said}
        filled = client.create("restore", images=GREY, operator=mask, steps=3)
        assert filled.request["operator"]["boxes"] == [[0, 0, 4, 4]]
    blur = {"name": "blur", "kernel": np.full((3, 3), 1 / 9), "deviation": None}
    client.create("restore", images=GREY, operator=blur, steps=3)
    kept = {"at": np.array([5, 10])}
    job = client.create("generate", steps=np.int64(10), snapshots=kept, deadline_s=np.float32(60))
    assert sorted(one.t for one in job.snapshots) == [5, 10]
    source = {"job": job.id, "t": np.int64(5), "index": np.int64(0)}
    assert client.create("reconstruct", source=source).request["source"]["t"] == 5
    assert len(client.noise(images=GREY, t=range(2, 9, 3)).snapshots) == 3
    assert len(client.create("noise", images=GREY, t=[np.int64(2), 3]).snapshots) == 2
    path = {"t": 5, "lambdas": np.linspace(0, 1, 3)}
    assert len(client.create("interpolate", images=(GREY, GREY), **path).images) == 3


def test_only_what_is_a_file_goes_in_as_one(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    file = "YQ=="
    sent = encoded(
        {
            "images": str(tmp_path / "a.png"),
            "another": {"picture": tmp_path / "a.png", "of": [b"a"], "y": "a", "x_t": None},
            "operator": {"name": "mask", "mask": b"a"},
            "seed": None,
        }
    )
    another = {"picture": file, "of": [file], "y": "a", "x_t": None}
    operator = {"name": "mask", "mask": file}
    assert sent == {"images": [file], "another": another, "operator": operator}


def test_a_job_is_watched(client: Client) -> None:
    job = client.generate(num_images=2, steps=10, snapshots={"every": 5}, wait=False)
    seen = list(client.stream(job, inline=True))
    kinds = {type(event) for event in seen}
    assert {ProgressEvent, SnapshotEvent, ImageEvent} <= kinds
    assert isinstance(seen[-1], DoneEvent) and seen[-1].status == "succeeded"
    pictures = [event for event in seen if isinstance(event, ImageEvent)]
    assert sorted(event.index for event in pictures) == [0, 1] and all(e.png for e in pictures)
    assert [e.id for e in job.events(last_event_id=seen[-3].id)] == [e.id for e in seen[-2:]]
    assert list(job.events(last_event_id=seen[-1].id)) == []


def test_what_there_is(client: Client) -> None:
    [model] = client.models()
    assert (model.name, model.T, model.shape) == ("tiny", 10, (1, 8, 8))
    assert client.model("tiny") == model
    assert client.schedule("tiny").t == list(range(1, 11))
    assert client.queues().workers[0].models == ("tiny",)
    assert client.health().version == ddpm_client.__version__
    assert client.ready().workers == 1
    with pytest.raises(ddpm_client.NotFound, match="no model nobody; there are: tiny"):
        client.model("nobody")


def test_what_is_wrong_is_named(client: Client) -> None:
    with pytest.raises(ddpm_client.InvalidRequest, match="num_images") as wrong:
        client.generate(num_images=65)
    assert [error.pointer for error in wrong.value.errors] == ["/num_images"]
    assert wrong.value.code == "invalid_request" and len(wrong.value.request_id) == 16
    with pytest.raises(ddpm_client.UnsupportedMediaType):
        client.noise(images=b"no picture", t=[1])
    with pytest.raises(TypeError, match="int: must be bytes, a path, a picture or an array"):
        client.create("noise", images=[3], t=[1])


def test_the_asynchronous_twin(url: str) -> None:
    async def use() -> None:
        async with AsyncClient(url) as client:
            job, other = await asyncio.gather(
                client.generate(num_images=2, steps=3, snapshots={"every": 1}, seed=3),
                client.noise(images=GREY, t=[4]),
            )
            assert [image.size for image in await job.images] == [(8, 8)] * 2
            assert (await job.array()).shape == (1, 8, 8)
            for file in (await job.film(), await job.grid(), await other.snapshot(4)):
                assert file
            waiting = await client.generate(steps=5, wait=False)
            names = [event.name async for event in client.stream(waiting)]
            assert names[-1] == "done"
            assert (await waiting.refresh()).ended
            assert (await waiting.wait()).status == (await waiting.cancel()).status
            found = [one.id async for one in client.jobs(page=1) if one.kind == "noise"]
            assert other.id in found
            assert (await client.job(job.id)).request["seed"] == 3
            assert (await client.models())[0].name == (await client.model("tiny")).name
            assert (await client.queues()).workers and (await client.ready()).models == 1
            with pytest.raises(ddpm_client.InvalidRequest):
                await client.generate(steps=11)
            assert (await client.pause("ddpm")).paused
            assert not (await client.resume("ddpm")).paused
            await job.delete()

    asyncio.run(use())


def test_one_client_serves_many_threads(client: Client) -> None:
    found: list[str] = []

    def ask(seed: int) -> None:
        found.append(client.generate(steps=2, seed=seed).status)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["succeeded"] * 4
