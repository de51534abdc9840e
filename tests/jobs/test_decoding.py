"""The decoder against pixels written by hand, against Pillow's own, and against broken files."""

from __future__ import annotations

import io
import re
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from jobs import containers
from jobs.decoding import open_picture
from jobs.errors import PictureError, PictureMedia, PictureTooLarge

FOLDER = Path(__file__).parents[1] / "pictures"
CASES = sorted(FOLDER.glob("*.[jp][pn]g"))
RNG = np.random.default_rng(0)
GREY, COLOUR, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # PNG's colour types


def chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def png(
    size: tuple[int, int], rows: list[bytes], *, depth: int = 8, colour: int, **chunks: bytes
) -> bytes:
    """A PNG of these rows of packed samples, `chunks` before the pixels."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header)] + [chunk(k.encode(), v) for k, v in chunks.items()]
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def pixels(raw: bytes, channels: int) -> list[object]:
    """Pixels of a picture one pixel high."""
    image = open_picture(raw, max_pixels=10**6).decode(channels)
    found: list[object] = np.asarray(image)[0].tolist()
    return found


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# name → a picture of two pixels, and what they are as RGBA.
CLEAR = 0
MODES: dict[str, tuple[bytes, list[Any]]] = {
    "1": (png((2, 1), [b"\x40"], depth=1, colour=GREY), [(0, 255), (255, 255)]),
    "1 tRNS": (
        png((2, 1), [b"\x40"], depth=1, colour=GREY, tRNS=b"\0\x01"),
        [(0, 255), (255, CLEAR)],
    ),
    "2 bits tRNS": (
        png((2, 1), [b"\x90"], depth=2, colour=GREY, tRNS=b"\0\x02"),
        [(170, CLEAR), (85, 255)],
    ),
    "4 bits tRNS": (
        png((2, 1), [b"\xf3"], depth=4, colour=GREY, tRNS=b"\0\x03"),
        [(255, 255), (51, CLEAR)],
    ),
    "L": (png((2, 1), [b"\x07\xc8"], colour=GREY), [(7, 255), (200, 255)]),
    "L tRNS": (
        png((2, 1), [b"\x07\xc8"], colour=GREY, tRNS=b"\0\xc8"),
        [(7, 255), (200, CLEAR)],
    ),
    "LA": (png((2, 1), [b"\x07\xff\xc8\x00"], colour=GREY_ALPHA), [(7, 255), (200, CLEAR)]),
    "I;16": (
        png((2, 1), [b"\x80\x00\x12\x34"], depth=16, colour=GREY),
        [(0x80, 255), (0x12, 255)],
    ),
    "I;16 tRNS": (  # the other pixel has the same high byte
        png((2, 1), [b"\x80\x00\x80\x01"], depth=16, colour=GREY, tRNS=b"\x80\x01"),
        [(0x80, 255), (0x80, CLEAR)],
    ),
    "P": (
        png((2, 1), [b"\x00\x01"], colour=PALETTE, PLTE=b"\x01\x02\x03\x0a\x0b\x0c"),
        [(1, 2, 3, 255), (10, 11, 12, 255)],
    ),
    "P tRNS": (
        png((2, 1), [b"\x00\x01"], colour=PALETTE, PLTE=b"\1\2\3\x0a\x0b\x0c", tRNS=b"\xff\0"),
        [(1, 2, 3, 255), (10, 11, 12, CLEAR)],
    ),
    "RGB": (png((2, 1), [b"\1\2\3\4\5\6"], colour=COLOUR), [(1, 2, 3, 255), (4, 5, 6, 255)]),
    "RGB tRNS": (
        png((2, 1), [b"\1\2\3\4\5\6"], colour=COLOUR, tRNS=b"\0\4\0\5\0\6"),
        [(1, 2, 3, 255), (4, 5, 6, CLEAR)],
    ),
    "RGB of 16 bits, tRNS": (
        png((2, 1), [b"\1\0\2\0\3\0\4\7\5\7\6\7"], depth=16, colour=COLOUR, tRNS=b"\4\7\5\7\6\7"),
        [(1, 2, 3, 255), (4, 5, 6, CLEAR)],
    ),
    "RGBA": (png((2, 1), [b"\1\2\3\xff\4\5\6\0"], colour=RGBA), [(1, 2, 3, 255), (4, 5, 6, 0)]),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_with_and_without_trns(mode: str) -> None:
    raw, expected = MODES[mode]
    rgba = [(v[0],) * 3 + (v[1],) if len(v) == 2 else v for v in expected]
    assert pixels(raw, 4) == [list(pixel) for pixel in rgba]
    flat = [list(pixel[:3]) if pixel[3] else [0, 0, 0] for pixel in rgba]
    assert pixels(raw, 3) == flat
    luma = [round(0.299 * r + 0.587 * g + 0.114 * b) for r, g, b in flat]
    assert pixels(raw, 1) == luma


def test_a_cmyk_jpeg_is_read_in_colour() -> None:
    raw = saved(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100)
    assert np.allclose(
        np.asarray(open_picture(raw, max_pixels=64).decode(3)), [0, 255, 255], atol=2
    )


def test_a_mode_that_has_no_grey_levels_is_named() -> None:
    raw = saved(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF")
    with pytest.raises(PictureError, match="pixels of mode F: must be 1, L, LA"):
        open_picture(raw, max_pixels=64, formats=("TIFF", "PNG")).decode(1)


def test_partial_alpha_is_laid_on_black() -> None:
    raw = saved(Image.new("RGBA", (1, 1), (200, 100, 50, 128)))
    assert pixels(raw, 3) == [[100, 50, 25]]
    assert pixels(raw, 4) == [[200, 100, 50, 128]]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("number", range(1, 9))
def test_every_orientation(kind: str, number: int) -> None:
    image = Image.fromarray(RNG.integers(0, 256, (3, 5, 3), dtype=np.uint8))
    image = image.resize((40, 24), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = number
    options = {"lossless": True} if kind == "WEBP" else {}
    raw = saved(image, kind, exif=exif, **options)
    picture = open_picture(raw, max_pixels=960, formats=(kind, "GIF"))
    upright = picture.decode(3)
    assert picture.size == upright.size
    with Image.open(io.BytesIO(raw)) as plain:
        assert ImageOps.exif_transpose(plain).tobytes() == upright.tobytes()


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_files_that_once_failed(path: Path) -> None:
    picture = open_picture(path.read_bytes(), max_pixels=10**6)
    assert picture.decode(1).size == picture.decode(4).size == picture.size
    if path.suffix == ".jpg":  # turned by a quarter: 6
        with Image.open(io.BytesIO(containers.strip(path.read_bytes()).raw)) as plain:
            turned = plain.transpose(Image.Transpose.ROTATE_270)
        assert picture.decode(1).tobytes() == turned.tobytes()


def test_alpha_over_a_colour_and_in_a_palette() -> None:
    rgba = open_picture((FOLDER / "rgba8.png").read_bytes(), max_pixels=64)
    with Image.open(FOLDER / "rgba8.png") as plain:
        assert rgba.decode(4).tobytes() == plain.tobytes()
    clear = np.asarray(rgba.decode(4))[..., 3] == 0
    assert clear.any() and np.asarray(rgba.decode(3))[clear].max() == 0
    raw = (FOLDER / "palette_alpha.png").read_bytes()
    with Image.open(io.BytesIO(raw)) as plain:
        same = saved(plain.convert("RGBA"))
    for channels in (1, 3, 4):
        found, wanted = (
            open_picture(file, max_pixels=256).decode(channels).tobytes() for file in (raw, same)
        )
        assert found == wanted


def progressive(scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    raw = saved(Image.new("L", (16, 16), 9), "JPEG", progressive=True)
    last = raw[raw.rindex(b"\xff\xda") : -2]
    return raw[:-2] + last * (scans - raw.count(b"\xff\xda")) + raw[-2:]


def largest_png(*, interlaced: bool) -> bytes:
    """16 bits in four channels, each row predicted from its neighbours: what takes longest."""
    row = b"\x04" + bytes(range(256)) * (SIDE * 8 // 256)
    rows = row * SIDE
    if interlaced:  # seven passes, each of as many bytes in fewer, shorter rows
        widths = [SIDE >> s for s in (3, 3, 2, 2, 1, 1, 0)]
        heights = [SIDE >> s for s in (3, 3, 3, 2, 2, 1, 1)]
        rows = b"".join(
            row[: 1 + 8 * width] * high for width, high in zip(widths, heights, strict=True)
        )
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, RGBA, 0, 0, interlaced)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows, 1)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def largest_jpeg(mode: str, which: int) -> bytes:
    """As many scans as there may be; which: the one that comes again and again."""
    noise = np.tile(RNG.integers(0, 256, (512, 512), np.uint8), (SIDE // 512, SIDE // 512))
    image = Image.fromarray(noise) if mode == "L" else Image.new(mode, (SIDE, SIDE))
    raw = saved(image, "JPEG", progressive=True, quality=4 if mode == "L" else 50)
    starts = [match.start() for match in re.finditer(b"\xff\xda", raw)] + [len(raw) - 2]
    scan = raw[starts[which] : starts[which + 1]]
    most = min(containers.MAX_SCANS - len(starts) + 1, (2**24 - len(raw)) // len(scan))
    return raw[: starts[which]] + scan * most + raw[starts[which] :]


def largest_webp(**options: Any) -> bytes:
    noise = np.tile(RNG.integers(0, 256, (512, 512, 4), np.uint8), (SIDE // 512, SIDE // 512, 1))
    return saved(Image.fromarray(noise), "WEBP", method=0, quality=30, **options)


SIDE = 4096  # of the largest picture that may be uploaded
SLOWEST: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: largest_png(interlaced=False),
    "interlaced PNG": lambda: largest_png(interlaced=True),
    "four components": lambda: largest_jpeg("CMYK", 0),
    "long scans": lambda: largest_jpeg("L", 5),
    "lossless WebP": lambda: largest_webp(lossless=True),
}


@pytest.mark.parametrize("name", SLOWEST)
def test_no_picture_takes_long(name: str) -> None:
    """The largest that each format can be within the limits of an upload. A thread of the
    decoders' pool is another's again within seconds, so nothing stops one."""
    raw = SLOWEST[name]()
    assert len(raw) <= 2**24
    began = time.process_time()
    assert open_picture(raw, max_pixels=SIDE**2).decode(3).size == (SIDE, SIDE)
    assert time.process_time() - began < 5  # about 1; processor time, on a machine that has others


def test_scans_are_counted_before_anything_is_decoded() -> None:
    most = containers.MAX_SCANS
    assert open_picture(progressive(most), max_pixels=256).decode(1).size == (16, 16)
    for scans in (most + 1, 1000):
        with pytest.raises(PictureTooLarge, match="a JPEG of more than 40 scans"):
            open_picture(progressive(scans), max_pixels=256)


def test_a_thumbnail_and_what_follows_the_end_are_no_scans() -> None:
    raw = saved(Image.new("L", (16, 16), 9), "JPEG")
    thumbnail = b"\xff\xe1\x10\x02" + b"\xff\xda" * 0x800
    assert open_picture(raw[:2] + thumbnail + raw[2:] + b"\xff\xda" * 99, max_pixels=256)


def test_files_of_nothing_but_parts() -> None:
    with pytest.raises(PictureTooLarge, match="more than 65536 chunks"):
        open_picture(b"\x89PNG\r\n\x1a\n" + chunk(b"teXt", b"") * 70_000, max_pixels=1)
    with pytest.raises(PictureTooLarge, match="more than 65536 segments"):
        open_picture(b"\xff\xd8" + b"\xff\xe0\0\2" * 70_000, max_pixels=1)


def test_an_exif_directory_that_claims_the_whole_file_costs_nothing() -> None:
    entries = b"".join(struct.pack("<HHII", 0x9000 + i, 7, 10**6, 0) for i in range(2000))
    block = b"II*\0\x08\0\0\0" + struct.pack("<H", 2000) + entries + bytes(10**6)
    raw = png((2, 1), [b"\x07\xc8"], colour=GREY, eXIf=block)
    assert pixels(raw, 1) == [7, 200]


def test_pixels_are_limited_by_the_header() -> None:
    raw = saved(Image.new("L", (9, 8)))
    with pytest.raises(PictureTooLarge, match="9 × 8 = 72 pixels: must be at most 71"):
        open_picture(raw, max_pixels=71)
    bomb = png((60_000, 60_000), [b"\0"], colour=GREY)
    with pytest.raises(PictureTooLarge):
        open_picture(bomb, max_pixels=72)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_a_broken_file_is_a_picture_error_and_nothing_else(path: Path) -> None:
    raw = path.read_bytes()
    broken = [raw[:cut] for cut in range(0, len(raw), max(1, len(raw) // 60))]
    for _ in range(150):
        changed = bytearray(raw)
        for at in RNG.integers(0, len(raw), 3):
            changed[at] = RNG.integers(0, 256)
        broken.append(bytes(changed))
    refused = 0
    for file in broken:
        try:
            open_picture(file, max_pixels=10**5).decode(4)
        except PictureError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WebP"])
def test_what_is_cut_off_in_its_header_is_still_of_its_format(format: str) -> None:
    whole = saved(Image.new("L", (2, 2)), format)
    with pytest.raises(PictureError, match=f"a {format} that is broken or cut off") as refused:
        open_picture(whole[:20], max_pixels=4)
    assert not isinstance(refused.value, PictureMedia)


def test_other_media_are_named() -> None:
    with pytest.raises(PictureMedia, match="not a PNG, JPEG or WebP picture"):
        open_picture(saved(Image.new("L", (2, 2)), "GIF"), max_pixels=4)
