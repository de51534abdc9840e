"""Pictures of the offline tools: image grids and films of a chain, and their files.

The files say that a machine made them, as those of the service do, unless DDPM_MARK_OUTPUTS is 0.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from diffusion.pictures import to_pil, to_uint8
from jobs.marking import GENERATED, marked

__all__ = [
    "as_generated",
    "class_columns",
    "encoded",
    "grid",
    "picture_suffix",
    "save_film",
    "save_picture",
    "to_picture",
    "to_uint8",
]

SETTING = "DDPM_MARK_OUTPUTS"


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


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a .png or a .webp without loss. Raises ValueError for another suffix or setting."""
    suffix = picture_suffix(path)
    options = {"lossless": True} if suffix == "webp" else {}
    path.write_bytes(encoded(picture, suffix, **options))


def picture_suffix(path: Path) -> str:
    """png or webp. Raises ValueError for another."""
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in ("png", "webp"):
        raise ValueError(f"{path}: must end in .png or .webp")
    return suffix


def save_film(frames: Sequence[Image.Image], path: Path, ms_a_frame: int = 60) -> None:
    """Write an animated .gif or .webp; the last frame stays for a second and a half."""
    suffix = path.suffix.lower().removeprefix(".")
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}  # .gif refuses it
    durations = [ms_a_frame] * (len(frames) - 1) + [1500]
    options |= {"save_all": True, "append_images": frames[1:], "duration": durations, "loop": 0}
    path.write_bytes(encoded(frames[0], suffix, **options))


def encoded(picture: Image.Image, suffix: str, **options: Any) -> bytes:
    """The file of a picture, marked as what it is. Raises ValueError for a bad setting."""
    buffer = io.BytesIO()
    picture.save(buffer, suffix, **options)
    return as_generated(buffer.getvalue(), suffix)


def as_generated(content: bytes, suffix: str) -> bytes:
    """A file of pictures that a model made, with its mark. Raises ValueError for a bad setting."""
    said = os.environ.get(SETTING, "1")
    try:
        marks = TypeAdapter(bool).validate_python(said)
    except ValidationError as error:
        raise ValueError(f"{SETTING} = {said!r}: must be 1 or 0") from error
    return marked(content, suffix, GENERATED) if marks else content
