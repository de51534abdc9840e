"""Uploads with something wrong inside: taken in or refused in words, never an error of ours."""

from __future__ import annotations

import io
import random
from collections.abc import Callable

import httpx
import numpy as np
import pytest
from PIL import Image

from jobs.store.writer import JobStore
from tests.app.conftest import X, png

TRIES = 120
Serve = Callable[..., httpx.Client]


def picture(kind: str) -> bytes:
    """A small picture with what its format can hold: levels, transparency, metadata."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA").convert("RGB" if kind == "JPEG" else "RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    buffer = io.BytesIO()
    options = {"progressive": True} if kind == "JPEG" else {}
    image.save(buffer, kind, exif=exif, **options)
    return buffer.getvalue()


def array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, X)
    return buffer.getvalue()


def mutated(raw: bytes, random_: random.Random) -> bytes:
    """The file with one to four things changed: bits, bytes, numbers, pieces."""
    data = bytearray(raw)
    for _ in range(random_.randint(1, 4)):
        at = random_.randrange(max(len(data), 1))
        match random_.randrange(7):
            case 0:
                data[at : at + 1] = bytes([(data[at] if data else 0) ^ 1 << random_.randrange(8)])
            case 1:
                data[at : at + 4] = random_.choice([b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff"])
            case 2:
                del data[at:]
            case 3:
                del data[at : at + random_.randrange(64)]
            case 4:
                data[at:at] = random_.randbytes(random_.randrange(64))
            case 5:
                data[at:at] = data[: random_.randrange(len(data) + 1)]
            case _:
                data[at : at + 1] = str(random_.randrange(10**9)).encode()
    return bytes(data)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of metadata it cannot read
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_mutated_pictures(store: JobStore, serve: Serve, kind: str) -> None:
    client = serve(max_upload_pixels=10_000)
    raw, random_ = picture(kind), random.Random(kind)
    request = {"request": '{"t": [1], "fit": "resize"}'}
    seen = set()
    for number in range(TRIES):
        bad = mutated(raw, random_)
        reply = client.post("/noise", files=[("image", bad)], data=request)
        seen.add(reply.status_code)
        assert reply.status_code in (202, 413, 415, 422), (number, reply.text)
        if reply.status_code != 202:
            assert "/images/0" in reply.json()["detail"], (number, reply.text)
    assert 202 in seen and seen & {415, 422}  # the mutants reach the decoder


@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_arrays(client: httpx.Client, seed: int) -> None:
    random_ = random.Random(seed)
    statuses = []
    for number in range(TRIES):
        reply = client.post(
            "/reconstruct",
            files={"x_t": mutated(array(), random_)},
            data={"request": '{"t": 500}'},
        )
        statuses.append(reply.status_code)
        assert reply.status_code in (202, 415, 422), (number, reply.text)
    assert set(statuses) >= {415}


def test_mutated_forms_and_texts(client: httpx.Client) -> None:
    """The wrapping is as hostile as what is wrapped."""
    random_ = random.Random(3)
    form = httpx.Request(
        "POST", "http://x", files={"image": png()}, data={"request": '{"t": [1], "seed": 7}'}
    )
    form_type = form.headers["content-type"]
    text = b'{"num_images": 2, "snapshots": {"at": [1, 500], "kinds": ["x_t"]}, "guidance": 1.5}'
    for number in range(TRIES):
        for path, media, raw in (
            ("/noise", form_type, form.read()),
            ("/generate", "application/json", text),
        ):
            headers = {"Content-Type": media}
            reply = client.post(path, content=mutated(raw, random_), headers=headers)
            assert reply.status_code in (202, 413, 415, 422), (number, path, reply.text)
