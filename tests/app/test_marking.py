"""Every picture and film says that a machine made it; read by others than those who wrote it."""

from __future__ import annotations

import base64
import io
import json
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, ImageSequence

from jobs.marking import GENERATED, marked
from jobs.pictures import encode_png, encode_webp, film, read_manifest
from tests.app.conftest import Worker, png

IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
TRAINED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
ENHANCED = "http://cv.iptc.org/newscodes/digitalsourcetype/algorithmicallyEnhanced"


def xmp_of_gif(content: bytes) -> bytes | None:
    """The XMP of a GIF, whose blocks are gone through one by one, as any reader does."""
    at = 13 + (3 << (content[10] & 7) + 1 if content[10] & 0x80 else 0)
    found = None
    while (kind := content[at]) != 0x3B:
        if kind == 0x2C:  # a picture, perhaps with colours of its own
            at += 10 + (3 << (content[at + 9] & 7) + 1 if content[at + 9] & 0x80 else 0) + 1
        else:
            assert kind == 0x21, at
            at += 2
        start = at
        while content[at]:
            at += 1 + content[at]
        at += 1
        if content[start : start + 12] == b"\x0bXMP DataXMP":
            found = content[start + 12 : at - 258]
    assert at == len(content) - 1
    return found


def source_type(content: bytes) -> str | None:
    """The digital source type in a file's XMP, found by Pillow and read as the RDF that it is."""
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        xmp = xmp_of_gif(content) if image.format == "GIF" else image.info.get("xmp")
    if xmp is None:
        return None
    text = xmp.decode() if isinstance(xmp, bytes) else xmp
    [found] = [
        element.attrib[IPTC] for element in ET.fromstring(text).iter() if IPTC in element.attrib
    ]
    return found


def made(client: httpx.Client, worker: Worker) -> str:
    body = {"num_images": 2, "snapshots": {"every": 50, "preview_px": 16}}
    job_id: str = client.post("/generate", json=body).json()["id"]
    started = worker.start(job_id)
    worker.snapshot(started, 500, index=0)
    worker.snapshot(started, 500, index=1)
    for index in range(2):
        worker.image(started, index)
    assert worker.store.succeed(job_id, "e")
    return job_id


def files(client: httpx.Client, job_id: str) -> dict[str, bytes]:
    root = f"/jobs/{job_id}"
    names = ["images/0.png", "images/0.webp", "grid.png", "grid.webp", "mean.png", "std.webp"]
    names += ["snapshots/500/0.png", "snapshots/500/0.webp", "snapshots.gif", "snapshots.webp"]
    found = {name: client.get(f"{root}/{name}").content for name in names}
    found["large"] = client.get(f"{root}/images/0.webp", params={"px": 333}).content
    for suffix in ("png", "webp"):
        content = client.get(f"{root}/images.zip", params={"format": suffix}).content
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            found[f"zip {suffix}"] = archive.read(f"0001.{suffix}")
    events = client.get(f"{root}/events", params={"inline": True}).text
    pictures = [json.loads(line[6:]).get("png") for line in events.splitlines() if "png" in line]
    found |= {f"event {i}": base64.b64decode(one) for i, one in enumerate(pictures) if one}
    assert len(found) >= 17
    return found


def test_every_picture_and_film_is_marked(client: httpx.Client, worker: Worker) -> None:
    job_id = made(client, worker)
    assert {name: source_type(file) for name, file in files(client, job_id).items()} == (
        dict.fromkeys(files(client, job_id), TRAINED)
    )
    picture = client.get(f"/jobs/{job_id}/images/0.png").content
    manifest = read_manifest(picture)
    assert manifest is not None and manifest["num_images"] == 2  # beside the mark


def test_a_picture_of_the_client_is_not_called_generated(
    client: httpx.Client, worker: Worker
) -> None:
    body: dict[str, Any] = {"images": [base64.b64encode(png()).decode()], "t": [500]}
    job_id = client.post("/noise", json=body).json()["id"]
    worker.snapshot(worker.start(job_id), 500)
    assert source_type(client.get(f"/jobs/{job_id}/snapshots/500/0.png").content) == ENHANCED


def test_a_setting_turns_it_off(serve: Callable[..., httpx.Client], worker: Worker) -> None:
    client = serve(mark_outputs=False)
    found = files(client, made(client, worker))
    assert {source_type(file) for file in found.values()} == {None}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("side", [1, 2, 7, 64])
def test_pixels_stay_as_they_are(channels: int, side: int) -> None:
    generator = np.random.default_rng(side)
    pixels = generator.integers(0, 256, (side, side + 1, channels), dtype=np.uint8)
    for suffix, content in (("png", encode_png(pixels)), ("webp", encode_webp(pixels))):
        with (
            Image.open(io.BytesIO(content)) as plain,
            Image.open(io.BytesIO(marked(content, suffix, GENERATED))) as image,
        ):
            assert image.size == (side + 1, side) and image.mode == plain.mode
            assert (np.asarray(image) == np.asarray(plain)).all()


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_films_stay_as_they_are(suffix: str) -> None:
    frames = [np.full((9, 8, 3), level, np.uint8) for level in (0, 90, 255)]
    content = film(frames, suffix)
    with Image.open(io.BytesIO(marked(content, suffix, GENERATED))) as image:
        shown = [np.asarray(f.convert("RGB")).copy() for f in ImageSequence.Iterator(image)]
    assert len(shown) == 3
    for ours, frame in zip(shown, frames, strict=True):
        assert (ours == frame).all()
    assert source_type(marked(content, suffix, GENERATED)) == TRAINED


def test_a_format_without_a_place_stays_as_it_is() -> None:
    assert marked(b"anything", "npy", GENERATED) == b"anything"
