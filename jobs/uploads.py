"""Uploaded pictures and arrays: limits checked on the header, before anything is decoded."""

from __future__ import annotations

import io
import math
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from jobs.decoding import open_picture
from jobs.errors import PictureError, PictureMedia, PictureShape
from jobs.pictures import Float32, UInt8

Fit = Literal["error", "pad", "resize"]
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def decode(
    raw: bytes, shape: tuple[int, int, int], *, fit: Fit = "error", max_pixels: int
) -> UInt8:
    """A picture as the model wants it: uint8 [H,W,C] for a shape (C,H,W).

    fit: `error` asks for the exact size; `pad` centres a smaller picture on black (a larger one
    is first scaled down); `resize` scales the sides independently. Modes, transparency and
    orientation: see `jobs.decoding`.
    Raises PictureMedia, PictureTooLarge, PictureShape or PictureError.
    """
    c, h, w = shape
    picture = open_picture(raw, max_pixels=max_pixels)
    if fit == "error" and picture.size != (w, h):
        raise PictureShape(
            f"{picture.size[0]} × {picture.size[1]}: must be {w} × {h}, "
            "or ask for fit = pad or resize"
        )
    fitted = _fit(picture.decode(c), (w, h), fit)
    return np.asarray(fitted, dtype=np.uint8).reshape(h, w, c)


def decode_array(raw: bytes, shape: tuple[int, int, int]) -> Float32:
    """The float32 [C,H,W] of an .npy file. Raises PictureMedia, PictureShape or PictureError.

    The header is read first: nothing is allocated for an array that is not of this shape.
    """
    buffer = io.BytesIO(raw)
    try:
        read_header = _HEADERS[np.lib.format.read_magic(buffer)]
        found, is_fortran, dtype = read_header(buffer)
    except Exception as error:  # NumPy's parser lets out whatever it stumbles over
        raise PictureMedia("not an .npy file of version 1.0 or 2.0") from error
    if found != shape:
        raise PictureShape(f"an array of shape {found}: must be {shape}")
    if dtype.kind != "f":
        raise PictureError(f"an array of {dtype}: must be of float32, or another float")
    content = buffer.read()
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise PictureMedia(f"{len(content)} bytes of data: {shape} of {dtype} has another number")
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if is_fortran else "C")
    with np.errstate(over="ignore"):  # of a float64: becomes infinite, and is refused
        made: Float32 = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(made).all():
        raise PictureError("an array with values that are not finite")
    return made


def _fit(image: Image.Image, size: tuple[int, int], fit: Fit) -> Image.Image:
    if image.size == size:
        return image
    if fit == "resize":
        return image.resize(size, Image.Resampling.LANCZOS)
    if image.width > size[0] or image.height > size[1]:
        image = ImageOps.contain(image, size, Image.Resampling.LANCZOS)
    canvas = Image.new(image.mode, size)
    canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return canvas
