"""Pictures of the offline tools: image grids and films of a chain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from diffusion.pictures import to_pil, to_uint8

__all__ = ["class_columns", "grid", "save_film", "to_picture", "to_uint8"]


def to_picture(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Image.Image:
    """uint8 [H, W, C] with C = 1 or 3 → a Pillow image."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """Tile [N, C, H, W] row by row, nearly square by default, with a dark gap between."""
    return to_pil(images, columns)


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
