"""The one decoder of pictures, for uploads, training and evaluation. NumPy and Pillow only.

| Pillow's mode | is | with a tRNS chunk |
|---|---|---|
| 1, L | grey | the key value is transparent |
| I;16 | grey, its high byte | the key value is transparent, compared in 16 bits |
| LA, RGBA | with alpha | |
| P | colour | alpha of each palette entry |
| RGB, CMYK, YCbCr | colour | the key colour is transparent |

A model of 1 or 3 channels gets the grey or the colours of the picture laid on black where it is
transparent; one of 4 gets colours and alpha as they are, alpha 255 where there is none. The EXIF
orientation is applied; all other metadata is left unread.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from jobs.containers import JPEG_START, PNG_SIGNATURE, orientation, strip
from jobs.errors import PictureError, PictureMedia, PictureTooLarge

UPLOADED = ("PNG", "JPEG", "WEBP")  # what the API takes

CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
# Mode → the mode that holds it in 8 bits a sample.
_IN_8_BITS = {
    "1": "L", "L": "L", "I;16": "L", "I;16B": "L", "I;16L": "L", "I;16N": "L",
    "LA": "RGBA", "PA": "RGBA", "P": "RGB",
    "RGB": "RGB", "RGBX": "RGB", "RGBA": "RGBA", "RGBa": "RGBA", "CMYK": "RGB", "YCbCr": "RGB",
}  # fmt: skip
# EXIF orientation → what turns the picture upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# How a file begins that is of a format, or was.
_STARTS = {
    "PNG": re.compile(re.escape(PNG_SIGNATURE)),
    "JPEG": re.compile(re.escape(JPEG_START)),
    "WEBP": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
}
_LYING = [_TURNS[number] for number in (5, 6, 7, 8)]


@dataclass(frozen=True)
class Picture:
    """A picture of which the header alone was read.

    turn: what makes it upright, if anything; depth: bits a sample of a PNG.
    """

    image: Image.Image
    turn: Image.Transpose | None
    depth: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), upright."""
        width, height = self.image.size
        return (height, width) if self.turn in _LYING else (width, height)

    @property
    def grey(self) -> bool:
        """Whether the file holds no colours."""
        return self.image.mode == "LA" or _IN_8_BITS.get(self.image.mode) == "L"

    @property
    def clear(self) -> bool:
        """Whether it has an alpha channel, or a colour or palette entry that is transparent."""
        return self.image.has_transparency_data

    def decode(self, channels: int) -> Image.Image:
        """Its pixels, upright, as L, RGB or RGBA: see the table. Raises PictureError."""
        if channels not in CHANNELS:
            raise PictureError(f"a model with {channels} channels takes no pictures")
        if self.image.mode not in _IN_8_BITS:
            raise PictureError(
                f"pixels of mode {self.image.mode}: must be 1, L, LA, P, RGB, RGBA, CMYK, YCbCr "
                "or I;16"
            )
        try:
            self.image.load()
            image = _in_8_bits(self.image, self.depth)
            image = image if self.turn is None else image.transpose(self.turn)
            return _with_channels(image, channels)
        except Exception as error:  # Pillow's parsers let out whatever they stumble over
            raise PictureError(f"the picture cannot be read: {error}") from error


def open_picture(raw: bytes, *, max_pixels: int, formats: tuple[str, ...] = UPLOADED) -> Picture:
    """Read a file's header. Raises PictureMedia, PictureTooLarge (pixels, or JPEG scans), or
    PictureError for one that is broken or cut off there."""
    container = strip(raw)
    try:
        image = Image.open(io.BytesIO(container.raw), formats=formats)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise PictureTooLarge(f"more than {max_pixels} pixels") from error
    except Exception as error:  # as above
        begun = [name for name, start in _STARTS.items() if start.match(raw) and name in formats]
        if begun:
            raise PictureError(f"a {_said(begun[0])} that is broken or cut off") from error
        why = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        raise PictureMedia(f"not a {_listed(formats)} picture{why}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise PictureTooLarge(
            f"{width} × {height} = {width * height} pixels: must be at most {max_pixels}"
        )
    exif = container.exif or image.info.get("exif") or b""
    turn = _TURNS.get(orientation(exif)) if isinstance(exif, bytes) else None
    return Picture(image, turn, container.png_depth)


def _listed(formats: tuple[str, ...]) -> str:
    names = [_said(name) for name in formats]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _said(name: str) -> str:
    return "WebP" if name == "WEBP" else name


def _in_8_bits(image: Image.Image, depth: int) -> Image.Image:
    """As L, RGB or, where anything is transparent, RGBA."""
    key = image.info.get("transparency")
    wanted = _IN_8_BITS[image.mode]
    if image.mode == "P" and key is not None:
        return image.convert("RGBA")
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip
        samples: NDArray[np.integer[Any]] = np.asarray(image, dtype=np.uint16)
        plain = Image.fromarray((samples >> 8).astype(np.uint8))
    else:
        plain = image.convert(wanted)
        samples = np.asarray(plain)
    if key is None or wanted == "RGBA":
        return plain
    return _without_key(plain, samples, key, depth)


def _without_key(
    plain: Image.Image, samples: NDArray[np.integer[Any]], key: int | tuple[int, ...], depth: int
) -> Image.Image:
    """RGBA, alpha 0 where the samples are the key; the file gives it in its own depth."""
    found: NDArray[np.integer[Any]] = np.asarray(key, dtype=np.uint16)
    if samples.dtype == np.uint8:
        if depth == 16:
            found = found >> 8  # RGB: Pillow keeps the high bytes alone
        elif plain.mode == "L" and depth in (2, 4):
            found = found * (255 // (2**depth - 1))
    same = samples == found
    clear = same if plain.mode == "L" else same.all(axis=-1)
    out = plain.convert("RGBA")
    out.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    return out


def _with_channels(image: Image.Image, channels: int) -> Image.Image:
    if image.mode == "RGBA" and channels != 4:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    return image.convert(CHANNELS[channels])
