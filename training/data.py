"""Images for training and evaluation: decoded, fitted and counted, whatever their source.

The result is one uint8 tensor in memory, or, for sets too big for that, decoding on demand.
Pictures are read by the decoder of the API (`jobs.decoding`): what a model was trained on and what
it is asked about are the same pixels.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from jobs.decoding import CHANNELS, open_picture
from jobs.errors import PictureError
from training.config import DataConfig
from training.sources import DataError, Source, open_source

IN_MEMORY_BYTES = 4 << 30
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 89_478_485  # of one picture; where Pillow, too, begins to suspect a bomb
_LISTED = 200  # unusable pictures in one message


class Images(Protocol):
    """Random access to a set of images."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels, if the set gives any."""

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of every image before fitting; None if they differ."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(uint8 [N, C, H, W], int64 labels [N]; −1 where there is none)."""


@dataclass(frozen=True)
class InMemoryImages:
    """Decoded once: pixels uint8 [N, C, H, W], labels int64 [N]. notes: for the user."""

    pixels: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    size: tuple[int, int] | None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.pixels[indices], self.labels[indices]

    def to(self, device: torch.device) -> InMemoryImages:
        """The same, held on a device, where batches are then put together."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))


class LazyImages:
    """Decoded on demand, by threads."""

    def __init__(self, reader: _Reader, survey: _Survey) -> None:
        self.reader, self.size, self.notes = reader, survey.size, survey.notes(reader)
        self.class_names = reader.source.class_names
        self._threads = ThreadPoolExecutor(os.cpu_count())

    def __len__(self) -> int:
        return len(self.reader.source)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        decoded = list(self._threads.map(self.reader.decode, indices.tolist()))
        pixels = torch.from_numpy(np.stack([one.pixels for one in decoded]))
        return pixels, torch.tensor([one.label for one in decoded])


@dataclass(frozen=True)
class _Decoded:
    """uint8 [C, side, side]; the label; and what the picture was before it was made to fit."""

    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    label: int
    size: tuple[int, int]
    grey: bool
    clear: bool


@dataclass
class _Survey:
    """What is found while all pictures are decoded."""

    sizes: set[tuple[int, int]] = field(default_factory=set)
    seen: Counter[str] = field(default_factory=Counter)
    unusable: list[str] = field(default_factory=list)

    def add(self, found: _Decoded) -> None:
        self.sizes.add(found.size)
        self.seen["colour"] += not found.grey
        self.seen["clear"] += found.clear

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of all pictures, if it is one."""
        return next(iter(self.sizes)) if len(self.sizes) == 1 else None

    def notes(self, reader: _Reader) -> tuple[str, ...]:
        """What the network will not see of the pictures, and what the source has to say."""
        notes, n, channels = list(reader.source.notes), len(reader.source), reader.channels
        if channels == 1 and self.seen["colour"]:
            notes.append(f"{self.seen['colour']} of {n} pictures are in colour: seen in grey")
        if channels != 4 and self.seen["clear"]:
            notes.append(
                f"{self.seen['clear']} of {n} pictures have an alpha channel: laid on black"
            )
        return tuple(notes)

    def check(self, config: DataConfig, reader: _Reader) -> None:
        """Raises DataError with every picture that cannot be used."""
        unusable = [f"{name}: {why}" for name, why in reader.source.unusable.items()]
        unusable += self.unusable
        if not unusable:
            return
        total = len(reader.source) + len(reader.source.unusable)
        lines = [f"  {line}" for line in unusable[:_LISTED]]
        if len(unusable) > _LISTED:
            lines.append(f"  … and {len(unusable) - _LISTED} more")
        head = (
            f"data.source = {config.source!r}: {len(unusable)} of {total} pictures cannot be used:"
        )
        raise DataError("\n".join([head, *lines]))


@dataclass(frozen=True)
class _Reader:
    """Decodes the pictures of a source for a network."""

    source: Source
    fit: str
    channels: int
    side: int

    def decode(self, index: int) -> _Decoded:
        """Raises DataError that names the picture."""
        encoded = self.source.read(index)
        try:
            picture = open_picture(encoded.raw, max_pixels=MAX_PIXELS, formats=FORMATS)
            check_size(picture.size, self.side, self.fit)
            image = fit(picture.decode(self.channels), self.side, self.fit)
        except PictureError as error:
            raise DataError(f"{encoded.name}: {error}") from error
        pixels = np.asarray(image, dtype=np.uint8).reshape(self.side, self.side, self.channels)
        width, height = picture.size
        return _Decoded(
            pixels.transpose(2, 0, 1).copy(),
            encoded.label,
            (height, width),
            picture.grey,
            picture.clear,
        )

    def attempt(self, index: int) -> _Decoded | str:
        """The decoded picture, or what is wrong with it."""
        try:
            return self.decode(index)
        except DataError as error:
            return str(error)


def check_size(size: tuple[int, int], side: int, mode: str) -> None:
    """Raises PictureError for a (width, height) that DataConfig.fit does not bring to side²."""
    width, height = size
    if size == (side, side) or mode == "resize":
        return
    if mode == "pad" and max(size) <= side:
        return
    hint = "data.fit = 'resize' scales it" if mode == "pad" else "data.fit = 'pad' or 'resize' fits"
    raise PictureError(f"{width}×{height} pixels, but network.image_size = {side}; {hint}")


def fit(picture: Image.Image, side: int, mode: str) -> Image.Image:
    """Bring a picture to side × side: see DataConfig.fit."""
    width, height = picture.size
    if (width, height) == (side, side):
        return picture
    if mode == "pad":
        canvas = Image.new(picture.mode, (side, side))
        canvas.paste(picture, ((side - width) // 2, (side - height) // 2))
        return canvas
    scale = side / min(width, height)
    scaled = (max(side, round(width * scale)), max(side, round(height * scale)))
    picture = picture.resize(scaled, Image.Resampling.LANCZOS)
    left, top = (scaled[0] - side) // 2, (scaled[1] - side) // 2
    return picture.crop((left, top, left + side, top + side))


def load_images(
    config: DataConfig, *, channels: int, side: int, num_classes: int, progress: bool = True
) -> InMemoryImages | LazyImages:
    """Open a set and decode all of it, also where the pixels are not kept (config.in_memory).

    Raises DataError: nothing there, labels missing or out of range, channels that no picture has,
    and every picture that is corrupt or of a wrong size in one message.
    """
    if channels not in CHANNELS:
        allowed = ", ".join(map(str, CHANNELS))
        raise DataError(f"network.in_channels = {channels}: must be one of {allowed} for pictures")
    source = open_source(config, num_classes=num_classes)
    reader, survey = _Reader(source, config.fit, channels, side), _Survey()
    wanted = len(source) * channels * side * side
    lazy = config.in_memory == "never" or (config.in_memory == "auto" and wanted > IN_MEMORY_BYTES)
    kept = 0 if lazy else len(source)
    pixels = torch.empty(kept, channels, side, side, dtype=torch.uint8)
    labels = torch.empty(kept, dtype=torch.long)
    for i, found in enumerate(_decode_all(reader, "checking" if lazy else "decoding", progress)):
        if isinstance(found, str):
            survey.unusable.append(found)
            continue
        survey.add(found)
        if not lazy:
            pixels[i], labels[i] = torch.from_numpy(found.pixels), found.label
    survey.check(config, reader)
    if lazy:
        return LazyImages(reader, survey)
    return InMemoryImages(pixels, labels, source.class_names, survey.size, survey.notes(reader))


def _decode_all(reader: _Reader, what: str, progress: bool) -> Iterator[_Decoded | str]:
    n = len(reader.source)
    bar = tqdm(total=n, desc=what, unit="image", disable=not progress, leave=False)
    with bar, ThreadPoolExecutor(os.cpu_count()) as threads:
        for start in range(0, n, 1024):
            block = range(start, min(start + 1024, n))
            yield from threads.map(reader.attempt, block)
            bar.update(len(block))
