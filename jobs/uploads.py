"""Uploaded pictures and arrays: limits checked on the header, before anything is decoded."""

from __future__ import annotations

import io
import math
import warnings
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jobs.errors import PictureError, PictureMedia, PictureShape, PictureTooLarge
from jobs.pictures import Float32, UInt8

Fit = Literal["error", "pad", "resize"]
_FORMATS = ("PNG", "JPEG", "WEBP")
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def decode(
    raw: bytes, shape: tuple[int, int, int], *, fit: Fit = "error", max_pixels: int
) -> UInt8:
    """A picture as the model wants it: uint8 [H,W,C] for a shape (C,H,W).

    fit: `error` asks for the exact size; `pad` centres a smaller picture on black (a larger one
    is first scaled down); `resize` scales the sides independently. Transparency is laid on
    black, and the EXIF orientation is applied.
    Raises PictureMedia, PictureTooLarge, PictureShape or PictureError.
    """
    c, h, w = shape
    if c not in _MODES:
        raise PictureError(f"a model with {c} channels takes no pictures")
    image = _open(raw, max_pixels)
    try:
        image = ImageOps.exif_transpose(image)
        image = _flatten(image).convert(_MODES[c])
    except (OSError, ValueError, SyntaxError) as error:
        raise PictureError(f"the picture cannot be read: {error}") from error
    fitted = _fit(image, (w, h), fit)
    return np.asarray(fitted, dtype=np.uint8).reshape(h, w, c)


def decode_x_t(raw: bytes, shape: tuple[int, int, int]) -> Float32:
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
    x_t = np.frombuffer(content, dtype).reshape(shape, order="F" if is_fortran else "C")
    with np.errstate(over="ignore"):  # of a float64: becomes infinite, and is refused
        x_t = np.ascontiguousarray(x_t, dtype=np.float32)
    if not np.isfinite(x_t).all():
        raise PictureError("an array with values that are not finite")
    return x_t


def _open(raw: bytes, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(raw), formats=_FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise PictureTooLarge(f"more than {max_pixels} pixels") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise PictureMedia("not a PNG, JPEG or WebP picture") from error
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise PictureTooLarge(
            f"{image.width} × {image.height} = {pixels} pixels: must be at most {max_pixels}"
        )
    return image


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # 16-bit grey: Pillow's own conversion would clip
        return Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba).convert("RGB")


def _fit(image: Image.Image, size: tuple[int, int], fit: Fit) -> Image.Image:
    if image.size == size:
        return image
    if fit == "error":
        raise PictureShape(
            f"{image.width} × {image.height}: must be {size[0]} × {size[1]}, "
            "or ask for fit = pad or resize"
        )
    if fit == "resize":
        return image.resize(size, Image.Resampling.LANCZOS)
    if image.width > size[0] or image.height > size[1]:
        image = ImageOps.contain(image, size, Image.Resampling.LANCZOS)
    canvas = Image.new(image.mode, size)
    canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return canvas
