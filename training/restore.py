"""`ddpm restore` and `ddpm encode`: images given a measurement, and the x_T of images, offline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffusion.encoding import decode, encode
from diffusion.model import Model
from diffusion.operators import (
    AveragePool,
    Blur,
    Grey,
    Identity,
    Mask,
    Operator,
    OperatorError,
    measured_shape,
)
from diffusion.restoring import restore
from diffusion.sampling import Step
from jobs.decoding import open_picture
from jobs.errors import PictureError
from training.pictures import grid
from training.sample import DTYPES

GREY_LEVELS = 127.5  # in one unit of [−1, 1]
ROUNDING = 0.3  # grey levels: what rounding to 8 bits does to a value, 1/√12
_OPTIONS = {"mask": ("boxes", "mask"), "average_pool": ("factor",), "blur": ("deviation",)}
_AS_TYPED = {"boxes": "box"}
MAX_PIXELS = 1 << 26


@dataclass(frozen=True)
class Asked:
    """What was measured, as the command line says it. boxes: x0,y0,x1,y1 each, to be filled in."""

    operator: str
    boxes: tuple[str, ...] = ()
    mask: Path | None = None
    factor: int | None = None
    deviation: float | None = None


def read_picture(path: Path, shape: Sequence[int]) -> Tensor:
    """[C, H, W] in [−1, 1]; a smaller picture is put in the middle of black.

    Raises OSError, ValueError.
    """
    c, h, w = shape
    try:
        picture = open_picture(path.read_bytes(), max_pixels=MAX_PIXELS)
        width, height = picture.size
        if width > w or height > h:
            raise PictureError(f"{width} × {height}: must be {w} × {h}")
        pixels = np.asarray(picture.decode(c), np.float32).reshape(height, width, c)
    except PictureError as error:
        raise PictureError(f"{path}: {error}") from error
    top, left = (h - height) // 2, (w - width) // 2
    padded = np.pad(pixels, ((top, h - height - top), (left, w - width - left), (0, 0)))
    return torch.from_numpy(padded).permute(2, 0, 1) / GREY_LEVELS - 1


def operator_for(asked: Asked, shape: Sequence[int]) -> Operator:
    """The operator that was asked for. Raises OperatorError naming the option."""
    for operator, options in _OPTIONS.items():
        for option in options if operator != asked.operator else ():
            if getattr(asked, option) not in (None, ()):
                name = _AS_TYPED.get(option, option)
                raise OperatorError(f"--{name}: is for {operator}, not {asked.operator}")
    match asked.operator:
        case "mask":
            return Mask(_known(asked, shape))
        case "average_pool":
            if asked.factor is None:
                raise OperatorError("--factor: is needed for average_pool")
            return AveragePool(asked.factor)
        case "gray":
            return Grey()
        case "blur":
            if asked.deviation is None:
                raise OperatorError("--deviation: is needed for blur")
            return Blur.gaussian(asked.deviation, min(shape[1:]))
        case _:
            return Identity()


def _known(asked: Asked, shape: Sequence[int]) -> Tensor:
    """bool [H, W]: outside of boxes, and black in a mask."""
    if not asked.boxes and asked.mask is None:
        raise OperatorError("--box or --mask: is needed for mask")
    known = torch.ones(*shape[1:], dtype=torch.bool)
    for text in asked.boxes:
        try:
            x0, y0, x1, y1 = (int(number) for number in text.split(","))
        except ValueError as error:
            raise OperatorError(f"--box {text!r}: must be x0,y0,x1,y1") from error
        if not (0 <= x0 < x1 <= shape[2] and 0 <= y0 < y1 <= shape[1]):
            raise OperatorError(f"--box {text}: does not lie within {shape[2]} × {shape[1]}")
        known[y0:y1, x0:x1] = False
    if asked.mask is not None:
        known &= read_picture(asked.mask, (1, *shape[1:]))[0] < 0
    return known


def restored_strip(
    model: Model,
    picture: Path,
    asked: Asked,
    *,
    num_images: int,
    noise: float | None,
    measure: bool,
    dtype: str,
    quiet: bool,
    **options: object,
) -> Image.Image:
    """The measurement, the samples, their mean and their deviation, from left to right.

    measure: the picture is the image itself, of which the measurement is made, without noise.
    noise: by default that of the rounding of a picture that was blurred, else 0.
    """
    if noise is None:
        noise = ROUNDING if asked.operator == "blur" and not measure else 0.0
    if not noise >= 0:
        raise OperatorError(f"--noise {noise:g}: must be 0 or more")
    operator = operator_for(asked, model.shape)
    y = read_picture(picture, model.shape if measure else measured_shape(operator, model.shape))
    if measure or isinstance(operator, Mask):  # what is not known of a picture says nothing
        y = operator.forward(y[None])[0]
    with tqdm(desc="restoring", unit="eval", disable=quiet) as bar:

        def on_step(_: int, __: int, step: Step) -> None:
            bar.total = num_images * step.rows
            bar.update(len(step.x_t))

        images = restore(
            model,
            y,
            operator,
            num_images,
            sigma=noise / GREY_LEVELS,
            dtype=DTYPES[dtype],
            on_step=on_step,
            **options,  # type: ignore[arg-type]
        ).cpu()
    deviation = images.std(0, correction=min(1, num_images - 1))
    row = [_shown(y, model.shape), *images, images.mean(0), 2 * deviation - 1]
    return grid(torch.stack(row), columns=len(row))


def _shown(y: Tensor, shape: Sequence[int]) -> Tensor:
    """A measurement in the size and the channels of an image."""
    factor = shape[-1] // y.shape[-1]
    large: Tensor = F.interpolate(y[None], scale_factor=factor, mode="nearest")[0]
    return large.expand(*shape)


def encoded(
    model: Model,
    pictures: Sequence[Path],
    *,
    steps: int | None,
    order: int,
    iterations: int | None,
    class_label: int | None,
    dtype: str,
    quiet: bool,
) -> tuple[Tensor, Tensor, float]:
    """(x_T [N, C, H, W], a strip of rows (picture, x_T, way back), PSNR of the way back in dB)."""
    x_start = torch.stack([read_picture(path, model.shape) for path in pictures])
    with tqdm(desc="encoding", unit="eval", disable=quiet) as bar:

        def on_step(_: int, __: int, step: Step) -> None:
            bar.update(len(step.x_t))

        given: dict[str, Any] = {
            "steps": steps,
            "order": order,
            "class_label": class_label,
            "on_step": on_step,
        }
        given["dtype"] = DTYPES[dtype]
        x_T = encode(model, x_start, iterations=iterations, **given).cpu()
        back = decode(model, x_T, **given).cpu().clamp(-1, 1)
    error = float((back - x_start).square().mean())
    psnr = 10 * math.log10(4 / error) if error else math.inf
    return x_T, torch.stack([x_start, x_T, back], dim=1).flatten(0, 1), psnr
