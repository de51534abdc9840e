"""Tensors as pictures. Pillow is imported when one is made: nothing else here needs it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from diffusion.checks import check_images

if TYPE_CHECKING:
    from PIL import Image

_GAP, _GREY = 2, 40  # between the pictures of a grid: pixels, and their level


def to_uint8(images: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """[N, C, H, W] in [−1, 1] → uint8 [N, H, W, C], rounded to the nearest grey level."""
    scaled = ((images.float().clamp(-1, 1) + 1) * 127.5).round()
    return scaled.permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)


def to_pil(images: Tensor, columns: int | None = None) -> Image.Image:
    """[C, H, W] or [N, C, H, W] in [−1, 1] as one picture; several as a grid, nearly square.

    x_t and ε reach beyond [−1, 1], and are cut off there. Raises ImagesError.
    """
    many = images[None] if isinstance(images, Tensor) and images.ndim == 3 else images
    check_images("images", many, bounded=False)
    from PIL import Image

    pixels = _tiled(to_uint8(many), columns)
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def film(frames: Sequence[Tensor], path: str | Path, *, ms: int = 60, px: int = 128) -> None:
    """Write frames, each [N, C, H, W], as an animated .gif or .webp; the last is held longer.

    px: pixels become squares until a frame is about as large. Raises ImagesError, or ValueError
    for another suffix.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".gif", ".webp"):
        raise ValueError(f"path = {str(path)!r}: must end in .gif or .webp")
    if not frames:
        raise ValueError("frames: must be one or more")
    pictures = [to_pil(frame) for frame in frames]
    factor = max(1, px // max(pictures[0].size))
    size = (pictures[0].width * factor, pictures[0].height * factor)
    first, *others = (picture.resize(size, 0) for picture in pictures)  # 0: the nearest pixel
    options: dict[str, Any] = {"duration": [ms] * len(others) + [1500], "loop": 0}
    if suffix == ".webp":  # .gif refuses it
        options["lossless"] = True
    first.save(path, save_all=True, append_images=others, **options)


def _tiled(
    pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], columns: int | None
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """uint8 [N, H, W, C] → one picture [·, ·, C], row by row."""
    n, height, width, channels = pixels.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    size = (rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, channels)
    canvas = np.full(size, _GREY, np.uint8)
    for i, picture in enumerate(pixels):
        y, x = (i // columns) * (height + _GAP), (i % columns) * (width + _GAP)
        canvas[y : y + height, x : x + width] = picture
    return canvas
