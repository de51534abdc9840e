"""Pictures of the offline tools: image grids and films of a chain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor


def to_uint8(images: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """[N, C, H, W] in [−1, 1] → uint8 [N, H, W, C], rounded to the nearest grey level."""
    scaled = ((images.float().clamp(-1, 1) + 1) * 127.5).round()
    return scaled.permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)


def to_picture(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Image.Image:
    """uint8 [H, W, C] with C = 1 or 3 → a Pillow image."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def grid(images: Tensor, columns: int | None = None, gap: int = 2) -> Image.Image:
    """Tile [N, C, H, W] row by row, nearly square by default, with a dark gap between."""
    pixels = to_uint8(images)
    n, height, width, channels = pixels.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    canvas = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 40, np.uint8
    )
    for i, picture in enumerate(pixels):
        y, x = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[y : y + height, x : x + width] = picture
    return to_picture(canvas)


def class_columns(n: int, classes: int) -> int | None:
    """Columns of a grid of n images whose labels go round: each column of one class, nearly square.

    None, for as many as `grid` takes, where there are no classes or more than fit.
    """
    if not 1 < classes <= 20:
        return None
    return classes * math.ceil(math.sqrt(n) / classes)


def save_film(frames: Sequence[Image.Image], path: Path, ms_a_frame: int = 60) -> None:
    """Write an animated .gif or .webp; the last frame stays for a second and a half."""
    durations = [ms_a_frame] * (len(frames) - 1) + [1500]
    lossless = path.suffix.lower() == ".webp"
    frames[0].save(
        path,
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=0,
        **({"lossless": True} if lossless else {}),  # type: ignore[arg-type]  # .gif refuses it
    )
