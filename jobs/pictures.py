"""Arrays to files and back: PNG, WebP, npy, grids, films, zips. NumPy and Pillow only.

Images are float32 [C,H,W] in [−1, 1] (as the network has them) or uint8 [H,W,C] (as files do).
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from jobs.errors import PictureError

Float32 = NDArray[np.float32]
UInt8 = NDArray[np.uint8]

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
GREY_LEVELS = 127.5  # of 8 bits, in one unit of [−1, 1]
GAP = 2  # pixels between the pictures of a grid
MANIFEST_KEY = "ddpm"  # PNG text chunk with the JSON that makes the image again


def to_uint8(x: Float32) -> UInt8:
    """round((x + 1)·127.5), clipped to 0..255. [C,H,W] → [H,W,C]."""
    scaled = np.clip(np.rint((x.astype(np.float32) + 1.0) * GREY_LEVELS), 0, 255)
    return np.ascontiguousarray(np.moveaxis(scaled, 0, -1).astype(np.uint8))


def from_uint8(pixels: UInt8) -> Float32:
    """x/127.5 − 1. [H,W,C] → [C,H,W]."""
    return np.ascontiguousarray(np.moveaxis(pixels.astype(np.float32) / GREY_LEVELS - 1.0, -1, 0))


def from_bytes(raw: bytes, shape: tuple[int, int, int]) -> Float32:
    """An output plane [C,H,W] from the store's little-endian float32 bytes."""
    return np.frombuffer(raw, dtype="<f4").reshape(shape).astype(np.float32, copy=False)


def to_image(pixels: UInt8) -> Image.Image:
    """A Pillow image of uint8 [H,W,C]. Raises PictureError unless C is 1, 3 or 4."""
    channels = pixels.shape[2]
    if channels not in _MODES:
        raise PictureError(f"{channels} channels cannot be a picture; ask for npy")
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels, _MODES[channels])


def encode_png(pixels: UInt8, manifest: Mapping[str, Any] | None = None, *, px: int = 0) -> bytes:
    """PNG of uint8 [H,W,C], with `manifest` in a text chunk; px: enlarge to this longer side."""
    info = PngImagePlugin.PngInfo()
    if manifest is not None:
        info.add_text("Software", "ddpm-serve")
        info.add_itxt(MANIFEST_KEY, json.dumps(manifest, ensure_ascii=False))
    return _save(_enlarged(to_image(pixels), px), "PNG", pnginfo=info)


def read_manifest(png: bytes) -> dict[str, Any] | None:
    """The manifest in a PNG of ours, or None."""
    with Image.open(io.BytesIO(png)) as image:
        text = image.info.get(MANIFEST_KEY)
    return None if text is None else dict(json.loads(text))


def encode_webp(pixels: UInt8, manifest: Mapping[str, Any] | None = None, *, px: int = 0) -> bytes:
    """Lossless WebP of uint8 [H,W,C], which has no place for `manifest`; px: as in a PNG."""
    return _save(_enlarged(to_image(pixels), px), "WEBP", lossless=True, exact=True)


def encode_npy(array: NDArray[Any]) -> bytes:
    """The array as an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def grid_size(count: int, height: int, width: int, *, columns: int = 0) -> tuple[int, int]:
    """(height, width) of the grid of so many pictures."""
    across = columns or math.ceil(math.sqrt(count))
    down = math.ceil(count / across)
    return down * (height + GAP) - GAP, across * (width + GAP) - GAP


def grid(images: Sequence[UInt8], *, columns: int = 0) -> UInt8:
    """Pictures uint8 [H,W,C] of one size side by side, near to a square, on black."""
    if not images:
        raise PictureError("a grid needs at least one image")
    columns = columns or math.ceil(math.sqrt(len(images)))
    h, w, c = images[0].shape
    canvas = np.zeros((*grid_size(len(images), h, w, columns=columns), c), dtype=np.uint8)
    for i, image in enumerate(images):
        y, x = (
            place * (side + GAP) for place, side in zip(divmod(i, columns), (h, w), strict=True)
        )
        canvas[y : y + h, x : x + w] = image
    return canvas


def film(frames: Sequence[UInt8], suffix: str, *, ms: int = 80, hold_ms: int = 1500) -> bytes:
    """An animation, `gif` or `webp`, of uint8 [H,W,C]; the last frame is held for longer."""
    if not frames:
        raise PictureError("a film needs at least one frame")
    pictures = [to_image(frame) for frame in frames]
    durations = [ms] * (len(frames) - 1) + [hold_ms]
    common = {"save_all": True, "append_images": pictures[1:], "duration": durations, "loop": 0}
    if suffix == "webp":
        return _save(pictures[0], "WEBP", lossless=True, exact=True, **common)
    return _save(pictures[0], "GIF", optimize=False, **common)


def zip_files(files: Iterable[tuple[str, bytes]]) -> bytes:
    """A zip of (name, content); stored, since PNG and npy hardly shrink, and free of dates."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files:
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def _enlarged(image: Image.Image, px: int) -> Image.Image:
    """Scaled to a longer side of `px`, in hard pixels when it grows; 0 leaves it alone."""
    if px in (0, max(image.size)):
        return image
    scale = px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    return image.resize(size, method)


def _save(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
