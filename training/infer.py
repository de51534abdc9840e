"""A configuration for a folder of pictures, from the pictures themselves: `ddpm train FOLDER`."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.decoding import Picture, open_picture
from jobs.errors import PictureError
from training.config import DataConfig, TrainConfig, apply_overrides, parse_config
from training.data import FORMATS, MAX_PIXELS
from training.sources import DataError, FolderSource, is_picture_folder, open_folder

LOOKED_AT = 2000  # pictures, evenly spread
_LARGEST = {"cpu": 32, "cuda": 64}  # side that a night is enough for
_SMALL = {"channels": [32, 64, 64], "attention": [False, True, False]}
_LARGE = {"channels": [64, 128, 128, 128], "attention": [False, False, True, False]}


@dataclass(frozen=True)
class Found:
    """What was seen of a folder: its listing, (width, height) of pictures, and colour in any."""

    source: FolderSource
    sizes: list[tuple[int, int]]
    colour: bool
    why_unlabelled: str = ""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, where they tell anything: of two or more."""
        return self.source.class_names if len(self.source.class_names) > 1 else ()

    def describe(self) -> str:
        """In one line."""
        least, most = (tuple(f(side) for side in zip(*self.sizes, strict=True)) for f in (min, max))
        sizes = f"{least[0]}×{least[1]}" + ("" if least == most else f" to {most[0]}×{most[1]}")
        kinds = f"no classes{self.why_unlabelled}"
        if self.classes:
            kinds = f"{len(self.classes)} classes ({', '.join(self.classes)})"
        colour = "in colour" if self.colour else "grey"
        return f"{len(self.source)} pictures, {colour}, {sizes} pixels, {kinds}"


def infer_config(folder: Path, overrides: tuple[str, ...]) -> tuple[TrainConfig, Found]:
    """The configuration of a small network for the pictures of a folder, with overrides.

    Raises ConfigError, and DataError if there is nothing to look at.
    """
    given: dict[str, Any] = {"data": {"source": str(folder.resolve())}}
    apply_overrides(given, overrides)
    data = parse_config({"data": given["data"]}, str(folder)).data
    found = look(data)
    raw = _defaults(found, given)
    apply_overrides(raw, overrides)
    return parse_config(raw, str(folder)), found


def look(data: DataConfig) -> Found:
    """Read the headers of the pictures; those that can't be read are left to the decoding."""
    if not is_picture_folder(data.source):
        raise DataError(
            f"{data.source}: to train on parquet files or a hub dataset, give a configuration: "
            f"ddpm train mnist data.source={data.source}"
        )
    source, why = _listed(data)
    which = np.unique(np.linspace(0, len(source) - 1, LOOKED_AT).round().astype(int))
    headers = [_header(source, int(i)) for i in which]
    pictures = [header for header in headers if isinstance(header, Picture)]
    if not pictures:
        reasons = "\n".join(f"  {header}" for header in headers)
        raise DataError(f"data.source = {data.source!r}: no picture can be read:\n{reasons}")
    sizes = [picture.size for picture in pictures]
    return Found(source, sizes, not all(picture.grey for picture in pictures), why)


def _listed(data: DataConfig) -> tuple[FolderSource, str]:
    """The folder, with classes if every picture lies in one; else why it has none."""
    if any(path.is_dir() for path in Path(data.source).iterdir()):
        with contextlib.suppress(DataError):
            source = open_folder(data, labelled=True)
            if not source.unusable:
                return source, ""
            loose = len(source.unusable)
            return open_folder(data, labelled=False), f": {loose} pictures lie beside the folders"
    return open_folder(data, labelled=False), ""


def _header(source: FolderSource, index: int) -> Picture | str:
    """The picture, or what is wrong with it."""
    encoded = source.read(index)
    try:
        return open_picture(encoded.raw, max_pixels=MAX_PIXELS, formats=FORMATS)
    except PictureError as error:
        return f"{encoded.name}: {error}"


def _defaults(found: Found, given: dict[str, Any]) -> dict[str, Any]:
    classes, network = len(found.classes), given.get("network")
    asked = network.get("image_size") if isinstance(network, dict) else None
    side = asked if type(asked) is int else _side(found.sizes, str(given.get("device", "auto")))
    shape = _SMALL if side <= 32 else _LARGE
    return {
        "data": {**given["data"], "fit": _fit(found.sizes, side)},
        "network": {
            "image_size": side,
            "in_channels": 3 if found.colour else 1,
            **shape,
            "res_blocks": 2,
            "groups": 8,
            "num_classes": classes,
            "null_class": classes > 0,
        },
        "optimizer": {"learning_rate": 4e-4, "warmup_steps": 200},
        "steps": 20_000,
        "batch_size": 32,
        "ema_decay": 0.999,
        "checkpoint_every": 500,
        "sample_every": 1000,
        "sample_images": 36,
        "sample_steps": 25,
    }


def _side(sizes: list[tuple[int, int]], device: str) -> int:
    """Of the network: the pictures', as a multiple of 4 or 8, up to what suits the device."""
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    largest = _LARGEST["cuda" if on_gpu else "cpu"]
    middle = float(np.median([min(size) for size in sizes]))
    step = 4 if middle <= 32 else 8
    return int(min(largest, max(8, math.ceil(middle / step) * step)))


def _fit(sizes: list[tuple[int, int]], side: int) -> str:
    """pad, where all pictures have one size and it is nearly the network's; else resize."""
    same, (width, height) = len(set(sizes)) == 1, sizes[0]
    padded = same and side - 8 < min(width, height) and max(width, height) < side
    return "pad" if padded else "resize"
