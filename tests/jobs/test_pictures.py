from __future__ import annotations

import io
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from jobs import pictures
from jobs.errors import PictureError, PictureMedia, PictureShape, PictureTooLarge
from jobs.uploads import decode

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_and_webp_are_lossless(channels: int) -> None:
    pixels = RNG.integers(0, 256, (5, 7, channels), dtype=np.uint8)
    if channels == 4:
        pixels[..., 3] = 255  # WebP may drop the colour of what cannot be seen
    for data in (pictures.encode_png(pixels), pictures.encode_webp(pixels)):
        mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
        back = np.asarray(Image.open(io.BytesIO(data)).convert(mode)).reshape(pixels.shape)
        np.testing.assert_array_equal(back, pixels)


def test_every_grey_level_survives_the_round_trip() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    np.testing.assert_array_equal(pictures.to_uint8(pictures.from_uint8(pixels)), pixels)
    beyond = np.array([-5.0, 5.0, -1.0, 1.0], dtype=np.float32).reshape(1, 2, 2)
    assert pictures.to_uint8(beyond).ravel().tolist() == [0, 255, 0, 255]


def test_two_channels_are_no_picture() -> None:
    with pytest.raises(PictureError, match="2 channels"):
        pictures.encode_png(np.zeros((2, 2, 2), dtype=np.uint8))


def test_the_manifest_comes_back() -> None:
    manifest = {"seed": 1, "model": "möbius"}
    png = pictures.encode_png(np.zeros((2, 2, 1), dtype=np.uint8), manifest)
    assert pictures.read_manifest(png) == manifest
    assert pictures.read_manifest(pictures.encode_png(np.zeros((2, 2, 1), dtype=np.uint8))) is None


def test_grid_places_row_by_row() -> None:
    images = [np.full((2, 2, 1), i, dtype=np.uint8) for i in (1, 2, 3)]
    grid = pictures.grid(images)
    assert grid[..., 0].tolist() == [
        [1, 1, 0, 0, 2, 2], [1, 1, 0, 0, 2, 2],
        [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0],
        [3, 3, 0, 0, 0, 0], [3, 3, 0, 0, 0, 0],
    ]  # fmt: skip
    assert pictures.grid(images, columns=3).shape == (2, 10, 1)
    assert pictures.grid_size(3, 2, 2) == (6, 6) and pictures.grid_size(3, 2, 2, columns=3) == (
        2,
        10,
    )


def test_lossless_is_lossless_where_nothing_is_seen() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    pixels[..., 3] = 0
    with Image.open(io.BytesIO(pictures.encode_webp(pixels))) as image:
        np.testing.assert_array_equal(np.asarray(image.convert("RGBA")), pixels)


def test_archives_are_the_same_bytes_each_time() -> None:
    first = pictures.zip_files([("a", b"1"), ("b", b"2")])
    assert first == pictures.zip_files([("a", b"1"), ("b", b"2")])
    assert zipfile.ZipFile(io.BytesIO(first)).read("b") == b"2"


def save(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_decode_keeps_exact_pixels() -> None:
    pixels = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    raw = save(Image.fromarray(pixels))
    np.testing.assert_array_equal(decode(raw, (3, 8, 8), max_pixels=64), pixels)
    assert decode(raw, (1, 8, 8), max_pixels=64).shape == (8, 8, 1)


def test_limits_come_before_decoding() -> None:
    raw = save(Image.new("L", (9, 8)))
    with pytest.raises(PictureTooLarge, match="72 pixels: must be at most 71"):
        decode(raw, (1, 8, 8), max_pixels=71)
    with pytest.raises(PictureShape, match="must be 8 × 8"):
        decode(raw, (1, 8, 8), max_pixels=72)
    bomb = bytearray(save(Image.new("L", (1, 1))))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # a header that promises 3.6 gigapixels
    with pytest.raises(PictureError, match="broken or cut off"):  # its checksum is none
        decode(bytes(bomb), (1, 8, 8), max_pixels=72)
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(PictureTooLarge, match="more than 72 pixels"):
        decode(bytes(bomb), (1, 8, 8), max_pixels=72)


@pytest.mark.parametrize("raw", [b"", b"GIF89a", save(Image.new("L", (2, 2)), "GIF"), b"\x89PNG"])
def test_other_media(raw: bytes) -> None:
    with pytest.raises(PictureMedia):
        decode(raw, (1, 8, 8), max_pixels=72)


def test_a_cut_picture_is_refused() -> None:
    raw = save(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    with pytest.raises(PictureError, match="cannot be read"):
        decode(raw[: len(raw) // 2], (3, 64, 64), max_pixels=10**6)


def test_transparency_depth_and_orientation() -> None:
    clear = save(Image.new("RGBA", (2, 2), (255, 255, 255, 0)))
    assert decode(clear, (1, 2, 2), max_pixels=4).max() == 0
    deep = save(Image.fromarray(np.full((2, 2), 0x8000, dtype=np.uint16)))
    assert decode(deep, (1, 2, 2), max_pixels=4).tolist() == [[[128], [128]], [[128], [128]]]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned = save(Image.fromarray(np.array([[0, 255]], dtype=np.uint8)), "PNG", exif=exif)
    assert decode(turned, (1, 2, 1), max_pixels=4).ravel().tolist() == [0, 255]


def test_fit() -> None:
    wide = save(Image.new("L", (16, 4), 255))
    padded = decode(wide, (1, 8, 8), fit="pad", max_pixels=64)[..., 0]
    assert padded[:3].max() == 0 and padded[3:5].min() == 255 and padded[5:].max() == 0
    assert decode(wide, (1, 8, 8), fit="resize", max_pixels=64).min() == 255
