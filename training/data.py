"""Images for training, through Hugging Face `datasets`: a folder, parquet files or a hub id.

The result is one uint8 tensor in memory, or, for sets too big for that, decoding on demand.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import glob
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from training.config import DataConfig

IN_MEMORY_BYTES = 4 << 30
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class DataError(ValueError):
    """Data that cannot be trained on; the message names the image and what is wanted."""


class Images(Protocol):
    """Random access to a set of images."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels, if the set gives any."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the first image, before fitting."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(uint8 [N, C, H, W], int64 labels [N]; −1 where there is none)."""


@dataclass(frozen=True)
class InMemoryImages:
    """Decoded once: pixels uint8 [N, C, H, W], labels int64 [N]."""

    pixels: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.pixels[indices], self.labels[indices]


class LazyImages:
    """Decoded on demand, by threads."""

    def __init__(self, rows: _Rows, size: tuple[int, int]) -> None:
        self.rows, self.size = rows, size
        self.class_names = rows.class_names
        self._threads = ThreadPoolExecutor(os.cpu_count())

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        decoded = list(self._threads.map(self.rows.decode, indices.tolist()))
        pixels = torch.from_numpy(np.stack([pixels for pixels, _ in decoded]))
        return pixels, torch.tensor([label for _, label in decoded])


@dataclass(frozen=True)
class _Rows:
    """A `datasets.Dataset` with undecoded images, and how to decode a row."""

    dataset: Any
    config: DataConfig
    channels: int
    side: int
    num_classes: int
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.dataset)

    def open(self, index: int) -> tuple[Image.Image, str, int]:
        """The picture of a row as stored, its name for messages, and its label."""
        row = self.dataset[index]
        name = f"image {index}"
        cell = row[self.config.image_column]
        if not isinstance(cell, dict):
            raise DataError(f"{name}: column {self.config.image_column!r} holds no image")
        if cell.get("path"):
            name += f" ({cell['path']})"
        try:
            source = _open_cell(cell)
            source.load()
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{name}: not a readable image: {error}") from error
        return source, name, self._label(row, name)

    def _label(self, row: dict[str, Any], name: str) -> int:
        if not self.num_classes:
            return -1
        label = row[self.config.label_column]
        if not isinstance(label, int) or not 0 <= label < self.num_classes:
            raise DataError(f"{name}: label {label!r}, must be 0..{self.num_classes - 1}")
        return label

    def decode(self, index: int) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], int]:
        """uint8 [C, side, side] and the label (−1: none)."""
        picture, name, label = self.open(index)
        picture = fit(self._with_channels(picture, name), self.side, self.config.fit, name)
        pixels = np.asarray(picture, dtype=np.uint8).reshape(self.side, self.side, self.channels)
        return pixels.transpose(2, 0, 1).copy(), label

    def _with_channels(self, picture: Image.Image, name: str) -> Image.Image:
        found = len(picture.getbands())
        if picture.mode == "P":
            picture, found = picture.convert("RGB"), 3
        if found != self.channels or picture.mode not in ("L", "RGB", "RGBA"):
            raise DataError(
                f"{name}: mode {picture.mode} has {found} channel(s), but network.in_channels = "
                f"{self.channels}; convert the images or change the network"
            )
        return picture


def _open_cell(cell: dict[str, Any]) -> Image.Image:
    encoded = cell.get("bytes")
    return Image.open(cell["path"] if encoded is None else BytesIO(encoded))


def fit(picture: Image.Image, side: int, mode: str, name: str) -> Image.Image:
    """Bring a picture to side × side: see DataConfig.fit. Raises DataError."""
    width, height = picture.size
    if (width, height) == (side, side):
        return picture
    if mode == "resize":
        scale = side / min(width, height)
        scaled = (max(side, round(width * scale)), max(side, round(height * scale)))
        picture = picture.resize(scaled, Image.Resampling.LANCZOS)
        left, top = (scaled[0] - side) // 2, (scaled[1] - side) // 2
        return picture.crop((left, top, left + side, top + side))
    if mode == "pad" and width <= side and height <= side:
        canvas = Image.new(picture.mode, (side, side))
        canvas.paste(picture, ((side - width) // 2, (side - height) // 2))
        return canvas
    hint = "data.fit = 'resize' scales it" if mode == "pad" else "data.fit = 'pad' or 'resize' fits"
    raise DataError(f"{name}: {width}×{height} pixels, but network.image_size = {side}; {hint}")


def load_images(
    config: DataConfig, *, channels: int, side: int, num_classes: int, progress: bool = True
) -> Images:
    """Open a set and decode it (see DataConfig.in_memory).

    Raises DataError: nothing there, a corrupt image, a wrong size or number of channels, labels
    missing or out of range.
    """
    rows = _open(config, channels=channels, side=side, num_classes=num_classes)
    first, _, _ = rows.open(0)
    size = (first.size[1], first.size[0])
    wanted = len(rows) * channels * side * side
    if config.in_memory == "never" or (config.in_memory == "auto" and wanted > IN_MEMORY_BYTES):
        return LazyImages(rows, size)
    pixels = torch.empty(len(rows), channels, side, side, dtype=torch.uint8)
    labels = torch.empty(len(rows), dtype=torch.long)
    for i, (decoded, label) in enumerate(_decode_all(rows, progress)):
        pixels[i] = torch.from_numpy(decoded)
        labels[i] = label
    return InMemoryImages(pixels, labels, rows.class_names, size)


def _decode_all(rows: _Rows, progress: bool) -> Iterator[tuple[Any, int]]:
    bar = tqdm(total=len(rows), desc="decoding", unit="image", disable=not progress, leave=False)
    with bar, ThreadPoolExecutor(os.cpu_count()) as threads:
        for start in range(0, len(rows), 1024):
            block = range(start, min(start + 1024, len(rows)))
            yield from threads.map(rows.decode, block)
            bar.update(len(block))


def _open(config: DataConfig, *, channels: int, side: int, num_classes: int) -> _Rows:
    import datasets

    dataset = _load(config)
    if config.image_column not in dataset.column_names:
        raise DataError(
            f"data.image_column = {config.image_column!r}: {config.source} has the columns "
            f"{', '.join(dataset.column_names)}"
        )
    dataset = dataset.cast_column(config.image_column, datasets.Image(decode=False))
    if config.limit is not None:
        dataset = dataset.select(range(min(config.limit, len(dataset))))
    if not len(dataset):
        raise DataError(f"data.source = {config.source!r}: holds no images")
    if num_classes and config.label_column not in dataset.column_names:
        raise DataError(
            f"data.label_column = {config.label_column!r}: {config.source} has no such column, "
            f"and network.num_classes = {num_classes} needs labels"
        )
    names = getattr(dataset.features.get(config.label_column), "names", None) or ()
    if num_classes and names and len(names) != num_classes:
        raise DataError(
            f"network.num_classes = {num_classes}: {config.source} has {len(names)} classes"
        )
    return _Rows(dataset, config, channels, side, num_classes, tuple(names))


def _load(config: DataConfig) -> Any:
    """The `datasets.Dataset` behind data.source."""
    import datasets

    datasets.disable_progress_bars()
    path = Path(config.source).expanduser()
    parquet = sorted(glob(str(path / f"{config.split}*.parquet"))) if path.is_dir() else []
    if not parquet and config.source.endswith(".parquet"):
        parquet = sorted(glob(str(path)))
        if not parquet:
            raise DataError(f"data.source = {config.source!r}: no such file")
    if parquet:
        files = {config.split: parquet}
        return datasets.load_dataset("parquet", data_files=files, split=config.split)
    if path.is_dir():
        if not any(p.suffix.lower() in IMAGE_SUFFIXES for p in path.rglob("*")):
            raise DataError(f"data.source = {config.source!r}: the folder holds no images")
        return datasets.load_dataset("imagefolder", data_dir=str(path), split=config.split)
    if path.exists() or config.source.startswith((".", "/", "~")):
        raise DataError(f"data.source = {config.source!r}: no such folder or .parquet file")
    try:
        return datasets.load_dataset(config.source, split=config.split)
    except Exception as error:  # the hub client raises many kinds; all mean "not to be had"
        raise DataError(
            f"data.source = {config.source!r}: no such folder, and not to be had from the hub: "
            f"{error}"
        ) from error
