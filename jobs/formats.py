"""The one table of file formats: what each is called, and what it can hold.

Routes, documentation, content negotiation and the field `format` of a request all come from it: a
new format is an encoder and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from pydantic import GetCoreSchemaHandler

from jobs.pictures import Float32, UInt8, encode_npy, encode_png, encode_webp, film, zip_files


class PictureEncoder(Protocol):
    """uint8 [H,W,C] → file, with the manifest where the format takes one; px: longer side."""

    def __call__(self, pixels: UInt8, manifest: Mapping[str, Any] | None, *, px: int) -> bytes:
        """The file."""


@dataclass(frozen=True)
class Format:
    """One format, named by its suffix. Each encoder: None where the format cannot hold it.

    most: pixels a side that it can hold; 0: any. picture: see PictureEncoder. array: float32
    [C,H,W] itself. film: frames uint8 [H,W,C]. archive: (name, content) of files.
    """

    media: str
    most: int = 0
    picture: PictureEncoder | None = None
    array: Callable[[Float32], bytes] | None = None
    film: Callable[[Sequence[UInt8]], bytes] | None = None
    archive: Callable[[Sequence[tuple[str, bytes]]], bytes] | None = None


FORMATS: dict[str, Format] = {
    "png": Format("image/png", picture=encode_png),
    "webp": Format(
        "image/webp", most=16383, picture=encode_webp, film=partial(film, suffix="webp")
    ),
    "npy": Format("application/x-npy", array=encode_npy),
    "gif": Format("image/gif", most=65535, film=partial(film, suffix="gif")),
    "zip": Format("application/zip", archive=zip_files),
}


def holding(*what: str) -> tuple[str, ...]:
    """Suffixes of the formats that can hold any of these: picture, array, film, archive."""
    return tuple(
        suffix
        for suffix, its in FORMATS.items()
        if any(getattr(its, encoder) is not None for encoder in what)
    )


PICTURES = holding("picture")
IMAGES = holding("picture", "array")
FILMS = holding("film")
ARCHIVES = holding("archive")


@dataclass(frozen=True)
class OneOf:
    """Metadata of a `str` in a model or a route: it must be one of these names."""

    names: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        """A literal, for validation and in JSON Schema."""
        return handler.generate_schema(Literal.__getitem__(self.names))
